"""Parity with the authors' code, and how long each takes.

    git clone https://github.com/tsb0601/EMP-SSL
    python -m study.benchmarks.official EMP-SSL

Their encoder, coding rate, LARS and schedule run beside ours, from the same weights on the same
patches, in float64. After each step it prints how far losses and weights are apart; where they
differ by more than rounding it ends there, with exit code 1. Then it times both, whole steps and
their parts. Nothing of their training script is needed: the invariance, which stands in it, is ours
on both sides. The record is kept in study/results/official.jsonl.
"""

import argparse
import importlib
import shlex
import sys
import types
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import CosineAnnealingLR
from torchvision.transforms.functional import to_pil_image

import empssl
from empssl_support.cli import UsageError, one_sentence
from empssl_support.data import shapes
from empssl_support.machine import commit, keep_freed_memory, provenance
from empssl_support.settings import pick_device, pick_precision
from study.benchmarks.ops import cutting, verify, with_gradient
from study.benchmarks.timing import median_seconds
from study.experiments.records import keep

RECIPE = empssl.Config()  # the paper's lambda, epsilon and learning rate
SIDE = 32  # s, of images and patches

# Parity: steps, patches an image, images a batch. Rounding grows some four times from step to step;
# over more of them it lets ReLUs fall to different sides, on a GPU at the ninth.
STEPS, PATCHES, BATCH = 7, 2, 10
# How far apart losses, which are some hundreds, and weights may be in float64: 5e-9 was seen.
ROUNDING = 1e-6


# ---- their code ----


class Clone(NamedTuple):
    """The classes of their repository that are used here."""

    encoder: type[nn.Module]
    coding_rate: type[nn.Module]
    lars: type
    views: type


FILES = {
    "model/model.py": "encoder",
    "loss.py": "TotalCodingRate",
    "lars.py": "LARSWrapper",
    "dataset/aug.py": "ContrastiveLearningViewGenerator",
}
PACKAGE = "_authors_emp_ssl"


def open_clone(path: Path) -> Clone:
    """Import the four classes; raises `UsageError` where the folder has them not.

    Names as general as `model` and `loss` are looked for in a package of this program's own, which
    goes again: they hide nobody else's, and nobody else's hides them.
    """
    for file in FILES:
        if not (path / file).is_file():
            raise UsageError(
                f"{path} has no {file}; give the folder that "
                f"git clone https://github.com/tsb0601/EMP-SSL makes."
            )
    package = types.ModuleType(PACKAGE)
    package.__path__ = [str(path)]
    sys.modules[PACKAGE] = package
    try:
        return Clone(*(imported(path, file, name) for file, name in FILES.items()))
    finally:
        for name in list(sys.modules):
            if name.split(".")[0] == PACKAGE:
                del sys.modules[name]


def imported(path: Path, file: str, name: str):
    module_name = ".".join([PACKAGE, *Path(file).with_suffix("").parts])
    try:
        module = importlib.import_module(module_name)
    except Exception as error:  # others' code may raise anything
        raise UsageError(
            f"{path / file} cannot be imported ({error}); install what it needs, "
            f"or give an unchanged clone."
        ) from None
    if not hasattr(module, name):
        raise UsageError(f"{path / file} has no {name}; give an unchanged clone.")
    return getattr(module, name)


# ---- two sides with the same weights ----


@dataclass
class Trainer:
    """One side's parts of a training step."""

    encode: Callable[[Tensor], Tensor]  # patches (n*b, 3, s, s) -> unit rows (n*b, d)
    rate: Callable[[Tensor], Tensor]  # embeddings (n, b, d) -> R
    optimizer: torch.optim.Optimizer
    parameters: list[Tensor]
    after_step: Callable[[int], None]  # told of step t, sets the learning rate of the next

    def loss(self, x: Tensor, n: int) -> Tensor:
        z = self.encode(x).unflatten(0, (n, -1))  # (n, b, d)
        return -(self.rate(z) + RECIPE.lam * empssl.invariance(z))

    def step(self, x: Tensor, n: int, t: int) -> Tensor:
        loss = self.loss(x, n)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        self.after_step(t)
        return loss.detach()


def their_trainer(clone: Clone, network: nn.Module, total: int) -> Trainer:
    """Theirs, for `total` steps."""
    parameters = list(network.parameters())
    sgd = torch.optim.SGD(
        parameters, RECIPE.lr, momentum=0.9, weight_decay=RECIPE.weight_decay, nesterov=True
    )
    optimizer = clone.lars(sgd, eta=RECIPE.eta, clip=True, exclude_bias_n_norm=True)
    schedule = CosineAnnealingLR(sgd, T_max=total, eta_min=0)  # of the rates that the wrapper reads
    rate = their_rate(clone.coding_rate(eps=RECIPE.eps2))
    return Trainer(network, rate, optimizer, parameters, lambda t: schedule.step())


def their_rate(criterion: nn.Module) -> Callable[[Tensor], Tensor]:
    """R of z (n, b, d) by `criterion`, one patch after another, as their training has it.

    Whether the criterion returns R or minus R is found out: R of a spread batch is the larger.
    """
    spread = torch.eye(4)
    collapsed = spread[:1].expand(4, 4)
    sign = 1 if criterion(spread) > criterion(collapsed) else -1

    def rate(z: Tensor) -> Tensor:
        total = 0
        for Z in z:  # (b, d)
            total = total + criterion(Z)
        return sign * total / len(z)

    return rate


def our_trainer(encoder: empssl.Encoder, total: int, precision: str) -> Trainer:
    """Ours, for `total` steps."""
    parameters = list(encoder.parameters())
    optimizer = empssl.new_optimizer(RECIPE, parameters)
    device = parameters[0].device

    def encode(x: Tensor) -> Tensor:
        with empssl.autocast(device, precision):
            return encoder(x)

    def rate(z: Tensor) -> Tensor:
        return empssl.coding_rate(z, RECIPE.eps2)

    def after_step(t: int) -> None:
        empssl.set_learning_rate(optimizer, empssl.cosine(RECIPE.lr, t + 1, total))

    return Trainer(encode, rate, optimizer, parameters, after_step)


def both_trainers(
    clone: Clone, device: torch.device, dtype: torch.dtype, total: int, precision: str = "float32"
) -> tuple[Trainer, Trainer]:
    """Theirs and ours, with the first weights of theirs."""
    torch.manual_seed(0)
    network = clone.encoder(arch="resnet18-cifar")
    widths = [layer.out_features for layer in network.modules() if isinstance(layer, nn.Linear)]
    if len(widths) != 3:
        raise UsageError(
            f"Their encoder has {len(widths)} linear layers, ours 3; give an unchanged clone."
        )
    encoder = empssl.Encoder("resnet18", SIDE, *widths)
    copy_weights(network, encoder)
    network.to(device, dtype)
    encoder.to(device, dtype, memory_format=torch.channels_last)
    ours = our_trainer(encoder, total, precision)
    return their_trainer(clone, network, total), ours


def copy_weights(theirs: nn.Module, ours: nn.Module) -> None:
    """By their order: the layers' names differ. Raises `UsageError` where shapes do."""
    source, target = theirs.state_dict(), ours.state_dict()
    if len(source) != len(target):
        raise UsageError(
            f"Their encoder has {len(source)} weights and buffers, ours {len(target)}; "
            f"give an unchanged clone."
        )
    for name, their_name in zip(target, source, strict=True):
        shape, their_shape = target[name].shape, source[their_name].shape
        if shape != their_shape:
            raise UsageError(
                f"Their {their_name} is {tuple(their_shape)}, our {name} {tuple(shape)}; "
                f"give an unchanged clone."
            )
        target[name].copy_(source[their_name])


# ---- patches ----


def some_images(b: int, device: torch.device) -> Tensor:
    images, *_ = shapes(train=b, test=1)
    return images.to(device)


def our_patches(images: Tensor, n: int, dtype: torch.dtype) -> Callable[[int], Tensor]:
    """A `cut(i)` that draws and cuts n patches of each image, (n*b, 3, s, s)."""
    index = torch.arange(len(images))

    def cut(i: int) -> Tensor:
        chance = empssl.generator_of(0, "patches", i)
        augmentation = empssl.Augmentation()
        params = empssl.sample_patches(len(images), n, (SIDE, SIDE), augmentation, chance)
        return empssl.extract_patches(images, index, params, SIDE, dtype)

    return cut


def their_patches(clone: Clone, images: Tensor, n: int) -> Callable[[int], Tensor]:
    """The same by their transforms, on one core, as each of their loader's workers does it."""
    views = clone.views(num_patch=n)
    pictures = [to_pil_image(image) for image in images.cpu()]

    def cut(i: int) -> Tensor:
        patches = zip(*(views(picture) for picture in pictures), strict=True)  # n times b
        return torch.cat([torch.stack(part) for part in patches]).to(images.device)

    return cut


# ---- parity ----


def parity(clone: Clone, device: torch.device) -> dict[str, float]:
    """The largest differences of losses and of weights after each of some steps, printed.

    Their cosine ends with the last of these steps, so that the schedule counts too. Exits with code
    1 where they differ by more than rounding.
    """
    print(f"parity: {STEPS} steps of {PATCHES} patches of each of {BATCH} images, float64")
    theirs, ours = both_trainers(clone, device, torch.float64, STEPS)
    cut = our_patches(some_images(BATCH, device), PATCHES, torch.float32)
    worst = {"losses": 0.0, "weights": 0.0}
    for t in range(STEPS):
        x = cut(t).double()
        losses = (theirs.step(x, PATCHES, t) - ours.step(x, PATCHES, t)).abs().item()
        pairs = zip(theirs.parameters, ours.parameters, strict=True)
        with torch.no_grad():
            largest = torch.stack([(p - q).abs().max() for p, q in pairs])
        weights = largest.max().item()
        print(f"step {t + 1:2}: losses differ by {losses:.1e}, weights by {weights:.1e}")
        worst["losses"] = max(losses, worst["losses"])
        worst["weights"] = max(weights, worst["weights"])
        # A difference that is not a number is none that may be.
        if not (losses <= ROUNDING and weights <= ROUNDING):
            sys.exit(
                f"error: After step {t + 1} the two differ by more than rounding, which is "
                f"{ROUNDING:.0e} at most; nothing is timed."
            )
    return worst


# ---- time ----


def verify_before_timing(clone: Clone, device: torch.device, x: Tensor, n: int) -> None:
    """The first loss in float32, and our patches; raises `ArithmeticError`.

    The two sides draw their patches each in its own way, so ours are held against PyTorch's.
    """
    # For this a GPU must multiply in float32, not in TF32.
    with torch.no_grad(), torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        theirs, ours = both_trainers(clone, device, torch.float32, 1)
        verify("the first loss in float32", ours.loss(x, n), theirs.loss(x, n))
    b = len(x) // n
    exact = cutting(empssl.extract_patches_ref, device, b, n, SIDE, torch.float64)
    verify("extract_patches", cutting(empssl.extract_patches, device, b, n, SIDE)(0), exact(0))


def calls_of(trainer: Trainer, cut: Callable[[int], Tensor], n: int) -> dict[str, Callable]:
    """A `call(i)` for the whole step and for each of its parts."""
    x = cut(0)
    z = trainer.encode(x).detach()
    gradient = torch.randn_like(z)
    embeddings = z.unflatten(0, (n, -1))

    def encoder(i: int) -> None:
        trainer.optimizer.zero_grad()
        trainer.encode(x).backward(gradient)

    return {
        "a step and its patches": lambda i: trainer.step(cut(i), n, i),
        "a step": lambda i: trainer.step(x, n, i),
        "patches": cut,
        "encoder, forward and backward": encoder,
        "coding rate, forward and backward": lambda i: with_gradient(trainer.rate, embeddings),
        "optimizer": lambda i: trainer.optimizer.step(),  # with the encoder's gradients
    }


def time_both(
    clone: Clone, device: torch.device, n: int, b: int, precision: str
) -> list[dict[str, str | float]]:
    """Median seconds of each part of theirs and of ours, by turns."""
    images = some_images(b, device)
    cut = their_patches(clone, images, n)
    verify_before_timing(clone, device, cut(0), n)
    print(
        f"timing: {n} patches of each of {b} images; theirs float32, its patches cut on one core; "
        f"ours {precision}"
    )
    total = 15_000  # the steps of 30 epochs: the learning rate hardly falls while this is timed
    theirs, ours = both_trainers(clone, device, torch.float32, total, precision)
    our_cut = our_patches(images, n, empssl.dtype_of(precision))
    our_calls = calls_of(ours, our_cut, n)
    rows = []
    for part, call in calls_of(theirs, cut, n).items():
        # PIL works on the CPU: a GPU's ten calls at once would only take longer.
        where = torch.device("cpu") if part == "patches" else device
        seconds = median_seconds(call, where)
        print(f"{part:34} theirs {seconds * 1e3:10.2f} ms", end="", flush=True)
        our_seconds = median_seconds(our_calls[part], device)
        print(f"  ours {our_seconds * 1e3:10.2f} ms  {seconds / our_seconds:8.2f} times")
        rows.append({"part": part, "theirs": seconds, "ours": our_seconds})
    return rows


def read_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Parity with the authors' code, and both timed.")
    parser.add_argument("path", type=Path, help="a clone of github.com/tsb0601/EMP-SSL")
    parser.add_argument("--device", default="auto", help="cpu, cuda, cuda:1")
    parser.add_argument("--patches", type=int, help="n when timing (4 on a CPU, 20 on a GPU)")
    parser.add_argument("--batch", type=int, help="b when timing (25 on a CPU, 100 on a GPU)")
    given = parser.parse_args(argv)
    given.device = torch.device(pick_device(given.device))
    if given.device.type not in ("cpu", "cuda"):
        raise UsageError(f"--device {given.device} has no float64 to compare in; give cpu or cuda.")
    patches, batch = (20, 100) if given.device.type == "cuda" else (4, 25)
    given.patches = patches if given.patches is None else given.patches
    given.batch = batch if given.batch is None else given.batch
    if min(given.patches, given.batch) < 2:
        raise UsageError("--patches and --batch must be at least 2.")
    return given


def main(argv: list[str] | None = None) -> None:
    given = read_arguments(argv)
    device = given.device
    keep_freed_memory()
    clone = open_clone(given.path)
    metrics = {"parity": parity(clone, device)}
    precision = pick_precision("auto", str(device))
    metrics["rows"] = time_both(clone, device, given.patches, given.batch, precision)

    about = provenance(str(device))
    # Without a .git of its own a folder would be told the commit of the repository that it lies in.
    about["their_commit"] = commit(given.path) if (given.path / ".git").exists() else "unknown"
    # Where the clone lies is nobody else's business.
    about["command"] = about["command"].replace(shlex.quote(str(given.path)), "EMP-SSL")
    sizes = {"patches": given.patches, "batch": given.batch, "precision": precision}
    record = {"name": f"official-{device.type}", "seed": 0, **sizes}
    keep("official", record | about | {"metrics": metrics})


if __name__ == "__main__":
    with one_sentence():
        main()
