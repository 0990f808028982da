"""Ten minutes of every method, and the seconds to a given accuracy.

    python -m study.experiments.minutes

All training images, each method with the settings that study.experiments.methods found for it, for
as many epochs as take the seconds of preset laptop's ten minutes, by the speeds measured there. The
first seed is probed after about a quarter, a half and three quarters of its epochs too, while its
learning rate has yet to fall: a training of that length may end elsewhere. Its first steps are made
once more, to be probed early. Records are kept in minutes.jsonl.
"""

from collections.abc import Callable, Iterator

import empssl
from empssl_support.cli import one_sentence
from empssl_support.data import Dataset, load_dataset, to_device
from empssl_support.machine import keep_freed_memory
from empssl_support.runs import Run
from empssl_support.settings import pick_device
from study.experiments.methods import (
    IMAGES,
    PEERS,
    best_try,
    epochs_in,
    flags_of,
    seconds_of,
    seconds_of_ours,
)
from study.experiments.records import named
from study.experiments.runs import flags_of_trials
from study.experiments.trials import Trial, make_all, probe_bag, train

EPOCHS = 4  # of EMP-SSL
SHARES = (1 / 4, 1 / 2, 3 / 4)  # of a training's epochs, after which it is probed
EARLY = (1 / 32, 1 / 16, 1 / 8)  # of its steps, after which it is probed when made once more


def ten_minutes(data_dir: str, seeds: int) -> list[Trial]:
    trials = []
    for seed in range(seeds):
        for method in ("empssl", *PEERS):
            chosen, epochs = "", EPOCHS
            if method != "empssl":
                best = best_try(method)
                chosen = best["chosen"]
                kind = best["optimizer"], best["batch"]
                epochs = epochs_in(seconds_of_ours(EPOCHS), method, *kind)
            changes = f"{chosen} --epochs {epochs}".strip()
            trials.append(Trial(method, flags_of(method, data_dir, changes), seed))
    return trials


def make(trial: Trial, data: Dataset) -> dict:
    """The metrics after the last epoch, and a curve: accuracies after epochs on the way there."""
    config = trial.settings()
    probed = {round(share * config.epochs) for share in SHARES} if trial.seed == 0 else set()
    curve = []

    def at_epoch_end(epoch: int) -> dict:
        if 0 < epoch < config.epochs and epoch in probed:
            curve.append({"epoch": epoch} | probe_bag(run.parts["encoder"], config, data))
        return {}

    run = Run(at_epoch_end=at_epoch_end)
    encoder, metrics = train(config, data, run)
    metrics |= empssl.probe(*empssl.features_of_splits(encoder, data, config), data)
    curve.append({"epoch": config.epochs, "linear_top1": metrics["linear_top1"]})
    return metrics | {"curve": curve, "images": len(data.train_images)}


class Beginning(Run):
    """The first steps of a training, which is probed after `wanted` ones and ends with the last."""

    def __init__(self, wanted: list[int], probe: Callable[[empssl.Encoder], dict]):
        super().__init__()
        self.wanted = wanted
        self.probe = probe
        self.curve = []

    def steps(self, *lengths) -> Iterator[int]:
        for t in super().steps(*lengths):
            yield t
            if t + 1 == max(self.wanted):
                return

    def after_step(self, t: int, loss, terms) -> None:
        super().after_step(t, loss, terms)
        if t + 1 in self.wanted:
            encoder = self.parts["encoder"]
            self.curve.append({"epoch": (t + 1) / self.steps_an_epoch} | self.probe(encoder))
            encoder.train()


def beginnings(data_dir: str) -> list[Trial]:
    """Of the first seed's trainings, the same in all else."""
    return [t._replace(name=name_of_beginning(t.name)) for t in ten_minutes(data_dir, seeds=1)]


def name_of_beginning(method: str) -> str:
    return f"{method}-beginning"


def make_beginning(trial: Trial, data: Dataset) -> dict:
    """The metrics after the last of these steps, and the curve up to there."""
    config = trial.settings()
    steps = len(data.train_images) // config.batch * config.epochs
    wanted = [max(1, round(share * steps)) for share in EARLY]
    run = Beginning(wanted, lambda encoder: probe_bag(encoder, config, data))
    _, metrics = train(config, data, run)
    return metrics | {"curve": run.curve, "patches_seen": max(wanted) * run.patches_a_step}


def curve_of(record: dict) -> list[tuple[float, float]]:
    """Seconds of training, with the machine to itself, and accuracy.

    From the beginning of the same training, where that was made, with the same precision.
    """
    kind = record["method"], record["optimizer"], record["batch"]
    same = ("seed", "precision")
    early = []
    for beginning in named("minutes", name_of_beginning(record["name"])):
        if all(beginning[key] == record[key] for key in same):
            early = beginning["metrics"]["curve"]
    metrics = record["metrics"]
    larger = metrics["images"] / IMAGES
    curve = early + metrics["curve"]
    return [(larger * seconds_of(p["epoch"], *kind), p["linear_top1"]) for p in curve]


def seconds_to(wanted: float, curve: list[tuple[float, float]]) -> float | None:
    """Along straight lines between what was probed; None where it was not reached.

    Before the first probe nothing is known: where that is high enough, its own seconds.
    """
    before = None
    for seconds, accuracy in curve:
        if accuracy >= wanted:
            if before is None:
                return seconds
            seconds_before, accuracy_before = before
            share = (wanted - accuracy_before) / (accuracy - accuracy_before)
            return seconds_before + share * (seconds - seconds_before)
        before = seconds, accuracy
    return None


def main(argv: list[str] | None = None) -> None:
    parser = flags_of_trials("Ten minutes of every method.", "data/cifar10-jpeg")
    typed = parser.parse_args(argv)
    keep_freed_memory()
    device = pick_device(typed.device)
    data = to_device(load_dataset("imagefolder", typed.data_dir), device)
    make_all("minutes", ten_minutes(typed.data_dir, typed.seeds), data, make, device)
    make_all("minutes", beginnings(typed.data_dir), data, make_beginning, device)


if __name__ == "__main__":
    with one_sentence():
        main()
