"""The methods side by side, each with settings that were searched for in the same way.

    python -m study.experiments.methods speed     the seconds of an epoch: let nothing else run
    python -m study.experiments.methods search    settings, on held-out training images
    python -m study.experiments.methods compare   at equal seconds and at equal epochs, three seeds

All train on 15,000 images with preset laptop's encoder and EMP-SSL's patches as views. The seconds
are those of three epochs of EMP-SSL. Records are kept in methods.jsonl.
"""

import shlex

from empssl_support.cli import UsageError, one_sentence
from empssl_support.data import Dataset, load_dataset
from empssl_support.machine import keep_freed_memory
from study import baselines
from study.experiments.records import by_key, read
from study.experiments.runs import flags
from study.experiments.trials import Trial, all_of, carry_out, fewer, holdout, probe_bag, train

PEERS = ("simclr", "vicreg", "byol", "swav", "ressl", "single")
IMAGES = 15_000
EPOCHS = 3  # of EMP-SSL

# Searched for: each method's published optimizer and Muon, with three rates each, and then, where
# the method has one, other temperatures. EMP-SSL is preset laptop, searched for on the same images.
RATES_OF_MUON = (0.05, 0.15, 0.45)
FACTORS = (1 / 3, 1, 3)  # of the published rate
FACTORS_OF_TEMPERATURE = (1 / 2, 2)  # of the published temperature


def flags_of(method: str, data_dir: str, changes: str = "") -> str:
    folder = shlex.quote(data_dir)
    flags = f"--method {method} --dataset imagefolder --data-dir {folder} --preset laptop"
    return f"{flags} --device cpu --augmentation light {changes}".strip()


def optimizers(method: str) -> tuple[str, ...]:
    if method == "empssl":
        return ("muon",)
    return baselines.METHODS[method]["optimizer"], "muon"


# ---- speed ----


def with_optimizer(optimizer: str) -> str:
    # What Muon leaves to LARS has preset laptop's trust: two methods publish none.
    return "--optimizer muon --eta 0.005" if optimizer == "muon" else f"--optimizer {optimizer}"


def speed_trials(data_dir: str) -> list[Trial]:
    trials = []
    for method in ("empssl", *PEERS):
        for optimizer in optimizers(method):
            changes = f"{with_optimizer(optimizer)} --epochs 1"
            trials.append(Trial(f"speed-{method}-{optimizer}", flags_of(method, data_dir, changes)))
    return trials


def train_alone(trial: Trial, data: Dataset) -> dict:
    return train(trial.settings(), data)[1]


def seconds_of_an_epoch(method: str, optimizer: str) -> float:
    """Raises `UsageError` where it was not measured."""
    for record in read("methods"):
        if record["name"] == f"speed-{method}-{optimizer}":
            return record["metrics"]["train_seconds"]
    raise UsageError("No speed is on record; run python -m study.experiments.methods speed first.")


def epochs_in_equal_seconds(method: str, optimizer: str) -> int:
    """Whole epochs in the seconds of EMP-SSL's."""
    seconds = EPOCHS * seconds_of_an_epoch("empssl", "muon")
    return max(1, round(seconds / seconds_of_an_epoch(method, optimizer)))


# ---- search ----


def rate_trials(method: str, data_dir: str) -> list[Trial]:
    """At the published temperature."""
    published = baselines.METHODS[method]
    trials = []
    for optimizer in optimizers(method):
        rates = [factor * published["lr"] for factor in FACTORS]
        if optimizer == "muon":
            rates = RATES_OF_MUON
        epochs = epochs_in_equal_seconds(method, optimizer)
        for rate in rates:
            chosen = f"{with_optimizer(optimizer)} --lr {rate:.3g}"
            about = {"method": method, "chosen": chosen}
            changes = flags_of(method, data_dir, f"{chosen} --epochs {epochs}")
            name = f"search-{method}-{optimizer}-{rate:.3g}"
            trials.append(Trial(name, changes, about=about))
    return trials


def temperature_trials(method: str, data_dir: str) -> list[Trial]:
    """With the optimizer and the rate that did best."""
    published = baselines.METHODS[method].get("temperature")
    if published is None:
        return []
    best = best_try(method, but_temperatures=True)
    trials = []
    for factor in FACTORS_OF_TEMPERATURE:
        chosen = f"{best['chosen']} --temperature {factor * published:g}"
        about = {"method": method, "chosen": chosen}
        changes = flags_of(method, data_dir, f"{chosen} --epochs {best['epochs']}")
        name = f"{best['name']}-temperature-{factor * published:g}"
        trials.append(Trial(name, changes, about=about))
    return trials


def best_try(method: str, but_temperatures: bool = False) -> dict:
    """The record of the best try of a method. Raises `UsageError` where there is none."""
    found = []
    for record in by_key(read("methods"), "method").get(method, []):
        of_temperature = "--temperature" in record.get("chosen", "")
        if record["name"].startswith("search-") and not (but_temperatures and of_temperature):
            found.append(record)
    if not found:
        raise UsageError(
            f"No try of {method} is on record; run python -m study.experiments.methods search."
        )
    return max(found, key=lambda record: record["metrics"]["linear_top1"])


def score_bag(trial: Trial, data: Dataset) -> dict:
    """The metrics of a try. One whose loss is not finite is a miss, and the search goes on."""
    try:
        return carry_out(trial, data, probe_bag)
    except FloatingPointError:
        return {"linear_top1": 0.0, "knn_top1": 0.0, "diverged": True}


def search(data: Dataset, data_dir: str) -> None:
    part = holdout(data, IMAGES)
    for method in PEERS:
        all_of("methods", rate_trials(method, data_dir), part, score_bag)
        all_of("methods", temperature_trials(method, data_dir), part, score_bag)


# ---- comparison ----


def comparisons(data_dir: str, seeds: int) -> list[Trial]:
    """At equal seconds and, where that is something else, at equal epochs."""
    trials = []
    for seed in range(seeds):
        for method in ("empssl", *PEERS):
            chosen, budgets = "", {"equal seconds": EPOCHS}
            if method != "empssl":
                best = best_try(method)
                chosen = best["chosen"]
                budgets = {"equal seconds": best["epochs"], "equal epochs": EPOCHS}
            for budget, epochs in budgets.items():
                changes = flags_of(method, data_dir, f"{chosen} --epochs {epochs}")
                name = f"{method}-{budget.replace(' ', '-')}"
                trials.append(Trial(name, changes, seed, about={"budget": budget}))
    return trials


def main(argv: list[str] | None = None) -> None:
    parser = flags("Speed, search and comparison of all methods.", "data/cifar10-jpeg")
    parser.add_argument("what", choices=("speed", "search", "compare"))
    typed = parser.parse_args(argv)
    keep_freed_memory()
    data = load_dataset("imagefolder", typed.data_dir)
    if typed.what == "speed":
        all_of("methods", speed_trials(typed.data_dir), fewer(data, IMAGES), train_alone)
    elif typed.what == "search":
        search(data, typed.data_dir)
    else:
        all_of("methods", comparisons(typed.data_dir, typed.seeds), fewer(data, IMAGES))


if __name__ == "__main__":
    with one_sentence():
        main()
