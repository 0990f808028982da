"""Train one of EMP-SSL's peers, then probe its features: `python -m study.baselines`."""

from dataclasses import dataclass

import torch
import torch.nn as nn

import empssl
from empssl_support.cli import UsageError, flag, one_sentence, parse_flags
from empssl_support.data import Dataset
from empssl_support.processes import leave_processes, processes
from empssl_support.settings import read_settings
from study.baselines import byol, ressl, simclr, single_branch, supervised, swav, vicreg
from study.baselines.common import Objective, Views, views
from study.baselines.s3l import with_last_stage

# Each method's published settings for CIFAR-10. Different here, for all: momentum is Nesterov's,
# the learning rate has no warm-up (solo-learn's is 1 % of the epochs), crops are EMP-SSL's unless
# --crops published. The network up to the embedding is the preset's, with its widths: one layer
# between the backbone and the head that theirs lack, which is what gets probed.
METHODS = {
    "empssl": {},
    "simclr": simclr.PUBLISHED,
    "vicreg": vicreg.PUBLISHED,
    "byol": byol.PUBLISHED,
    "swav": swav.PUBLISHED,
    "ressl": ressl.PUBLISHED,
    "single": single_branch.PUBLISHED,
    "supervised": supervised.PUBLISHED,
}
AUGMENTATIONS = ("paper", "light", "simclr", "byol", "vicreg", "ressl", "single", "noise")


@dataclass
class Config(empssl.Config):
    """EMP-SSL's settings, and those of the methods here."""

    method: str = flag("simclr", "what is trained", choices=tuple(METHODS))
    augmentation: str = flag("paper", "of the views", choices=AUGMENTATIONS)
    crops: str = flag(
        "patches",
        "an image's quarter, or 0.08 to 1 of it as published (noise: all of it)",
        choices=("patches", "published"),
    )
    temperature: float = flag(0.2, "of SimCLR, SwAV, ReSSL's student and single", above=0)
    negatives: int = flag(0, "simclr: others that a view is told from (0: all of the batch)")
    noise: float = flag(0.0, "simclr: deviation of Gaussian noise; pixels lie in [-1, 1]")
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
    bank_momentum: float = flag(0.5, "single: of the bank's rows")
    distillation: float = flag(20.0, "single: weight of SqrtKL")
    others: int = flag(10_000, "single: rows of the bank beside the batch's own, at each step")
    cutmix: float = flag(0.5, "single: alpha of CutMix's Beta distribution (0: no CutMix)")
    warm_last_stage: str = flag(None, "an encoder.pt of --drop-last-stage: train what it lacks")


def method(config: Config, data: Dataset):
    """The encoder, the views and the objective that `empssl.launch` trains."""
    resumed = bool(config.resume)
    if config.method == "empssl":
        encoder, augmentation, objective = empssl.method(config, data)
        if config.warm_last_stage:
            with_last_stage(encoder, config.warm_last_stage, resumed)
        return encoder, augmentation, objective
    check(config, data)
    if config.method == "supervised":
        config.dim = int(data.train_labels.max()) + 1
    count = config.patches
    augmentation = views(config, data.train_images.shape[2:])
    if isinstance(augmentation, list) and len(augmentation) != count:
        raise UsageError(
            f"--augmentation {config.augmentation} draws two views unlike each other, and "
            f"--method {config.method} sees {count}; choose another."
        )
    encoder = empssl.new_encoder(config, data.train_images, Views)
    encoder.views = 1 if config.method == "supervised" else count
    encoder.encoded = 1 if config.method == "ressl" else encoder.views
    if config.warm_last_stage:
        with_last_stage(encoder, config.warm_last_stage, resumed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        objective = new_objective(config, encoder, data, augmentation)
    encoder.one_crop = config.augmentation == "noise"
    encoder.noise = config.noise
    encoder.cutmix = config.cutmix if config.method == "single" else 0.0
    encoder.chance = objective.chance
    return encoder, augmentation, objective.to(config.device)


def new_objective(config: Config, encoder: nn.Module, data: Dataset, augmentation) -> Objective:
    images = data.train_images
    steps = len(images) // config.batch * config.epochs

    def bank_start():
        return single_branch.untrained_features(encoder, images, config, augmentation)

    def mixed():
        return encoder.mixed

    if config.method == "simclr":
        return simclr.SimCLR(config.temperature, config.negatives, config.seed)
    if config.method == "vicreg":
        return vicreg.VICReg()
    if config.method == "byol":
        return byol.BYOL(encoder, config.dim, config.projector, steps, config.precision)
    if config.method == "swav":
        return swav.SwAV(config.dim, config.temperature)
    if config.method == "ressl":
        return ressl.ReSSL(encoder, config.dim, config.temperature, precision=config.precision)
    if config.method == "single":
        start = bank_start if config.bank_start == "features" else None
        return single_branch.SingleBranch(config, len(images), start, mixed)
    return supervised.Supervised(data.train_labels)


def check(config: Config, data: Dataset) -> None:
    """Refuse settings that are another method's."""
    if processes() > 1:
        raise UsageError(
            "The methods of study.baselines run in one process; "
            "leave torchrun out, or use --method empssl."
        )
    if config.method == "supervised" and data.train_labels is None:
        raise UsageError(
            "--method supervised needs labelled images; give a folder with train/<class>/ in it."
        )
    wanted = METHODS[config.method].get("patches", config.patches)
    if config.patches != wanted:
        raise UsageError(
            f"--method {config.method} sees {wanted} views of an image; "
            f"leave --patches {config.patches} out."
        )
    of_simclr = config.augmentation == "noise" or config.noise or config.negatives
    if config.method != "simclr" and of_simclr:
        raise UsageError(
            "--augmentation noise, --noise and --negatives are SimCLR's; "
            "leave them out, or give --method simclr."
        )


def main(argv: list[str] | None = None) -> dict:
    """The command line, as `empssl.main`'s."""
    about = "Train one of EMP-SSL's peers without labels, then probe its features."
    with one_sentence():
        typed = parse_flags(Config, argv, about)
        published = METHODS[typed.get("method", "simclr")]
        presets = {name: preset | published for name, preset in empssl.PRESETS.items()}
        record = empssl.launch(read_settings(Config, presets, argv, about), method)
        leave_processes()
        return record


if __name__ == "__main__":
    main()
