"""EMP-SSL: image features without labels, in one pass over the data. Tong, Chen, Ma, LeCun, arXiv 2304.03977.

Cut many patches from each image, pull the patches of an image together, keep the batch spread out:

    maximise  R + lambda * D      R = mean_i 1/2 log det(I + d/(b eps2) Z_i^T Z_i)    Total Coding Rate
                                  D = mean_ij cos(z_ij, mean_i z_ij)                  invariance

Letters used throughout: n patches an image, b images a batch, d embedding width, N images in a data set, s side of a patch in
pixels, P patches in one forward, K numbers that describe a patch. Embeddings are z (n, b, d): patch-major, so z[i] is the
i-th patch of every image, and row i*b + j of anything flattened is patch i of image j.

    python empssl.py --dataset cifar10 --epochs 10
"""

import hashlib
import itertools
import math
import time
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F
import torchvision
from torch import Tensor

import empssl_io as io
import empssl_ops as ops
from empssl_io import UsageError, flag, load_dataset

__all__ = ["load_dataset", "Augmentation", "sample_patches", "extract_patches", "extract_patches_ref", "Encoder",
           "coding_rate", "invariance", "empssl_loss", "LARS", "train", "embed", "linear_probe", "knn_probe", "main"]


# ---- Configuration: every field is a flag (--patch-size ...); a preset is a set of other defaults -------------------

@dataclass
class Config(io.RunConfig):
    """The method's settings; what a run reads and writes, and where, is in `io.RunConfig`."""
    preset: str = flag("auto", "other defaults: the paper's, a CPU's, a hurried GPU's", choices=("auto", "paper", "laptop", "fast"))
    epochs: int = flag(1, "passes over the training images; the cosine ends with the last")
    patches: int = flag(None, "n, patches an image")
    patch_size: int = flag(None, "s, side of a patch in pixels after resizing")
    size_schedule: str = flag(None, "sides and shares of training, as 16:0.7,32:0.3 (S3L): small patches first")
    augmentation: str = flag(None, "of the training patches", choices=("paper", "light"))
    batch: int = flag(None, "b, images a batch")
    lr: float = flag(None, "learning rate at the start")
    lam: float = flag(None, "lambda, weight of the invariance term")
    eps2: float = flag(0.2, "squared distortion of the coding rate")
    optimizer: str = flag("lars", "of every weight", choices=("lars", "sgd", "adamw"))
    weight_decay: float = flag(1e-4, "not of biases and BatchNorm, with LARS")
    eta: float = flag(0.005, "trust coefficient of LARS")
    backbone: str = flag(None, "encoder's backbone", choices=io.BACKBONES)
    drop_last_stage: bool = flag(None, "leave the backbone's last stage out (S3L)")
    hidden: int = flag(None, "width of the representation, the features that are probed")
    projector: int = flag(None, "width between the representation and the embedding")
    dim: int = flag(None, "d, width of the embedding")
    eval_patches: int = flag(None, "patches an image when probing")
    eval_augmentation: str = flag(None, "how those are drawn: as in training, crops alone on an even grid, or the whole image "
                                  "and what the encoder sees in its parts", choices=("train", "grid", "maps"))
    probe_epochs: str = flag(None, "probe after these epochs too, as 1,10; the time it takes is not training's")
    seed: int = flag(0, "of weights, order and patches; a CPU run repeats bit for bit")
    precision: str = flag("auto", "of the encoder; the loss is always float32", choices=("auto", "bf16", "float32"))
    compile: bool = flag(None, "torch.compile the encoder")


PRESETS = {
    "paper": dict(patches=20, augmentation="paper", batch=100, lr=0.3, lam=200.0, backbone="resnet18", hidden=4096,
                  projector=4096, dim=1024, eval_patches=128, eval_augmentation="train"),
    "laptop": dict(patches=8, patch_size=16, augmentation="light", batch=50, lr=0.3, lam=100.0, backbone="small",
                   hidden=1024, projector=512, dim=512, eval_patches=1, eval_augmentation="maps"),
    "fast": dict(patches=20, patch_size=16, augmentation="light", batch=100, lr=0.3, lam=200.0, backbone="resnet18", hidden=2048,
                 projector=2048, dim=1024, eval_patches=16, eval_augmentation="grid", drop_last_stage=True, compile=True),
}


def generator(seed: int, purpose: str, step: int) -> torch.Generator:
    """Randomness is a function of (seed, purpose, step): nothing to save, the same on every device and process.

    PyTorch's CPU generator keeps 32 bits of its seed, so the three are hashed rather than added.
    """
    digest = hashlib.blake2b(f"{seed} {purpose} {step}".encode(), digest_size=4).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little"))


# ---- Patches (paper section 3.1): crop a quarter of the image, resize, flip, jitter, grey, blur, solarize -----------
# Sampling draws the numbers that describe each patch; extracting is a pure function of them.

@dataclass
class Augmentation:
    """How patches are drawn. The defaults are the official CIFAR recipe; `Augmentation.none()` is the crop alone."""
    area: tuple[float, float] = (0.25, 0.25)        # of the image's area, uniform
    ratio: tuple[float, float] = (1.0, 1.0)         # width / height, log-uniform; (3/4, 4/3) at 224 pixels
    flip: float = 0.5                               # probability
    jitter: float = 0.8                             # probability that the four below act, in an order of its own
    brightness: float = 0.4                         # factor uniform in [1 - 0.4, 1 + 0.4]
    contrast: float = 0.4                           # the same
    saturation: float = 0.4                         # the same
    hue: float = 0.2                                # shift uniform in [-0.2, 0.2] of the colour circle
    grey: float = 0.2                               # probability
    blur: float = 0.1                               # probability
    sigma: tuple[float, float] = (0.1, 2.0)         # of the blur, output pixels, uniform
    solarize: float = 0.1                           # probability; inverts values from 128/255 up

    @classmethod
    def none(cls, **kwargs) -> "Augmentation":
        return cls(**{"flip": 0.0, "jitter": 0.0, "grey": 0.0, "blur": 0.0, "solarize": 0.0} | kwargs)


def augmentations(config: Config, H: int, W: int) -> tuple[Augmentation, Augmentation | None]:
    """For training and for evaluation. "light" suits small encoders: less colour, no blur, no solarizing."""
    light = dict(saturation=0.2, hue=0.1, blur=0.0, solarize=0.0) if config.augmentation == "light" else {}
    train = Augmentation(ratio=(1.0, 1.0) if max(H, W) <= 64 else (3 / 4, 4 / 3), **light)
    return train, {"train": train, "grid": None, "maps": Augmentation.none(area=(1.0, 1.0)), None: None}[config.eval_augmentation]


COLUMNS = ("top", "left", "height", "width", "flip", "brightness", "contrast", "saturation", "hue", "order", "grey",
           "sigma", "solarize")
K = len(COLUMNS)
ORDERS = torch.tensor(list(itertools.permutations(range(4))))       # (24, 4): order code -> jitter operations


def sample_patches(b: int, n: int, image_size: tuple[int, int], augmentation: Augmentation | list[Augmentation],
                   generator: torch.Generator | None = None) -> Tensor:
    """Draw what describes n patches of b images: float32 `(n, b, K)` on the CPU, columns as in `COLUMNS`.

    Crops are whole pixels, sized as torchvision's RandomResizedCrop sizes them, but one that does not fit is cut to
    the image where torchvision draws again. Factors that do not act are neutral: 1 for brightness, contrast, saturation; 0
    for the rest. A list holds one augmentation for each patch, n in all.
    """
    if isinstance(augmentation, list):
        return torch.cat([sample_patches(b, 1, image_size, one, generator) for one in augmentation])
    (H, W), a = image_size, augmentation
    if not (0 < a.area[0] <= a.area[1] <= 1 and 0 < a.ratio[0] <= a.ratio[1]):
        raise UsageError(f"a crop of area {a.area} and ratio {a.ratio} does not fit: both must rise, the area within (0, 1].")
    u = iter(torch.rand(16, n, b, generator=generator))             # one uniform (n, b) for each choice below
    between = lambda lo, hi: lo + (hi - lo) * next(u)
    happens = lambda probability: next(u) < probability

    area = H * W * between(*a.area)
    ratio = torch.exp(between(math.log(a.ratio[0]), math.log(a.ratio[1])))
    height = (area / ratio).sqrt().round().clamp(1, H)
    width = (area * ratio).sqrt().round().clamp(1, W)
    top = (next(u) * (H - height + 1)).floor()
    left = (next(u) * (W - width + 1)).floor()
    flip = happens(a.flip)
    jitter = happens(a.jitter)
    factor = lambda strength: torch.where(jitter, between(max(0.0, 1 - strength), 1 + strength), 1.0)
    brightness, contrast, saturation = factor(a.brightness), factor(a.contrast), factor(a.saturation)
    hue = torch.where(jitter, between(-a.hue, a.hue), 0.0)
    order = torch.where(jitter, (next(u) * len(ORDERS)).floor(), 0.0)
    grey = happens(a.grey)
    sigma = torch.where(happens(a.blur), between(*a.sigma), 0.0)
    solarize = happens(a.solarize)
    return torch.stack([top, left, height, width, flip, brightness, contrast, saturation, hue, order, grey, sigma, solarize], dim=-1)


def grid_patches(b: int, n: int, image_size: tuple[int, int]) -> Tensor:
    """`sample_patches` without chance: crops alone, of a quarter of the image, on an even grid. n must be a square."""
    k = math.isqrt(n)
    if k * k != n:
        raise UsageError(f"--eval-patches {n} makes no even grid; give a square such as 1, 4, 9 or 16.")
    params = sample_patches(b, n, image_size, Augmentation.none(), generator(0, "grid", 0))         # (n, b, K)
    even = torch.linspace(0, 1, k) if k > 1 else torch.tensor([0.5])
    down, across = even.repeat_interleave(k).view(-1, 1), even.repeat(k).view(-1, 1)            # (n, 1)
    params[..., 0] = (down * (image_size[0] - params[..., 2])).round()
    params[..., 1] = (across * (image_size[1] - params[..., 3])).round()
    return params


def extract_patches(images: Tensor, index: Tensor, params: Tensor, s: int, dtype: torch.dtype = torch.float32,
                    check: bool = False) -> Tensor:
    """Cut and augment the patches that `params` describes, scaled to [-1, 1].

    images `(N, 3, H, W)` uint8; index `(b,)` int64, rows of `images`; params `(n, b, K)` from `sample_patches`; s side of a
    patch. Returns `(n*b, 3, s, s)` of `dtype` on the images' device, channels-last, patch-major. Runs compiled where `empssl_ops`
    has a kernel, else as `extract_patches_ref`. Raises `ValueError` for wrong shapes or types, and where a crop or an index leaves
    what it indexes; the CUDA kernel makes such a patch NaN instead, which costs no synchronisation, unless `check`.
    """
    ops.check_patches(images, index, params, s)
    if check or not (images.device.type == "cuda" and ops.implementation("extract_patches", images.device, s, dtype)[0]):
        ops.check_crops(images, index, params)
    return torch.ops.empssl.extract_patches(images, index.to(images.device), params.to(images.device), s, dtype)


def extract_patches_ref(images: Tensor, index: Tensor, params: Tensor, s: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """`extract_patches` in PyTorch, all patches at once, arguments unchecked. Computes in float64 for that `dtype`."""
    n, b, _ = params.shape
    device, compute = images.device, torch.float64 if dtype == torch.float64 else torch.float32
    out = torch.empty(n * b, 3, s, s, dtype=dtype, device=device, memory_format=torch.channels_last)
    params = params.to(device, compute).flatten(0, 1)               # (n*b, K)
    index = index.to(device).repeat(n)                              # (n*b,)
    # A chunk's temporaries stay in a CPU's cache, or within a GPU's memory.
    chunk = max(1, 2 ** (19 if device.type == "cpu" else 24) // max(s * s, images.shape[2] * images.shape[3]))
    for rows in torch.arange(n * b, device=device).split(chunk):
        p = dict(zip(COLUMNS, params[rows].unbind(1)))              # each (P,)
        x = images[index[rows]].to(compute) / 255                   # (P, 3, H, W) in [0, 1]
        down = crop_weights(p["top"], p["height"], x.shape[2], s)   # (P, s, H)
        across = crop_weights(p["left"], p["width"], x.shape[3], s)             # (P, s, W)
        across = torch.where(p["flip"].view(-1, 1, 1) > 0, across.flip(1), across)
        x = apply_rows_and_columns(down, x, across)                 # (P, 3, s, s)
        for step in ORDERS.to(device)[p["order"].long()].unbind(1):             # each patch's own order of the four
            for operation, (name, neutral, jitter) in enumerate(JITTER):
                here = (step == operation) & (p[name] != neutral)
                x[here] = jitter(x[here], p[name][here].view(-1, 1, 1, 1))
        x = torch.where(p["grey"].view(-1, 1, 1, 1) > 0, greyscale(x), x)
        here = p["sigma"] > 0
        blur = blur_weights(p["sigma"][here], s)                    # (P', s, s)
        x[here] = apply_rows_and_columns(blur, x[here], blur)
        x = torch.where((p["solarize"].view(-1, 1, 1, 1) > 0) & (x >= 128 / 255), 1 - x, x)
        out[rows] = (x * 2 - 1).to(dtype)
    return out


def apply_rows_and_columns(down: Tensor, x: Tensor, across: Tensor) -> Tensor:
    """`down @ x @ across^T` for each patch and channel: `(P, s, H), (P, 3, H, W), (P, s, W) -> (P, 3, s, s)`."""
    P, C, H, W = x.shape
    x = torch.bmm(x.reshape(P, C * H, W), across.mT).view(P, C, H, across.shape[1])
    return torch.matmul(down.unsqueeze(1), x)


def crop_weights(start: Tensor, length: Tensor, side: int, s: int) -> Tensor:
    """Rows that crop `[start, start + length)` out of `side` pixels and resize it to `s`: `(P,), (P,) -> (P, s, side)`.

    Bilinear, antialiased when shrinking: the triangle filter of torchvision's `resize(..., antialias=True)`.
    """
    scale = (length / s).view(-1, 1, 1)
    centre = (torch.arange(s, device=start.device, dtype=start.dtype).view(1, -1, 1) + 0.5) * scale     # in the crop
    pixel = torch.arange(side, device=start.device, dtype=start.dtype) - start.view(-1, 1, 1)           # (P, 1, side)
    weight = (1 - (pixel + 0.5 - centre).abs() / scale.clamp(min=1)).clamp(min=0)
    weight = torch.where((pixel >= 0) & (pixel < length.view(-1, 1, 1)), weight, 0.0)
    return weight / weight.sum(-1, keepdim=True)


def greyscale(x: Tensor) -> Tensor:
    """`(P, 3, s, s) -> (P, 1, s, s)`: ITU-R 601 luma, torchvision's weights."""
    r, g, b = x.unbind(1)
    return (0.2989 * r + 0.587 * g + 0.114 * b).unsqueeze(1)


def blend(x: Tensor, other: Tensor, factor: Tensor) -> Tensor:
    return (factor * x + (1 - factor) * other).clamp(0, 1)


def rotate_hue(x: Tensor, shift: Tensor) -> Tensor:
    """Through HSV and back: hue in sixths of the circle, value = max, chroma = max - min stays."""
    r, g, b = x.unbind(1)
    value, chroma = x.amax(1), x.amax(1) - x.amin(1)
    c = torch.where(chroma > 0, chroma, 1.0)
    hue = torch.where(value == r, (g - b) / c, torch.where(value == g, 2 + (b - r) / c, 4 + (r - g) / c))
    hue = torch.where(chroma > 0, hue, 0.0) + 6 * shift.squeeze(1)
    channels = []
    for offset in (5, 3, 1):                                        # red, green, blue
        k = (hue + offset).remainder(6)
        channels.append(value - chroma * torch.minimum(k, 4 - k).clamp(0, 1))
    return torch.stack(channels, 1)


JITTER = (("brightness", 1, lambda x, factor: (factor * x).clamp(0, 1)),
          ("contrast", 1, lambda x, factor: blend(x, greyscale(x).mean((2, 3), keepdim=True), factor)),
          ("saturation", 1, lambda x, factor: blend(x, greyscale(x), factor)),
          ("hue", 0, rotate_hue))


def blur_weights(sigma: Tensor, s: int, radius: int = 6) -> Tensor:
    """Rows that blur s pixels: 13 Gaussian taps, reflected at the borders. `(P,) -> (P, s, s)`."""
    tap = torch.arange(-radius, radius + 1, device=sigma.device)
    weight = torch.softmax(-0.5 * (tap / sigma.view(-1, 1)) ** 2, dim=1)           # (P, 13), each sums to 1
    period = max(2 * (s - 1), 1)
    pixel = (torch.arange(s, device=sigma.device).view(-1, 1) + tap).remainder(period)
    pixel = torch.minimum(pixel, period - pixel) if s > 1 else torch.zeros_like(pixel)      # (s, 13), reflected
    rows = torch.zeros(len(sigma), s, s, dtype=sigma.dtype, device=sigma.device)
    return rows.scatter_add_(2, pixel.expand(len(sigma), -1, -1), weight.unsqueeze(1).expand(-1, s, -1))


# ---- Encoder (paper section 3.2): backbone, representation, projector -----------------------------------------------

class Encoder(nn.Module):
    """Patches `(P, 3, s, s)` in [-1, 1] to unit embeddings `(P, d)`; `representation(x)` `(P, hidden)` is probed.

    backbone: "resnet18", torchvision's, with the CIFAR stem up to 64 pixels; or "small", for CPUs; else `ValueError`.
    """

    def __init__(self, backbone: str = "resnet18", patch_size: int = 32, hidden: int = 4096, projector: int = 4096,
                 dim: int = 1024, drop_last_stage: bool = False):
        super().__init__()
        self.architecture = dict(backbone=backbone, patch_size=patch_size, hidden=hidden, projector=projector, dim=dim,
                                 drop_last_stage=drop_last_stage)
        if backbone == "resnet18":
            self.backbone = torchvision.models.resnet18()
            self.backbone.fc = nn.Identity()
            if patch_size <= 64:
                self.backbone.conv1 = nn.Conv2d(3, 64, 3, stride=1, padding=1, bias=False)
                self.backbone.maxpool = nn.Identity()
            if drop_last_stage:
                self.backbone.layer4 = nn.Identity()
            width = 256 if drop_last_stage else 512
        elif backbone == "small":
            self.backbone, width = small_backbone(drop_last_stage)
        else:
            raise ValueError(f"There is no backbone {backbone!r}; choose resnet18 or small.")
        self.represent = nn.Sequential(nn.Linear(width, hidden), nn.BatchNorm1d(hidden), nn.ReLU())
        self.project = nn.Sequential(nn.Linear(hidden, projector), nn.BatchNorm1d(projector), nn.ReLU(),
                                     nn.Linear(projector, dim))

    def representation(self, x: Tensor) -> Tensor:
        return self.represent(self.backbone(x))                     # (P, hidden)

    def forward(self, x: Tensor) -> Tensor:
        return F.normalize(self.project(self.representation(x)).float(), dim=-1)    # (P, d), unit rows

    def maps(self, x: Tensor) -> Tensor:
        """What a linear probe can use of whole images `(b, 3, 2s, 2s)`: `(b, 8 * width + hidden)`.

        The last stage's map in `regions`, and the representation's mean over patches that begin on every half of a patch, nine as
        a rule; unlike patches encoded apart they see across their borders."""
        *stages, _, _ = self.backbone.children()                    # the two are the mean over places and its shape
        for stage in stages:
            x = stage(x)                                            # at last (b, width, k, k)
        k = max(1, x.shape[-1] // 2)                                # a patch's side here
        patches = F.avg_pool2d(x, k, max(1, k // 2)).permute(2, 3, 0, 1)                    # (3, 3, b, width)
        h = self.represent(patches.flatten(0, 2)).view(-1, len(x), self.architecture["hidden"])
        return torch.cat([regions(x), h.mean(0)], 1)


def regions(x: Tensor) -> Tensor:
    """`(b, c, k, k) -> (b, 8c)`: means of four rows, and in each of the sides and of the middle, so that an image and its mirror
    image look alike; times 8^-1/2, which makes the eight together as long as one."""
    x = F.adaptive_avg_pool2d(x, 4).unbind(3)                       # 4 times (b, c, 4)
    return torch.cat([x[0] + x[3], x[1] + x[2]], 1).flatten(1) / (2 * 8 ** 0.5)


def small_backbone(drop_last_stage: bool = False) -> tuple[nn.Sequential, int]:
    """16x16 patches to 384 numbers: 128 channels of 8x8, 384 of 4x4 pixels, and their mean. All but the first convolution are
    depthwise, or products of matrices: dense ones did worse at equal seconds on two CPU cores (results/laptop/)."""
    act = lambda width: [nn.BatchNorm2d(width), nn.ReLU(inplace=True)]
    depthwise = lambda width, stride: [nn.Conv2d(width, width, 3, stride, 1, groups=width, bias=False), nn.BatchNorm2d(width)]
    residual = lambda width: Residual(*depthwise(width, 1), Pointwise(width, width, bias=False), *act(width))
    last = [*depthwise(128, 2), Pointwise(128, 384, bias=False), *act(384), residual(384), residual(384)]
    layers = [nn.Conv2d(3, 128, 3, 2, 1, bias=False), *act(128), residual(128), *([] if drop_last_stage else last)]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten()), 128 if drop_last_stage else 384


class Pointwise(nn.Linear):
    """A 1x1 convolution as one product of matrices, whose backward pass is faster on a CPU."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class Residual(nn.Sequential):
    def forward(self, x: Tensor) -> Tensor:
        return x + super().forward(x)


@torch.no_grad()
def whiten(first: nn.Conv2d, images: Tensor, generator: torch.Generator | None = None) -> None:
    """Start a convolution as whitening: the principal components of the images' neighbourhoods, scaled to unit variance,
    with both signs, then random mixtures of them. No labels are used. Worth a point on a holdout (results/laptop/)."""
    x = F.unfold(images.to(first.weight) / 127.5 - 1, first.kernel_size, stride=first.kernel_size)      # (N, 27, places)
    variance, components = torch.linalg.eigh(x.transpose(0, 1).flatten(1).cov())                        # (27,), (27, 27)
    filters = (components / (variance + 1e-3).sqrt()).T                                                 # a row a filter
    mixtures = torch.randn(len(first.weight) - 2 * len(filters), len(filters), generator=generator) @ filters
    first.weight.copy_(torch.cat([filters, -filters, mixtures / len(filters) ** 0.5]).view_as(first.weight))


# ---- Loss (paper equations 2 to 4) ----------------------------------------------------------------------------------

def coding_rate(z: Tensor, eps2: float = 0.2) -> Tensor:
    """Total Coding Rate `R` of `z (n, b, d)`, mean over patches: `1/2 log det(I + d/(b eps2) Z_i^T Z_i)`, in nats.

    The determinant is taken of the smaller of the d x d and the b x b matrix, equal by Sylvester's identity, in
    float32 or better whatever z is. `eps2` is the paper's epsilon squared (the official code's `--eps`, unsquared
    there). NaN where z is not finite.
    """
    with torch.autocast(z.device.type, enabled=False):
        return CodingRate.apply(z if z.dtype == torch.float64 else z.float(), eps2)


class CodingRate(torch.autograd.Function):
    """With c = d/(b eps2): dR/dZ_i = c (I + c Z_i Z_i^T)^-1 Z_i / n, of the inverse that the log-determinant left."""

    @staticmethod
    def forward(ctx, z, eps2):
        n, b, d = z.shape
        c = d / (b * eps2)
        gram = z @ z.mT if b < d else z.mT @ z                      # (n, k, k), k = min(b, d)
        gram.mul_(c).diagonal(dim1=-2, dim2=-1).add_(1)
        logdet, inverse = torch.ops.empssl.logdet_spd(gram)
        ctx.save_for_backward(z, inverse)
        ctx.c = c
        return logdet.mean() / 2

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        z, inverse = ctx.saved_tensors
        n, b, d = z.shape
        return (inverse @ z if b < d else z @ inverse) * (grad * ctx.c / n), None


def logdet_spd_ref(A: Tensor) -> tuple[Tensor, Tensor]:
    """`A (n, k, k)` symmetric positive definite -> `log det A (n,)` and its inverse `(n, k, k)`, by Cholesky.

    NaN, for that matrix alone, where A is not positive definite.
    """
    L, failed = torch.linalg.cholesky_ex(A)
    bad = (failed != 0).view(-1, 1, 1)
    L = torch.where(bad, torch.eye(A.shape[-1], dtype=A.dtype, device=A.device), L)             # invertible, then NaN
    logdet = 2 * L.diagonal(dim1=-2, dim2=-1).log().sum(-1)
    bad |= ~logdet.isfinite().view(-1, 1, 1)
    return logdet.masked_fill(bad.flatten(), math.nan), torch.cholesky_inverse(L.detach()).masked_fill(bad, math.nan)


ops.use_references(extract_patches_ref, logdet_spd_ref)


def invariance(z: Tensor) -> Tensor:
    """`D`: mean cosine between each embedding and its image's mean embedding, of `z (n, b, d)`. In [0, 1] where rows are unit:
    the length of their mean. The mean is part of the graph; there is no stop-gradient."""
    with torch.autocast(z.device.type, enabled=False):
        z = z if z.dtype == torch.float64 else z.float()
        return F.cosine_similarity(z, z.mean(0, keepdim=True), dim=-1).mean()


def empssl_loss(z: Tensor, lam: float = 200.0, eps2: float = 0.2) -> Tensor:
    """`-(R + lam * D)`, to be minimised, of `z (n, b, d)` with unit rows."""
    return -(coding_rate(z, eps2) + lam * invariance(z))


# ---- Optimizer (paper section 4; the details are the official code's) -----------------------------------------------

class LARS(torch.optim.Optimizer):
    """SGD with Nesterov momentum on gradients that LARS has scaled, as the official code does it.

    Tensors with ndim != 1: `trust = eta |p| / (|g| + wd |p| + 1e-8)`, `g <- (g + wd p) min(trust / lr, 1)`, untouched
    where |p| or |g| is 0. Tensors with ndim 1 (biases, BatchNorm): plain SGD, no decay. With the clip a tensor's rate is
    min(trust, lr): where trust is the smaller, a step's length is about eta |p|, whatever |g|, and lr only a cap.
    """

    def __init__(self, params, lr: float = 0.3, momentum: float = 0.9, weight_decay: float = 1e-4, eta: float = 0.005):
        super().__init__(params, dict(lr=lr, momentum=momentum, weight_decay=weight_decay, eta=eta))

    @torch.no_grad()
    def step(self, closure=None):
        loss = torch.enable_grad()(closure)() if closure else None
        for group in self.param_groups:
            lr, momentum, decay = group["lr"], group["momentum"], group["weight_decay"]
            for p in group["params"]:
                if p.grad is None:
                    continue
                g = p.grad
                if p.ndim != 1:
                    p_norm, g_norm = p.norm(), g.norm()
                    trust = group["eta"] * p_norm / (g_norm + decay * p_norm + 1e-8)
                    scaled = (g + decay * p) * (trust / lr).clamp(max=1)
                    g = torch.where((p_norm > 0) & (g_norm > 0), scaled, g)
                state = self.state[p]
                if "momentum_buffer" not in state:
                    state["momentum_buffer"] = torch.zeros_like(g)
                state["momentum_buffer"].mul_(momentum).add_(g)
                p.sub_(lr * (g + momentum * state["momentum_buffer"]))          # Nesterov
        return loss


def new_optimizer(config: Config, parameters: list[Tensor]) -> torch.optim.Optimizer:
    kind, how = {"lars": (LARS, dict(eta=config.eta)), "sgd": (torch.optim.SGD, dict(momentum=0.9, nesterov=True)),
                 "adamw": (torch.optim.AdamW, {})}[config.optimizer]
    return kind(parameters, lr=config.lr, weight_decay=config.weight_decay, **how)


def cosine(lr: float, t: int, T: int) -> float:
    """Learning rate of step t of T: from `lr` at t = 0 down to 0 at t = T, no warm-up."""
    return lr / 2 * (1 + math.cos(math.pi * t / T))


# ---- Training (paper algorithm 1) -----------------------------------------------------------------------------------

def train(encoder: Encoder, images: Tensor, config: Config, augmentation: Augmentation, log=lambda record: None,
          after_epoch=lambda epoch: {}, folder: io.RunFolder | None = None, objective: nn.Module | None = None) -> dict:
    """Train `encoder` in place on `images (N, 3, H, W)` uint8, on the encoder's device, for `config.epochs` passes.

    An epoch's images that do not fill a batch are left out. Every tenth step and each epoch's end go to `log`, the latter with
    what `after_epoch(epoch)` returned. Checkpoints go to `folder`, and training goes on from the one that it holds. Under
    torchrun each process cuts and encodes its share of a batch's images, and the loss is of all b. `objective(z, x, index)`
    stands in for EMP-SSL's loss; its parameters are trained and all its state is saved (baselines.py).
    Returns `train_seconds` (without `after_epoch`), `patches_seen` and the last `R` and `D`. Raises `UsageError` where b > N,
    `FloatingPointError`, before anything is saved, where loss or weights are not finite, `io.Stopped` after a signal.
    """
    n, b, N = config.patches, config.batch, len(images)
    steps, device = N // b, next(encoder.parameters()).device
    T = config.epochs * steps
    if steps == 0:
        raise UsageError(f"--batch {b} is larger than the data set's {N} training images; give a smaller --batch.")
    ours = slice(io.rank() * b // io.processes(), (io.rank() + 1) * b // io.processes())       # of a batch's images
    parameters = [*encoder.parameters(), *(objective.parameters() if objective else ())]
    optimizer = new_optimizer(config, parameters)
    parts = {"encoder": encoder, "optimizer": optimizer} | ({"objective": objective} if objective else {})
    first, seconds, record = 0, 0.0, {}
    if folder and (saved := folder.load()):
        for name, part in parts.items():
            part.load_state_dict(saved[name])
        first, seconds, record = saved["step"], saved["seconds"], saved["record"]
    forward = io.distribute(encoder)
    forward = torch.compile(forward) if config.compile else forward
    bad_step = torch.tensor(-1, device=device)          # the first step whose loss was not finite, read now and then
    clock, seconds_before = time.perf_counter(), seconds
    with io.progress(total=T, initial=first, desc="training", unit="step") as bar:
        for t in range(first, T):
            epoch, i = divmod(t, steps)
            if i == 0 or t == first:
                order = torch.randperm(N, generator=generator(config.seed, "order", epoch))
                encoder.train()
            index = order[i * b:][:b]
            params = sample_patches(b, n, images.shape[2:], augmentation, generator(config.seed, "patches", t))
            s = io.side_at(config, t / T)
            x = cut(images, index[ours], params[:, ours], s, device, config.precision)      # (n * share, 3, s, s)
            with torch.autocast(device.type, torch.bfloat16, enabled=config.precision == "bf16"):
                z = forward(x).unflatten(0, (n, -1))                                        # (n, share, d)
            z = io.gather_images(z)                                                         # (n, b, d)
            loss = objective(z, x, index) if objective else empssl_loss(z, config.lam, config.eps2)
            optimizer.param_groups[0]["lr"] = cosine(config.lr, t, T)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            bad_step = torch.where((bad_step < 0) & ~loss.detach().isfinite(), t, bad_step)
            bar.update()

            epoch_ends = i + 1 == steps
            signal, due = folder.asked() if folder and not epoch_ends else (0, False)
            saving = due or signal or epoch_ends
            if (t + 1) % 10 == 0 or t + 1 == first + 10 or saving:
                io.check_finite(bad_step, parameters if saving else [], t, T)
                now = seconds + time.perf_counter() - clock
            if (t + 1) % 10 == 0 or epoch_ends:
                u = F.normalize(z.detach(), dim=-1)
                record = {"step": t + 1, "epoch": (t + 1) / steps, "R": coding_rate(u, config.eps2).item(),
                          "D": invariance(u).item(), "loss": loss.item(), "lr": cosine(config.lr, t, T),
                          "patches_per_second": (t + 1) * n * b / now}
                io.show(bar, record)
                log(record)
            if t + 1 == first + 10:
                bar.write(f"about {io.human_time((now - seconds_before) / 10 * (T - t - 1))} of training to go")
            if epoch_ends:
                seconds = now
                io.agree_on_buffers(encoder)
                log({"step": t + 1, "epoch": epoch + 1, "train_seconds": seconds} | after_epoch(epoch))
                signal = folder.asked()[0] if folder else 0
                clock = time.perf_counter()
            if folder and saving:
                folder.save({"step": t + 1, "seconds": seconds + time.perf_counter() - clock, "record": record,
                             **{name: part.state_dict() for name, part in parts.items()}})
            if signal:
                raise io.Stopped(signal, f"stopped after step {t + 1} of {T}, and saved; to go on: {io.PROGRAM} "
                                         f"--resume {folder.path}")
    return {"R": record["R"], "D": record["D"], "train_seconds": seconds, "patches_seen": T * n * b}


def cut(images: Tensor, index: Tensor, params: Tensor, s: int, device: torch.device, precision: str = "float32") -> Tensor:
    """`extract_patches` on `device`, wherever the data set is: if elsewhere, a batch is gathered first. A GPU is not waited for."""
    if images.device.type != device.type:
        images, index = images[index], torch.arange(len(index))
    send = lambda x: (x.pin_memory() if device.type == "cuda" and not x.is_cuda else x).to(device, non_blocking=True)
    return extract_patches(send(images), send(index), send(params), s, torch.bfloat16 if precision == "bf16" else torch.float32)


# ---- Evaluation (paper section 4): bag of patches, linear probe, weighted kNN ---------------------------------------

@torch.no_grad()
def embed(encoder: Encoder, images: Tensor, patches: int = 16, augmentation: Augmentation | None = None, seed: int = 0,
          precision: str = "float32", maps: bool = False) -> Tensor:
    """Representation of each image, averaged over its patches: `(N, 3, H, W)` uint8 -> `(N, hidden)` float32.

    The encoder is put into eval mode, as in the paper's evaluation. `augmentation`: how the patches are drawn, by default crops
    alone on an even grid. `maps`: the whole image at twice a patch's side, seen by `Encoder.maps`; give `patches=1`.
    Raises `UsageError` where `patches` makes no even grid."""
    encoder.eval()
    device, s = next(encoder.parameters()).device, encoder.architecture["patch_size"]
    look, s, none = (encoder.maps, 2 * s, Augmentation.none(area=(1.0, 1.0))) if maps else (encoder.representation, s, None)
    b = max(1, min(len(images), 2 ** (19 if device.type == "cpu" else 23) // (patches * s * s)))        # images at once
    features = torch.zeros(len(images), look(torch.zeros(1, 3, s, s, device=device)).shape[1], device=device)
    starts = range(0, len(images), b)[io.rank()::io.processes()]    # under torchrun each process embeds its share
    for start in io.progress(starts, desc="embedding", unit="batch", leave=False):
        index = torch.arange(start, min(start + b, len(images)))
        params = (sample_patches(len(index), patches, images.shape[2:], augmentation or none, generator(seed, "embed", start))
                  if augmentation or none else grid_patches(len(index), patches, images.shape[2:]))
        x = cut(images, index, params, s, device, precision)
        with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
            h = look(x)
        features[start:start + b] = h.float().view(patches, len(index), -1).mean(0)
    return io.sum_over_processes(features)


@torch.no_grad()
def linear_probe(train_features: Tensor, train_labels: Tensor, test_features: Tensor, test_labels: Tensor,
                 epochs: int = 100, batch: int = 100, lr: float = 0.03, seed: int = 0) -> tuple[float, float]:
    """Top-1 and top-5 test accuracy, in [0, 1], of a linear layer trained on frozen features `(N, hidden)`.

    The official protocol: SGD, momentum 0.9, weight decay 5e-5, cosine to 0; the gradient is written out because steps this
    small are mostly autograd's overhead. Unlike the official code, the accuracy is the last epoch's rather than the best one
    seen on the test data, and no training feature is dropped. Under torchrun each process has some columns.
    """
    device, hidden = train_features.device, train_features.shape[1]
    ours = slice(io.rank() * hidden // io.processes(), (io.rank() + 1) * hidden // io.processes())
    train_features, test_features = train_features[:, ours].contiguous(), test_features[:, ours].contiguous()
    y, test_labels = train_labels.to(device), test_labels.to(device)
    classes, bound, start = int(max(y.max(), test_labels.max())) + 1, hidden ** -0.5, torch.Generator().manual_seed(seed)
    weight, bias = (torch.empty(classes, n).uniform_(-bound, bound, generator=start).to(device) for n in (hidden, 1))   # as nn.Linear
    weight = weight[:, ours].clone()                                            # (classes, share); bias (classes, 1)
    logits = lambda x: io.sum_over_processes(weight @ x.T) + bias               # (classes, batch), the faster way round on a CPU
    weight_step, bias_step, target = torch.zeros_like(weight), torch.zeros_like(bias), F.one_hot(y, classes).T.contiguous().to(weight)
    for epoch in io.progress(range(epochs), desc="linear probe", unit="epoch", leave=False):
        rate = cosine(lr, epoch, epochs)
        for index in torch.randperm(len(y), generator=generator(seed, "probe", epoch)).to(device).split(batch):
            x = train_features.index_select(0, index)                           # [index] takes half as long again on a CPU
            error = (F.softmax(logits(x), 0) - target.index_select(1, index)) / len(index)          # of the logits
            weight_step.addmm_(error, x, beta=0.9).add_(weight, alpha=5e-5)
            bias_step.mul_(0.9).add_(bias, alpha=5e-5).add_(error.sum(1, keepdim=True))
            weight.sub_(weight_step, alpha=rate)
            bias.sub_(bias_step, alpha=rate)
    hits = logits(test_features).topk(min(5, classes), dim=0).indices.T == test_labels.view(-1, 1)               # (M, 5)
    return hits[:, 0].float().mean().item(), hits.any(1).float().mean().item()


@torch.no_grad()
def knn_probe(train_features: Tensor, train_labels: Tensor, test_features: Tensor, test_labels: Tensor, k: int = 20,
              temperature: float = 0.07) -> float:
    """Top-1 test accuracy, in [0, 1], of the k nearest training features by cosine, votes weighted exp(cos / temperature)."""
    bank, y = F.normalize(train_features, dim=1), train_labels.to(train_features.device)
    hits = torch.zeros((), device=y.device)
    blocks = list(zip(F.normalize(test_features, dim=1).split(1000), test_labels.to(y.device).split(1000)))
    for queries, answers in io.progress(blocks[io.rank()::io.processes()], desc="kNN", unit="block", leave=False):
        similarity, nearest = (queries @ bank.T).topk(min(k, len(bank)), dim=1)             # (1000, k)
        votes = torch.zeros(len(queries), int(y.max()) + 1, device=y.device)
        votes.scatter_add_(1, y[nearest], (similarity / temperature).exp())
        hits += (votes.argmax(1) == answers).sum()
    return io.sum_over_processes(hits).item() / len(test_labels)


def probe(seen: list[Tensor], data: io.Dataset, config: Config, augmentation: Augmentation | None) -> dict:
    """Probes of both splits' features, `seen`, and of their last columns, the representation h. Beside them stand those of raw
    pixels and of the untrained encoder, so that a reader sees what was learned; these two are remembered by data set and recipe."""
    linear = lambda train, test: linear_probe(train, data.train_labels, test, data.test_labels)
    h, untrained = [x[:, -config.hidden:] for x in seen], new_encoder(config, data.train_images)
    key = io.untrained_key(data, config, untrained, augmentation)
    before = features(settled(untrained, data.train_images, config), data, config, augmentation) if io.remembered(key) is None else []
    untrained_top1, (top1, top5), of_h, raw_pixels_top1, knn_top1 = io.side_by_side(config.device, [
        lambda: io.remembered(key, lambda: linear(*before)[0]),
        lambda: linear(*seen),
        lambda: linear(*h) if h[0].shape != seen[0].shape else None,
        lambda: io.remembered(f"raw pixels of {data.key}", lambda: linear(*map(io.pixels, (data.train_images, data.test_images)))[0]),
        lambda: knn_probe(h[0], data.train_labels, h[1], data.test_labels)])
    return {"linear_top1": top1, "linear_top5": top5, "representation_top1": (of_h or (top1,))[0], "knn_top1": knn_top1,
            "raw_pixels_top1": raw_pixels_top1, "untrained_top1": untrained_top1}


def features(encoder: Encoder, data: io.Dataset, config: Config, augmentation: Augmentation) -> list[Tensor | None]:
    maps = config.eval_augmentation == "maps"
    return [None if x is None else embed(encoder, x, config.eval_patches, augmentation, config.seed, config.precision, maps)
            for x in (data.train_images, data.test_images)]


@torch.no_grad()
def settled(encoder: Encoder, images: Tensor, config: Config) -> Encoder:
    """An untrained encoder, its BatchNorms' statistics those of training patches, as if the learning rate had been 0."""
    for layer in encoder.modules():
        layer.momentum = None                                       # a BatchNorm's: it then averages all that it sees
    augmentation, _ = augmentations(config, *images.shape[2:])
    for t in range(10):
        index = torch.randint(len(images), (64,), generator=generator(config.seed, "settle", t))
        params = sample_patches(64, 4, images.shape[2:], augmentation, generator(config.seed, "settled", t))
        encoder.train()(cut(images, index, params, config.patch_size, torch.device(config.device)))
    return encoder


def holdout_knn(encoder: Encoder, data: io.Dataset, config: Config, augmentation: Augmentation) -> dict:
    """kNN accuracy inside the training set, up to 1,000 fixed images against 5,000 others: a cheap sign of progress."""
    queries = min(1000, len(data.train_images) // 6)
    if data.train_labels is None or queries == 0:
        return {}
    rows = torch.randperm(len(data.train_images), generator=generator(0, "holdout", 0))[:6 * queries]
    images, y = data.train_images[rows.to(data.train_images.device)], data.train_labels[rows]
    h = embed(encoder, images, min(4, config.eval_patches), augmentation, config.seed, config.precision,
              config.eval_augmentation == "maps")[:, -config.hidden:]
    return {"holdout_knn_top1": knn_probe(h[queries:], y[queries:], h[:queries], y[:queries])}


# ---- Command line ---------------------------------------------------------------------------------------------------

def new_encoder(config: Config, images: Tensor, kind: type[Encoder] = Encoder) -> Encoder:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        encoder = kind(config.backbone, config.patch_size, config.hidden, config.projector, config.dim, config.drop_last_stage)
    if config.backbone == "small":
        some = torch.randperm(len(images), generator=generator(config.seed, "whiten", 0))[:max(1, 2 ** 21 // images[0, 0].numel())]
        whiten(encoder.backbone[0], images[some.to(images.device)].cpu(), generator(config.seed, "mixtures", 0))
    return encoder.to(config.device, memory_format=torch.channels_last)


def method(config: Config, data: io.Dataset) -> tuple[Encoder, nn.Module | None, Augmentation]:
    """What `run` trains: an encoder, an objective (None: EMP-SSL's own) and how patches are drawn. See baselines.py."""
    if config.patches < 2:
        raise UsageError("--patches is 1; the invariance compares an image's patches, so give at least 2.")
    return new_encoder(config, data.train_images), None, augmentations(config, *data.train_images.shape[2:])[0]


def run(config: Config, presets: dict = PRESETS, method=method) -> dict:
    """Load, train, probe, and write `runs/<name>/`. Returns the last metrics record, empty where nothing was trained or probed."""
    config = io.settings(config, presets)
    if config.ops:
        print(*ops.describe(torch.device(config.device), config.patch_size or 32, min(config.batch, config.dim)), sep="\n")
        return {}
    io.keep_freed_memory()
    io.join_processes(config.device)
    data = io.first_process_first(lambda: load_dataset(config.dataset, config.data_dir, config.image_size, config.subset, config.seed))
    N, _, H, W = data.train_images.shape
    if config.patch_size is None:                                   # the image's, as in the paper, but Tiny ImageNet's own
        config.patch_size = min(32 if config.dataset == "tinyimagenet" else 224, H, W)
    io.check_sizes(config, N, H, W)
    _, at_eval = augmentations(config, H, W)
    data = io.to_device(data, config.device)
    if config.checkpoint or config.eval_only:
        encoder = new_encoder(config, data.train_images)
        io.load_weights(encoder, config.checkpoint) if config.checkpoint else settled(encoder, data.train_images, config)
    else:
        encoder, objective, augmentation = method(config, data)
    if config.export_features and not config.eval_only and config.checkpoint:
        io.export(features(encoder, data, config, at_eval), data, config.export_features)
        return {}

    folder = io.run_folder(config, data)
    if record := folder.finished():
        return record
    record = {"checkpoint": config.checkpoint} if config.checkpoint else {}
    if not config.eval_only:
        io.announce(config, N, H, W)
        print(*ops.describe(torch.device(config.device), config.patch_size, min(config.batch, config.dim)), sep="\n")

        def after_epoch(epoch):
            io.save_encoder(folder.path / "encoder.pt", encoder)
            if str(epoch + 1) not in (config.probe_epochs or "").split(",") or data.test_labels is None:
                return holdout_knn(encoder, data, config, at_eval)
            return probe(features(encoder, data, config, at_eval), data, config, at_eval)
        with folder.catching_signals():
            record |= train(encoder, data.train_images, config, augmentation, folder.log, after_epoch, folder, objective)
    started = time.perf_counter()
    h = features(encoder, data, config, at_eval)
    io.save_results(folder, h, data, config.export_features)
    record |= probe(h, data, config, at_eval) if data.test_labels is not None else {}
    return folder.finish(record, time.perf_counter() - started)


def main(argv: list[str] | None = None) -> dict:
    """The command line: returns the run's last record, or exits with code 2 and one sentence on a user's mistake."""
    with io.mistakes_in_one_sentence():
        return run(io.parse_flags(Config, argv, "Train EMP-SSL on images without labels, then probe its features."))


if __name__ == "__main__":
    main()
