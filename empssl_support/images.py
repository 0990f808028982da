"""A folder's images, decoded once into a cache and mapped into memory from then on.

Training needs any image at any moment, many times over. Pixels that lie decoded in one flat file
can be had like that without worker processes, and without more memory than a batch takes.
"""

import bisect
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
from torch import Tensor

from empssl_support.cli import UsageError, progress
from empssl_support.files import flush_folder, named, write_text
from empssl_support.pictures import read_image, shorter_side

CACHE = Path("runs") / ".cache"
# Endings of the files that count as images.
SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")
# A number to raise when files come out as other pixels than before: all are then decoded again.
DECODING = 2


class Split(NamedTuple):
    """The images of one split that could be read."""

    images: Tensor | None  # (N, 3, size, size) uint8, memory-mapped; None where N is 0
    rows: list[int]  # (N,) which of the split's files they are, rising


class Cached(NamedTuple):
    """What a cache holds. Files are counted through both splits, first training, then test."""

    pixels: Tensor  # (N, 3, size, size) uint8, memory-mapped
    rows: list[int]  # (N,) which files they are, rising; the others could not be read
    facts: list[str]  # what `fact` said of each file, readable or not


def decode_once(
    folder: Path, files: dict[str, list[Path]], size: int | None
) -> tuple[dict[str, Split], str]:
    """A folder's images as two memory-mapped uint8 tensors, each decoded by the first call alone.

    The first call writes all pixels into one flat file below `runs/.cache`. It and all later calls
    map this file into memory: a batch's pixels are read from the disk when they are asked for, and
    the system keeps as many of them as it has room for.

    The cache's name holds a fingerprint of the images' paths, sizes and dates. So when a file
    changes, is added or goes, no cache of the right name is found, and a new one is made: what has
    not changed is copied from the old one, the rest decoded. An old cache is never written to, as
    another process may have it mapped; it is deleted when the new one is whole. Until then both
    are on the disk.

    folder: the images' folder; the cache is named after it.
    files: the paths of both splits, as `{"train": [...], "test": [...]}`; those of test may be
        none.
    size: side of the square images in pixels. The shorter side of an image is resized to it and the
        centre is cut out. None: the first training image's shorter side, at most 224.

    Returns both splits, and the fingerprint, which changes when any image does.
    Raises `UsageError` where there is no training image, where more than 1 % of the files cannot be
    read, or none of a split, and where the disk has no room; `OSError` where the cache cannot be
    written.
    """
    size = side_of_squares(folder, files["train"], size)
    both = [*files["train"], *files["test"]]
    facts = [fact(file, folder) for file in both]
    key = fingerprint(folder, facts, size)
    cache = cache_folder(folder, size, key)
    cached = open_cache(cache, size)
    if cached is None:
        fill_cache(cache, both, facts, size)
        cached = open_cache(cache, size)
    if cached is None:
        raise UsageError(f"{cache} is damaged and cannot be replaced; delete it.")
    delete_others(cache)
    splits = split(cached, len(files["train"]))
    for part, (images, _) in splits.items():
        if files[part] and images is None:
            raise UsageError(
                f"No image of the {part} split of {folder} can be read, "
                f"for instance {files[part][0]}; mend them."
            )
    return splits, key


def split(cached: Cached, train: int) -> dict[str, Split]:
    """The first `train` files, and those after them."""
    pixels, rows, _ = cached
    cut = bisect.bisect_left(rows, train)
    test_rows = [row - train for row in rows[cut:]]
    return {
        "train": Split(pixels[:cut] if cut else None, rows[:cut]),
        "test": Split(pixels[cut:] if test_rows else None, test_rows),
    }


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
    facts = [fact(file, folder) for some in files.values() for file in some]
    return splits, fingerprint(folder, facts, size)


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
    found: list[str] = []
    seen: set[str] = set()
    for root, folders, names in os.walk(folder, onerror=refuse, followlinks=True):
        real = os.path.realpath(root)
        if real in seen:
            folders.clear()
            continue
        seen.add(real)
        # os.walk goes on into what is left in this list.
        folders[:] = [name for name in folders if not name.startswith(".")]
        found += [os.path.join(root, name) for name in names if is_image(name)]
    # As paths compare, part by part, and several times as fast.
    found.sort(key=lambda file: file.split(os.sep))
    return [Path(file) for file in found]


def refuse(error: OSError) -> None:
    """A folder that may not be read would otherwise be passed over, and a class go missing."""
    raise error


def is_image(name: str) -> bool:
    return name.lower().endswith(SUFFIXES) and not name.startswith(".")


def fact(file: Path, folder: Path) -> str:
    """32 hexadecimal digits that change when the file's place in `folder`, size or date does.

    Its dates are when it was written, and when anything about it changed: a file that takes
    another's place has kept the first, and a file that may now be read too.
    """
    known = [str(DECODING), *file.parts[len(folder.parts) :]]
    with contextlib.suppress(OSError):  # a link to nothing is found unreadable later
        state = file.stat()
        known += [str(state.st_size), str(state.st_mtime_ns), str(state.st_ctime_ns)]
    return hashlib.sha256(os.fsencode("\0".join(known))).hexdigest()[:32]


def fingerprint(folder: Path, facts: list[str], size: int) -> str:
    """64 hexadecimal digits that change when any file does, or what is made of it."""
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


# ---- the cache: a folder with images.u8 and meta.json, there as a whole or not at all ----


def open_cache(cache: Path, size: int) -> Cached | None:
    """What it holds, the pixels still on disk; None where `cache` is missing or damaged."""
    try:
        meta = json.loads((cache / "meta.json").read_text())
        rows, facts = meta["rows"], meta["facts"]
        return Cached(map_pixels(cache / "images.u8", len(rows), size), rows, facts)
    except (OSError, ValueError, KeyError, TypeError):
        return None


def map_pixels(file: Path, N: int, size: int) -> Tensor:
    """`(N, 3, size, size)` uint8 over the bytes of `file`, which is not read now.

    Raises `ValueError` where the file is empty or not exactly as long as that.
    """
    pixels = np.memmap(file, np.uint8, mode="r").reshape(N, 3, size, size)
    with warnings.catch_warnings():
        # The file is mapped for reading only, and nobody writes into a data set.
        warnings.filterwarnings("ignore", "The given NumPy array is not writable")
        return torch.from_numpy(pixels)


def fill_cache(cache: Path, files: list[Path], facts: list[str], size: int) -> None:
    """Copy or decode all files into `cache`, or leave nothing behind.

    A scratch folder is filled first and gets its real name at the end, so that whoever finds a
    cache finds all of it.
    """
    clear_scratch(cache.parent)
    # Its file stays mapped, whoever may delete it meanwhile.
    known = known_pixels(newest_cache(cache, size))
    copied = sum(fact in known for fact in facts)
    announce(cache, len(files), copied, size)
    scratch = cache.with_name(f".decoding-{socket.gethostname()}-{os.getpid()}")
    scratch.mkdir(parents=True, exist_ok=True)
    try:
        pixels = scratch / "images.u8"
        with named(pixels), open(pixels, "wb") as out:
            rows = write_pixels(out, files, facts, known, size)
            # All is on the disk, in case the machine stops, before it has a name.
            out.flush()
            os.fsync(out.fileno())
        write_text(scratch / "meta.json", json.dumps({"rows": rows, "facts": facts}))
        try:
            os.replace(scratch, cache)
        except OSError:
            # Another process may have decoded the same images meanwhile. Then its cache will do.
            if not (cache / "meta.json").is_file():
                raise
        flush_folder(cache.parent)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def same_folder(cache: Path) -> list[Path]:
    """The caches of the same folder and size, this one too if it is there, the newest first."""
    name, _, _ = cache.name.rpartition("-")
    dates = {}
    for found in cache.parent.glob(f"{name}-*"):
        with contextlib.suppress(FileNotFoundError):  # another process may have deleted it
            dates[found] = found.stat().st_mtime
    return sorted(dates, key=dates.get, reverse=True)


def newest_cache(cache: Path, size: int) -> Cached | None:
    """That of the folder before it changed. Those that are damaged are deleted."""
    for old in same_folder(cache):
        if found := open_cache(old, size):
            return found
        shutil.rmtree(old, ignore_errors=True)
    return None


def known_pixels(old: Cached | None) -> dict[str, np.ndarray | None]:
    """Of each file, by its fact, the pixels `(3, size, size)`; None where it could not be read."""
    if old is None:
        return {}
    known = dict.fromkeys(old.facts)
    for row, pixels in zip(old.rows, old.pixels.numpy(), strict=True):
        known[old.facts[row]] = pixels
    return known


def delete_others(cache: Path) -> None:
    """What was cached of the same folder before it changed. Who has it mapped keeps it."""
    for old in same_folder(cache):
        if old != cache:
            shutil.rmtree(old, ignore_errors=True)


def clear_scratch(caches: Path) -> None:
    """Delete what killed processes left behind."""
    for scratch in caches.glob(".decoding-*"):
        # Another process may be at work in it, or be done and rename it at this moment.
        with contextlib.suppress(FileNotFoundError):
            touched = max(path.stat().st_mtime for path in [scratch, *scratch.iterdir()])
            if time.time() - touched > 3600:
                shutil.rmtree(scratch, ignore_errors=True)


def announce(cache: Path, N: int, copied: int, size: int) -> None:
    """Say what the cache of `N` images takes, and refuse it where the disk has no room."""
    needed = 3 * N * size**2
    there = next(place for place in cache.absolute().parents if place.exists())
    free = shutil.disk_usage(there).free
    if needed > free:
        raise UsageError(
            f"The pixels of {N:,} images of {size}x{size} take {in_bytes(needed)}, and there are "
            f"{in_bytes(free)} free for {cache.parent}; make room, for instance by deleting what "
            f"is in there, or give a smaller --image-size."
        )
    print(
        f"the pixels of {N:,} images of {size}x{size} go to {cache}: "
        f"{in_bytes(needed)}, of {in_bytes(free)} free"
    )
    if copied:
        print(f"{copied:,} of them are copied from the cache before, which is deleted then")


def in_bytes(number: int) -> str:
    if number < 1e6:
        return f"{number / 1e3:.1f} kB"
    return f"{number / 1e6:.1f} MB" if number < 1e9 else f"{number / 1e9:,.1f} GB"


def write_pixels(
    out: BinaryIO,
    files: list[Path],
    facts: list[str],
    known: dict[str, np.ndarray | None],
    size: int,
) -> list[int]:
    """Write all files' pixels to `out`, one after another. Returns which could be read."""
    rows: list[int] = []
    unreadable: list[Path] = []
    with (
        ThreadPoolExecutor(os.cpu_count()) as pool,
        progress(total=len(files), desc="decoding images", unit="image", smoothing=0.1) as bar,
    ):
        # One block after another, so that few decoded images wait in memory for their turn.
        for start in range(0, len(files), 1024):
            block = range(start, min(start + 1024, len(files)))
            new = [files[row] for row in block if facts[row] not in known]
            decoded = pool.map(read_image, new, repeat(size))
            for row in block:
                pixels = known[facts[row]] if facts[row] in known else next(decoded)
                if isinstance(pixels, np.ndarray):
                    rows.append(row)
                    out.write(pixels.tobytes())
                    continue
                unreadable.append(files[row])
                if pixels is not None:  # else it was told when it was tried
                    bar.write(f"skipped, cannot be read: {files[row]} ({pixels})")
            bar.update(len(block))
            refuse_too_many(unreadable, len(files))
    if unreadable:
        print(f"{len(unreadable)} of {len(files)} images could not be read and were skipped.")
    return rows


def refuse_too_many(unreadable: list[Path], total: int) -> None:
    if len(unreadable) > 0.01 * total:
        raise UsageError(
            f"{len(unreadable)} of {total} images cannot be read, more than 1 %, "
            f"the first is {unreadable[0]}; remove or mend them."
        )
