"""Instance discrimination on a single branch (Cao & Wu, arXiv 2404.19289)."""

import math
from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

import empssl
from empssl import Augmentation, generator_of
from study.baselines.common import Config, Objective, Views

# The authors' code.
PUBLISHED = {
    "patches": 1,
    "batch": 512,
    "augmentation": "single",
    "dim": 2048,
    "optimizer": "sgd",
    "eta": 0.0,
    "lr": 1.0,
    "weight_decay": 1e-4,
    "temperature": 0.2,
}


class SingleBranch(Objective):
    """Every image is a class of its own, whose weight is its row of a memory bank.

    loss = -sum_k t_k log softmax(cos / tau)_k + distillation * SqrtKL, over the batch's own rows
    and `others` drawn from the rest of the bank; t is the image's own row, or with CutMix both
    images' rows by their shares.

    The bank's update. With p = softmax(cos / tau) the cross-entropy of one image has, with respect
    to row w_k,

        dL/dw_k = (p_k - t_k) z / tau,

    so a step against the gradient moves an image's own row by (1 - p) z, not by z, and every other
    row away from z by p_k z. The moving average, the released code's only rule, moves an image's
    own row alone: w <- m w + (1 - m) z, CutMix or not. The gradient formula, and that the other
    rows move too, is the paper's. The size of the step is derived here: m and 1 - m are kept, so
    that without CutMix and where p is 0 both rules are one; SqrtKL has no part in it,

        w_k <- unit(m^[k is in the batch] w_k + (1 - m) sum_j (t_jk - p_jk) z_j).

    `start()`, called at the first step, gives features (N, d) of the untrained network, one forward
    pass over the data ("feature calibrate"); None: the bank starts at random.
    """

    def __init__(self, config: Config, N: int, start: Callable[[], Tensor] | None = None):
        super().__init__(config.seed)
        chance = generator_of(config.seed, "bank", 0)
        bank = torch.randn(N, config.dim, generator=chance)
        self.register_buffer("bank", F.normalize(bank, dim=1))
        self.start = start
        self.cutmix = config.cutmix
        self.mixed = None  # the batch's partners and share, as cut_mix returns them
        self.temperature = config.temperature
        self.others = config.others
        self.distillation = config.distillation
        self.momentum = config.bank_momentum
        self.update = config.bank_update

    def prepare(self, x: Tensor) -> Tensor:
        if self.cutmix:
            x, self.mixed = cut_mix(x, self.cutmix, self.chance("cutmix"))
        return x

    def loss(self, z: Tensor, x: Tensor, index: Tensor) -> Tensor:
        if self.calls == 0 and self.start:
            self.bank.copy_(F.normalize(self.start(), dim=1))
        z = F.normalize(z[0], dim=1)  # (b, d)
        rows = self.rows(index).to(z.device)  # (b + others,)
        w = self.bank[rows]
        t = self.targets(len(index), len(rows)).to(z)  # (b, b + others)
        cos = z @ w.T  # (b, b + others)
        cross_entropy = -(t * F.log_softmax(cos / self.temperature, 1)).sum(1).mean()
        p = F.softmax(cos.detach() / self.temperature, 1)
        self.update_bank(rows, w, z.detach(), t, p)
        return cross_entropy + self.distillation * sqrt_kl(cos)

    def rows(self, index: Tensor) -> Tensor:
        """The batch's own rows of the bank, and others."""
        order = torch.randperm(len(self.bank), generator=self.chance("others"))
        others = order[~torch.isin(order, index)][: self.others]
        return torch.cat([index, others])

    def targets(self, b: int, rows: int) -> Tensor:
        """Whose each image is: `(b, rows)`, each row sums to 1."""
        own = torch.arange(b)
        partner, share = self.mixed or (own, 1.0)
        t = torch.zeros(b, rows)
        t[own, own] += share
        t[own, partner] += 1 - share
        return t

    @torch.no_grad()
    def update_bank(self, rows: Tensor, w: Tensor, z: Tensor, t: Tensor, p: Tensor) -> None:
        b, m = len(z), self.momentum
        if self.update == "average":
            self.bank[rows[:b]] = F.normalize(m * w[:b] + (1 - m) * z, dim=1)
        else:
            kept = torch.cat([m * w[:b], w[b:]])
            self.bank[rows] = F.normalize(kept + (1 - m) * (t - p).T @ z, dim=1)


def cut_mix(x: Tensor, alpha: float, chance: torch.Generator) -> tuple[Tensor, tuple]:
    """Paste a box of each image's partner over it, one box for the batch.

    `(b, 3, s, s)` -> the same, and (partners (b,), share of the image that stayed). The share, at
    least a half, is drawn from Beta(alpha, alpha).
    """
    b, _, h, w = x.shape
    partner = torch.randperm(b, generator=chance)
    # PyTorch draws from a Beta distribution without a generator only; NumPy's is seeded by it.
    seed = int(torch.randint(2**31, (), generator=chance))
    share = np.random.default_rng(seed).beta(alpha, alpha)
    side = math.sqrt(min(share, 1 - share))  # of the box, in units of the image's
    down, across = torch.rand(2, generator=chance).tolist()  # the middle of the box
    top = border(down - side / 2, h)
    bottom = border(down + side / 2, h)
    left = border(across - side / 2, w)
    right = border(across + side / 2, w)
    box = x[partner.to(x.device), :, top:bottom, left:right]
    x = x.clone()
    x[:, :, top:bottom, left:right] = box
    return x, (partner, 1 - (bottom - top) * (right - left) / (h * w))


def border(place: float, side: int) -> int:
    """The pixel at `place`, in units of the image's side, moved into the image."""
    return round(min(max(place, 0), 1) * side)


def sqrt_kl(cos: Tensor) -> Tensor:
    """KL(p || u) of p = softmax(cos), without temperature.

    u is p's square root, made a distribution, and has no gradient.
    """
    log_p = F.log_softmax(cos, 1)
    log_u = F.log_softmax(log_p.detach() / 2, 1)
    return (log_p.exp() * (log_p - log_u)).sum(1).mean()


@torch.no_grad()
def untrained_features(
    encoder: Views, images: Tensor, config: Config, augmentation: Augmentation
) -> Tensor:
    """One forward pass over the images, `(N, d)`, within the training's seconds.

    BatchNorm uses each batch's own statistics: it has no others. So batches are drawn, since a
    folder's images stand in the order of their classes.
    """
    image_size = images.shape[2:]
    device = torch.device(config.device)
    order = torch.randperm(len(images), generator=generator_of(config.seed, "calibrate order", 0))
    parts = []
    for i, index in enumerate(order.tensor_split(math.ceil(len(images) / config.batch))):
        chance = generator_of(config.seed, "calibrate", i)
        params = empssl.sample_patches(len(index), 1, image_size, augmentation, chance)
        x = empssl.extract_patches(images, index, params, config.patch_size, device=device)
        parts.append(encoder.embedding(x))
    return torch.cat(parts)[order.argsort().to(device)]
