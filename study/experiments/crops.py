"""What to probe of an encoder: how many crops, their mirror images, which layers, at which rate.

    python -m study.experiments.crops

An encoder is trained as preset laptop has it, for three epochs on 15,000 of CIFAR-10's training
images. Then features of these are made in several ways, and scored on 5,000 others; the test images
stay unseen. Bag and quadrants are also probed at several learning rates, of such an encoder too.
Records are kept in crops.jsonl.
"""

import copy
import shlex

import torch
from torch import Tensor, nn

import empssl
from empssl_support.cli import one_sentence
from empssl_support.data import Dataset, load_dataset
from empssl_support.machine import keep_freed_memory
from study.experiments.runs import flags
from study.experiments.trials import Trial, holdout, make_all, train

IMAGES = 15_000
RATES = (0.03, 0.01, 0.003, 0.001)  # of the linear probe; the first is the official one


def bags(encoder: empssl.Encoder, images: Tensor, crops: int, precision: str) -> Tensor:
    return empssl.embed(encoder, images, crops, precision=precision)


def up_to_the_convolutions(encoder: empssl.Encoder) -> empssl.Encoder:
    """The same backbone, whose own output is the representation."""
    below = copy.deepcopy(encoder)
    below.architecture["hidden"] = encoder.represent[0].in_features
    below.represent = nn.Identity()
    return below


def ways_to_probe(encoder: empssl.Encoder, images: Tensor, precision: str):
    """Yields what it is, how many crops of an image are encoded for it, and the features."""
    bag = {crops: bags(encoder, images, crops, precision) for crops in (4, 9, 16, 25)}
    for crops, features in bag.items():
        yield f"{crops} crops", crops, features
    mirrored = bags(encoder, images.flip(3), 16, precision)
    yield "16 crops and their mirror images", 32, (bag[16] + mirrored) / 2
    convolutions = bags(up_to_the_convolutions(encoder), images, 16, precision)
    yield "16 crops, the last convolution", 16, convolutions
    yield "16 crops, both layers side by side", 16, torch.cat([bag[16], convolutions], 1)


def make_ways(trial: Trial, data: Dataset) -> dict:
    """The metrics of the training, and a row for each way to probe the encoder."""
    config = trial.settings()
    part = holdout(data, IMAGES)
    encoder, metrics = train(config, part)
    y, test_y = part.train_labels, part.test_labels
    ways = ways_to_probe(encoder, part.train_images, config.precision)
    test_ways = ways_to_probe(encoder, part.test_images, config.precision)
    rows = []
    for (what, crops, h), (_, _, test_h) in zip(ways, test_ways, strict=True):
        top1, _ = empssl.linear_probe(h, y, test_h, test_y)
        knn = empssl.knn_probe(h, y, test_h, test_y)
        rows.append({"what": what, "crops": crops, "linear_top1": top1, "knn_top1": knn})
    return metrics | {"rows": rows}


def make_rates(trial: Trial, data: Dataset) -> dict:
    """The metrics of the training, and a row for each features and rate of the linear probe."""
    config = trial.settings()
    part = holdout(data, IMAGES)
    encoder, metrics = train(config, part)
    h, test_h = empssl.features_of_splits(encoder, part, config)
    rows = []
    for what in ("bag", "quadrants"):
        features, test_features = getattr(h, what), getattr(test_h, what)
        for lr in RATES:
            top1, _ = empssl.linear_probe(
                features, part.train_labels, test_features, part.test_labels, lr=lr
            )
            rows.append({"what": what, "lr": lr, "linear_top1": top1})
    return metrics | {"rows": rows}


def trials_of(name: str, data_dir: str, seeds: int) -> list[Trial]:
    where = f"--dataset imagefolder --data-dir {shlex.quote(data_dir)}"
    preset = f"--method empssl {where} --preset laptop --device cpu --epochs 3"
    return [Trial(name, preset, seed) for seed in range(seeds)]


def main(argv: list[str] | None = None) -> None:
    parser = flags("What to probe of an encoder.", "data/cifar10-jpeg")
    typed = parser.parse_args(argv)
    keep_freed_memory()
    data = load_dataset("imagefolder", typed.data_dir)
    for name, make in (("crops", make_ways), ("rates", make_rates)):
        make_all("crops", trials_of(name, typed.data_dir, typed.seeds), data, make)


if __name__ == "__main__":
    with one_sentence():
        main()
