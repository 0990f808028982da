"""Ten outlines drawn in memory: the data set that needs no network and no disk.

The class of an image is its outline. Its colours, stripes, grain, place, size, angle and
background are random, and so is which of figure and ground is the darker one. So raw pixels say
little about the class, and features that were learned can be told from those that were not.
"""

import functools
import math

import torch
import torch.nn.functional as F
from torch import Tensor

OUTLINES = (
    "disc",
    "ring",
    "triangle",
    "square",
    "cross",
    "star",
    "crescent",
    "bar",
    "half-disc",
    "frame",
)


@functools.cache
def shapes(
    train: int = 10_000, test: int = 2_000, size: int = 32
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The same images at every call: a training and a test set, each outline equally often.

    train, test: how many images; size: their side in pixels.
    Returns training images `(train, 3, size, size)` uint8 and labels `(train,)` int64, rows of
    `OUTLINES`, then both of the test set. Callers share these tensors and must not write to them.
    """
    chance = torch.Generator().manual_seed(0)
    labels = torch.arange(train + test) % len(OUTLINES)
    labels[:train] = labels[:train][torch.randperm(train, generator=chance)]
    # A thousand at a time, because the drawings are four times as large as the images.
    images = torch.cat([draw(some, size, chance) for some in labels.split(1000)])
    return images[:train], labels[:train], images[train:], labels[train:]


def draw(labels: Tensor, size: int, chance: torch.Generator) -> Tensor:
    """`labels (N,)` -> `(N, 3, size, size)` uint8, drawn at twice the size and averaged down.

    Every random number comes from `chance`, in the order of these lines: to change their order is
    to change the images.
    """
    N, side = len(labels), 2 * size

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        """Random numbers between `low` and `high` for each image: `(N, *shape, 1, 1)`."""
        return low + (high - low) * torch.rand(N, *shape, 1, 1, generator=chance)

    # The image reaches from -1 to 1 both ways.
    places = (torch.arange(side) + 0.5) / side * 2 - 1
    y = places.view(1, -1, 1)
    x = places.view(1, 1, -1)

    # The outline has a frame of its own, in which it reaches from -1 to 1: turned a little, smaller
    # than the image, and moved by no more than the room beside it.
    angle = uniform(-0.35, 0.35)
    cos, sin = angle.cos(), angle.sin()
    radius = uniform(0.55, 0.85)
    down = y - uniform(-1, 1) * (1 - radius)
    across = x - uniform(-1, 1) * (1 - radius)
    u = (across * cos + down * sin) / radius  # (N, side, side)
    v = (down * cos - across * sin) / radius
    inside = outlines(u, v)[labels, torch.arange(N)].unsqueeze(1)  # (N, 1, side, side)

    def texture(brightness: float) -> Tensor:
        """A colour with stripes and grain: `(N, 3, side, side)`."""
        direction = uniform(0, math.pi)
        frequency = uniform(2, 12)
        phase = uniform(0, 2 * math.pi)
        along = x * direction.cos() + y * direction.sin()
        stripes = torch.sin(along * frequency * math.pi + phase).unsqueeze(1)
        grain = torch.randn(N, 1, side, side, generator=chance)
        grain = grain * uniform(0, 0.05, 1)
        colour = brightness + uniform(-0.2, 0.2, 3)  # (N, 3, 1, 1)
        stripes = stripes * uniform(0, 0.1, 1)
        return colour + stripes * uniform(-1, 1, 3) + grain

    dark = texture(0.3)
    light = texture(0.7)
    dark_figure = uniform(0, 1, 1) < 0.5
    figure = torch.where(dark_figure, dark, light)
    ground = torch.where(dark_figure, light, dark)
    pixels = torch.where(inside, figure, ground).clamp(0, 1)
    return F.avg_pool2d(pixels, 2).mul(255).round().to(torch.uint8)


def outlines(u: Tensor, v: Tensor) -> Tensor:
    """Which places `(N, side, side)` lie inside each outline: `(10, N, side, side)` bool.

    u runs to the right and v down, from -1 to 1 over the square that holds the outline.
    """
    r = (u * u + v * v).sqrt()
    theta = torch.atan2(v, u)
    # The distances to the middle along the farther and along the nearer axis.
    far = torch.maximum(u.abs(), v.abs())
    near = torch.minimum(u.abs(), v.abs())
    # The squared distance to the middle of the disc that is bitten out of the crescent.
    to_the_bite = (u - 0.5) ** 2 + v * v

    def fold(k: int) -> Tensor:
        """The angle to the middle of the sector that a place lies in, of k equal ones."""
        sector = 2 * math.pi / k
        return torch.remainder(theta, sector) - math.pi / k

    inside = {
        "disc": r < 0.9,
        "ring": (r < 0.95) & (r > 0.6),
        "triangle": r * fold(3).cos() < 0.5,
        "square": far < 0.75,
        "cross": (far < 0.95) & (near < 0.25),
        "star": r < 0.38 + 0.62 * fold(5).abs() * 5 / math.pi,
        "crescent": (r < 0.95) & (to_the_bite > 0.56),
        "bar": (u.abs() < 1) & (v.abs() < 0.25),
        "half-disc": (r < 1) & (u > 0),
        "frame": (far < 0.8) & (far > 0.5),
    }
    return torch.stack([inside[name] for name in OUTLINES])
