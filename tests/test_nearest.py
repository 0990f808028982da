"""The images of a folder that are nearest to one."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import empssl
from empssl import main
from empssl_support.cli import UsageError
from empssl_support.files import save_encoder
from empssl_support.nearest import MARGIN, SIDE, draw_sheet, neighbours
from recipes import plain_folder, small_encoder

pytestmark = pytest.mark.usefixtures("in_tmp")


@pytest.fixture
def search():
    """`search(*flags)` looks through `photos`, thirty images, with an encoder of some kind."""
    encoder = small_encoder()
    encoder(torch.randn(64, 3, 16, 16))
    save_encoder(Path("encoder.pt"), encoder)
    plain_folder(Path("photos"))

    def run(query, *flags, folder="photos"):
        words = ["--nearest", query, "--checkpoint", "encoder.pt", "--data-dir", folder]
        return main([*words, "--device", "cpu", *flags])

    return run


def refused(run, capsys):
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        run()
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert stop.value.code == 2 and "error: " in error
    assert not list(Path().glob("nearest-*")) and not Path("runs/x").exists()
    return error


def test_neighbours_are_the_nearest_by_cosine_and_not_the_query_itself():
    h = torch.tensor([[1.0, 0.0], [0.0, 2.0], [5.0, 5.0], [-1.0, 0.0]])
    files = ["a.png", "x/../b.png", "c.png", "d.png"]
    query = torch.tensor([[3.0, 0.1]])
    found = neighbours("q.png", query, h, files, k=3)
    assert [file for file, _ in found] == ["a.png", "c.png", "x/../b.png"]
    assert found[1].similarity == pytest.approx(3.1 / (2 * (9.01)) ** 0.5)
    assert [file for file, _ in neighbours("b.png", query, h, files)] == ["a.png", "c.png", "d.png"]
    with pytest.raises(UsageError, match="one image to search in, a.png"):
        neighbours("q.png", query, h[:1], files[:1])


def test_the_ten_nearest_are_printed_and_drawn(search, capsys):
    shutil.copy("photos/07.png", "query.png")
    assert search("query.png") == {}
    *lines, last = capsys.readouterr().out.splitlines()
    found = [line.split("  ") for line in lines if line.endswith(".png")]
    assert len(found) == 10 and found[0] == ["1.000", "photos/07.png"]  # the same picture
    encoder = empssl.load("encoder.pt")
    h = encoder.features([f"photos/{i:02}.png" for i in range(30)])
    similarity = torch.nn.functional.cosine_similarity(h, h[7:8], dim=1)
    best, nearest = similarity.topk(10)
    assert [file for _, file in found[:3]] == [f"photos/{i:02}.png" for i in nearest[:3]]
    assert [float(value) for value, _ in found] == pytest.approx(best.tolist(), abs=6e-4)
    assert last == "drawn: nearest-query.png"
    assert Image.open("nearest-query.png").size == (6 * 168 + 8, 2 * 184 + 8)


def test_the_query_is_brought_to_the_size_of_the_folders_images(search, capsys):
    shutil.copy("photos/07.png", "query.png")
    search("query.png", "--image-size", "16")
    assert "1.000  photos/07.png" in capsys.readouterr().out


def test_a_sheet_shows_the_query_first_and_then_what_was_found():
    plain_folder(Path("photos"), count=3, size=SIDE)
    found = [("photos/02.png", 0.5), ("photos/01.png", 0.25)]
    draw_sheet(Path("sheet.png"), "photos/00.png", found)
    sheet = np.asarray(Image.open("sheet.png"))
    for place, name in enumerate(("00", "02", "01")):
        left = MARGIN + place * (SIDE + MARGIN)
        shown = sheet[MARGIN : MARGIN + SIDE, left : left + SIDE]
        assert np.array_equal(shown, np.asarray(Image.open(f"photos/{name}.png")))
        below = sheet[MARGIN + SIDE : MARGIN + SIDE + 16, left : left + SIDE]
        assert (below < 128).any()  # there are words


def test_a_labelled_folder_is_searched_as_a_whole_and_stays_one(search, capsys):
    for place in ("train/a", "train/b", "val/a", "val/b"):
        plain_folder(Path("set", place), 2)
    before = empssl.load_dataset("imagefolder", "set", 32)
    search("photos/20.png", folder="set")
    lines = [line for line in capsys.readouterr().out.splitlines() if "set/" in line]
    assert sum("set/val/" in line for line in lines) == 4 and len(lines) == 8
    after = empssl.load_dataset("imagefolder", "set", 32)
    assert torch.equal(before.test_images, after.test_images) and before.key == after.key


def test_a_sheet_is_overwritten_with_force_alone(search, capsys):
    Path("nearest-01.png").write_text("mine")
    with pytest.raises(SystemExit) as stop:
        search("photos/01.png")
    assert stop.value.code == 2 and "nearest-01.png is there already" in capsys.readouterr().err
    assert Path("nearest-01.png").read_text() == "mine"
    search("photos/01.png", "--force")
    assert Image.open("nearest-01.png").format == "PNG"


@pytest.mark.parametrize(
    "query,sentence",
    [
        ("empty.png", "empty.png cannot be read as an image"),
        ("text.png", "text.png cannot be read as an image"),
        ("nowhere.png", "nowhere.png cannot be read as an image"),
        ("photos", "photos cannot be read as an image"),
        ("a" * 300, "cannot be read"),
        ("", "--checkpoint goes with"),
    ],
)
def test_a_query_that_is_no_image(query, sentence, search, capsys):
    Path("empty.png").touch()
    Path("text.png").write_text("no picture")
    assert sentence in refused(lambda: search(query), capsys)


def test_folders_with_nothing_to_search_in(search, capsys):
    plain_folder(Path("one"), 1)
    Path("none").mkdir()
    query = "photos/01.png"
    assert "There is one image" in refused(lambda: search(query, folder="one"), capsys)
    assert "There are no images" in refused(lambda: search(query, folder="none"), capsys)
    assert "There is no folder" in refused(lambda: search(query, folder="nowhere"), capsys)
    Path("encoder.pt").write_text("another program's")
    assert "is no encoder" in refused(lambda: search(query), capsys)
