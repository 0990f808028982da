"""ReSSL (Zheng et al., arXiv 2107.09282)."""

import torch
import torch.nn.functional as F
from torch import Tensor

from study.baselines.common import Objective, Target, Views

# solo-learn's settings for CIFAR-10; momentum and queue are the paper's.
PUBLISHED = {
    "patches": 2,
    "batch": 256,
    "augmentation": "ressl",
    "dim": 256,
    "optimizer": "sgd",
    "eta": 0.0,
    "lr": 0.05,
    "weight_decay": 1e-4,
    "temperature": 0.1,
}


class ReSSL(Objective):
    """A strong view relates to the `queue` embeddings before it as a weak view of the image does.

    The weak view goes through a target network. Cross-entropy between the two softmaxes, of which
    the weak view's is sharper (0.04 against 0.1).
    """

    def __init__(
        self,
        encoder: Views,
        dim: int,
        temperature: float,
        sharp: float = 0.04,
        momentum: float = 0.99,
        queue: int = 4096,
        precision: str = "float32",
    ):
        super().__init__()
        self.temperature = temperature
        self.sharp = sharp
        self.momentum = momentum
        self.target = Target(encoder, precision)
        self.target.network.views = 1
        self.register_buffer("queue", F.normalize(torch.randn(queue, dim), dim=1))

    def loss(self, z: Tensor, x: Tensor, index: Tensor) -> Tensor:
        self.target.follow(self.momentum)
        student = F.normalize(z[0], dim=1)  # (b, d), of the strong view
        teacher = F.normalize(self.target(x[len(student) :]), dim=1)  # (b, d), of the weak one
        wanted = F.softmax(teacher @ self.queue.T / self.sharp, 1)  # (b, queue)
        guess = F.log_softmax(student @ self.queue.T / self.temperature, 1)
        self.queue = torch.cat([teacher, self.queue])[: len(self.queue)]
        return -(wanted * guess).sum(1).mean()

    def encoded(self, z: Tensor) -> Tensor:
        return z[:1]  # the strong view
