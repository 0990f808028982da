"""The comparison of methods: each is searched for in the same way, and compared at its best."""

import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

import empssl
from empssl_support import settings
from empssl_support.cli import UsageError, one_sentence
from empssl_support.data import load_dataset
from study import baselines
from study.baselines.common import views
from study.experiments import methods, records, trials

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def data(monkeypatch, tmp_path):
    """A few images for all that is asked for; records go to a folder of this test."""
    monkeypatch.setattr(records, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(methods, "IMAGES", 30)
    data = load_dataset("shapes", subset=200)
    monkeypatch.setattr(methods, "load_dataset", lambda *_: data)
    monkeypatch.setattr(methods, "holdout", lambda data, images: data._replace(key="held out"))
    return data


@pytest.fixture
def made(data, monkeypatch):
    """Instead of training: an accuracy that the settings decide. Returns what was made."""
    made = []

    def train_and_probe_bag(trial, part):
        config = trial.settings()
        made.append((trial, config, part))
        off = abs(config.lr - 4.0) / 4 + abs(config.temperature - 0.1)
        top1 = 1 / (1 + off + (config.optimizer != "muon") + (config.batch != 64))
        return {"linear_top1": top1, "knn_top1": 0.5}

    def time_epochs(trial, part):
        # EMP-SSL takes 40 s an epoch; the others 8 s, by Muon 10 s, and 2 s before the first one.
        config = trial.settings()
        seconds = 40.0 if config.method == "empssl" else 8.0 + 2 * (config.optimizer == "muon")
        return {"seconds_an_epoch": seconds, "seconds_before": 2.0}

    make_all = trials.make_all
    monkeypatch.setattr(methods, "train_and_probe_bag", train_and_probe_bag)
    monkeypatch.setattr(methods, "time_epochs", time_epochs)
    # Of the compare command, which leaves `make` to its default.
    monkeypatch.setattr(
        methods,
        "make_all",
        lambda table, wanted, data, make=train_and_probe_bag: make_all(table, wanted, data, make),
    )
    return made


def test_each_method_is_searched_for_and_compared_at_its_best(made):
    methods.main(["speed"])
    assert len(records.read("methods")) == 1 + 4 * len(methods.PEERS)
    # 2 s and two epochs of 40 s.
    assert methods.seconds_of_ours() == 82
    assert methods.seconds_of(3, "simclr", "muon", 64) == 2 + 3 * 10
    assert methods.epochs_in(82, "simclr", "lars", 256) == 10
    assert methods.epochs_in(82, "simclr", "muon", 64) == 8

    methods.main(["search"])
    assert all(part.key == "held out" for _, _, part in made)  # no test image chooses
    of_simclr = [config for _, config, _ in made if config.method == "simclr"]
    rates = {}
    for config in of_simclr:
        rates.setdefault((config.optimizer, config.batch), set()).add(round(config.lr, 3))
    # Where the highest of three is the best, a higher one is tried, twice at most.
    assert rates == {
        ("lars", 256): {0.133, 0.4, 1.2, 3.6, 10.8},
        ("muon", 256): {0.05, 0.15, 0.45, 1.35, 4.05},
        ("muon", 64): {0.05, 0.15, 0.45, 1.35, 4.05},
    }
    assert {(c.optimizer == "muon", c.epochs) for c in of_simclr} == {(False, 10), (True, 8)}
    # Temperatures at the best alone: half of .2 and twice of it; half is best, so a quarter too.
    others = {(c.batch, c.lr, c.temperature) for c in of_simclr if c.temperature != 0.2}
    assert others == {(64, 4.05, 0.05), (64, 4.05, 0.1), (64, 4.05, 0.4)}
    assert "--batch 64 --lr 4.05 --temperature 0.1" in methods.best_try("simclr")["chosen"]
    assert "--temperature" not in methods.best_try("vicreg")["chosen"]

    made.clear()
    methods.main(["compare", "--seeds", "2"])
    assert all(part.key != "held out" for _, _, part in made)
    found = {(t.name, t.seed, c.lr, c.optimizer, c.epochs) for t, c, _ in made}
    for seed in (0, 1):
        assert ("empssl-equal-seconds", seed, 0.15, "muon", 2) in found
        assert ("simclr-equal-seconds", seed, 4.05, "muon", 8) in found
        assert ("simclr-equal-epochs", seed, 4.05, "muon", 2) in found
    assert len(found) == 2 * (1 + 2 * len(methods.PEERS))
    budgets = {r["budget"] for r in records.read("methods") if "budget" in r}
    assert budgets == {"equal seconds", "equal epochs"}

    # What was made is left alone.
    count = len(made)
    for what in ("speed", "search", "compare"):
        methods.main([what, "--seeds", "2"])
    assert len(made) == count


def test_the_searchs_settings_are_such_as_the_methods_take(made):
    methods.main(["speed"])
    methods.main(["search"])
    for trial, config, _ in made:
        assert re.search(r"--lr [\d.]+", trial.flags)
        views(config, (32, 32))
        # Without a trust LARS would leave the projector as it is.
        assert config.optimizer != "muon" or config.eta > 0


def test_what_comes_first_is_said(made):
    with pytest.raises(SystemExit) as stopped, one_sentence():
        methods.main(["search"])
    assert stopped.value.code == 2
    methods.main(["speed"])
    with pytest.raises(UsageError, match="run python -m study.experiments.methods search first"):
        methods.comparisons("data", 1)


def test_a_search_that_was_cut_off_chooses_nothing(made, monkeypatch):
    methods.main(["speed"])
    methods.main(["search"])
    kept = records.read("methods")
    (records.RESULTS / "methods.jsonl").unlink()
    for record in kept:
        if not record["name"].endswith("temperature-0.4"):
            records.keep("methods", record)
    with pytest.raises(UsageError, match="temperature-0.4 is not on record"):
        methods.best_try("simclr")


def test_a_trial_is_made_again_where_its_settings_are_others(data):
    trial = trials.Trial("a", methods.flags_of("simclr", "photos", "--lr 0.5"), about={"n": 1})
    made = []
    trials.make_all("demo", [trial], data, lambda *_: made.append(1) or {})
    elsewhere = trial._replace(flags=trial.flags.replace("photos", "pictures"))
    trials.make_all("demo", [trial, elsewhere], data, lambda *_: pytest.fail("it was made again"))
    for other in (
        trial._replace(flags=trial.flags.replace("0.5", "0.6")),
        trial._replace(about={"n": 2}),
        trial._replace(seed=1),
    ):
        assert other.record("demo") is None
        trials.make_all("demo", [other], data, lambda *_: made.append(1) or {})
    assert len(made) == 4


def test_a_table_goes_on_on_a_machine_of_another_precision(data, monkeypatch):
    trial = trials.Trial("a", methods.flags_of("simclr", "photos"), whatever=("lr",))
    made = []
    for has_bf16 in (True, False):
        monkeypatch.setattr(settings, "cpu_multiplies_bf16", lambda has=has_bf16: has)
        trials.make_all("demo", [trial], data, lambda *_: made.append(1) or {})
        # A rate that is nothing to what is measured.
        other = trial._replace(flags=f"{trial.flags} --lr 0.123")
        assert other.record("demo")["precision"] == "bf16"
    assert len(made) == 1
    assert other._replace(whatever=()).record("demo") is None


def test_a_trial_may_be_made_on_another_device(data, monkeypatch):
    monkeypatch.setattr(settings, "pick_device", lambda wanted: wanted)  # there is no GPU here
    trial = trials.Trial("a", methods.flags_of("simclr", "photos"))
    used = []

    def make(trial, part):
        used.append(trial.settings().device)
        return {}

    monkeypatch.setattr(trials, "provenance", lambda device: used.append(device) or {"started": ""})
    trials.make_all("demo", [trial], data, make, "cuda")
    assert used[0] == used[-1] == "cuda"
    assert trial.record("demo")["device"] == "cuda"
    trials.make_all("demo", [trial], data, lambda *_: pytest.fail("it was made again"))


def test_what_a_device_decides_is_that_of_the_device_that_is_used(data, monkeypatch):
    """Without --preset it is the CPU's or the GPU's: a trial that is made is not made again."""
    found = {"auto": "cuda"}  # a machine with a GPU
    monkeypatch.setattr(settings, "pick_device", lambda wanted: found.get(wanted, wanted))
    trial = trials.Trial("a", "--method empssl --dataset shapes")
    made = []
    for _ in range(2):
        trials.make_all("demo", [trial], data, lambda *_: made.append(1) or {}, "cpu")
    (record,) = records.read("demo")
    assert record["preset"] == "laptop" and len(made) == 1


def test_what_another_process_makes_is_left_to_it_unless_it_ends(data):
    mine, theirs = (
        trials.Trial(name, methods.flags_of("simclr", "photos")) for name in ("mine", "theirs")
    )
    other = "with records.claimed('demo theirs 0') as claimed: print(claimed, flush=True); input()"
    setup = f"from pathlib import Path; records.RESULTS = Path({str(records.RESULTS)!r})"
    program = f"from study.experiments import records; {setup}\n{other}"
    command = [sys.executable, "-c", program]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True, "cwd": ROOT}
    with subprocess.Popen(command, **pipes) as process:

        def make(trial, part):
            process.kill()  # once it has been passed over
            return {"of": trial.name}

        assert process.stdout.readline() == "True\n"
        trials.make_all("demo", [theirs, mine], data, make)
    assert [record["metrics"]["of"] for record in records.read("demo")] == ["mine", "theirs"]


def test_what_another_process_has_made_is_waited_for(data, monkeypatch):
    trial = trials.Trial("theirs", methods.flags_of("simclr", "photos"))
    claim = records.lock("demo theirs 0")
    claim.acquire()

    def others_work(seconds):
        records.keep("demo", trials.record_of(trial, data, lambda *_: {}, {}))
        claim.release()

    monkeypatch.setattr(trials.time, "sleep", others_work)
    trials.make_all("demo", [trial], data, lambda *_: pytest.fail("it was made twice"))
    assert trial.record("demo")


def test_no_record_is_lost_where_many_are_kept_at_once(data):
    def keep_some(worker):
        for seed in range(10):
            records.keep("demo", {"name": f"of {worker}", "seed": seed, "metrics": {}})

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(keep_some, range(8)))
    assert len(records.read("demo")) == 80


def test_a_trial_that_diverges_is_a_miss_and_no_end(data, monkeypatch):
    def diverge(*_):
        raise FloatingPointError("the loss is nan at step 10")

    monkeypatch.setattr(empssl, "train", diverge)
    small = "--batch 10 --hidden 8 --projector 8 --dim 4 --eval-patches 1"
    all_of = [trials.Trial(name, methods.flags_of("simclr", "photos", small)) for name in "ab"]
    trials.make_all("demo", all_of, data)
    found = [record["metrics"] for record in records.read("demo")]
    assert found == 2 * [{"linear_top1": 0.0, "knn_top1": 0.0, "diverged": True}]


def test_the_seconds_of_an_epoch_are_the_second_ones(data, monkeypatch):
    clock = iter((7.0, 11.0))  # at the end of each epoch
    monkeypatch.setattr(methods.Run, "train_seconds", lambda run: next(clock))

    def train(config, part, run):
        run.at_epoch_end(1)
        run.at_epoch_end(2)

    monkeypatch.setattr(methods, "train", train)
    found = methods.time_epochs(methods.speed_trial("single", "sgd", 512), data)
    assert found == {"seconds_an_epoch": 4.0, "seconds_before": 3.0}


def test_a_trial_is_the_method_trained_and_probed(data):
    """The whole of it on a few images, in both ways to probe."""
    small = "--batch 10 --hidden 8 --projector 8 --dim 4 --eval-patches 4 --precision float32"
    part = trials.fewer(data, 30)
    assert len(part.train_images) == 30 and torch.equal(part.test_images, data.test_images)
    trial = trials.Trial("a", methods.flags_of("simclr", "photos", small), seed=1)
    trials.make_all("demo", [trial], part)
    (kept,) = records.read("demo")
    metrics, bag = kept["metrics"], trials.train_and_probe_bag(trial, part)
    assert metrics["patches_seen"] == 60 and "quadrants_top1" in metrics
    assert bag["linear_top1"] == pytest.approx(metrics["linear_top1"], abs=0.011)
    assert bag["knn_top1"] == metrics["knn_top1"] and "quadrants_top1" not in bag
    assert (kept["name"], kept["seed"], kept["method"]) == ("a", 1, "simclr")
    assert set(records.PROVENANCE) <= set(kept)
    assert baselines.settings([*trial.flags.split(), "--seed", "1"]) == trial.settings()
