"""The encoder for CPUs: a small residual network that reads 16x16 patches.

A CPU is best at products of large matrices, and nearly all the arithmetic here is of that kind. A
dense 3x3 convolution mixes neighbours and channels at once. Here a depthwise one first mixes
neighbours, each channel apart, which is little work; then a matrix mixes the channels at each
place. At equal seconds on two cores this did better than dense convolutions: compare `short` with
`third-whitened` in study/results/laptop_search.jsonl, each of one seed.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def small_backbone(drop_last_stage: bool = False) -> tuple[nn.Sequential, int]:
    """Patches `(P, 3, s, s)` to features `(P, width)`. Returns the network and its width.

    At 16x16 the first stage sees 8x8 places with 128 channels and the last one 4x4 places with 384.
    The features are the mean over the places: 384 of them, or 128 with `drop_last_stage` (S3L).
    """
    # A layer draws its first weights when it is made, so the order of these lines decides what a
    # seed stands for. The last stage is made even where it is left out, and before the first one,
    # which therefore starts from the same weights either way.
    last_stage = [
        *depthwise(128, stride=2),
        Pointwise(128, 384, bias=False),
        *normalise(384),
        residual(384),
        residual(384),
    ]
    # The patch is small, so its sides are halved at once: all else then costs a quarter. There are
    # only 27 numbers under each filter, so this convolution is dense and still cheap.
    first_stage = [
        nn.Conv2d(3, 128, 3, stride=2, padding=1, bias=False),
        *normalise(128),
        residual(128),
    ]
    stages = first_stage if drop_last_stage else first_stage + last_stage
    width = 128 if drop_last_stage else 384
    return nn.Sequential(*stages, nn.AdaptiveAvgPool2d(1), nn.Flatten()), width


def depthwise(width: int, stride: int) -> list[nn.Module]:
    """A 3x3 filter for each channel."""
    convolution = nn.Conv2d(width, width, 3, stride, padding=1, groups=width, bias=False)
    return [convolution, nn.BatchNorm2d(width)]


def normalise(width: int) -> list[nn.Module]:
    return [nn.BatchNorm2d(width), nn.ReLU(inplace=True)]


def residual(width: int) -> "Residual":
    """Mix the neighbours, then the channels, and add what came in."""
    return Residual(
        *depthwise(width, stride=1), Pointwise(width, width, bias=False), *normalise(width)
    )


class Residual(nn.Sequential):
    def forward(self, x: Tensor) -> Tensor:
        return x + super().forward(x)


class Pointwise(nn.Linear):
    """A 1x1 convolution as one product of matrices, whose backward pass is faster on a CPU.

    `(P, inputs, h, w) -> (P, outputs, h, w)`. Channels-last memory is what the product wants, so
    the two permutations move nothing.
    """

    def forward(self, x: Tensor) -> Tensor:
        places = x.permute(0, 2, 3, 1)  # (P, h, w, inputs)
        return super().forward(places).permute(0, 3, 1, 2)


@torch.no_grad()
def whiten(first: nn.Conv2d, images: Tensor, generator: torch.Generator | None = None) -> None:
    """Start a convolution with filters that whiten what it sees, from pixels and without labels.

    Neighbouring pixels are nearly equal, so random filters nearly all see the same thing, the
    local brightness. Whitening filters see different things equally strongly, from the first step.
    They gained about a point of accuracy (docs/laptop.md).

    first: a convolution with at least twice as many filters as there are numbers under a filter
        (27, for 3x3 and three channels); its weight is overwritten.
    images: `(N, 3, H, W)` uint8, to take the statistics from.
    generator: of the filters that are random mixtures.
    """
    # What lies under the filters, side by side without overlap: (N, 27, places).
    x = F.unfold(images.to(first.weight) / 127.5 - 1, first.kernel_size, stride=first.kernel_size)
    variance, components = torch.linalg.eigh(x.transpose(0, 1).flatten(1).cov())  # (27,), (27, 27)

    # A principal component divided by its deviation answers with variance 1. The small constant
    # keeps components that hold next to nothing, such as noise, from being blown up.
    filters = (components / (variance + 1e-3).sqrt()).T  # (27, 27), a filter a row

    # A ReLU lets only one sign through, so each filter comes with both.
    signs = torch.cat([filters, -filters])  # (54, 27)

    # The filters that remain are random mixtures, scaled to variance 1 too.
    remaining = len(first.weight) - len(signs)
    mixtures = torch.randn(remaining, len(filters), generator=generator) @ filters
    mixtures = mixtures / len(filters) ** 0.5
    first.weight.copy_(torch.cat([signs, mixtures]).view_as(first.weight))
