import pytest
import torch
from hypothesis import settings

import empssl
import empssl_io as io

settings.register_profile("default", deadline=None, derandomize=True, print_blob=True)
settings.load_profile("default")


@pytest.fixture(autouse=True)
def _as_a_user_has_it(monkeypatch):
    torch.manual_seed(0)
    monkeypatch.delenv("PYTHONUNBUFFERED", raising=False)           # it hides what is lost when a buffer cannot be written


@pytest.fixture
def short_runs(monkeypatch):
    """Few shapes, few probe epochs: for tests that look at the record, not at the accuracy."""
    draw = io._shapes
    monkeypatch.setattr(io, "_shapes", lambda: draw(train=80, test=40))
    probe = empssl.linear_probe
    monkeypatch.setattr(empssl, "linear_probe", lambda *features, epochs=3: probe(*features, epochs=epochs))


@pytest.fixture
def in_tmp(tmp_path, monkeypatch):
    """Runs write to runs/ below the current folder: give each test its own."""
    monkeypatch.chdir(tmp_path)
    return tmp_path
