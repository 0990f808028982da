"""The encoder for CPUs: a small residual network that reads 16x16 patches.

A dense 3x3 convolution does so much arithmetic with each number that it reads that a CPU's vector
units are kept busy. In as many epochs it did better than depthwise convolutions, which have less
arithmetic and mostly wait for memory (docs/laptop.md).
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def small_backbone(drop_last_stage: bool = False) -> tuple[nn.Sequential, int]:
    """Patches `(P, 3, s, s)` to features `(P, width)`. Returns the network and its width.

    At 16x16 the first stage sees 8x8 places with 64 channels and the last one 4x4 places with 256.
    The features are the mean over the places: 256 of them, or 64 with `drop_last_stage` (S3L).
    """
    # The patch is small, so its sides are halved at once: all else then costs a quarter.
    stages = [
        *convolution(3, 64, stride=2),
        residual(64),
    ]
    width = 64
    if not drop_last_stage:
        stages += [
            *convolution(64, 256, stride=2),
            residual(256),
            residual(256),
        ]
        width = 256
    return nn.Sequential(*stages, nn.AdaptiveAvgPool2d(1), nn.Flatten()), width


def convolution(inputs: int, outputs: int, stride: int) -> list[nn.Module]:
    """3x3, with BatchNorm and ReLU."""
    return [
        nn.Conv2d(
            inputs,
            outputs,
            kernel_size=3,
            stride=stride,
            padding=1,
            bias=False,
        ),
        nn.BatchNorm2d(outputs),
        nn.ReLU(inplace=True),
    ]


def residual(width: int) -> "Residual":
    """A convolution whose result is added to what came in."""
    return Residual(*convolution(width, width, stride=1))


class Residual(nn.Sequential):
    def forward(self, x: Tensor) -> Tensor:
        return x + super().forward(x)


@torch.no_grad()
def whiten(first: nn.Conv2d, images: Tensor, generator: torch.Generator | None = None) -> None:
    """Start a convolution with filters that whiten what it sees, from pixels and without labels.

    Neighbouring pixels are nearly equal, so random filters nearly all see the same thing, the
    local brightness. Whitening filters see different things equally strongly, from the first step.

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
