"""BYOL (Grill et al., arXiv 2006.07733)."""

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from empssl import cosine
from study.baselines.common import Objective, Target, Views

# solo-learn's settings for CIFAR-10.
PUBLISHED = {
    "patches": 2,
    "batch": 256,
    "augmentation": "byol",
    "dim": 256,
    "optimizer": "lars",
    "eta": 0.02,
    "lr": 1.0,
    "weight_decay": 1e-5,
}


class BYOL(Objective):
    """Predict, from one view, the target network's embedding of the other.

    The target's momentum goes from 0.99 to 1 in `steps`.
    """

    def __init__(
        self, encoder: Views, dim: int, hidden: int, steps: int, precision: str = "float32"
    ):
        super().__init__()
        self.predict = nn.Sequential(
            nn.Linear(dim, hidden),
            nn.BatchNorm1d(hidden),
            nn.ReLU(),
            nn.Linear(hidden, dim),
        )
        self.target = Target(encoder, precision)
        self.steps = steps

    def loss(self, z: Tensor, x: Tensor, index: Tensor) -> Tensor:
        self.target.follow(1 - cosine(0.01, self.calls, self.steps))
        guess = torch.stack([self.predict(view) for view in z])  # (2, b, d)
        answer = self.target(x).view_as(z).flip(0)  # of the other view
        agreement = (F.normalize(guess, dim=-1) * F.normalize(answer, dim=-1)).sum(-1)
        return 2 * (2 - 2 * agreement).mean()  # the sum of both directions
