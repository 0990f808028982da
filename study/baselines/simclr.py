"""SimCLR (Chen et al., arXiv 2002.05709).

With one negative, noise alone and small batches as in Bordes, Balestriero, Vincent, 2303.01986.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from study.baselines.common import Objective

# solo-learn's settings for CIFAR-10 (da Costa et al., JMLR 2022; scripts/pretrain/cifar/*.yaml).
PUBLISHED = {
    "patches": 2,
    "batch": 256,
    "augmentation": "simclr",
    "dim": 256,
    "optimizer": "lars",
    "eta": 0.02,
    "lr": 0.4,
    "weight_decay": 1e-4,
    "temperature": 0.2,
}


class SimCLR(Objective):
    """NT-Xent: tell each view's other view from the batch's other images.

    `negatives`: from so many of them, drawn at each step (0: from all). `noise`: the deviation of
    Gaussian noise that is added to each view. `one_crop`: both views are the first one, so that
    noise alone tells them apart.
    """

    def __init__(
        self,
        temperature: float,
        negatives: int = 0,
        noise: float = 0.0,
        one_crop: bool = False,
        seed: int = 0,
    ):
        super().__init__(seed)
        self.temperature = temperature
        self.negatives = negatives
        self.noise = noise
        self.one_crop = one_crop

    def prepare(self, x: Tensor) -> Tensor:
        if self.one_crop:
            first, _ = x.chunk(2)
            x = torch.cat([first, first])
        if self.noise:
            noise = torch.randn(x.shape, generator=self.chance("noise"))
            x = x + self.noise * noise.to(x)
        return x

    def loss(self, z: Tensor, x: Tensor, index: Tensor) -> Tensor:
        _, b, _ = z.shape
        u = F.normalize(z.flatten(0, 1), dim=1)  # (2b, d): rows j and j + b are one image
        similarity = u @ u.T / self.temperature  # (2b, 2b)
        view = torch.arange(2 * b, device=z.device)
        positive = similarity[view, view.roll(b)].unsqueeze(1)  # (2b, 1)
        other = (view.view(-1, 1) - view) % b != 0  # (2b, 2b): of another image
        negative = similarity[other].view(2 * b, 2 * b - 2)
        if self.negatives:
            draw = torch.rand(negative.shape, generator=self.chance("negatives")).to(z.device)
            chosen = draw.topk(min(self.negatives, 2 * b - 2)).indices
            negative = negative.gather(1, chosen)
        logits = torch.cat([positive, negative], 1)
        return -F.log_softmax(logits, 1)[:, 0].mean()
