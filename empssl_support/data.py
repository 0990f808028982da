"""Data sets: uint8 images `(N, 3, H, W)` and int64 labels `(N,)`, for training and for test.

Every source ends in the same `Dataset`. Labels are None where there are none.
"""

import errno
import socket
from itertools import chain
from pathlib import Path
from typing import NamedTuple

import torch
import torchvision
from torch import Tensor

from empssl_support.cli import UsageError
from empssl_support.images import decode_once, look_only, walk
from empssl_support.shapes import OUTLINES, shapes

DATASETS = ("cifar10", "cifar100", "tinyimagenet", "imagenet100", "imagefolder", "shapes")


class Dataset(NamedTuple):
    train_images: Tensor  # (N, 3, H, W) uint8, in memory or memory-mapped
    train_labels: Tensor | None  # (N,) int64
    test_images: Tensor | None  # (M, 3, H, W) uint8
    test_labels: Tensor | None  # (M,) int64
    classes: list[str]  # empty where there are no labels
    key: str  # changes when any image does; names what is cached about the set
    files: list[str] | None = None  # of an image folder: the training images' paths, in order
    test_files: list[str] | None = None  # the test images'


def load_dataset(
    name: str,
    data_dir: str | Path = "data",
    image_size: int | None = None,
    subset: int | None = None,
    seed: int = 0,
    decode=decode_once,
) -> Dataset:
    """Load a data set: one of `DATASETS`.

    name: `cifar10`, `cifar100`, `tinyimagenet`, `imagenet100`, `imagefolder` or `shapes`.
    data_dir: where CIFAR is, or is downloaded to; for folders, the folder itself
        (`train/<class>/...` with `test/<class>/...` or `val/<class>/...`, or plain unlabelled
        images).
    image_size: folders only, 1 to 4096 pixels; the shorter side is resized to it and the centre cut
        out. Default: the first image's shorter side, at most 224 (64 for `tinyimagenet`, 224 for
        `imagenet100`).
    subset: keep this many training images, chosen by `seed`; the test split stays whole.
    decode: what reads a folder's images, `decode_once` or `look_only`.

    Raises `UsageError` for an unknown name, missing or empty folders, a class that only the test
    split has, more than 1 % unreadable images or a whole split of them, and a download that fails;
    `OSError` for a folder that may not be read.
    """
    data_dir = Path(data_dir)
    check_image_size(name, image_size)
    if name in ("cifar10", "cifar100"):
        data = cifar(name, data_dir)
    elif name == "tinyimagenet":
        data = tiny_imagenet(data_dir, image_size or 64, decode)
    elif name == "imagenet100":
        data = image_folder(data_dir, image_size or 224, decode, labels_needed=True)
    elif name == "imagefolder":
        data = image_folder(data_dir, image_size, decode)
    elif name == "shapes":
        data = Dataset(*shapes(), classes=list(OUTLINES), key="shapes")
    else:
        raise UsageError(f"There is no data set {name!r}; choose one of {', '.join(DATASETS)}.")
    if subset is not None:
        data = take_subset(data, subset, seed)
    return data


def check_image_size(name: str, image_size: int | None) -> None:
    if image_size is None:
        return
    if not 1 <= image_size <= 4096:
        raise UsageError(f"--image-size is {image_size}; it must lie between 1 and 4096 pixels.")
    if name in ("cifar10", "cifar100", "shapes"):
        raise UsageError(f"{name} images are always 32x32; --image-size is for image folders.")


def check_subset(subset: int, N: int) -> None:
    if not 1 <= subset <= N:
        raise UsageError(
            f"--subset is {subset}; it must lie between 1 and the {N} training images."
        )


def take_subset(data: Dataset, subset: int, seed: int) -> Dataset:
    """`data` with `subset` of its training images, in their old order."""
    N = len(data.train_images)
    check_subset(subset, N)
    chance = torch.Generator().manual_seed(seed)
    kept = torch.randperm(N, generator=chance)[:subset].sort().values  # (subset,)
    labels, files = data.train_labels, data.files
    return data._replace(
        train_images=data.train_images[kept],
        train_labels=None if labels is None else labels[kept],
        files=None if files is None else [files[row] for row in kept.tolist()],
        key=f"{data.key}-{subset}-{seed}",
    )


def survey(
    name: str, data_dir: str | Path, image_size: int | None = None, subset: int | None = None
) -> Dataset:
    """As `load_dataset`, without decoding, downloading or writing: black images may stand in.

    With a `subset`, `files` are still all that would be decoded. Raises `UsageError` as it does,
    except for images that cannot be read.
    """
    if name in ("cifar10", "cifar100"):
        check_image_size(name, image_size)
        data = cifar_unseen(name)
    else:
        data = load_dataset(name, data_dir, image_size, decode=look_only)
    if subset is None:
        return data
    check_subset(subset, len(data.train_images))
    labels = data.train_labels
    return data._replace(
        train_images=data.train_images[:subset],
        train_labels=None if labels is None else labels[:subset],
    )


def to_device(data: Dataset, device: str) -> Dataset:
    """The images on `device` where they take less than half of its free memory, else unmoved.

    Images that stay behind are gathered batch by batch; labels are small and always stay.
    """
    if not device.startswith("cuda"):
        return data
    free, _ = torch.cuda.mem_get_info(device)
    images = {"train_images": data.train_images, "test_images": data.test_images}
    images = {split: x for split, x in images.items() if x is not None}
    if sum(x.numel() for x in images.values()) > free / 2:
        return data
    return data._replace(**{split: x.to(device) for split, x in images.items()})


# ---- CIFAR ----


def cifar(name: str, data_dir: Path) -> Dataset:
    """torchvision downloads CIFAR where it is missing, and compares checksums."""
    if name == "cifar10":
        source, archive = torchvision.datasets.CIFAR10, "cifar-10-python.tar.gz"
    else:
        source, archive = torchvision.datasets.CIFAR100, "cifar-100-python.tar.gz"
    # A network that swallows packets must not make the download wait for ever.
    patience = socket.getdefaulttimeout()
    socket.setdefaulttimeout(30)
    try:
        train = source(str(data_dir), train=True, download=True)
        test = source(str(data_dir), train=False, download=True)
    except OSError as error:
        # No network and a refused connection end here, and so does a full disk, which is
        # another matter.
        if error.errno == errno.ENOSPC:
            raise
        raise UsageError(
            f"{name} is not in {data_dir} and could not be downloaded ({error}); put {archive} "
            f"into {data_dir} by hand, or try --dataset shapes, which needs no network."
        ) from None
    except RuntimeError as error:
        # This is how torchvision says that a checksum differs.
        raise UsageError(
            f"{name} in {data_dir} is damaged ({error}); delete {data_dir / archive} and try "
            f"again, or put a good copy there by hand."
        ) from None
    finally:
        socket.setdefaulttimeout(patience)
    return Dataset(
        train_images=channels_first(train.data),
        train_labels=torch.tensor(train.targets),
        test_images=channels_first(test.data),
        test_labels=torch.tensor(test.targets),
        classes=list(train.classes),
        key=name,
    )


def cifar_unseen(name: str) -> Dataset:
    black = torch.zeros(1, dtype=torch.uint8)
    classes = int(name.removeprefix("cifar"))
    return Dataset(
        train_images=black.expand(50_000, 3, 32, 32),
        train_labels=torch.arange(50_000) % classes,
        test_images=black.expand(10_000, 3, 32, 32),
        test_labels=torch.arange(10_000) % classes,
        classes=[str(label) for label in range(classes)],
        key=name,
    )


def channels_first(pixels) -> Tensor:
    """NumPy's `(N, H, W, 3)` -> `(N, 3, H, W)`."""
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous()


# ---- folders of images ----


def image_folder(
    folder: Path, image_size: int | None, decode, labels_needed: bool = False
) -> Dataset:
    """`train/<class>/` with `test/<class>/` or `val/<class>/`, else all images, without labels."""
    check_folder(folder)
    train = by_class(folder / "train")
    test = by_class(folder / "test") or by_class(folder / "val")
    two_splits = (folder / "test").is_dir() or (folder / "val").is_dir()
    if train and two_splits:
        return labelled_images(folder, train, test, image_size, decode)
    if labels_needed:
        raise UsageError(
            f"{folder} has no labelled images; it needs train/<class>/ and val/<class>/."
        )
    return unlabelled_images(folder, image_size, decode)


def tiny_imagenet(folder: Path, image_size: int, decode) -> Dataset:
    """`train/<class>/images/*.JPEG`, and `val/images/*.JPEG` with `val/val_annotations.txt`."""
    if (folder / "tiny-imagenet-200").is_dir():
        folder = folder / "tiny-imagenet-200"
    check_folder(folder)
    annotations = folder / "val" / "val_annotations.txt"
    if not annotations.is_file() or not (folder / "train").is_dir():
        raise UsageError(
            f"{folder} does not look like Tiny ImageNet: it needs train/ and "
            f"val/val_annotations.txt; unpack tiny-imagenet-200.zip and give its folder as "
            f"--data-dir."
        )
    # A line is a file's name, its class, and a box that is of no use here, with tabs between them.
    test: dict[str, list[Path]] = {}
    for line in annotations.read_text().splitlines():
        file, _, rest = line.partition("\t")
        label, _, _ = rest.partition("\t")
        if not label:
            raise UsageError(
                f"{annotations} is damaged, its line {line!r} names no class; "
                f"unpack tiny-imagenet-200.zip again."
            )
        test.setdefault(label, []).append(folder / "val" / "images" / file)
    return labelled_images(folder, by_class(folder / "train"), test, image_size, decode)


def check_folder(folder: Path) -> None:
    if not folder.is_dir():
        raise UsageError(
            f"There is no folder {folder}; give --data-dir the folder that holds the images."
        )


def by_class(folder: Path) -> dict[str, list[Path]]:
    """The images of each folder in `folder`, by its name; empty where there is no such folder."""
    if not folder.is_dir():
        return {}
    places = [place for place in sorted(folder.iterdir()) if place.is_dir()]
    files = {place.name: walk(place) for place in places if not place.name.startswith(".")}
    return {name: some for name, some in files.items() if some}


def unlabelled_images(folder: Path, image_size: int | None, decode) -> Dataset:
    files = walk(folder)
    splits, key = decode(folder, {"train": files, "test": []}, image_size)
    images, rows = splits["train"]
    return Dataset(
        train_images=images,
        train_labels=None,
        test_images=None,
        test_labels=None,
        classes=[],
        key=key,
        files=[str(files[row]) for row in rows],
    )


def labelled_images(
    folder: Path,
    train: dict[str, list[Path]],
    test: dict[str, list[Path]],
    image_size: int | None,
    decode,
) -> Dataset:
    """Both splits, each given as its files by class. Classes are numbered in alphabetical order."""
    check_classes(folder, train, test)
    classes = sorted(train)
    files = {
        "train": list(chain.from_iterable(train.values())),
        "test": list(chain.from_iterable(test.values())),
    }
    splits, key = decode(folder, files, image_size)
    return Dataset(
        train_images=splits["train"].images,
        train_labels=number_classes(train, classes)[splits["train"].rows],
        test_images=splits["test"].images,
        test_labels=number_classes(test, classes)[splits["test"].rows],
        classes=classes,
        key=key,
        files=[str(files["train"][row]) for row in splits["train"].rows],
        test_files=[str(files["test"][row]) for row in splits["test"].rows],
    )


def check_classes(folder: Path, train: dict[str, list[Path]], test: dict[str, list[Path]]) -> None:
    only_test = sorted(set(test) - set(train))
    if only_test:
        raise UsageError(
            f"Class {only_test[0]!r} is in the test split of {folder} and not in train/; "
            f"add training images of it or remove it from the test split."
        )
    if not test:
        raise UsageError(
            f"The test split of {folder} holds no images; put them into test/<class>/, "
            f"or remove the empty folder to train without labels."
        )


def number_classes(files: dict[str, list[Path]], classes: list[str]) -> Tensor:
    """The class of each file as its place in `classes`: `(number of files,)` int64."""
    labels = []
    for name, some in files.items():
        labels += [classes.index(name)] * len(some)
    return torch.tensor(labels)
