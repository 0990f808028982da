"""A folder's images: finding them, and reading any kind."""

import errno
import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, JpegImagePlugin

from empssl_support.cli import UsageError
from empssl_support.images import CACHE, decode_once, read_image, walk
from recipes import picture

pytestmark = pytest.mark.usefixtures("in_tmp")


def brightness(pixels):
    return pixels.float().mean((1, 2, 3)).round().int().tolist()


def decode(folder, size=None):
    """All images below `folder`, and their files' names."""
    files = walk(folder)
    splits, _ = decode_once(folder, {"train": files, "test": []}, size)
    assert splits["test"].images is None
    found, rows = splits["train"]
    return found, [files[row].name for row in rows]


# ---- finding files ----


def test_files_are_found_in_order_and_hidden_ones_are_not(in_tmp):
    names = ["b/1.png", "b/0.PNG", "a.jpeg", "B/x/y.webp", "c.txt", ".d.png", ".e/f.png", "png"]
    for name in names:
        (in_tmp / "set" / name).parent.mkdir(parents=True, exist_ok=True)
        (in_tmp / "set" / name).touch()
    found = [str(file.relative_to(in_tmp / "set")) for file in walk(in_tmp / "set")]
    assert found == ["B/x/y.webp", "a.jpeg", "b/0.PNG", "b/1.png"]


def test_linked_folders_are_followed_once(folder, in_tmp):
    picture(in_tmp / "elsewhere" / "9.png", 90)
    os.symlink(in_tmp / "elsewhere", folder / "linked")
    os.symlink(folder, folder / "loop")
    assert [file.name for file in walk(folder)] == [*(f"{i}.png" for i in range(5)), "9.png"]


def test_a_folder_that_may_not_be_read_is_not_passed_over(folder, monkeypatch):
    picture(folder / "secret" / "5.png")
    scandir = os.scandir

    def guarded(path):
        if Path(path).name == "secret":
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", guarded)
    with pytest.raises(PermissionError, match="secret"):
        walk(folder)


# ---- reading an image ----


def test_the_first_readable_image_gives_the_size_up_to_224(in_tmp):
    (in_tmp / "a").mkdir()
    (in_tmp / "a" / "0.png").write_bytes(b"not an image")
    for i in range(1, 120):
        picture(in_tmp / "a" / f"{i:03}.png", size=(12, 7) if i == 1 else (9, 20))
    assert decode(in_tmp / "a")[0].shape == (119, 3, 7, 7)
    picture(in_tmp / "b" / "0.png", size=(500, 300))
    assert decode(in_tmp / "b")[0].shape == (1, 3, 224, 224)


def test_nothing_that_can_be_read(in_tmp):
    (in_tmp / "0.png").write_bytes(b"not an image")
    with pytest.raises(UsageError, match="None of the 1 image files can be read.*0.png"):
        decode(in_tmp)


def test_the_centre_is_cut_out_and_the_shorter_side_resized(in_tmp):
    pixels = np.zeros((10, 30, 3), np.uint8)
    pixels[:, 10:20] = 200  # the middle third of a wide image
    (in_tmp / "wide").mkdir()
    Image.fromarray(pixels).save(in_tmp / "wide" / "a.png")
    assert brightness(decode(in_tmp / "wide")[0]) == [200]
    small, _ = decode(in_tmp / "wide", size=5)
    assert small.shape == (1, 3, 5, 5)
    assert small.float().mean() > 180


def test_images_are_turned_as_the_camera_says_and_floats_are_refused(in_tmp, capsys):
    for i in range(120):
        picture(in_tmp / "set" / f"{i:03}.png", size=(20, 20))
    dark_above = np.array([[0], [250]], np.uint8).repeat(20, 0).repeat(40, 1)
    exif = Image.Exif()
    exif[0x0112] = 3  # upside down
    Image.fromarray(dark_above).save(in_tmp / "set" / "aa.png", exif=exif)
    Image.fromarray(np.full((20, 20), 0.5, np.float32)).save(in_tmp / "set" / "ab.tif")
    found, names = decode(in_tmp / "set", size=20)
    turned = found[names.index("aa.png")].float()
    assert turned[:, :8].mean() > 240
    assert turned[:, 12:].mean() < 10
    assert "ab.tif" not in names
    assert "ab.tif (its pixels are floating-point" in capsys.readouterr().out


def test_other_pixel_formats_and_names(in_tmp):
    (in_tmp / "modes").mkdir()
    for mode in ("L", "P", "RGBA", "CMYK", "1"):
        ending = "jpg" if mode == "CMYK" else "png"
        grey = Image.new("RGB", (16, 16), (200, 200, 200))
        grey.convert(mode).save(in_tmp / "modes" / f"é {mode}.{ending}")
    found, _ = decode(in_tmp / "modes")
    assert len(found) == 5
    assert min(brightness(found)) > 150


def test_strange_images(in_tmp, capsys):
    folder = in_tmp / "ünïcode 图片"
    for i in range(400):
        picture(folder / f"{i:04}.png", i % 250, size=(32, 32))
    noise = np.random.default_rng(0).integers(0, 256, (40, 40, 3), np.uint8)
    Image.fromarray(noise).save(folder / "whole.jpg")
    (folder / "bad-truncated.jpg").write_bytes((folder / "whole.jpg").read_bytes()[:600])
    (folder / "bad-empty.png").write_bytes(b"")
    (folder / "bad-text.jpg").write_text("this is no image\n" * 50)
    (folder / "notes.txt").write_text("no image, and not called one")
    Image.fromarray(np.full((40, 40), 200 * 257, np.uint16)).save(folder / "sixteen.png")
    Image.fromarray(noise).convert("CMYK").save(folder / "cmyk.jpg")
    Image.fromarray(noise).convert("P").save(folder / "palette.png", transparency=0)
    Image.new("RGB", (1, 1), (9, 99, 199)).save(folder / "one.png")
    Image.new("RGB", (10_000, 8), (10, 20, 30)).save(folder / "wide.png")
    frames = [Image.new("RGB", (32, 32), (shade, 0, 0)) for shade in (250, 10)]
    frames[0].save(folder / "animated.gif", save_all=True, append_images=frames[1:])
    os.symlink(folder, folder / "loop")
    os.symlink(folder / "nowhere.png", folder / "dangling.png")

    found, names = decode(folder, size=32)
    assert len(names) == len(set(names)) == len(found) == 407
    assert not [name for name in names if name.startswith(("bad", "notes", "dangling"))]
    told = "".join(capsys.readouterr())
    for bad in ("bad-truncated.jpg", "bad-empty.png", "bad-text.jpg", "dangling.png", "4 of 411"):
        assert bad in told

    def colour(name):
        return found[names.index(name)].float().mean((1, 2)).round().tolist()

    assert colour("sixteen.png") == [200, 200, 200]
    assert colour("one.png") == [9, 99, 199]
    assert colour("wide.png") == [10, 20, 30]
    assert colour("animated.gif")[0] > 240  # the first frame


# ---- large JPEGs, which are decoded at a reduced size ----


def landscape(height, width):
    """Colours whose spectrum falls off as in photographs: `(height, width, 3)` uint8."""
    chance = np.random.default_rng(0)
    rows, columns = np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None]
    frequency = np.hypot(rows, columns).clip(1 / width)
    shape = (3, *frequency.shape)
    waves = chance.standard_normal(shape) + 1j * chance.standard_normal(shape)
    pixels = np.fft.irfft2(waves / frequency, s=(height, width)).transpose(1, 2, 0)
    return (pixels / pixels.std() * 50 + 125).clip(0, 255).astype(np.uint8)


@pytest.fixture
def reductions(monkeypatch):
    """By how much each JPEG was reduced while it was decoded."""
    draft, seen = JpegImagePlugin.JpegImageFile.draft, []

    def watched(image, *how):
        width, _ = image.size
        answer = draft(image, *how)
        seen.append(round(width / image.size[0]))
        return answer

    monkeypatch.setattr(JpegImagePlugin.JpegImageFile, "draft", watched)
    return seen


@pytest.mark.parametrize("size,reduced", [(32, 8), (48, 4), (120, 2), (200, 1)])
def test_a_large_jpeg_is_nearly_as_if_decoded_in_full(size, reduced, in_tmp, reductions):
    # Neither side is a multiple of 8: what is left over must not stretch the picture.
    whole = Image.fromarray(landscape(793, 1001))
    whole.save("large.jpg", quality=95, subsampling=0)
    whole.save("large.png")
    photo, exact = (read_image(Path(f"large.{kind}"), size).astype(int) for kind in ("jpg", "png"))
    assert reductions == [reduced]
    assert photo.shape == exact.shape == (3, size, size)
    assert np.abs(photo - exact).mean() < 0.6
    assert np.abs(photo - exact).max() < 8


@pytest.mark.parametrize("orientation,quarters", [(1, 0), (3, 2), (6, -1), (8, 1)])
def test_a_large_jpeg_is_turned_too(orientation, quarters, in_tmp, reductions):
    exif = Image.Exif()
    exif[0x0112] = orientation
    whole = Image.fromarray(landscape(640, 1280))
    whole.save("large.jpg")
    whole.save("turned.jpg", exif=exif)
    pixels, turned = (read_image(Path(file), 20) for file in ("large.jpg", "turned.jpg"))
    assert reductions == [8, 8]
    assert np.array_equal(np.rot90(pixels, quarters, (1, 2)), turned)


@pytest.mark.parametrize("mode", ["L", "CMYK"])
def test_a_large_jpeg_of_other_colours(mode, in_tmp, reductions):
    Image.new("RGB", (640, 660), (200, 200, 200)).convert(mode).save("large.jpg")
    pixels = read_image(Path("large.jpg"), 20)
    assert reductions == [8]
    assert pixels.shape == (3, 20, 20) and np.abs(pixels.astype(int) - 200).max() < 3


def test_a_large_jpeg_cut_short_is_unreadable(in_tmp, reductions):
    Image.fromarray(landscape(640, 640)).save("large.jpg")
    content = Path("large.jpg").read_bytes()
    Path("large.jpg").write_bytes(content[: len(content) // 2])
    assert isinstance(read_image(Path("large.jpg"), 20), OSError)


def test_sixteen_bits_and_tiff_are_turned_too(in_tmp):
    exif = Image.Exif()
    exif[0x0112] = 6  # its left side is the upper one
    dark_left = np.array([0, 250], np.uint8).repeat(20)[None].repeat(20, 0)
    deep = Image.fromarray(dark_left.astype(np.uint16) * 257)
    deep.save("deep.png", exif=exif)
    Image.fromarray(dark_left).save("plain.tif", exif=exif, compression="tiff_lzw")
    for file in ("deep.png", "plain.tif"):
        pixels = read_image(Path(file), 20)
        assert pixels[:, :8].max() < 10 and pixels[:, 12:].min() > 240, file


def test_of_a_very_thin_image_the_middle_alone_is_enlarged(in_tmp, monkeypatch):
    row = np.arange(3001) // 600 * 40
    thin = Image.fromarray(np.repeat(row[None, :, None], 3, 2).astype(np.uint8))
    enlarged = []
    resize = Image.Image.resize

    def watched(image, size, *how):
        enlarged.append(size)
        return resize(image, size, *how)

    monkeypatch.setattr(Image.Image, "resize", watched)
    thin.save("wide.png")
    thin.transpose(Image.Transpose.ROTATE_90).save("high.png")
    for name in ("wide.png", "high.png"):
        pixels = read_image(Path(name), 24)
        assert pixels.shape == (3, 24, 24) and (pixels == row[1500]).all()
    assert [max(size) for size in enlarged] == [8 * 24, 8 * 24]


# ---- images that cannot be read ----


def test_an_unreadable_image_is_named_skipped_and_counted(in_tmp, capsys):
    for i in range(150):
        picture(in_tmp / "many" / f"{i:03}.png", i, size=(4, 4))
    (in_tmp / "many" / "007.png").write_bytes(b"not an image")
    found, names = decode(in_tmp / "many")
    assert brightness(found) == [i for i in range(150) if i != 7]
    assert "007.png" not in names
    told = "".join(capsys.readouterr())
    assert "007.png" in told
    assert "1 of 150" in told


def test_many_images_keep_their_files(in_tmp):
    for i in range(1100):
        picture(in_tmp / "many" / f"{i:04}.png", i % 250, size=(2, 2))
    for bad in (7, 1060):
        (in_tmp / "many" / f"{bad:04}.png").write_bytes(b"not an image")
    found, names = decode(in_tmp / "many")
    left = [i for i in range(1100) if i not in (7, 1060)]
    assert names == [f"{i:04}.png" for i in left]
    assert brightness(found) == [i % 250 for i in left]


@pytest.mark.parametrize("fault", [OSError(errno.EIO, "Input/output error"), MemoryError()])
def test_a_fault_of_the_machine_is_not_kept_as_one_of_the_image(fault, folder, monkeypatch):
    opened = Image.open

    def failing(file):
        if Path(file).name == "3.png":
            raise fault
        return opened(file)

    with monkeypatch.context() as patch:
        patch.setattr(Image, "open", failing)
        with pytest.raises(type(fault)) as error:
            decode(folder, 16)
    if isinstance(fault, OSError):
        assert error.value.filename == str(folder / "3.png")
    assert brightness(decode(folder, 16)[0]) == [0, 10, 20, 30, 40]


def test_more_than_one_per_cent_unreadable_stops(folder):
    for i in range(5, 8):
        picture(folder / f"{i}.png")
    (folder / "0.png").write_bytes(b"not an image")
    with pytest.raises(UsageError, match="1 of 8 images cannot be read"):
        decode(folder)
    assert not list(CACHE.glob("*"))  # nothing half-written stays


def test_one_per_cent_of_both_splits_together_is_allowed(in_tmp):
    for i in range(200):
        picture(in_tmp / "set" / f"{i:03}.png", i, size=(4, 4))
    for bad in ("100.png", "150.png"):
        (in_tmp / "set" / bad).write_bytes(b"")
    files = walk(in_tmp / "set")
    split = {"train": files[:100], "test": files[100:]}  # 2 % of the test images alone
    splits, _ = decode_once(in_tmp / "set", split, 4)
    assert brightness(splits["train"].images) == list(range(100))
    assert splits["test"].rows == [row for row in range(100) if row not in (0, 50)]
    assert brightness(splits["test"].images) == [100 + row for row in splits["test"].rows]


def test_a_split_of_which_nothing_can_be_read(in_tmp):
    for i in range(300):
        picture(in_tmp / "set" / f"{i}.png", size=(4, 4))
    (in_tmp / "set" / "bad.png").write_bytes(b"")
    files = walk(in_tmp / "set")
    bad = files.pop()
    for _ in range(2):  # decoded, then from the cache
        with pytest.raises(UsageError, match="No image of the test split.*bad.png"):
            decode_once(in_tmp / "set", {"train": files, "test": [bad]}, 4)
