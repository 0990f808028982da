"""Data sets: which images and labels each source gives, and what it says when it cannot."""

import errno
import io
import os
import shutil
import tarfile
import urllib.error

import numpy as np
import pytest
import torch
import torchvision

from empssl import main
from empssl_support.cli import UsageError
from empssl_support.data import DATASETS, load_dataset, survey, to_device
from empssl_support.images import CACHE, decode_once, is_decoded, look_only, walk
from recipes import picture
from test_images import brightness

pytestmark = pytest.mark.usefixtures("in_tmp")


@pytest.fixture
def folder(in_tmp):
    """Two classes; each image's brightness names it."""
    root = in_tmp / "images"
    for c, name in enumerate(("cat", "dog")):
        for i in range(3):
            picture(root / "train" / name / f"{i}.png", 100 * c + 10 * i)
        picture(root / "test" / name / "t.png", 100 * c + 50)
    return root


# ---- any folder ----


def test_labelled_folder(folder):
    data = load_dataset("imagefolder", folder)
    assert data.train_images.shape == (6, 3, 30, 30)
    assert data.train_images.dtype == torch.uint8
    assert brightness(data.train_images) == [0, 10, 20, 100, 110, 120]
    assert data.train_labels.tolist() == [0, 0, 0, 1, 1, 1]
    assert brightness(data.test_images) == [50, 150]
    assert data.test_labels.tolist() == [0, 1]
    assert data.train_labels.dtype == data.test_labels.dtype == torch.int64
    assert data.classes == ["cat", "dog"]
    names = [f"{name}/{i}.png" for name in ("cat", "dog") for i in range(3)]
    assert data.files == [str(folder / "train" / name) for name in names]
    assert data.test_files == [str(folder / "test" / name / "t.png") for name in ("cat", "dog")]


def test_image_size(folder):
    data = load_dataset("imagefolder", folder, image_size=8)
    assert data.train_images.shape == (6, 3, 8, 8)
    assert load_dataset("imagenet100", folder).train_images.shape == (6, 3, 224, 224)
    for wrong in (0, 4097):
        with pytest.raises(UsageError, match=f"--image-size is {wrong}; it must lie between"):
            load_dataset("imagefolder", folder, image_size=wrong)


@pytest.mark.parametrize("name", ["cifar10", "cifar100", "shapes"])
def test_a_data_set_of_one_size_takes_no_other(name):
    with pytest.raises(UsageError, match=f"{name} images are always 32x32"):
        load_dataset(name, image_size=64)


def test_val_is_a_test_split_too(folder):
    (folder / "test").rename(folder / "val")
    assert load_dataset("imagefolder", folder).test_labels.tolist() == [0, 1]


def test_a_test_folder_without_classes_gives_way_to_val(folder):
    (folder / "test").rename(folder / "val")
    picture(folder / "test" / "unlabelled.png")
    assert load_dataset("imagefolder", folder).test_labels.tolist() == [0, 1]


def test_without_a_test_split_a_folder_has_no_labels(folder):
    (folder / "test").rename(folder / "more")
    data = load_dataset("imagefolder", folder)
    assert brightness(data.train_images) == [50, 150, 0, 10, 20, 100, 110, 120]
    assert data.train_labels is None
    assert data.test_images is None


def test_imagenet100_is_labelled_or_refused(folder):
    (folder / "test").rename(folder / "validation")
    with pytest.raises(UsageError, match="val/<class>"):
        load_dataset("imagenet100", folder)


def test_plain_images_have_no_labels(in_tmp):
    for i, place in enumerate((".", ".", "sub")):
        picture(in_tmp / "plain" / place / f"{i}.png", i * 50, size=(500, 300))
    data = load_dataset("imagefolder", in_tmp / "plain")
    assert data.train_images.shape == (3, 3, 224, 224)
    assert data.train_labels is None
    assert data.test_images is None
    assert data.test_labels is None
    assert data.classes == []
    few = load_dataset("imagefolder", in_tmp / "plain", subset=2, image_size=10)
    assert few.train_images.shape == (2, 3, 10, 10)


def test_labels_stay_with_their_images_when_one_is_skipped(in_tmp):
    root = in_tmp / "set"
    for name, base in (("a", 0), ("b", 200)):
        for i in range(120):
            picture(root / "train" / name / f"{i:03}.png", base + i % 50, size=(4, 4))
        picture(root / "test" / name / "0.png", base, size=(4, 4))
    for bad in ("train/a/003.png", "test/a/1.png"):
        (root / bad).write_bytes(b"")
    data = load_dataset("imagefolder", root)
    bright = torch.tensor(brightness(data.train_images)) > 190
    assert torch.equal(bright.long(), data.train_labels)
    assert len(data.train_images) == len(data.files) == 239
    assert str(root / "train" / "a" / "003.png") not in data.files
    assert brightness(data.test_images) == [0, 200]
    assert data.test_labels.tolist() == [0, 1]


def test_a_class_only_in_the_test_split(folder):
    picture(folder / "test" / "newt" / "0.png")
    with pytest.raises(UsageError, match="'newt'"):
        load_dataset("imagefolder", folder)


def test_an_empty_test_split(folder):
    for file in folder.glob("test/*/*"):
        file.unlink()
    with pytest.raises(UsageError, match="The test split of .* holds no images"):
        load_dataset("imagefolder", folder)


def test_hidden_folders_are_no_classes(folder):
    picture(folder / "train" / ".thumbnails" / "0.png")
    assert load_dataset("imagefolder", folder).classes == ["cat", "dog"]


@pytest.mark.parametrize("name", ["imagefolder", "imagenet100", "tinyimagenet"])
def test_missing_folder(name, in_tmp):
    with pytest.raises(UsageError, match="nowhere"):
        load_dataset(name, in_tmp / "nowhere")


def test_empty_folder_and_folder_without_images(in_tmp):
    (in_tmp / "empty").mkdir()
    with pytest.raises(UsageError, match="no images"):
        load_dataset("imagefolder", in_tmp / "empty")
    (in_tmp / "empty" / "notes.txt").write_text("hello")
    with pytest.raises(UsageError, match="no images"):
        load_dataset("imagefolder", in_tmp / "empty")


@pytest.mark.parametrize(
    "what,sentence",
    [
        ("one image", "There is a single training image"),
        ("an unreadable image", "1 of 6 images cannot be read, more than 1 %"),
        ("nothing else", "None of the 1 image files can be read"),
        ("no room", "make room"),
    ],
)
def test_a_folder_that_cannot_be_trained_on(what, sentence, in_tmp, monkeypatch, capsys):
    for i in range(1 if what in ("one image", "nothing else") else 6):
        picture(in_tmp / "plain" / f"{i}.png")
    if what in ("an unreadable image", "nothing else"):
        (in_tmp / "plain" / "0.png").write_bytes(b"not an image")
    if what == "no room":
        usage = shutil.disk_usage(".")
        monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
    with pytest.raises(SystemExit) as stop:
        main(["--dataset", "imagefolder", "--data-dir", "plain", "--device", "cpu"])
    assert stop.value.code == 2
    told = [line for line in capsys.readouterr().err.splitlines() if "error: " in line]
    assert len(told) == 1 and sentence in told[0]


def test_unknown_data_set():
    with pytest.raises(UsageError, match="'mnist'") as refused:
        load_dataset("mnist")
    assert all(name in str(refused.value) for name in DATASETS)


# ---- Tiny ImageNet ----


@pytest.fixture
def tiny(in_tmp):
    root = in_tmp / "tiny-imagenet-200"
    for i, name in enumerate(("n01", "n02")):
        file = root / "train" / name / "images" / f"{name}_0.JPEG"
        picture(file, 100 * i, size=(64, 64))
    picture(root / "val" / "images" / "val_0.JPEG", 30, size=(64, 64))
    (root / "val" / "val_annotations.txt").write_text("val_0.JPEG\tn02\t0\t0\t62\t62\n")
    return root


def test_tinyimagenet(tiny):
    for place in (tiny, tiny.parent):
        data = load_dataset("tinyimagenet", place)
        assert data.train_images.shape == (2, 3, 64, 64)
        assert data.train_labels.tolist() == [0, 1]
        assert data.test_labels.tolist() == [1]
        assert brightness(data.test_images) == [30]


def test_damaged_annotations_of_tinyimagenet(tiny):
    annotations = tiny / "val" / "val_annotations.txt"
    annotations.write_text("val_0.JPEG\tn02\t0\t0\t62\t62\nval_1.JP")
    with pytest.raises(UsageError, match="'val_1.JP' names no class"):
        load_dataset("tinyimagenet", tiny)
    annotations.unlink()
    with pytest.raises(UsageError, match="val_annotations"):
        load_dataset("tinyimagenet", tiny)


# ---- CIFAR ----


def fail_with(error):
    def cifar(*_, **__):
        raise error

    return cifar


def test_no_network_names_the_folder_and_the_file(monkeypatch):
    no_network = fail_with(urllib.error.URLError("no network"))
    monkeypatch.setattr(torchvision.datasets, "CIFAR10", no_network)
    with pytest.raises(UsageError, match="cifar-10-python.tar.gz into somewhere"):
        load_dataset("cifar10", "somewhere")


def test_a_damaged_download_is_named(monkeypatch):
    damaged = fail_with(RuntimeError("File not found or corrupted."))
    monkeypatch.setattr(torchvision.datasets, "CIFAR100", damaged)
    with pytest.raises(UsageError, match="cifar-100-python.tar.gz"):
        load_dataset("cifar100", "somewhere")


def test_a_full_disk_is_not_called_a_missing_network(monkeypatch):
    full = fail_with(OSError(errno.ENOSPC, "full"))
    monkeypatch.setattr(torchvision.datasets, "CIFAR10", full)
    with pytest.raises(OSError, match="full"):
        load_dataset("cifar10", "somewhere")


def test_an_archive_that_is_not_the_pinned_one_is_not_unpacked(in_tmp, monkeypatch):
    """CIFAR's checksum is torchvision's; nothing is unpacked before it agrees."""
    (in_tmp / "data").mkdir()
    with tarfile.open("data/cifar-10-python.tar.gz", "w:gz") as archive:
        member = tarfile.TarInfo("../escaped.txt")
        member.size = 4
        archive.addfile(member, io.BytesIO(b"evil"))
    no_network = fail_with(urllib.error.URLError("no network"))
    monkeypatch.setattr(torchvision.datasets.utils, "_urlretrieve", no_network)
    with pytest.raises(UsageError, match="cifar-10-python.tar.gz"):
        load_dataset("cifar10", "data")
    assert not (in_tmp / "escaped.txt").exists()
    assert not list(in_tmp.glob("data/cifar-10-batches-py"))


@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
def test_cifar_from_torchvisions_files(name, monkeypatch):
    class CIFAR:
        classes = ["a", "b"]

        def __init__(self, root, train, download):
            self.data = np.arange(2 * 32 * 32 * 3, dtype=np.uint8).reshape(2, 32, 32, 3)
            self.targets = [0, 1] if train else [1, 1]

    monkeypatch.setattr(torchvision.datasets, name.upper(), CIFAR)
    data = load_dataset(name)
    assert data.train_images.shape == (2, 3, 32, 32)
    assert data.train_images[0, :, 0, 1].tolist() == [3, 4, 5]
    assert data.train_images.is_contiguous()
    assert data.train_labels.tolist() == [0, 1]
    assert data.test_labels.tolist() == [1, 1]
    assert data.classes == ["a", "b"]
    assert data.key == name


# ---- what all of them share ----


def test_subset():
    whole = load_dataset("shapes")
    one, again, other = (load_dataset("shapes", subset=50, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(one.train_images, again.train_images)
    assert one.key == again.key
    assert not torch.equal(one.train_images, other.train_images)
    assert len(one.train_images) == len(one.train_labels) == 50
    assert torch.equal(one.test_images, whole.test_images)
    assert len({one.key, other.key, whole.key}) == 3
    # Labels follow their images.
    for image, label in zip(one.train_images[:3], one.train_labels[:3], strict=True):
        row = (whole.train_images == image).flatten(1).all(1).nonzero().item()
        assert whole.train_labels[row] == label


def test_a_subset_of_a_folder_keeps_the_files_of_its_images(folder):
    whole = load_dataset("imagefolder", folder)
    some = load_dataset("imagefolder", folder, subset=3, seed=4)
    rows = [whole.files.index(file) for file in some.files]
    assert rows == sorted(rows)
    assert torch.equal(some.train_images, whole.train_images[rows])
    assert torch.equal(some.train_labels, whole.train_labels[rows])


# ---- counting, without decoding ----


def listing(root):
    return sorted(str(path) for path in root.rglob("*"))


@pytest.mark.parametrize("how", [{}, {"image_size": 12}])
def test_a_survey_counts_as_loading_does_and_writes_nothing(how, folder, in_tmp):
    before = listing(in_tmp)
    seen = survey("imagefolder", folder, **how)
    assert listing(in_tmp) == before
    data = load_dataset("imagefolder", folder, **how)
    for ours, theirs in zip(seen, data, strict=True):
        if isinstance(theirs, torch.Tensor) and theirs.dtype == torch.uint8:
            assert ours.shape == theirs.shape and ours.dtype == theirs.dtype
        elif isinstance(theirs, torch.Tensor):
            assert torch.equal(ours, theirs)
        else:
            assert ours == theirs
    few = survey("imagefolder", folder, subset=4)
    assert len(few.train_images) == len(few.train_labels) == 4 and len(few.files) == 6


def test_whether_images_are_decoded_is_known_without_reading_them(in_tmp):
    folder = in_tmp / "five"
    for i in range(5):
        picture(folder / f"{i}.png", 10 * i)
    files = {"train": walk(folder), "test": []}
    _, key = look_only(folder, files, None)
    assert not is_decoded(key) and not CACHE.exists()
    _, same = decode_once(folder, files, None)
    assert same == key and is_decoded(key)
    picture(folder / "0.png", 11)
    os.utime(folder / "0.png", (1, 1))
    splits, key = look_only(folder, files, None)
    assert not is_decoded(key)
    assert splits["train"].images.shape == (5, 3, 30, 30) and splits["test"].images is None
    with pytest.raises(UsageError, match="There are no images in"):
        look_only(folder, {"train": [], "test": []}, 8)


def test_a_survey_of_cifar_downloads_nothing(monkeypatch, in_tmp):
    def no_source(*_, **__):
        pytest.fail("it was loaded")

    monkeypatch.setattr(torchvision.datasets, "CIFAR100", no_source)
    data = survey("cifar100", "data", subset=30_000)
    assert data.train_images.shape == (30_000, 3, 32, 32) and len(data.classes) == 100
    assert data.test_images.shape == (10_000, 3, 32, 32) and listing(in_tmp) == []
    with pytest.raises(UsageError, match="--image-size"):
        survey("cifar10", "data", image_size=64)


@pytest.mark.parametrize("wrong", [0, 10_001])
def test_a_subset_that_cannot_be(wrong):
    with pytest.raises(UsageError, match="--subset"):
        load_dataset("shapes", subset=wrong)


def test_images_go_to_a_gpu_only_where_they_leave_half_of_its_memory(monkeypatch):
    data = load_dataset("shapes")
    size = data.train_images.numel() + data.test_images.numel()
    moved = []

    def move(images, device):
        moved.append(len(images))
        return images

    monkeypatch.setattr(torch.Tensor, "to", move)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (2 * size - 2, 10 * size))
    assert to_device(data, "cuda") is data
    assert to_device(data, "cpu") is data
    assert moved == []
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (2 * size, 10 * size))
    to_device(data, "cuda")
    assert moved == [10_000, 2_000]
    to_device(data._replace(test_images=None), "cuda")
    assert moved == [10_000, 2_000, 10_000]
