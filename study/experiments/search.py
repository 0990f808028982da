"""Tries for preset laptop, chosen between by training images alone.

    python -m study.experiments.search [NAME ...] [--seeds 1]

A try is trained on 15,000 of CIFAR-10's training images (or on 45,000) and scored on 5,000 others
of them; the test images stay unseen. It is a line of laptop.jsonl, with the accuracy that it was
predicted to have. One that was stopped begins again.
"""

import functools
import shlex
from typing import NamedTuple
from unittest import mock

from torch import nn

import empssl
from empssl_support.cli import UsageError, one_sentence
from empssl_support.data import Dataset, load_dataset
from empssl_support.machine import keep_freed_memory
from empssl_support.small import convolution, residual
from study.experiments.runs import flags
from study.experiments.trials import Trial, holdout, make_all, train


class Try(NamedTuple):
    """What is changed of the preset."""

    predicted: float  # the accuracy by the bag of patches, written down before
    flags: str = "--epochs 3"
    stages: str = "64 + 256 + +"  # of the encoder, as `small_backbone` reads them
    newton_schulz: int = 5  # steps
    images: int = 15_000
    decay: float | None = None  # the last share of steps, in which a constant rate falls to 0


TRIES = {
    # The optimizer and its rate.
    "preset": Try(0.710),
    "two-epochs": Try(0.703, "--epochs 2"),
    "lars": Try(0.680, "--epochs 3 --optimizer lars --lr 0.3"),
    "lars-slower": Try(0.705, "--epochs 3 --optimizer lars --lr 0.1"),
    "lars-slowest": Try(0.700, "--epochs 3 --optimizer lars --lr 0.033"),
    "lars-slower-still": Try(0.690, "--epochs 3 --optimizer lars --lr 0.011"),
    "slower": Try(0.725, "--epochs 3 --lr 0.08"),
    "faster": Try(0.710, "--epochs 3 --lr 0.3"),
    "faster-three-steps": Try(0.710, "--epochs 3 --lr 0.3", newton_schulz=3),
    "three-steps": Try(0.719, newton_schulz=3),
    "constant": Try(0.715, "--epochs 3 --lr 0.1", decay=0.25),
    # What is seen.
    "paper": Try(0.725, "--epochs 3 --augmentation paper"),
    "faster-paper": Try(0.710, "--epochs 3 --lr 0.3 --augmentation paper"),
    "faster-batch-100": Try(0.700, "--epochs 3 --batch 100 --lam 200 --dim 1024 --lr 0.3"),
    "batch-100": Try(0.705, "--epochs 3 --batch 100 --lam 200 --dim 1024 --lr 0.2"),
    "patches-4": Try(0.730, "--epochs 6 --patches 4"),
    "batch-25": Try(0.720, "--epochs 3 --batch 25 --lam 50 --dim 256"),
    # Patches of an image at about the pairwise cosine that the preset has.
    "patches-4-lambda-140": Try(0.718, "--epochs 6 --patches 4 --lam 140"),
    "patches-12-lambda-92": Try(0.712, "--epochs 2 --patches 12 --lam 92"),
    # Smaller patches first, for about the seconds of three epochs of the preset.
    "growing-patches": Try(0.722, "--epochs 4 --size-schedule 12:0.7,16:0.3"),
    "preset-45000": Try(0.765, images=45_000),
    "paper-45000": Try(0.765, "--epochs 3 --augmentation paper", images=45_000),
    "batch-100-45000": Try(
        0.770,
        "--epochs 3 --batch 100 --lam 200 --dim 1024 --lr 0.2",
        newton_schulz=4,
        images=45_000,
    ),
    # The objective, and what stands behind the representation.
    "lambda-50": Try(0.715, "--epochs 3 --lam 50"),
    "lambda-200": Try(0.717, "--epochs 3 --lam 200"),
    "eps2-0.05": Try(0.717, "--epochs 3 --eps2 0.05"),
    "projector-2048": Try(0.722, "--epochs 3 --projector 2048"),
    # Half an hour: what an hour would gain by.
    "half-hour": Try(0.800, "--epochs 14", images=45_000),
    "half-hour-wide": Try(0.803, "--epochs 9", "128 + 256 + +", images=45_000),
    # The encoder.
    "hidden-4096": Try(0.730, "--epochs 3 --hidden 4096"),
    "deeper": Try(0.725, stages="64 + 192 + + +"),
    "whitened": Try(0.718, stages="w256 256 + +"),
    "whitened-512": Try(0.715, stages="w512 256 +"),
    "faster-hidden-1024": Try(0.705, "--epochs 3 --lr 0.3 --hidden 1024"),
    "faster-hidden-1024-shallow": Try(0.705, "--epochs 4 --lr 0.3 --hidden 1024", "128 256 +"),
    "faster-hidden-1024-three-stages": Try(
        0.700, "--epochs 4 --lr 0.3 --hidden 1024", "64 + 128 + 256 +"
    ),
    "faster-wide": Try(0.710, "--epochs 2 --lr 0.3", "128 + 256 + +"),
    "faster-hidden-1024-wide": Try(0.700, "--epochs 2 --lr 0.3 --hidden 1024", "128 + 256 + +"),
}


def small_backbone(stages: str) -> tuple[nn.Sequential, int]:
    """A number is a convolution to so many channels that halves the sides, a + a residual one.

    With a w before it, for the first one, it is of 6x6 pixels, and stays as `whiten` begins it.
    """
    layers, width = [], 3
    for stage in stages.split():
        if stage == "+":
            layers.append(residual(width))
        elif stage.startswith("w"):
            width = int(stage[1:])
            layers += convolution(3, width, stride=2)
            frozen = nn.Conv2d(3, width, kernel_size=6, stride=2, padding=2, bias=False)
            layers[0] = frozen.requires_grad_(False)
        else:
            layers += convolution(width, int(stage), stride=2)
            width = int(stage)
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten()), width


def falling_late(decay: float, lr: float, t: int, T: int) -> float:
    """In the place of `empssl.cosine`: constant, then in a straight line to 0."""
    return lr * min(1, (1 - t / T) / decay)


def make_trial(name: str, tried: Try, seed: int, data_dir: str) -> Trial:
    where = f"--dataset imagefolder --data-dir {shlex.quote(data_dir)}"
    flags = f"--method empssl {where} --preset laptop --device cpu {tried.flags}"
    return Trial(f"try-{name}", flags, seed, about=tried._asdict())


def make(trial: Trial, data: Dataset) -> dict:
    """The metrics of a try."""
    tried = Try(**trial.about)
    config = trial.settings()
    part = holdout(data, tried.images)
    # Its encoder, its Newton-Schulz steps and its schedule stand in the place of the preset's.
    substitutes = {
        "small_backbone": lambda drop_last_stage: small_backbone(tried.stages),
        "orthogonal": functools.partial(empssl.orthogonal, steps=tried.newton_schulz),
    }
    if tried.decay:
        substitutes["cosine"] = functools.partial(falling_late, tried.decay)
    with mock.patch.multiple(empssl, **substitutes):
        encoder, metrics = train(config, part)
    return metrics | empssl.probe(*empssl.features_of_splits(encoder, part, config), part)


def main(argv: list[str] | None = None) -> None:
    parser = flags("Tries for preset laptop, on held-out training images.", "data/cifar10-jpeg")
    parser.add_argument("names", nargs="*", help=f"of {', '.join(TRIES)}; by default all of them")
    typed = parser.parse_args(argv)
    if unknown := set(typed.names) - TRIES.keys():
        raise UsageError(f"There is no try {min(unknown)}; there are {', '.join(TRIES)}.")
    keep_freed_memory()
    data = load_dataset("imagefolder", typed.data_dir)
    trials = []
    for seed in range(typed.seeds):
        for name in typed.names or TRIES:
            trials.append(make_trial(name, TRIES[name], seed, typed.data_dir))
    make_all("laptop", trials, data, make)


if __name__ == "__main__":
    with one_sentence():
        main()
