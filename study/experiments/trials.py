"""A trial: a method trained and probed in this process, on part of a data set.

It takes minutes, so one that was stopped begins again. Runs of hours are recipes: see runs.py.
"""

import dataclasses
import random
import shlex
from typing import NamedTuple

import empssl
from empssl_support.cli import UsageError, progress
from empssl_support.data import Dataset
from empssl_support.machine import provenance
from study import baselines
from study.experiments.records import keep, read


class Trial(NamedTuple):
    """A trial to make; its record is the line of `name` and `seed` in its table."""

    name: str
    flags: str  # of study.baselines, --method among them
    seed: int = 0
    about: dict = {}  # what else its record says

    def settings(self) -> baselines.Config:
        return baselines.settings(shlex.split(f"{self.flags} --seed {self.seed}"))


# ---- the images ----


def holdout(data: Dataset, images: int, test: int = 5_000) -> Dataset:
    """Training images, as many of each class, and always the same others in place of test images.

    Raises `UsageError` where a class has too few.
    """
    train_rows, test_rows = [], []
    each, held_out = images // len(data.classes), test // len(data.classes)
    for label, of_class in enumerate(data.classes):
        rows = (data.train_labels == label).nonzero().flatten().tolist()
        if len(rows) < each + held_out:
            raise UsageError(
                f"{of_class} has {len(rows)} training images; give it {each + held_out}."
            )
        random.Random(0).shuffle(rows)
        # From three tenths on: where they were in the first tries, on 15,000 images.
        start = 3 * len(rows) // 10
        test_rows += rows[start : start + held_out]
        train_rows += (rows[:start] + rows[start + held_out :])[:each]
    return data._replace(
        train_images=data.train_images[train_rows],
        train_labels=data.train_labels[train_rows],
        test_images=data.train_images[test_rows],
        test_labels=data.train_labels[test_rows],
    )


def fewer(data: Dataset, images: int) -> Dataset:
    """So many training images, as many of each class and always the same, with the test images."""
    part = holdout(data, images, test=0)
    return part._replace(test_images=data.test_images, test_labels=data.test_labels)


# ---- what is done with them ----


def train(config: baselines.Config, data: Dataset, run=None) -> tuple[empssl.Encoder, dict]:
    """The encoder and the last record of its training."""
    encoder, augmentation, objective = baselines.method(config, data)
    record = empssl.train(encoder, data.train_images, config, augmentation, objective, run)
    return encoder, record


def probe(encoder: empssl.Encoder, config: baselines.Config, data: Dataset) -> dict:
    """The bag of patches, the quadrants and kNN."""
    return empssl.probe(*empssl.features_of_splits(encoder, data, config), data)


def probe_bag(encoder: empssl.Encoder, config: baselines.Config, data: Dataset) -> dict:
    """The bag of patches and kNN, in half the seconds."""
    h, test_h = (
        empssl.embed(encoder, images, config.eval_patches, precision=config.precision)
        for images in (data.train_images, data.test_images)
    )
    top1, _ = empssl.linear_probe(h, data.train_labels, test_h, data.test_labels)
    knn = empssl.knn_probe(h, data.train_labels, test_h, data.test_labels)
    return {"linear_top1": top1, "knn_top1": knn}


def carry_out(trial: Trial, data: Dataset, probe=probe) -> dict:
    """The metrics of a trial."""
    config = trial.settings()
    encoder, metrics = train(config, data)
    return metrics | probe(encoder, config, data)


def record(trial: Trial, metrics: dict) -> dict:
    """The line that is kept of a trial."""
    about = dataclasses.asdict(trial.settings()) | trial.about | provenance("cpu")
    return about | {"name": trial.name, "features": "grid", "metrics": metrics}


def all_of(table: str, trials: list[Trial], data, carry_out=carry_out) -> None:
    """Make the trials whose record is not kept: their metrics are `carry_out(trial, data)`."""
    kept = {(record["name"], record["seed"]) for record in read(table)}
    left = [trial for trial in trials if (trial.name, trial.seed) not in kept]
    print(f"{len(left)} of {len(trials)} trials are left to make")
    for trial in progress(left, desc=table, unit="trial"):
        metrics = carry_out(trial, data)
        keep(table, record(trial, metrics))
        print(trial.name, trial.seed, metrics, flush=True)
