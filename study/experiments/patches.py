"""How many patches an image? python -m study.experiments.patches

n = 2, 5, 10, 20 and 50 patches, 300 steps each, in two comparisons, three seeds:

    images   50 images a batch, n patches of each: all see the same images
    patches  1,000 patches a batch, of 1,000 / n images: all see as many patches

How strongly lambda pulls depends on n, so each is made twice: with lambda = R_max, about the
paper's ratio, and with the lambda that brings the mean cosine between two patches of an image, c,
to where it is for n = 20. That lambda is searched for in runs of the same kind with another seed.
At equal patches, where R_max differs with the batch, each is also made with the lambda of n = 20.
The learning rate is preset laptop's, found with 50 images a batch; the largest and the smallest
batch are made with another one too. Records are kept in patches.jsonl.
"""

import copy
import math

import torch

import empssl
from empssl_support.cli import one_sentence
from empssl_support.data import Dataset, load_dataset
from empssl_support.machine import keep_freed_memory
from study.experiments.methods import flags_of
from study.experiments.records import read
from study.experiments.runs import flags
from study.experiments.trials import Trial, fewer, make_all, probe_bag, records_of, train

COMPARISONS = ("images", "patches")
NUMBERS = (2, 5, 10, 20, 50)
REFERENCE = 20  # the paper's; with 50 images a batch it belongs to both comparisons
IMAGES = 15_000
STEPS = 300
DIM = 512
SEED_OF_SEARCH = 100
NEAR_ENOUGH = 0.015  # of c
MOST_TRIES = 5
ANOTHER_RATE = "another rate"
RATE = empssl.PRESETS["laptop"]["lr"]
OTHER_RATES = {2: 0.45, 50: 0.05}  # of n patches at equal patches, by equal cosine


def highest_rate(b: int, d: int = DIM, eps2: float = 0.2) -> float:
    """R_max: the coding rate of b < d embeddings at right angles to each other."""
    return b / 2 * math.log1p(d / (b * eps2))


def images_a_batch(comparison: str, n: int) -> int:
    return 50 if comparison == "images" else 1000 // n


@torch.no_grad()
def pairwise_cosine(encoder: empssl.Encoder, config: empssl.Config, data: Dataset) -> float:
    """c: the mean cosine between two patches of an image, as training draws them.

    By (n |m|^2 - 1) / (n - 1), where m is the mean of an image's n unit embeddings.
    """
    # BatchNorm as in training, by the batch's own statistics; the encoder itself stays as it is.
    encoder = copy.deepcopy(encoder).train()
    n = 8
    size = data.train_images.shape[2:]
    augmentation = empssl.training_augmentation(config, size)
    order = empssl.generator_of(0, "pairwise cosine", 0)
    some = torch.randperm(len(data.train_images), generator=order)[:1000]
    found = []
    for i, index in enumerate(some.split(50)):
        chance = empssl.generator_of(0, "pairwise cosine of", i)
        params = empssl.sample_patches(len(index), n, size, augmentation, chance)
        x = empssl.extract_patches(data.train_images, index, params, config.patch_size)
        z = encoder(x).unflatten(0, (n, -1))  # (n, b, d)
        found.append((n * z.mean(0).square().sum(-1) - 1) / (n - 1))  # (b,)
    return torch.cat(found).mean().item()


# ---- trials ----


def make_trial(
    name: str, data_dir: str, n: int, b: int, lam: float, seed: int, lr: float = RATE, **about
) -> Trial:
    """`STEPS` steps, on at most `IMAGES` images."""
    images = min(IMAGES, b * STEPS)
    changes = f"--patches {n} --batch {b} --lam {lam:.4g} --lr {lr}"
    changes += f" --subset {images} --epochs {b * STEPS // images}"
    return Trial(name, flags_of("empssl", data_dir, changes), seed, about | {"n": n})


def name_of(comparison: str, n: int, how: str) -> str:
    return f"equal-{comparison}-{n}-{how.replace(' ', '-')}"


def train_for_cosine(trial: Trial, data: Dataset) -> dict:
    config = trial.settings()
    part = fewer(data, config.subset)
    encoder, metrics = train(config, part)
    return metrics | {"cosine": pairwise_cosine(encoder, config, part)}


def make(trial: Trial, data: Dataset) -> dict:
    config = trial.settings()
    encoder, metrics = train(config, fewer(data, config.subset))
    part = fewer(data, IMAGES)
    metrics |= {"cosine": pairwise_cosine(encoder, config, part)}
    return metrics | probe_bag(encoder, config, part)


# ---- the lambda that gives a cosine ----


def try_of_lambda(comparison: str, n: int, lam: float, data_dir: str = "") -> Trial:
    b = images_a_batch(comparison, n)
    return make_trial(f"lambda-{comparison}-{n}-{lam:.4g}", data_dir, n, b, lam, SEED_OF_SEARCH)


def reference(data_dir: str = "") -> Trial:
    """The try whose cosine the others are brought to."""
    return try_of_lambda("images", REFERENCE, highest_rate(50), data_dir)


def tries_of_lambda(comparison: str, n: int) -> list[tuple[float, float]]:
    """(lambda, c) of what is on record, in its order."""
    start = f"lambda-{comparison}-{n}-"
    found = [record for record in read("patches") if record["name"].startswith(start)]
    return [(record["lam"], record["metrics"]["cosine"]) for record in found]


def next_lambda(tried: list[tuple[float, float]], wanted: float) -> float:
    """Where a straight line through the two nearest tries, c over log lambda, has `wanted`."""
    nearest = sorted(tried, key=lambda pair: abs(pair[1] - wanted))[:2]
    lam, c = nearest[0]
    slope = 0.2  # of c, for an e-fold lambda, while there is one try alone
    if len(nearest) == 2:
        other, other_c = nearest[1]
        slope = max(0.05, (c - other_c) / math.log(lam / other))
    # No more than three times up or down in one go.
    stride = min(max((wanted - c) / slope, -math.log(3)), math.log(3))
    return lam * math.exp(stride)


def closest(tried: list[tuple[float, float]], wanted: float) -> tuple[float, float]:
    """The lambda whose c is nearest to `wanted`, and how far it is off."""
    lam, c = min(tried, key=lambda pair: abs(pair[1] - wanted))
    return lam, abs(c - wanted)


def wanted_cosine() -> float:
    (record,) = records_of("patches", [reference()], "study.experiments.patches")
    return record["metrics"]["cosine"]


def search_lambda(comparison: str, n: int, data: Dataset, data_dir: str) -> None:
    """Try lambdas, the first one R_max, until c is near enough to what is wanted."""
    wanted = wanted_cosine()
    lam = highest_rate(images_a_batch(comparison, n))
    make_all("patches", [try_of_lambda(comparison, n, lam, data_dir)], data, train_for_cosine)
    tried = tries_of_lambda(comparison, n)
    while closest(tried, wanted)[1] > NEAR_ENOUGH and len(tried) < MOST_TRIES:
        lam = next_lambda(tried, wanted)
        make_all("patches", [try_of_lambda(comparison, n, lam, data_dir)], data, train_for_cosine)
        tried = tries_of_lambda(comparison, n)


# ---- the comparison ----


def comparisons(data_dir: str, seeds: int) -> list[Trial]:
    """The reference, and of every other number and comparison a run of each lambda."""
    trials = []
    for seed in range(seeds):
        ours = make_trial("reference", data_dir, REFERENCE, 50, highest_rate(50), seed)
        trials.append(ours)
        for comparison in COMPARISONS:
            for n in NUMBERS:
                if n != REFERENCE:
                    trials += of_number(comparison, n, data_dir, seed)
    return trials


def of_number(comparison: str, n: int, data_dir: str, seed: int) -> list[Trial]:
    b = images_a_batch(comparison, n)
    equal_cosine, _ = closest(tries_of_lambda(comparison, n), wanted_cosine())
    ways = {"equal ratio": (highest_rate(b), RATE), "equal cosine": (equal_cosine, RATE)}
    if comparison == "patches":
        ways["equal lambda"] = highest_rate(50), RATE
    if comparison == "patches" and n in OTHER_RATES:
        ways[ANOTHER_RATE] = equal_cosine, OTHER_RATES[n]
    trials = []
    for how, (lam, lr) in ways.items():
        about = {"comparison": comparison, "lambda_by": how}
        name = name_of(comparison, n, how)
        trials.append(make_trial(name, data_dir, n, b, lam, seed, lr, **about))
    return trials


def main(argv: list[str] | None = None) -> None:
    parser = flags("Numbers of patches, at equal images and at equal patches.", "data/cifar10-jpeg")
    typed = parser.parse_args(argv)
    keep_freed_memory()
    data = load_dataset("imagefolder", typed.data_dir)
    make_all("patches", [reference(typed.data_dir)], data, train_for_cosine)
    for comparison in COMPARISONS:
        for n in NUMBERS:
            if n != REFERENCE:
                search_lambda(comparison, n, data, typed.data_dir)
    make_all("patches", comparisons(typed.data_dir, typed.seeds), data, make)


if __name__ == "__main__":
    with one_sentence():
        main()
