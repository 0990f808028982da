"""S3L (Cao & Wu, arXiv 2103.13559): small resolution, small architecture, small data.

It is a setting of each method: --patch-size, --size-schedule, --drop-last-stage and --subset, then
a second phase, --warm-last-stage, in which the last stage is trained on top of an encoder that had
none: without labels here, where the authors' code warms it up with them.
"""

import torch

import empssl
from empssl_support.cli import UsageError
from empssl_support.files import read_encoder


def with_last_stage(encoder: empssl.Encoder, path: str, resumed: bool = False) -> None:
    """Fill the earlier stages of `encoder` from an encoder.pt, and freeze them.

    Their BatchNorms' averages are frozen too; the rest is left to train. Where the run is resumed
    its checkpoint has the weights. Raises `UsageError` where `encoder` has no last stage, or the
    file's one has.
    """
    how = encoder.architecture
    if how["drop_last_stage"]:
        raise UsageError(
            "--warm-last-stage adds the last stage and --drop-last-stage leaves it out; "
            "give one of them."
        )
    with torch.device("meta"):  # only its names and shapes are needed, no weights
        below = empssl.Encoder(**how | {"drop_last_stage": True}).backbone.state_dict()
    for name, parameter in encoder.backbone.named_parameters():
        parameter.requires_grad_(name not in below)
    for name, module in encoder.backbone.named_modules():
        if f"{name}.running_mean" in below:
            module.momentum = 0.0
    if resumed:
        return
    theirs = {}
    for name, value in read_encoder(path)["weights"].items():
        if name.startswith("backbone."):
            theirs[name.removeprefix("backbone.")] = value
    if shapes(theirs) != shapes(below):
        raise UsageError(
            f"{path} is no encoder of --drop-last-stage with --backbone {how['backbone']}; "
            f"give one that was trained so."
        )
    encoder.backbone.load_state_dict(encoder.backbone.state_dict() | theirs)


def shapes(weights: dict) -> dict:
    return {name: value.shape for name, value in weights.items()}
