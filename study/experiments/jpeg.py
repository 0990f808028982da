"""CIFAR-10 as a folder of JPEG files: python -m study.experiments.jpeg

What is on record for `cifar10-jpeg` was measured on such a copy: every image at quality 75, with
half the resolution in colour, as data/cifar10-jpeg/train/<class>/0000.jpg and on, in the order of
the original. That is downloaded if it is not in --data-dir.
"""

import argparse
from pathlib import Path

from PIL import Image
from torch import Tensor

from empssl_support.cli import UsageError, one_sentence, progress
from empssl_support.data import load_dataset


def write_split(folder: Path, images: Tensor, labels: Tensor, classes: list[str]) -> None:
    """images `(N, 3, H, W)` uint8, numbered apart in each class."""
    written = [0] * len(classes)
    for image, label in progress(list(zip(images, labels.tolist(), strict=True)), desc=folder.name):
        path = folder / classes[label] / f"{written[label]:04}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        picture = Image.fromarray(image.permute(1, 2, 0).numpy())
        picture.save(path, quality=75, subsampling="4:2:0")
        written[label] += 1


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Write CIFAR-10 as JPEG files.")
    parser.add_argument("--data-dir", default="data", help="where CIFAR-10 is or is downloaded to")
    folder = Path(parser.parse_args(argv).data_dir)
    copy = folder / "cifar10-jpeg"
    if copy.exists():
        raise UsageError(f"{copy} is there already; remove it to write it anew.")
    data = load_dataset("cifar10", folder)
    # It has its name once it is whole; what was cut off is written over.
    begun = folder / "cifar10-jpeg.begun"
    write_split(begun / "train", data.train_images, data.train_labels, data.classes)
    write_split(begun / "test", data.test_images, data.test_labels, data.classes)
    begun.rename(copy)
    print(f"written: {copy}")


if __name__ == "__main__":
    with one_sentence():
        main()
