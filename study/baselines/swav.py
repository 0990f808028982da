"""SwAV (Caron et al., arXiv 2006.09882), without multi-crop."""

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from study.baselines.common import Objective

# solo-learn's settings for CIFAR-10. Here the prototypes learn from the start, and the queue serves
# once it is full.
PUBLISHED = {
    "patches": 2,
    "batch": 256,
    "augmentation": "simclr",
    "dim": 128,
    "optimizer": "lars",
    "eta": 0.02,
    "lr": 0.6,
    "weight_decay": 1e-6,
    "temperature": 0.1,
}


class SwAV(Objective):
    """Predict each view's code, its soft assignment to prototypes, from the other view.

    Codes are balanced by Sinkhorn, over the batch and the `queue` embeddings before it, once there
    are that many (paper section 3.1).
    """

    def __init__(self, dim: int, temperature: float, prototypes: int = 3000, queue: int = 3840):
        super().__init__()
        self.temperature = temperature
        self.prototypes = nn.Parameter(torch.randn(prototypes, dim))  # unit rows at each call
        self.register_buffer("queue", torch.zeros(2, queue, dim))  # of each view, the newest first

    def loss(self, z: Tensor, x: Tensor, index: Tensor) -> Tensor:
        with torch.no_grad():
            self.prototypes.copy_(F.normalize(self.prototypes, dim=1))
        u, c = F.normalize(z, dim=-1), self.prototypes
        scores = u @ c.T  # (2, b, prototypes)
        codes = self.codes(u.detach(), scores.detach())
        log_p = F.log_softmax(scores / self.temperature, -1)
        return -(codes.flip(0) * log_p).sum(-1).mean()

    @torch.no_grad()
    def codes(self, u: Tensor, scores: Tensor) -> Tensor:
        """Of both views, `(2, b, prototypes)`; then the batch joins the queue."""
        _, b, _ = u.shape
        room = self.queue.shape[1]
        before = self.queue if self.calls * b >= room else self.queue[:, :0]
        codes = []
        for ours, queue in zip(scores, before, strict=True):
            codes.append(sinkhorn(torch.cat([ours, queue @ self.prototypes.T]))[:b])
        self.queue.copy_(torch.cat([u, self.queue], 1)[:, :room])
        return torch.stack(codes)


def sinkhorn(scores: Tensor, eps: float = 0.05, iterations: int = 3) -> Tensor:
    """`(b, prototypes)` -> codes: rows sum to 1, columns, nearly, to b / prototypes."""
    q = torch.exp((scores - scores.max()) / eps)
    for _ in range(iterations):
        q = q / q.sum(0, keepdim=True).clamp(min=1e-30) / q.shape[1]
        q = q / q.sum(1, keepdim=True).clamp(min=1e-30)
    return q
