"""Parity with the authors' code, on a stand-in that has the interfaces of their modules."""

import subprocess
import sys

import pytest
import torch

import empssl
from empssl_support.cli import UsageError, one_sentence
from study.benchmarks import official
from study.experiments import records

CPU = torch.device("cpu")

MODEL = """
from torch import nn
from torchvision.models import resnet18

from .stem import small_stem


class encoder(nn.Module):
    def __init__(self, z_dim=8, hidden_dim=16, norm_p=2, arch="resnet18-cifar"):
        super().__init__()
        assert arch == "resnet18-cifar"
        self.trunk = small_stem(resnet18())
        self.first = nn.Sequential(nn.Linear(512, hidden_dim), nn.BatchNorm1d(hidden_dim))
        self.second = nn.Sequential(nn.Linear(hidden_dim, 24), nn.BatchNorm1d(24))
        self.last = nn.Linear(24, z_dim)

    def forward(self, x, is_test=False):
        h = self.first(self.trunk(x)).relu()
        z = self.last(self.second(h).relu())
        z = z / z.norm(dim=1, keepdim=True)
        return (z, h) if is_test else z
"""

STEM = """
from torch import nn


def small_stem(network):
    network.conv1 = nn.Conv2d(3, 64, 3, padding=1, bias=False)
    network.maxpool = nn.Identity()
    network.fc = nn.Identity()
    return network
"""

LOSS = """
import torch


class TotalCodingRate(torch.nn.Module):
    def __init__(self, eps=0.01):
        super().__init__()
        self.eps = eps

    def forward(self, X):
        b, d = X.shape
        eigenvalues = torch.linalg.eigvalsh(d / (b * self.eps) * X.T @ X)
        return -eigenvalues.log1p().sum() / 2
"""

# As theirs it changes the gradients, and hides the decay from the optimizer meanwhile.
LARS = """
class LARSWrapper:
    def __init__(self, optimizer, eta=1e-3, clip=False, eps=1e-8, exclude_bias_n_norm=False):
        self.optim = optimizer
        self.eta, self.clip, self.eps = eta, clip, eps
        self.exclude = exclude_bias_n_norm
        self.zero_grad = optimizer.zero_grad

    def step(self):
        (group,) = self.optim.param_groups
        decay, group["weight_decay"] = group["weight_decay"], 0
        for p in group["params"]:
            if p.ndim == 1 and self.exclude:
                continue
            length, slope = p.detach().norm(), p.grad.norm()
            if length > 0 and slope > 0:
                trust = self.eta * length / (slope + decay * length + self.eps)
                if self.clip:
                    trust = min(trust / group["lr"], 1)
                p.grad = trust * (p.grad + decay * p.detach())
        self.optim.step()
        group["weight_decay"] = decay
"""

VIEWS = """
from torchvision.transforms import v2


class ContrastiveLearningViewGenerator:
    def __init__(self, num_patch=4):
        self.num_patch = num_patch
        self.cut = v2.Compose([v2.RandomCrop(8), v2.PILToTensor()])

    def __call__(self, picture):
        return [self.cut(picture) / 127.5 - 1 for _ in range(self.num_patch)]
"""


@pytest.fixture(autouse=True)
def little(monkeypatch, tmp_path):
    """Small patches and few steps; and a record would not be among the project's."""
    monkeypatch.setattr(official, "SIDE", 8)
    monkeypatch.setattr(official, "STEPS", 3)
    monkeypatch.setattr(records, "RESULTS", tmp_path / "results")


@pytest.fixture
def folder(tmp_path):
    path = tmp_path / "their code"
    files = {"model/model.py": MODEL, "model/stem.py": STEM, "loss.py": LOSS, "lars.py": LARS}
    for file, text in (files | {"dataset/aug.py": VIEWS}).items():
        (path / file).parent.mkdir(parents=True, exist_ok=True)
        (path / file).write_text(text)
    return path


def change(path, old, new):
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


def exit_of(*arguments):
    with pytest.raises(SystemExit) as ended, one_sentence():
        official.main([*map(str, arguments), "--device", "cpu"])
    return ended.value.code


def never(*arguments):
    pytest.fail("it was timed")


def called_twice(call, device):
    call(0)
    call(1)
    return 2.0


# ---- parity ----


def test_a_faithful_stand_in_agrees(folder, capsys):
    worst = official.parity(official.open_clone(folder), CPU)
    assert 0 < worst["weights"] < 1e-9 and worst["losses"] < 1e-9
    said = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in said[1:]] == ["step  1", "step  2", "step  3"]


def test_the_sign_of_their_coding_rate_is_found_out(folder):
    minus = official.their_rate(official.open_clone(folder).coding_rate(eps=0.2))
    change(folder / "loss.py", "return -eigenvalues", "return eigenvalues")
    plus = official.their_rate(official.open_clone(folder).coding_rate(eps=0.2))
    z = torch.nn.functional.normalize(torch.randn(3, 4, 8, dtype=torch.float64), dim=-1)
    for rate in (minus, plus):
        torch.testing.assert_close(rate(z), empssl.coding_rate(z, 0.2))


FAULTS = {
    "the scale of the coding rate": ("loss.py", "d / (b * self.eps)", "1 / self.eps"),
    "no embedding of length 1": ("model/model.py", "z = z / z.norm(dim=1, keepdim=True)", ""),
    "LARS excludes nothing": ("lars.py", "p.ndim == 1 and self.exclude", "False"),
    "another trust": ("lars.py", "trust = self.eta *", "trust = 1.01 * self.eta *"),
    "no decay": ("lars.py", "trust * (p.grad + decay * p.detach())", "trust * p.grad"),
    "a loss that is not a number": ("loss.py", ".log1p()", ".mul(float('nan'))"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_difference_ends_it_before_anything_is_timed(fault, folder, monkeypatch, capsys):
    monkeypatch.setattr(official, "median_seconds", never)
    file, old, new = FAULTS[fault]
    change(folder / file, old, new)
    assert_told_apart(folder, capsys)


def test_a_shifted_schedule_is_a_difference(folder, monkeypatch, capsys):
    monkeypatch.setattr(official, "median_seconds", never)
    cosine = empssl.cosine
    monkeypatch.setattr(empssl, "cosine", lambda lr, t, T: cosine(lr, t - 1, T))
    assert_told_apart(folder, capsys)


def assert_told_apart(folder, capsys):
    """A process that exits with a text prints it, and its code is 1."""
    assert "the two differ by more than rounding" in exit_of(folder)
    assert "step  1: losses differ by" in capsys.readouterr().out
    assert not records.read("official")


# ---- time ----


def test_both_are_timed_and_kept(folder, monkeypatch, capsys):
    monkeypatch.setattr(official, "median_seconds", called_twice)
    monkeypatch.setattr(sys, "argv", ["official.py", str(folder)])
    git = ["git", "-C", folder, "-c", "user.name=a", "-c", "user.email=a@b"]
    for words in (["init", "-q"], ["add", "."], ["commit", "-qm", "theirs"]):
        subprocess.run([*git, *words], check=True)
    head = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True).stdout

    official.main([str(folder), "--device", "cpu", "--patches", "2", "--batch", "4"])
    (record,) = records.read("official")
    assert set(records.PROVENANCE) <= set(record)
    assert (record["name"], record["patches"], record["batch"]) == ("official-cpu", 2, 4)
    assert record["their_commit"] == head.strip()
    assert record["command"].endswith("EMP-SSL") and str(folder) not in record["command"]
    assert 0 < record["metrics"]["parity"]["weights"] < 1e-9
    parts = [row["part"] for row in record["metrics"]["rows"]]
    assert parts[:3] == ["a step and its patches", "a step", "patches"]
    assert [part.split(",")[0] for part in parts[3:]] == ["encoder", "coding rate", "optimizer"]
    assert all(row["theirs"] == row["ours"] == 2 for row in record["metrics"]["rows"])
    assert capsys.readouterr().out.count("1.00 times") == 6

    # A folder within another repository is not told that one's commit.
    (folder / ".git").rename(folder.parent / ".git")
    official.main([str(folder), "--device", "cpu", "--patches", "2", "--batch", "4"])
    assert records.read("official")[0]["their_commit"] == "unknown"


def test_their_patches_are_patch_major(folder):
    """Of images that are each of one colour, every patch is its image's colour."""
    images = torch.tensor([0, 51, 255], dtype=torch.uint8).view(3, 1, 1, 1).expand(3, 3, 32, 32)
    x = official.their_patches(official.open_clone(folder), images, 2)(0)
    colours = (images[:, :1, :1, :1] / 127.5 - 1).repeat(2, 1, 1, 1)
    torch.testing.assert_close(x, colours.expand(6, 3, 8, 8))


def test_a_wrong_loss_is_not_timed(folder, monkeypatch):
    rate = empssl.coding_rate
    monkeypatch.setattr(empssl, "coding_rate", lambda z, eps2: 1.01 * rate(z, eps2))
    clone = official.open_clone(folder)
    x = torch.rand(8, 3, 8, 8)
    with pytest.raises(ArithmeticError, match="first loss .* nothing is timed"):
        official.verify_before_timing(clone, CPU, x, 2)


# ---- the clone ----


def test_their_names_hide_no_others_and_do_not_stay(folder, monkeypatch):
    mine = object()
    for name in ("model", "loss"):
        monkeypatch.setitem(sys.modules, name, mine)
    before, path = set(sys.modules), list(sys.path)
    clone = official.open_clone(folder)
    assert issubclass(clone.encoder, torch.nn.Module)
    assert sys.modules["model"] is sys.modules["loss"] is mine
    assert sys.path == path
    left = {name.split(".")[0] for name in set(sys.modules) - before}
    assert not left & {"lars", "dataset", official.PACKAGE}


MISTAKES = {
    "no such module": ("lars.py", LARS, None, "has no lars.py"),
    "a module that it lacks": ("loss.py", "import torch", "import tensorfire", "tensorfire"),
    "no Python": ("loss.py", "class ", "clash ", "loss.py cannot be imported"),
    "no such class": ("dataset/aug.py", "ContrastiveLearningViewGenerator", "Views", "aug.py has"),
    "another stem": ("model/stem.py", "Conv2d(3, 64, 3,", "Conv2d(3, 64, 5,", r"\(64, 3, 5, 5\)"),
    "other layers": ("model/stem.py", "network.fc =", "network.other =", "4 linear layers"),
    "more weights": ("model/stem.py", "network.maxpool", "network.relu = nn.PReLU() #", "weights"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_another_clone_is_refused_in_one_sentence(mistake, folder, capsys):
    file, old, new, said = MISTAKES[mistake]
    if new is None:
        (folder / file).unlink()
    else:
        change(folder / file, old, new)
    with pytest.raises(UsageError, match=said):
        official.both_trainers(official.open_clone(folder), CPU, torch.float32, 1)
    assert exit_of(folder) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_bad_arguments_exit_with_2(folder, capsys):
    assert exit_of(folder / "nowhere") == 2
    assert "nowhere has no model/model.py" in capsys.readouterr().err
    assert exit_of(folder, "--batch", "1") == 2
    assert exit_of(folder, "--patches", "0") == 2
    assert exit_of() == 2
    with pytest.raises(UsageError, match="float64"):
        official.read_arguments([str(folder), "--device", "meta"])
