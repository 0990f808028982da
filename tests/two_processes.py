"""Run by torchrun, in each process: train, and write what this process has come to."""

import sys

import torch
import torch.nn as nn

import empssl
from empssl_support.processes import from_first, join_processes, leave_processes, rank


class Plain(empssl.Encoder):
    """No BatchNorm, so that an image's embedding depends on that image alone."""

    def __init__(self):
        super().__init__("small", 16, hidden=12, projector=12, dim=8)
        self.backbone = nn.Sequential(nn.Conv2d(3, 6, 4, stride=4), nn.ReLU(), nn.Flatten())
        self.represent = nn.Sequential(nn.Linear(96, 12), nn.ReLU())
        self.project = nn.Linear(12, 8)


class Watching(empssl.Objective):
    """EMP-SSL's objective, which keeps what it was called with."""

    def __init__(self, lam):
        super().__init__(lam)
        self.losses = []
        self.patches = []

    def forward(self, z, x, index):
        loss, terms = super().forward(z, x, index)
        self.losses.append(loss.item())
        self.patches.append(x)
        return loss, terms


def training(steps: int) -> dict:
    torch.manual_seed(0)
    encoder, objective, gradients = Plain(), Watching(lam=2.0), []
    images = torch.randint(0, 256, (8 * steps, 3, 32, 32), dtype=torch.uint8)
    config = empssl.Config(patches=3, batch=8, patch_size=16, lr=0.1, precision="float32")

    step = empssl.LARS.step

    def keep_gradients(optimizer):
        gradients.append([p.grad.clone() for p in encoder.parameters()])
        step(optimizer)

    empssl.LARS.step = keep_gradients
    empssl.train(encoder, images, config, empssl.Augmentation(), objective)
    empssl.LARS.step = step
    h = empssl.embed(encoder, images, patches=4)
    y = torch.arange(len(h)) % 2
    return {
        "losses": objective.losses,
        "patches": objective.patches,
        "gradients": gradients,
        "weights": [p.detach() for p in encoder.parameters()],
        "features": h,
        "knn": from_first(lambda: empssl.knn_probe(h, y, h, y, k=3)),
    }


if __name__ == "__main__":
    torch.set_num_threads(1)
    join_processes("cpu")
    torch.save(training(steps=3), f"{sys.argv[1]}/{rank()}.pt")
    leave_processes()
