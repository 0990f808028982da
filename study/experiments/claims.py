"""What three papers claim, tried here, each claim by one comparison of two runs.

    python -m study.experiments.claims speed      the seconds of an epoch: let nothing else run
    python -m study.experiments.claims search     rates, on held-out training images
    python -m study.experiments.claims compare    three seeds

A run is a method with the settings that study.experiments.methods found for it and, where something
is changed, with the best of three rates or more. Claims are of S3L (arXiv 2103.13559), of Bordes,
Balestriero and Vincent (2303.01986), and of single-branch instance discrimination (2404.19289).
Records are kept in claims.jsonl.
"""

import dataclasses
import statistics
import tempfile
from pathlib import Path
from typing import NamedTuple

import empssl
from empssl_support.cli import one_sentence
from empssl_support.data import Dataset, load_dataset, to_device
from empssl_support.files import save_encoder
from empssl_support.machine import keep_freed_memory
from empssl_support.settings import pick_device
from study.experiments.cells import differences
from study.experiments.methods import EPOCHS, IMAGES, best_try, flags_of
from study.experiments.records import named
from study.experiments.runs import flags_of_trials
from study.experiments.trials import (
    Trial,
    fewer,
    holdout,
    make_all,
    probe_bag,
    records_of,
    top1,
    train,
    widened,
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
    rates: tuple[float, ...] = ()  # to choose from, as multiples of the method's rate
    like: str = ""  # a variant whose epochs and rate it takes
    settled: bool = False  # BatchNorm's averages are taken anew, of patches without noise
    whole: bool = False  # settled and probed on whole images, in place of crops


AROUND = (1 / 3, 1, 3)
# Of noise, whose first tries were the better the lower the rate.
DOWN = (1 / 729, 1 / 243, 1 / 81, 1 / 27, 1 / 9, 1 / 3, 1, 3)
FEW = {"images": 2_000, "seconds": 45.0, "rates": AROUND}
SMALL = {"changes": "--drop-last-stage", "images": 5_000, "seconds": 45.0, "rates": AROUND}
BANK = {"images": 5_000, "epochs": 100, "rates": AROUND}
SIZES = {"seconds": 107.0, "rates": AROUND}  # the seconds that whole epochs of each come near


def noise(sigma: float, changes: str = "", **others) -> Variant:
    changes = f"--augmentation noise --noise {sigma} {changes}".strip()
    return Variant("simclr", changes, rates=DOWN, settled=True, **others)


WHOLE = "--crops published --eval-patches 1"
VARIANTS = {
    "simclr": Variant("simclr"),
    "untrained": Variant("simclr", "--eval-only", settled=True),
    "untrained-whole-image": Variant(
        "simclr", "--eval-only --eval-patches 1", settled=True, whole=True
    ),
    # A temperature that suits hundreds of negatives leaves nearly all single ones no gradient.
    "one-negative": Variant("simclr", "--negatives 1 --temperature 0.5", rates=AROUND),
    "noise-0.25": noise(0.25),
    "noise-1": noise(1),
    "noise-2": noise(2),
    "noise-1-whole-image": noise(1, WHOLE, whole=True),
    "noise-1-temperature-0.5": noise(1, "--temperature 0.5"),
    "batch-64": Variant("simclr", "--batch 64", rates=(1 / 9, 1 / 3, 1)),
    "single-5000": Variant("single", **BANK),
    "single-no-distillation": Variant("single", "--distillation 0", **BANK),
    # CutMix is left out: with it the two updates differ in more than what the paper corrects.
    "single-without-cutmix": Variant("single", "--cutmix 0", **BANK),
    "single-moving-average": Variant("single", "--cutmix 0 --bank-update average", **BANK),
    "few-single": Variant("single", **FEW),
    "few-simclr": Variant("simclr", **FEW),
    "few-vicreg": Variant("vicreg", **FEW),
    "few-empssl": Variant("empssl", **FEW),
    "small-single": Variant("single", **SMALL),
    "small-simclr": Variant("simclr", **SMALL),
    "small-vicreg": Variant("vicreg", **SMALL),
    "small-empssl": Variant("empssl", **SMALL),
    "one-size": Variant("simclr", **SIZES),
    "small-size-first": Variant("simclr", "--size-schedule 8:0.7,16:0.3", **SIZES),
    "enlarged": Variant("simclr", "--patch-size 32", **SIZES),
    "without-last-stage": Variant("simclr", "--drop-last-stage", seconds=30.0, rates=AROUND),
    "last-stage-added": Variant("simclr", seconds=77.0, before="without-last-stage", rates=AROUND),
    # One-size once more: runs are compared on one kind of device, and one-size may be of another.
    "all-stages-at-once": Variant("simclr", like="one-size"),
    "a-third-of-the-images": Variant("simclr", images=IMAGES // 3, rates=AROUND),
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
OURS = "asked here"  # what a reader of these papers would ask, and none of them claims
NO_WORSE, LEARNS = -1.0, 1.0  # points
CLAIMS = [
    Claim(DEMOCRATIC, "one negative trains", "one-negative", "untrained", "images", LEARNS),
    Claim(OURS, "one negative is enough", "one-negative", "simclr", "epochs", NO_WORSE),
    Claim(DEMOCRATIC, "noise of .25 alone trains", "noise-0.25", "untrained", "images", LEARNS),
    Claim(DEMOCRATIC, "noise of 1 alone trains", "noise-1", "untrained", "images", LEARNS),
    Claim(DEMOCRATIC, "noise of 2 alone trains", "noise-2", "untrained", "images", LEARNS),
    Claim(
        DEMOCRATIC,
        "noise of 1 trains at temperature .5",
        "noise-1-temperature-0.5",
        "untrained",
        "images",
        LEARNS,
    ),
    Claim(
        DEMOCRATIC,
        "noise of 1 trains on whole images",
        "noise-1-whole-image",
        "untrained-whole-image",
        "images",
        LEARNS,
    ),
    Claim(DEMOCRATIC, "batches of 64 are enough", "batch-64", "simclr", "epochs", NO_WORSE),
    Claim(
        SINGLE,
        "the corrected update helps",
        "single-without-cutmix",
        "single-moving-average",
        "epochs",
    ),
    Claim(SINGLE, "SqrtKL helps", "single-5000", "single-no-distillation", "epochs"),
    Claim(SINGLE, "few images: better than SimCLR", "few-single", "few-simclr", "seconds"),
    Claim(SINGLE, "few images: better than VICReg", "few-single", "few-vicreg", "seconds"),
    Claim(OURS, "few images: single-branch over EMP-SSL", "few-single", "few-empssl", "seconds"),
    Claim(SINGLE, "small model: better than SimCLR", "small-single", "small-simclr", "seconds"),
    Claim(SINGLE, "small model: better than VICReg", "small-single", "small-vicreg", "seconds"),
    Claim(
        OURS, "small model: single-branch over EMP-SSL", "small-single", "small-empssl", "seconds"
    ),
    Claim(S3L, "a small size first, then the full one", "small-size-first", "one-size", "seconds"),
    Claim(S3L, "patches need not be enlarged", "one-size", "enlarged", "seconds", NO_WORSE),
    Claim(
        S3L,
        "the last stage later, on frozen ones",
        "last-stage-added",
        "all-stages-at-once",
        "seconds",
        NO_WORSE,
    ),
    Claim(S3L, "few images are enough", "a-third-of-the-images", "simclr", "steps", NO_WORSE),
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


def about(variant: Variant, before: str | None = None) -> dict:
    """What a trial's record says beside its settings; before: the settings of a first phase."""
    said = {"images": variant.images, "settled": variant.settled, "whole": variant.whole}
    return said | {"before": before} if before else said


def settings_before(variant: Variant) -> str | None:
    """Where the data lie is left out: it is no part of what was done."""
    name = variant.before
    return settings_of(VARIANTS[name], epochs_of(name), "", best_rate(name)) if name else None


def speed_trial(name: str, data_dir: str = "") -> Trial:
    """Two epochs on many images, ten on few: there the first step counts for less.

    Which rate and temperature the search has found takes no time.
    """
    variant = VARIANTS[name]
    epochs = 2 if variant.images == IMAGES else 10
    before = settings_of(VARIANTS[variant.before], 1, "") if variant.before else None
    settings = settings_of(variant, epochs, data_dir)
    said, whatever = about(variant, before), ("lr", "temperature")
    return Trial(f"speed-{name}", settings, about=said, whatever=whatever)


def seconds_an_epoch(name: str) -> float:
    """Raises `UsageError` where that was not measured."""
    (speed,) = records_of("claims", [speed_trial(name)], f"{HERE} speed")
    return speed["metrics"]["seconds_an_epoch"]


def model_of(name: str) -> str:
    """The variant whose epochs and rate it takes: itself, as a rule."""
    return VARIANTS[name].like or name


def epochs_of(name: str) -> int:
    """Raises `UsageError` where a speed is needed and was not measured."""
    name = model_of(name)
    variant = VARIANTS[name]
    if variant.epochs:
        return variant.epochs
    if variant.seconds is None:
        # As many steps as the method's best try, also where there are fewer images.
        best = EPOCHS if variant.method == "empssl" else best_try(variant.method)["epochs"]
        return best * IMAGES // variant.images
    return max(1, round(variant.seconds / seconds_an_epoch(name)))


def rate_trials(name: str, data_dir: str = "") -> list[Trial]:
    """None where there is nothing to choose; one beyond an end where the best made lies there."""
    variant = VARIANTS[name]
    if not variant.rates:
        return []
    epochs, said = epochs_of(name), about(variant, settings_before(variant))

    def make_trial(rate: float) -> Trial:
        settings = settings_of(variant, epochs, data_dir, rate)
        return Trial(f"search-{name}-{rate:.3g}", settings, about=said | {"rate": rate})

    rates = widened(variant.rates, lambda rate: make_trial(rate).record("claims"))
    return [make_trial(rate) for rate in rates]


def left_to_search(data_dir: str = "") -> list[Trial]:
    """What is on record leads to; a second phase waits until the first one's rate is found."""

    def left(name: str) -> list[Trial]:
        return [trial for trial in rate_trials(name, data_dir) if not trial.record("claims")]

    trials = []
    for name, variant in VARIANTS.items():
        if not (variant.before and left(variant.before)):
            trials += left(name)
    return trials


def best_rate(name: str) -> float:
    """A multiple of the method's rate. Raises `UsageError` where one was not tried."""
    tried = records_of("claims", rate_trials(model_of(name)), f"{HERE} search")
    return max(tried, key=top1)["rate"] if tried else 1


def comparisons(data_dir: str, seeds: int) -> list[Trial]:
    """Twice as many seeds where a claim is that something is no worse.

    Three seeds would not show it of runs that are alike: they differ by half a point by chance.
    """
    close = {run for c in CLAIMS if c.above == NO_WORSE for run in (c.first, c.second)}
    trials = []
    for seed in range(2 * seeds):
        for name, variant in VARIANTS.items():
            if seed >= seeds and name not in close:
                continue
            settings = settings_of(variant, epochs_of(name), data_dir, best_rate(name))
            trials.append(Trial(name, settings, seed, about(variant, settings_before(variant))))
    return trials


# ---- what is done ----


def trained(trial: Trial, data: Dataset) -> tuple[empssl.Encoder, dict]:
    """The encoder and its training's metrics; the first of two phases has its seconds apart."""
    config = trial.settings()
    if "before" in trial.about:
        return trained_in_two_phases(trial, data)
    if config.eval_only:
        encoder, metrics = empssl.new_encoder(config, data.train_images), {}
    else:
        encoder, metrics = train(config, data)
    if trial.about["settled"]:
        encoder.prepare = None  # no noise
        light = dataclasses.replace(config, augmentation="light")
        crops = empssl.training_augmentation(light, data.train_images.shape[2:])
        empssl.settle(encoder, data.train_images, whole_image(trial) or crops, config)
    return encoder, metrics


def trained_in_two_phases(trial: Trial, data: Dataset) -> tuple[empssl.Encoder, dict]:
    config = trial.settings()
    first = trial._replace(flags=trial.about["before"]).on(config.device).settings()
    encoder_before, metrics_before = train(first, data)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "encoder.pt"
        save_encoder(path, encoder_before)
        config.warm_last_stage = str(path)
        encoder, metrics = train(config, data)
    return encoder, metrics | {"seconds_before": metrics_before["train_seconds"]}


def whole_image(trial: Trial) -> empssl.Augmentation | None:
    return empssl.Augmentation.none(area=(1.0, 1.0)) if trial.about["whole"] else None


def time_epochs(trial: Trial, data: Dataset) -> dict:
    _, metrics = trained(trial, fewer(data, trial.about["images"]))
    return metrics | {"seconds_an_epoch": metrics["train_seconds"] / trial.settings().epochs}


def score_on_held_out(trial: Trial, data: Dataset) -> dict:
    return train_and_probe(trial, holdout(data, trial.about["images"]), holdout(data, IMAGES))


def make(trial: Trial, data: Dataset) -> dict:
    return train_and_probe(trial, fewer(data, trial.about["images"]), fewer(data, IMAGES))


def train_and_probe(trial: Trial, part: Dataset, probed: Dataset) -> dict:
    """Train on a variant's images, probe with the labels of `IMAGES`."""
    encoder, metrics = trained(trial, part)
    return metrics | probe_bag(encoder, trial.settings(), probed, whole_image(trial))


# ---- what came out ----

# Student's t, of 95 %, by the number of pairs.
QUANTILES = {3: 4.30, 4: 3.18, 5: 2.78, 6: 2.57}


def paired(claim: Claim, metric: str = "linear_top1") -> list[float]:
    """`first` over `second`, in points, of each seed that both have."""
    first, second = (named("claims", name) for name in (claim.first, claim.second))
    return differences(first, second, metric)


def interval(points: list[float]) -> tuple[float, float] | None:
    """Of 95 % for their mean, by Student's t; None for too few or too many points."""
    if len(points) not in QUANTILES:
        return None
    mean = statistics.mean(points)
    doubt = QUANTILES[len(points)] * statistics.stdev(points) / len(points) ** 0.5
    return mean - doubt, mean + doubt


HOLDS, FAILS, OPEN = "holds", "does not hold here", "not decided"


def verdict(points: list[float], above: float) -> str:
    """Decided where `above` lies outside the interval."""
    low, high = interval(points) or (above, above)
    if low > above:
        return HOLDS
    return FAILS if high < above else OPEN


def main(argv: list[str] | None = None) -> None:
    parser = flags_of_trials("The claims of three papers, tried.", "data/cifar10-jpeg")
    parser.add_argument("what", choices=("speed", "search", "compare"))
    typed = parser.parse_args(argv)
    keep_freed_memory()
    # Seconds are of a CPU, whatever trains.
    device = "cpu" if typed.what == "speed" else pick_device(typed.device)
    data = to_device(load_dataset("imagefolder", typed.data_dir), device)
    if typed.what == "speed":
        trials = [speed_trial(name, typed.data_dir) for name, v in VARIANTS.items() if v.seconds]
        make_all("claims", trials, data, time_epochs, device)
    elif typed.what == "search":
        while trials := left_to_search(typed.data_dir):
            make_all("claims", trials, data, score_on_held_out, device)
    else:
        trials = comparisons(typed.data_dir, typed.seeds)
        make_all("claims", trials, data, make, device)


if __name__ == "__main__":
    with one_sentence():
        main()
