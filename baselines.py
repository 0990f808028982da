"""The systems that EMP-SSL is compared with, on its data, patches, encoder, training loop and probe.

    python baselines.py --method simclr --dataset cifar10 --epochs 10

SimCLR (Chen et al., 2002.05709; one negative, noise alone and small batches as in Bordes et al., 2303.01986), VICReg
(Bardes et al., 2105.04906), BYOL (Grill et al., 2006.07733), SwAV (Caron et al., 2006.09882), ReSSL (Zheng et al.,
2107.09282), and instance discrimination on a single branch (Cao & Wu, 2404.19289). `--method empssl` is EMP-SSL itself, and
`--method supervised` the yardstick that sees the labels.
S3L (Cao & Wu, 2103.13559) is a setting of each: --patch-size, --size-schedule, --drop-last-stage and --subset, then
--warm-last-stage (without labels here; the authors' code warms it up with them).

A method here is an objective that `empssl.train` calls with embeddings z (v, b, d) of v views of b images, not
normalised, their patches x (v*b, 3, s, s) and the images' numbers in the data set, index (b,).
"""

import copy
import math
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

import empssl
import empssl_io as io
from empssl import Augmentation, cosine, generator
from empssl_io import UsageError, flag

AUGMENTATIONS = ("paper", "light", "simclr", "byol", "vicreg", "ressl", "single", "noise")


@dataclass
class Config(empssl.Config):
    """EMP-SSL's settings, and those of the methods here; what is None comes from `PUBLISHED`."""
    method: str = flag("simclr", "what is trained", choices=("empssl", "simclr", "vicreg", "byol", "swav", "ressl", "single", "supervised"))
    augmentation: str = flag(None, "of the views", choices=AUGMENTATIONS)
    crops: str = flag("patches", "an image's quarter, as EMP-SSL's patches are, or 0.08 to 1 of it (noise: all of it) as published",
                      choices=("patches", "published"))
    optimizer: str = flag(None, "of every weight", choices=("lars", "sgd", "adamw"))
    weight_decay: float = flag(None, "not of biases and BatchNorm, with LARS")
    eta: float = flag(None, "trust coefficient of LARS")
    temperature: float = flag(None, "of SimCLR, SwAV, ReSSL's student and single-branch discrimination")
    negatives: int = flag(0, "simclr: others that a view is told from, drawn from the batch (0: all of them)")
    noise: float = flag(0.0, "simclr: deviation of Gaussian noise on each view; pixels lie in [-1, 1]")
    bank_start: str = flag("features", "single: the bank begins as the untrained network's features, or at random",
                           choices=("features", "random"))
    bank_update: str = flag("gradient", "single: the rule corrected from the gradient, or the moving average",
                            choices=("gradient", "average"))
    bank_momentum: float = flag(0.5, "single: of the bank's rows")
    distillation: float = flag(20.0, "single: weight of SqrtKL")
    others: int = flag(10_000, "single: rows of the bank beside the batch's own, drawn at each step")
    cutmix: float = flag(0.5, "single: alpha of CutMix's Beta distribution (0: no CutMix)")
    warm_last_stage: str = flag(None, "an encoder.pt of --drop-last-stage: add the last stage, and train it and what follows")


# Settings as published for CIFAR-10. All but the single branch: solo-learn's (da Costa et al., JMLR 2022, files
# scripts/pretrain/cifar/*.yaml, so SwAV without multi-crop); ReSSL's momentum and queue are its paper's. The single branch:
# Cao & Wu's code. Different here, for all: momentum is Nesterov's, the learning rate has no warm-up (solo-learn's is 1 % of the
# epochs), SwAV's prototypes learn from the start and its queue serves once it is full, crops are EMP-SSL's unless --crops
# published. The network up to the embedding is the preset's, with its widths: one layer between the backbone and the head that
# theirs lack, which is what gets probed. d, the embedding's width, is the method's own.
PUBLISHED = {
    "empssl": dict(optimizer="lars", eta=0.005, weight_decay=1e-4),
    "simclr": dict(patches=2, batch=256, augmentation="simclr", dim=256, optimizer="lars", eta=0.02, lr=0.4, weight_decay=1e-4,
                   temperature=0.2),
    "vicreg": dict(patches=2, batch=256, augmentation="vicreg", dim=2048, optimizer="lars", eta=0.02, lr=0.3, weight_decay=1e-4),
    "byol": dict(patches=2, batch=256, augmentation="byol", dim=256, optimizer="lars", eta=0.02, lr=1.0, weight_decay=1e-5),
    "swav": dict(patches=2, batch=256, augmentation="simclr", dim=128, optimizer="lars", eta=0.02, lr=0.6, weight_decay=1e-6,
                 temperature=0.1),
    "ressl": dict(patches=2, batch=256, augmentation="ressl", dim=256, optimizer="sgd", eta=0.0, lr=0.05, weight_decay=1e-4,
                  temperature=0.1),
    "single": dict(patches=1, batch=512, augmentation="single", dim=2048, optimizer="sgd", eta=0.0, lr=1.0, weight_decay=1e-4,
                   temperature=0.2),
    "supervised": dict(optimizer="sgd", eta=0.0, lr=0.1, weight_decay=5e-4),       # not published: a common recipe
}


# ---- Views ----------------------------------------------------------------------------------------------------------

def views(config: Config, H: int, W: int) -> Augmentation | list[Augmentation]:
    """How the views of an image are drawn: one augmentation for all, or one for each."""
    ours = empssl.augmentations(config, H, W)[0]
    if config.augmentation in ("paper", "light"):                               # EMP-SSL's; ReSSL's other view has the crop alone
        if config.crops == "published":
            raise UsageError(f"--augmentation {config.augmentation} has EMP-SSL's crops; leave it or --crops published out.")
        return [ours, Augmentation.none(area=ours.area, ratio=ours.ratio, flip=0.5)] if config.method == "ressl" else ours
    crop, crop_of_a_fifth = dict(area=ours.area, ratio=ours.ratio), dict(area=ours.area, ratio=ours.ratio)
    if config.crops == "published":
        crop, crop_of_a_fifth = dict(area=(0.08, 1.0), ratio=(3 / 4, 4 / 3)), dict(area=(0.2, 1.0), ratio=(3 / 4, 4 / 3))
    strong = dict(brightness=0.8, contrast=0.8, saturation=0.8, hue=0.2, blur=0.5, solarize=0.0)
    mild = dict(saturation=0.2, hue=0.1, blur=0.0, solarize=0.0)                # beside brightness and contrast of 0.4
    return {
        "simclr": Augmentation(**crop, **strong),
        "vicreg": Augmentation(**crop_of_a_fifth | mild | dict(solarize=0.1)),
        "byol": [Augmentation(**crop, **mild), Augmentation(**crop | mild | dict(solarize=0.2))],
        "ressl": [Augmentation(**crop | mild | dict(blur=0.5)), Augmentation.none(**crop, flip=0.5)],
        "single": Augmentation(**crop_of_a_fifth | mild | dict(saturation=0.4)),
        "noise": Augmentation.none(area=(1.0, 1.0) if config.crops == "published" else ours.area),      # one for both views
    }[config.augmentation]


class Objective(nn.Module):
    """What `empssl.train` minimises. It counts its calls: what a method draws is a function of (seed, purpose, call), so
    that a run which is resumed goes on as it would have."""

    def __init__(self, seed: int = 0):
        super().__init__()
        self.seed, self.calls = seed, 0

    def forward(self, z: Tensor, x: Tensor | None = None, index: Tensor | None = None) -> Tensor:
        loss = self.loss(z if z.dtype == torch.float64 else z.float(), x, index)
        self.calls += 1
        return loss

    def chance(self, purpose: str) -> torch.Generator:
        return generator(self.seed, purpose, self.calls)

    def get_extra_state(self) -> int:                                           # saved with the rest of the state
        return self.calls

    def set_extra_state(self, calls: int) -> None:
        self.calls = calls


class Views(empssl.Encoder):
    """The encoder without the last normalisation. In training each view has BatchNorm statistics of its own, as in
    solo-learn (SimCLR's and SwAV's own codes join the views), and views may be one crop, be given noise, mixed, or left out
    (ReSSL's weak one, which only the target sees)."""
    views, encoded, one_crop, noise, cutmix, mixed, chance = 1, 1, False, 0.0, 0.0, None, None

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return self.project(self.representation(x))
        if self.one_crop:
            x = x[:len(x) // self.views].repeat(self.views, 1, 1, 1)
        if self.noise:
            x = x + self.noise * torch.randn(x.shape, generator=self.chance("noise")).to(x)
        if self.cutmix:
            x, self.mixed = cut_mix(x, self.cutmix, self.chance("cutmix"))
        parts = x.chunk(self.views)
        z = [self.project(self.representation(view)) for view in parts[:self.encoded]]
        return torch.cat(z + [torch.zeros_like(z[0])] * (self.views - self.encoded))            # (v*b, d)


def cut_mix(x: Tensor, alpha: float, chance: torch.Generator) -> tuple[Tensor, tuple[Tensor, float]]:
    """Paste a box of each image's partner over it: `(b, 3, s, s)` -> the same, and (partners (b,), share that stayed).

    The share, at least a half, is drawn from Beta(alpha, alpha); one box for the batch."""
    b, _, h, w = x.shape
    partner = torch.randperm(b, generator=chance)
    share = np.random.default_rng(int(torch.randint(2 ** 31, (), generator=chance))).beta(alpha, alpha)
    side = math.sqrt(min(share, 1 - share))                                     # of the box, in units of the image's
    down, across = torch.rand(2, generator=chance).tolist()
    top, bottom = (round(min(max(down + sign * side / 2, 0), 1) * h) for sign in (-1, 1))
    left, right = (round(min(max(across + sign * side / 2, 0), 1) * w) for sign in (-1, 1))
    x = x.clone()
    x[:, :, top:bottom, left:right] = x[partner.to(x.device)][:, :, top:bottom, left:right]
    return x, (partner, 1 - (bottom - top) * (right - left) / (h * w))


# ---- SimCLR ---------------------------------------------------------------------------------------------------------

class SimCLR(Objective):
    """NT-Xent: tell each view's other view from the batch's other images, or from `negatives` of them."""

    def __init__(self, temperature: float, negatives: int = 0, seed: int = 0):
        super().__init__(seed)
        self.temperature, self.negatives = temperature, negatives

    def loss(self, z: Tensor, x: Tensor, index: Tensor) -> Tensor:
        _, b, _ = z.shape
        u = F.normalize(z.flatten(0, 1), dim=1)                                 # (2b, d): rows j and j + b are one image
        similarity = u @ u.T / self.temperature                                 # (2b, 2b)
        view = torch.arange(2 * b, device=z.device)
        positive = similarity[view, view.roll(b)].unsqueeze(1)                  # (2b, 1)
        other = (view.view(-1, 1) - view) % b != 0                              # (2b, 2b): rows of other images
        negative = similarity[other].view(2 * b, 2 * b - 2)
        if self.negatives:
            draw = torch.rand(negative.shape, generator=self.chance("negatives")).to(z.device)
            negative = negative.gather(1, draw.topk(min(self.negatives, 2 * b - 2)).indices)
        return -F.log_softmax(torch.cat([positive, negative], 1), 1)[:, 0].mean()


# ---- VICReg ---------------------------------------------------------------------------------------------------------

class VICReg(Objective):
    """25 invariance + 25 variance + 1 covariance (equation 6 of the paper), invariance divided by d as in the official code,
    the views' variances added up as in the paper (the official code takes half)."""

    def loss(self, z: Tensor, x: Tensor, index: Tensor) -> Tensor:
        return 25 * self.invariance(z) + 25 * self.variance(z) + self.covariance(z)

    @staticmethod
    def invariance(z: Tensor) -> Tensor:
        return F.mse_loss(z[0], z[1])

    @staticmethod
    def variance(z: Tensor) -> Tensor:
        """Each dimension's deviation over the batch should reach 1."""
        return F.relu(1 - (z.var(1) + 1e-4).sqrt()).mean(1).sum()               # of both views

    @staticmethod
    def covariance(z: Tensor) -> Tensor:
        """No two dimensions should vary together: squares off the diagonal, over d."""
        _, b, d = z.shape
        z = z - z.mean(1, keepdim=True)
        c = z.mT @ z / (b - 1)                                                  # (2, d, d)
        return (c.pow(2).sum() - c.diagonal(dim1=1, dim2=2).pow(2).sum()) / d


# ---- BYOL -----------------------------------------------------------------------------------------------------------

class Target(nn.Module):
    """A network that follows another one, the online network, as its moving average; it gets no gradient."""

    def __init__(self, online: nn.Module, precision: str = "float32"):
        super().__init__()
        self.precision = precision
        self.network = copy.deepcopy(online).requires_grad_(False)
        self.online = (online,)                                                 # in a tuple: not a part of this module

    @torch.no_grad()
    def follow(self, momentum: float) -> None:
        for ours, theirs in zip(self.network.parameters(), self.online[0].parameters()):
            ours.lerp_(theirs, 1 - momentum)

    @torch.no_grad()
    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, torch.bfloat16, enabled=self.precision == "bf16"):
            z = self.network(x)
        return z.float() if z.dtype == torch.bfloat16 else z


class BYOL(Objective):
    """Predict, from one view, the target network's embedding of the other; momentum goes from 0.99 to 1 in `steps`."""

    def __init__(self, encoder: nn.Module, dim: int, hidden: int, steps: int, precision: str = "float32"):
        super().__init__()
        self.predict = nn.Sequential(nn.Linear(dim, hidden), nn.BatchNorm1d(hidden), nn.ReLU(), nn.Linear(hidden, dim))
        self.target, self.steps = Target(encoder, precision), steps

    def loss(self, z: Tensor, x: Tensor, index: Tensor) -> Tensor:
        self.target.follow(1 - cosine(0.01, self.calls, self.steps))
        guess = F.normalize(torch.stack([self.predict(view) for view in z]), dim=-1)            # (2, b, d)
        answer = F.normalize(self.target(x), dim=-1).view_as(z).flip(0)                         # of the other view
        return 2 * (2 - 2 * (guess * answer).sum(-1)).mean()                                    # the sum of both directions


# ---- SwAV -----------------------------------------------------------------------------------------------------------

class SwAV(Objective):
    """Predict each view's code, its soft assignment to prototypes, from the other view. Codes are balanced by Sinkhorn,
    over the batch and the `queue` embeddings before it, once there are that many (paper section 3.1)."""

    def __init__(self, dim: int, temperature: float, prototypes: int = 3000, queue: int = 3840):
        super().__init__()
        self.temperature = temperature
        self.prototypes = nn.Parameter(torch.randn(prototypes, dim))            # unit rows at each call
        self.register_buffer("queue", torch.zeros(2, queue, dim))               # of each view, the newest first

    def loss(self, z: Tensor, x: Tensor, index: Tensor) -> Tensor:
        _, b, _ = z.shape
        with torch.no_grad():
            self.prototypes.copy_(F.normalize(self.prototypes, dim=1))
        u, c = F.normalize(z, dim=-1), self.prototypes
        scores = u @ c.T                                                        # (2, b, prototypes)
        with torch.no_grad():
            room = self.queue.shape[1]
            before = self.queue if self.calls * b >= room else self.queue[:, :0]
            codes = torch.stack([sinkhorn(torch.cat([ours, queue @ c.T]))[:b] for ours, queue in zip(scores, before)])
            self.queue.copy_(torch.cat([u, self.queue], 1)[:, :room])
        return -(codes.flip(0) * F.log_softmax(scores / self.temperature, -1)).sum(-1).mean()


def sinkhorn(scores: Tensor, eps: float = 0.05, iterations: int = 3) -> Tensor:
    """`(b, prototypes)` -> codes, rows that sum to 1 and columns that sum, nearly, to b / prototypes."""
    q = torch.exp((scores - scores.max()) / eps)
    for _ in range(iterations):
        q = q / q.sum(0, keepdim=True).clamp(min=1e-30) / q.shape[1]
        q = q / q.sum(1, keepdim=True).clamp(min=1e-30)
    return q


# ---- ReSSL ----------------------------------------------------------------------------------------------------------

class ReSSL(Objective):
    """A strong view relates to the `queue` embeddings before it as a weak view of the image does, through a target
    network: cross-entropy between the two softmaxes, the weak one's sharper (0.04 against 0.1)."""

    def __init__(self, encoder: nn.Module, dim: int, temperature: float, sharp: float = 0.04, momentum: float = 0.99,
                 queue: int = 4096, precision: str = "float32"):
        super().__init__()
        self.temperature, self.sharp, self.momentum, self.target = temperature, sharp, momentum, Target(encoder, precision)
        self.target.network.views = 1
        self.register_buffer("queue", F.normalize(torch.randn(queue, dim), dim=1))

    def loss(self, z: Tensor, x: Tensor, index: Tensor) -> Tensor:
        self.target.follow(self.momentum)
        student = F.normalize(z[0], dim=1)                                      # (b, d), of the strong view
        teacher = F.normalize(self.target(x[len(student):]), dim=1)             # (b, d), of the weak one
        wanted = F.softmax(teacher @ self.queue.T / self.sharp, 1)              # (b, queue)
        loss = -(wanted * F.log_softmax(student @ self.queue.T / self.temperature, 1)).sum(1).mean()
        self.queue = torch.cat([teacher, self.queue])[:len(self.queue)]
        return loss


# ---- Single-branch instance discrimination --------------------------------------------------------------------------

class SingleBranch(Objective):
    """Every image is a class of its own, whose weight is its row of a memory bank; one view, no second network.

    loss = -sum_k t_k log softmax(cos / tau)_k + distillation * SqrtKL, over the batch's own rows and `others` drawn from
    the rest of the bank; t is the image's own row, or with CutMix both images' by their shares.

    The bank's update. With p = softmax(cos / tau) the cross-entropy of one image has, with respect to row w_k,

        dL/dw_k = (p_k - t_k) z / tau,

    so a step against the gradient moves an image's own row by (1 - p) z, not by z, and every other row away from z by
    p_k z. The moving average, the released code's only rule, moves an image's own row alone: w <- m w + (1 - m) z, CutMix
    or not. The gradient formula, and that the other rows move too, is the paper's. The size of the step is derived here: m
    and 1 - m are kept, so that without CutMix and where p is 0 both rules are one; SqrtKL has no part in it,

        w_k <- unit(m^[k is in the batch] w_k + (1 - m) sum_j (t_jk - p_jk) z_j).

    `start()`, called at the first step: features (N, d) of the untrained network, one forward pass over the data ("feature
    calibrate"); or None. `mixed()`: what CutMix has just done to the batch, as `cut_mix` returns it.
    """

    def __init__(self, start, N: int, dim: int, temperature: float, others: int, distillation: float, momentum: float, update: str,
                 mixed=lambda: None, seed: int = 0):
        super().__init__(seed)
        self.register_buffer("bank", F.normalize(torch.randn(N, dim, generator=generator(seed, "bank", 0)), dim=1))
        self.start, self.mixed, self.temperature, self.others = start, mixed, temperature, others
        self.distillation, self.momentum, self.update = distillation, momentum, update

    def loss(self, z: Tensor, x: Tensor, index: Tensor) -> Tensor:
        if self.calls == 0 and self.start:
            self.bank.copy_(F.normalize(self.start(), dim=1))
        z, b = F.normalize(z[0], dim=1), len(index)                             # (b, d)
        order = torch.randperm(len(self.bank), generator=self.chance("others"))
        rows = torch.cat([index, order[~torch.isin(order, index)][:self.others]]).to(z.device)          # (b + others,)
        w = self.bank[rows]
        partner, share = self.mixed() or (torch.arange(b), 1.0)
        t = torch.zeros(b, len(rows), dtype=z.dtype, device=z.device)           # (b, b + others): whose each image is
        t[torch.arange(b), torch.arange(b)] += share
        t[torch.arange(b), partner] += 1 - share
        cos = z @ w.T                                                           # (b, b + others)
        loss = -(t * F.log_softmax(cos / self.temperature, 1)).sum(1).mean() + self.distillation * sqrt_kl(cos)
        with torch.no_grad():
            m = self.momentum
            if self.update == "average":
                self.bank[rows[:b]] = F.normalize(m * w[:b] + (1 - m) * z, dim=1)
            else:
                pull = t - F.softmax(cos / self.temperature, 1)                 # (b, b + others)
                kept = torch.cat([m * w[:b], w[b:]])
                self.bank[rows] = F.normalize(kept + (1 - m) * pull.T @ z, dim=1)
        return loss


def sqrt_kl(cos: Tensor) -> Tensor:
    """KL(p || u) of p = softmax(cos), no temperature, and u, its square root made a distribution, without gradient."""
    log_p = F.log_softmax(cos, 1)
    log_u = F.log_softmax(log_p.detach() / 2, 1)
    return (log_p.exp() * (log_p - log_u)).sum(1).mean()


@torch.no_grad()
def untrained_features(encoder: nn.Module, images: Tensor, config: Config, augmentation: Augmentation) -> Tensor:
    """One forward pass, within the training's seconds: `(N, d)`. BatchNorm uses each batch's own statistics: it has no others."""
    parts = []
    for i, index in enumerate(torch.arange(len(images)).tensor_split(math.ceil(len(images) / config.batch))):
        params = empssl.sample_patches(len(index), 1, images.shape[2:], augmentation, generator(config.seed, "calibrate", i))
        x = empssl.cut(images, index, params, config.patch_size, torch.device(config.device))
        parts.append(encoder.project(encoder.representation(x)))
    return torch.cat(parts)


# ---- The yardstick --------------------------------------------------------------------------------------------------

class Supervised(Objective):
    """Cross-entropy of each patch with its image's label."""

    def __init__(self, labels: Tensor):
        super().__init__()
        self.labels = labels                                                    # (N,)

    def loss(self, z: Tensor, x: Tensor, index: Tensor) -> Tensor:
        return F.cross_entropy(z.flatten(0, 1), self.labels[index].repeat(len(z)).to(z.device))


# ---- S3L: a last stage on top of an encoder that was trained without one --------------------------------------------

def with_last_stage(encoder: empssl.Encoder, path: str, resumed: bool = False) -> None:
    """Fill the earlier stages of `encoder` from an encoder.pt, and freeze them, their BatchNorms' averages too; the rest is left
    to train."""
    how = encoder.architecture
    if how["drop_last_stage"]:
        raise UsageError("--warm-last-stage adds the last stage and --drop-last-stage leaves it out; give one of them.")
    below = empssl.Encoder(**how | dict(drop_last_stage=True)).backbone.state_dict()
    for name, parameter in encoder.backbone.named_parameters():
        parameter.requires_grad_(name not in below)
    for name, module in encoder.backbone.named_modules():
        if f"{name}.running_mean" in below:
            module.momentum = 0.0
    if resumed:                                                     # its checkpoint has the weights
        return
    saved = io.load_checkpoint(path)
    theirs = {k.removeprefix("backbone."): v for k, v in saved["weights"].items() if k.startswith("backbone.")}
    if {k: v.shape for k, v in theirs.items()} != {k: v.shape for k, v in below.items()}:
        raise UsageError(f"{path} is no encoder of --drop-last-stage with --backbone {how['backbone']}; give one that was trained so.")
    encoder.backbone.load_state_dict(encoder.backbone.state_dict() | theirs)


# ---- Command line ---------------------------------------------------------------------------------------------------

def method(config: Config, data: io.Dataset):
    """The encoder, the objective and the views that `empssl.run` trains."""
    images, (H, W) = data.train_images, data.train_images.shape[2:]
    if config.method == "empssl":
        encoder, objective, augmentation = empssl.method(config, data)
        if config.warm_last_stage:
            with_last_stage(encoder, config.warm_last_stage, bool(config.resume))
        return encoder, objective, augmentation
    if io.processes() > 1:
        raise UsageError("The methods of baselines.py run in one process; leave torchrun out, or use --method empssl.")
    if config.method == "supervised":
        if data.train_labels is None:
            raise UsageError("--method supervised needs labelled images; give a folder with train/<class>/ in it.")
        config.dim = int(data.train_labels.max()) + 1
    wanted = PUBLISHED[config.method].get("patches", config.patches)
    if config.patches != wanted:
        raise UsageError(f"--method {config.method} sees {wanted} views of an image; leave --patches {config.patches} out.")
    if config.method != "simclr" and (config.augmentation == "noise" or config.noise or config.negatives):
        raise UsageError("--augmentation noise, --noise and --negatives are SimCLR's; leave them out, or give --method simclr.")
    augmentation = views(config, H, W)
    if isinstance(augmentation, list) and len(augmentation) != wanted:
        raise UsageError(f"--augmentation {config.augmentation} draws two views unlike each other, and --method {config.method} "
                         f"sees one; choose another.")
    encoder = empssl.new_encoder(config, images, Views)
    encoder.views, encoder.encoded = (1, 1) if config.method == "supervised" else (wanted, 1 if config.method == "ressl" else wanted)
    if config.warm_last_stage:
        with_last_stage(encoder, config.warm_last_stage, bool(config.resume))
    steps = len(images) // config.batch * config.epochs
    torch.manual_seed(config.seed)
    objective = {
        "simclr": lambda: SimCLR(config.temperature, config.negatives, config.seed),
        "vicreg": VICReg,
        "byol": lambda: BYOL(encoder, config.dim, config.projector, steps, config.precision),
        "swav": lambda: SwAV(config.dim, config.temperature),
        "ressl": lambda: ReSSL(encoder, config.dim, config.temperature, precision=config.precision),
        "single": lambda: SingleBranch(
            (lambda: untrained_features(encoder, images, config, augmentation)) if config.bank_start == "features" else None,
            len(images), config.dim, config.temperature, config.others, config.distillation, config.bank_momentum,
            config.bank_update, lambda: encoder.mixed, config.seed),
        "supervised": lambda: Supervised(data.train_labels),
    }[config.method]()
    encoder.one_crop, encoder.noise = config.augmentation == "noise", config.noise
    encoder.cutmix = config.cutmix if config.method == "single" else 0.0
    encoder.chance = objective.chance
    return encoder, objective.to(config.device), augmentation


def main(argv: list[str] | None = None) -> dict:
    """The command line, as `empssl.main`'s."""
    with io.mistakes_in_one_sentence():
        config = io.parse_flags(Config, argv, "Train one of EMP-SSL's peers without labels, then probe its features.")
        presets = {name: preset | PUBLISHED[config.method] for name, preset in empssl.PRESETS.items()}
        return empssl.run(config, presets, method)


if __name__ == "__main__":
    main()
