"""Command lines and images that several test files use."""

import numpy as np
import torch
from PIL import Image

import empssl

TINY = (
    "--preset laptop --device cpu --patches 3 --batch 20 --hidden 16 --projector 16 --dim 8 "
    "--eval-patches 4 --precision float32"
).split()
SHAPES = ["--dataset", "shapes", "--subset", "60", *TINY]


def picture(path, value=0, size=(40, 30)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((size[1], size[0], 3), value, np.uint8)).save(path)


def small_encoder(hidden=16, dim=8):
    return empssl.Encoder("small", 16, hidden=hidden, projector=16, dim=dim)


def tiny_training(steps=10, **settings):
    """An encoder, images that fill so many batches and three more, and a config."""
    common = {"patches": 3, "batch": 8, "patch_size": 16, "lr": 0.1, "lam": 2.0}
    config = empssl.Config(**common | {"precision": "float32"} | settings)
    torch.manual_seed(5)
    encoder = small_encoder()
    chance = torch.Generator().manual_seed(5)
    shape = (steps * config.batch + 3, 3, 32, 32)
    return encoder, torch.randint(0, 256, shape, dtype=torch.uint8, generator=chance), config


class Watching(empssl.Objective):
    """EMP-SSL's objective, which keeps its losses and the images and patches that it was given."""

    def __init__(self, config):
        super().__init__(config.lam, config.eps2)
        self.losses, self.seen, self.patches = [], [], []

    def forward(self, z, x, index):
        loss, terms = super().forward(z, x, index)
        self.losses.append(loss.item())
        self.seen.append(index)
        self.patches.append(x)
        return loss, terms


def plain_folder(path, count=30, size=32):
    """A folder of images without labels."""
    path.mkdir(parents=True)
    for i in range(count):
        pixels = np.random.default_rng(i).integers(0, 256, (size, size, 3), np.uint8)
        Image.fromarray(pixels).save(path / f"{i:02}.png")
