"""The comparison of methods: each is searched for in the same way, and compared at its best."""

import re

import pytest
import torch

import empssl
from empssl_support.cli import UsageError
from empssl_support.data import load_dataset
from study import baselines
from study.baselines.common import views
from study.experiments import methods, records, trials


@pytest.fixture
def data(monkeypatch, tmp_path):
    """A few images for all that is asked for; records go to a folder of this test."""
    monkeypatch.setattr(records, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(methods, "IMAGES", 30)
    data = load_dataset("shapes", subset=200)
    monkeypatch.setattr(methods, "load_dataset", lambda *_: data)
    return data


@pytest.fixture
def made(data, monkeypatch):
    """Instead of training: an accuracy that the settings decide. Returns what was made."""
    made = []
    optimum = {"lr": 0.15, "temperature": 0.1}

    def carry_out(trial, part, probe=None):
        config = trial.settings()
        made.append((trial, config, part))
        off = abs(config.lr - optimum["lr"]) + abs(config.temperature - optimum["temperature"])
        return {"linear_top1": 1 / (1 + off + (config.optimizer != "muon")), "knn_top1": 0.5}

    def train(config, part, run=None):
        # EMP-SSL takes 40 s an epoch, the others 8 s, or 10 s by Muon.
        seconds = 40.0 if config.method == "empssl" else 8.0 + 2 * (config.optimizer == "muon")
        return None, {"train_seconds": seconds * config.epochs, "patches_seen": 1}

    monkeypatch.setattr(methods, "carry_out", carry_out)
    monkeypatch.setattr(methods, "train", train)
    # Of the compare command, which has it as a default.
    monkeypatch.setattr(methods, "all_of", with_stand_in(carry_out))
    monkeypatch.setattr(methods, "holdout", lambda data, images: data._replace(key="held out"))
    return made


def with_stand_in(carry_out):
    def all_of(table, wanted, data, how=carry_out):
        trials.all_of(table, wanted, data, how)

    return all_of


def test_each_method_is_searched_for_and_compared_at_its_best(made):
    methods.main(["speed"])
    speeds = {r["name"]: r["metrics"]["train_seconds"] for r in records.read("methods")}
    assert speeds["speed-simclr-lars"] == 8 and speeds["speed-empssl-muon"] == 40
    assert len(speeds) == 1 + 2 * len(methods.PEERS)

    methods.main(["search"])
    assert all(part.key == "held out" for _, _, part in made)  # no test image chooses
    rates = {(c.optimizer, round(c.lr, 3)) for t, c, _ in made if c.method == "simclr"}
    assert rates == {
        ("lars", 0.133),
        ("lars", 0.4),
        ("lars", 1.2),
        ("muon", 0.05),
        ("muon", 0.15),
        ("muon", 0.45),
    }
    # 120 s are 15 epochs of 8 s, 12 of 10 s.
    epochs = {(c.optimizer == "muon", c.epochs) for _, c, _ in made}
    assert epochs == {(False, 15), (True, 12)}
    # Temperatures at the best rate alone: half of .2 and twice of it.
    tried = {(c.lr, c.temperature) for _, c, _ in made if c.method == "simclr"}
    others = {(rate, temperature) for rate, temperature in tried if temperature != 0.2}
    assert others == {(0.15, 0.1), (0.15, 0.4)}
    assert "--temperature 0.1" in methods.best_try("simclr")["chosen"]
    assert "--temperature" not in methods.best_try("vicreg")["chosen"]

    made.clear()
    methods.main(["compare", "--seeds", "2"])
    assert all(part.key != "held out" for _, _, part in made)
    found = {(t.name, t.seed, c.lr, c.optimizer, c.epochs) for t, c, _ in made}
    for seed in (0, 1):
        assert ("empssl-equal-seconds", seed, 0.15, "muon", 3) in found
        assert ("simclr-equal-seconds", seed, 0.15, "muon", 12) in found
        assert ("simclr-equal-epochs", seed, 0.15, "muon", 3) in found
    assert len(found) == 2 * (1 + 2 * len(methods.PEERS))
    budgets = {r["budget"] for r in records.read("methods") if "budget" in r}
    assert budgets == {"equal seconds", "equal epochs"}


def test_what_was_made_is_left_alone(made):
    for what in ("speed", "search", "compare"):
        methods.main([what, "--seeds", "1"])
    count = len(made)
    for what in ("speed", "search", "compare"):
        methods.main([what, "--seeds", "1"])
    assert len(made) == count


def test_the_searchs_settings_are_such_as_the_methods_take(made):
    methods.main(["speed"])
    methods.main(["search"])
    for trial, config, _ in made:
        assert re.search(r"--lr [\d.]+", trial.flags)
        views(config, (32, 32))
        # Without a trust LARS would leave the projector as it is.
        assert config.optimizer != "muon" or config.eta > 0


def test_what_comes_first_is_said(data):
    with pytest.raises(SystemExit) as stopped, methods.one_sentence():
        methods.main(["search"])
    assert stopped.value.code == 2
    with pytest.raises(UsageError, match="run python -m study.experiments.methods search"):
        methods.comparisons("data", 1)


def test_a_try_that_diverges_is_a_miss_and_no_end(data, monkeypatch):
    def diverge(*_):
        raise FloatingPointError("the loss is nan at step 10")

    monkeypatch.setattr(empssl, "train", diverge)
    small = "--batch 10 --hidden 8 --projector 8 --dim 4 --eval-patches 1"
    trial = trials.Trial("a", methods.flags_of("simclr", "photos", small))
    assert methods.score_bag(trial, data)["linear_top1"] == 0.0


def test_a_trial_is_the_method_trained_and_probed(data):
    """The whole of it on a few images, in both ways to probe."""
    small = "--batch 10 --hidden 8 --projector 8 --dim 4 --eval-patches 4 --precision float32"
    part = trials.fewer(data, 30)
    assert len(part.train_images) == 30 and torch.equal(part.test_images, data.test_images)
    trial = trials.Trial("a", methods.flags_of("simclr", "photos", small), seed=1)
    metrics = trials.carry_out(trial, part)
    bag = trials.carry_out(trial, part, trials.probe_bag)
    assert metrics["patches_seen"] == 60 and "quadrants_top1" in metrics
    assert bag["linear_top1"] == pytest.approx(metrics["linear_top1"], abs=0.011)
    assert bag["knn_top1"] == metrics["knn_top1"] and "quadrants_top1" not in bag
    kept = trials.record(trial, metrics)
    assert (kept["name"], kept["seed"], kept["method"]) == ("a", 1, "simclr")
    assert set(records.PROVENANCE) <= set(kept)
    assert baselines.settings([*trial.flags.split(), "--seed", "1"]) == trial.settings()
