"""A trial: a method trained and probed in this process, on part of a data set.

It takes minutes, so one that was stopped begins again. Runs of hours are recipes: see runs.py.
A command that makes trials may be started several times at once: the processes share them.
"""

import dataclasses
import functools
import random
import shlex
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import empssl
from empssl_support.cli import UsageError, progress
from empssl_support.data import Dataset
from empssl_support.machine import provenance
from study import baselines
from study.experiments.records import claimed, keep, read


class Trial(NamedTuple):
    """A trial to make; its record is the line of `name` and `seed` in its table."""

    name: str
    flags: str  # of study.baselines, --method among them
    seed: int = 0
    about: dict = {}  # what else its record says
    whatever: tuple[str, ...] = ()  # settings that are nothing to what is measured

    def settings(self) -> baselines.Config:
        return settings(self.flags, self.seed)

    def on(self, device: str) -> "Trial":
        return self._replace(flags=f"{self.flags} --device {device}")

    def record(self, table: str) -> dict | None:
        """What is kept of it, if that is of the same settings.

        Where the data lie, the device and how precisely it multiplies are none of them: a table
        goes on, and is written, on any machine. The record says which it had.
        """
        for record in read(table):
            if (record["name"], record["seed"]) == (self.name, self.seed):
                return record if self.is_of(record) else None
        return None

    def is_of(self, record: dict) -> bool:
        ours = settings_to_compare(self.flags, self.seed) | self.about
        for key in ("data_dir", "name", "device", "precision", *self.whatever):
            del ours[key]
        return all(record.get(key, value) == value for key, value in ours.items())


def settings(flags: str, seed: int) -> baselines.Config:
    return baselines.settings(shlex.split(f"{flags} --seed {seed}"))


@functools.cache
def settings_to_compare(flags: str, seed: int) -> dict:
    """Read once: a search asks thousands of times what is on record."""
    return dataclasses.asdict(settings(flags, seed))


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


# ---- what is tried ----

MOST_TRIES = 5  # of a rate, or a temperature


def top1(record: dict) -> float:
    return record["metrics"]["linear_top1"]


def widened(
    values: Sequence[float], record: Callable[[float], dict | None], factor: float = 3
) -> list[float]:
    """`values` and, while all are on record and the best lies at an end, one beyond it.

    Values rise; record: what is kept of a value's trial; factor: from the end to what is beyond.
    """
    values = list(values)
    while len(values) < MOST_TRIES:
        found = [record(value) for value in values]
        if None in found:
            break
        best = found.index(max(found, key=top1))
        if best == 0:
            values.insert(0, values[0] / factor)
        elif best == len(values) - 1:
            values.append(values[-1] * factor)
        else:
            break
    return values


# ---- what is done with them ----


def train(config: baselines.Config, data: Dataset, run=None) -> tuple[empssl.Encoder, dict]:
    """The encoder and the last record of its training, on the settings' device."""
    config.patch_size = config.patch_size or min(224, *data.train_images.shape[2:])
    encoder, augmentation, objective = baselines.method(config, data)
    metrics = empssl.train(encoder, data.train_images, config, augmentation, objective, run)
    return encoder, metrics


def train_and_probe(trial: Trial, data: Dataset) -> dict:
    """By the bag of patches, the quadrants and kNN."""
    config = trial.settings()
    encoder, metrics = train(config, data)
    return metrics | empssl.probe(*empssl.features_of_splits(encoder, data, config), data)


def train_and_probe_bag(trial: Trial, data: Dataset) -> dict:
    config = trial.settings()
    encoder, metrics = train(config, data)
    return metrics | probe_bag(encoder, config, data)


def probe_bag(
    encoder: empssl.Encoder, config: baselines.Config, data: Dataset, augmentation=None
) -> dict:
    """By the bag of patches and kNN: half the seconds of the quadrants too.

    Of patches on a grid or, with an `augmentation`, drawn.
    """
    how = {"augmentation": augmentation, "precision": config.precision}
    h, test_h = (
        empssl.embed(encoder, images, config.eval_patches, **how)
        for images in (data.train_images, data.test_images)
    )
    knn = empssl.knn_probe(h, data.train_labels, test_h, data.test_labels)
    # Steps as small as these are mostly Python's work; on a GPU they would hold up others' trials.
    h, test_h = h.cpu(), test_h.cpu()
    top1, _ = empssl.linear_probe(h, data.train_labels, test_h, data.test_labels)
    return {"linear_top1": top1, "knn_top1": knn}


def make_all(
    table: str, trials: list[Trial], data, make=train_and_probe, device: str = "cpu"
) -> None:
    """Make the trials whose record is not kept: their metrics are `make(trial, data)`.

    One whose loss is not finite is a miss, with an accuracy of 0, and the others go on. One that
    another process makes is waited for, and made here should that process end without it.
    """
    trials = [trial.on(device) for trial in trials]

    def missing() -> list[Trial]:
        return [trial for trial in trials if not trial.record(table)]

    left = missing()
    kept = f"study/results/{table}.jsonl"
    print(f"{len(left)} of {len(trials)} trials are left to make; those in {kept} are left alone")
    code = provenance(device)  # before anything is made: of the code that was loaded
    with progress(total=len(left), desc=table, unit="trial") as bar:
        while left:
            for trial in left:
                with claimed(f"{table} {trial.name} {trial.seed}") as mine:
                    if mine and not trial.record(table):
                        keep(table, record_of(trial, data, make, code))
                        bar.update()
            left = missing()
            bar.n = bar.total - len(left)
            if left:
                time.sleep(1)


def record_of(trial: Trial, data, make, code: dict) -> dict:
    settings = dataclasses.asdict(trial.settings()) | trial.about
    about = settings | code | {"started": provenance("cpu")["started"]}
    try:
        metrics = make(trial, data)
    except FloatingPointError:
        metrics = {"linear_top1": 0.0, "knn_top1": 0.0, "diverged": True}
    print(trial.name, trial.seed, metrics, flush=True)
    return about | {"name": trial.name, "metrics": metrics}


def records_of(table: str, trials: list[Trial], command: str) -> list[dict]:
    """Raises `UsageError` where one was not made, and names the command that makes it."""
    found = [trial.record(table) for trial in trials]
    if None in found:
        missing = trials[found.index(None)].name
        raise UsageError(f"{missing} is not on record; run python -m {command} first.")
    return found
