"""Data sets: folders, caches, damaged files, CIFAR's absence, shapes."""

import errno
import os
import time
import urllib.error

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image

import empssl_io as io
from empssl import UsageError, load_dataset

pytestmark = pytest.mark.usefixtures("in_tmp")


def picture(path, value=0, size=(40, 30)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((size[1], size[0], 3), value, np.uint8)).save(path)


@pytest.fixture
def folder(in_tmp):
    """Two classes; each image's brightness names it."""
    root = in_tmp / "images"
    for c, name in enumerate(("cat", "dog")):
        for i in range(3):
            picture(root / "train" / name / f"{i}.png", 100 * c + 10 * i)
        picture(root / "test" / name / "t.png", 100 * c + 50)
    return root


def brightness(images):
    return images.float().mean((1, 2, 3)).round().int().tolist()


def test_labelled_folder(folder):
    data = load_dataset("imagefolder", folder)
    assert data.train_images.shape == (6, 3, 30, 30) and data.train_images.dtype == torch.uint8
    assert brightness(data.train_images) == [0, 10, 20, 100, 110, 120] and data.train_labels.tolist() == [0, 0, 0, 1, 1, 1]
    assert brightness(data.test_images) == [50, 150] and data.test_labels.tolist() == [0, 1]
    assert data.classes == ["cat", "dog"] and data.files[0].endswith("train/cat/0.png")
    assert load_dataset("imagefolder", folder, image_size=8).train_images.shape == (6, 3, 8, 8)
    assert load_dataset("imagenet100", folder).train_images.shape == (6, 3, 224, 224)


def test_val_is_a_test_split_too(folder):
    (folder / "test").rename(folder / "val")
    assert load_dataset("imagefolder", folder).test_labels.tolist() == [0, 1]


def test_a_test_folder_without_classes_gives_way_to_val(folder):
    (folder / "test").rename(folder / "val")
    picture(folder / "test" / "unlabelled.png")
    assert load_dataset("imagefolder", folder).test_labels.tolist() == [0, 1]


def test_imagenet100_is_labelled_or_refused(folder):
    (folder / "test").rename(folder / "validation")
    with pytest.raises(UsageError, match="val/<class>"):
        load_dataset("imagenet100", folder)


def test_a_split_of_which_nothing_can_be_read(in_tmp):
    for i in range(300):
        picture(in_tmp / "set" / "train" / "a" / f"{i}.png", size=(4, 4))
    (in_tmp / "set" / "test" / "a").mkdir(parents=True)
    (in_tmp / "set" / "test" / "a" / "0.png").write_bytes(b"")
    for _ in range(2):                                              # decoded, then from the cache
        with pytest.raises(UsageError, match="No image of the test split"):
            load_dataset("imagefolder", in_tmp / "set")


def test_folders_of_one_name_have_caches_of_their_own(in_tmp, monkeypatch):
    for i, place in enumerate(("a", "b")):
        picture(in_tmp / place / "images" / "0.png", 100 * i)
        load_dataset("imagefolder", in_tmp / place / "images")
    monkeypatch.setattr(io, "_read_image", lambda *_: pytest.fail("decoded again"))
    assert [brightness(load_dataset("imagefolder", in_tmp / place / "images").train_images) for place in ("a", "b")] == [[0], [100]]


def test_what_a_killed_decoding_left_is_cleared_away_later(folder):
    for name, age in (("old", 7200), ("new", 60)):
        (io.CACHE / f".decoding-{name}").mkdir(parents=True)
        (io.CACHE / f".decoding-{name}" / "train.u8").write_bytes(b"some")
        for path in (io.CACHE / f".decoding-{name}" / "train.u8", io.CACHE / f".decoding-{name}"):
            os.utime(path, (time.time() - age,) * 2)
    load_dataset("imagefolder", folder)
    assert [path.name for path in io.CACHE.glob(".decoding-*")] == [".decoding-new"]


def test_images_are_turned_as_the_camera_says_and_floats_are_refused(in_tmp, capsys):
    for i in range(120):
        picture(in_tmp / "set" / f"{i:03}.png", size=(20, 20))
    half = Image.fromarray(np.repeat(np.array([[0], [250]], np.uint8), 20, 0).repeat(40, 1))        # dark above, bright below
    exif = Image.Exif()
    exif[0x0112] = 3                                                # upside down
    half.save(in_tmp / "set" / "aa.png", exif=exif)
    Image.fromarray(np.full((20, 20), 0.5, np.float32)).save(in_tmp / "set" / "ab.tif")
    data = load_dataset("imagefolder", in_tmp / "set", image_size=20)
    turned = data.train_images[data.files.index(str(in_tmp / "set" / "aa.png"))].float()
    assert turned[:, :8].mean() > 240 and turned[:, 12:].mean() < 10
    assert "ab.tif (its pixels are floating-point" in capsys.readouterr().out


def test_plain_images_have_no_labels(in_tmp):
    for i in range(3):
        picture(in_tmp / "plain" / ("sub" if i == 2 else "") / f"{i}.png", i * 50, size=(500, 300))
    data = load_dataset("imagefolder", in_tmp / "plain")
    assert data.train_images.shape == (3, 3, 224, 224)              # the first image's shorter side, at most 224
    assert data.train_labels is None and data.test_images is None and data.classes == []
    assert load_dataset("imagefolder", in_tmp / "plain", subset=2, image_size=10).train_images.shape == (2, 3, 10, 10)


def test_the_centre_is_cut_out_and_the_shorter_side_resized(in_tmp):
    pixels = np.zeros((10, 30, 3), np.uint8)
    pixels[:, 10:20] = 200                                          # the middle third of a wide image
    (in_tmp / "wide").mkdir()
    Image.fromarray(pixels).save(in_tmp / "wide" / "a.png")
    assert brightness(load_dataset("imagefolder", in_tmp / "wide").train_images) == [200]
    assert load_dataset("imagefolder", in_tmp / "wide", image_size=5).train_images.float().mean() > 180


def test_other_pixel_formats_and_names(in_tmp):
    for mode in ("L", "P", "RGBA", "CMYK", "1"):
        path = in_tmp / "modes" / f"é {mode}.{'jpg' if mode == 'CMYK' else 'png'}"
        path.parent.mkdir(exist_ok=True)
        Image.new("RGB", (16, 16), (200, 200, 200)).convert(mode).save(path)
    data = load_dataset("imagefolder", in_tmp / "modes")
    assert len(data.train_images) == 5 and min(brightness(data.train_images)) > 150


def test_the_cache_is_used_and_dropped_when_a_file_changes(folder, monkeypatch):
    first = load_dataset("imagefolder", folder)
    with monkeypatch.context() as m:
        m.setattr(io, "_read_image", lambda *_: pytest.fail("decoded again"))
        again = load_dataset("imagefolder", folder)
    assert torch.equal(first.train_images, again.train_images) and first.key == again.key
    picture(folder / "train" / "cat" / "0.png", 77)
    os.utime(folder / "train" / "cat" / "0.png", (1, 1))
    changed = load_dataset("imagefolder", folder)
    assert brightness(changed.train_images)[0] == 77 and changed.key != first.key
    assert len(list(io.CACHE.iterdir())) == 1                       # the stale one is gone


def test_a_cache_cut_short_is_decoded_again(folder):
    load_dataset("imagefolder", folder)
    (cached,) = io.CACHE.glob("*/train.u8")
    cached.write_bytes(cached.read_bytes()[:100])
    assert brightness(load_dataset("imagefolder", folder).train_images) == [0, 10, 20, 100, 110, 120]


def test_an_unreadable_image_is_named_skipped_and_counted(in_tmp, capsys):
    for i in range(150):
        picture(in_tmp / "many" / f"{i:03}.png", i, size=(4, 4))
    (in_tmp / "many" / "007.png").write_bytes(b"not an image")
    data = load_dataset("imagefolder", in_tmp / "many")
    assert brightness(data.train_images) == [i for i in range(150) if i != 7]
    output = "".join(capsys.readouterr())
    assert "007.png" in output and "1 of 150" in output


def test_labels_stay_with_their_images_when_one_is_skipped(in_tmp):
    for name in ("a", "b"):
        for i in range(120):
            picture(in_tmp / "set" / "train" / name / f"{i:03}.png", 200 * (name == "b") + i % 50, size=(4, 4))
        picture(in_tmp / "set" / "test" / name / "0.png", 0, size=(4, 4))
    (in_tmp / "set" / "train" / "a" / "003.png").write_bytes(b"")
    data = load_dataset("imagefolder", in_tmp / "set")
    assert ((data.train_images.float().mean((1, 2, 3)) > 190).long() == data.train_labels).all()
    assert len(data.train_images) == len(data.files) == 239


def test_more_than_one_per_cent_unreadable_stops(folder):
    (folder / "train" / "cat" / "0.png").write_bytes(b"not an image")
    with pytest.raises(UsageError, match="1 of 8 images cannot be read"):
        load_dataset("imagefolder", folder)
    assert not list(io.CACHE.glob("*"))                             # nothing half-written stays


def test_a_class_only_in_the_test_split(folder):
    picture(folder / "test" / "newt" / "0.png")
    with pytest.raises(UsageError, match="'newt'"):
        load_dataset("imagefolder", folder)


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


def test_tinyimagenet(in_tmp):
    root = in_tmp / "tiny-imagenet-200"
    for i, name in enumerate(("n01", "n02")):
        picture(root / "train" / name / "images" / f"{name}_0.JPEG", 100 * i, size=(64, 64))
    picture(root / "val" / "images" / "val_0.JPEG", 30, size=(64, 64))
    (root / "val" / "val_annotations.txt").write_text("val_0.JPEG\tn02\t0\t0\t62\t62\n")
    data = load_dataset("tinyimagenet", in_tmp)
    assert data.train_images.shape == (2, 3, 64, 64) and data.train_labels.tolist() == [0, 1]
    assert data.test_labels.tolist() == [1] and brightness(data.test_images) == [30]
    (root / "val" / "val_annotations.txt").write_text("val_0.JPEG\tn02\t0\t0\t62\t62\nval_1.JP")
    with pytest.raises(UsageError, match="'val_1.JP' names no class"):
        load_dataset("tinyimagenet", in_tmp)
    (root / "val" / "val_annotations.txt").unlink()
    with pytest.raises(UsageError, match="val_annotations"):
        load_dataset("tinyimagenet", in_tmp)


def test_unknown_data_set():
    with pytest.raises(UsageError, match="'mnist'.*cifar10"):
        load_dataset("mnist")


def fail_with(error):
    def cifar(*_, **__):
        raise error
    return cifar


def test_no_network_names_the_folder_and_the_file(monkeypatch):
    monkeypatch.setattr(torchvision.datasets, "CIFAR10", fail_with(urllib.error.URLError("no network")))
    with pytest.raises(UsageError, match="cifar-10-python.tar.gz into somewhere"):
        load_dataset("cifar10", "somewhere")


def test_a_damaged_download_is_named(monkeypatch):
    monkeypatch.setattr(torchvision.datasets, "CIFAR100", fail_with(RuntimeError("File not found or corrupted.")))
    with pytest.raises(UsageError, match="cifar-100-python.tar.gz"):
        load_dataset("cifar100", "somewhere")


def test_a_full_disk_is_not_called_a_missing_network(monkeypatch):
    monkeypatch.setattr(torchvision.datasets, "CIFAR10", fail_with(OSError(errno.ENOSPC, "full")))
    with pytest.raises(OSError, match="full"):
        load_dataset("cifar10", "somewhere")


def test_cifar_from_torchvisions_files(monkeypatch):
    class CIFAR10:
        classes = ["a", "b"]

        def __init__(self, root, train, download):
            self.data = np.arange(2 * 32 * 32 * 3, dtype=np.uint8).reshape(2, 32, 32, 3)
            self.targets = [0, 1] if train else [1, 1]
    monkeypatch.setattr(torchvision.datasets, "CIFAR10", CIFAR10)
    data = load_dataset("cifar10")
    assert data.train_images.shape == (2, 3, 32, 32) and data.train_images[0, :, 0, 1].tolist() == [3, 4, 5]
    assert data.test_labels.tolist() == [1, 1]


def test_subset():
    whole = load_dataset("shapes")
    one, again, other = (load_dataset("shapes", subset=50, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(one.train_images, again.train_images) and not torch.equal(one.train_images, other.train_images)
    assert len(one.train_images) == len(one.train_labels) == 50 and torch.equal(one.test_images, whole.test_images)
    assert len({one.key, other.key, whole.key}) == 3
    for image, label in zip(one.train_images[:3], one.train_labels[:3]):                # labels follow their images
        row = (whole.train_images == image).flatten(1).all(1).nonzero().item()
        assert whole.train_labels[row] == label
    for wrong in (0, 10_001):
        with pytest.raises(UsageError, match="--subset"):
            load_dataset("shapes", subset=wrong)


def test_shapes_say_little_in_their_raw_pixels():
    data = load_dataset("shapes")
    assert data.train_images.shape == (10_000, 3, 32, 32) and data.test_images.shape == (2_000, 3, 32, 32)
    assert data.train_labels.bincount().tolist() == [1000] * 10 and data.test_labels.bincount().tolist() == [200] * 10
    mean = torch.stack([data.train_images[data.train_labels == c].float().mean((0, 2, 3)) for c in range(10)])
    assert mean.std(0).max() < 6                                    # no class is brighter or of another colour
