"""Images as a user's own code has them: paths, PIL images, arrays, tensors."""

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import repeat
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from empssl_support.cli import UsageError
from empssl_support.images import read_image, to_rgb, to_square

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
        return to_square(to_rgb(picture), size)
    except Exception as error:  # a PIL image reads its file only now
        raise UsageError(f"A PIL image cannot be read ({error}); give another.") from None
