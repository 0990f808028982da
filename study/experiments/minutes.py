"""Ten minutes of every method, and the seconds to a given accuracy.

    python -m study.experiments.minutes

All training images, each method with the settings that study.experiments.methods found for it, for
as many epochs as take the seconds of preset laptop's ten minutes. A training is probed after about
a quarter, a half and three quarters of its epochs, while its learning rate has yet to fall: so it
has less there than a training of that length would end with. Records are kept in minutes.jsonl.
"""

import empssl
from empssl_support.cli import one_sentence
from empssl_support.data import Dataset, load_dataset
from empssl_support.machine import keep_freed_memory
from empssl_support.runs import Run
from study.experiments.methods import PEERS, best_try, epochs_in, flags_of, seconds_of_ours
from study.experiments.runs import flags
from study.experiments.trials import Trial, make_all, probe_bag, train

EPOCHS = 4  # of EMP-SSL
SHARES = (1 / 4, 1 / 2, 3 / 4)  # of a training's epochs, after which it is probed


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
    """The metrics after the last epoch, and a curve: seconds and accuracies on the way there."""
    config = trial.settings()
    probed = {round(share * config.epochs) for share in SHARES} - {0, config.epochs}
    curve = []

    def at_epoch_end(epoch: int) -> dict:
        if epoch in probed:
            seconds = run.train_seconds()
            encoder = run.parts["encoder"]
            curve.append({"seconds": seconds} | probe_bag(encoder, config, data))
        return {}

    run = Run(at_epoch_end=at_epoch_end)
    encoder, metrics = train(config, data, run)
    metrics |= empssl.probe(*empssl.features_of_splits(encoder, data, config), data)
    curve.append({"seconds": metrics["train_seconds"], "linear_top1": metrics["linear_top1"]})
    return metrics | {"curve": curve}


def seconds_to(accuracy: float, curve: list[dict]) -> float | None:
    """Of training, along straight lines between what was probed; None where it was not reached.

    Before the first probe nothing is known: where that is high enough, its own seconds.
    """
    before = None
    for point in curve:
        if point["linear_top1"] >= accuracy:
            if before is None:
                return point["seconds"]
            rise = point["linear_top1"] - before["linear_top1"]
            share = (accuracy - before["linear_top1"]) / rise
            return before["seconds"] + share * (point["seconds"] - before["seconds"])
        before = point
    return None


def main(argv: list[str] | None = None) -> None:
    parser = flags("Ten minutes of every method.", "data/cifar10-jpeg")
    typed = parser.parse_args(argv)
    keep_freed_memory()
    data = load_dataset("imagefolder", typed.data_dir)
    make_all("minutes", ten_minutes(typed.data_dir, typed.seeds), data, make)


if __name__ == "__main__":
    with one_sentence():
        main()
