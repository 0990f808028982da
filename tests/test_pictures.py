"""An encoder in one's own code: images of any kind and size, and what is no image."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import empssl
from empssl_support.images import read_image
from recipes import small_encoder

SIZES = [(32, 32), (50, 40), (24, 90)]  # height and width


@pytest.fixture
def encoder():
    encoder = small_encoder(hidden=12)
    encoder(torch.randn(64, 3, 16, 16))  # BatchNorm statistics of some kind
    return encoder


@pytest.fixture
def arrays():
    chance = np.random.default_rng(0)
    return [chance.integers(0, 256, (*size, 3), np.uint8) for size in SIZES]


@pytest.fixture
def paths(arrays, tmp_path):
    for i, pixels in enumerate(arrays):
        Image.fromarray(pixels).save(tmp_path / f"{i}.png")
    return [tmp_path / f"{i}.png" for i in range(3)]


def as_tensor(pixels):
    return torch.from_numpy(pixels).permute(2, 0, 1)


def test_features_are_those_of_a_folders_images(encoder, arrays, paths):
    """Whatever they are given as; in the order and with the pixels of `read_image`."""
    pixels = np.stack([read_image(path, 32) for path in paths])
    expected = empssl.embed(encoder, torch.from_numpy(pixels))
    assert encoder.image_size == 32
    mixed = [str(paths[0]), Image.fromarray(arrays[1]), as_tensor(arrays[2])]
    kinds = [paths, arrays, [Image.open(p) for p in paths], map(as_tensor, arrays), mixed]
    for images in kinds:
        h = encoder.train().features(list(images))
        assert h.dtype == torch.float32 and h.device.type == "cpu" and not encoder.training
        assert not h.requires_grad
        torch.testing.assert_close(h, expected)
    assert not torch.allclose(expected[0], expected[1], atol=1e-3)


def test_one_image_and_many_in_one_tensor_or_array(encoder, arrays, paths):
    h = encoder.features(paths)
    for image in (arrays[1], as_tensor(arrays[1]), Image.fromarray(arrays[1]), str(paths[1])):
        torch.testing.assert_close(encoder.features(image), h[1:2])
    many = np.stack([arrays[0], arrays[0][::-1]])
    twice = encoder.features(many)
    torch.testing.assert_close(twice[:1], h[:1])
    torch.testing.assert_close(encoder.features(torch.from_numpy(many).permute(0, 3, 1, 2)), twice)
    torch.testing.assert_close(encoder.features([many, arrays[1]])[[0, 2]], h[:2])


def test_images_are_brought_to_the_size_that_training_had(encoder, arrays):
    encoder.image_size = 20
    pixels = np.asarray(Image.fromarray(arrays[0]).resize((20, 20), Image.Resampling.BILINEAR))
    expected = empssl.embed(encoder, as_tensor(pixels.copy())[None])
    torch.testing.assert_close(encoder.features(arrays[0]), expected)


def test_an_encoder_knows_the_size_of_the_images_it_is_made_for():
    config = empssl.Config(device="cpu", backbone="small", patch_size=16, hidden=8)
    images = torch.randint(0, 256, (4, 3, 40, 56), dtype=torch.uint8)
    assert empssl.new_encoder(config, images).image_size == 40
    assert small_encoder().image_size == 32  # crops of half its side are 16 pixels


def test_grey_and_turned_pictures_are_read_as_from_a_file(encoder, tmp_path):
    grey = Image.fromarray(np.random.default_rng(1).integers(0, 256, (40, 60), np.uint8))
    exif = grey.getexif()
    exif[274] = 6  # the camera was held upright
    grey.save(tmp_path / "grey.png", exif=exif)
    h = encoder.features(tmp_path / "grey.png")
    torch.testing.assert_close(encoder.features(Image.open(tmp_path / "grey.png")), h)
    assert not torch.allclose(encoder.features(grey.convert("RGB")), h, atol=1e-4)


PIXELS = np.zeros((8, 8, 3), np.uint8)
WRONG = [
    ([], "There are no images"),
    ([[], ()], "There are no images"),
    (torch.zeros(0, 3, 8, 8, dtype=torch.uint8), "There are no images"),
    (PIXELS / 255, "The pixels are float64; give uint8"),
    (torch.zeros(3, 8, 8), "The pixels are float32; give uint8"),
    ([PIXELS, PIXELS.astype(int)], "The pixels are int64"),
    (PIXELS[..., 0], r"An array of images has the shape \(8, 8\)"),
    (PIXELS[..., :2], r"the shape \(8, 8, 2\)"),
    (PIXELS[:0], r"the shape \(0, 8, 3\)"),
    (torch.zeros(8, 8, 3, dtype=torch.uint8), r"A tensor of images has the shape \(8, 8, 3\)"),
    (torch.zeros(8, 8, dtype=torch.uint8), r"A tensor of images has the shape \(8, 8\)"),
    (7, "An image is a int"),
    ([None], "An image is a NoneType"),
    (b"bytes", "An image is a bytes"),
    (["nowhere.png"], "nowhere.png cannot be read as an image"),
    (Path("empty.png"), "empty.png cannot be read as an image"),
    ("text.png", "text.png cannot be read as an image"),
    (Image.fromarray(PIXELS[..., 0] / 255), "A PIL image cannot be read .its pixels are floating"),
]


@pytest.mark.parametrize("images,sentence", WRONG, ids=[sentence[:30] for _, sentence in WRONG])
def test_what_is_no_image_is_one_sentence(images, sentence, encoder, in_tmp):
    Path("empty.png").touch()
    Path("text.png").write_text("no picture")
    with pytest.raises(ValueError, match=sentence) as error:
        encoder.features(images)
    assert "\n" not in str(error.value)
