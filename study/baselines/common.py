"""What the methods share: settings, views of an image, their objectives' base, a target network."""

import copy
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

import empssl
from empssl import Augmentation, generator_of
from empssl_support.cli import UsageError, flag

NAMES = ("empssl", "simclr", "vicreg", "byol", "swav", "ressl", "single", "supervised")
AUGMENTATIONS = ("paper", "light", "simclr", "byol", "vicreg", "ressl", "single", "noise")


@dataclass
class Config(empssl.Config):
    """EMP-SSL's settings, and those of the methods here."""

    method: str = flag("simclr", "what is trained", choices=NAMES)
    augmentation: str = flag("paper", "of the views", choices=AUGMENTATIONS)
    crops: str = flag(
        "patches",
        "an image's quarter, or 0.08 to 1 of it as published (noise: all of it)",
        choices=("patches", "published"),
    )
    temperature: float = flag(0.2, "of SimCLR, SwAV, ReSSL's student and single", above=0)
    negatives: int = flag(0, "simclr: others that a view is told from (0: all)", least=0)
    noise: float = flag(0.0, "simclr: deviation of Gaussian noise; pixels lie in [-1, 1]", least=0)
    bank_start: str = flag(
        "features",
        "single: the bank starts as the untrained network's features, or at random",
        choices=("features", "random"),
    )
    bank_update: str = flag(
        "gradient",
        "single: the rule corrected from the gradient, or the moving average",
        choices=("gradient", "average"),
    )
    bank_momentum: float = flag(0.5, "single: of the bank's rows", least=0)
    distillation: float = flag(20.0, "single: weight of SqrtKL", least=0)
    others: int = flag(10_000, "single: rows of the bank beside the batch's, at each step", least=0)
    cutmix: float = flag(0.5, "single: alpha of CutMix's Beta distribution (0: none)", least=0)
    warm_last_stage: str = flag(None, "an encoder.pt of --drop-last-stage: train what it lacks")


# ---- views ----


def views(config: Config, image_size: tuple[int, int]) -> Augmentation | list[Augmentation]:
    """How the views of an image of `image_size` (H, W) are drawn.

    One augmentation for all, or a list of one for each. Raises `UsageError` where the crops are not
    the augmentation's, or the views are not as many as the method's.
    """
    ours = empssl.training_augmentation(config, image_size)
    crop = {"area": ours.area, "ratio": ours.ratio}
    larger_crop = crop
    if config.crops == "published":
        crop = {"area": (0.08, 1.0), "ratio": (3 / 4, 4 / 3)}
        larger_crop = {"area": (0.2, 1.0), "ratio": (3 / 4, 4 / 3)}

    if config.augmentation in ("paper", "light"):
        if config.crops == "published":
            raise UsageError(
                f"--augmentation {config.augmentation} has EMP-SSL's crops; "
                f"leave it or --crops published out."
            )
        # EMP-SSL's patches for every view, but ReSSL's second, which has crop and flip alone.
        return [ours, weak_view(crop)] if config.method == "ressl" else ours
    if config.augmentation == "noise":
        # The noise is added later; this is what both views share, one crop or the whole image.
        return Augmentation.none(area=(1.0, 1.0) if config.crops == "published" else ours.area)

    drawn = published_views(config.augmentation, crop, larger_crop)
    if isinstance(drawn, list) and len(drawn) != config.patches:
        raise UsageError(
            f"--augmentation {config.augmentation} draws two views unlike each other, and "
            f"--method {config.method} sees {config.patches}; choose another."
        )
    return drawn


def published_views(name: str, crop: dict, larger_crop: dict) -> Augmentation | list[Augmentation]:
    """With the colours of solo-learn's settings for CIFAR-10 and, for "single", of Cao & Wu's."""
    strong = {"brightness": 0.8, "contrast": 0.8, "saturation": 0.8, "hue": 0.2}
    mild = {"brightness": 0.4, "contrast": 0.4, "saturation": 0.2, "hue": 0.1}
    plain = {"blur": 0.0, "solarize": 0.0}
    if name == "simclr":
        return Augmentation(**crop, **strong, blur=0.5, solarize=0.0)
    if name == "vicreg":
        return Augmentation(**larger_crop, **mild, blur=0.0, solarize=0.1)
    if name == "byol":
        first = Augmentation(**crop, **mild, **plain)
        return [first, Augmentation(**crop, **mild, blur=0.0, solarize=0.2)]
    if name == "ressl":
        return [Augmentation(**crop, **mild, blur=0.5, solarize=0.0), weak_view(crop)]
    return Augmentation(**larger_crop, **mild | {"saturation": 0.4}, **plain)  # single


def weak_view(crop: dict) -> Augmentation:
    """ReSSL's second view: crop and flip alone."""
    return Augmentation.none(**crop, flip=0.5)


class Views(empssl.Encoder):
    """The encoder without the last normalisation, for views that are treated apart.

    Patches of v views of b images, `(v*b, 3, s, s)` -> embeddings `(v*b, d)`. In training each view
    has BatchNorm statistics of its own, as in solo-learn (SimCLR's and SwAV's own codes join the
    views). Only the first `encoded` views are encoded, the embeddings of others are 0: ReSSL's weak
    view is for its target network alone. `prepare`: the objective's.
    """

    views = 1
    encoded = 1
    prepare = None

    def embedding(self, x: Tensor) -> Tensor:
        return self.project(self.representation(x))

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return self.embedding(x)
        if self.prepare:
            x = self.prepare(x)
        z = [self.embedding(view) for view in x.chunk(self.views)[: self.encoded]]
        z += [torch.zeros_like(z[0])] * (self.views - self.encoded)
        return torch.cat(z)


# ---- objectives ----


class Objective(nn.Module):
    """What `empssl.train` minimises; a method is a `loss(z, x, index)`.

    It counts its calls: what a method draws is a function of (seed, purpose, call), so that a run
    which is resumed goes on as it would have. R and D of the unit embeddings are logged for all
    methods, whatever each of them minimises; D of a single view is 1.
    """

    def __init__(self, seed: int = 0):
        super().__init__()
        self.seed = seed
        self.calls = 0

    def prepare(self, x: Tensor) -> Tensor:
        """What is done to the patches `(v*b, 3, s, s)` of a step before they are encoded."""
        return x

    def forward(self, z: Tensor, x: Tensor, index: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        z = empssl.at_least_float32(z)
        loss = self.loss(z, x, index)
        self.calls += 1
        with torch.no_grad():
            u = F.normalize(self.encoded(z), dim=-1)
            terms = {"R": empssl.coding_rate(u), "D": empssl.invariance(u)}
        return loss, terms

    def encoded(self, z: Tensor) -> Tensor:
        """The views that were encoded: all, for most methods."""
        return z

    def chance(self, purpose: str) -> torch.Generator:
        return generator_of(self.seed, purpose, self.calls)

    def get_extra_state(self) -> int:
        """Saved with the rest of the state."""
        return self.calls

    def set_extra_state(self, calls: int) -> None:
        self.calls = calls


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
        return empssl.at_least_float32(z)
