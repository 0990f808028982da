"""What the methods share: the base of their objectives, views of an image, a target network."""

import copy
import math

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

import empssl
from empssl import Augmentation, generator
from empssl_support.cli import UsageError


class Objective(nn.Module):
    """What `empssl.train` minimises; a method is a `loss(z, x, index)`.

    It counts its calls: what a method draws is a function of (seed, purpose, call), so that a run
    which is resumed goes on as it would have. R and D of the unit embeddings are logged for all.
    """

    def __init__(self, seed: int = 0):
        super().__init__()
        self.seed = seed
        self.calls = 0

    def forward(self, z: Tensor, x: Tensor, index: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        z = z if z.dtype == torch.float64 else z.float()
        loss = self.loss(z, x, index)
        self.calls += 1
        with torch.no_grad():
            u = F.normalize(z, dim=-1)
            terms = {"R": empssl.coding_rate(u), "D": empssl.invariance(u)}
        return loss, terms

    def chance(self, purpose: str) -> torch.Generator:
        return generator(self.seed, purpose, self.calls)

    def get_extra_state(self) -> int:
        """Saved with the rest of the state."""
        return self.calls

    def set_extra_state(self, calls: int) -> None:
        self.calls = calls


# ---- views ----


def views(config, image_size: tuple[int, int]) -> Augmentation | list[Augmentation]:
    """How the views of an image are drawn: one augmentation for all, or one for each."""
    ours = empssl.training_augmentation(config, image_size)
    published = config.crops == "published"
    if config.augmentation in ("paper", "light"):
        if published:
            raise UsageError(
                f"--augmentation {config.augmentation} has EMP-SSL's crops; "
                f"leave it or --crops published out."
            )
        # EMP-SSL's patches for every view, but ReSSL's second, which has crop and flip alone.
        weak = Augmentation.none(area=ours.area, ratio=ours.ratio, flip=0.5)
        return [ours, weak] if config.method == "ressl" else ours
    crop = {"area": ours.area, "ratio": ours.ratio}
    larger_crop = crop
    if published:
        crop = {"area": (0.08, 1.0), "ratio": (3 / 4, 4 / 3)}
        larger_crop = {"area": (0.2, 1.0), "ratio": (3 / 4, 4 / 3)}
    if config.augmentation == "noise":  # one crop for both views, or the whole image
        return Augmentation.none(area=(1.0, 1.0) if published else ours.area)
    return published_colours(config.augmentation, crop, larger_crop)


def published_colours(name: str, crop: dict, larger_crop: dict) -> Augmentation | list:
    strong = {"brightness": 0.8, "contrast": 0.8, "saturation": 0.8, "blur": 0.5, "solarize": 0.0}
    mild = {"saturation": 0.2, "hue": 0.1, "blur": 0.0, "solarize": 0.0}
    if name == "simclr":
        return Augmentation(**crop, **strong)
    if name == "vicreg":
        return Augmentation(**larger_crop | mild | {"solarize": 0.1})
    if name == "byol":
        second = Augmentation(**crop | mild | {"solarize": 0.2})
        return [Augmentation(**crop, **mild), second]
    if name == "ressl":
        strong_view = Augmentation(**crop | mild | {"blur": 0.5})
        return [strong_view, Augmentation.none(**crop, flip=0.5)]
    return Augmentation(**larger_crop | mild | {"saturation": 0.4})  # single


class Views(empssl.Encoder):
    """The encoder without the last normalisation, for views that are treated apart.

    In training each view has BatchNorm statistics of its own, as in solo-learn (SimCLR's and SwAV's
    own codes join the views). Views may be one crop, be given noise, be mixed, or be left out
    (ReSSL's weak one, which only its target sees: `encoded` is how many are encoded).
    """

    views = 1
    encoded = 1
    one_crop = False
    noise = 0.0
    cutmix = 0.0
    mixed = None
    chance = None

    def embedding(self, x: Tensor) -> Tensor:
        return self.project(self.representation(x))

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return self.embedding(x)
        if self.one_crop:
            x = x[: len(x) // self.views].repeat(self.views, 1, 1, 1)
        if self.noise:
            noise = torch.randn(x.shape, generator=self.chance("noise"))
            x = x + self.noise * noise.to(x)
        if self.cutmix:
            x, self.mixed = cut_mix(x, self.cutmix, self.chance("cutmix"))
        z = [self.embedding(view) for view in x.chunk(self.views)[: self.encoded]]
        z += [torch.zeros_like(z[0])] * (self.views - self.encoded)
        return torch.cat(z)  # (v*b, d)


def cut_mix(x: Tensor, alpha: float, chance: torch.Generator) -> tuple[Tensor, tuple]:
    """Paste a box of each image's partner over it, one box for the batch.

    `(b, 3, s, s)` -> the same, and (partners (b,), share of the image that stayed). The share, at
    least a half, is drawn from Beta(alpha, alpha).
    """
    b, _, h, w = x.shape
    partner = torch.randperm(b, generator=chance)
    beta = np.random.default_rng(int(torch.randint(2**31, (), generator=chance)))
    share = beta.beta(alpha, alpha)
    side = math.sqrt(min(share, 1 - share))  # of the box, in units of the image's
    down, across = torch.rand(2, generator=chance).tolist()
    top, bottom = border(down - side / 2, h), border(down + side / 2, h)
    left, right = border(across - side / 2, w), border(across + side / 2, w)
    x = x.clone()
    box = x[partner.to(x.device)][:, :, top:bottom, left:right]
    x[:, :, top:bottom, left:right] = box
    return x, (partner, 1 - (bottom - top) * (right - left) / (h * w))


def border(place: float, side: int) -> int:
    return round(min(max(place, 0), 1) * side)


class Target(nn.Module):
    """A network that follows another, the online network, as its moving average.

    It gets no gradient, and encodes each view apart.
    """

    def __init__(self, online: Views, precision: str = "float32"):
        super().__init__()
        self.precision = precision
        self.network = copy.deepcopy(online).requires_grad_(False)
        self.online = (online,)  # in a tuple: it is no part of this module

    @torch.no_grad()
    def follow(self, momentum: float) -> None:
        (online,) = self.online
        for ours, theirs in zip(self.network.parameters(), online.parameters(), strict=True):
            ours.lerp_(theirs, 1 - momentum)

    @torch.no_grad()
    def forward(self, x: Tensor) -> Tensor:
        with empssl.autocast(x.device, self.precision):
            z = self.network(x)
        return z.float() if z.dtype == torch.bfloat16 else z
