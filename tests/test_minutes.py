"""Ten minutes of every method: equal seconds, probes on the way, seconds to an accuracy."""

import pytest

from empssl_support.data import load_dataset
from study.experiments import methods, minutes, records, trials


@pytest.fixture
def searched(monkeypatch, tmp_path):
    """On record: speeds of 40 s and 10 s an epoch, and a best try of each."""
    monkeypatch.setattr(records, "RESULTS", tmp_path / "results")

    def seconds(trial, _):
        one = 40.0 if trial.settings().method == "empssl" else 10.0
        return {"seconds_an_epoch": one, "seconds_before": 0.0}

    kinds = [("empssl", "muon", 50), *((peer, "muon", 64) for peer in methods.PEERS)]
    speeds = [methods.speed_trial(*kind) for kind in kinds]
    trials.make_all("methods", speeds, None, seconds)
    best = {"chosen": "--optimizer muon --batch 64 --lr 0.4", "optimizer": "muon", "batch": 64}
    monkeypatch.setattr(minutes, "best_try", lambda method: best)


def test_each_method_has_the_epochs_that_take_as_many_seconds(searched):
    found = {trial.name: trial.settings() for trial in minutes.ten_minutes("photos", 1)}
    assert set(found) == {"empssl", *methods.PEERS}
    assert (found["empssl"].epochs, found["empssl"].lr) == (4, 0.15)
    assert all((found[peer].epochs, found[peer].lr) == (16, 0.4) for peer in methods.PEERS)


def test_a_training_is_probed_on_its_way_and_goes_on_as_if_it_had_not_been():
    data = trials.holdout(load_dataset("shapes", subset=300), 40, 20)
    small = "--method empssl --dataset shapes --preset laptop --device cpu --precision float32 "
    small += "--patches 2 --batch 10 --hidden 8 --projector 8 --dim 4 --eval-patches 4 --epochs 8"
    trial = trials.Trial("a", small)
    metrics = minutes.make(trial, data)
    curve = metrics["curve"]
    assert [point["epoch"] for point in curve] == [2, 4, 6, 8] and metrics["images"] == 40
    assert curve[-1]["linear_top1"] == metrics["linear_top1"]
    assert all(0 <= point["linear_top1"] <= 1 for point in curve)
    # Other seeds are probed at the end alone.
    of_other_seed = minutes.make(trial._replace(seed=1), data)
    assert [point["epoch"] for point in of_other_seed["curve"]] == [8]
    alone = trials.train_and_probe(trial, data)
    for key in ("linear_top1", "quadrants_top1", "R", "D"):
        assert metrics[key] == alone[key]


def test_a_beginning_is_that_of_the_training(monkeypatch):
    """Of 32 steps the first eight: what it finds at the second epoch's end the training finds."""
    data = trials.holdout(load_dataset("shapes", subset=300), 40, 20)
    small = "--method empssl --dataset shapes --preset laptop --device cpu --precision float32 "
    small += "--patches 2 --batch 10 --hidden 8 --projector 8 --dim 4 --eval-patches 4 --epochs 8"
    trial = trials.Trial("a", small)
    whole = minutes.make(trial, data)
    monkeypatch.setattr(minutes, "EARLY", (1 / 32, 3 / 16, 1 / 4))
    metrics = minutes.make_beginning(trial, data)
    assert [point["epoch"] for point in metrics["curve"]] == [0.25, 1.5, 2]
    assert metrics["curve"][-1] == whole["curve"][0]
    assert metrics["patches_seen"] == 2 * 2 * 40


def test_a_curve_begins_with_its_beginning(searched):
    kind = {"method": "simclr", "optimizer": "muon", "batch": 64, "precision": "bf16"}
    record = kind | {"name": "simclr", "seed": 0}
    record["metrics"] = {"images": 15_000, "curve": [{"epoch": 4, "linear_top1": 0.7}]}
    early = {"metrics": {"curve": [{"epoch": 0.5, "linear_top1": 0.4}]}}
    named = kind | early | {"name": "simclr-beginning"}
    records.keep("minutes", named | {"seed": 1})
    records.keep("minutes", named | {"seed": 0, "precision": "float32"})
    assert minutes.curve_of(record) == [(40, 0.7)]
    records.keep("minutes", named | {"seed": 0})
    assert minutes.curve_of(record) == [(5, 0.4), (40, 0.7)]


def test_beginnings_are_of_the_first_seeds_trainings(searched):
    whole, begun = minutes.ten_minutes("photos", 1), minutes.beginnings("photos")
    assert [trial.flags for trial in begun] == [trial.flags for trial in whole]
    assert {trial.seed for trial in begun} == {0}
    assert not {trial.name for trial in begun} & {trial.name for trial in whole}


def test_a_curves_seconds_are_those_of_a_machine_that_does_nothing_else(searched):
    metrics = {"images": 30_000, "train_seconds": 999.0}
    metrics["curve"] = [{"epoch": 1, "linear_top1": 0.5}, {"epoch": 3, "linear_top1": 0.7}]
    kind = {"name": "simclr", "seed": 0, "method": "simclr", "optimizer": "muon", "batch": 64}
    # 10 s an epoch of 15,000 images, so 20 s of twice as many.
    assert minutes.curve_of(kind | {"metrics": metrics}) == [(20, 0.5), (60, 0.7)]


def test_seconds_to_an_accuracy_lie_on_the_curve():
    curve = [(10.0, 0.5), (20.0, 0.6), (40.0, 0.58), (80.0, 0.7)]
    assert minutes.seconds_to(0.4, curve) == 10
    assert minutes.seconds_to(0.55, curve) == pytest.approx(15)
    assert minutes.seconds_to(0.6, curve) == pytest.approx(20)
    assert minutes.seconds_to(0.64, curve) == pytest.approx(60)
    assert minutes.seconds_to(0.71, curve) is None
