"""A run's settings: what was typed, the preset, the run that goes on; and what cannot work."""

import contextlib
import dataclasses
import json
import math
import os
import re
import time
from pathlib import Path

import torch

from empssl_support.cli import UsageError, flag_name, parse_flags
from empssl_support.files import read_checkpoint, read_encoder
from empssl_support.machine import cpu_multiplies_bf16, memory_of_this_machine
from empssl_support.processes import processes, started_by_torchrun

RUNS = Path("runs")
# What is done with an encoder that is there already.
NEED_CHECKPOINT = ("export", "nearest")
MAY_CHANGE = ("resume", "device", "data_dir", "save_every", "export_features")


def read_settings(kind: type, presets: dict, argv: list[str] | None, description: str):
    """A run's settings, an instance of the dataclass `kind`.

    A flag that was typed counts before the preset, and the preset before the field's own default.
    With `--resume` the run's own settings count, and with `--checkpoint` the encoder's widths.
    `presets` are dicts of settings, by name.
    """
    typed = parse_flags(kind, argv, description)
    if "resume" in typed:
        typed = resumed_settings(kind, typed)
    device = pick_device(typed.get("device", "auto"))
    preset = typed.get("preset", "auto")
    if preset == "auto":
        preset = "laptop" if device == "cpu" else "paper"
    settings = presets[preset] | typed
    if settings.get("size_schedule") and "patch_size" not in typed:
        # The last size of the schedule is the one that is probed.
        settings["patch_size"] = parse_size_schedule(settings["size_schedule"])[-1][0]
    if settings.get("nearest") is not None:
        settings = {"dataset": "imagefolder"} | settings
    if settings.get("checkpoint"):
        settings |= settings_of_checkpoint(typed, settings)
    config = kind(**settings | {"device": device, "preset": preset})
    config.precision = pick_precision(config.precision, device)
    check(config)
    spare_the_checkpoint(config)
    return config


def resumed_settings(kind: type, typed: dict) -> dict:
    folder = typed["resume"]
    for name in typed:
        if name not in MAY_CHANGE:
            raise UsageError(
                f"--resume goes on with the run's own settings; leave {flag_name(name)} out "
                f"({', '.join(flag_name(name) for name in MAY_CHANGE[1:])} may change)."
            )
    stored = stored_settings(Path(folder))
    names = [field.name for field in dataclasses.fields(kind)]
    if "method" in stored and "method" not in names:
        raise UsageError(
            f"{folder} was begun by another program; "
            f"go on with python -m study.baselines --resume {folder}."
        )
    if any(name not in stored for name in names):
        raise UsageError(
            f"There is no run to go on with in {folder}; "
            f"give --resume a folder below {RUNS} that this program has begun."
        )
    return {name: stored[name] for name in names} | typed


def stored_settings(folder: Path) -> dict:
    """From a run's config.json or, where that is lost, a checkpoint; {} where there are none."""
    with contextlib.suppress(OSError, ValueError):
        stored = json.loads((folder / "config.json").read_text())
        if isinstance(stored, dict):
            return stored
    for name in ("checkpoint.pt", "checkpoint-previous.pt"):
        if (folder / name).is_file() and (state := read_checkpoint(folder / name)):
            return state["config"]
    return {}


def run_path(config) -> Path:
    """The folder that is resumed, or `runs/<name>`: by default the data set and the time."""
    if config.resume:
        return Path(config.resume)
    return RUNS / (config.name or f"{config.dataset}-{time.strftime('%Y%m%d-%H%M%S')}")


def settings_of_checkpoint(typed: dict, settings: dict) -> dict:
    """The encoder's widths and, of a folder, the size that it was trained at."""
    path = typed["checkpoint"]
    if not any(typed.get(name) for name in ("eval_only", *NEED_CHECKPOINT, "export_features")):
        raise UsageError(
            "--checkpoint goes with --eval-only, --export-features, --export or --nearest; "
            "add the one you want."
        )
    saved = read_encoder(path)
    architecture = saved["architecture"]
    for name, value in architecture.items():
        if typed.get(name, value) != value:
            raise UsageError(
                f"{path} has another architecture, its {name} is {value} and not {typed[name]}; "
                f"leave {flag_name(name)} out."
            )
    if settings.get("dataset") == "imagefolder" and "image_size" not in typed:
        return architecture | {"image_size": saved["image_size"]}
    return architecture


def spare_the_checkpoint(config) -> None:
    """Refuse a run that would delete, with --force, the encoder that it begins with."""
    for path in (config.checkpoint, getattr(config, "warm_last_stage", None)):
        if not (path and config.force and config.name):
            continue
        if (RUNS / config.name).resolve() in Path(path).resolve().parents:
            raise UsageError(
                f"--force would delete {path}, which is in the run folder that it overwrites; "
                f"choose another --name."
            )


# ---- where to compute, and how ----


def pick_device(wanted: str) -> str:
    """`auto` is a GPU where there is one; under torchrun each process has a GPU of its own."""
    device = wanted
    if wanted == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device.startswith("cuda") and started_by_torchrun():
        device = f"cuda:{os.environ['LOCAL_RANK']}"
    try:
        torch.empty(1, device=device)
    except Exception as error:  # torch raises many kinds for a device that it lacks
        reason = str(error).splitlines()[0][:200]
        mistake = UsageError(f"--device {device[:40]} cannot be used here ({reason}); try cpu.")
        mistake.alike = False
        raise mistake from None
    return device


def pick_precision(wanted: str, device: str) -> str:
    """`auto` is bf16 where the GPU, or the CPU, multiplies it in hardware."""
    if wanted != "auto":
        return wanted
    if device.startswith("cuda"):
        has = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        has = device == "cpu" and cpu_multiplies_bf16()
    return "bf16" if has else "float32"


# ---- what cannot work ----


def check(config) -> None:
    """Refuse settings that cannot work, whatever the data."""
    for field in dataclasses.fields(config):
        check_range(field, getattr(config, field.name))
    parse_size_schedule(config.size_schedule)
    check_probed_epochs(config)
    on_a_grid = config.eval_augmentation == "grid"
    if on_a_grid and math.isqrt(config.eval_patches) ** 2 != config.eval_patches:
        raise UsageError(
            f"--eval-patches {config.eval_patches} makes no even grid; "
            f"give a square such as 1, 4, 9 or 16."
        )
    if config.name is not None and not re.fullmatch(r"\w[\w.=+-]{0,99}", config.name):
        raise UsageError(
            f"--name {config.name!r} is no plain folder name; "
            f"use up to 100 letters, digits and -._=+ only."
        )
    if config.seed >= 2**63:
        raise UsageError(f"--seed is {config.seed}; it must lie between 0 and 2^63 - 1.")
    check_target("export_features", config.export_features, (".npz", ".csv"))
    check_target("export", config.export, (".pt2",))
    check_purpose(config)


def check_range(field: dataclasses.Field, value) -> None:
    least, above = field.metadata["least"], field.metadata["above"]
    if value is None:
        return
    if least is not None and not least <= value < math.inf:
        raise UsageError(f"{flag_name(field.name)} is {value}; it must be at least {least}.")
    if above is not None and not above < value < math.inf:
        raise UsageError(f"{flag_name(field.name)} is {value}; it must be more than {above}.")


def check_probed_epochs(config) -> None:
    last = max(probed_epochs(config.probe_epochs), default=0)
    if last > config.epochs and not (config.checkpoint or config.eval_only):
        raise UsageError(
            f"--probe-epochs {config.probe_epochs} asks for epoch {last}, and the run has "
            f"{config.epochs}; raise --epochs or leave it out."
        )


def check_target(name: str, path: str | None, endings: tuple[str, ...]) -> None:
    """Refuse a file to be written in no folder, or of another kind than its ending says."""
    if path is None:
        return
    target = Path(path)
    if "\0" in path or target.is_dir() or not target.absolute().parent.is_dir():
        raise UsageError(
            f"{flag_name(name)} {path!r} is no file in a folder that exists; "
            f"name one, such as features{endings[0]}."
        )
    if target.suffix.lower() not in endings:
        raise UsageError(
            f"{flag_name(name)} {path} ends otherwise than in {' or '.join(endings)}; name it so."
        )


def check_purpose(config) -> None:
    """Refuse flags that say what to do and lack what that needs, or exclude one another."""
    for name in NEED_CHECKPOINT:
        if getattr(config, name) is not None and not config.checkpoint:
            raise UsageError(
                f"{flag_name(name)} needs an encoder; give --checkpoint the encoder.pt of a run."
            )
    if config.nearest is not None and config.dataset != "imagefolder":
        raise UsageError(
            f"--nearest looks through a folder of images, and --dataset is {config.dataset}; "
            f"leave it out, and give the folder as --data-dir."
        )
    if config.plan and (config.checkpoint or config.eval_only):
        raise UsageError(
            "--plan is of a training; leave --checkpoint and --eval-only out, or --plan."
        )


def check_sizes(config, N: int, H: int, W: int) -> None:
    """Refuse, before anything is written, sizes that do not fit the data or this machine."""
    sides = [side for side, _ in parse_size_schedule(config.size_schedule)]
    s = max([config.patch_size, *sides])
    # An encoder that is there reads patches of its own side: then a smaller image's are enlarged.
    if s > min(H, W) and not config.checkpoint:
        raise UsageError(f"--patch-size {s} makes a crop larger than the {H}x{W} images; lower it.")
    memory = memory_of_this_machine()
    if not (config.checkpoint or config.eval_only):
        check_batch(config, N, s, memory)
    weights = config.projector * (config.hidden + config.dim) + 512 * config.hidden
    if 12 * weights > memory:  # 4 bytes each for the weight, its gradient and its momentum
        raise UsageError(
            f"--hidden {config.hidden}, --projector {config.projector} and --dim {config.dim} make "
            f"a network larger than this machine's memory; lower one of them."
        )
    if 12 * config.eval_patches * s * s > memory:
        raise UsageError(
            f"--eval-patches {config.eval_patches} of one image are more than "
            f"this machine's memory; lower it."
        )


def check_batch(config, N: int, s: int, memory: float) -> None:
    n, b = config.patches, config.batch
    if N == 1:
        raise UsageError(
            "There is a single training image, and nothing to tell it apart from; give more."
        )
    if b > N:
        raise UsageError(
            f"--batch {b} is larger than the data set's {N} training images; lower it."
        )
    if b % processes():
        raise UsageError(
            f"--batch {b} is split over {processes()} processes; give a multiple of that."
        )
    bytes_of_patches = 12 * n * b * s * s
    if bytes_of_patches > memory * processes():
        raise UsageError(
            f"--batch {b} times --patches {n} are {bytes_of_patches / 2**30:,.0f} GiB of patches, "
            f"more than this machine's memory; lower one of them."
        )


def parse_size_schedule(text: str | None) -> list[tuple[int, float]]:
    """Of `16:0.7,32:0.3`: [(16, 0.7), (32, 0.3)], sides of patches and their shares of training."""
    if text is None:
        return []
    try:
        parts = [part.split(":") for part in text.split(",")]
        schedule = [(int(side), float(share)) for side, share in parts]
    except ValueError:
        schedule = []
    shares = [share for _, share in schedule]
    if not (shares and min(shares) > 0 and abs(sum(shares) - 1) < 1e-6):
        raise UsageError(
            f"--size-schedule {text} is no list of sides and shares that sum to 1; "
            f"give one such as 16:0.7,32:0.3."
        )
    if not all(1 <= side <= 4096 for side, _ in schedule):
        raise UsageError(
            f"--size-schedule {text} has a side that is not between 1 and 4096 pixels; change it."
        )
    return schedule


def sides_of_patches(config, total: int) -> list[int]:
    """The side of the patches in each of `total` steps: `--patch-size`, or the schedule's."""
    schedule = parse_size_schedule(config.size_schedule) or [(config.patch_size, 1.0)]
    sides = []
    end = 0.0
    for side, share in schedule:
        end += share
        sides += [side] * (round(end * total) - len(sides))
    # Shares sum to 1 but for rounding, which may be a step of a million.
    sides += [side] * (total - len(sides))
    return sides[:total]


def probed_epochs(text: str | None) -> set[int]:
    """Of `1,10`: {1, 10}."""
    if text is None:
        return set()
    if not re.fullmatch(r"[1-9]\d*(,[1-9]\d*)*", text):
        raise UsageError(f"--probe-epochs {text!r} is no list of epochs; give one such as 1,10.")
    return {int(epoch) for epoch in text.split(",")}
