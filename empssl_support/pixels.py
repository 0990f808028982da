"""What is done to a patch's pixels, in plain PyTorch: `extract_patches_ref`.

The compiled op does the same (csrc/pixel.h); so does `torchvision.transforms.v2.functional`, patch
by patch, on float images. Pixels lie in [0, 1] on the way, and are scaled to [-1, 1] at the end.
"""

import itertools

import torch
from torch import Tensor

# The numbers that describe a patch, in the order in which they stand in `params (n, b, K)`.
COLUMNS = (
    "top",
    "left",
    "height",
    "width",
    "flip",
    "brightness",
    "contrast",
    "saturation",
    "hue",
    "order",
    "grey",
    "sigma",
    "solarize",
)
K = len(COLUMNS)

# The orders of brightness, contrast, saturation and hue, (24, 4): `order` is the number of a row.
ORDERS = torch.tensor(list(itertools.permutations(range(4))))

# Temporaries of so many numbers a channel stay in a CPU's cache, or within a GPU's memory.
CHUNK = {"cpu": 2**19, "cuda": 2**24}


def extract_patches_ref(
    images: Tensor, index: Tensor, params: Tensor, s: int, dtype: torch.dtype = torch.float32
) -> Tensor:
    """`extract_patches` in PyTorch: `(n*b, 3, s, s)`, patch-major. Arguments are not checked.

    Computes in float32, or in float64 where that is the `dtype`.
    """
    n, b, _ = params.shape
    device = images.device
    compute = torch.float64 if dtype == torch.float64 else torch.float32
    params = params.to(device, compute).flatten(0, 1)  # (n*b, K)
    index = index.to(device).repeat(n)  # (n*b,)
    out = empty_patches(n * b, s, dtype, device)
    _, _, H, W = images.shape
    pixels = max(s * s, H * W)
    chunk = max(1, CHUNK.get(device.type, 2**24) // pixels)
    for rows in torch.arange(n * b, device=device).split(chunk):
        x = images[index[rows]].to(compute) / 255  # (P, 3, H, W) in [0, 1]
        columns = params[rows].unbind(1)  # each (P,)
        p = dict(zip(COLUMNS, columns, strict=True))
        out[rows] = augmented(x, p, s).to(dtype)
    return out


def empty_patches(count: int, s: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    shape = (count, 3, s, s)
    return torch.empty(shape, dtype=dtype, device=device, memory_format=torch.channels_last)


def augmented(x: Tensor, p: dict[str, Tensor], s: int) -> Tensor:
    """Images `(P, 3, H, W)` in [0, 1] and the numbers of a patch of each -> `(P, 3, s, s)`."""
    # Crop, resize and flip are one product with a matrix on either side of the image.
    _, _, H, W = x.shape
    down = crop_weights(p["top"], p["height"], H, s)  # (P, s, H)
    across = crop_weights(p["left"], p["width"], W, s)  # (P, s, W)
    across = torch.where(per_pixel(p["flip"] > 0, 3), across.flip(1), across)
    x = rows_and_columns(down, x, across)  # (P, 3, s, s)

    # Jitter: four steps, and in each of them every patch has the operation of its own order.
    orders = ORDERS.to(x.device)
    order = orders[p["order"].long()]  # (P, 4)
    for operation_of_patch in order.unbind(1):
        for operation, (name, neutral, change) in enumerate(JITTER):
            acts = p[name] != neutral
            here = acts & (operation_of_patch == operation)
            factor = per_pixel(p[name][here])
            x[here] = change(x[here], factor)

    x = torch.where(per_pixel(p["grey"] > 0), greyscale(x), x)

    here = p["sigma"] > 0
    blur = blur_weights(p["sigma"][here], s)  # (P', s, s)
    x[here] = rows_and_columns(blur, x[here], blur)

    solarized = per_pixel(p["solarize"] > 0)
    bright = x >= 128 / 255
    x = torch.where(solarized & bright, 1 - x, x)
    return x * 2 - 1


def per_pixel(value: Tensor, ndim: int = 4) -> Tensor:
    """`(P,) -> (P, 1, 1, 1)`: one value a patch, for each of its pixels."""
    return value.view(-1, *[1] * (ndim - 1))


def rows_and_columns(down: Tensor, x: Tensor, across: Tensor) -> Tensor:
    """`down @ x @ across^T`: `(P, s, H), (P, 3, H, W), (P, s, W) -> (P, 3, s, s)`."""
    P, C, H, W = x.shape
    rows = x.reshape(P, C * H, W)
    x = torch.bmm(rows, across.mT)  # (P, C*H, s)
    x = x.view(P, C, H, across.shape[1])
    return torch.matmul(down.unsqueeze(1), x)


def crop_weights(start: Tensor, length: Tensor, side: int, s: int) -> Tensor:
    """Rows that cut `[start, start + length)` out of `side` pixels and resize it to `s`.

    `(P,), (P,) -> (P, s, side)`. Bilinear, antialiased when shrinking: the triangle filter of
    torchvision's `resize(..., antialias=True)`.
    """
    start, length = per_pixel(start, 3), per_pixel(length, 3)  # (P, 1, 1)
    scale = length / s
    place = torch.arange(s, device=start.device, dtype=start.dtype)
    place = place.view(1, s, 1)
    centre = (place + 0.5) * scale  # of an output pixel, measured in the crop: (P, s, 1)
    pixel = torch.arange(side, device=start.device, dtype=start.dtype)
    pixel = pixel - start  # of the image, measured in the crop: (P, 1, side)
    distance = (pixel + 0.5 - centre).abs()
    weight = 1 - distance / scale.clamp(min=1)
    weight = weight.clamp(min=0)
    inside = (pixel >= 0) & (pixel < length)
    weight = torch.where(inside, weight, 0.0)
    return weight / weight.sum(-1, keepdim=True)


def blur_weights(sigma: Tensor, s: int, radius: int = 6) -> Tensor:
    """Rows that blur s pixels: 13 Gaussian taps, reflected at the borders, `(P,) -> (P, s, s)`."""
    P = len(sigma)
    tap = torch.arange(-radius, radius + 1, device=sigma.device)
    exponent = -0.5 * (tap / sigma.view(P, 1)) ** 2
    weight = torch.softmax(exponent, dim=1)  # (P, 13)
    weight = weight.unsqueeze(1).expand(P, s, -1)

    # Which pixel each tap meets: walk back and forth between the two borders.
    period = max(2 * (s - 1), 1)
    pixel = torch.arange(s, device=sigma.device)
    pixel = pixel.view(s, 1) + tap  # (s, 13)
    pixel = pixel.remainder(period)
    pixel = torch.minimum(pixel, period - pixel)
    pixel = pixel.clamp(max=s - 1).expand(P, s, -1)

    rows = torch.zeros(P, s, s, dtype=sigma.dtype, device=sigma.device)
    return rows.scatter_add_(2, pixel, weight)


# ---- colour: x (P, 3, s, s) in [0, 1], a factor or shift (P, 1, 1, 1) of each patch ----


def greyscale(x: Tensor) -> Tensor:
    """`(P, 3, s, s) -> (P, 1, s, s)`: ITU-R 601 luma, with torchvision's weights."""
    red, green, blue = x.unbind(1)
    return (0.2989 * red + 0.587 * green + 0.114 * blue).unsqueeze(1)


def blend(x: Tensor, other: Tensor, factor: Tensor) -> Tensor:
    return (factor * x + (1 - factor) * other).clamp(0, 1)


def change_brightness(x: Tensor, factor: Tensor) -> Tensor:
    return (factor * x).clamp(0, 1)


def change_contrast(x: Tensor, factor: Tensor) -> Tensor:
    mean = greyscale(x).mean((2, 3), keepdim=True)
    return blend(x, mean, factor)


def change_saturation(x: Tensor, factor: Tensor) -> Tensor:
    return blend(x, greyscale(x), factor)


def rotate_hue(x: Tensor, shift: Tensor) -> Tensor:
    """Through HSV and back: value = max and chroma = max - min stay, the hue moves.

    The hue is counted in sixths of the colour circle; `shift` is a share of the whole circle.
    """
    red, green, blue = x.unbind(1)
    value = x.amax(1)
    chroma = value - x.amin(1)
    c = torch.where(chroma > 0, chroma, 1.0)
    hue = 4 + (red - green) / c
    hue = torch.where(value == green, 2 + (blue - red) / c, hue)
    hue = torch.where(value == red, (green - blue) / c, hue)
    hue = torch.where(chroma > 0, hue, 0.0)
    hue = hue + 6 * shift.squeeze(1)
    channels = []
    for offset in (5, 3, 1):  # red, green, blue
        # Counted so that the channel is lowest where `place` is 2, and highest from 4 round to 0.
        place = (hue + offset).remainder(6)
        share = torch.minimum(place, 4 - place).clamp(0, 1)
        channels.append(value - chroma * share)
    return torch.stack(channels, 1)


# In the order of the codes in `ORDERS`: the column, its value that changes nothing, the operation.
JITTER = (
    ("brightness", 1, change_brightness),
    ("contrast", 1, change_contrast),
    ("saturation", 1, change_saturation),
    ("hue", 0, rotate_hue),
)
