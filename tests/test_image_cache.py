"""The cache that a folder's images are decoded into: what is kept, and what is never wrong."""

import json
import os
import shutil
import time
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from empssl_support import images
from empssl_support.cli import UsageError
from empssl_support.images import CACHE, decode_once, open_cache, walk
from recipes import picture
from test_images import brightness, decode

pytestmark = pytest.mark.usefixtures("in_tmp")
FIVE = [0, 10, 20, 30, 40]


def forbid_decoding(monkeypatch):
    monkeypatch.setattr(images, "read_image", lambda *_: pytest.fail("decoded again"))


# ---- the cache ----


def test_the_cache_is_used_and_dropped_when_a_file_changes(folder, monkeypatch):
    files = {"train": walk(folder), "test": []}
    first, key = decode_once(folder, files, None)
    with monkeypatch.context() as patch:
        forbid_decoding(patch)
        again, same_key = decode_once(folder, files, None)
    assert torch.equal(first["train"].images, again["train"].images)
    assert key == same_key
    picture(folder / "0.png", 77)
    os.utime(folder / "0.png", (1, 1))
    changed, other_key = decode_once(folder, files, None)
    assert brightness(changed["train"].images) == [77, *FIVE[1:]]
    assert other_key != key
    assert len(list(CACHE.iterdir())) == 1  # the stale one is gone


def test_a_file_more_or_less_is_a_change(folder):
    decode(folder)
    picture(folder / "5.png", 50)
    assert brightness(decode(folder)[0]) == [*FIVE, 50]
    (folder / "0.png").unlink()
    assert brightness(decode(folder)[0]) == [*FIVE[1:], 50]
    assert len(list(CACHE.iterdir())) == 1


def test_each_size_has_a_cache_of_its_own(folder, monkeypatch):
    files = {"train": walk(folder), "test": []}
    _, key = decode_once(folder, files, 10)
    _, other_key = decode_once(folder, files, 20)
    assert key != other_key  # what is cached about the images depends on their size too
    forbid_decoding(monkeypatch)
    assert decode(folder, 10)[0].shape == (5, 3, 10, 10)
    assert decode(folder, 20)[0].shape == (5, 3, 20, 20)


def test_folders_of_one_name_have_caches_of_their_own(in_tmp, monkeypatch):
    places = [in_tmp / place / "images" for place in ("a", "b")]
    for i, place in enumerate(places):
        picture(place / "0.png", 100 * i)
        decode(place)
    forbid_decoding(monkeypatch)
    assert [brightness(decode(place)[0]) for place in places] == [[0], [100]]


def test_a_cache_cut_short_is_decoded_again(folder):
    decode(folder)
    (cached,) = CACHE.glob("*/images.u8")
    cached.write_bytes(cached.read_bytes()[:100])
    assert brightness(decode(folder)[0]) == FIVE


@settings(max_examples=10, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    damage=st.binary(max_size=300),
    where=st.sampled_from(["meta.json", "images.u8"]),
    cut=st.booleans(),
)
def test_damaged_caches_are_decoded_again(damage, where, cut, folder):
    files = {"train": walk(folder), "test": []}
    _, key = decode_once(folder, files, None)
    (cached,) = CACHE.glob(f"images-*/{where}")
    content = cached.read_bytes()
    if where == "images.u8":
        cached.write_bytes(content[: len(damage)])
    else:
        cached.write_bytes(content[: len(content) // 2] if cut else damage)
    again, same_key = decode_once(folder, files, None)
    assert brightness(again["train"].images) == FIVE
    assert same_key == key


@pytest.mark.parametrize(
    "meta",
    ["{}", "[]", '{"rows": 5, "facts": []}', '{"rows": [0, 1], "facts": []}', '{"train": [0]}'],
)
def test_a_cache_that_says_something_else_is_decoded_again(meta, folder):
    decode(folder)
    (cached,) = CACHE.glob("*/meta.json")
    cached.write_text(meta)
    assert brightness(decode(folder)[0]) == FIVE


def test_an_interrupted_decoding_leaves_nothing(folder, monkeypatch):
    read = images.read_image

    def interrupted(file, size):
        if file.name == "3.png":
            raise KeyboardInterrupt
        return read(file, size)

    with monkeypatch.context() as patch:
        patch.setattr(images, "read_image", interrupted)
        with pytest.raises(KeyboardInterrupt):
            decode(folder)
    assert not list(CACHE.glob("*"))
    assert brightness(decode(folder)[0]) == FIVE


def test_the_cache_of_another_process_that_was_quicker_will_do(folder, monkeypatch):
    decode(folder)
    (cache,) = CACHE.iterdir()
    shutil.move(cache, "aside")
    read = images.read_image

    def overtaken(file, size):
        if file.name == "0.png":
            shutil.copytree("aside", cache)
        return read(file, size)

    monkeypatch.setattr(images, "read_image", overtaken)
    assert brightness(decode(folder)[0]) == FIVE
    assert list(CACHE.iterdir()) == [cache]


def test_what_a_killed_decoding_left_is_cleared_away_later(folder):
    for name, age in (("old", 7200), ("new", 60)):
        scratch = CACHE / f".decoding-{name}"
        scratch.mkdir(parents=True)
        (scratch / "images.u8").write_bytes(b"some")
        for path in (scratch / "images.u8", scratch):
            os.utime(path, (time.time() - age,) * 2)
    decode(folder)
    assert [path.name for path in CACHE.glob(".decoding-*")] == [".decoding-new"]


# ---- the disk ----


def test_the_disk_that_is_taken_is_said_before_it_is_taken(folder, monkeypatch, capsys):
    told = []
    monkeypatch.setattr(images, "write_pixels", lambda *_: told.append(capsys.readouterr().out))
    free = os.statvfs(".").f_bavail * os.statvfs(".").f_frsize
    with pytest.raises(UsageError, match="damaged"):  # of None images
        decode(folder)
    (sentence,) = told
    assert "5 images of 30x30" in sentence and "13.5 kB" in sentence and str(CACHE) in sentence
    assert f"{free / 1e9:,.0f}"[:-1] in sentence


def test_a_disk_without_room_is_one_sentence_and_nothing_is_written(folder, monkeypatch):
    usage = shutil.disk_usage(".")
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=5 * 3 * 30 * 30 - 1))
        with pytest.raises(UsageError, match="take 13.5 kB, and there are 13.5 kB free"):
            decode(folder)
        assert not Path("runs").exists()
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=5 * 3 * 30 * 30))
    decode(folder)
    picture(folder / "5.png", 50)
    with pytest.raises(UsageError, match="6 images"):
        decode(folder)
    (folder / "5.png").unlink()
    forbid_decoding(monkeypatch)
    assert brightness(decode(folder)[0]) == FIVE  # the cache before is still there


@pytest.mark.parametrize(
    "number,words", [(999, "1.0 kB"), (184_320_000, "184.3 MB"), (195_686_400_000, "195.7 GB")]
)
def test_bytes_in_words(number, words):
    assert images.in_bytes(number) == words


# ---- memory ----


def anonymous_memory():
    """Bytes of this process that are no file's: the page cache of a mapped file does not count."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon"):
            return int(line.split()[1]) * 1024
    pytest.skip("the kernel does not say")


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="needs Linux")
def test_a_memory_mapped_data_set_is_not_read_into_memory(folder):
    """1.2 GB, which take no room on the disk, gathered batch by batch as training does."""
    decode(folder)
    (cache,) = CACHE.iterdir()
    N, side, b = 6_000, 256, 200
    os.truncate(cache / "images.u8", N * 3 * side * side)
    (cache / "meta.json").write_text(json.dumps({"rows": list(range(N)), "facts": []}))
    pixels = open_cache(cache, side).pixels
    maps = Path("/proc/self/maps").read_text().splitlines()
    mapped = [line.split() for line in maps if line.endswith("images.u8")]
    assert mapped
    assert not any("w" in permissions for _, permissions, *_ in mapped)

    before = anonymous_memory()
    order = torch.randperm(N)
    read, peak = 0, 0
    for index in order.split(b):
        batch = pixels[index]
        read += len(batch)
        peak = max(peak, anonymous_memory())
    assert read == N
    assert peak - before < 3e8
