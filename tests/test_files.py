"""Files are whole or not at all, and what is read may lie."""

import csv
import errno
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import empssl
from empssl_support.cli import UsageError
from empssl_support.files import (
    halved,
    named,
    read_checkpoint,
    read_encoder,
    save_encoder,
    write_features,
    write_table,
    write_text,
    write_whole,
)
from recipes import small_encoder

pytestmark = pytest.mark.usefixtures("in_tmp")
ARCHITECTURE = {"backbone": "small", "patch_size": 16, "hidden": 16, "projector": 16, "dim": 8}
ARCHITECTURE |= {"drop_last_stage": False}


def test_what_cannot_be_written_leaves_what_was_there():
    write_text(Path("a.txt"), "before")

    def half(out):
        out.write(b"half of it")
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError) as error:
        write_whole(Path("a.txt"), half)
    assert error.value.filename == "a.txt"
    assert Path("a.txt").read_text() == "before" and os.listdir() == ["a.txt"]


def test_the_act_before_the_last_is_before_the_new_file_is_there():
    write_text(Path("a.txt"), "before")
    seen = []
    write_whole(
        Path("a.txt"),
        lambda out: out.write(b"after"),
        lambda: seen.append(Path("a.txt").read_text()),
    )
    assert seen == ["before"] and Path("a.txt").read_text() == "after"


def test_features_are_arrays_by_name_and_none_is_left_out():
    features = torch.arange(6.0).view(2, 3)
    write_features(Path("f.npz"), features=features, files=["a", "b"], labels=None)
    saved = np.load("f.npz")
    assert set(saved) == {"features", "files"} and saved["files"].tolist() == ["a", "b"]
    assert np.array_equal(saved["features"], features)


def test_a_table_is_read_as_it_was_written():
    rows = [["a,b\n.png", 'say "c"', 1.5], ["\udcff.png", "é", -2]]
    write_table(Path("t.csv"), ["file", "label", "x"], rows)
    with open("t.csv", newline="", encoding="utf-8") as file:
        head, *found = csv.reader(file)
    assert head == ["file", "label", "x"]
    assert found == [["a,b\n.png", 'say "c"', "1.5"], ["\\udcff.png", "é", "-2"]]


def test_an_encoder_remembers_the_size_of_its_images(good_checkpoint):
    encoder = small_encoder()
    encoder.image_size = 50
    save_encoder(Path("own.pt"), encoder)
    assert read_encoder("own.pt")["image_size"] == empssl.load("own.pt").image_size == 50
    # Files of before do not say it: patches of 16 are cut in their own size from images of 32.
    content = torch.load("own.pt", weights_only=True)
    del content["image_size"]
    torch.save(content, "old.pt")
    assert empssl.load("old.pt").image_size == 32


@pytest.fixture
def good_checkpoint():
    save_encoder(Path("good.pt"), small_encoder())
    return Path("good.pt").read_bytes()


def loads_or_is_refused(path):
    """Whether it loads; anything but `UsageError` otherwise fails the test."""
    try:
        empssl.load(path)
        return True
    except UsageError as error:
        assert path in str(error) and "\n" not in str(error)
        return False


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_bytes_as_an_encoder(data, good_checkpoint):
    content = bytearray(good_checkpoint)
    how = data.draw(st.sampled_from(["random", "cut", "bits"]))
    if how == "random":
        content = data.draw(st.binary(max_size=200))
    elif how == "cut":
        content = content[: data.draw(st.integers(0, len(content) - 1))]
    else:
        places = st.integers(0, len(content) - 1)
        for place in data.draw(st.lists(places, min_size=1, max_size=5)):
            content[place] ^= 1 << data.draw(st.integers(0, 7))
    Path("odd.pt").write_bytes(bytes(content))
    loaded = loads_or_is_refused("odd.pt")
    assert not loaded or how == "bits"  # a bit of a weight may go unnoticed


@pytest.mark.parametrize(
    "change",
    [
        {"architecture": ARCHITECTURE | {"hidden": -1}},
        {"architecture": ARCHITECTURE | {"backbone": "huge"}},
        {"architecture": ARCHITECTURE | {"patch_size": "16"}},
        {"architecture": ARCHITECTURE | {"hidden": 17}},
        {"architecture": {"epochs": 5}},
        {"architecture": []},
        {"image_size": True},
        {"image_size": -5},
        {"weights": []},
        {"weights": {}},
        {"weights": {"represent.0.weight": "text"}},
        {"weights": {"represent.0.weight": torch.zeros(3)}},
    ],
    ids=str,
)
def test_encoders_that_lie(change, good_checkpoint):
    torch.save(torch.load("good.pt", weights_only=True) | change, "odd.pt")
    assert not loads_or_is_refused("odd.pt")


def test_an_encoder_is_plain_tensors_and_numbers(good_checkpoint):
    content = torch.load("good.pt", weights_only=True)
    assert content["architecture"] == ARCHITECTURE
    assert read_encoder("good.pt").keys() == content.keys()
    with pytest.raises(UsageError, match="There is no checkpoint nowhere.pt"):
        read_encoder("nowhere.pt")


@pytest.mark.parametrize("place", [0.3, 0.5, 0.9])
def test_a_checkpoint_with_one_bit_turned_is_not_whole(place):
    state = {"step": 3, "weights": torch.randn(5000)}
    torch.save(state, "checkpoint.pt")
    whole = read_checkpoint(Path("checkpoint.pt"))
    assert whole["step"] == 3 and torch.equal(whole["weights"], state["weights"])
    content = bytearray(Path("checkpoint.pt").read_bytes())
    content[int(len(content) * place)] ^= 1
    Path("checkpoint.pt").write_bytes(content)
    assert read_checkpoint(Path("checkpoint.pt")) is None


def test_code_in_a_file_is_not_run():
    class Code:
        def __reduce__(self):
            return (os.mkdir, ("code-was-run",))

    torch.save({"step": Code(), "architecture": Code(), "weights": {}}, "odd.pt")
    assert read_checkpoint(Path("odd.pt")) is None and not loads_or_is_refused("odd.pt")
    assert not Path("code-was-run").exists()


def test_features_are_halved_unless_that_makes_one_infinite():
    x = torch.tensor([[1.5, -60_000.0]])
    assert halved(x).dtype == torch.float16 and torch.equal(halved(x).float(), x)
    larger = torch.tensor([[1.5, 70_000.0]])
    assert torch.equal(halved(larger), larger) and halved(larger).dtype == torch.float32


# ---- errors of the disk ----


def test_an_error_of_a_write_names_its_file():
    with pytest.raises(OSError) as error, named(Path("here.txt")):
        raise OSError(errno.EIO, "Input/output error")
    assert error.value.filename == "here.txt"
    with pytest.raises(OSError) as error, named(Path("here.txt")):
        raise OSError(errno.EIO, "Input/output error", "there.txt")
    assert error.value.filename == "there.txt"


@pytest.mark.parametrize("error", [PermissionError(13, "Permission denied"), MemoryError()])
def test_an_encoder_that_may_not_be_read_is_not_called_another_programs(error, monkeypatch):
    save_encoder(Path("own.pt"), small_encoder())

    def refused(*arguments, **how):
        raise error

    monkeypatch.setattr(torch, "load", refused)
    with pytest.raises(type(error)):
        read_encoder("own.pt")
