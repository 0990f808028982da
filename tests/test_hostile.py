"""Whatever is thrown at it, it ends well or with one sentence and exit code 2."""

import io as bytes_io
import json
import os
import tarfile
import urllib.error
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from PIL import Image

import empssl
import empssl_io as io
from empssl import Augmentation, Config, Encoder, empssl_loss, main
from test_run import SHAPES, TINY

pytestmark = pytest.mark.usefixtures("in_tmp", "short_runs")
within_a_test = dict(suppress_health_check=[HealthCheck.function_scoped_fixture])      # what a fixture sets up is shared


def ends_well_or_in_a_sentence(arguments, capsys):
    """Returns the exit code: 0 or 2. Anything else, a traceback too, fails the test."""
    try:
        main(arguments)
        code = 0
    except SystemExit as stop:
        code = stop.code or 0
    error = capsys.readouterr().err
    assert code in (0, 2), (code, error)
    if code == 2:
        assert "error: " in error.splitlines()[-1] and len(error.splitlines()[-1]) < 600
    return code


# ---- the command line ----

INTEGERS = st.one_of(st.integers(-3, 40), st.integers(-2 ** 70, 2 ** 70)).map(str)
FLOATS = st.floats(allow_nan=True, allow_infinity=True).map(str)
WORDS = st.one_of(st.text(max_size=8), st.sampled_from(["", "..", "/", "runs", "nan", "0x10", "1e3", "--lr", "cuda:99", "a" * 300]))


def flags():
    def value(f):
        if f.type is bool:
            return st.just([])
        good = f.metadata.get("choices", ())
        kinds = [WORDS, INTEGERS if f.type is int else FLOATS]
        return st.one_of(*kinds, st.sampled_from([str(g) for g in good])) if good else st.one_of(*kinds)
    one = [value(f).map(lambda v, f=f: [f"--{f.name.replace('_', '-')}", *([v] if isinstance(v, str) else v)]) for f in fields(Config)
           if f.name not in ("dataset", "data_dir", "compile")]
    return st.lists(st.one_of(*one), min_size=1, max_size=4).map(lambda parts: [word for part in parts for word in part])


@settings(max_examples=150, **within_a_test)
@given(arguments=flags())
@example(arguments=["--patches", "1000000000"])
@example(arguments=["--hidden", "10000000"])
@example(arguments=["--seed", "-1"])
@example(arguments=["--seed", "18446744073709551616"])
@example(arguments=["--lam", "nan"])
@example(arguments=["--save-every", "nan"])
@example(arguments=["--patch-size", "3"])
@example(arguments=["--eval-patches", "100000000000000000000"])
@example(arguments=["--export-features", ""])
@example(arguments=["--export-features", "runs"])
@example(arguments=["--name", "a" * 300])
@example(arguments=["--resume", "\0"])
@example(arguments=["--device", ""])
def test_any_flags(arguments, capsys, monkeypatch):
    """All of the program but its training and probing."""
    monkeypatch.setattr(empssl, "train", lambda *_: {"R": 1.0, "D": 1.0, "train_seconds": 1.0, "patches_seen": 1})
    monkeypatch.setattr(empssl, "embed", lambda encoder, images, *_: torch.zeros(len(images), 2))
    ends_well_or_in_a_sentence([*SHAPES, "--force", *arguments], capsys)


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_that_may_not_be_written(in_tmp, capsys):
    io.RUNS.mkdir(mode=0o500)
    assert ends_well_or_in_a_sentence([*SHAPES, "--name", "x"], capsys) == 2


def test_a_file_in_the_place_of_the_runs_folder(capsys):
    Path("runs").write_text("")
    assert ends_well_or_in_a_sentence([*SHAPES, "--name", "x"], capsys) == 2


# ---- folders of images ----

def good_images(folder, count=400):
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(count):
        Image.new("RGB", (32, 32), (i % 250, 100, 50)).save(folder / f"{i:04}.png")


def test_strange_images(in_tmp, capsys):
    folder = in_tmp / "ünïcode 图片"
    good_images(folder)
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
    data = io.load_dataset("imagefolder", folder, image_size=32)
    skipped = "".join(capsys.readouterr())
    names = [Path(f).name for f in data.files]
    assert len(names) == len(set(names)) == 407 and not [n for n in names if n.startswith(("bad", "notes", "dangling"))]
    assert all(bad in skipped for bad in ("bad-truncated.jpg", "bad-empty.png", "bad-text.jpg", "dangling.png", "4 of 411"))
    shown = lambda name: data.train_images[names.index(name)].float().mean((1, 2)).round().tolist()
    assert shown("sixteen.png") == [200, 200, 200] and shown("one.png") == [9, 99, 199] and shown("wide.png") == [10, 20, 30]
    assert shown("animated.gif")[0] > 240                           # the first frame


@settings(max_examples=10, **within_a_test)
@given(damage=st.binary(max_size=300), where=st.sampled_from(["meta.json", "train.u8"]), cut=st.booleans())
def test_damaged_caches_are_decoded_again(damage, where, cut, tmp_path):
    folder = tmp_path / "plain"
    if not folder.exists():
        good_images(folder, 20)
    whole = io.load_dataset("imagefolder", folder)
    expected, key = whole.train_images.clone(), whole.key
    del whole
    (cached,) = io.CACHE.glob(f"plain-*/{where}")
    content = cached.read_bytes()
    if where == "meta.json":
        cached.write_bytes(damage if not cut else content[:len(content) // 2])
    else:
        cached.write_bytes(content[:len(damage)])
    again = io.load_dataset("imagefolder", folder)
    assert torch.equal(again.train_images, expected) and again.key == key


# ---- checkpoints ----

@pytest.fixture
def good_checkpoint():
    io.save_encoder(Path("good.pt"), Encoder("small", 16, hidden=16, projector=16, dim=8))
    return Path("good.pt").read_bytes()


@settings(max_examples=60, **within_a_test)
@given(data=st.data())
def test_any_bytes_as_a_checkpoint(data, good_checkpoint, capsys):
    content = bytearray(good_checkpoint)
    how = data.draw(st.sampled_from(["random", "cut", "bits"]))
    if how == "random":
        content = data.draw(st.binary(max_size=200))
    elif how == "cut":
        content = content[:data.draw(st.integers(0, len(content) - 1))]
    else:
        for place in data.draw(st.lists(st.integers(0, len(content) - 1), min_size=1, max_size=5)):
            content[place] ^= 1 << data.draw(st.integers(0, 7))
    Path("odd.pt").write_bytes(bytes(content))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(empssl, "probe", lambda *_: dict(linear_top1=0.0, linear_top5=0.0, knn_top1=0.0, raw_pixels_top1=0.0,
                                                       untrained_top1=0.0))
        code = ends_well_or_in_a_sentence([*SHAPES, "--force", "--name", "x", "--eval-only", "--checkpoint", "odd.pt"], capsys)
    assert code == 2 or how == "bits"                               # a bit of a weight, or of padding, may go unnoticed


@pytest.mark.parametrize("change", [
    {"architecture": {"backbone": "small", "patch_size": 16, "hidden": 10 ** 9, "projector": 16, "dim": 8}},
    {"architecture": {"backbone": "small", "patch_size": 16, "hidden": -1, "projector": 16, "dim": 8}},
    {"architecture": {"backbone": "huge", "patch_size": 16, "hidden": 16, "projector": 16, "dim": 8}},
    {"architecture": {"backbone": "small", "patch_size": 2, "hidden": 16, "projector": 16, "dim": 8}},
    {"architecture": {"backbone": "small", "patch_size": "16", "hidden": 16, "projector": 16, "dim": 8}},
    {"architecture": {"epochs": 5}},
    {"architecture": []},
    {"weights": []},
    {"weights": {}},
    {"weights": {"represent.0.weight": "text"}},
    {"weights": {"represent.0.weight": torch.zeros(3)}},
], ids=str)
def test_checkpoints_that_lie(change, good_checkpoint, capsys):
    torch.save(torch.load("good.pt", weights_only=True) | change, "odd.pt")
    plain = ["--dataset", "shapes", "--subset", "60", "--preset", "laptop", "--device", "cpu"]
    assert ends_well_or_in_a_sentence([*plain, "--eval-only", "--checkpoint", "odd.pt"], capsys) == 2
    assert not [p for p in io.RUNS.glob("*") if not p.name.startswith(".")]


# ---- archives ----

def test_an_archive_that_is_not_the_pinned_one_is_not_unpacked(in_tmp, monkeypatch):
    """CIFAR's checksum is torchvision's; nothing is unpacked before it agrees."""
    (in_tmp / "data").mkdir()
    with tarfile.open("data/cifar-10-python.tar.gz", "w:gz") as archive:
        member = tarfile.TarInfo("../escaped.txt")
        member.size = 4
        archive.addfile(member, bytes_io.BytesIO(b"evil"))

    def no_network(*_, **__):
        raise urllib.error.URLError("no network")
    monkeypatch.setattr(torchvision.datasets.utils, "_urlretrieve", no_network)
    with pytest.raises(io.UsageError, match="cifar-10-python.tar.gz"):
        io.load_dataset("cifar10", "data")
    assert not (in_tmp / "escaped.txt").exists() and not list(in_tmp.glob("data/cifar-10-batches-py"))


# ---- numbers ----

@pytest.fixture
def image_set(monkeypatch):
    def use(images, labels):
        data = io.Dataset(images, labels, images[:20], labels[:20], [str(c) for c in labels.unique().tolist()], key="odd")
        monkeypatch.setattr(empssl, "load_dataset", lambda *_: data)
    return use


@pytest.mark.parametrize("what", ["black", "identical", "one class"])
def test_odd_data_train_and_probe(what, image_set):
    images = torch.randint(0, 256, (60, 3, 32, 32), dtype=torch.uint8)
    images = {"black": images * 0, "identical": images[:1].repeat(60, 1, 1, 1), "one class": images}[what]
    image_set(images, torch.zeros(60, dtype=torch.int64) if what == "one class" else torch.arange(60) % 3)
    record = main(["--dataset", "shapes", *TINY, "--epochs", "2", "--name", "odd"])
    assert all(np.isfinite(v) for v in record.values() if isinstance(v, float))
    if what == "black":
        assert record["D"] > 0.999                                  # nothing tells patches apart, and that is no NaN
    if what == "one class":
        assert record["linear_top1"] == record["knn_top1"] == 1


def test_the_smallest_batch():
    record = main(["--dataset", "shapes", "--subset", "3", "--preset", "laptop", "--device", "cpu", "--patches", "2", "--batch", "1",
                   "--hidden", "16", "--projector", "16", "--dim", "8", "--eval-patches", "1", "--name", "small"])
    assert np.isfinite(record["R"]) and -1 <= record["D"] <= 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("n,b,d", [(2, 100, 1024), (3, 64, 32), (2, 1, 8)])
def test_a_collapsed_batch_in_mixed_precision_is_finite(dtype, n, b, d):
    """All embeddings equal: the coding rate's matrix has one eigenvalue of 1 + d/eps2 and else 1, in bfloat16 too."""
    z = torch.nn.functional.normalize(torch.randn(1, 1, d), dim=-1).expand(n, b, d).to(dtype).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        loss = empssl_loss(z, 200.0, 0.2)
    loss.backward()
    norm = z.detach().double().square().sum(-1).mean().item()
    assert -loss.item() == pytest.approx(0.5 * np.log(1 + d / 0.2 * norm) + 200, rel=1e-3)
    assert z.grad.isfinite().all()


def anonymous_memory():
    """Bytes of this process that are no file's: the page cache of a mapped file does not count."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon"):
            return int(line.split()[1]) * 1024
    pytest.skip("the kernel does not say")


def test_a_memory_mapped_data_set_is_not_read_into_memory(tmp_path):
    N, side = 6_000, 256                                            # 1.2 GB, sparse on disk
    with open(tmp_path / "train.u8", "wb") as out:
        out.truncate(N * 3 * side * side)
    (tmp_path / "meta.json").write_text(json.dumps({"train": list(range(N)), "test": []}))
    _, (images, _) = io._mapped(tmp_path, side)
    assert not any("w" in line.split()[1] for line in Path("/proc/self/maps").read_text().splitlines() if line.endswith("train.u8"))
    encoder = Encoder("small", 16, hidden=16, projector=16, dim=8)
    config = Config(patches=2, batch=200, patch_size=16, lr=0.1, lam=2.0, precision="float32")
    before = anonymous_memory()
    peaks = []
    empssl.train(encoder, images, config, Augmentation.none(), log=lambda record: peaks.append(anonymous_memory()))
    assert max(peaks) - before < 3e8                                # and every image was read
