"""Single images as squares of pixels: of a file, and as a user's own code has them."""

import contextlib
import errno
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import repeat
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from empssl_support.cli import UsageError

KNOWN = "give paths, PIL images, uint8 tensors (3, H, W) or uint8 arrays (H, W, 3)"


def as_images(images, size: int) -> Tensor:
    """Images of any sizes and kinds -> `(N, 3, size, size)` uint8 on the CPU.

    images: a path, a PIL image, a uint8 tensor `(3, H, W)` or `(N, 3, H, W)`, a uint8 array
        `(H, W, 3)` or `(N, H, W, 3)`, with values 0 to 255, or a list of these.
    size: as for a folder's images, the shorter side becomes that, and the centre is cut out.

    Raises `UsageError` where there are none, where one cannot be read, and for another kind.
    """
    singles = list(one_by_one(images))
    if not singles:
        raise UsageError("There are no images in what was given; give at least one.")
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return torch.from_numpy(np.stack([*pool.map(read_one, singles, repeat(size))]))


def one_by_one(images) -> Iterator[str | Path | Image.Image | np.ndarray]:
    """Each image of what the user gave, as a path, a PIL image or an array `(H, W, 3)` uint8."""
    if isinstance(images, (list, tuple)):
        for some in images:
            yield from one_by_one(some)
    elif isinstance(images, Tensor):
        if images.ndim not in (3, 4) or images.shape[-3] != 3:
            raise UsageError(f"A tensor of images has the shape {tuple(images.shape)}; {KNOWN}.")
        yield from one_by_one(images.detach().cpu().movedim(-3, -1).numpy())
    elif isinstance(images, np.ndarray):
        check_array(images)
        yield from images if images.ndim == 4 else [images]
    elif isinstance(images, (str, Path, Image.Image)):
        yield images
    else:
        raise UsageError(f"An image is a {type(images).__name__}; {KNOWN}.")


def check_array(images: np.ndarray) -> None:
    if images.dtype != np.uint8:
        raise UsageError(f"The pixels are {images.dtype}; give uint8, with values from 0 to 255.")
    if images.ndim not in (3, 4) or images.shape[-1] != 3 or 0 in images.shape[-3:]:
        raise UsageError(f"An array of images has the shape {images.shape}; {KNOWN}.")


def read_one(image: str | Path | Image.Image | np.ndarray, size: int) -> np.ndarray:
    """`(3, size, size)` uint8."""
    if isinstance(image, (str, Path)):
        pixels = read_image(Path(image), size)
        if isinstance(pixels, Exception):
            raise UsageError(f"{image} cannot be read as an image ({pixels}); give another.")
        return pixels
    try:
        picture = Image.fromarray(image) if isinstance(image, np.ndarray) else image
        return to_square(picture.copy(), size)
    except Exception as error:  # a PIL image reads its file only now
        raise UsageError(f"A PIL image cannot be read ({error}); give another.") from None


# ---- one image ----


# Errors of the machine, not of an image.
MACHINES = {errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.EMFILE, errno.ENFILE, errno.ENOMEM}


def read_image(file: Path, size: int) -> np.ndarray | Exception:
    """One image as `(3, size, size)` uint8 RGB, or what is wrong with it.

    Raises what is the machine's fault, since the image may be there the next time.
    """
    try:
        with Image.open(file) as image:
            return to_square(image, size)
    except MemoryError:
        raise
    except Exception as error:  # decoders raise all kinds; the caller names the file
        if getattr(error, "errno", None) in MACHINES:
            error.filename = error.filename or str(file)
            raise
        return error


def to_square(image: Image.Image, size: int) -> np.ndarray:
    """`(3, size, size)` uint8 RGB. A JPEG that is not decoded yet may be left reduced."""
    image = without_long_ends(image)
    # The shorter side becomes `size`; then the centre is cut out.
    scale = size / min(image.size)
    width, height = (max(size, round(side * scale)) for side in image.size)
    # A JPEG can be decoded at 1/2, 1/4 or 1/8 of its size: 12 megapixels in a sixth of the
    # time. Where it is then still three times as large, a pixel of a photograph moves by
    # 0.4 of 255 levels in the mean or less; at twice as large it would be 0.7.
    reduced = image.draft(None, (3 * width, 3 * height))
    image = to_rgb(image)
    # Where its sides are no multiples of 8, the last of the reduced pixels are not whole.
    whole = reduced[1] if reduced else None
    image = image.resize((width, height), Image.Resampling.BILINEAR, whole)
    # A camera may note how it was held and leave the pixels as they were.
    image = ImageOps.exif_transpose(image)
    left, top = (image.width - size) // 2, (image.height - size) // 2
    image = image.crop((left, top, left + size, top + size))
    return np.asarray(image).transpose(2, 0, 1)


def without_long_ends(image: Image.Image, most: int = 8) -> Image.Image:
    """The middle of an image that is more than `most` times as long as wide.

    Of a line of 3,000 pixels, a single one high, all would be enlarged to gigabytes.
    """
    longest = most * min(image.size)
    if max(image.size) <= longest:
        return image
    width, height = (min(side, longest) for side in image.size)
    left, top = (image.width - width) // 2, (image.height - height) // 2
    return image.crop((left, top, left + width, top + height))


def to_rgb(image: Image.Image) -> Image.Image:
    """8-bit RGB."""
    if image.mode == "F":
        raise ValueError("its pixels are floating-point numbers")
    if image.mode.startswith("I"):
        # Of 16 bits the upper eight are kept. PIL would cut all values off at 255.
        upper = np.asarray(image).clip(0, 65535) >> 8
        about = image.info
        image = Image.fromarray(upper.astype(np.uint8))
        image.info = about
    return image.convert("RGB")


def shorter_side(files: list[Path]) -> int:
    """Of the first image that can be opened, in pixels."""
    for file in files:
        # Those that cannot are counted and named when all are decoded.
        with contextlib.suppress(Exception), Image.open(file) as image:
            return min(image.size)
    raise UsageError(f"None of the {len(files)} image files can be read, for instance {files[0]}.")
