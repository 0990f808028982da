"""Files that are written whole or not at all, and read with care."""

import contextlib
import csv
import io
import os
import zipfile
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from empssl_support.cli import UsageError


@contextlib.contextmanager
def named(path: Path):
    """An error of the disk says which file, which that of a write or a flush does not."""
    try:
        yield
    except OSError as error:
        error.filename = error.filename or str(path)
        raise


def write_whole(path: Path, write, before=None) -> None:
    """Call `write(file)` on a temporary file beside `path`, flush it, and put it in `path`'s place.

    `before()` is called just before that last act.
    """
    scratch = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with named(path):
            with open(scratch, "wb") as out:
                write(out)
                out.flush()
                os.fsync(out.fileno())
            if before:
                before()
            os.replace(scratch, path)
            flush_folder(path.parent)
    finally:
        scratch.unlink(missing_ok=True)


def flush_folder(folder: Path) -> None:
    """Have the new name on disk too; Windows cannot, and need not."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)


def write_text(path: Path, text: str) -> None:
    write_whole(path, lambda out: out.write(text.encode()))


def write_torch(path: Path, content: dict, before=None) -> None:
    """`torch.save` by way of memory: straight to a full disk it raises an error of its own."""
    buffer = io.BytesIO()
    torch.save(content, buffer)
    write_whole(path, lambda out: out.write(buffer.getbuffer()), before)


def save_encoder(path: Path, encoder: nn.Module) -> None:
    """Plain tensors and numbers, so that `torch.load(path, weights_only=True)` reads it."""
    weights = {name: value.detach().cpu() for name, value in encoder.state_dict().items()}
    content = {"architecture": encoder.architecture, "image_size": encoder.image_size}
    write_torch(path, content | {"weights": weights})


def read_encoder(path: str | Path) -> dict:
    """What `save_encoder` wrote: `architecture`, a dict of settings, `image_size`, and `weights`.

    Older files do not say the size of the images. Then it is twice the patch's side: the size of an
    image whose crops, a quarter of it, need not be resized. Raises `UsageError` where `path` is
    something else; runs no code from the file.
    """
    if not Path(path).is_file():
        raise UsageError(f"There is no checkpoint {path}; give the encoder.pt of a run.")
    expected = {
        "backbone": str,
        "patch_size": int,
        "hidden": int,
        "projector": int,
        "dim": int,
        "drop_last_stage": bool,
    }
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
        kinds = {name: type(value) for name, value in content["architecture"].items()}
        ours = kinds == expected and isinstance(content["weights"], dict)
        s = content["architecture"]["patch_size"]
        content.setdefault("image_size", 2 * s)
        ours = ours and type(content["image_size"]) is int
        ours = ours and 1 <= s <= 4096 and 1 <= content["image_size"] <= 8192
    except (PermissionError, MemoryError):  # no fault of what is in the file
        raise
    except Exception:  # random bytes, a pickle with code in it, another program's file
        ours = False
    if not ours:
        raise UsageError(
            f"{path} is no encoder that this program saved; give the encoder.pt of a run."
        )
    return content


def read_checkpoint(path: Path) -> dict | None:
    """A checkpoint, or None where the file is cut short, damaged, or not ours."""
    try:
        # Every part of the archive has a checksum, which torch.load does not look at.
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
        state = torch.load(path, map_location="cpu", weights_only=True)
        return None if damaged else state | {"step": int(state["step"])}
    except (OSError, MemoryError):  # the disk's or this machine's fault, not the file's
        raise
    except Exception:
        return None


def write_features(path: Path, **arrays) -> None:
    """Tensors or lists as an uncompressed `.npz`; those that are None are left out."""
    there = {name: value for name, value in arrays.items() if value is not None}
    for name, value in there.items():
        there[name] = value.cpu().numpy() if isinstance(value, Tensor) else np.asarray(value)
    write_whole(path, lambda out: np.savez(out, **there))


def halved(x: Tensor) -> Tensor:
    """In float16 to save room, or as it is where float16 would make a number infinite."""
    half = x.half()
    return half if half.isfinite().all() else x


def write_table(path: Path, header: list[str], rows) -> None:
    """Rows of words and numbers as a `.csv`, UTF-8; file names that are no text too."""

    def write(out):
        text = io.TextIOWrapper(out, "utf-8", errors="backslashreplace", newline="")
        table = csv.writer(text)
        table.writerow(header)
        table.writerows(rows)
        text.detach()  # which flushes it, and leaves `out` open

    write_whole(path, write)
