"""The copy of CIFAR-10 as JPEG files."""

import pytest
import torch
from PIL import Image, JpegImagePlugin

from empssl_support.cli import UsageError
from empssl_support.data import Dataset, load_dataset
from study.experiments import jpeg


@pytest.fixture
def original(in_tmp, monkeypatch):
    """Images of one colour each, classes in turn."""
    values = torch.arange(0, 240, 10, dtype=torch.uint8)  # 24 of them
    images = values.view(-1, 1, 1, 1).expand(24, 3, 32, 32).clone()
    images[:, 0] = 255
    labels = torch.arange(24) % 3
    split = {"classes": ["ant", "bee", "cat"], "key": "insects"}
    data = Dataset(images[:18], labels[:18], images[18:], labels[18:], **split)
    monkeypatch.setattr(jpeg, "load_dataset", lambda name, folder: data)
    return data


def test_the_copy_is_a_folder_of_the_same_images(original):
    jpeg.main([])
    copy = load_dataset("imagefolder", "data/cifar10-jpeg")
    assert copy.classes == original.classes
    # A folder's images stand class by class, and in each in the order of the original.
    for split in ("train", "test"):
        images, labels = getattr(copy, f"{split}_images"), getattr(copy, f"{split}_labels")
        wanted = getattr(original, f"{split}_labels").argsort(stable=True)
        assert torch.equal(labels, getattr(original, f"{split}_labels")[wanted])
        pixels = getattr(original, f"{split}_images")[wanted]
        assert (images.int() - pixels.int()).abs().max() <= 2
    assert copy.files[0].endswith("train/ant/0000.jpg")


def test_its_files_are_of_quality_75_with_half_the_resolution_in_colour(original):
    jpeg.main([])
    picture = Image.open("data/cifar10-jpeg/train/bee/0003.jpg")
    assert picture.format == "JPEG" and JpegImagePlugin.get_sampling(picture) == 2  # 4:2:0
    # The standard's table begins 16, 11, 10, 16; quality 75 halves it.
    assert picture.quantization[0][:4] == [8, 6, 5, 8]


def test_one_that_is_there_stays_and_one_that_was_cut_off_begins_again(original, monkeypatch):
    write_split = jpeg.write_split

    def cut_off(folder, *rest):
        write_split(folder, *rest)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(jpeg, "write_split", cut_off)
        jpeg.main([])
    jpeg.main([])
    assert len(load_dataset("imagefolder", "data/cifar10-jpeg").test_images) == 6
    with pytest.raises(UsageError, match="data/cifar10-jpeg is there already"):
        jpeg.main([])
