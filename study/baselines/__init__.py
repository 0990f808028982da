"""The systems that EMP-SSL is compared with, on its data, patches, encoder, loop and probe.

    python -m study.baselines --method simclr --dataset cifar10 --epochs 10

A file a paper. A method is an objective that `empssl.train` calls with the embeddings z (v, b, d)
of v views of b images, not normalised, their patches x (v*b, 3, s, s), and the images' numbers in
the data set, index (b,). S3L is a setting of each: see s3l.py.
"""

import torch
from torch import Tensor

import empssl
from empssl import Augmentation, Encoder
from empssl_support.cli import UsageError, one_sentence, parse_flags
from empssl_support.data import Dataset
from empssl_support.processes import leave_processes, processes
from empssl_support.settings import read_settings
from study.baselines import byol, ressl, simclr, single_branch, supervised, swav, vicreg
from study.baselines.common import Config, Objective, Views, views
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


def method(config: Config, data: Dataset) -> tuple[Encoder, Augmentation | list, torch.nn.Module]:
    """The encoder, the views and the objective that `empssl.launch` trains.

    Raises `UsageError` where the settings are another method's, and as `with_last_stage`.
    """
    images = data.train_images
    if config.method == "empssl":
        encoder, augmentation, objective = empssl.method(config, data)
    else:
        check(config, data)
        if config.method == "supervised":
            config.dim = int(data.train_labels.max()) + 1
        augmentation = views(config, images.shape[2:])
        encoder = empssl.new_encoder(config, images, Views)
        encoder.views = 1 if config.method == "supervised" else config.patches
        encoder.encoded = 1 if config.method == "ressl" else encoder.views
    if config.warm_last_stage:
        with_last_stage(encoder, config.warm_last_stage, bool(config.resume))
    if config.method != "empssl":
        # A target network is a copy of the encoder, so the objective is made after all else.
        with empssl.first_weights_by(config.seed):
            objective = new_objective(config, encoder, data, augmentation)
        encoder.prepare = objective.prepare
    return encoder, augmentation, objective.to(config.device)


def new_objective(config: Config, encoder: Views, data: Dataset, augmentation) -> Objective:
    """What `config.method` minimises, with random weights of its own where it has any."""
    images = data.train_images

    def untrained_features() -> Tensor:
        return single_branch.untrained_features(encoder, images, config, augmentation)

    if config.method == "simclr":
        return simclr.SimCLR(
            config.temperature,
            config.negatives,
            config.noise,
            one_crop=config.augmentation == "noise",
            seed=config.seed,
        )
    if config.method == "vicreg":
        return vicreg.VICReg()
    if config.method == "byol":
        steps = len(images) // config.batch * config.epochs
        return byol.BYOL(encoder, config.dim, config.projector, steps, config.precision)
    if config.method == "swav":
        return swav.SwAV(config.dim, config.temperature)
    if config.method == "ressl":
        return ressl.ReSSL(encoder, config.dim, config.temperature, precision=config.precision)
    if config.method == "single":
        start = untrained_features if config.bank_start == "features" else None
        return single_branch.SingleBranch(config, len(images), start)
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
    if config.batch < 2:
        raise UsageError(
            f"--batch is {config.batch}; BatchNorm needs several images in a batch, "
            f"so give at least 2."
        )
    of_simclr = config.augmentation == "noise" or config.noise or config.negatives
    if config.method != "simclr" and of_simclr:
        raise UsageError(
            "--augmentation noise, --noise and --negatives are SimCLR's; "
            "leave them out, or give --method simclr."
        )


def settings(argv: list[str] | None = None) -> Config:
    """What was typed; then what the method's authors published, the preset, and the defaults."""
    about = "Train one of EMP-SSL's peers without labels, then probe its features."
    typed = parse_flags(Config, argv, about)
    published = METHODS[typed.get("method", "simclr")]
    presets = {name: preset | published for name, preset in empssl.PRESETS.items()}
    return read_settings(Config, presets, argv, about)


def main(argv: list[str] | None = None) -> dict:
    """The command line, as `empssl.main`'s."""
    with one_sentence():
        record = empssl.launch(settings(argv), method)
        leave_processes()
        return record
