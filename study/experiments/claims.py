"""What three papers claim, tried here, each claim by one comparison of two runs.

    python -m study.experiments.claims speed      the seconds of an epoch: let nothing else run
    python -m study.experiments.claims search     rates, on held-out training images
    python -m study.experiments.claims compare    three seeds

A run is a method with the settings that study.experiments.methods found for it and, where something
else is changed than the loss, with the best of three rates. Claims are of S3L (arXiv 2103.13559),
of Bordes, Balestriero and Vincent (2303.01986), and of single-branch instance discrimination
(2404.19289). Records are kept in claims.jsonl.
"""

import dataclasses
import statistics
import tempfile
from pathlib import Path
from typing import NamedTuple

import empssl
from empssl_support.cli import one_sentence
from empssl_support.data import Dataset, load_dataset
from empssl_support.files import save_encoder
from empssl_support.machine import keep_freed_memory
from study.experiments.cells import differences
from study.experiments.methods import EPOCHS, IMAGES, best_try, flags_of, top1
from study.experiments.records import named
from study.experiments.runs import flags
from study.experiments.trials import (
    Trial,
    fewer,
    holdout,
    make_all,
    probe_bag,
    records_of,
    train,
)

HERE = "study.experiments.claims"


class Variant(NamedTuple):
    """A method with changes, for so many epochs or, by its measured speed, so many seconds."""

    method: str
    changes: str = ""
    epochs: int | None = None  # None: as many as the method's best try, unless `seconds` are given
    seconds: float | None = None
    images: int = IMAGES
    before: str = ""  # a variant that is trained first, whose stages are then frozen
    rates: tuple[float, ...] = (1,)  # to choose from, as multiples of the method's rate
    settled: bool = False  # BatchNorm's averages are taken anew, of patches without noise


AROUND = (1 / 3, 1, 3)
FEW = {"images": 2_000, "seconds": 45.0, "rates": AROUND}
SMALL = {"changes": "--drop-last-stage", "seconds": 45.0, "rates": AROUND}
BANK = {"images": 5_000, "epochs": 100}


def noise(sigma: float, changes: str = "") -> Variant:
    changes = f"--augmentation noise --noise {sigma} {changes}".strip()
    return Variant("simclr", changes, rates=AROUND, settled=True)


VARIANTS = {
    "simclr": Variant("simclr"),
    "untrained": Variant("simclr", "--eval-only", settled=True),
    "one-negative": Variant("simclr", "--negatives 1", rates=AROUND),
    "noise-0.25": noise(0.25),
    "noise-1": noise(1),
    "noise-2": noise(2),
    "noise-1-whole-image": noise(1, "--crops published"),
    "noise-1-temperature-0.5": noise(1, "--temperature 0.5"),
    "batch-64": Variant("simclr", "--batch 64", rates=AROUND),
    "single-5000": Variant("single", **BANK),
    "single-moving-average": Variant("single", "--bank-update average", **BANK),
    "single-no-distillation": Variant("single", "--distillation 0", **BANK),
    "single-random-bank": Variant("single", "--bank-start random", **BANK),
    "few-single": Variant("single", **FEW),
    "few-simclr": Variant("simclr", **FEW),
    "few-vicreg": Variant("vicreg", **FEW),
    "few-empssl": Variant("empssl", **FEW),
    "small-single": Variant("single", **SMALL),
    "small-simclr": Variant("simclr", **SMALL),
    "small-vicreg": Variant("vicreg", **SMALL),
    "small-empssl": Variant("empssl", **SMALL),
    "one-size": Variant("simclr", seconds=90.0),
    "small-size-first": Variant(
        "simclr", "--size-schedule 8:0.7,16:0.3", seconds=90.0, rates=AROUND
    ),
    "enlarged": Variant("simclr", "--patch-size 32", seconds=90.0, rates=AROUND),
    "without-last-stage": Variant("simclr", "--drop-last-stage", seconds=60.0),
    "last-stage-added": Variant("simclr", seconds=30.0, before="without-last-stage"),
    "a-third-of-the-images": Variant("simclr", images=IMAGES // 3),
}


class Claim(NamedTuple):
    """`first` is more than `above` points (of 100) over `second`."""

    paper: str
    says: str
    first: str
    second: str
    equal: str  # what both runs have alike
    above: float = 0.0


DEMOCRATIC, SINGLE, S3L = "2303.01986", "2404.19289", "2103.13559"
NO_WORSE = -1.0  # points
CLAIMS = [
    Claim(DEMOCRATIC, "one negative will do", "one-negative", "simclr", "epochs", NO_WORSE),
    Claim(DEMOCRATIC, "noise of .25 alone trains", "noise-0.25", "untrained", "images"),
    Claim(DEMOCRATIC, "noise of 1 alone trains", "noise-1", "untrained", "images"),
    Claim(DEMOCRATIC, "noise of 2 alone trains", "noise-2", "untrained", "images"),
    Claim(DEMOCRATIC, "the same on whole images", "noise-1-whole-image", "untrained", "images"),
    Claim(DEMOCRATIC, "the same, temperature .5", "noise-1-temperature-0.5", "untrained", "images"),
    Claim(DEMOCRATIC, "batches of 64 will do", "batch-64", "simclr", "epochs", NO_WORSE),
    Claim(SINGLE, "the corrected update helps", "single-5000", "single-moving-average", "epochs"),
    Claim(SINGLE, "SqrtKL helps", "single-5000", "single-no-distillation", "epochs"),
    Claim(SINGLE, "a bank of features helps", "single-5000", "single-random-bank", "epochs"),
    Claim(SINGLE, "of few images better than SimCLR", "few-single", "few-simclr", "seconds"),
    Claim(SINGLE, "of few images better than VICReg", "few-single", "few-vicreg", "seconds"),
    Claim(SINGLE, "of few images better than EMP-SSL", "few-single", "few-empssl", "seconds"),
    Claim(SINGLE, "small model: better than SimCLR", "small-single", "small-simclr", "seconds"),
    Claim(SINGLE, "small model: better than VICReg", "small-single", "small-vicreg", "seconds"),
    Claim(SINGLE, "small model: better than EMP-SSL", "small-single", "small-empssl", "seconds"),
    Claim(S3L, "a small size first, then the full one", "small-size-first", "one-size", "seconds"),
    Claim(S3L, "patches need not be enlarged", "one-size", "enlarged", "seconds", NO_WORSE),
    Claim(S3L, "the last stage later", "last-stage-added", "one-size", "seconds", NO_WORSE),
    Claim(S3L, "few images will do", "a-third-of-the-images", "simclr", "steps", NO_WORSE),
]


# ---- trials ----


def settings_of(variant: Variant, epochs: int, data_dir: str, rate: float = 1) -> str:
    """rate: a multiple of the method's."""
    chosen, lr = "", empssl.PRESETS["laptop"]["lr"]
    if variant.method != "empssl":
        best = best_try(variant.method)
        chosen, lr = best["chosen"], best["lr"]
    changes = f"{chosen} --lr {rate * lr:.3g} {variant.changes} --epochs {epochs}"
    return flags_of(variant.method, data_dir, " ".join(changes.split()))


def about(variant: Variant, epochs_before: int, data_dir: str) -> dict:
    """What a trial's record says beside its settings."""
    said = {"images": variant.images, "settled": variant.settled}
    if variant.before:
        # Where the data lie is left out: it is no part of what was done.
        said["before"] = settings_of(VARIANTS[variant.before], epochs_before, "")
    return said


def speed_trial(name: str, data_dir: str = "") -> Trial:
    """Two epochs on many images, ten on few: there the first step counts for less."""
    variant = VARIANTS[name]
    epochs = 2 if variant.images == IMAGES else 10
    said = about(variant, 1, data_dir)
    return Trial(f"speed-{name}", settings_of(variant, epochs, data_dir), 0, said)


def epochs_of(name: str) -> int:
    """Raises `UsageError` where a speed is needed and was not measured."""
    variant = VARIANTS[name]
    if variant.epochs:
        return variant.epochs
    if variant.seconds is None:
        # As many steps as the method's best try, also where there are fewer images.
        best = EPOCHS if variant.method == "empssl" else best_try(variant.method)["epochs"]
        return best * IMAGES // variant.images
    (speed,) = records_of("claims", [speed_trial(name)], f"{HERE} speed")
    return max(1, round(variant.seconds / speed["metrics"]["seconds_an_epoch"]))


def rate_trials(name: str, data_dir: str = "") -> list[Trial]:
    """None where there is nothing to choose."""
    variant = VARIANTS[name]
    trials = []
    for rate in variant.rates if len(variant.rates) > 1 else ():
        changes = settings_of(variant, epochs_of(name), data_dir, rate)
        said = about(variant, 0, data_dir) | {"rate": rate}
        trials.append(Trial(f"search-{name}-{rate:.3g}", changes, about=said))
    return trials


def best_rate(name: str) -> float:
    """A multiple of the method's rate. Raises `UsageError` where one was not tried."""
    tried = records_of("claims", rate_trials(name), f"{HERE} search")
    return max(tried, key=top1)["rate"] if tried else 1


def comparisons(data_dir: str, seeds: int) -> list[Trial]:
    trials = []
    for seed in range(seeds):
        for name, variant in VARIANTS.items():
            changes = settings_of(variant, epochs_of(name), data_dir, best_rate(name))
            epochs_before = epochs_of(variant.before) if variant.before else 0
            trials.append(Trial(name, changes, seed, about(variant, epochs_before, data_dir)))
    return trials


# ---- what is done ----


def trained(trial: Trial, data: Dataset) -> tuple[empssl.Encoder, dict]:
    """The encoder and its training's metrics; the first of two phases has its seconds apart."""
    config = trial.settings()
    if config.eval_only:
        return empssl.untrained_encoder(config, data.train_images), {}
    if "before" in trial.about:
        return trained_in_two_phases(trial, data)
    encoder, metrics = train(config, data)
    if trial.about["settled"]:
        encoder.prepare = None  # no noise
        light = dataclasses.replace(config, augmentation="light")  # as the untrained encoder saw
        empssl.settle(encoder, data.train_images, light)
    return encoder, metrics


def trained_in_two_phases(trial: Trial, data: Dataset) -> tuple[empssl.Encoder, dict]:
    first, config = trial._replace(flags=trial.about["before"]).settings(), trial.settings()
    encoder_before, metrics_before = train(first, data)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "encoder.pt"
        save_encoder(path, encoder_before)
        config.warm_last_stage = str(path)
        encoder, metrics = train(config, data)
    return encoder, metrics | {"seconds_before": metrics_before["train_seconds"]}


def time_epochs(trial: Trial, data: Dataset) -> dict:
    _, metrics = trained(trial, fewer(data, trial.about["images"]))
    return metrics | {"seconds_an_epoch": metrics["train_seconds"] / trial.settings().epochs}


def score_on_held_out(trial: Trial, data: Dataset) -> dict:
    part = holdout(data, trial.about["images"])
    encoder, metrics = trained(trial, part)
    return metrics | probe_bag(encoder, trial.settings(), part)


def make(trial: Trial, data: Dataset) -> dict:
    """Train on a variant's images, probe on `IMAGES`."""
    encoder, metrics = trained(trial, fewer(data, trial.about["images"]))
    return metrics | probe_bag(encoder, trial.settings(), fewer(data, IMAGES))


# ---- what came out ----

# Student's t, of 95 %, by the number of pairs.
QUANTILES = {3: 4.30, 4: 3.18, 5: 2.78, 6: 2.57}


def paired(claim: Claim, metric: str = "linear_top1") -> list[float]:
    """`first` over `second`, in points, of each seed that both have."""
    first, second = (named("claims", name) for name in (claim.first, claim.second))
    return differences(first, second, metric)


def verdict(points: list[float], above: float) -> str:
    """Decided where `above` lies outside the mean's interval of 95 %, by Student's t."""
    if len(points) not in QUANTILES:
        return "not decided"
    off = statistics.mean(points) - above
    doubt = QUANTILES[len(points)] * statistics.stdev(points) / len(points) ** 0.5
    if abs(off) <= doubt:
        return "not decided"
    return "holds" if off > 0 else "does not hold here"


def main(argv: list[str] | None = None) -> None:
    parser = flags("The claims of three papers, tried.", "data/cifar10-jpeg")
    parser.add_argument("what", choices=("speed", "search", "compare"))
    typed = parser.parse_args(argv)
    keep_freed_memory()
    data = load_dataset("imagefolder", typed.data_dir)
    if typed.what == "speed":
        trials = [speed_trial(name, typed.data_dir) for name, v in VARIANTS.items() if v.seconds]
        make_all("claims", trials, data, time_epochs)
    elif typed.what == "search":
        trials = [trial for name in VARIANTS for trial in rate_trials(name, typed.data_dir)]
        make_all("claims", trials, data, score_on_held_out)
    else:
        make_all("claims", comparisons(typed.data_dir, typed.seeds), data, make)


if __name__ == "__main__":
    with one_sentence():
        main()
