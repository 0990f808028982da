"""Whatever is thrown at it, it ends well or with one sentence and exit code 2."""

import os
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

import empssl
from empssl import Config, empssl_loss, main
from empssl_support.data import Dataset
from empssl_support.files import save_encoder
from recipes import SHAPES, TINY, small_encoder

pytestmark = pytest.mark.usefixtures("in_tmp", "short_runs")


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
        last = error.splitlines()[-1]
        assert "error: " in last and len(last) < 600
    return code


# ---- the command line ----

INTEGERS = st.one_of(st.integers(-3, 40), st.integers(-(2**70), 2**70)).map(str)
FLOATS = st.floats(allow_nan=True, allow_infinity=True).map(str)
ODD_WORDS = ["", "..", "/", "runs", "nan", "0x10", "1e3", "--lr", "cuda:99", "a" * 300]
WORDS = st.one_of(st.text(max_size=8), st.sampled_from(ODD_WORDS))


def flags():
    """Up to four flags with values good and bad."""

    def words(field):
        name = "--" + field.name.replace("_", "-")
        if field.type is bool:
            return st.just([name])
        kinds = [WORDS, INTEGERS if field.type is int else FLOATS]
        if field.metadata["choices"]:
            kinds.append(st.sampled_from(field.metadata["choices"]))
        return st.one_of(*kinds).map(lambda value: [name, str(value)])

    left_out = ("dataset", "data_dir", "compile")
    one = [words(field) for field in fields(Config) if field.name not in left_out]
    some = st.lists(st.one_of(*one), min_size=1, max_size=4)
    return some.map(lambda parts: [word for part in parts for word in part])


@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
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
@example(arguments=["--plan"])
@example(arguments=["--name", "a" * 300])
@example(arguments=["--resume", "\0"])
@example(arguments=["--report", "\0"])
@example(arguments=["--device", ""])
def test_any_flags(arguments, capsys, monkeypatch):
    """All of the program but its training and probing."""
    ended = {"R": 1.0, "D": 1.0, "train_seconds": 1.0, "patches_seen": 1}
    monkeypatch.setattr(empssl, "train", lambda *_: ended)

    def embed(encoder, images, quadrants=False, **how):
        return torch.zeros(len(images), 8 if quadrants else 2)

    monkeypatch.setattr(empssl, "embed", embed)
    ends_well_or_in_a_sentence([*SHAPES, "--force", *arguments], capsys)


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_that_may_not_be_written(capsys):
    Path("runs").mkdir(mode=0o500)
    assert ends_well_or_in_a_sentence([*SHAPES, "--name", "x"], capsys) == 2


def test_a_file_in_the_place_of_the_runs_folder(capsys):
    Path("runs").write_text("")
    assert ends_well_or_in_a_sentence([*SHAPES, "--name", "x"], capsys) == 2


# ---- checkpoints that lie ----

HONEST = {"backbone": "small", "patch_size": 16, "hidden": 16, "projector": 16, "dim": 8}
HONEST |= {"drop_last_stage": False}


@pytest.mark.parametrize(
    "change",
    [
        {"architecture": HONEST | {"hidden": 10**9}},
        {"architecture": HONEST | {"hidden": -1}},
        {"architecture": HONEST | {"backbone": "huge"}},
        {"architecture": HONEST | {"patch_size": 2**40}},
        {"architecture": HONEST | {"patch_size": 0}},
        {"architecture": HONEST | {"drop_last_stage": True}},
        {"architecture": {"epochs": 5}},
        {"image_size": 0},
        {"image_size": "32"},
        {"weights": {}},
        {"weights": {"represent.0.weight": torch.zeros(3)}},
    ],
    ids=str,
)
@pytest.mark.parametrize("what_for", ["--eval-only", "--export-features f.npz", "--export e.pt2"])
def test_a_checkpoint_that_lies_is_refused_before_anything_is_written(change, what_for, capsys):
    save_encoder(Path("good.pt"), small_encoder())
    torch.save(torch.load("good.pt", weights_only=True) | change, "odd.pt")
    plain = "--dataset shapes --subset 60 --preset laptop --device cpu --checkpoint odd.pt"
    assert ends_well_or_in_a_sentence([*plain.split(), *what_for.split()], capsys) == 2
    assert not [*Path().glob("*.npz"), *Path().glob("*.pt2")] and not [*Path("runs").glob("[!.]*")]


# ---- numbers ----


@pytest.fixture
def image_set(monkeypatch):
    def use(images, labels):
        classes = [str(c) for c in labels.unique().tolist()]
        data = Dataset(images, labels, images[:20], labels[:20], classes, key="odd")
        monkeypatch.setattr(empssl, "load_dataset", lambda *_: data)

    return use


@pytest.mark.parametrize("what", ["black", "identical", "one class"])
def test_odd_data_train_and_probe(what, image_set):
    images = torch.randint(0, 256, (60, 3, 32, 32), dtype=torch.uint8)
    labels = torch.arange(60) % 3
    if what == "black":
        images = images * 0
    elif what == "identical":
        images = images[:1].repeat(60, 1, 1, 1)
    else:
        labels = labels * 0
    image_set(images, labels)
    record = main(["--dataset", "shapes", *TINY, "--epochs", "2", "--name", "odd"])
    assert all(np.isfinite(v) for v in record.values() if isinstance(v, float))
    if what == "black":
        assert record["D"] > 0.999  # nothing tells patches apart, and that is no NaN
    if what == "one class":
        assert record["linear_top1"] == record["knn_top1"] == 1


def test_the_smallest_batch():
    smallest = "--subset 3 --patches 2 --batch 1 --eval-patches 1 --name small"
    record = main([*SHAPES, *smallest.split()])
    assert np.isfinite(record["R"]) and -1 <= record["D"] <= 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("n,b,d", [(2, 100, 1024), (3, 64, 32), (2, 1, 8)])
def test_a_collapsed_batch_in_mixed_precision_is_finite(dtype, n, b, d):
    """All embeddings equal: one eigenvalue is 1 + d/eps2, the others 1, in bfloat16 too."""
    z = torch.nn.functional.normalize(torch.randn(1, 1, d), dim=-1)
    z = z.expand(n, b, d).to(dtype).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        loss = empssl_loss(z, 200.0, 0.2)
    loss.backward()
    norm = z.detach().double().square().sum(-1).mean().item()
    assert -loss.item() == pytest.approx(0.5 * np.log(1 + d / 0.2 * norm) + 200, rel=1e-3)
    assert z.grad.isfinite().all()
