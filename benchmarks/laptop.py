"""The search for the laptop preset: python benchmarks/laptop.py [TRY ...]     (default: all that have no record yet)

Each try is one whole pass over 45,000 of the 50,000 training images of CIFAR-10's JPEG copy (data/cifar10-jpeg, by its
training split alone), scored by the paper's linear probe on the other 5,000. Test data is never read here. What it was
predicted to give, and what it gave, goes to results/laptop/<try>.json with its log.
"""

import json
import sys
import time
from pathlib import Path

import torch
import torch.nn as nn

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import empssl               # noqa: E402
import empssl_io as io      # noqa: E402

RESULTS = ROOT / "results" / "laptop"


def convolution(inputs, outputs, kernel, stride, padding):
    return [nn.Conv2d(inputs, outputs, kernel, stride=stride, padding=padding, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()]


def plain(*widths):
    """3x3, 3x3 and 2x2 convolutions of stride 2: 16 -> 8 -> 4 -> 2 pixels."""
    layers, inputs = [], 3
    for outputs, (kernel, padding) in zip(widths, ((3, 1), (3, 1), (2, 0))):
        layers += convolution(inputs, outputs, kernel, 2, padding)
        inputs = outputs
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten()), inputs


class Residual(nn.Module):
    def __init__(self, inputs, outputs):
        super().__init__()
        self.main = nn.Sequential(*convolution(inputs, outputs, 3, 2, 1), *convolution(outputs, outputs, 3, 1, 1)[:2])
        self.side = nn.Sequential(*convolution(inputs, outputs, 1, 2, 0)[:2])

    def forward(self, x):
        return torch.relu(self.main(x) + self.side(x))


def residual(stem, *widths):
    """A stem at full resolution, then residual stages of stride 2."""
    layers, inputs = convolution(3, stem, 3, 1, 1), stem
    for outputs in widths:
        layers.append(Residual(inputs, outputs))
        inputs = outputs
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten()), inputs


# name: (what it was predicted to give on the holdout, backbone and its width, projector's width, other settings)
TRIES = {
    "base": ("0.68: lr 0.1 gained 1.8 points over 0.3 in short tries, an even grid of 16 patches 1", lambda: plain(96, 192, 384),
             1024, dict(hidden=1024)),
    "hidden-2048": ("+1: twice as many features at equal cost, as the projector narrows to 512", lambda: plain(96, 192, 384),
                    512, dict(hidden=2048)),
    "lambda-200": ("+0.5 over hidden-2048: the paper's ratio of lambda to R's maximum is 1, ours 0.6", lambda: plain(96, 192, 384),
                   512, dict(hidden=2048, lam=200.0)),
    "batch-50": ("+0.5 over hidden-2048: twice the steps", lambda: plain(96, 192, 384), 512,
                 dict(hidden=2048, batch=50, lam=60.0)),
    "hidden-4096": ("+0.5 over hidden-2048: twice the features again, projector 256", lambda: plain(96, 192, 384), 256,
                    dict(hidden=4096)),
    "residual": ("-1: depth, at half the patches", lambda: residual(24, 48, 96, 192), 512, dict(hidden=2048, patches=11)),
}


def holdout_split(data: io.Dataset):
    order = torch.randperm(len(data.train_images), generator=torch.Generator().manual_seed(123))
    parts = order[5000:], order[:5000]
    return [(data.train_images[rows], data.train_labels[rows]) for rows in parts]


def run(name: str, data: io.Dataset, seed: int = 0) -> dict:
    predicted, backbone, projector, changes = TRIES[name]
    settings = empssl.PRESETS["laptop"] | dict(patches=18, lr=0.1, lam=100.0, dim=512, batch=100) | changes
    config = empssl.Config(preset="laptop", precision="float32", device="cpu", seed=seed, **settings)
    torch.manual_seed(seed)
    encoder = empssl.Encoder("small", config.patch_size, config.hidden, config.dim)
    encoder.backbone, width = backbone()
    encoder.represent = nn.Sequential(nn.Linear(width, config.hidden), nn.BatchNorm1d(config.hidden), nn.ReLU())
    encoder.project = nn.Sequential(nn.Linear(config.hidden, projector), nn.BatchNorm1d(projector), nn.ReLU(),
                                    nn.Linear(projector, config.dim))
    encoder = encoder.to(memory_format=torch.channels_last)
    (images, labels), (held_out, their_labels) = holdout_split(data)
    log, started = [], time.perf_counter()
    metrics = empssl.train(encoder, images, config, empssl.augmentations(config, 32, 32)[0], log.append)
    h, held = (empssl.embed(encoder, x, config.eval_patches) for x in (images, held_out))
    metrics |= {"holdout_linear_top1": empssl.linear_probe(h, labels, held, their_labels)[0],
                "holdout_knn_top1": empssl.knn_probe(h, labels, held, their_labels),
                "parameters": sum(p.numel() for p in encoder.parameters()),
                "probe_seconds": time.perf_counter() - started - metrics["train_seconds"]}
    print(f"{name}: predicted {predicted}; holdout linear {metrics['holdout_linear_top1']:.4f}")
    return {"try": name, "predicted": predicted, "projector": projector, "settings": settings, "seed": seed,
            **io.provenance("cpu"), "metrics": metrics, "log": log[4::5]}


if __name__ == "__main__":
    unknown = set(sys.argv[1:]) - set(TRIES)
    if unknown:
        io.stop(f"error: there is no try {', '.join(sorted(unknown))}; the tries are {', '.join(TRIES)}.", 2)
    with io.mistakes_in_one_sentence():
        data = io.load_dataset("imagefolder", "data/cifar10-jpeg")
        for name in sys.argv[1:] or [name for name in TRIES if not (RESULTS / f"{name}.json").exists()]:
            record = run(name, data)
            (RESULTS / f"{name}.json").write_text(json.dumps(record, indent=1) + "\n")
