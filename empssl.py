"""EMP-SSL: image features without labels, in one pass over the data.

Tong, Chen, Ma, LeCun, arXiv 2304.03977. Cut many patches from each image, pull the patches of an
image together, and keep the batch spread out:

    maximise  R + lambda * D

    R = mean over patches i of  1/2 log det(I + d / (b eps^2) Z_i^T Z_i)     Total Coding Rate
    D = mean over patches i and images j of  cos(z_ij, m_j)                  invariance

where Z_i (b, d) are the embeddings of the i-th patch of each image, and m_j is the mean of the
embeddings of image j's patches.

This file is the whole method, in the paper's order: settings, patches, encoder, loss, optimizer,
training, evaluation; then what a run does with it. `empssl_support/` holds what it needs and need
not explain.

Letters: n patches per image, b images per batch, d the width of an embedding, N images in a data
set, s the side of a patch in pixels. Embeddings are z (n, b, d), patch-major: z[i] is the i-th
patch of every image, and row i*b + j of anything flattened is patch i of image j.

    python empssl.py --dataset cifar10 --epochs 10
"""

import empssl_support  # noqa: F401  (before torch: it sets how torch's idle threads wait)

# isort: split
import contextlib
import dataclasses
import hashlib
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F
import torchvision
from torch import Tensor

from empssl_support import ops, plan, report
from empssl_support.cli import UsageError, flag, one_sentence, progress
from empssl_support.data import DATASETS, Dataset, load_dataset, survey, to_device
from empssl_support.export import write_program, write_splits
from empssl_support.files import halved, read_encoder, write_features
from empssl_support.machine import keep_freed_memory, provenance
from empssl_support.nearest import draw_sheet, neighbours, sheet_path
from empssl_support.ops import extract_patches, extract_patches_ref, logdet_spd
from empssl_support.pictures import as_images
from empssl_support.processes import (
    distribute,
    first_process_first,
    from_first,
    gather_images,
    join_processes,
    leave_processes,
    share,
    sum_over_processes,
)
from empssl_support.runs import Run, RunFolder
from empssl_support.settings import (
    check_sizes,
    probed_epochs,
    read_settings,
    run_path,
    sides_of_patches,
)
from empssl_support.small import small_backbone, whiten

__all__ = [
    "Augmentation",
    "Config",
    "Encoder",
    "LARS",
    "Muon",
    "Objective",
    "PRESETS",
    "coding_rate",
    "effective_rank",
    "embed",
    "empssl_loss",
    "extract_patches",
    "extract_patches_ref",
    "invariance",
    "knn_probe",
    "linear_probe",
    "load",
    "load_dataset",
    "main",
    "neighbours_kept",
    "new_encoder",
    "sample_patches",
    "train",
    "training_augmentation",
]


# ---- Settings -----------------------------------------------------------------------------------
# Every field is a flag, `--patch-size` and so on. The method's defaults are those of the official
# code, for 20 patches per image and one epoch. A preset is a set of other defaults.


@dataclass
class Config:
    """The settings of a run.

    A command line fills in the preset's values, and leaves `device`, `precision` and `patch_size`
    to the machine and the images. In Python nothing is filled in: give these three yourself, and a
    preset as `Config(**PRESETS["laptop"], device="cpu", precision="float32")`.
    """

    # The data.
    dataset: str = flag("cifar10", "data set", choices=DATASETS)
    data_dir: str = flag("data", "folder that CIFAR is downloaded to, or your folder of images")
    image_size: int = flag(None, "side that a folder's images are brought to, in pixels")
    subset: int = flag(None, "use this many training images, chosen by the seed")

    # The method.
    preset: str = flag(
        "auto", "paper on a GPU, laptop on a CPU", choices=("auto", "paper", "laptop")
    )
    epochs: int = flag(1, "passes over the training images; the cosine ends with the last", least=1)
    patches: int = flag(20, "n, patches per image", least=1)
    patch_size: int = flag(None, "s, side of a patch in pixels (the image's, at most 224)", least=1)
    augmentation: str = flag("paper", "how patches are recoloured", choices=("paper", "light"))
    batch: int = flag(100, "b, images per batch", least=1)
    lam: float = flag(200.0, "lambda, the weight of the invariance", least=0)
    eps2: float = flag(0.2, "epsilon squared, the distortion of the coding rate", above=0)
    backbone: str = flag("resnet18", "backbone of the encoder", choices=("resnet18", "small"))
    hidden: int = flag(4096, "width of the representation, the features that are probed", least=1)
    projector: int = flag(4096, "width between the representation and the embedding", least=1)
    dim: int = flag(1024, "d, width of the embedding", least=1)
    optimizer: str = flag(
        "lars", "what updates the weights", choices=("lars", "muon", "sgd", "adamw")
    )
    lr: float = flag(0.3, "learning rate at the start", above=0)
    weight_decay: float = flag(
        1e-4, "weight decay; LARS and Muon spare biases, and Muon its own matrices too", least=0
    )
    eta: float = flag(0.005, "trust coefficient of LARS", least=0)
    size_schedule: str = flag(None, "sides of patches and their shares of the steps: 16:0.7,32:0.3")
    drop_last_stage: bool = flag(False, "leave the backbone's last stage out")

    # The evaluation.
    eval_patches: int = flag(16, "patches per image when probing", least=1)
    eval_augmentation: str = flag(
        "grid", "evaluate crops on an even grid, or drawn as in training", choices=("grid", "train")
    )
    probe_epochs: str = flag(None, "also probe after these epochs, such as 1,10")
    eval_only: bool = flag(False, "probe --checkpoint or, without one, the untrained encoder")
    checkpoint: str = flag(None, "an encoder.pt: to probe, to export, to search with")
    export_features: str = flag(None, "write the features of all images to this .npz or .csv")
    export: str = flag(None, "write the encoder as this .pt2, for torch.export.load, and stop")
    nearest: str = flag(None, "an image: show the ten nearest to it in --data-dir, and stop")

    # The run and the machine.
    seed: int = flag(
        0, "of weights, order and patches; a CPU repeats a run exactly, with equal threads", least=0
    )
    device: str = flag("auto", "cpu, cuda, cuda:1, mps")
    precision: str = flag(
        "auto", "of the encoder; the loss is always float32", choices=("auto", "bf16", "float32")
    )
    compile: bool = flag(False, "torch.compile the encoder")
    name: str = flag(None, "folder of the run below runs/ (data set and time)")
    force: bool = flag(False, "overwrite that folder, or the sheet of --nearest")
    plan: bool = flag(False, "say what the run will do and need, time ten steps, and stop")
    resume: str = flag(None, "a run's folder: go on where it was stopped, with its own settings")
    save_every: float = flag(5.0, "minutes between checkpoints within an epoch", least=0)
    report: str = flag(None, "a run's folder: draw it as a page, report.html, and stop")
    ops: bool = flag(False, "say which implementation each op has here, and why, and stop")


PRESETS = {
    "paper": {},
    "laptop": {
        "patches": 8,
        "patch_size": 16,
        "augmentation": "light",
        "batch": 50,
        "lam": 100.0,
        "backbone": "small",
        "hidden": 2048,
        "projector": 512,
        "dim": 512,
        "optimizer": "muon",
        "lr": 0.15,
    },
}


# ---- Randomness and precision -------------------------------------------------------------------


def generator_of(seed: int, purpose: str, step: int) -> torch.Generator:
    """A generator of random numbers that (seed, purpose, step) determine.

    So there is no state to save, and every process draws the same. PyTorch's CPU generator uses
    only 32 bits of its seed, so the three are hashed to 32 bits.
    """
    digest = hashlib.blake2b(f"{seed} {purpose} {step}".encode(), digest_size=4).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little"))


@contextlib.contextmanager
def first_weights_by(seed: int) -> Iterator[None]:
    """In the block layers are made on the CPU with the first weights that the seed determines.

    The global random state is left as it was, a GPU's too.
    """
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        yield


def autocast(device: torch.device, precision: str) -> torch.autocast:
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16")


def dtype_of(precision: str) -> torch.dtype:
    return torch.bfloat16 if precision == "bf16" else torch.float32


# ---- Patches (paper section 3.1) ----------------------------------------------------------------
# `sample_patches` draws the numbers that describe each patch; nothing else about patches is random.
# `extract_patches(images, index, params, s)` cuts and recolours them, and draws nothing itself:
# images (N, 3, H, W) uint8, index (b,) and params (n, b, K) -> (n*b, 3, s, s) in [-1, 1],
# patch-major. It is a compiled op where that was built; empssl_support/pixels.py is the same in
# plain PyTorch.


@dataclass
class Augmentation:
    """How patches are drawn; the defaults are the official recipe for CIFAR.

    The operations act in the order in which they stand here, on pixels in [0, 1], as
    torchvision.transforms.v2 has them on float images. Unlike in the official code, nothing is
    rounded to whole pixel values on the way. At the end pixels are scaled to [-1, 1]. Raises
    `UsageError` for an area or a ratio that no crop can have.
    """

    area: tuple[float, float] = (0.25, 0.25)  # of the crop, as a share of the image's, uniform
    ratio: tuple[float, float] = (1.0, 1.0)  # width / height of the crop, log-uniform
    # The crop is resized to s x s, bilinear.
    flip: float = 0.5  # probability
    jitter: float = 0.8  # probability that the next four act, in an order drawn for each patch
    brightness: float = 0.4  # factor uniform in [1 - 0.4, 1 + 0.4]
    contrast: float = 0.4  # the same
    saturation: float = 0.4  # the same
    hue: float = 0.2  # shift uniform in [-0.2, 0.2] of the colour circle
    grey: float = 0.2  # probability
    blur: float = 0.1  # probability
    sigma: tuple[float, float] = (0.1, 2.0)  # of the 13x13 blur, in pixels, uniform
    solarize: float = 0.1  # probability; inverts values from 128/255 up

    def __post_init__(self):
        rises = self.area[0] <= self.area[1] and self.ratio[0] <= self.ratio[1]
        if not (rises and self.area[0] > 0 and self.area[1] <= 1 and self.ratio[0] > 0):
            raise UsageError(
                f"a crop of area {self.area} and ratio {self.ratio} does not fit: "
                f"give (low, high) of each, the area within (0, 1], the ratio above 0."
            )

    @classmethod
    def none(cls, **settings) -> "Augmentation":
        """The crop alone."""
        off = {"flip": 0.0, "jitter": 0.0, "grey": 0.0, "blur": 0.0, "solarize": 0.0}
        return cls(**off | settings)


def training_augmentation(config: Config, image_size: tuple[int, int]) -> Augmentation:
    """What `--augmentation` names.

    "light" changes saturation and hue less, and leaves blur and solarization out. From images of
    more than 64 pixels crops of ratios from 3/4 to 4/3 are cut, as in the official code.
    """
    ratio = (1.0, 1.0) if max(image_size) <= 64 else (3 / 4, 4 / 3)
    if config.augmentation == "light":
        return Augmentation(ratio=ratio, saturation=0.2, hue=0.1, blur=0.0, solarize=0.0)
    return Augmentation(ratio=ratio)


def sample_patches(
    b: int,
    n: int,
    image_size: tuple[int, int],
    augmentation: Augmentation | list[Augmentation],
    generator: torch.Generator | None = None,
) -> Tensor:
    """Draw what describes n patches of each of b images of `image_size` (H, W).

    Returns float32 `(n, b, K)` on the CPU; the last lines here name the K columns. What does not
    act is neutral: 1 for brightness, contrast and saturation, 0 for the rest. Crops are of whole
    pixels, sized as torchvision's RandomResizedCrop sizes them; one that does not fit is cut to the
    image, where torchvision draws again. A list has n augmentations, else raises `ValueError`.
    """
    if isinstance(augmentation, list):
        if len(augmentation) != n:
            raise ValueError(f"there are {len(augmentation)} augmentations for {n} patches.")
        return torch.cat([sample_patches(b, 1, image_size, a, generator) for a in augmentation])
    H, W = image_size
    a = augmentation
    # Each of the 15 choices below has uniform numbers of its own, (n, b), even where it is unused.
    draws = iter(torch.rand(15, n, b, generator=generator))

    def uniform(low: float, high: float) -> Tensor:
        return low + (high - low) * next(draws)

    def happens(probability: float) -> Tensor:
        return next(draws) < probability

    area = H * W * uniform(*a.area)
    ratio = torch.exp(uniform(math.log(a.ratio[0]), math.log(a.ratio[1])))
    height = (area / ratio).sqrt().round().clamp(1, H)
    width = (area * ratio).sqrt().round().clamp(1, W)
    top = (next(draws) * (H - height + 1)).floor()
    left = (next(draws) * (W - width + 1)).floor()
    flip = happens(a.flip)

    jitter = happens(a.jitter)
    factors = []
    for strength in (a.brightness, a.contrast, a.saturation):
        factor = uniform(max(0.0, 1 - strength), 1 + strength)
        factors.append(torch.where(jitter, factor, 1.0))
    hue = torch.where(jitter, uniform(-a.hue, a.hue), 0.0)
    order = torch.where(jitter, (next(draws) * len(ops.ORDERS)).floor(), 0.0)

    grey = happens(a.grey)
    sigma = torch.where(happens(a.blur), uniform(*a.sigma), 0.0)
    solarize = happens(a.solarize)
    columns = [top, left, height, width, flip, *factors, hue, order, grey, sigma, solarize]
    return torch.stack(columns, dim=-1)


def grid_patches(b: int, n: int, image_size: tuple[int, int]) -> Tensor:
    """Like `sample_patches`, without chance: crops of a quarter of the image on an even grid.

    Returns float32 `(n, b, K)`, the same for each image. Row by row: patch i lies in row i // k and
    column i % k of a grid of k x k. Raises `UsageError` where n is no square number.
    """
    H, W = image_size
    k = math.isqrt(n)
    if k * k != n:
        raise UsageError(f"{n} patches make no even grid; give a square such as 1, 4, 9 or 16.")
    side = max(1, round(math.sqrt(H * W / 4)))
    height, width = min(side, H), min(side, W)
    places = torch.linspace(0, 1, k) if k > 1 else torch.tensor([0.5])
    top = (places.repeat_interleave(k) * (H - height)).round().view(n, 1)
    left = (places.repeat(k) * (W - width)).round().view(n, 1)
    # Brightness, contrast and saturation stay as they are by a factor of 1, all else by a 0.
    chosen = {"top": top, "left": left, "height": height, "width": width}
    chosen |= {"brightness": 1, "contrast": 1, "saturation": 1}
    params = torch.zeros(n, b, ops.K)
    for column, value in chosen.items():
        params[..., ops.COLUMNS.index(column)] = value
    return params


# ---- Encoder (paper section 3.2) ----------------------------------------------------------------


class Encoder(nn.Module):
    """Patches `(P, 3, s, s)` in [-1, 1] -> unit embeddings `(P, d)`.

    The paper's h = f(x), then z = g(h). What gets probed is h = `representation(x)`, `(P, hidden)`:
    as in the official code f is the backbone and, above it, a linear layer, BatchNorm and ReLU, and
    g is the projector. backbone: "resnet18" or, for CPUs, "small"; another one raises `ValueError`.
    """

    def __init__(
        self,
        backbone: str = "resnet18",
        patch_size: int = 32,
        hidden: int = 4096,
        projector: int = 4096,
        dim: int = 1024,
        drop_last_stage: bool = False,
    ):
        super().__init__()
        self.architecture = {
            "backbone": backbone,
            "patch_size": patch_size,
            "hidden": hidden,
            "projector": projector,
            "dim": dim,
            "drop_last_stage": drop_last_stage,
        }
        self.image_size = 2 * patch_size  # a guess, until training or a file says what it was
        if backbone == "resnet18":
            self.backbone, width = resnet18_backbone(patch_size, drop_last_stage)
        elif backbone == "small":
            self.backbone, width = small_backbone(drop_last_stage)
        else:
            raise ValueError(f"There is no backbone {backbone!r}; choose resnet18 or small.")
        # The representation: 4096 features in the official code.
        self.represent = nn.Sequential(
            nn.Linear(width, hidden),
            nn.BatchNorm1d(hidden),
            nn.ReLU(),
        )
        # The projector, g, serves training alone.
        self.project = nn.Sequential(
            nn.Linear(hidden, projector),
            nn.BatchNorm1d(projector),
            nn.ReLU(),
            nn.Linear(projector, dim),
        )

    def representation(self, x: Tensor) -> Tensor:
        return self.represent(self.backbone(x))  # (P, hidden)

    def forward(self, x: Tensor) -> Tensor:
        z = self.project(self.representation(x))
        return F.normalize(at_least_float32(z), dim=-1)  # (P, d)

    def matrices(self) -> list[Tensor]:
        """What Muon updates: the weights of layers and convolutions up to the representation.

        The projector, which is let go of after training, is left to LARS.
        """
        below = [*self.backbone.parameters(), *self.represent.parameters()]
        return [p for p in below if p.ndim > 1]

    def features(self, images) -> Tensor:
        """The bags of patches of your own images, `(N, hidden)` float32 on the CPU.

        images: a path, a PIL image, a uint8 tensor `(3, H, W)` or `(N, 3, H, W)`, a uint8 array
        `(H, W, 3)` or `(N, H, W, 3)`, with values 0 to 255, or a list of these, of any sizes. Each
        is brought to the size that training had, `image_size`, as a folder's images are. Puts the
        encoder into eval mode. Raises `UsageError`, a `ValueError`, for no images, one that cannot
        be read, and another kind.
        """
        return embed(self, as_images(images, self.image_size)).cpu()


def resnet18_backbone(patch_size: int, drop_last_stage: bool) -> tuple[nn.Module, int]:
    """torchvision's ResNet-18 and its width; up to 64 pixels with the stem that suits CIFAR."""
    backbone = torchvision.models.resnet18()
    backbone.fc = nn.Identity()
    if patch_size <= 64:
        backbone.conv1 = nn.Conv2d(3, 64, kernel_size=3, stride=1, padding=1, bias=False)
        backbone.maxpool = nn.Identity()
    if drop_last_stage:
        backbone.layer4 = nn.Identity()
        return backbone, 256
    return backbone, 512


def new_encoder(config: Config, images: Tensor, kind: type[Encoder] = Encoder) -> Encoder:
    """An encoder whose first weights `config.seed` determines, on the settings' device."""
    with first_weights_by(config.seed):
        encoder = kind(
            config.backbone,
            config.patch_size,
            config.hidden,
            config.projector,
            config.dim,
            config.drop_last_stage,
        )
    encoder.image_size = min(images.shape[2:])
    if config.backbone == "small":
        # Its first layer begins as filters that whiten the images: two million pixels suffice.
        count = max(1, 2**21 // images[0, 0].numel())
        some = torch.randperm(len(images), generator=generator_of(config.seed, "whiten", 0))[:count]
        first_layer = encoder.backbone[0]
        mixtures = generator_of(config.seed, "mixtures", 0)
        whiten(first_layer, images[some.to(images.device)].cpu(), mixtures)
    return encoder.to(config.device, memory_format=torch.channels_last)


def load(path: str | Path, device: str = "cpu") -> Encoder:
    """The encoder of a run, from its `encoder.pt`, in eval mode.

    Raises `UsageError` where the file was not saved by this program.
    """
    saved = read_encoder(path)
    try:
        encoder = Encoder(**saved["architecture"])
        encoder.image_size = saved["image_size"]
        encoder.load_state_dict(saved["weights"])
    except (RuntimeError, TypeError, AttributeError, ValueError) as error:
        reason = str(error).splitlines()[-1].strip()[:200]
        raise UsageError(
            f"{path} has weights of another architecture than it says ({reason}); "
            f"give the encoder.pt of a run."
        ) from None
    return encoder.to(device, memory_format=torch.channels_last).eval()


# ---- Loss (paper equations 2 to 4) --------------------------------------------------------------


def coding_rate(
    z: Tensor,
    eps2: float = 0.2,
    scale: float | Tensor | None = None,
    reduction: str = "mean",
) -> Tensor:
    """Total Coding Rate `R` of `z (n, b, d)`, in nats (equation 2): the mean over patches i of

        1/2 log det(I + d / (b eps2) Z_i^T Z_i)

    `eps2` is the paper's epsilon squared; the official code uses its `--eps` unsquared. Computed in
    float32 or better, whatever z is: a half-precision Gram matrix gives NaN or, more often, a wrong
    number on a nearly collapsed batch. NaN where z is not finite. On a collapsed batch float32 is
    accurate while d / (b eps2) times the sum of a Z_i's squares, d / eps2 for unit rows, is below a
    million. Beyond that give `z.double()`.

    For other methods (docs/ops.md) z may have any leading dimensions, `(..., b, d)`. `scale`
    replaces d / (b eps2): a number, or a tensor that expands to `(...)`, one scale per matrix. With
    `reduction="none"` the result has one value per matrix, `(...)`. Raises `ValueError` for another
    reduction, and PyTorch's `RuntimeError` for a scale that does not expand.
    """
    if reduction not in ("mean", "none"):
        raise ValueError(f"reduction is {reduction!r}; give mean or none.")
    *_, b, d = z.shape
    scale = d / (b * eps2) if scale is None else scale
    with torch.autocast(z.device.type, enabled=False):
        z = at_least_float32(z)
        if isinstance(scale, Tensor):
            scale = scale.to(z).expand(z.shape[:-2])[..., None, None]  # (..., 1, 1)
        # det(I + c Z Z^T) = det(I + c Z^T Z), by Sylvester's identity: take the smaller product.
        gram = z @ z.mT if b < d else z.mT @ z  # (..., k, k), k = min(b, d)
        identity = torch.eye(min(b, d), dtype=z.dtype, device=z.device)
        logdet, _ = logdet_spd(identity + scale * gram)  # the inverse beside it is its gradient
        R = 1 / 2 * logdet  # (...)
        return R.mean() if reduction == "mean" else R


def collapsed_rate(d: int, eps2: float = 0.2) -> float:
    """`R` of unit rows that are all equal, the least that it can be: 1/2 log(1 + d / eps2)."""
    return 1 / 2 * math.log1p(d / eps2)


def invariance(z: Tensor) -> Tensor:
    """`D` of `z (n, b, d)`: the mean cosine between a patch and the mean of its image's patches.

    For unit rows it equals the mean length of those means, so it lies in [0, 1]. The paper writes
    Tr(Z_i^T Z_mean), a sum over the b images that is not divided by the means' lengths; this is the
    cosine that its code takes, and to which its lambda of 200 belongs. The mean is part of the
    graph: there is no stop-gradient.
    """
    with torch.autocast(z.device.type, enabled=False):
        z = at_least_float32(z)
        mean = z.mean(0, keepdim=True)  # (1, b, d)
        return F.cosine_similarity(z, mean, dim=-1).mean()


def at_least_float32(z: Tensor) -> Tensor:
    return z if z.dtype == torch.float64 else z.float()


class Objective(nn.Module):
    """What training minimises, `-(R + lambda D)`, and the two terms with their own signs.

    `train` calls it with the embeddings z (n, b, d) and the rows in the data set, index (b,), of
    the whole batch, and with the patches x of this process's images alone, (n*b, 3, s, s) where
    there is one process. Other methods put their own in its place.
    """

    def __init__(self, lam: float = 200.0, eps2: float = 0.2):
        super().__init__()
        self.lam = lam
        self.eps2 = eps2

    def forward(self, z: Tensor, x: Tensor, index: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        R = coding_rate(z, self.eps2)
        D = invariance(z)
        loss = -(R + self.lam * D)
        return loss, {"R": R.detach(), "D": D.detach()}


def empssl_loss(z: Tensor, lam: float = 200.0, eps2: float = 0.2) -> Tensor:
    """For a loop of your own: `-(R + lam * D)` of `z (n, b, d)` with unit rows, to be minimised."""
    return -(coding_rate(z, eps2) + lam * invariance(z))


# ---- Optimizer (paper section 4; the details are the official code's) ---------------------------


class LARS(torch.optim.Optimizer):
    """SGD with Nesterov momentum, on gradients that LARS has scaled.

    Of a weight p with gradient g, where p does not have exactly one dimension:

        trust = eta |p| / (|g| + weight_decay |p| + 1e-8)
        g <- (g + weight_decay p) min(trust / lr, 1),   or g itself where |p| or |g| is 0
        v <- momentum v + g
        p <- p - lr (g + momentum v)

    Tensors of one dimension (biases, BatchNorm) keep g as it is, without decay. With the clip at 1
    a tensor's rate is min(trust, lr): where trust is the smaller, lr times the scaled gradient has
    about the length eta |p|, whatever |g|. So lr is only a cap, and the cosine acts on a tensor
    once lr has fallen below its trust.
    """

    def __init__(
        self,
        params,
        lr: float = 0.3,
        momentum: float = 0.9,
        weight_decay: float = 1e-4,
        eta: float = 0.005,
    ):
        defaults = {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "eta": eta}
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self, closure=None):
        loss = None
        if closure:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    self.update(p, group)
        return loss

    def update(self, p: Tensor, group: dict) -> None:
        lr, g = group["lr"], p.grad
        if p.ndim != 1:
            g = self.scaled(p, g, lr, group["weight_decay"], group["eta"])
        p.sub_(lr * self.nesterov_step(p, g, group["momentum"]))

    def nesterov_step(self, p: Tensor, g: Tensor, momentum: float) -> Tensor:
        """Moves v on, v <- momentum v + g, and returns g + momentum v, of p's shape."""
        state = self.state[p]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(g)
        velocity = state["momentum_buffer"]
        velocity.mul_(momentum).add_(g)
        return g + momentum * velocity

    @staticmethod
    def scaled(p: Tensor, g: Tensor, lr: float, weight_decay: float, eta: float) -> Tensor:
        p_norm, g_norm = p.norm(), g.norm()
        trust = eta * p_norm / (g_norm + weight_decay * p_norm + 1e-8)
        scaled = (g + weight_decay * p) * (trust / lr).clamp(max=1)
        return torch.where((p_norm > 0) & (g_norm > 0), scaled, g)


class Muon(LARS):
    """Muon for the matrices that it is given, LARS for all else; not the paper's.

    Of a matrix p with gradient g (Jordan et al., kellerjordan.github.io/posts/muon):

        v <- momentum v + g
        p <- p - (lr / 6) sqrt(max(1, rows / columns)) orthogonal(g + momentum v)

    A gradient has a few strong directions, which would drown the others; this step is about as long
    in all of them. Dividing by 6 lets one learning rate serve both rules. Matrices have no decay. A
    convolution's filters are the rows of its matrix. `dtype` is that of the products in
    `orthogonal`.
    """

    def __init__(self, params, matrices: list[Tensor], dtype=torch.float32, **settings):
        super().__init__(params, **settings)
        self.matrices = set(matrices)
        self.dtype = dtype

    def update(self, p: Tensor, group: dict) -> None:
        if p not in self.matrices:
            super().update(p, group)
            return
        step = self.nesterov_step(p, p.grad, group["momentum"])
        G = step.flatten(1).to(self.dtype)
        rows, columns = G.shape
        length = group["lr"] / 6 * math.sqrt(max(1, rows / columns))
        p.sub_(orthogonal(G).view_as(p), alpha=length)


def orthogonal(G: Tensor, steps: int = 5) -> Tensor:
    """About U V^T, where G = U S V^T: the same matrix with singular values near 1.

    By Newton-Schulz iteration: each step replaces a singular value x by a x + b x^3 + c x^5, which
    drives all of (0, 1] towards 1. With these constants small ones rise fast: after five steps all
    above 0.003 lie in about [0.7, 1.2]. Beside that spread bfloat16's rounding is small.
    """
    a, b, c = 3.4445, -4.7750, 2.0315
    rows, columns = G.shape
    X = G.T if rows > columns else G  # so that X X^T is the smaller product
    X = X / (X.norm() + 1e-7)
    for _ in range(steps):
        A = X @ X.T
        X = a * X + (b * A + c * A @ A) @ X
    return X.T if rows > columns else X


def new_optimizer(
    config: Config, parameters: list[Tensor], matrices: Sequence[Tensor] = ()
) -> torch.optim.Optimizer:
    """What updates the parameters; `matrices` are those among them that Muon treats as its own."""
    common = {"lr": config.lr, "weight_decay": config.weight_decay}
    if config.optimizer == "muon":
        dtype = dtype_of(config.precision)
        return Muon(parameters, matrices, dtype, eta=config.eta, **common)
    if config.optimizer == "sgd":
        return torch.optim.SGD(parameters, momentum=0.9, nesterov=True, **common)
    if config.optimizer == "adamw":
        return torch.optim.AdamW(parameters, **common)
    return LARS(parameters, eta=config.eta, **common)


def cosine(lr: float, t: int, T: int) -> float:
    """Learning rate of step t of T: from `lr` at t = 0 down to 0 at t = T, without warm-up."""
    return lr / 2 * (1 + math.cos(math.pi * t / T))


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = lr


# ---- Training (paper algorithm 1) ---------------------------------------------------------------


def train(encoder, images: Tensor, config: Config, augmentation, objective=None, run=None) -> dict:
    """Train an `Encoder` in place, on its device, for `config.epochs` passes over the images.

    images `(N, 3, H, W)` uint8; those that do not fill a batch are left out. The augmentation is as
    `sample_patches` takes it, the objective like `Objective`; `run`, a `Run`, logs, saves, resumes.
    Under torchrun each process encodes its share of a batch; the loss is of all b. Returns the last
    R and D, train_seconds, patches_seen. Raises `UsageError` where b > N, `FloatingPointError`
    where loss or weights are not finite, `Stopped` after a signal.
    """
    n, b, seed = config.patches, config.batch, config.seed
    N, _, *image_size = images.shape
    if b > N:
        raise UsageError(f"--batch {b} is larger than the {N} training images; lower it.")
    steps = N // b  # in an epoch
    total = config.epochs * steps
    sides = sides_of_patches(config, total)  # s, of each step
    device, dtype = next(encoder.parameters()).device, dtype_of(config.precision)
    mine = share(b)  # the slice of a batch that this process encodes
    objective = objective or Objective(config.lam, config.eps2)
    parameters = [*encoder.parameters(), *objective.parameters()]
    optimizer = new_optimizer(config, parameters, encoder.matrices())
    run = run or Run()
    first = run.restore(encoder=encoder, optimizer=optimizer, objective=objective)
    model = distribute(encoder, config.compile)
    encoder.image_size = min(image_size)

    for t in run.steps(config.epochs, steps, n * b):  # from `first` on, with a progress bar
        epoch, i = divmod(t, steps)
        if i == 0 or t == first:
            order = torch.randperm(N, generator=generator_of(seed, "order", epoch))
            encoder.train()  # an evaluation at the epoch's end leaves it in eval mode
        index = order[i * b : (i + 1) * b]  # (b,)

        # Cut n augmented patches from each image.
        params = sample_patches(b, n, image_size, augmentation, generator_of(seed, "patches", t))
        x = extract_patches(images, index[mine], params[:, mine], sides[t], dtype, device)

        # Their unit embeddings, and minus (R + lambda D) of the whole batch.
        with autocast(device, config.precision):
            z = model(x).unflatten(0, (n, -1))
        z = gather_images(z)  # (n, b, d)
        loss, terms = objective(z, x, index)

        set_learning_rate(optimizer, cosine(config.lr, t, total))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

        run.after_step(t, loss, terms)  # check, log, evaluate at an epoch's end, save, stop
    return run.summary()


# ---- Evaluation (paper section 4) ---------------------------------------------------------------
# `from_first(f)` is f(), called in the first process alone where there are several; all get its
# value.


@torch.no_grad()
def embed(
    encoder: Encoder,
    images: Tensor,
    patches: int = 16,
    augmentation: Augmentation | None = None,
    seed: int = 0,
    precision: str = "float32",
    quadrants: bool = False,
) -> Tensor:
    """The bag of patches: each image's representation h (not its embedding z), its patches' mean.

    images `(N, 3, H, W)` uint8 -> `(N, hidden)` float32, on the encoder's device. Patches are crops
    on an even grid, not recoloured, or with an `augmentation` drawn at random; a GPU, which takes
    more images at once, then draws others than a CPU. The official code draws 128, as in training.
    With `quadrants` there is a mean for each quadrant of the grid, side by side, `(N, 4 * hidden)`:
    top left, top right, bottom left, bottom right. Puts the encoder into eval mode. Raises
    `UsageError` where `patches` is below 1, or makes no such grid or no quadrants.
    """
    if patches < 1:
        raise UsageError(f"there are {patches} patches to embed an image by; give at least 1.")
    k = math.isqrt(patches)
    if quadrants and (augmentation or k % 2):
        raise UsageError("quadrants need a grid of even side; give 4, 16 or 36 patches on a grid.")
    encoder.eval()
    device = next(encoder.parameters()).device
    s = encoder.architecture["patch_size"]
    N, _, *image_size = images.shape
    width = encoder.architecture["hidden"] * (4 if quadrants else 1)
    bags = torch.zeros(N, width, device=device)

    # As many images at once as fit a CPU's cache, or fill a GPU; each process has its share.
    at_once = max(1, 2 ** (19 if device.type == "cpu" else 23) // (patches * s * s))
    starts = range(0, N, at_once)
    for start in progress(starts[share(len(starts))], desc="embedding", unit="batch", leave=False):
        index = torch.arange(start, min(start + at_once, N))
        if augmentation:
            chance = generator_of(seed, "embed", start)
            params = sample_patches(len(index), patches, image_size, augmentation, chance)
        else:
            params = grid_patches(len(index), patches, image_size)
        x = extract_patches(images, index, params, s, dtype_of(precision), device)
        with autocast(device, precision):
            h = encoder.representation(x)
        h = h.float().unflatten(0, (patches, -1))  # (n, b, hidden)
        if quadrants:
            h = h.unflatten(0, (2, k // 2, 2, k // 2)).mean((1, 3))  # (2, 2, b, hidden)
            bags[index] = h.permute(2, 0, 1, 3).flatten(1)  # (b, 4 * hidden)
        else:
            bags[index] = h.mean(0)  # (b, hidden)
    return sum_over_processes(bags)


def linear_probe(
    train_features: Tensor,
    train_labels: Tensor,
    test_features: Tensor,
    test_labels: Tensor,
    epochs: int = 100,
    batch: int = 100,
    lr: float = 0.03,
    seed: int = 0,
) -> tuple[float, float]:
    """Top-1 and top-5 test accuracy, in [0, 1], of a linear layer trained on frozen features.

    Features `(N, width)`, labels `(N,)` int64. The official protocol: SGD with momentum 0.9 and
    weight decay 5e-5, a cosine to 0. Unlike the official code, the accuracy is that of the last
    epoch, not the best one seen on the test data, and the last, smaller batch is kept.
    """
    device = train_features.device
    test_features = test_features.to(device)
    y, test_labels = train_labels.to(device), test_labels.to(device)
    classes = int(max(y.max(), test_labels.max())) + 1
    with first_weights_by(seed):
        layer = nn.Linear(train_features.shape[1], classes).to(device)
    optimizer = torch.optim.SGD(layer.parameters(), lr, momentum=0.9, weight_decay=5e-5)

    for epoch in progress(range(epochs), desc="linear probe", unit="epoch", leave=False):
        set_learning_rate(optimizer, cosine(lr, epoch, epochs))
        order = torch.randperm(len(y), generator=generator_of(seed, "probe", epoch)).to(device)
        for index in order.split(batch):
            x = train_features.index_select(0, index)  # [index] is slower on a CPU
            loss = F.cross_entropy(layer(x), y[index])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

    with torch.no_grad():
        best = layer(test_features).topk(min(5, classes), dim=1).indices  # (M, 5)
    hits = best == test_labels.view(-1, 1)
    return hits[:, 0].float().mean().item(), hits.any(1).float().mean().item()


@torch.no_grad()
def knn_probe(
    train_features: Tensor,
    train_labels: Tensor,
    test_features: Tensor,
    test_labels: Tensor,
    k: int = 20,
    temperature: float = 0.07,
) -> float:
    """Top-1 test accuracy, in [0, 1], by the k nearest training features.

    Nearest by cosine; each votes for its class with the weight exp(cosine / temperature).
    """
    bank = F.normalize(train_features, dim=1)
    test_features = test_features.to(bank.device)
    y, test_labels = train_labels.to(bank.device), test_labels.to(bank.device)
    hits = 0
    blocks = torch.arange(len(test_labels), device=bank.device).split(1000)
    for block in progress(blocks, desc="kNN", unit="block", leave=False):
        queries = F.normalize(test_features[block], dim=1)
        similarity, nearest = (queries @ bank.T).topk(min(k, len(bank)), dim=1)  # (1000, k)
        votes = similarity.new_zeros(len(queries), int(y.max()) + 1)
        votes.scatter_add_(1, y[nearest], (similarity / temperature).exp())
        hits += (votes.argmax(1) == test_labels[block]).sum().item()
    return hits / len(test_labels)


@torch.no_grad()
def effective_rank(h: Tensor) -> float:
    """How many dimensions the features `h (N, width)` fill: from 1 to about min(N, width).

    RankMe, Garrido et al., arXiv 2210.02885, section 3: the exponential of the entropy of the
    singular values of h, which is not centred. Needs no labels. NaN where h is not finite.
    """
    if not h.isfinite().all():
        return math.nan
    sigma = torch.linalg.svdvals(at_least_float32(h))  # (min(N, width),)
    p = sigma / sigma.sum().clamp(min=1e-7) + 1e-7
    return torch.exp(-(p * p.log()).sum()).item()


@torch.no_grad()
def neighbours_kept(h1: Tensor, h2: Tensor, k: int = 10) -> float:
    """How many of an image's k nearest stay so under other patches: the mean share, in [0, 1].

    h1 and h2 `(N, width)` are features of the same N > 1 images, from two draws of patches.
    Nearest by cosine among the N, of which an image itself does not count. By chance it is about
    k / (N - 1); where N - 1 <= k it is 1 and says nothing.
    """
    N = len(h1)
    k = min(k, N - 1)
    found = []
    for h in (h1, h2):
        h = F.normalize(h, dim=1)
        similarity = (h @ h.T).fill_diagonal_(-math.inf)  # (N, N)
        found.append(similarity.topk(k, dim=1).indices)  # (N, k)
    kept = (found[0].unsqueeze(2) == found[1].unsqueeze(1)).any(2)  # (N, k)
    return kept.float().mean().item()


class Features(NamedTuple):
    """A split's features, as the probes take them."""

    bag: Tensor  # (N, hidden), the bag of patches
    quadrants: Tensor | None  # (N, 4 * hidden), where the patches are on a grid of even side


def bag_to_probe(encoder: Encoder, images: Tensor, config: Config) -> Tensor:
    """As `embed` gives it, by the settings of the evaluation."""
    how = {"patches": config.eval_patches, "seed": config.seed, "precision": config.precision}
    if config.eval_augmentation == "train":
        how["augmentation"] = training_augmentation(config, images.shape[2:])
    return embed(encoder, images, **how)


def features_to_probe(encoder: Encoder, images: Tensor, config: Config) -> Features:
    if config.eval_augmentation == "train" or math.isqrt(config.eval_patches) % 2:
        return Features(bag_to_probe(encoder, images, config), None)
    how = {"patches": config.eval_patches, "precision": config.precision}
    quadrants = embed(encoder, images, quadrants=True, **how)
    return Features(quadrants.unflatten(1, (4, -1)).mean(1), quadrants)


def probe(train_h: Features, test_h: Features, data: Dataset) -> dict:
    """Test accuracies of frozen features; under torchrun process 0 computes them."""
    y, test_y = data.train_labels, data.test_labels
    top1, top5 = from_first(lambda: linear_probe(train_h.bag, y, test_h.bag, test_y))
    record = {"linear_top1": top1, "linear_top5": top5}
    if train_h.quadrants is not None:
        # Four times as many features overfit at the official rate: this one was chosen on held-out
        # training images (docs/laptop.md).
        wide = (train_h.quadrants, y, test_h.quadrants, test_y)
        record["quadrants_top1"], _ = from_first(lambda: linear_probe(*wide, lr=0.003))
    record["knn_top1"] = from_first(lambda: knn_probe(train_h.bag, y, test_h.bag, test_y))
    return record


def probe_without_training(h: Tensor, test_h: Tensor, data: Dataset) -> dict:
    """kNN of the untrained encoder's features and of raw pixels: what learning has to beat."""
    y, test_y = data.train_labels, data.test_labels
    untrained = from_first(lambda: knn_probe(h, y, test_h, test_y))
    return {"untrained_knn_top1": untrained, "raw_pixels_knn_top1": probe_pixels(data, knn_probe)}


def probe_pixels(data: Dataset, probe):
    """What `linear_probe` or `knn_probe` returns of raw pixels, averaged to at most 32x32."""
    x, test_x = raw_pixels(data.train_images), raw_pixels(data.test_images)
    return from_first(lambda: probe(x, data.train_labels, test_x, data.test_labels))


def raw_pixels(images: Tensor) -> Tensor:
    """`(N, 3, H, W)` uint8 -> `(N, 3 * side * side)` in [-1, 1], side at most 32."""
    side = min(32, images.shape[-1])
    parts = images.split(1000)
    return torch.cat([F.adaptive_avg_pool2d(x / 127.5 - 1, side).flatten(1) for x in parts])


@torch.no_grad()
def untrained_encoder(config: Config, images: Tensor) -> Encoder:
    """An encoder as if the learning rate had been 0: its BatchNorms have seen training patches."""
    encoder = new_encoder(config, images)
    settle(encoder, images, training_augmentation(config, images.shape[2:]), config)
    return encoder


@torch.no_grad()
def settle(encoder: Encoder, images: Tensor, augmentation: Augmentation, config: Config) -> None:
    """Average the BatchNorms' statistics anew, over patches of these images."""
    encoder.train()
    for layer in encoder.modules():
        if isinstance(layer, (nn.BatchNorm1d, nn.BatchNorm2d)):
            layer.reset_running_stats()
            layer.momentum = None  # average all that it sees
    device = torch.device(config.device)
    for t in range(10):
        index = torch.randint(len(images), (64,), generator=generator_of(config.seed, "settle", t))
        chance = generator_of(config.seed, "settled", t)
        params = sample_patches(64, 4, images.shape[2:], augmentation, chance)
        encoder(extract_patches(images, index, params, config.patch_size, device=device))


def score(encoder: Encoder, images: Tensor, config: Config) -> dict:
    """What can be said without labels, in a few seconds: see docs/running.md.

    Effective rank: of four grid crops of each of up to 2,048 images. Neighbours kept: from one draw
    of four training patches to another, among the first 1,024 of those images.
    """
    some = scored_images(images)
    few = some[:1024]
    augmentation = training_augmentation(config, images.shape[2:])
    how = {"patches": 4, "augmentation": augmentation, "precision": config.precision}
    h1, h2 = (embed(encoder, few, seed=seed, **how) for seed in (0, 1))
    kept = from_first(lambda: neighbours_kept(h1, h2)) if len(few) > 1 else 1.0
    return {"effective_rank": rank_of(encoder, some, config), "neighbours_kept": kept}


def rank_of(encoder: Encoder, some: Tensor, config: Config) -> float:
    h = embed(encoder, some, patches=4, precision=config.precision)
    return from_first(lambda: effective_rank(h))


def scored_images(images: Tensor, most: int = 2048) -> Tensor:
    """The same ones at each call."""
    rows = torch.randperm(len(images), generator=generator_of(0, "score", 0))[:most]
    return images[rows.to(images.device)]


def knn_within_training(encoder: Encoder, data: Dataset, config: Config) -> dict:
    """A cheap sign of progress: kNN of 1,000 training images among 5,000 others.

    The encoder has been trained on all of them.
    """
    queries = min(1000, len(data.train_images) // 6)
    if data.train_labels is None or queries == 0:
        return {}
    rows = torch.randperm(len(data.train_images), generator=generator_of(0, "holdout", 0))
    rows = rows[: 6 * queries]
    y = data.train_labels[rows]
    images = data.train_images[rows.to(data.train_images.device)]
    few = dataclasses.replace(config, eval_patches=min(4, config.eval_patches))
    h = bag_to_probe(encoder, images, few)
    top1 = from_first(lambda: knn_probe(h[queries:], y[queries:], h[:queries], y[:queries]))
    return {"train_knn_top1": top1}


# ---- A run --------------------------------------------------------------------------------------


def method(config: Config, data: Dataset) -> tuple[Encoder, Augmentation, nn.Module]:
    """The encoder, augmentation and objective of a run; study/baselines has others."""
    if config.patches < 2:
        raise UsageError(
            "--patches is 1; the invariance compares an image's patches, so give at least 2."
        )
    encoder = new_encoder(config, data.train_images)
    augmentation = training_augmentation(config, data.train_images.shape[2:])
    return encoder, augmentation, Objective(config.lam, config.eps2)


def launch(config: Config, method=method) -> dict:
    """Do what the settings say; returns the run's last record, empty where there is no run."""
    if config.report:
        report.write(Path(config.report))
        return {}
    if config.ops:
        describe_ops(config)
        return {}
    if config.export:
        write_program(Path(config.export), load(config.checkpoint))
        print(f"the encoder of {config.checkpoint} written to {config.export}")
        return {}
    keep_freed_memory()
    join_processes(config.device)
    if config.nearest is not None:
        show_nearest(config)
        return {}
    data = first_process_first(lambda: load_data(config))
    if config.plan:
        plan.tell(config, data, method, train, embed)
        return {}
    return carry_out(config, data, method)


def carry_out(config: Config, data: Dataset, method) -> dict:
    """Train, probe and export, as the settings say; returns what `launch` returns."""
    # What cannot work is refused here, before anything is written.
    trains = not (config.checkpoint or config.eval_only)
    if trains:
        encoder, augmentation, objective = method(config, data)
    elif config.checkpoint:
        encoder = load(config.checkpoint, config.device)
    else:
        encoder = untrained_encoder(config, data.train_images)
    if config.checkpoint and not config.eval_only:  # for --export-features alone
        bag = bag_to_probe(encoder, data.train_images, config)
        tests = data.test_images
        test_bag = None if tests is None else bag_to_probe(encoder, tests, config)
        export_features(config.export_features, bag, test_bag, data)
        return {}

    about = dataclasses.asdict(config) | provenance(config.device)
    about |= {"images": len(data.train_images), "data_key": data.key}
    path = from_first(lambda: run_path(config))  # it may name the time, which must be one for all
    with RunFolder(path, about, bool(config.resume), config.force) as folder:
        if record := folder.finished():
            return record
        record = {"checkpoint": config.checkpoint} if config.checkpoint else {}
        if trains:
            record = train_in(folder, config, data, encoder, augmentation, objective)
        record = folder.finish(record | results(folder, encoder, data, config))
        from_first(lambda: report.write_at_the_end(folder.path))
        return record


def load_data(config: Config) -> Dataset:
    """The data set on the run's device, if it fits.

    Settles `config.patch_size`, and refuses settings that do not fit the data.
    """
    what = (config.dataset, config.data_dir, config.image_size, config.subset)
    data = survey(*what) if config.plan else load_dataset(*what, config.seed)
    N, _, H, W = data.train_images.shape
    if config.patch_size is None:
        # As large as the image, as in the paper; for Tiny ImageNet crops in their own size.
        largest = 32 if config.dataset == "tinyimagenet" else 224
        config.patch_size = min(largest, H, W)
    check_sizes(config, N, H, W)
    if config.plan:
        return data
    return to_device(data, config.device)


def train_in(
    folder: RunFolder, config: Config, data: Dataset, encoder: Encoder, augmentation, objective
) -> dict:
    """Train, with what is logged and saved in the run's folder."""
    announce(config, data.train_images)
    from_first(lambda: keep_some_patches(folder, data.train_images, augmentation, config))
    probed = probed_epochs(config.probe_epochs)

    def at_epoch_end(epoch: int) -> dict:
        record = score(encoder, data.train_images, config)
        if epoch in probed and data.test_labels is not None:
            return record | probe(*features_of_splits(encoder, data, config), data)
        return record | knn_within_training(encoder, data, config)

    run = Run(folder, config.save_every, at_epoch_end)
    # The run warns where R comes near this; a single image has nothing to be spread out from.
    if config.batch > 1:
        run.collapsed_rate = collapsed_rate(config.dim, getattr(objective, "eps2", 0.2))
    return train(encoder, data.train_images, config, augmentation, objective, run)


def results(folder: RunFolder, encoder: Encoder, data: Dataset, config: Config) -> dict:
    """Probe the encoder, and keep its features in the run's folder; returns what was found."""
    started = time.perf_counter()
    features, test_features = features_of_splits(encoder, data, config)
    bag = features.bag
    test_bag = None if test_features is None else test_features.bag
    if config.export_features:
        export_features(config.export_features, bag, test_bag, data)
    record = score(encoder, data.train_images, config)
    if test_features is not None:
        record |= probe(features, test_features, data)
    # The bags suffice from here on: let go of the quadrants, which are four times as wide, before
    # there are other features.
    del features, test_features

    # What learning has to beat, unless this encoder is itself the untrained one.
    untrained = None
    if config.checkpoint or not config.eval_only:
        untrained = untrained_encoder(config, data.train_images)
        some = scored_images(data.train_images)
        record["untrained_effective_rank"] = rank_of(untrained, some, config)
    if test_bag is None:
        keep_without_labels(folder, bag, untrained, data, config)
    else:
        record |= results_with_labels(folder, test_bag, untrained, data, config)
    tell(record)
    return record | {"probe_seconds": time.perf_counter() - started}


def features_of_splits(
    encoder: Encoder, data: Dataset, config: Config
) -> tuple[Features, Features | None]:
    """Features of the training and the test images.

    Without labels there are no test images, nothing is probed, and the bags alone are made.
    """
    if data.test_images is None:
        return Features(bag_to_probe(encoder, data.train_images, config), None), None
    train_h = features_to_probe(encoder, data.train_images, config)
    return train_h, features_to_probe(encoder, data.test_images, config)


# ---- What a run says and keeps ------------------------------------------------------------------


def announce(config: Config, images: Tensor) -> None:
    N, _, H, W = images.shape
    steps = N // config.batch * config.epochs
    sides = dict.fromkeys(sides_of_patches(config, steps))
    print(
        f"preset {config.preset} on {config.device}, {config.precision}: {N:,} images of {H}x{W}, "
        f"{steps:,} steps, {steps * config.batch * config.patches:,} patches of "
        f"{', then '.join(f'{s}x{s}' for s in sides)} in all"
    )
    describe_ops(config)


def describe_ops(config: Config) -> None:
    device = torch.device(config.device)
    rows = min(config.batch, config.dim)
    print(*ops.describe(device, config.patch_size or 32, rows), sep="\n")


def keep_some_patches(
    folder: RunFolder, images: Tensor, augmentation: Augmentation | list, config: Config
) -> None:
    """Write `patches.npz` for the report: six images, and twelve training patches of each."""
    some = torch.randperm(len(images), generator=generator_of(config.seed, "report", 0))[:6]
    if isinstance(augmentation, list):
        augmentation = (augmentation * 12)[:12]
    chance = generator_of(config.seed, "report", 1)
    params = sample_patches(len(some), 12, images.shape[2:], augmentation, chance)
    x = extract_patches(images, some, params, config.patch_size)
    patches = ((x + 1) * 127.5).round().to(torch.uint8).unflatten(0, (12, -1))
    chosen = images[some.to(images.device)]
    write_features(folder.path / "patches.npz", images=chosen, patches=patches)


def keep_without_labels(
    folder: RunFolder, h: Tensor, untrained: Encoder | None, data: Dataset, config: Config
) -> None:
    """Keep all features, and what the report shows."""
    print("These images have no labels: their features are kept, and nothing is probed.")
    kept = {"train_features": halved(h), "files": data.files}
    from_first(lambda: write_features(folder.path / "features.npz", **kept))

    some = shown_in_report(len(h), config)
    images = pick(data.train_images, some)
    before = None if untrained is None else bag_to_probe(untrained, images, config)
    files = [data.files[row] for row in some.tolist()] if data.files else None
    shown = {"images": images, "features": pick(h, some), "untrained": before, "files": files}
    from_first(lambda: report.keep(folder.path, **shown))


def results_with_labels(
    folder: RunFolder, test_h: Tensor, untrained: Encoder | None, data: Dataset, config: Config
) -> dict:
    """Keep the test features and what the report shows; returns what learning has to beat.

    `untrained` is None where the encoder is itself untrained.
    """
    kept = {"test_features": halved(test_h), "test_labels": data.test_labels}
    kept["classes"] = data.classes
    from_first(lambda: write_features(folder.path / "test_features.npz", **kept))

    some = shown_in_report(len(test_h), config)
    shown = {"images": pick(data.test_images, some), "features": pick(test_h, some)}
    shown |= {"labels": data.test_labels[some], "classes": data.classes}
    files = data.test_files
    shown["files"] = [files[row] for row in some.tolist()] if files else None
    if untrained is None:
        top1, _ = probe_pixels(data, linear_probe)
        record = {"raw_pixels_top1": top1, "raw_pixels_knn_top1": probe_pixels(data, knn_probe)}
    else:
        before = bag_to_probe(untrained, data.train_images, config)
        test_before = bag_to_probe(untrained, data.test_images, config)
        record = probe_without_training(before, test_before, data)
        shown["untrained"] = pick(test_before, some)
    from_first(lambda: report.keep(folder.path, **shown))
    return record


def shown_in_report(N: int, config: Config) -> Tensor:
    """Which of N images the report shows: at most 3,000, fewer where features are wide."""
    most = min(3000, 6_000_000 // config.hidden)
    order = torch.randperm(N, generator=generator_of(config.seed, "shown", 0))
    return order[:most].sort().values


def pick(x: Tensor, rows: Tensor) -> Tensor:
    return x[rows.to(x.device)]


def export_features(path: str, bag: Tensor, test_bag: Tensor | None, data: Dataset) -> None:
    from_first(lambda: write_splits(Path(path), bag, test_bag, data))
    tests = "" if test_bag is None else f" and {len(test_bag):,} test images"
    print(f"features of {len(bag):,} training images{tests} written to {path}")


SPOKEN = {
    "linear_top1": "linear probe of the bag",
    "linear_top5": "its top-5",
    "quadrants_top1": "linear probe of the quadrants",
    "knn_top1": "kNN of the bag",
    "untrained_knn_top1": "kNN of the untrained encoder",
    "raw_pixels_top1": "linear probe of raw pixels",
    "raw_pixels_knn_top1": "kNN of raw pixels",
}


def tell(record: dict) -> None:
    accuracies = [f"{what} {record[key]:.4f}" for key, what in SPOKEN.items() if key in record]
    if accuracies:
        print(", ".join(accuracies))
    beside = record.get("untrained_effective_rank")
    untrained = "" if beside is None else f" (of the untrained encoder {beside:.1f})"
    kept = record["neighbours_kept"]
    print(f"effective rank {record['effective_rank']:.1f}{untrained}, neighbours kept {kept:.3f}")


def show_nearest(config: Config) -> None:
    """The ten images of a folder that are nearest to one, by the cosine of their bags of patches.

    Raises `UsageError` where the image cannot be read, and what `sheet_path` and `neighbours` do.
    """
    sheet = sheet_path(config.nearest, config.force)
    encoder = load(config.checkpoint, config.device)
    encoder.image_size = config.image_size  # the query's size is the folder's
    query = encoder.features(config.nearest)  # (1, hidden)
    data = first_process_first(lambda: load_data(config))
    h, files = embed(encoder, data.train_images), data.files
    if data.test_images is not None:
        h = torch.cat([h, embed(encoder, data.test_images)])
        files = files + data.test_files
    found = neighbours(config.nearest, query, h, files)
    print(*(f"{similarity:.3f}  {file}" for file, similarity in found), sep="\n")
    from_first(lambda: draw_sheet(sheet, config.nearest, found))
    print(f"drawn: {sheet}")


# ---- Command line -------------------------------------------------------------------------------


def main(argv: list[str] | None = None) -> dict:
    """The command line: returns the run's last record, or exits with one sentence and a code.

    Codes: 2 for a mistake in arguments or data, 1 for a loss that is not finite, 128 + its number
    for a signal; all of them are in docs/running.md.
    """
    about = "Train EMP-SSL on images without labels, then probe its features."
    with one_sentence():
        record = launch(read_settings(Config, PRESETS, argv, about))
        leave_processes()
        return record


def command() -> None:
    """The console command `empssl`. It returns None: what it returned would be its exit code."""
    main()


if __name__ == "__main__":
    command()
