"""What three papers claim, tried here, each claim by one comparison of two runs.

    python -m study.experiments.claims speed      the seconds of an epoch: let nothing else run
    python -m study.experiments.claims search     rates of other batches, on held-out images
    python -m study.experiments.claims compare    three seeds

A run is a method with the settings that study.experiments.methods found for it. Claims are of S3L
(arXiv 2103.13559), of Bordes, Balestriero and Vincent (2303.01986), and of single-branch instance
discrimination (2404.19289). Records are kept in claims.jsonl.
"""

import statistics
import tempfile
from pathlib import Path
from typing import NamedTuple

import empssl
from empssl_support.cli import UsageError, one_sentence
from empssl_support.data import Dataset, load_dataset
from empssl_support.files import save_encoder
from empssl_support.machine import keep_freed_memory
from study.experiments.methods import EPOCHS, IMAGES, best_try, flags_of
from study.experiments.records import read
from study.experiments.runs import flags
from study.experiments.trials import Trial, all_of, fewer, holdout, probe_bag, train


class Variant(NamedTuple):
    """A method with changes, for so many epochs or, by its measured speed, so many seconds."""

    method: str
    changes: str = ""
    epochs: int | None = None  # None: as many as the method's best try, unless `seconds` are given
    seconds: float | None = None
    images: int = IMAGES
    before: str = ""  # a variant that is trained first, whose stages are then frozen
    rates: tuple[float, ...] = ()  # to choose from, as multiples of the method's rate


FEW = {"images": 2_000, "seconds": 60.0}
SMALL = {"changes": "--drop-last-stage", "seconds": 60.0}
NOISE = "--augmentation noise --noise"
BANK = {"images": 5_000, "epochs": 100}

VARIANTS = {
    "simclr": Variant("simclr"),
    "untrained": Variant("simclr", "--eval-only"),
    "one-negative": Variant("simclr", "--negatives 1"),
    "noise-0.25": Variant("simclr", f"{NOISE} 0.25"),
    "noise-1": Variant("simclr", f"{NOISE} 1"),
    "noise-2": Variant("simclr", f"{NOISE} 2"),
    "noise-1-whole-image": Variant("simclr", f"{NOISE} 1 --crops published"),
    "noise-1-temperature-0.1": Variant("simclr", f"{NOISE} 1 --temperature 0.1"),
    "noise-1-temperature-0.5": Variant("simclr", f"{NOISE} 1 --temperature 0.5"),
    "batch-64": Variant("simclr", "--batch 64", rates=(1 / 4, 1 / 2, 1)),
    "batch-1024": Variant("simclr", "--batch 1024", rates=(1, 2, 4)),
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
    "native-size": Variant("simclr", seconds=120.0),
    "enlarged": Variant("simclr", "--patch-size 32", seconds=120.0),
    "without-last-stage": Variant("simclr", "--drop-last-stage", seconds=90.0),
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


NO_WORSE = -1.0  # points
DEMOCRATIC, SINGLE, S3L = "2303.01986", "2404.19289", "2103.13559"
CLAIMS = [
    Claim(DEMOCRATIC, "one negative will do", "one-negative", "simclr", "epochs", NO_WORSE),
    Claim(DEMOCRATIC, "noise of .25 alone trains", "noise-0.25", "untrained", "images"),
    Claim(DEMOCRATIC, "noise of 1 alone trains", "noise-1", "untrained", "images"),
    Claim(DEMOCRATIC, "noise of 2 alone trains", "noise-2", "untrained", "images"),
    Claim(DEMOCRATIC, "the same on whole images", "noise-1-whole-image", "untrained", "images"),
    Claim(DEMOCRATIC, "the same, temperature .1", "noise-1-temperature-0.1", "untrained", "images"),
    Claim(DEMOCRATIC, "the same, temperature .5", "noise-1-temperature-0.5", "untrained", "images"),
    Claim(DEMOCRATIC, "batches of 64 will do", "batch-64", "simclr", "epochs", NO_WORSE),
    Claim(DEMOCRATIC, "batches of 64, not 1,024", "batch-64", "batch-1024", "epochs", NO_WORSE),
    Claim(SINGLE, "the corrected update helps", "single-5000", "single-moving-average", "epochs"),
    Claim(SINGLE, "SqrtKL helps", "single-5000", "single-no-distillation", "epochs"),
    Claim(SINGLE, "a bank of features helps", "single-5000", "single-random-bank", "epochs"),
    Claim(SINGLE, "best of few images: SimCLR", "few-single", "few-simclr", "seconds"),
    Claim(SINGLE, "best of few images: VICReg", "few-single", "few-vicreg", "seconds"),
    Claim(SINGLE, "best of few images: EMP-SSL", "few-single", "few-empssl", "seconds"),
    Claim(SINGLE, "best of small models: SimCLR", "small-single", "small-simclr", "seconds"),
    Claim(SINGLE, "best of small models: VICReg", "small-single", "small-vicreg", "seconds"),
    Claim(SINGLE, "best of small models: EMP-SSL", "small-single", "small-empssl", "seconds"),
    Claim(S3L, "a small resolution will do", "native-size", "enlarged", "seconds", NO_WORSE),
    Claim(S3L, "first without its last stage", "last-stage-added", "native-size", "seconds", -1.0),
    Claim(S3L, "few images", "a-third-of-the-images", "simclr", "steps", NO_WORSE),
]


# ---- runs ----


def settings_of(variant: Variant, epochs: int, data_dir: str, rate: float = 1) -> str:
    """rate: a multiple of the method's."""
    chosen = ""
    if variant.method != "empssl":
        best = best_try(variant.method)
        chosen = f"{best['chosen']} --lr {rate * best['lr']:.3g}"
    changes = " ".join(filter(None, (chosen, variant.changes, f"--epochs {epochs}")))
    return flags_of(variant.method, data_dir, changes)


def about(variant: Variant, epochs_before: int, data_dir: str) -> dict:
    """What a trial's record says beside its settings."""
    if not variant.before:
        return {"images": variant.images}
    first = settings_of(VARIANTS[variant.before], epochs_before, data_dir)
    return {"images": variant.images, "before": first}


def speed_trials(data_dir: str) -> list[Trial]:
    """Five epochs on few images, one on many, of all that have their seconds given."""
    trials = []
    for name, variant in VARIANTS.items():
        if variant.seconds:
            epochs = 5 if variant.images < IMAGES else 1
            changes = settings_of(variant, epochs, data_dir)
            trials.append(Trial(f"speed-{name}", changes, 0, about(variant, 1, data_dir)))
    return trials


def rate_trials(data_dir: str) -> list[Trial]:
    trials = []
    for name, variant in VARIANTS.items():
        for rate in variant.rates:
            changes = settings_of(variant, epochs_of(name), data_dir, rate)
            more = {"images": variant.images, "variant": name, "rate": rate}
            trials.append(Trial(f"search-{name}-{rate:g}", changes, about=more))
    return trials


def best_rate(name: str) -> float:
    """A multiple of the method's rate. Raises `UsageError` where none was tried."""
    if not VARIANTS[name].rates:
        return 1
    tried = [record for record in read("claims") if record.get("variant") == name]
    if not tried:
        raise UsageError(
            f"No rate of {name} is on record; run python -m study.experiments.claims search first."
        )
    return max(tried, key=lambda record: record["metrics"]["linear_top1"])["rate"]


def epochs_of(name: str) -> int:
    """Raises `UsageError` where a speed is needed and was not measured."""
    variant = VARIANTS[name]
    if variant.epochs:
        return variant.epochs
    if variant.seconds is None:
        # As many steps as the method's best try, also where there are fewer images.
        best = EPOCHS if variant.method == "empssl" else best_try(variant.method)["epochs"]
        return best * IMAGES // variant.images
    for record in read("claims"):
        if record["name"] == f"speed-{name}":
            return max(1, round(variant.seconds / record["metrics"]["seconds_an_epoch"]))
    raise UsageError("No speed is on record; run python -m study.experiments.claims speed first.")


def comparisons(data_dir: str, seeds: int) -> list[Trial]:
    trials = []
    for seed in range(seeds):
        for name, variant in VARIANTS.items():
            changes = settings_of(variant, epochs_of(name), data_dir, best_rate(name))
            epochs_before = epochs_of(variant.before) if variant.before else 0
            trials.append(Trial(name, changes, seed, about(variant, epochs_before, data_dir)))
    return trials


def trained(trial: Trial, data: Dataset) -> tuple[empssl.Encoder, dict]:
    """The encoder and its training's metrics; the first of two phases has its seconds apart."""
    config = trial.settings()
    if config.eval_only:
        return empssl.untrained_encoder(config, data.train_images), {}
    if "before" not in trial.about:
        return train(config, data)
    first = trial._replace(flags=trial.about["before"]).settings()
    encoder_before, earlier = train(first, data)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "encoder.pt"
        save_encoder(path, encoder_before)
        config.warm_last_stage = str(path)
        encoder, metrics = train(config, data)
    return encoder, metrics | {"seconds_before": earlier["train_seconds"]}


def train_alone(trial: Trial, data: Dataset) -> dict:
    _, metrics = trained(trial, fewer(data, trial.about["images"]))
    return metrics | {"seconds_an_epoch": metrics["train_seconds"] / trial.settings().epochs}


def score_on_held_out(trial: Trial, data: Dataset) -> dict:
    config, part = trial.settings(), holdout(data, trial.about["images"])
    encoder, metrics = trained(trial, part)
    return metrics | probe_bag(encoder, config, part)


def carry_out(trial: Trial, data: Dataset) -> dict:
    """Train on a variant's images, probe on `IMAGES`."""
    encoder, metrics = trained(trial, fewer(data, trial.about["images"]))
    return metrics | probe_bag(encoder, trial.settings(), fewer(data, IMAGES))


# ---- what came out ----


def differences(claim: Claim, metric: str = "linear_top1") -> list[float]:
    """`first` over `second`, in points, of each seed that both have."""
    found = {(r["name"], r["seed"]): r["metrics"].get(metric) for r in read("claims")}
    seeds = sorted(seed for name, seed in found if name == claim.first)
    pairs = [(found[claim.first, s], found.get((claim.second, s))) for s in seeds]
    return [100 * (a - b) for a, b in pairs if b is not None]


def verdict(points: list[float], above: float) -> str:
    """Decided where the mean is off by twice its standard error or more, over three seeds."""
    if len(points) < 3:
        return "not decided"
    off = statistics.mean(points) - above
    doubt = 2 * statistics.stdev(points) / len(points) ** 0.5
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
        all_of("claims", speed_trials(typed.data_dir), data, train_alone)
    elif typed.what == "search":
        all_of("claims", rate_trials(typed.data_dir), data, score_on_held_out)
    else:
        all_of("claims", comparisons(typed.data_dir, typed.seeds), data, carry_out)


if __name__ == "__main__":
    with one_sentence():
        main()
