"""Tries for preset laptop, chosen between by training images alone.

    python -m study.experiments.search [NAME ...] [--seeds 1]

A try is a run of two epochs on 15,000 of CIFAR-10's training images, scored on 5,000 others of
them, and a line of laptop.jsonl with the accuracy that it was predicted to have. The folder of
these images holds links; the test images stay unseen.
"""

import random
from pathlib import Path

from empssl_support.cli import UsageError, one_sentence
from study.experiments.runs import Recipe, flags, start_all

# The flags of each try, and what the bag of patches was predicted to score.
TRIES = {
    "lars": ("", 0.645),
    "muon": ("--optimizer muon", 0.67),
    "muon-slower": ("--optimizer muon --lr 0.15", 0.665),
    "muon-faster": ("--optimizer muon --lr 0.6", 0.675),
    "muon-wide": ("--optimizer muon --hidden 2048", 0.675),
    "muon-batch-100": ("--optimizer muon --batch 100 --lam 200 --dim 1024", 0.66),
    "muon-paper": ("--optimizer muon --augmentation paper", 0.66),
    "muon-patches-4": ("--optimizer muon --patches 4 --epochs 4", 0.675),
}


def main(argv: list[str] | None = None) -> None:
    parser = flags("Tries for preset laptop, on held-out training images.", "data/cifar10-jpeg")
    parser.add_argument("names", nargs="*", help=f"of {', '.join(TRIES)}; by default all of them")
    typed = parser.parse_args(argv)
    if unknown := set(typed.names) - TRIES.keys():
        raise UsageError(f"There is no try {min(unknown)}; there are {', '.join(TRIES)}.")
    folder = holdout(Path(typed.data_dir))
    recipes = []
    for seed in range(typed.seeds):
        for name in typed.names or TRIES:
            changed, predicted = TRIES[name]
            common = f"--dataset imagefolder --data-dir {folder} --preset laptop --device cpu"
            about = {"predicted": predicted}
            recipe = f"{common} --epochs 2 {changed}".rstrip()
            recipes.append(Recipe("laptop", f"try-{name}", recipe, seed, about=about))
    start_all(recipes)


def holdout(folder: Path, train: int = 1500, test: int = 500) -> Path:
    """A folder of links beside `folder`: so many of each class's training images, and others.

    Raises `UsageError` where a class has too few.
    """
    split = folder.with_name(f"{folder.name}-holdout")
    for of_class in sorted((folder / "train").iterdir()):
        files = sorted(of_class.iterdir())
        if len(files) < train + test:
            raise UsageError(f"{of_class} has {len(files)} images; the tries need {train + test}.")
        random.Random(0).shuffle(files)
        link(files[:train], split / "train" / of_class.name)
        link(files[train : train + test], split / "test" / of_class.name)
    return split


def link(files: list[Path], folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for file in files:
        place = folder / file.name
        if not place.exists():
            place.symlink_to(file.resolve())


if __name__ == "__main__":
    with one_sentence():
        main()
