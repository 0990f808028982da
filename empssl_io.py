"""The plumbing of EMP-SSL: data sets and their caches, run folders and checkpoints, processes and signals, and what the
command line accepts.

A data set is uint8 images `(N, 3, H, W)` and int64 labels `(N,)`, for training and test; labels are None where there
are none. Everything a user can get wrong raises `UsageError`, one sentence that says what to do.
"""

import argparse
import contextlib
import ctypes
import dataclasses
import datetime
import errno
import functools
import hashlib
import io
import json
import math
import os
import platform
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
import torchvision
from PIL import Image, ImageOps
from threadpoolctl import threadpool_limits
from torch import Tensor
from tqdm import tqdm

PROGRAM = f"python {shlex.quote(sys.argv[0]) if sys.argv[0].endswith('.py') else 'empssl.py'}"
RUNS = Path("runs")                 # one folder a run, and `.cache` for decoded images and baseline figures
CACHE = RUNS / ".cache"
BACKBONES = ("resnet18", "small")
DATASETS = ("cifar10", "cifar100", "tinyimagenet", "imagenet100", "imagefolder", "shapes")
IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".gif", ".webp", ".ppm", ".pgm", ".tif", ".tiff"}


class UsageError(ValueError):
    """A mistake in arguments or data: shown as one sentence, exit code 2."""


class Dataset(NamedTuple):
    train_images: Tensor            # (N, 3, H, W) uint8, in memory or memory-mapped
    train_labels: Tensor | None     # (N,) int64
    test_images: Tensor | None      # (M, 3, H, W) uint8
    test_labels: Tensor | None      # (M,) int64
    classes: list[str]              # empty where there are no labels
    key: str                        # changes when any image does; names what is cached about the set
    files: list[str] | None = None  # of an image folder: the training images' paths, in order


def load_dataset(name: str, data_dir: str | Path = "data", image_size: int | None = None, subset: int | None = None,
                 seed: int = 0) -> Dataset:
    """Load a data set: `cifar10`, `cifar100`, `tinyimagenet`, `imagenet100`, `imagefolder` or `shapes`.

    `data_dir`: where CIFAR is, or is downloaded to; for folders, the folder itself (`train/<class>/...` with
    `test/<class>/...` or `val/<class>/...`, or plain unlabelled images).
    `image_size`: folders only; the shorter side is resized to it and the centre cut out. Default: the first image's
    shorter side, at most 224 (64 for `tinyimagenet`, 224 for `imagenet100`).
    `subset`: keep this many training images, chosen by `seed`; the test split stays whole.
    Raises `UsageError` for an unknown name, missing or empty folders, a class that only the test split has, more than
    1 % unreadable images or a whole split of them, and a download that fails; `OSError` for a folder that may not be read.
    """
    data_dir = Path(data_dir)
    if image_size is not None and not 1 <= image_size <= 4096:
        raise UsageError(f"--image-size is {image_size}; it must lie between 1 and 4096 pixels.")
    if image_size is not None and name in ("cifar10", "cifar100", "shapes"):
        raise UsageError(f"{name} images are always 32x32; --image-size is for image folders.")
    if name in ("cifar10", "cifar100"):
        data = _cifar(name, data_dir)
    elif name == "shapes":
        data = _shapes()
    elif name == "tinyimagenet":
        data = _tinyimagenet(data_dir, image_size or 64)
    elif name == "imagenet100":
        data = _imagefolder(data_dir, image_size or 224, labelled=True)
    elif name == "imagefolder":
        data = _imagefolder(data_dir, image_size)
    else:
        raise UsageError(f"There is no data set {name!r}; choose one of {', '.join(DATASETS)}.")
    if subset is None:
        return data
    N = len(data.train_images)
    if not 1 <= subset <= N:
        raise UsageError(f"--subset is {subset}; it must lie between 1 and the {N} training images.")
    keep = torch.randperm(N, generator=torch.Generator().manual_seed(seed))[:subset].sort().values
    return data._replace(
        train_images=data.train_images[keep],
        train_labels=None if data.train_labels is None else data.train_labels[keep],
        files=None if data.files is None else [data.files[i] for i in keep.tolist()],
        key=f"{data.key}-{subset}-{seed}")


# ---- CIFAR ----

def _cifar(name: str, data_dir: Path) -> Dataset:
    cls, archive = {"cifar10": (torchvision.datasets.CIFAR10, "cifar-10-python.tar.gz"),
                    "cifar100": (torchvision.datasets.CIFAR100, "cifar-100-python.tar.gz")}[name]
    patience = socket.getdefaulttimeout()
    socket.setdefaulttimeout(30)                                # a network that swallows packets must not hang a run
    try:
        train, test = (cls(str(data_dir), train=part, download=True) for part in (True, False))
    except OSError as error:                                    # URLError, connection refused, time-out, full disk
        if error.errno == errno.ENOSPC:
            raise
        raise UsageError(f"{name} is not in {data_dir} and could not be downloaded ({error}); put {archive} into "
                         f"{data_dir} by hand, or try --dataset shapes, which needs no network.") from None
    except RuntimeError as error:                               # torchvision: checksum differs
        raise UsageError(f"{name} in {data_dir} is damaged ({error}); delete {data_dir / archive} and try again, "
                         f"or put a good copy there by hand.") from None
    finally:
        socket.setdefaulttimeout(patience)
    as_tensor = lambda part: torch.from_numpy(part.data).permute(0, 3, 1, 2).contiguous()
    return Dataset(as_tensor(train), torch.tensor(train.targets), as_tensor(test), torch.tensor(test.targets),
                   list(train.classes), key=name)


# ---- folders of images ----

def _walk(folder: Path) -> list[Path]:
    """Every image file below `folder`, sorted; linked folders are followed, each real folder once."""
    found, seen = [], set()

    def refused(error):                                         # lest a class vanish
        raise error
    for root, dirs, files in os.walk(folder, onerror=refused, followlinks=True):
        real = os.path.realpath(root)
        if real in seen:
            dirs.clear()
            continue
        seen.add(real)
        dirs[:] = [d for d in dirs if not d.startswith(".")]
        found += [Path(root, f) for f in files if Path(f).suffix.lower() in IMAGE_SUFFIXES and not f.startswith(".")]
    return sorted(found)


def _by_class(folder: Path) -> dict[str, list[Path]]:
    classes = {d.name: _walk(d) for d in sorted(folder.iterdir()) if d.is_dir() and not d.name.startswith(".")}
    return {name: files for name, files in classes.items() if files}


def _need_folder(folder: Path) -> None:
    if not folder.is_dir():
        raise UsageError(f"There is no folder {folder}; give --data-dir the folder that holds the images.")


def _imagefolder(folder: Path, image_size: int | None, labelled: bool = False) -> Dataset:
    _need_folder(folder)
    splits = {part: _by_class(folder / part) for part in ("train", "test", "val") if (folder / part).is_dir()}
    if splits.get("train") and len(splits) > 1:
        return _decode(folder, splits["train"], splits.get("test") or splits.get("val") or {}, image_size)
    if labelled:
        raise UsageError(f"{folder} has no labelled images; it needs train/<class>/ and val/<class>/.")
    return _decode(folder, {"": _walk(folder)}, None, image_size)       # all images, without labels


def _tinyimagenet(folder: Path, image_size: int) -> Dataset:
    """`train/<class>/images/*.JPEG`, and `val/images/*.JPEG` labelled by `val/val_annotations.txt`."""
    if (folder / "tiny-imagenet-200").is_dir():
        folder = folder / "tiny-imagenet-200"
    _need_folder(folder)
    annotations = folder / "val" / "val_annotations.txt"
    if not annotations.is_file() or not (folder / "train").is_dir():
        raise UsageError(f"{folder} does not look like Tiny ImageNet: it needs train/ and val/val_annotations.txt; "
                         f"unpack tiny-imagenet-200.zip and give its folder as --data-dir.")
    test: dict[str, list[Path]] = {}
    for line in annotations.read_text().splitlines():
        file, _, rest = line.partition("\t")
        label = rest.split("\t")[0]
        if not label:
            raise UsageError(f"{annotations} is damaged, its line {line!r} names no class; unpack tiny-imagenet-200.zip again.")
        test.setdefault(label, []).append(folder / "val" / "images" / file)
    return _decode(folder, _by_class(folder / "train"), test, image_size)


def _decode(folder: Path, train: dict[str, list[Path]], test: dict[str, list[Path]] | None,
            image_size: int | None) -> Dataset:
    """Both splits as memory-mapped tensors: decoded once into a cache, which is dropped when a file changes."""
    classes = sorted(train) if test is not None else []
    if test is not None:
        only_test = sorted(set(test) - set(train))
        if only_test:
            raise UsageError(f"Class {only_test[0]!r} is in the test split of {folder} and not in train/; "
                             f"add training images of it or remove it from the test split.")
        if not test:
            raise UsageError(f"The test split of {folder} holds no images; "
                             f"put them into test/<class>/, or remove the empty folder to train without labels.")
    splits = [[(file, label) for label, files in split.items() for file in files] for split in (train, test or {})]
    if not splits[0]:
        raise UsageError(f"There are no images in {folder}; "
                         f"known endings are {', '.join(sorted(IMAGE_SUFFIXES))}.")
    size = image_size or min(224, _first_side([file for file, _ in splits[0]]))
    key = _fingerprint(folder, [file for split in splits for file, _ in split], size)
    place = hashlib.sha256(str(folder.resolve()).encode("utf-8", "surrogateescape")).hexdigest()
    cache = CACHE / f"{re.sub(r'[^A-Za-z0-9]+', '-', folder.resolve().name)}-{size}-{place[:8]}-{key[:16]}"
    if not (found := _mapped(cache, size)):
        _fill_cache(cache, splits, size)
        if not (found := _mapped(cache, size)):
            raise UsageError(f"{cache} is damaged and cannot be replaced; delete it.")
    rows, images = found
    for part, some, there in zip(("train", "test"), images, splits):
        if some is None and there:
            raise UsageError(f"No image of the {part} split of {folder} can be read, for instance {there[0][0]}; mend them.")
    number = {name: i for i, name in enumerate(classes)}
    labels = [torch.tensor([number[split[row][1]] for row in kept]) if classes else None for split, kept in zip(splits, rows)]
    files = [str(splits[0][row][0]) for row in rows[0]]
    return Dataset(images[0], labels[0], images[1], labels[1], classes, key=key, files=files)


def _mapped(cache: Path, size: int) -> tuple[list[list[int]], list[Tensor | None]] | None:
    """Of a cache's two splits the rows that could be read and their images, which stay on disk; None where it is missing, cut
    short or damaged."""
    try:
        meta = json.loads((cache / "meta.json").read_text())
        rows = [meta["train"], meta["test"]]
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "The given NumPy array is not writable")       # nor meant to be
            return rows, [torch.from_numpy(np.memmap(cache / f"{part}.u8", np.uint8, "r", shape=(len(kept), 3, size, size))) if kept else None
                          for part, kept in zip(("train", "test"), rows)]
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _first_side(files: list[Path]) -> int:
    for file in files:
        try:
            with Image.open(file) as image:
                return min(image.size)
        except Exception:                                       # unreadable: counted and named when decoding
            continue
    raise UsageError(f"None of the {len(files)} image files can be read, for instance {files[0]}.")


def _fingerprint(folder: Path, files: list[Path], size: int) -> str:
    state = [(str(f.relative_to(folder)), f.stat().st_size, f.stat().st_mtime_ns) for f in files if f.exists()]
    return hashlib.sha256(json.dumps([str(folder.resolve()), size, state]).encode()).hexdigest()


def _read_image(file: Path, size: int) -> np.ndarray | Exception:
    """One image as `(3, size, size)` uint8 RGB, or what went wrong."""
    try:
        with Image.open(file) as image:
            if image.mode == "F":
                raise ValueError("its pixels are floating-point numbers")
            if image.mode.startswith("I"):                      # 16 bits, which PIL would cut off at 255
                image = Image.fromarray((np.asarray(image).clip(0, 65535) >> 8).astype(np.uint8))
            image = ImageOps.exif_transpose(image).convert("RGB")
        scale = size / min(image.size)
        if scale != 1:
            image = image.resize([max(size, round(side * scale)) for side in image.size], Image.Resampling.BILINEAR)
        left, top = (image.width - size) // 2, (image.height - size) // 2
        return np.asarray(image.crop((left, top, left + size, top + size))).transpose(2, 0, 1)
    except Exception as error:
        return error


def _fill_cache(cache: Path, splits: list, size: int) -> None:
    """Write `train.u8`, `test.u8` and, last, `meta.json` (the rows that could be read), all or nothing."""
    files = [file for split in splits for file, _ in split]
    cache.parent.mkdir(parents=True, exist_ok=True)
    for old in cache.parent.glob(cache.name.rsplit("-", 1)[0] + "-*"):      # the same folder before it changed
        shutil.rmtree(old, ignore_errors=True)
    for old in cache.parent.glob(".decoding-*"):                # of a process that was killed
        if time.time() - max([old.stat().st_mtime, *(part.stat().st_mtime for part in old.iterdir())]) > 3600:
            shutil.rmtree(old, ignore_errors=True)
    scratch = cache.with_name(f".decoding-{socket.gethostname()}-{os.getpid()}")
    scratch.mkdir(exist_ok=True)
    bad, meta = [], {}
    try:
        with ThreadPoolExecutor(os.cpu_count()) as pool, \
                progress(total=len(files), desc="decoding images", unit="image", smoothing=0.1) as bar:
            for part, split in zip(("train", "test"), splits):
                meta[part] = []
                with open(scratch / f"{part}.u8", "wb") as out:
                    for start in range(0, len(split), 1024):    # a block at a time bounds what waits in memory
                        block = split[start:start + 1024]
                        for i, pixels in enumerate(pool.map(lambda row: _read_image(row[0], size), block)):
                            if isinstance(pixels, Exception):
                                bad.append((block[i][0], pixels))
                                tqdm.write(f"skipped, cannot be read: {block[i][0]} ({pixels})")
                            else:
                                meta[part].append(start + i)
                                out.write(pixels.tobytes())
                        bar.update(len(block))
                        if len(bad) > 0.01 * len(files):
                            raise UsageError(f"{len(bad)} of {len(files)} images cannot be read, more than 1 %, "
                                             f"the first is {bad[0][0]}; remove or mend them.")
        if bad:
            print(f"{len(bad)} of {len(files)} images could not be read and were skipped.")
        (scratch / "meta.json").write_text(json.dumps(meta))
        try:
            os.replace(scratch, cache)
        except OSError:                                         # another process has decoded them meanwhile
            if not (cache / "meta.json").is_file():
                raise
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


# ---- shapes drawn in memory ----

SHAPES = ("disc", "ring", "triangle", "square", "cross", "star", "crescent", "bar", "half-disc", "frame")


@functools.cache
def _shapes(train: int = 10_000, test: int = 2_000, size: int = 32) -> Dataset:
    """Ten outlines; colour, texture, place, size, angle, background and which of the two is darker are random, so that
    raw pixels say little."""
    g = torch.Generator().manual_seed(0)
    labels = torch.arange(train + test) % len(SHAPES)
    labels[:train] = labels[:train][torch.randperm(train, generator=g)]
    images = torch.cat([_draw(part, size, g) for part in labels.split(1000)])
    return Dataset(images[:train], labels[:train], images[train:], labels[train:], list(SHAPES), key="shapes")


def _draw(labels: Tensor, size: int, g: torch.Generator) -> Tensor:
    """`(N, 3, size, size)` uint8 for `labels (N,)`, drawn at twice the size and averaged down."""
    N, side = len(labels), 2 * size
    rand = lambda lo, hi, *shape: lo + (hi - lo) * torch.rand(N, *shape, 1, 1, generator=g)
    grid = (torch.arange(side) + 0.5) / side * 2 - 1
    y, x = grid.view(1, -1, 1), grid.view(1, 1, -1)
    angle, radius = rand(-0.35, 0.35), rand(0.55, 0.85)
    dy, dx = y - rand(-1, 1) * (1 - radius), x - rand(-1, 1) * (1 - radius)
    u = (dx * angle.cos() + dy * angle.sin()) / radius              # the shape's own frame, it fills |u|, |v| <= 1
    v = (dy * angle.cos() - dx * angle.sin()) / radius
    r, theta = (u * u + v * v).sqrt(), torch.atan2(v, u)
    box = torch.maximum(u.abs(), v.abs())
    fold = lambda k: torch.remainder(theta, 2 * math.pi / k) - math.pi / k
    inside = torch.stack([
        r < 0.9,
        (r < 0.95) & (r > 0.6),
        r * fold(3).cos() < 0.5,
        box < 0.75,
        (box < 0.95) & (torch.minimum(u.abs(), v.abs()) < 0.25),
        r < 0.38 + 0.62 * fold(5).abs() * 5 / math.pi,
        (r < 0.95) & ((u - 0.5) ** 2 + v * v > 0.56),
        (u.abs() < 1) & (v.abs() < 0.25),
        (r < 1) & (u > 0),
        (box < 0.8) & (box > 0.5),
    ])[labels, torch.arange(N)]                                     # (N, side, side)

    def texture(brightness: float) -> Tensor:                       # a colour, its stripes, and grain: (N, 3, ., .)
        direction, frequency, phase = rand(0, math.pi), rand(2, 12), rand(0, 2 * math.pi)
        stripes = torch.sin((x * direction.cos() + y * direction.sin()) * frequency * math.pi + phase).unsqueeze(1)
        grain = torch.randn(N, 1, side, side, generator=g) * rand(0, 0.05, 1)
        return brightness + rand(-0.2, 0.2, 3) + stripes * rand(0, 0.1, 1) * rand(-1, 1, 3) + grain
    dark, light, swap = texture(0.3), texture(0.7), rand(0, 1, 1) < 0.5
    ground, figure = torch.where(swap, light, dark), torch.where(swap, dark, light)
    pixels = torch.where(inside.unsqueeze(1), figure, ground).clamp(0, 1)
    return torch.nn.functional.avg_pool2d(pixels, 2).mul(255).round().to(torch.uint8)


# ---- run folders ----

def records(folder: Path) -> list[dict]:
    """The lines of a run's `metrics.jsonl`."""
    try:
        lines = (folder / "metrics.jsonl").read_text(errors="replace").splitlines()
    except FileNotFoundError:
        return []
    found = []
    for line in lines:
        with contextlib.suppress(ValueError):                   # one that a kill cut short
            found.append(json.loads(line))
    return found


class RunFolder:
    """`runs/<name>/`: `config.json`, `metrics.jsonl` (a JSON object a line), `checkpoint.pt` and the one before it,
    `encoder.pt`, `test_features.npz`. Under torchrun process 0 alone writes; every process must see the folder. One run
    at a time has it: a second one is refused, with `force` too."""

    def __init__(self, path: Path, config: dict, resume: bool = False, force: bool = False, save_every: float = math.inf):
        self.path, self.config, self.resume, self.save_every = Path(path), config, bool(resume), save_every
        self.saved_at, self.signal, self.writing = time.monotonic(), 0, None
        self.writer = ThreadPoolExecutor(1)
        self.saving = {"checkpoints": 0, "checkpoint_bytes": 0, "saving_seconds": 0.0}      # copying, then writing
        if rank() > 0:
            return
        restarted = any(int(os.environ.get(f"{who}_RESTART_COUNT") or 0) for who in ("TORCHELASTIC", "SLURM"))
        if not resume and (not force or restarted) and self.path.exists() and (not self.path.is_dir() or any(self.path.iterdir())):
            raise UsageError(f"{self.path} holds a run already; go on with it by --resume {self.path}, choose another --name, or "
                             f"overwrite it with --force (which a job that torchrun or Slurm has restarted may not).")
        self.path.mkdir(parents=True, exist_ok=True)
        _claim(self.path)
        for old in self.path.glob(".*.[0-9]*" if resume else "*"):      # what a kill left half written, or the run before
            if old.name == LOCK:
                continue
            shutil.rmtree(old) if old.is_dir() and not old.is_symlink() else old.unlink()
        began = stored_settings(self.path) if resume else {}
        config = config | began | {key: config[key] for key in config if key == "data_dir"}         # that may have moved
        save_atomically(self.path / "config.json", lambda out: out.write(json.dumps(config, indent=2).encode()))

    def log(self, record: dict) -> None:
        if rank() == 0:
            with open(self.path / "metrics.jsonl", "a") as out:
                out.write(json.dumps(record) + "\n")

    def finish(self, record: dict, probe_seconds: float) -> dict:
        """Log and say what the run came to. Returns that record."""
        record = record | {"probe_seconds": probe_seconds} | describe_end(self.config["device"]) | self.saving
        self.log(record)
        if "linear_top1" in record:
            print(f"linear probe {record['linear_top1']:.4f} (top-5 {record['linear_top5']:.4f}), kNN {record['knn_top1']:.4f};"
                  f" linear probe of raw pixels {record['raw_pixels_top1']:.4f}, of the untrained encoder "
                  f"{record['untrained_top1']:.4f}")
        print(f"written to {self.path}; to draw it: python report.py {self.path}")
        return record

    # -- checkpoints --

    def save(self, state: dict) -> None:
        """Keep `state` (plain tensors, numbers, dicts and lists) as `checkpoint.pt`: copied now, written by a thread
        while training goes on. The one before is only renamed, so that one of the two is whole at every moment."""
        self.written()
        started = time.perf_counter()
        if rank() == 0:
            self.writing = self.writer.submit(self._write, _copied(state | {"config": self.config}))
        self.saved_at = time.monotonic()
        self.saving["saving_seconds"] += time.perf_counter() - started

    def _write(self, state: dict) -> None:
        started, path = time.perf_counter(), self.path / "checkpoint.pt"
        state["digest"] = _digest(state)

        def keep_the_previous():
            if path.exists():
                os.replace(path, self.path / "checkpoint-previous.pt")
        save_atomically(path, lambda out: _save(state, out), keep_the_previous)
        self.saving["checkpoints"] += 1
        self.saving["checkpoint_bytes"] = path.stat().st_size
        self.saving["saving_seconds"] += time.perf_counter() - started

    def written(self) -> None:
        """Wait for the checkpoint that is being written; raises what stopped it."""
        if self.writing:
            self.writing, writing = None, self.writing
            writing.result()
        wait_for_first()

    def finished(self) -> dict | None:
        """The last record of a run that has come to its end."""
        last = records(self.path)[-1:]
        if not (self.resume and last and "probe_seconds" in last[0]):
            return None
        print(f"{self.path} is finished: there is nothing to go on with.")
        return last[0]

    def load(self) -> dict | None:
        """The newest whole checkpoint of a run that is resumed, or None; metrics that were logged after it are dropped."""
        if not self.resume:
            return None
        state, damaged = None, []
        for path in (self.path / "checkpoint.pt", self.path / "checkpoint-previous.pt"):
            if state is None and path.exists():
                try:
                    state = torch.load(path, map_location="cpu", weights_only=True)
                    if state["digest"] != _digest(state):
                        raise ValueError
                except (OSError, MemoryError):                  # the disk or this machine, not the file
                    raise
                except Exception:                               # cut short, damaged, or not ours
                    state = None
                    damaged.append(path)
        if damaged and state is None:
            raise UsageError(f"{damaged[0]} is damaged and there is no whole one before it; "
                             f"start again with --name {self.path.name} --force and the run's flags (config.json has them).")
        step = state["step"] if state else 0
        if len(set(gather_objects(step))) > 1:
            raise UsageError(f"The processes read checkpoints of different steps in {self.path}; see that all of them see the same "
                             f"files, and resume again.")
        if damaged:
            print(f"{damaged[0]} is damaged; going on from {self.path / 'checkpoint-previous.pt'}, of step {step}.")
            if rank() == 0:                                     # aside, lest the next save take it for the one before
                os.replace(damaged[0], self.path / "checkpoint-damaged.pt")
        if state is None:
            print(f"{self.path} holds no checkpoint yet: its training begins anew.")
        if state and state["config"].get("images") != self.config.get("images"):
            raise UsageError(f"This run began with {state['config'].get('images')} training images and there are now "
                             f"{self.config.get('images')}; give --data-dir the images it began with, or start a new run.")
        if state and state["config"].get("data_key") != self.config.get("data_key"):
            print("the images have changed since this run began, or lie elsewhere: the run goes on with what is there now.")
        if state and state["config"]["commit"] != self.config["commit"]:
            print(f"this run began with the code at {state['config']['commit']} and goes on with {self.config['commit']}: "
                  f"its end may differ from that of an unbroken run.")
        if state and state["config"].get("processes") != self.config.get("processes"):
            print(f"this run began with {state['config'].get('processes')} processes and goes on with {self.config['processes']}: "
                  f"its end may differ from that of an unbroken run.")
        if rank() == 0:
            kept = [r for r in records(self.path) if r.get("step", math.inf) <= step]
            kept.append({"step": step, "resumed": {k: self.config[k] for k in ("commit", "hardware", "started")}})
            kept = [json.dumps(r) + "\n" for r in kept]
            save_atomically(self.path / "metrics.jsonl", lambda out: out.write("".join(kept).encode()))
        return state

    # -- signals --

    @contextlib.contextmanager
    def catching_signals(self):
        """SIGTERM, Ctrl-C and a closed terminal are noted, for `asked`; a second one ends the process at once. All is
        written at the end."""
        def note(number, frame):
            # torchrun passes on what the terminal has already sent, so one within the second is no second one.
            if self.signal and time.monotonic() - self.signalled_at > 1:
                signal.signal(number, signal.SIG_DFL)
                signal.raise_signal(number)
            if not self.signal:
                self.signal, self.signalled_at = number, time.monotonic()
        before = {number: signal.signal(number, note) for number in _signals()}
        try:
            try:
                yield
            except Stopped:
                self.written()
                raise
            self.written()
            if number := self.asked()[0]:
                raise Stopped(number, f"stopped before probing; the training is done and saved; to go on: {PROGRAM} --resume {self.path}")
        finally:
            self.writer.shutdown()                              # whatever has happened, what is being written is written
            for number, handler in before.items():
                signal.signal(number, handler)

    def asked(self) -> tuple[int, bool]:
        """The signal to stop for (0: none), and whether a checkpoint is due: one answer for all processes. Raises what
        stopped a checkpoint from being written."""
        if self.writing and self.writing.done():
            self.writing.result()
        answer = torch.tensor([self.signal, time.monotonic() - self.saved_at > 60 * self.save_every])
        if processes() > 1:
            dist.all_reduce(answer, dist.ReduceOp.MAX, group=_prompt)
        return int(answer[0]), bool(answer[1])


def run_folder(config, data: Dataset) -> RunFolder:
    """`runs/<name>`, or the folder that is resumed, with this run's settings and where its figures come from."""
    path = config.resume or RUNS / (config.name or default_name(config.dataset))
    about = dataclasses.asdict(config) | provenance(config.device) | {"images": len(data.train_images), "data_key": data.key}
    return RunFolder(path, about, config.resume, config.force, config.save_every)


LOCK = ".lock"
_claimed: dict[Path, int] = {}      # run folders that this process holds, each with its open descriptor


def _claim(folder: Path) -> None:
    """Hold a folder until `release_folders`, or until the process ends however it does; refuse if another process does."""
    with contextlib.suppress(ImportError):                      # not on Windows
        import fcntl
        if folder.resolve() in _claimed:
            return
        descriptor = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT, 0o644)      # a file, as NFS locks no folders
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)
            raise UsageError(f"Another process is at work in {folder}; wait for it or stop it first.") from None
        except OSError as error:
            os.close(descriptor)
            print(f"{folder} cannot be locked ({error.strerror}): see to it that no other process works in it.")
            return
        _claimed[folder.resolve()] = descriptor


def release_folders() -> None:
    while _claimed:
        os.close(_claimed.popitem()[1])


def _copied(value):
    """`value` with its tensors copied to the host, so that training may go on changing its own."""
    if isinstance(value, Tensor):
        return value.detach().to("cpu", copy=True)
    if isinstance(value, dict):
        return {k: _copied(v) for k, v in value.items()}
    return [_copied(v) for v in value] if isinstance(value, (list, tuple)) else value


def _digest(state: dict) -> str:
    """Of every tensor's bytes and every number, so that a damaged file is never taken for a whole one."""
    digest = hashlib.blake2b()

    def add(key, value):
        digest.update(str(key).encode())
        if isinstance(value, dict):
            for k, v in value.items():
                add(k, v)
        elif isinstance(value, Tensor):
            digest.update(value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
        else:
            digest.update(repr(value).encode())
    add("", {k: v for k, v in state.items() if k != "digest"})
    return digest.hexdigest()


def _signals() -> list[int]:
    """What asks a run to stop: Ctrl-C, SIGTERM and, unless nohup has it ignored, a terminal that closes."""
    if threading.current_thread() is not threading.main_thread():       # Python handles signals in that one alone
        return []
    wanted = [signal.SIGINT, signal.SIGTERM, *([signal.SIGHUP] if hasattr(signal, "SIGHUP") else [])]
    return [number for number in wanted if signal.getsignal(number) != signal.SIG_IGN]


@contextlib.contextmanager
def _signals_wait():
    """What asks a run to stop is heard after this block."""
    heard = []
    before = {number: signal.signal(number, lambda number, frame: heard.append(number)) for number in _signals()}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    for number in heard:
        signal.raise_signal(number)


class Stopped(BaseException):
    """A signal asked for the end, and everything is saved. Arguments: the signal's number, what to say."""


def save_atomically(path: Path, write, before=lambda: None) -> None:
    """Call `write(file)` on a temporary file beside `path`, flush it to disk, then `before()`, then put it in `path`'s
    place. In process 0 alone."""
    if rank() > 0:
        return
    path = Path(path)
    scratch = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with open(scratch, "wb") as out:
            write(out)
            out.flush()
            os.fsync(out.fileno())
        before()
        os.replace(scratch, path)
        with contextlib.suppress(OSError):                      # the new name too; Windows cannot flush a folder
            folder = os.open(path.parent, os.O_RDONLY)
            os.fsync(folder)
            os.close(folder)
    except OSError as error:
        error.filename = error.filename or str(path)
        raise
    finally:
        scratch.unlink(missing_ok=True)


def _save(content: dict, out) -> None:
    """`torch.save` by way of memory: straight to a file that cannot grow it raises an error of its own, not the disk's."""
    buffer = io.BytesIO()
    torch.save(content, buffer)
    out.write(buffer.getbuffer())


def save_encoder(path: Path, encoder: torch.nn.Module) -> None:
    """Plain tensors and numbers, so that `torch.load(path, weights_only=True)` reads it."""
    weights = {name: value.detach().cpu() for name, value in encoder.state_dict().items()}
    content = {"architecture": encoder.architecture, "weights": weights}
    save_atomically(path, lambda out: _save(content, out))
    wait_for_first()


def load_checkpoint(path: str | Path) -> dict:
    """What `save_encoder` wrote. Raises `UsageError` where `path` is something else; runs no code from the file."""
    if not Path(path).is_file():
        raise UsageError(f"There is no checkpoint {path}; give --checkpoint the encoder.pt of a run.")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
        kinds = {name: type(value) for name, value in content["architecture"].items()}
        if (kinds != dict(backbone=str, patch_size=int, hidden=int, projector=int, dim=int, drop_last_stage=bool) or not isinstance(content["weights"], dict)
                or content["architecture"]["backbone"] not in BACKBONES):
            raise ValueError
    except Exception:                                           # random bytes, a pickle with code, another program's
        raise UsageError(f"{path} is no encoder that this program saved; "
                         f"give --checkpoint the encoder.pt of a run.") from None
    return content


def load_weights(encoder: torch.nn.Module, path: str | Path) -> None:
    try:
        encoder.load_state_dict(load_checkpoint(path)["weights"])
    except (RuntimeError, TypeError, AttributeError) as error:
        raise UsageError(f"{path} has weights of another architecture than it says "
                         f"({str(error).splitlines()[-1].strip()[:200]}); give the encoder.pt of a run.") from None


def save_features(path: Path, **arrays) -> None:
    """Write tensors or lists as an uncompressed `.npz`; whole or not at all."""
    arrays = {k: v.cpu().numpy() if isinstance(v, Tensor) else np.asarray(v) for k, v in arrays.items()
              if v is not None}
    save_atomically(path, lambda out: np.savez(out, **arrays))
    wait_for_first()


def export(h: list[Tensor | None], data: Dataset, path: str) -> None:
    save_features(path, train_features=h[0], train_labels=data.train_labels, test_features=h[1],
                  test_labels=data.test_labels, files=data.files, classes=data.classes or None)
    print(f"features of {len(h[0]):,} training images written to {path}")


def save_results(folder: RunFolder, h: list[Tensor | None], data: Dataset, path: str | None) -> None:
    """The features h of a finished run: of the test images or, without labels, of all; and all of them to `path`."""
    if path:
        export(h, data, path)
    if data.test_labels is None:
        print("These images have no labels: their features are saved, and there is nothing to probe.")
        save_features(folder.path / "features.npz", train_features=h[0].half(), files=data.files)
    else:
        save_features(folder.path / "test_features.npz", test_features=h[1].half(), test_labels=data.test_labels)


def remembered(key: str, compute=None) -> float | None:
    """`compute()`, a number, remembered on disk under `key`; without `compute`, None where it is not."""
    path = CACHE / f"{hashlib.sha256(key.encode()).hexdigest()[:16]}.json"
    try:
        value = json.loads(path.read_text())
    except (OSError, ValueError):
        value = None
    if processes() > 1:                                         # all compute, or none
        answer = [value]
        dist.broadcast_object_list(answer)
        value = answer[0]
    if value is None and compute:
        value = compute()
        path.parent.mkdir(parents=True, exist_ok=True)
        save_atomically(path, lambda out: out.write(json.dumps(value).encode()))
    return value


def side_by_side(device: str, tasks: list) -> list:
    """Results of `tasks`, functions of nothing that do not depend on each other, the longest first. On a CPU as many at a time as
    it has cores, which share out better over tasks than over steps as short as a probe's; else one after the other."""
    threads = torch.get_num_threads()
    if processes() > 1 or threads == 1 or torch.device(device).type != "cpu":
        return [task() for task in tasks]

    def on_its_share(task):                                         # torch.set_num_threads would be the whole process's, and
        torch.get_num_threads()                                     # leaves batched LU wrong (pytorch/pytorch#141358); PyTorch
        with threadpool_limits(max(1, threads // len(tasks)), user_api="openmp"):   # counts once in a thread, so it does first
            return task()
    pool = ThreadPoolExecutor(min(threads, len(tasks)))
    try:
        with _signals_wait():                                       # one in the midst of it leaves a thread that the pool forgets
            begun = [pool.submit(on_its_share, task) for task in tasks]
        return [task.result() for task in begun]
    except BaseException:                                           # of a task, or a signal
        _given_up.set()
        raise
    finally:
        pool.shutdown(cancel_futures=True)
        _given_up.clear()


def pixels(images: Tensor) -> Tensor:
    """`(N, 3, H, W)` uint8 -> `(N, 3 * side * side)` in [-1, 1], side at most 32."""
    side = min(32, images.shape[-1])
    return torch.cat([F.adaptive_avg_pool2d(part / 127.5 - 1, side).flatten(1) for part in images.split(1000)])


def untrained_key(data: Dataset, config, untrained: torch.nn.Module, augmentation) -> str:
    weights = [*untrained.backbone.parameters(), *untrained.represent.parameters()]
    recipe = (data.key, sum(p.double().abs().sum().item() for p in weights), config.patch_size, config.eval_patches,
              config.augmentation, config.eval_augmentation, str(augmentation), config.seed, config.precision)
    return f"untrained {recipe}"


def default_name(dataset: str) -> str:
    return f"{dataset}-{time.strftime('%Y%m%d-%H%M%S')}"


# ---- processes: torchrun starts them and says which one this is ----

_prompt = None                      # a group for host tensors that gives up after a minute, as the main one does
_patient = None                     # a group that waits for process 0 while it decodes or saves; the others' limit is a minute


def join_processes(device: str) -> None:
    """Meet the other processes that torchrun started, if it did."""
    global _patient, _prompt
    if "TORCHELASTIC_RUN_ID" not in os.environ or dist.is_initialized():
        return
    if device.startswith("cuda"):
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.startswith("cuda") else "gloo", timeout=datetime.timedelta(minutes=1))
    _prompt = dist.new_group(backend="gloo", timeout=datetime.timedelta(minutes=1))
    _patient = dist.new_group(backend="gloo", timeout=datetime.timedelta(days=1))
    if rank() > 0:
        sys.stdout = open(os.devnull, "w")


def leave_processes() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def processes() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def first_process_first(load):
    """`load()` in process 0, which may download and decode, then in the others, which find what it left."""
    value = load() if rank() == 0 else None
    wait_for_first()
    value = load() if rank() > 0 else value
    wait_for_first()
    return value


def wait_for_first() -> None:
    """The others wait here, as long as it takes, for what process 0 alone does."""
    if processes() > 1:
        dist.barrier(_patient)


def gather_objects(value) -> list:
    """`value` of each process."""
    values = [value] * processes()
    if processes() > 1:
        dist.all_gather_object(values, value, group=_patient)
    return values


def sum_over_processes(x: Tensor) -> Tensor:
    if processes() > 1:
        dist.all_reduce(x)
    return x


class _Gather(torch.autograd.Function):
    """Every process computes the whole loss, so the gradient of its own rows is its own slice of what comes back.
    DistributedDataParallel then averages over W processes where the whole is a sum, hence the W."""

    @staticmethod
    def forward(ctx, z):
        parts = [torch.empty_like(z) for _ in range(processes())]
        dist.all_gather(parts, z)
        return torch.cat(parts, dim=1)

    @staticmethod
    def backward(ctx, grad):
        return grad.chunk(processes(), dim=1)[rank()] * processes()


def gather_images(z: Tensor) -> Tensor:
    """`(n, b / W, d)` of each of W processes -> `(n, b, d)` of all of them, on each; differentiable."""
    return _Gather.apply(z.contiguous()) if processes() > 1 else z


def distribute(encoder: torch.nn.Module) -> torch.nn.Module:
    """`encoder` itself, or what runs it in step with the other processes and averages their gradients."""
    if processes() == 1:
        return encoder
    if next(encoder.parameters()).is_cuda:
        torch.nn.SyncBatchNorm.convert_sync_batchnorm(encoder)
    else:
        print("PyTorch synchronises BatchNorm on GPUs only: each process uses the statistics of its own images.")
    return torch.nn.parallel.DistributedDataParallel(encoder)


def agree_on_buffers(encoder: torch.nn.Module) -> None:
    """Process 0's BatchNorm statistics for all: those of unsynchronised processes differ."""
    if processes() > 1:
        for buffer in encoder.buffers():
            dist.broadcast(buffer, 0)


@contextlib.contextmanager
def _until_the_reader_goes():
    """A reader of stderr that has gone (tee at Ctrl-C, a terminal) must not end a training, nor change its exit code."""
    try:
        yield
    except OSError:
        sys.stderr = open(os.devnull, "w")                          # Python flushes what is left at exit, and would end with 120


class _Screen:
    """Where a progress bar is drawn: stderr."""

    def write(self, text: str) -> None:
        with _until_the_reader_goes():
            sys.stderr.write(text)

    def flush(self) -> None:
        with _until_the_reader_goes():
            sys.stderr.flush()

    def __eq__(self, other):                                    # so that tqdm.write clears the bar first
        return other is sys.stderr

    def __getattr__(self, name):
        return getattr(sys.stderr, name)


_given_up = threading.Event()


class _Bar(tqdm):
    """A progress bar; its loop stops where `side_by_side` has no more use for what it makes."""
    def __iter__(self):
        for item in super().__iter__():
            if _given_up.is_set():
                raise RuntimeError("What this makes is not wanted any more.")
            yield item


def progress(*args, **kwargs) -> tqdm:
    return _Bar(*args, file=_Screen(), dynamic_ncols=True, disable=rank() > 0, **kwargs)


def show(bar: tqdm, record: dict) -> None:
    bar.set_postfix_str(f"R {record['R']:.1f}  D {record['D']:.3f}  lr {record['lr']:.3f}  "
                        f"{record['patches_per_second']:.0f} patches/s")


# ---- the machine and the command line ----

def flag(default, help: str, **options):
    return dataclasses.field(default=default, metadata={"help": help, **options})


@dataclasses.dataclass
class RunConfig:
    """What a run reads and writes, and where it runs; `empssl.Config` adds the method's settings."""
    dataset: str = flag("cifar10", "data set", choices=DATASETS)
    data_dir: str = flag("data", "where CIFAR is or goes to; the folder itself for image folders")
    image_size: int = flag(None, "side that a folder's images are brought to (first image's shorter side, at most 224)")
    subset: int = flag(None, "use this many training images, chosen by the seed")
    device: str = flag("auto", "cpu, cuda, cuda:1, mps")
    name: str = flag(None, "run folder below runs/ (data set and time)")
    force: bool = flag(False, "overwrite the run folder")
    resume: str = flag(None, "a run folder, runs/<name>: go on where that run was stopped, with its own settings")
    save_every: float = flag(5.0, "minutes between checkpoints; there is one at each epoch's end besides")
    eval_only: bool = flag(False, "probe --checkpoint, or the encoder before any training, on --dataset")
    checkpoint: str = flag(None, "an encoder.pt, for --eval-only and --export-features")
    ops: bool = flag(False, "say which implementation each op has here, and why, and stop")
    export_features: str = flag(None, "write the features of --dataset's images to this .npz")


def pick_device(wanted: str) -> str:
    device = ("cuda" if torch.cuda.is_available() else "cpu") if wanted == "auto" else wanted
    if device.startswith("cuda") and "TORCHELASTIC_RUN_ID" in os.environ:               # each process has a GPU of its own
        device = f"cuda:{os.environ['LOCAL_RANK']}"
    try:
        torch.empty(1, device=device)
    except Exception as error:                                  # torch raises many kinds for a device it lacks
        mistake = UsageError(f"--device {device[:40]} cannot be used here ({str(error).splitlines()[0][:200]}); try cpu.")
        mistake.of_one_process = True
        raise mistake from None
    return device


def fast_bf16(device: str) -> bool:
    """Whether the device multiplies bfloat16 in hardware; elsewhere autocast would only slow the encoder down."""
    if device.startswith("cuda"):
        return torch.cuda.is_bf16_supported(including_emulation=False)
    found = getattr(torch.cpu, "get_capabilities", dict)()
    return device == "cpu" and bool(found.get("amx_bf16") or found.get("avx512_bf16"))


def describe_device(device: str) -> str:
    if device.startswith("cuda"):
        return torch.cuda.get_device_name(device)
    name = getattr(torch.cpu, "get_capabilities", dict)().get("cpu_name") or platform.processor() or platform.machine()
    return f"{device} ({name}, {torch.get_num_threads()} threads)"


def describe_end(device: str) -> dict:
    """The device, and the most bytes that this process has held so far, on the host and on the GPU."""
    peak = {"device": describe_device(device)}
    with contextlib.suppress(ImportError):                      # not on Windows
        import resource
        unit = 1 if sys.platform == "darwin" else 1024
        peak["peak_memory"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    if device.startswith("cuda"):
        peak["peak_gpu_memory"] = torch.cuda.max_memory_allocated(device)
    return peak


def provenance(device: str) -> dict:
    """What a figure needs beside it to be trusted and repeated."""
    here = Path(__file__).parent
    git = lambda *words: subprocess.run(["git", "-C", here, *words], capture_output=True, text=True).stdout.strip()
    try:
        commit = git("rev-parse", "HEAD") + ("-dirty" if git("status", "--porcelain", "--untracked-files=no", "--", ".", ":!results", ":!README.md") else "")
    except OSError:                                             # no git on this machine
        commit = ""
    program = Path(sys.argv[0]).resolve()
    program = str(program.relative_to(here.resolve())) if program.is_relative_to(here.resolve()) else program.name
    return {"command": shlex.join(["python", program, *sys.argv[1:]]), "commit": commit or "unknown",
            "versions": {"python": platform.python_version(), "torch": str(torch.__version__),
                         "torchvision": torchvision.__version__},
            "hardware": describe_device(device), "processes": processes(), "started": time.strftime("%Y-%m-%dT%H:%M:%S%z")}


def to_device(data: Dataset, device: str) -> Dataset:
    """The images on `device` where they take less than half of its free memory, else left where they are."""
    if not device.startswith("cuda"):
        return data
    room = torch.cuda.mem_get_info(device)[0] / 2
    images = [data.train_images, data.test_images]
    if sum(x.numel() for x in images if x is not None) > room:
        return data
    train, test = (None if x is None else x.to(device) for x in images)
    return data._replace(train_images=train, test_images=test)


def human_time(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def parse_flags(config: type, argv: list[str] | None, description: str):
    """A flag for each field of the dataclass `config`; returns an instance. With `--resume` the run's own settings."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    fields = dataclasses.fields(config)
    for f in fields:
        switch = argparse.BooleanOptionalAction if f.default is None else "store_true"             # --x and --no-x, or --x alone
        how = {"action": switch} if f.type is bool else {"type": f.type, "default": f.default}
        parser.add_argument("--" + f.name.replace("_", "-"), **how, **f.metadata)
    unset = object()
    flags = vars(parser.parse_args(argv, argparse.Namespace(**{f.name: unset for f in fields})))
    flags = {name: value for name, value in flags.items() if value is not unset}
    if "resume" in flags:
        for name in flags:
            if name not in ("resume", "device", "data_dir", "save_every", "export_features"):
                raise UsageError(f"--resume goes on with the run's own settings; leave --{name.replace('_', '-')} out "
                                 f"(--device, --data-dir, --save-every and --export-features may change).")
        stored = stored_settings(Path(flags["resume"]))
        if "method" in stored and not hasattr(config, "method"):
            raise UsageError(f"{flags['resume']} was begun by baselines.py; go on with python baselines.py --resume {flags['resume']}.")
        if any(f.name not in stored for f in fields):
            raise UsageError(f"There is no run to go on with in {flags['resume']}; "
                             f"give --resume a folder below {RUNS} that {PROGRAM} has begun.")
        flags = {f.name: stored[f.name] for f in fields} | flags
    return config(**flags)


def stored_settings(folder: Path) -> dict:
    """A run's settings, from its config.json or, where that is lost, from a checkpoint; {} where there are none."""
    readers = [lambda: json.loads((folder / "config.json").read_text())]
    readers += [lambda name=name: torch.load(folder / name, map_location="cpu", weights_only=True)["config"]
                for name in ("checkpoint.pt", "checkpoint-previous.pt")]
    for read in readers:
        with contextlib.suppress(Exception):                    # missing, cut short, not ours
            stored = read()
            if isinstance(stored, dict):
                return stored
    return {}


def settings(config, presets: dict):
    """Resolve what is `auto` or left to the preset, and refuse what cannot work."""
    config.device = pick_device(config.device)
    if config.preset == "auto":
        config.preset = "laptop" if config.device == "cpu" else "paper"
    if config.precision == "auto":
        config.precision = "bf16" if fast_bf16(config.device) else "float32"
    if config.checkpoint:
        if not (config.eval_only or config.export_features):
            raise UsageError("--checkpoint goes with --eval-only or --export-features; add the one you want.")
        for name, value in load_checkpoint(config.checkpoint)["architecture"].items():
            if getattr(config, name) not in (None, False, value):
                raise UsageError(f"{config.checkpoint} has another architecture, its {name} is {value} and not "
                                 f"{getattr(config, name)}; leave --{name.replace('_', '-')} out.")
            setattr(config, name, value)
    if config.size_schedule:
        sides = [side for side, _ in size_schedule(config)]
        config.patch_size = config.patch_size or sides[-1]
        if not all(1 <= side <= 4096 for side in sides):
            raise UsageError(f"--size-schedule {config.size_schedule} has a side that is not between 1 and 4096 pixels; change it.")
    switches = {f.name: False for f in dataclasses.fields(config) if f.type is bool}
    for name, value in (switches | presets[config.preset]).items():
        if getattr(config, name) is None:
            setattr(config, name, value)
    for name, least in dict(patches=1, batch=1, epochs=1, patch_size=1, hidden=1, projector=1, dim=1, eval_patches=1).items():
        if getattr(config, name) is not None and getattr(config, name) < least:
            raise UsageError(f"--{name.replace('_', '-')} is {getattr(config, name)}; it must be at least {least}.")
    if config.eval_augmentation == "grid" and math.isqrt(config.eval_patches) ** 2 != config.eval_patches:
        raise UsageError(f"--eval-patches {config.eval_patches} makes no even grid; give a square such as 1, 4, 9 or 16.")
    if config.eval_augmentation == "maps" and config.eval_patches != 1:
        raise UsageError(f"--eval-augmentation maps shows an image once; with --eval-patches {config.eval_patches} goes "
                         f"--eval-augmentation grid.")
    if config.probe_epochs and not re.fullmatch(r"[1-9]\d*(,[1-9]\d*)*", config.probe_epochs):
        raise UsageError(f"--probe-epochs {config.probe_epochs!r} is no list of epochs; give one such as 1,10.")
    for path in (config.checkpoint, getattr(config, "warm_last_stage", None)):
        if path and config.force and config.name and (RUNS / config.name).resolve() in Path(path).resolve().parents:
            raise UsageError(f"--force would delete {path}, which is in the run folder that it overwrites; choose another --name.")
    if config.name is not None and not re.fullmatch(r"\w[\w.=+-]{0,99}", config.name):
        raise UsageError(f"--name {config.name!r} is no plain folder name; use up to 100 letters, digits and -._=+ only.")
    for name in ("lr", "eps2"):
        if not 0 < getattr(config, name) < math.inf:
            raise UsageError(f"--{name} is {getattr(config, name)}; it must be a positive number.")
    for name in ("lam", "weight_decay", "eta"):
        if not 0 <= getattr(config, name) < math.inf:
            raise UsageError(f"--{name.replace('_', '-')} is {getattr(config, name)}; it must be 0 or more.")
    if not config.save_every >= 0:
        raise UsageError(f"--save-every is {config.save_every}; it must be 0 or more minutes.")
    if not 0 <= config.seed < 2 ** 63:
        raise UsageError(f"--seed is {config.seed}; it must lie between 0 and 2^63 - 1.")
    if config.export_features is not None:
        target = Path(config.export_features)
        if "\0" in str(target) or target.is_dir() or not target.absolute().parent.is_dir():
            raise UsageError(f"--export-features {config.export_features!r} is no file in a folder that exists; "
                             f"name one, such as features.npz.")
    return config


def check_finite(bad_step: Tensor, parameters: list[Tensor], t: int, T: int) -> None:
    """`bad_step` is the first step whose loss was not finite, -1 where there is none."""
    if bad_step >= 0 or not all(p.isfinite().all() for p in parameters):
        raise FloatingPointError(f"Loss or weights were not finite at step {int(bad_step) + 1 or t + 1} of {T}; what was saved "
                                 "before is kept. Try a smaller --lr or --precision float32.")


def size_schedule(config) -> list[tuple[int, float]]:
    """Of `16:0.7,32:0.3`: [(16, 0.7), (32, 0.3)], sides of patches and shares of training."""
    if not config.size_schedule:
        return [(config.patch_size, 1.0)]
    try:
        parts = [part.split(":") for part in config.size_schedule.split(",")]
        schedule = [(int(side), float(share)) for side, share in parts]
        if not (all(share > 0 for _, share in schedule) and abs(sum(share for _, share in schedule) - 1) < 1e-6):
            raise ValueError
    except ValueError:
        raise UsageError(f"--size-schedule {config.size_schedule} is no list of sides and shares that sum to 1; "
                         f"give one such as 16:0.7,32:0.3.") from None
    return schedule


def side_at(config, done: float) -> int:
    """Side of the patches once a share `done` of training is over."""
    for side, share in size_schedule(config):
        done -= share
        if done < 0:
            break
    return side


def announce(config, N: int, H: int, W: int) -> None:
    steps, sides = N // config.batch * config.epochs, dict.fromkeys(side for side, _ in size_schedule(config))
    print(f"preset {config.preset} on {config.device}, {config.precision}: {N:,} images of {H}x{W}, {steps:,} steps, "
          f"{steps * config.batch * config.patches:,} patches of {', then '.join(f'{side}x{side}' for side in sides)} to come")


def keep_freed_memory() -> None:
    """Have glibc keep what a step frees for the next step, where by default it gives large blocks back to the system and
    has them zeroed and mapped anew. The numbers are its M_MMAP_MAX and M_TRIM_THRESHOLD."""
    libc = ctypes.CDLL(None) if sys.platform == "linux" else None
    if hasattr(libc, "mallopt"):
        libc.mallopt(-4, 0)
        libc.mallopt(-1, 2 ** 31 - 1)


def check_sizes(config, N: int, H: int, W: int) -> None:
    """Refuse, before anything is written, sizes that do not fit the data or this machine."""
    n, b, hidden, training = config.patches, config.batch, config.hidden, not (config.checkpoint or config.eval_only)
    s = max(config.patch_size, *(side for side, _ in size_schedule(config)))
    if s > min(H, W):
        raise UsageError(f"--patch-size {s} makes a crop larger than the {H}x{W} images; lower it.")
    if training and b > N:
        raise UsageError(f"--batch {b} is larger than the data set's {N} training images; lower it.")
    if training and b % processes():
        raise UsageError(f"--batch {b} is split over {processes()} processes; give a multiple of that.")
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else math.inf
    if training and 12 * n * b * s * s > memory * processes():
        raise UsageError(f"--batch {b} times --patches {n} are {12 * n * b * s * s / 2 ** 30:,.0f} GiB of patches, more than "
                         f"this machine's memory; lower one of them.")
    if 12 * (config.projector * (hidden + config.dim) + 512 * hidden) > memory:      # weights, gradients, momentum
        raise UsageError(f"--hidden {hidden}, --projector {config.projector} and --dim {config.dim} make a network larger than "
                         f"this machine's memory; lower one of them.")
    if 12 * config.eval_patches * s * s > memory:
        raise UsageError(f"--eval-patches {config.eval_patches} of one image are more than this machine's memory; lower it.")


@contextlib.contextmanager
def mistakes_in_one_sentence():
    """What a user can mend ends the program with one sentence and code 2; a loss that is not finite, or a lost process,
    with code 1; a signal with 128 + its number."""
    def stopped(number, frame):
        for each in before:                                     # a second one ends the process at once
            signal.signal(each, signal.SIG_DFL)
        to_go_on = "".join(f"; to go on: {PROGRAM} --resume {os.path.relpath(folder)}" for folder in _claimed)
        raise Stopped(number, f"stopped; what was written before is kept{to_go_on}")
    before = {number: signal.signal(number, stopped) for number in _signals()}
    with contextlib.suppress(AttributeError):                   # a log shows each line at once, a file name that is no text too
        sys.stdout.reconfigure(line_buffering=True, errors="backslashreplace")
    try:
        yield
        leave_processes()
    except UsageError as error:
        stop(f"error: {error}", 2, once=not getattr(error, "of_one_process", False))
    except Stopped as error:
        number, sentence = error.args
        stop(sentence, 128 + number, once=True)
    except FloatingPointError as error:
        stop(f"error: {error}", 1, once=True)
    except torch.OutOfMemoryError:
        held = (f" ({torch.cuda.max_memory_allocated() / 2 ** 30:.1f} of its {torch.cuda.mem_get_info()[1] / 2 ** 30:.1f} GiB held this run, "
                f"and it asked for more)" if torch.cuda.is_available() else "")
        stop(f"error: The GPU is out of memory{held}; lower --batch, --patches or --patch-size, or give --precision bf16.", 2)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            stop(f"error: The disk is full ({error.filename or 'while writing'}); what was written before is kept.", 2)
        if error.errno in (errno.EPIPE, errno.EIO) and error.filename is None:
            sys.stdout = open(os.devnull, "w")
            stop("error: Nobody reads this program's output any more; what was written to its run folder is kept.", 1)
        if error.filename is None:
            raise
        stop(f"error: {error.filename2 or error.filename} cannot be read or written ({error.strerror}); "
             f"what was written before is kept.", 2)
    except RuntimeError as error:
        if "DefaultCPUAllocator" in str(error):
            stop(f"error: This machine's memory does not suffice ({str(error).splitlines()[0].split('DefaultCPUAllocator: ')[-1]}); lower "
                 f"--batch, --patches or --patch-size.", 2)
        if processes() == 1:
            raise
        stop(f"error: Process {rank()} of {processes()} lost the others and ends ({str(error).splitlines()[0]}); see what they "
             f"say, then go on with --resume.", 1)
    finally:
        release_folders()
        for number, handler in before.items():
            signal.signal(number, handler)


def stop(sentence: str, code: int, once: bool = False) -> None:
    """Say why and exit; `once`: said by one process of each machine, as its others end for the same reason."""
    if not once or os.environ.get("LOCAL_RANK", "0") == "0":
        with _until_the_reader_goes():
            print(" ".join(sentence.split()), file=sys.stderr, flush=True)      # one line, whatever was typed
    sys.exit(code)
