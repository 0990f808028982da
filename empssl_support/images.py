"""A folder's images, decoded once into a cache and mapped into memory from then on.

Training needs any image at any moment, many times over. Pixels that lie decoded in one flat file
can be had like that without worker processes, and without more memory than a batch takes.
"""

import contextlib
import hashlib
import json
import os
import re
import shutil
import socket
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from itertools import repeat
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from tqdm import tqdm

from empssl_support.cli import UsageError, progress

CACHE = Path("runs") / ".cache"
# Endings of the files that count as images.
SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")


class Split(NamedTuple):
    """The images of one split that could be read."""

    images: Tensor | None  # (N, 3, size, size) uint8, memory-mapped; None where N is 0
    rows: list[int]  # (N,) which of the split's files they are, rising


def decode_once(
    folder: Path, files: dict[str, list[Path]], size: int | None
) -> tuple[dict[str, Split], str]:
    """A folder's images as two memory-mapped uint8 tensors, decoded by the first call alone.

    The first call writes the pixels of each split into one flat file below `runs/.cache`. It and
    all later calls map these files into memory: a batch's pixels are read from the disk when they
    are asked for, and the system keeps as many of them as it has room for.

    The cache's name holds a fingerprint of the images' paths, sizes and dates. So when a file
    changes, is added or goes, no cache of the right name is found: the images are decoded again,
    and the old cache is deleted.

    folder: the images' folder; the cache is named after it.
    files: the paths of both splits, as `{"train": [...], "test": [...]}`; those of test may be
        none.
    size: side of the square images in pixels. The shorter side of an image is resized to it and the
        centre is cut out. None: the first training image's shorter side, at most 224.

    Returns both splits, and the fingerprint, which changes when any image does.
    Raises `UsageError` where there is no training image, where more than 1 % of the files cannot be
    read, or none of a split; `OSError` where the cache cannot be written.
    """
    size = side_of_squares(folder, files["train"], size)
    key = fingerprint(folder, files, size)
    cache = cache_folder(folder, size, key)
    splits = open_cache(cache, size)
    if splits is None:
        fill_cache(cache, files, size)
        splits = open_cache(cache, size)
    if splits is None:
        raise UsageError(f"{cache} is damaged and cannot be replaced; delete it.")
    for part, split in splits.items():
        if files[part] and split.images is None:
            raise UsageError(
                f"No image of the {part} split of {folder} can be read, "
                f"for instance {files[part][0]}; mend them."
            )
    return splits, key


def look_only(
    folder: Path, files: dict[str, list[Path]], size: int | None
) -> tuple[dict[str, Split], str]:
    """As `decode_once`, without decoding or writing anything: black images stand in, in no memory.

    Every file counts as one that can be read. Raises `UsageError` where there is no training image.
    """
    size = side_of_squares(folder, files["train"], size)
    splits = {}
    for part, some in files.items():
        black = torch.zeros(1, dtype=torch.uint8).expand(len(some), 3, size, size)
        splits[part] = Split(black if some else None, list(range(len(some))))
    return splits, fingerprint(folder, files, size)


def side_of_squares(folder: Path, files: list[Path], size: int | None) -> int:
    """`size` or, by default, the first training image's shorter side, at most 224 pixels."""
    if not files:
        raise UsageError(
            f"There are no images in {folder}; known endings are {', '.join(SUFFIXES)}."
        )
    return size or min(224, shorter_side(files))


# ---- finding the files, and seeing that they have changed ----


def walk(folder: Path) -> list[Path]:
    """Every image file below `folder`, sorted. Hidden files and folders are left out.

    Links to folders are followed, but each real folder is visited once, so that a link to a folder
    above it does not lead round in circles.
    """
    found: list[Path] = []
    seen: set[str] = set()
    for root, folders, names in os.walk(folder, onerror=refuse, followlinks=True):
        real = os.path.realpath(root)
        if real in seen:
            folders.clear()
            continue
        seen.add(real)
        # os.walk goes on into what is left in this list.
        folders[:] = [name for name in folders if not name.startswith(".")]
        found += [Path(root, name) for name in names if is_image(name)]
    return sorted(found)


def refuse(error: OSError) -> None:
    """A folder that may not be read would otherwise be passed over, and a class go missing."""
    raise error


def is_image(name: str) -> bool:
    return Path(name).suffix.lower() in SUFFIXES and not name.startswith(".")


def fingerprint(folder: Path, files: dict[str, list[Path]], size: int) -> str:
    """64 hexadecimal digits that change when the place, size or date of any file does."""
    facts = []
    for file in [*files["train"], *files["test"]]:
        if file.exists():  # a link to nothing is found unreadable later
            state = file.stat()
            facts.append((str(file.relative_to(folder)), state.st_size, state.st_mtime_ns))
    text = json.dumps([str(folder.resolve()), size, facts])
    return hashlib.sha256(text.encode()).hexdigest()


def cache_folder(folder: Path, size: int, key: str) -> Path:
    """`<name>-<size>-<place>-<key>`: what comes before the key is the same until `folder` moves."""
    name = re.sub(r"[^A-Za-z0-9]+", "-", folder.resolve().name)
    place = hashlib.sha256(os.fsencode(folder.resolve())).hexdigest()
    return CACHE / f"{name}-{size}-{place[:8]}-{key[:16]}"


def is_decoded(key: str) -> bool:
    """Whether the images with that fingerprint have a cache."""
    return any(CACHE.glob(f"*-{key[:16]}"))


# ---- reading one image ----


def read_image(file: Path, size: int) -> np.ndarray | Exception:
    """One image as `(3, size, size)` uint8 RGB, or what went wrong."""
    try:
        with Image.open(file) as image:
            return to_square(to_rgb(image), size)
    except Exception as error:  # decoders raise all kinds; the caller names the file
        return error


def to_square(image: Image.Image, size: int) -> np.ndarray:
    """RGB -> `(3, size, size)` uint8."""
    # The shorter side becomes `size`; then the centre is cut out.
    scale = size / min(image.size)
    if scale != 1:
        width, height = (max(size, round(side * scale)) for side in image.size)
        image = image.resize((width, height), Image.Resampling.BILINEAR)
    left, top = (image.width - size) // 2, (image.height - size) // 2
    image = image.crop((left, top, left + size, top + size))
    return np.asarray(image).transpose(2, 0, 1)


def to_rgb(image: Image.Image) -> Image.Image:
    """8-bit RGB, the right way up."""
    if image.mode == "F":
        raise ValueError("its pixels are floating-point numbers")
    if image.mode.startswith("I"):
        # Of 16 bits the upper eight are kept. PIL would cut all values off at 255.
        upper = np.asarray(image).clip(0, 65535) >> 8
        image = Image.fromarray(upper.astype(np.uint8))
    # A camera may note how it was held and leave the pixels as they were.
    return ImageOps.exif_transpose(image).convert("RGB")


def shorter_side(files: list[Path]) -> int:
    """Of the first image that can be opened, in pixels."""
    for file in files:
        # Those that cannot are counted and named when all are decoded.
        with contextlib.suppress(Exception), Image.open(file) as image:
            return min(image.size)
    raise UsageError(f"None of the {len(files)} image files can be read, for instance {files[0]}.")


# ---- the cache: a folder with train.u8, test.u8 and meta.json, there as a whole or not at all ----


def open_cache(cache: Path, size: int) -> dict[str, Split] | None:
    """Both splits, their pixels still on disk; None where `cache` is missing or damaged."""
    try:
        rows = json.loads((cache / "meta.json").read_text())
        return {
            part: Split(map_pixels(cache / f"{part}.u8", len(rows[part]), size), rows[part])
            for part in ("train", "test")
        }
    except (OSError, ValueError, KeyError, TypeError):
        return None


def map_pixels(file: Path, N: int, size: int) -> Tensor | None:
    """`(N, 3, size, size)` uint8 over the bytes of `file`, which is not read now.

    Raises `ValueError` where the file is not exactly as long as that.
    """
    if N == 0:
        return None
    pixels = np.memmap(file, np.uint8, mode="r").reshape(N, 3, size, size)
    with warnings.catch_warnings():
        # The file is mapped for reading only, and nobody writes into a data set.
        warnings.filterwarnings("ignore", "The given NumPy array is not writable")
        return torch.from_numpy(pixels)


def fill_cache(cache: Path, files: dict[str, list[Path]], size: int) -> None:
    """Decode all files into `cache`, or leave nothing behind.

    A scratch folder is filled first and gets its real name at the end, so that whoever finds a
    cache finds all of it.
    """
    clear_away(cache)
    scratch = cache.with_name(f".decoding-{socket.gethostname()}-{os.getpid()}")
    scratch.mkdir(parents=True, exist_ok=True)
    try:
        rows = write_pixels(scratch, files, size)
        (scratch / "meta.json").write_text(json.dumps(rows))
        try:
            os.replace(scratch, cache)
        except OSError:
            # Another process may have decoded the same images meanwhile. Then its cache will do.
            if not (cache / "meta.json").is_file():
                raise
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def clear_away(cache: Path) -> None:
    """Delete caches of the same folder before it changed, and what killed processes left behind."""
    of_this_folder, _, _ = cache.name.rpartition("-")
    for old in cache.parent.glob(f"{of_this_folder}-*"):
        shutil.rmtree(old, ignore_errors=True)
    for scratch in cache.parent.glob(".decoding-*"):
        # Another process may be at work in it, or be done and rename it at this moment.
        with contextlib.suppress(FileNotFoundError):
            touched = max(path.stat().st_mtime for path in [scratch, *scratch.iterdir()])
            if time.time() - touched > 3600:
                shutil.rmtree(scratch, ignore_errors=True)


def write_pixels(folder: Path, files: dict[str, list[Path]], size: int) -> dict[str, list[int]]:
    """Write `train.u8` and `test.u8`. Returns, for each split, the rows that could be read."""
    rows = {}
    unreadable: list[Path] = []
    total = sum(len(some) for some in files.values())
    with (
        ThreadPoolExecutor(os.cpu_count()) as pool,
        progress(total=total, desc="decoding images", unit="image", smoothing=0.1) as bar,
    ):
        for part, some in files.items():
            with open(folder / f"{part}.u8", "wb") as out:
                rows[part] = write_split(out, some, size, unreadable, pool, bar)
    if unreadable:
        print(f"{len(unreadable)} of {total} images could not be read and were skipped.")
    return rows


def write_split(
    out: BinaryIO,
    files: list[Path],
    size: int,
    unreadable: list[Path],
    pool: ThreadPoolExecutor,
    bar: tqdm,
) -> list[int]:
    """Append the pixels of one split to `out`, and what cannot be read to `unreadable`."""
    rows = []
    # One block after another, so that few decoded images wait in memory for their turn.
    for start in range(0, len(files), 1024):
        block = files[start : start + 1024]
        decoded = pool.map(read_image, block, repeat(size))
        for row, pixels in enumerate(decoded, start):
            if isinstance(pixels, Exception):
                unreadable.append(files[row])
                bar.write(f"skipped, cannot be read: {files[row]} ({pixels})")
            else:
                rows.append(row)
                out.write(pixels.tobytes())
        bar.update(len(block))
        if len(unreadable) > 0.01 * bar.total:
            raise UsageError(
                f"{len(unreadable)} of {bar.total} images cannot be read, more than 1 %, "
                f"the first is {unreadable[0]}; remove or mend them."
            )
    return rows
