"""Encoders probed on other images than they were trained on.

    python -m study.experiments.transfer                    the table: see PAIRS
    python -m study.experiments.transfer --from A --to B    EMP-SSL between any two

A and B are data sets' names or folders of images; `photos:0-4` is the first five classes of photos.
Records are kept in transfer.jsonl.
"""

import shlex

import empssl
from empssl_support.cli import UsageError, one_sentence
from empssl_support.data import DATASETS, Dataset, load_dataset, to_device
from empssl_support.machine import keep_freed_memory
from empssl_support.settings import pick_device
from study.experiments.methods import EPOCHS, IMAGES, best_try
from study.experiments.runs import flags_of_trials
from study.experiments.trials import Trial, fewer, make_all, probe_bag, train

METHODS = ("empssl", "simclr", "vicreg")


def pairs(folder: str) -> list[tuple[str, str]]:
    """Of the table: trained on the first, probed on the second."""
    first, others = f"{folder}:0-4", f"{folder}:5-9"
    return [(first, others), (others, first), (folder, "shapes"), ("shapes", folder)]


def images(where: str, data_dir: str) -> Dataset:
    """Raises `UsageError` where the classes are not all there, and as `load_dataset`."""
    place, _, classes = where.partition(":")
    if place in DATASETS:
        data = load_dataset(place, data_dir)
    else:
        data = load_dataset("imagefolder", place)
    if not classes:
        return data
    first, _, last = classes.partition("-")
    if not (first.isdigit() and last.isdigit() and int(first) < int(last) < len(data.classes)):
        raise UsageError(
            f"{where} names no classes of {place}, which has {len(data.classes)}; "
            f"write :0-4 for the first five."
        )
    return of_classes(data, int(first), int(last))


def of_classes(data: Dataset, first: int, last: int) -> Dataset:
    """The images of classes `first` to `last`, numbered from 0 on."""

    def those(x, y):
        rows = (y >= first) & (y <= last)
        return x[rows], y[rows] - first

    train_images, train_labels = those(data.train_images, data.train_labels)
    test_images, test_labels = those(data.test_images, data.test_labels)
    return data._replace(
        train_images=train_images,
        train_labels=train_labels,
        test_images=test_images,
        test_labels=test_labels,
        classes=data.classes[first : last + 1],
    )


def make_trial(method: str, source: str, target: str, changes: str, seed: int, most=None) -> Trial:
    """most: of training images."""
    place = source.partition(":")[0]
    where = f"--dataset imagefolder --data-dir {shlex.quote(place)}"
    if place in DATASETS:
        where = f"--dataset {place}"
    about = {"source": source, "target": target, "images": most}
    named = f"{method} from {source} to {target}"
    if most:
        named += f", of at most {most:,} images"
    return Trial(named, f"--method {method} {where} {changes}", seed, about)


def of_the_table(folder: str, seeds: int) -> list[Trial]:
    """Each method as study.experiments.methods found it, for the epochs of equal seconds.

    Beside them the untrained encoder, whose BatchNorms have seen the source's patches. `shapes` is
    recoloured as reproduce.sh does it: lightly recoloured, its colours would name an image.
    """
    trials = []
    for seed in range(seeds):
        for source, target in pairs(folder):
            colours = "paper" if source == "shapes" else "light"
            preset = f"--preset laptop --device cpu --augmentation {colours}"
            for method in METHODS:
                chosen, epochs = "", EPOCHS
                if method != "empssl":
                    best = best_try(method)
                    chosen, epochs = best["chosen"], best["epochs"]
                changes = " ".join(f"{preset} {chosen} --epochs {epochs}".split())
                trials.append(make_trial(method, source, target, changes, seed, IMAGES))
            untrained = make_trial("empssl", source, target, f"{preset} --eval-only", seed, IMAGES)
            trials.append(untrained._replace(name=f"untrained: {untrained.name}"))
    return trials


def make(trial: Trial, data_dir: str) -> dict:
    """The accuracy on the target's test images, and on the source's own where it has labels.

    With an untrained encoder also that of the target's raw pixels, by a linear probe. Raises
    `UsageError` for a target without labels.
    """
    config, most = trial.settings(), trial.about["images"]

    def some(where: str) -> Dataset:
        data = images(where, data_dir)
        if most and most < len(data.train_images):
            data = fewer(data, most)
        return to_device(data, config.device)

    source, target = some(trial.about["source"]), some(trial.about["target"])
    if target.test_labels is None:
        raise UsageError(
            f"{trial.about['target']} has no labels to probe with; give --to a folder that has "
            f"train/<class>/ and test/<class>/."
        )
    if config.eval_only:
        encoder = empssl.untrained_encoder(config, source.train_images)
        raw_pixels, _ = empssl.probe_pixels(target, empssl.linear_probe)
        metrics = {"raw_pixels_top1": raw_pixels}
    else:
        encoder, metrics = train(config, source)
    metrics |= probe_bag(encoder, config, target)
    if source.test_labels is not None:
        own = probe_bag(encoder, config, source)
        metrics |= {f"source_{key}": value for key, value in own.items()}
    return metrics


def main(argv: list[str] | None = None) -> None:
    parser = flags_of_trials("Train on some images, probe on others.")
    parser.add_argument("--from", dest="source", help="to train on; without it, the table")
    parser.add_argument("--to", dest="target", default="cifar100", help="labelled, to probe on")
    typed = parser.parse_args(argv)
    keep_freed_memory()
    if typed.source is None:
        trials = of_the_table(f"{typed.data_dir}/cifar10-jpeg", typed.seeds)
    else:
        ends = typed.source, typed.target
        trials = [make_trial("empssl", *ends, "", seed) for seed in range(typed.seeds)]
    make_all("transfer", trials, typed.data_dir, make, pick_device(typed.device))


if __name__ == "__main__":
    with one_sentence():
        main()
