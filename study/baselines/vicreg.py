"""VICReg (Bardes, Ponce, LeCun, arXiv 2105.04906)."""

import torch.nn.functional as F
from torch import Tensor

from study.baselines.common import Objective

# solo-learn's settings for CIFAR-10.
PUBLISHED = {
    "patches": 2,
    "batch": 256,
    "augmentation": "vicreg",
    "dim": 2048,
    "optimizer": "lars",
    "eta": 0.02,
    "lr": 0.3,
    "weight_decay": 1e-4,
}


class VICReg(Objective):
    """25 invariance + 25 variance + 1 covariance (equation 6 of the paper).

    The invariance is divided by d as in the official code; the views' variances are added up as in
    the paper, where the official code takes half.
    """

    def loss(self, z: Tensor, x: Tensor, index: Tensor) -> Tensor:
        return 25 * self.invariance(z) + 25 * self.variance(z) + self.covariance(z)

    @staticmethod
    def invariance(z: Tensor) -> Tensor:
        return F.mse_loss(z[0], z[1])

    @staticmethod
    def variance(z: Tensor) -> Tensor:
        """Each dimension's deviation over the batch should reach 1."""
        deviation = (z.var(1) + 1e-4).sqrt()  # (2, d)
        return F.relu(1 - deviation).mean(1).sum()

    @staticmethod
    def covariance(z: Tensor) -> Tensor:
        """No two dimensions should vary together: squares off the diagonal, over d."""
        _, b, d = z.shape
        z = z - z.mean(1, keepdim=True)
        c = z.mT @ z / (b - 1)  # (2, d, d)
        on_the_diagonal = c.diagonal(dim1=1, dim2=2).pow(2).sum()
        return (c.pow(2).sum() - on_the_diagonal) / d
