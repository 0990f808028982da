import empssl_support  # noqa: F401  (before torch: it says how torch's idle threads are to wait)

# isort: split
import pytest
import torch
from hypothesis import settings

import empssl
from empssl_support import data, report
from recipes import picture

settings.register_profile("default", deadline=None, derandomize=True, print_blob=True)
settings.load_profile("default")


@pytest.fixture(autouse=True)
def as_a_user_has_it(monkeypatch):
    torch.manual_seed(0)
    # It hides what is lost when a buffer cannot be written.
    monkeypatch.delenv("PYTHONUNBUFFERED", raising=False)


@pytest.fixture(autouse=True)
def no_page(request, monkeypatch):
    """Drawing a run's page takes longer than such small runs do; test_report*.py draw them."""
    if not request.path.name.startswith("test_report"):
        monkeypatch.setattr(report, "write_at_the_end", lambda run: None)


@pytest.fixture
def in_tmp(tmp_path, monkeypatch):
    """Runs write to runs/ below the current folder: give each test its own."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def folder(in_tmp):
    """Five images; each one's brightness names it."""
    root = in_tmp / "images"
    for i in range(5):
        picture(root / f"{i}.png", 10 * i)
    return root


@pytest.fixture(scope="session")
def few_shapes():
    return data.shapes(train=80, test=40)


@pytest.fixture
def short_runs(monkeypatch, few_shapes):
    """Few shapes, few probe epochs: for tests that look at the record, not at the accuracy."""
    monkeypatch.setattr(data, "shapes", lambda: few_shapes)
    probe = empssl.linear_probe

    def short_probe(*features, epochs=3, **how):
        return probe(*features, epochs=epochs, **how)

    monkeypatch.setattr(empssl, "linear_probe", short_probe)


@pytest.fixture
def fifth_loss_is_nan(monkeypatch):
    forward, calls = empssl.Objective.forward, []

    def broken(objective, *batch):
        loss, terms = forward(objective, *batch)
        calls.append(1)
        return (loss * float("nan") if len(calls) == 5 else loss), terms

    monkeypatch.setattr(empssl.Objective, "forward", broken)


@pytest.fixture(name="data")
def two_batches(few_shapes):
    """64 images, two batches."""
    images, labels, *_ = few_shapes
    return data.Dataset(images[:64], labels[:64], images[64:], labels[64:], [], "")
