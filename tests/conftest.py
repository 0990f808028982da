import pytest
import torch
from hypothesis import settings

settings.register_profile("default", deadline=None, derandomize=True, print_blob=True)
settings.load_profile("default")


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


@pytest.fixture
def in_tmp(tmp_path, monkeypatch):
    """Runs write to runs/ below the current folder: give each test its own."""
    monkeypatch.chdir(tmp_path)
    return tmp_path
