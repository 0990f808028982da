"""How many patches an image? python -m study.experiments.patches

n = 2, 5, 10, 20 and 50 patches, 300 steps each, in two comparisons, three seeds:

    images   50 images a batch, n patches of each: all see the same images
    patches  1,000 patches a batch, of 1,000 / n images: all see as many patches

How strongly lambda pulls depends on n, so each is made twice: with lambda = R_max, about the
paper's ratio for n = 20, and with the lambda that brings the mean cosine between two patches of an
image, c, to where it is for n = 20. That lambda is searched for with 100 steps. Records are kept in
patches.jsonl.
"""

import math

import torch

import empssl
from empssl_support.cli import one_sentence
from empssl_support.data import Dataset, load_dataset
from empssl_support.machine import keep_freed_memory
from study.experiments.methods import flags_of
from study.experiments.records import read
from study.experiments.runs import flags
from study.experiments.trials import Trial, all_of, fewer, probe_bag, train

NUMBERS = (2, 5, 10, 20, 50)
REFERENCE = 20  # the paper's
IMAGES = 15_000
STEPS = 300
STEPS_OF_SEARCH = 100
NEAR_ENOUGH = 0.02  # of c
DIM = 512


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
    n, encoder = 8, encoder.train()  # BatchNorm as in training: by the batch's own statistics
    augmentation = empssl.training_augmentation(config, data.train_images.shape[2:])
    found = []
    for i, index in enumerate(torch.arange(min(1000, len(data.train_images))).split(50)):
        chance = empssl.generator(0, "pairwise cosine", i)
        size = data.train_images.shape[2:]
        params = empssl.sample_patches(len(index), n, size, augmentation, chance)
        x = empssl.extract_patches(data.train_images, index, params, config.patch_size)
        z = encoder(x).unflatten(0, (n, -1))  # (n, b, d)
        found.append((n * z.mean(0).square().sum(-1) - 1) / (n - 1))  # (b,)
    return torch.cat(found).mean().item()


def trial(name: str, data_dir: str, n: int, b: int, lam: float, steps: int, seed=0, **about):
    """So many steps, on at most `IMAGES` images."""
    images = min(IMAGES, b * steps)
    changes = f"--patches {n} --batch {b} --lam {lam:.4g}"
    changes += f" --subset {images} --epochs {b * steps // images}"
    return Trial(name, flags_of("empssl", data_dir, changes), seed, about | {"n": n})


# ---- the lambda that gives a cosine ----


def train_for_cosine(trial: Trial, data: Dataset) -> dict:
    config = trial.settings()
    part = fewer(data, config.subset)
    encoder, metrics = train(config, part)
    return metrics | {"cosine": pairwise_cosine(encoder, config, part)}


def tries_of_lambda(n: int) -> list[tuple[float, float]]:
    """(lambda, c) of what is on record, in its order."""
    found = [r for r in read("patches") if r["name"].startswith(f"lambda-of-{n}-patches-")]
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


def search_lambda(n: int, wanted: float | None, data: Dataset, data_dir: str, most: int = 5):
    """Try lambdas for n patches, the first one R_max, until c is near enough to what is wanted."""
    b = images_a_batch("images", n)
    lam = highest_rate(b)
    for _ in range(most):
        tried = tries_of_lambda(n)
        if tried and (wanted is None or closest(tried, wanted)[1] < NEAR_ENOUGH):
            return
        if tried:
            lam = next_lambda(tried, wanted)
        name = f"lambda-of-{n}-patches-{lam:.4g}"
        one = trial(name, data_dir, n, b, lam, STEPS_OF_SEARCH)
        all_of("patches", [one], data, train_for_cosine)


def closest(tried: list[tuple[float, float]], wanted: float) -> tuple[float, float]:
    """The lambda whose c is nearest to `wanted`, and how far it is off."""
    lam, c = min(tried, key=lambda pair: abs(pair[1] - wanted))
    return lam, abs(c - wanted)


def strength(n: int) -> float:
    """lambda / R_max with which n patches have the cosine of the reference."""
    (_, wanted), *_ = tries_of_lambda(REFERENCE)
    lam, _ = closest(tries_of_lambda(n), wanted)
    return lam / highest_rate(images_a_batch("images", n))


# ---- the comparison ----


def comparisons(data_dir: str, seeds: int) -> list[Trial]:
    trials = []
    for seed in range(seeds):
        for comparison in ("images", "patches"):
            for n in NUMBERS:
                b = images_a_batch(comparison, n)
                for how in ("fixed lambda", "equal cosine"):
                    if n == REFERENCE and how == "equal cosine":
                        continue  # it is the one with the fixed lambda
                    lam = highest_rate(b) * (1 if how == "fixed lambda" else strength(n))
                    name = f"equal-{comparison}-{n}-{how.replace(' ', '-')}"
                    about = {"comparison": comparison, "lambda_by": how}
                    trials.append(trial(name, data_dir, n, b, lam, STEPS, seed, **about))
    return trials


def carry_out(trial: Trial, data: Dataset) -> dict:
    config = trial.settings()
    encoder, metrics = train(config, fewer(data, config.subset))
    part = fewer(data, IMAGES)
    metrics |= {"cosine": pairwise_cosine(encoder, config, part)}
    return metrics | probe_bag(encoder, config, part)


def main(argv: list[str] | None = None) -> None:
    parser = flags("Numbers of patches, at equal images and at equal patches.", "data/cifar10-jpeg")
    typed = parser.parse_args(argv)
    keep_freed_memory()
    data = load_dataset("imagefolder", typed.data_dir)
    search_lambda(REFERENCE, None, data, typed.data_dir)
    (_, wanted), *_ = tries_of_lambda(REFERENCE)
    for n in NUMBERS:
        if n != REFERENCE:
            search_lambda(n, wanted, data, typed.data_dir)
    all_of("patches", comparisons(typed.data_dir, typed.seeds), data, carry_out)


if __name__ == "__main__":
    with one_sentence():
        main()
