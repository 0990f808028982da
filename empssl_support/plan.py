"""What a run will do and need, told before it begins; nothing is written."""

import dataclasses
import math
import os
import shutil
import time
from pathlib import Path

import torch
from torch import nn

from empssl_support.cli import human_time
from empssl_support.data import Dataset, to_device
from empssl_support.images import is_decoded, read_image
from empssl_support.machine import memory_of_this_machine, peak_memory
from empssl_support.settings import sides_of_patches

STEPS = 10  # are timed


def tell(config, data: Dataset, method, train, embed) -> None:
    """Print what the training that the settings describe will do and need.

    data: as many images as the run's, of their size; their pixels are not looked at.
    method, train, embed: those of empssl.py. They are timed on noise, which takes as long.
    """
    sample = to_device(made_up(data, STEPS * config.batch), config.device)
    encoder, augmentation, objective = method(config, sample)
    images = sample.train_images

    def seconds_of_steps(steps: int) -> float:
        some = images[: steps * config.batch]
        once = dataclasses.replace(config, epochs=1)
        return train(encoder, some, once, augmentation, objective)["train_seconds"]

    def seconds_of_embedding() -> float:
        started = time.perf_counter()
        how = {"patches": config.eval_patches, "precision": config.precision}
        embed(encoder, images[: config.batch], **how).cpu()  # which waits for a GPU
        return time.perf_counter() - started

    # The first of each is slower.
    seconds_of_steps(2)
    step_seconds = seconds_of_steps(STEPS) / STEPS
    seconds_of_embedding()
    embed_seconds = seconds_of_embedding() / config.batch  # an image

    print(f"the plan of a run, preset {config.preset} on {config.device}, {config.precision}")
    print(f"data      {about_data(config, data)}")
    print(f"training  {about_training(config, data)}")
    print(f"time      {about_time(config, data, step_seconds, embed_seconds)}")
    print(f"memory    {about_memory(config, data)}")
    print(f"disk      {about_disk(config, data, encoder, objective)}")


def made_up(data: Dataset, N: int) -> Dataset:
    """N images of noise, and labels where there are any."""
    chance = torch.Generator().manual_seed(0)
    shape = (N, *data.train_images.shape[1:])
    images = torch.randint(0, 256, shape, dtype=torch.uint8, generator=chance)
    labels = data.train_labels
    if labels is not None:
        labels = labels[torch.arange(N) % len(labels)]
    return data._replace(train_images=images, train_labels=labels, test_images=None)


def about_data(config, data: Dataset) -> str:
    N, _, H, W = data.train_images.shape
    where = f" in {config.data_dir}" if data.files else ""
    labels = "without labels"
    if data.train_labels is not None:
        labels = f"of {len(data.classes)} classes, and {len(data.test_images):,} to test"
    enough = f"enough for a batch of {config.batch}"
    return f"{config.dataset}{where}: {N:,} images of {H}x{W}, {labels}; {enough}"


def about_training(config, data: Dataset) -> str:
    steps, left_out = divmod(len(data.train_images), config.batch)
    total = config.epochs * steps
    sides = dict.fromkeys(sides_of_patches(config, total))
    patches = total * config.batch * config.patches
    return (
        f"{config.epochs} x {steps:,} steps of {config.batch} images and {config.patches} patches "
        f"of each; {patches:,} patches of {', then '.join(f'{s}x{s}' for s in sides)} in all; "
        f"{left_out} images of an epoch left out"
    )


def about_time(config, data: Dataset, step_seconds: float, embed_seconds: float) -> str:
    N = len(data.train_images)
    training = config.epochs * (N // config.batch) * step_seconds
    # With labels the untrained encoder's features are compared too.
    embedded = N if data.test_images is None else 2 * (N + len(data.test_images))
    parts = [
        f"{human_time(training)} of training ({STEPS} steps on noise took {step_seconds:.3g} s "
        f"each), {human_time(embedded * embed_seconds)} to embed the images"
    ]
    if data.files and not is_decoded(data.key):
        files = [*data.files, *(data.test_files or [])]
        parts.append(f"{human_time(seconds_to_decode(files, data))} to decode them, once")
    if data.test_images is not None:
        parts.append("the probes come on top")
    return "about " + ", ".join(parts)


def seconds_to_decode(files: list[str], data: Dataset) -> float:
    """All files, from reading twenty of them."""
    some = files[:: math.ceil(len(files) / 20)]
    started = time.perf_counter()
    for file in some:
        read_image(Path(file), data.train_images.shape[-1])
    each = (time.perf_counter() - started) / len(some)
    return each * len(files) / (os.cpu_count() or 1)


def about_memory(config, data: Dataset) -> str:
    peak = peak_memory(config.device)
    images = sum(x.numel() for x in (data.train_images, data.test_images) if x is not None)
    held = 0 if data.files else images  # a folder's are mapped from the disk
    quadrants = config.eval_augmentation == "grid" and math.isqrt(config.eval_patches) % 2 == 0
    kept = images_of(data) * config.hidden * 4 * (5 if quadrants else 1)
    parts = [f"{human_bytes(held + peak.get('peak_memory', 0))} in training"]
    if "peak_gpu_memory" in peak:
        parts.append(f"{human_bytes(peak['peak_gpu_memory'])} of the GPU's")
    parts.append(f"{human_bytes(kept)} more for the features after it")
    return f"{', '.join(parts)}; this machine has {human_bytes(memory_of_this_machine())}"


def about_disk(config, data: Dataset, encoder: nn.Module, objective: nn.Module) -> str:
    parameters = [*encoder.parameters(), *objective.parameters()]
    moments = 2 if config.optimizer == "adamw" else 1
    of_optimizer = moments * sum(p.nbytes for p in parameters)
    states = [*encoder.state_dict().values(), *objective.state_dict().values()]
    checkpoint = of_optimizer + sum(x.nbytes for x in states if isinstance(x, torch.Tensor))
    weights = sum(x.nbytes for x in encoder.state_dict().values())
    kept = len(data.train_images if data.test_images is None else data.test_images)
    parts = [
        f"{human_bytes(checkpoint)} for each of two checkpoints, {human_bytes(weights)} for the "
        f"encoder, {human_bytes(kept * config.hidden * 2)} for features"
    ]
    if config.export_features:
        exported = images_of(data) * config.hidden * 4
        parts.append(f"{human_bytes(exported)} for {config.export_features} as .npz")
    if data.files and not is_decoded(data.key):
        files = len(data.files) + len(data.test_files or [])
        pixels = data.train_images[0].numel()
        parts.append(f"{human_bytes(files * pixels)} for the decoded images")
    free = shutil.disk_usage(".").free
    return f"{', '.join(parts)}; {human_bytes(free)} are free"


def images_of(data: Dataset) -> int:
    """How many images both splits have."""
    return len(data.train_images) + (0 if data.test_images is None else len(data.test_images))


def human_bytes(count: float) -> str:
    if count < 10e6:
        return f"{count / 1e6:.1f} MB"
    return f"{count / 1e6:,.0f} MB" if count < 10e9 else f"{count / 1e9:,.0f} GB"
