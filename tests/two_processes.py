"""Run by torchrun, in each process: train, and write what this process has seen and come to. See test_survival.py."""

import sys

import torch
import torch.nn as nn

import empssl
import empssl_io as io


class Plain(empssl.Encoder):
    """No BatchNorm, so that an image's embedding depends on that image alone."""

    def __init__(self):
        super().__init__("small", 16, hidden=12, projector=12, dim=8)
        self.backbone = nn.Sequential(nn.Conv2d(3, 6, 4, stride=4), nn.ReLU(), nn.Flatten())
        self.represent = nn.Sequential(nn.Linear(96, 12), nn.ReLU())
        self.project = nn.Linear(12, 8)


def training(steps: int = 1) -> dict:
    torch.manual_seed(0)
    encoder, gradients, losses, seen = Plain(), [], [], []
    images = torch.randint(0, 256, (8 * steps, 3, 32, 32), dtype=torch.uint8)
    config = empssl.Config(patches=3, batch=8, patch_size=16, lr=0.1, lam=2.0, precision="float32")
    step, loss, cut = empssl.LARS.step, empssl.empssl_loss, empssl.cut
    empssl.LARS.step = lambda self: gradients.append([p.grad.clone() for p in encoder.parameters()]) or step(self)
    empssl.empssl_loss = lambda *a: losses.append(loss(*a)) or losses[-1]
    empssl.cut = lambda *a: seen.append(cut(*a)) or seen[-1]
    empssl.train(encoder, images, config, empssl.Augmentation())
    empssl.LARS.step, empssl.empssl_loss, empssl.cut = step, loss, cut
    h = empssl.embed(encoder, images, patches=4)
    y = torch.arange(len(h)) % 2
    torch.manual_seed(1)
    random = torch.randn(300, 7), torch.randint(0, 9, (300,)), torch.randn(300, 7), torch.randint(0, 9, (300,))
    return {"gradients": gradients, "losses": [x.item() for x in losses], "seen": seen, "features": h,
            "weights": [p.detach() for p in encoder.parameters()], "knn": empssl.knn_probe(h, y, h, y, k=3),
            "linear": empssl.linear_probe(*random, epochs=5)}


if __name__ == "__main__":
    torch.set_num_threads(1)
    io.join_processes("cpu")
    torch.save(training(steps=3), f"{sys.argv[1]}/{io.rank()}.pt")
    io.leave_processes()
