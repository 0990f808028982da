"""The methods side by side, each with settings that were searched for in the same way.

    python -m study.experiments.methods speed     the seconds of an epoch: let nothing else run
    python -m study.experiments.methods search    settings, on held-out training images
    python -m study.experiments.methods compare   at equal seconds and at equal epochs, three seeds

All train on 15,000 images with preset laptop's encoder and EMP-SSL's patches as views, for the
seconds of two epochs of EMP-SSL. How many epochs fit is estimated from the measured speeds, so that
trainings may share the machine. Records are kept in methods.jsonl.

A method is tried with its published optimizer and with Muon, then with the better of the two and
batches of 64: three rates each, and one or two more where the best lies at an end. The best of all
then has other temperatures, where the method has one, in the same way. EMP-SSL is preset laptop,
which was searched for on the same images: study.experiments.search.
"""

import shlex

from empssl_support.cli import one_sentence
from empssl_support.data import Dataset, load_dataset
from empssl_support.machine import keep_freed_memory
from empssl_support.runs import Run
from study import baselines
from study.experiments.runs import flags
from study.experiments.trials import (
    Trial,
    fewer,
    holdout,
    make_all,
    records_of,
    top1,
    train,
    train_and_probe_bag,
    widened,
)

HERE = "study.experiments.methods"
PEERS = ("simclr", "vicreg", "byol", "swav", "ressl", "single")
IMAGES = 15_000
EPOCHS = 2  # of EMP-SSL

RATES_OF_MUON = (0.05, 0.15, 0.45)
FACTORS = (1 / 3, 1, 3)  # of the published rate
FACTORS_OF_TEMPERATURE = (1 / 2, 1, 2)  # of the published temperature
SMALL_BATCH = 64


def flags_of(method: str, data_dir: str, changes: str = "") -> str:
    where = f"--dataset imagefolder --data-dir {shlex.quote(data_dir)}"
    preset = "--preset laptop --device cpu --augmentation light"
    return f"--method {method} {where} {preset} {changes}".strip()


def published_kinds(method: str) -> list[tuple[str, int]]:
    """Optimizer and batch."""
    if method == "empssl":
        return [("muon", 50)]
    published = baselines.METHODS[method]
    return [(published["optimizer"], published["batch"]), ("muon", published["batch"])]


def flags_of_kind(optimizer: str, batch: int) -> str:
    # What Muon leaves to LARS has preset laptop's trust: two methods publish none.
    trust = " --eta 0.005" if optimizer == "muon" else ""
    return f"--optimizer {optimizer}{trust} --batch {batch}"


# ---- speed ----


def speed_trial(method: str, optimizer: str, batch: int, data_dir: str = "") -> Trial:
    changes = f"{flags_of_kind(optimizer, batch)} --epochs 2"
    return Trial(f"speed-{method}-{optimizer}-{batch}", flags_of(method, data_dir, changes))


def time_epochs(trial: Trial, data: Dataset) -> dict:
    """The seconds of a training's second epoch, and what its first one takes beside them."""
    config = trial.settings()
    after = []
    run = Run(at_epoch_end=lambda epoch: after.append(run.train_seconds()) or {})
    train(config, data, run)
    one, two = after
    return {"seconds_an_epoch": two - one, "seconds_before": one - (two - one)}


def speed_of(method: str, optimizer: str, batch: int) -> dict:
    """Raises `UsageError` where it was not measured."""
    (speed,) = records_of("methods", [speed_trial(method, optimizer, batch)], f"{HERE} speed")
    return speed["metrics"]


def seconds_of(epochs: int, method: str, optimizer: str, batch: int) -> float:
    """Of a training on `IMAGES` images that has the machine to itself."""
    speed = speed_of(method, optimizer, batch)
    return speed["seconds_before"] + epochs * speed["seconds_an_epoch"]


def seconds_of_ours(epochs: int = EPOCHS) -> float:
    return seconds_of(epochs, "empssl", "muon", 50)


def epochs_in(seconds: float, method: str, optimizer: str, batch: int) -> int:
    """Whole epochs in so many seconds, at least one."""
    speed = speed_of(method, optimizer, batch)
    return max(1, round((seconds - speed["seconds_before"]) / speed["seconds_an_epoch"]))


# ---- search ----


def rate_trials(method: str, optimizer: str, batch: int, data_dir: str = "") -> list[Trial]:
    """Three rates at the published temperature and, where the best of those made lies at an end,
    one beyond it."""
    published = baselines.METHODS[method]["lr"]
    rates = [factor * published for factor in FACTORS]
    if optimizer == "muon":
        rates = list(RATES_OF_MUON)
    epochs = epochs_in(seconds_of_ours(), method, optimizer, batch)

    def make_trial(rate: float) -> Trial:
        chosen = f"{flags_of_kind(optimizer, batch)} --lr {rate:.3g}"
        changes = flags_of(method, data_dir, f"{chosen} --epochs {epochs}")
        name = f"search-{method}-{optimizer}-{batch}-{rate:.3g}"
        return Trial(name, changes, about={"chosen": chosen})

    rates = widened(rates, lambda rate: make_trial(rate).record("methods"))
    return [make_trial(rate) for rate in rates]


def temperature_trials(method: str, best: dict, data_dir: str = "") -> list[Trial]:
    """Other temperatures for the best of the rates' tries, which has the published one."""
    published = baselines.METHODS[method].get("temperature")
    if not published:
        return []

    def make_trial(temperature: float) -> Trial:
        chosen = f"{best['chosen']} --temperature {temperature:g}"
        changes = flags_of(method, data_dir, f"{chosen} --epochs {best['epochs']}")
        return Trial(
            f"{best['name']}-temperature-{temperature:g}", changes, about={"chosen": chosen}
        )

    def record(temperature: float) -> dict | None:
        return best if temperature == published else make_trial(temperature).record("methods")

    temperatures = [factor * published for factor in FACTORS_OF_TEMPERATURE]
    wider = widened(temperatures, record, factor=2)
    return [make_trial(temperature) for temperature in wider if temperature != published]


def next_tries(method: str, data_dir: str = "") -> list[Trial]:
    """Those that what is on record leads to; with none missing, all that the search is made of."""
    trials = []
    for kind in published_kinds(method):
        trials += rate_trials(method, *kind, data_dir)
    if any(not trial.record("methods") for trial in trials):
        return trials
    optimizer = max((trial.record("methods") for trial in trials), key=top1)["optimizer"]
    trials += rate_trials(method, optimizer, SMALL_BATCH, data_dir)
    if any(not trial.record("methods") for trial in trials):
        return trials
    best = max((trial.record("methods") for trial in trials), key=top1)
    return trials + temperature_trials(method, best, data_dir)


def search(method: str, data: Dataset, data_dir: str) -> None:
    while any(not trial.record("methods") for trial in next_tries(method)):
        make_all("methods", next_tries(method, data_dir), data, train_and_probe_bag)


def best_try(method: str) -> dict:
    """The record of a method's best try. Raises `UsageError` where one was not made."""
    return max(records_of("methods", next_tries(method), f"{HERE} search"), key=top1)


# ---- comparison ----


def comparisons(data_dir: str, seeds: int) -> list[Trial]:
    """At equal seconds and, but for EMP-SSL, where that is the same, at equal epochs.

    The settings are those for equal seconds: nobody searched for two epochs.
    """
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
        trials = []
        for method in ("empssl", *PEERS):
            kinds = published_kinds(method)
            if method != "empssl":
                kinds += [(optimizer, SMALL_BATCH) for optimizer, _ in kinds]
            trials += [speed_trial(method, *kind, typed.data_dir) for kind in kinds]
        make_all("methods", trials, fewer(data, IMAGES), time_epochs)
    elif typed.what == "search":
        for method in PEERS:
            search(method, holdout(data, IMAGES), typed.data_dir)
    else:
        make_all("methods", comparisons(typed.data_dir, typed.seeds), fewer(data, IMAGES))


if __name__ == "__main__":
    with one_sentence():
        main()
