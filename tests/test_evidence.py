"""The commands that fill the README: what they refuse, what they run, what they leave alone."""

import contextlib
import dataclasses
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))
import empssl_io as io  # noqa: E402
import evidence  # noqa: E402
import report  # noqa: E402
import speed  # noqa: E402


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


def test_ten_minutes_have_every_seed_and_an_hour_has_one(results, monkeypatch, capsys):
    monkeypatch.setattr(evidence, "patches_per_second", lambda config: 800_000 / 600)
    monkeypatch.setattr(evidence, "start", lambda *run: None)
    evidence.main(["laptop", "--seeds", "2"])
    said = capsys.readouterr().out.splitlines()
    seconds = sum(int(run.flags.split("--epochs ")[1].split()[0]) * 300 for run in evidence.laptop()) + 600
    assert f"{len(evidence.laptop()) + 1} runs, about {io.human_time(seconds)}" in said[0]
    names = [line.strip() for line in said[1:]]
    assert [name for name in names if name.endswith("-seed1")] == ["ten-minutes-seed1"] and "an-hour-seed0" in names


def test_what_a_run_takes_is_measured():
    config = evidence.empssl.Config(device="cpu", preset="laptop", precision="float32", patches=2, patch_size=16, batch=10, lr=0.1,
                                       lam=1.0, backbone="small", hidden=16, projector=16, dim=8, augmentation="light")
    assert 10 < evidence.patches_per_second(config) < 1e6


def test_what_a_run_takes_is_measured_over_one_epoch_whatever_the_run_has(monkeypatch):
    config = evidence.empssl.Config(device="cpu", preset="laptop", precision="float32", patches=2, patch_size=16, batch=10, lr=0.1, epochs=30,
                                       lam=1.0, backbone="small", hidden=16, projector=16, dim=8, augmentation="light")
    now, trained = [0.0], []

    def train(encoder, images, config, augmentation):
        trained.append(config.epochs * len(images) * config.patches)
        now[0] += trained[-1] / 500                                 # seconds, at 500 patches/s
    monkeypatch.setattr(evidence.empssl, "train", train)
    monkeypatch.setattr(evidence.time, "perf_counter", lambda: now[0])
    assert evidence.patches_per_second(config) == pytest.approx(500) and trained[-1] == 30


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


@pytest.mark.parametrize("method", [[], ["--method", "simclr"]], ids=["empssl", "simclr"])
def test_a_recipe_is_its_settings_with_the_presets_of_today(method, in_tmp, monkeypatch):
    arguments = [*method, "--dataset", "shapes", "--preset", "laptop", "--device", "cpu", "--epochs", "3"]
    path = in_tmp / "record.json"
    path.write_text(json.dumps(dataclasses.asdict(evidence.settled([*arguments, "--name", "one"])) | {"metrics": {}}))
    assert evidence.same_recipe(path, [*arguments, "--name", "two"])
    supervised = [*arguments, "--method", "supervised"]
    of_ten_classes = dataclasses.asdict(evidence.settled(supervised)) | {"dim": 10, "data_dir": "data"}
    (in_tmp / "supervised.json").write_text(json.dumps(of_ten_classes))
    assert evidence.same_recipe(in_tmp / "supervised.json", supervised) and not evidence.same_recipe(in_tmp / "supervised.json", arguments)
    assert not evidence.same_recipe(path, [*arguments, "--seed", "1"])
    assert not evidence.same_recipe(path, [*arguments, "--lr", "0.123"])
    monkeypatch.setitem(evidence.empssl.PRESETS["laptop"], "eval_patches", 4)
    monkeypatch.setitem(evidence.empssl.PRESETS["laptop"], "eval_augmentation", "grid")
    assert not evidence.same_recipe(path, arguments)


@pytest.mark.parametrize("begun,recorded", [(None, None), ("1", None), ("2", None), ("2", "2"), ("1", "1")])
def test_what_is_run_anew_resumed_and_left_alone(begun, recorded, results, in_tmp, monkeypatch):
    """Folder and record of the recipe "1", or of "2", another."""
    run = evidence.Run("demo", "--dataset shapes --preset laptop --device cpu --epochs 1")
    monkeypatch.setattr(evidence, "transfer", lambda flags: [run])
    monkeypatch.setattr(evidence, "estimate", lambda *a: 0.0)
    for which, path in ((begun, in_tmp / "runs" / "transfer-demo-seed0" / "config.json"), (recorded, results / "transfer" / "demo-seed0.json")):
        if which:
            path.parent.mkdir(parents=True)
            path.write_text(json.dumps(dataclasses.asdict(evidence.settled(run.flags.split() + ["--epochs", which]))))
    ran = []
    monkeypatch.setattr(evidence.subprocess, "run", lambda command, **_: ran.append(command[2:]) or SimpleNamespace(returncode=0))
    monkeypatch.setattr(report, "keep_record", lambda *a: None)
    evidence.main(["transfer", "--seeds", "1"])
    new = [*run.flags.split(), "--seed", "0", "--name", "transfer-demo-seed0"]
    expected = {(None, None): [new], ("1", None): [["--resume", "runs/transfer-demo-seed0"]], ("2", None): [[*new, "--force"]],
                ("2", "2"): [[*new, "--force"]], ("1", "1"): []}
    assert ran == expected[begun, recorded]


def peer(results, name, seed=0, **metrics):
    metrics = {"linear_top1": 0.5, "representation_top1": 0.4, "knn_top1": 0.3, "train_seconds": 100.0, "patches_seen": 6000} | metrics
    record = {"seed": seed, "epochs": metrics.pop("epochs", 1), "patches": 2, "batch": 100}
    (results / "peers").mkdir(parents=True, exist_ok=True)
    (results / "peers" / f"{name}-seed{seed}.json").write_text(json.dumps(record | {"metrics": metrics}))


def test_peers_at_equal_seconds_are_runs_of_those_seconds(results):
    """Of each seed the run of several epochs, or the one epoch that takes as long; where neither does, the cells are empty."""
    for seed, accuracy in ((0, 0.60), (1, 0.62)):
        peer(results, "empssl-1-epoch", seed, linear_top1=accuracy)
        peer(results, "byol-1-epoch", seed, train_seconds=20.0, linear_top1=0.1)
        peer(results, "byol-equal-seconds", seed, train_seconds=90.0, epochs=4 + seed, linear_top1=0.2 + accuracy / 10)
    peer(results, "single-1-epoch", train_seconds=20.0)
    peer(results, "empssl-upsampled-1-epoch", train_seconds=400.0)
    probed = {"linear_top1": 0.35, "representation_top1": 0.25, "knn_top1": 0.15}
    (results / "peers" / "untrained-1-epoch-seed0.json").write_text(json.dumps({"seed": 0, "epochs": 1, "patches": 2, "batch": 100,
                                                                               "metrics": probed}))
    rows = {row.split(" | ")[0]: row for row in report.peers_table().splitlines()}
    assert rows["| empssl"].startswith("| empssl | 2 | 0.610 ± 0.010 | 0.400 ± 0.000 | 0.300 ± 0.000 | 6,000 | 30 | 100 | 1 | 0.610 ± 0.010 |")
    assert rows["| byol"].startswith("| byol | 2 | 0.100 ± 0.000 |") and "| 20 | 4 or 5 | 0.261 ± 0.001 |" in rows["| byol"]
    assert rows["| untrained"].startswith("| untrained | 1 | 0.350 | 0.250 | 0.150 | 0 | 0 | 0 | | | | | |")
    assert "| 20 | | | | | |" in rows["| single"] and "| 400 | | | | | |" in rows["| empssl-upsampled"]
    assert len({row.count("|") for row in rows.values()}) == 1


def test_the_peers_picture_has_a_line_a_method(results, monkeypatch):
    plt = pytest.importorskip("matplotlib.pyplot")
    for name, accuracy in (("empssl", 0.6), ("byol", 0.4), ("empssl-no-lars", 0.1)):
        for seed in (0, 1):
            peer(results, f"{name}-1-epoch", seed, linear_top1=accuracy + 0.1 * seed, train_seconds=20.0)
    peer(results, "byol-equal-seconds", train_seconds=100.0, linear_top1=0.5)
    peer(results, "untrained-1-epoch", linear_top1=0.35)
    report.main(["--peers"])
    assert (results / "peers" / "accuracy.png").stat().st_size > 10_000
    lines = {line.get_label(): [[round(float(x), 6) for x in axis] for axis in line.get_data()] for line in plt.gcf().axes[0].get_lines()}
    assert lines == {"empssl": [[20], [0.65]], "byol": [[20, 100], [0.45, 0.5]], "untrained encoder": [[0, 1], [0.35, 0.35]]}
    plt.close()


def test_a_run_on_fewer_images_is_probed_on_all(results):
    peer(results, "empssl-1-epoch"), peer(results, "empssl-of-100-trained", train_seconds=90.0, linear_top1=0.1)
    path = results / "peers" / "empssl-of-100-1-epoch-seed0.json"
    path.write_text(json.dumps({"seed": 0, "epochs": 1, "metrics": {
        "checkpoint": "runs/peers-empssl-of-100-trained-seed0/encoder.pt", "linear_top1": 0.7, "representation_top1": 0.6, "knn_top1": 0.5}}))
    row = report.peers_table().splitlines()[-1]
    assert row.startswith("| empssl-of-100 | 1 | 0.700 | 0.600 | 0.500 | 6,000 | 30 | 90 | 1 | 0.700 |")


@pytest.mark.parametrize("gpu", [False, True], ids=["cpu", "gpu"])
def test_every_recipe_of_the_peers_is_one_that_the_programs_take(gpu, results, in_tmp, monkeypatch):
    """And each is started once at one epoch and, where more epochs fit EMP-SSL's seconds, once more."""
    monkeypatch.setattr(evidence, "GPU", gpu)
    ran = []

    def start(run):
        ran.append(run)
        two_views = "--method" in run.flags
        peer(results, run.name.rsplit("-seed", 1)[0], int(run.name[-1]), train_seconds=25.0 if two_views else 100.0)
        if "--eval-only" not in run.flags:
            c = evidence.settled(run.flags.split())
            if two_views:
                evidence.baselines.views(c, 32, 32)
            io.check_sizes(dataclasses.replace(c, patch_size=c.patch_size or 32), 15_000, 32, 32)
    evidence.peers(3, start)
    names = [run.name for run in ran]
    assert len(names) == len(set(names)) and len([n for n in names if "-1-epoch-" in n]) == 3 * len(evidence.METHODS) + len(evidence.PEERS_ABLATIONS)
    assert names[:2] == ["untrained-1-epoch-seed0", "empssl-1-epoch-seed0"]
    assert sum("equal-seconds" in n for n in names) == sum("--method" in run.flags for run in ran if "-1-epoch-" in run.name)
    assert all("--epochs 4" in run.flags for run in ran if "equal-seconds" in run.name)
    assert [run.name for run in ran if run.after] == [f"empssl-{n}-1-epoch-seed0" for n in ("60-patches-of-5000", "200-patches-of-1500",
                                                                                               "centre-crop-at-evaluation")]


def test_the_peers_are_announced_with_what_is_left_and_how_long(results, monkeypatch, capsys):
    """300,000 patches an epoch of EMP-SSL, at 1,000 a second; the untrained encoder, 8 of the 9 methods and 20 ablations are open."""
    monkeypatch.setattr(evidence, "GPU", False)
    monkeypatch.setattr(evidence, "patches_per_second", lambda config: 1000.0)
    monkeypatch.setattr(evidence, "peers", lambda *_: None)
    monkeypatch.setattr(evidence, "PEERS_ABLATIONS", dict(list(evidence.PEERS_ABLATIONS.items())[:20]))
    peer(results, "empssl-1-epoch")
    monkeypatch.setattr(report, "draw_peers", lambda: None)
    evidence.main(["peers", "--seeds", "1"])
    said = capsys.readouterr().out
    assert "for the 5 min of EMP-SSL's; 29 of 30 to come, about 2.7 h of training" in said


def test_without_records_of_peers_nothing_is_drawn(results, capsys):
    report.main(["--peers"])
    assert "nothing drawn" in capsys.readouterr().out and not results.exists()


def test_the_ways_are_compared_on_a_gpu_or_rehearsed(results, monkeypatch):
    monkeypatch.setattr(evidence, "GPU", False)
    with pytest.raises(io.UsageError, match="--rehearse"):
        speed.main([])


def test_the_official_loss_is_checked_before_anything_is_timed(monkeypatch):
    speed.check_official_loss()
    monkeypatch.setattr(speed.ops, "official_loop", lambda z, eps2: -empssl_loop(z, eps2))
    empssl_loop = evidence.empssl.coding_rate
    with pytest.raises(AssertionError, match="nothing is timed"):
        speed.check_official_loss()


@pytest.mark.parametrize("name", speed.TRIES)
def test_each_try_for_speed_is_another_recipe_that_fits(name):
    flags = ["--dataset", "shapes", "--device", "cpu", "--preset", "fast"]
    ours, theirs = evidence.settled([*flags, *speed.TRIES[name].flags.split()]), evidence.settled(flags)
    changed = ours != theirs or speed.TRIES[name].change is not contextlib.nullcontext
    assert changed == (name != "as-it-is") or name == "float32"                 # which a CPU without bf16 has anyway
    io.check_sizes(ours, 50_000, 32, 32)


@pytest.mark.parametrize("recipe", [*speed.WAYS.values(), *(run.flags for run in speed.training_runs("", 1))])
def test_each_way_is_a_recipe_that_empssl_takes(recipe):
    config = evidence.settled(["--dataset", "shapes", "--device", "cpu", *recipe.split()])
    assert config.preset in ("paper", "fast") and (config.precision == "float32" or "float32" not in recipe)


def test_time_without_a_kernel_is_what_no_span_covers():
    assert speed.idle_share([(0, 1), (3, 4)]) == 0.5 and speed.idle_share([(5, 8), (0, 10), (2, 3)]) == 0
    assert speed.idle_share([(2, 6), (4, 8), (10, 12)]) == pytest.approx(0.2)
    with pytest.raises(AssertionError, match="no kernel"):
        speed.idle_share([])


def test_a_rate_leaves_the_first_steps_out():
    """50 s for the first ten steps, which compile, then a second for ten."""
    at = lambda step, seconds: {"step": step, "patches_per_second": step * 2000 / seconds}
    assert speed.steady_rate([at(10, 50.0), at(20, 51.0), at(30, 52.0)], 2000) == pytest.approx(20_000)
    assert speed.steady_rate([at(10, 50.0), at(20, 51.0)], 2000) == pytest.approx(20_000)
    assert speed.steady_rate([at(10, 50.0)], 2000) == 400


def test_the_official_patches_are_those_of_one_image():
    images = torch.zeros(2, 3, 32, 32, dtype=torch.uint8)
    images[1] = 255
    patches = speed.OfficialPatches(images, 5, 16)
    black, white = (patches[i] for i in (0, 1))
    assert len(patches) == 2 and black.shape == (5, 3, 16, 16) and black.min() == -1 and white.max() == 1
    assert {round(x.mean().item(), 3) for x in black} <= {-1.0, 1.0}            # 1 where it was solarized


def test_the_table_of_the_ways(results):
    (results / "speed").mkdir(parents=True)
    part = lambda name, **more: {"part": name, "seconds": 0.002, "share": 0.5} | more
    ways = {"official": {"patches_per_second": 100.0, "parts": [part("patches")]},
            "fast": {"patches_per_second": 5000.0, "idle": 0.25, "parts": [part("forward", floor=0.001)]}}
    for way, r in ways.items():
        (results / "speed" / f"{way}.json").write_text(json.dumps(r | {"hardware": "abacus"}))
    probed = lambda accuracy, seconds, **more: {"linear_top1": accuracy, "knn_top1": 0.5, "train_seconds": seconds} | more
    for preset, pace in (("paper-bf16", 40.0), ("fast", 4.0)):
        record = {"images": 50, "patches": 20, "epochs": 10, "seen": [probed(0.71 + 0.05 * e, pace * e, epoch=e) for e in (1, 2, 3)],
                  "metrics": probed(0.91, 10 * pace)}
        (results / "speed" / f"{preset}-10-epochs-seed0.json").write_text(json.dumps(record))
    one = {"images": 50, "patches": 20, "epochs": 1, "metrics": probed(0.82, 5.0)}
    (results / "speed" / "fast-1-epochs-seed0.json").write_text(json.dumps(one))
    official, paper, bf16, fast = report.speed_table().splitlines()[2:]
    assert official.startswith("| official | 100 | | 2.00 |")
    assert official.endswith("| not measured / 0.910 | 20 s / 30 s / 100 s | abacus |")         # 50 images x 20 patches an epoch, 100 a second
    assert paper.startswith("| paper | not measured |") and bf16.startswith("| paper-bf16 | not measured |")
    assert "| 2.00 (2.0x) |" in fast and "| 25% |" in fast and fast.endswith("| 0.820 / 0.910 | 5 s / 12 s / 40 s | abacus |")


def test_a_try_that_fails_is_a_miss_and_the_next_one_runs(results, monkeypatch):
    data = "--dataset shapes --subset 300 --device cpu --patches 2 --batch 20 --patch-size 8 --hidden 16 --projector 16 --dim 8 --eval-patches 1 --no-compile"
    monkeypatch.setattr(speed, "TRIES", {"as-it-is": speed.Try("a", ""), "rising": speed.Try("b", "--lr 1e30 --optimizer sgd"),
                                         "wide": speed.Try("c", "--hidden 32")})
    monkeypatch.setattr(speed, "data_flags", lambda: data)
    monkeypatch.setattr(speed, "SMALL", "")
    speed.main(["--search", "--rehearse"])
    tries = results / "rehearsal" / "speed" / "tries"
    read = lambda name: json.loads((tries / f"{name}.json").read_text())["metrics"]
    assert "not finite" in read("rising")["failed"] and 0 <= read("wide")["holdout_linear_top1"] <= 1
    (results / "speed").mkdir()
    tries.rename(results / "speed" / "tries")
    rows = report.speed_story().splitlines()[-3:]
    assert "| as-it-is |" in "".join(rows[:2]) and rows[2].startswith("| rising | `--lr 1e30 --optimizer sgd` | b | Loss or weights were not finite")
