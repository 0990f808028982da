"""The commands that fill the README: what they refuse, what they run, what they leave alone."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))
import empssl_io as io      # noqa: E402
import evidence             # noqa: E402
import report               # noqa: E402


@pytest.fixture
def results(in_tmp, monkeypatch):
    monkeypatch.setattr(report, "RESULTS", in_tmp / "results")
    return in_tmp / "results"


def folder(path, seed, classes=("a", "b")):
    chance = np.random.default_rng(seed)
    for part, count in (("train", 60), ("test", 10)):
        for name in classes:
            (path / part / name).mkdir(parents=True)
            for i in range(count):
                Image.fromarray(chance.integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(path / part / name / f"{i}.png")


def test_the_papers_recipes_are_refused_on_a_cpu_with_an_estimate(results, monkeypatch, capsys):
    monkeypatch.setattr(evidence, "GPU", False)
    monkeypatch.setattr(evidence, "patches_per_second", lambda config: 100.0)
    with pytest.raises(io.UsageError, match="about 52 days"):       # 1 + 10 + 30 epochs, 20 + 200 patches, 50,000 images
        evidence.main(["cifar10", "--seeds", "1"])
    said = capsys.readouterr().out
    assert "6 runs" in said and "cifar10-30-epochs-200-patches-seed0" in said and not results.exists()


def test_transfer_between_two_folders_runs_once_and_keeps_its_records(results, in_tmp, monkeypatch, capsys):
    monkeypatch.setattr(evidence, "GPU", False)
    folder(in_tmp / "birds", 0), folder(in_tmp / "fish", 1)
    command = ["transfer", "--from", "birds", "--to", "fish", "--seeds", "1"]
    evidence.main(command)
    records = {p.name: json.loads(p.read_text()) for p in (results / "transfer").iterdir()}
    assert set(records) == {"birds-seed0.json", "birds-to-fish-seed0.json"}
    assert records["birds-to-fish-seed0.json"]["metrics"]["checkpoint"] == "runs/transfer-birds-seed0/encoder.pt"
    assert all("linear_top1" in r["metrics"] for r in records.values())
    monkeypatch.setattr(evidence.subprocess, "run", lambda *a, **k: pytest.fail("it ran again"))
    evidence.main(command)
    assert "0 runs" in capsys.readouterr().out


def test_a_run_that_fails_stops_the_command_with_its_code(results, in_tmp, monkeypatch):
    monkeypatch.setattr(evidence, "GPU", False)
    monkeypatch.setattr(evidence, "estimate", lambda *a: 0.0)
    with pytest.raises(SystemExit) as stop:
        evidence.main(["transfer", "--from", "nothing", "--to", "nowhere", "--seeds", "1"])
    assert stop.value.code == 2 and not results.exists()


def test_what_a_run_takes_is_measured():
    config = evidence.empssl.Config(device="cpu", preset="laptop", precision="float32", patches=2, patch_size=16, batch=10, lr=0.1,
                                       lam=1.0, backbone="small", hidden=16, projector=16, dim=8, augmentation="light")
    assert 10 < evidence.patches_per_second(config) < 1e6


def test_epochs_seen_on_the_way_are_rows_of_their_own(results):
    (results / "cifar10").mkdir(parents=True)
    metrics = lambda accuracy, **more: {"linear_top1": accuracy, "knn_top1": 0.5, "train_seconds": 7.0} | more
    record = {"dataset": "cifar10", "patches": 20, "epochs": 30, "hardware": "abacus",
              "seen": [metrics(0.1, epoch=1), metrics(0.81, epoch=10, train_seconds=3.0)]}
    for seed, more in ((0, 0.0), (1, 0.02)):
        record["metrics"] = metrics(0.84 + more)
        (results / "cifar10" / f"seed{seed}.json").write_text(json.dumps(record))
    rows = [row for row in report.paper_table().splitlines() if "| cifar10 | 20 | 30 |" in row]
    assert "| 1 | .806 | 0.100 ± 0.000 |" in rows[0] and "| 10 | .907 | 0.810 ± 0.000 |" in rows[1]
    assert "| 30 | .931 | 0.850 ± 0.010 |" in rows[2] and rows[2].endswith("| 3 s / - / - | abacus | 2 |")
