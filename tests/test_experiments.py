"""The commands that fill the tables."""

import functools
import json
import shlex
import sys

import pytest
import torch

import empssl
from empssl_support.cli import Stopped, UsageError, signals
from empssl_support.data import load_dataset
from recipes import plain_folder
from study.experiments import (
    laptop,
    network,
    paper,
    records,
    runs,
    search,
    tables,
    transfer,
    trials,
)
from study.experiments.runs import Recipe

CPU = torch.device("cpu")
DEMO = "--dataset shapes --preset laptop --device cpu --epochs 1"
TINY = "--patches 2 --batch 20 --patch-size 8 --hidden 16 --projector 16 --dim 8 --eval-patches 4"


@pytest.fixture(autouse=True)
def results(in_tmp, monkeypatch):
    monkeypatch.setattr(records, "RESULTS", in_tmp / "results")
    return in_tmp / "results"


@pytest.fixture
def stand_in(monkeypatch, in_tmp):
    """Instead of the programs: write a run's folder as they do. Returns what was asked for."""
    asked = []

    def run(command):
        arguments = command[command.index("-m") + 2 :] if "-m" in command else command[2:]
        asked.append(arguments)
        if arguments[0] != "--resume":
            name = arguments[arguments.index("--name") + 1]
            pretend(in_tmp / "runs" / name, arguments[: arguments.index("--name")])
        return 0

    monkeypatch.setattr(runs, "run", run)
    return asked


def pretend(folder, arguments):
    """A finished run; what is seen in two views takes a quarter of the seconds."""
    checkpoint = None
    if "--checkpoint" in arguments:
        checkpoint = arguments[arguments.index("--checkpoint") + 1]
        arguments = arguments[: arguments.index("--checkpoint")]
    words = " ".join(arguments)
    at = arguments.index("--seed")
    config = Recipe("", "", shlex.join(arguments[:at]), int(arguments[at + 1])).settings()
    config.checkpoint = checkpoint
    folder.mkdir(parents=True, exist_ok=True)
    # What a run has beside its settings.
    about = {"commit": "c", "command": words, "hardware": "abacus", "started": "now"}
    (folder / "config.json").write_text(json.dumps(vars(config) | about | {"versions": {}}))
    last = {"linear_top1": 0.5, "knn_top1": 0.4, "probe_seconds": 3.0}
    if not config.eval_only:
        seconds = 25.0 if hasattr(config, "method") else 100.0
        last |= {"train_seconds": seconds * config.epochs, "patches_seen": 6000}
    lines = [{"step": 10, "loss": 1.0}, {"epoch": 1, "linear_top1": 0.3}, last]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


# ---- a run ----


@pytest.mark.parametrize("method", ["", " --method simclr", " --method supervised"])
def test_a_recipe_is_its_settings_with_the_presets_of_today(method, monkeypatch):
    recipe = Recipe("demo", "demo", DEMO + method, 0)
    stored = json.loads(json.dumps(vars(recipe.settings())))
    if "supervised" in method:
        stored["dim"] = 10  # a supervised run stores its number of classes
    assert recipe.is_of(stored | {"name": "other", "data_dir": "elsewhere", "force": True})
    for machine in ({"precision": "bf16"}, {"precision": "float32"}, {"device": "cuda"}):
        assert recipe.is_of(stored | machine)
    assert not recipe._replace(seed=1).is_of(stored)
    assert not recipe._replace(flags=recipe.flags + " --lr 0.123").is_of(stored)
    assert not recipe.is_of(stored | {"eval_augmentation": "maps"})
    other = " --method vicreg" if method else " --method simclr"
    assert not recipe._replace(flags=DEMO + other).is_of(stored)
    monkeypatch.setitem(empssl.PRESETS["laptop"], "lam", 7.0)
    assert not recipe.is_of(stored)


def test_what_trains_nothing_has_no_epochs_of_its_own():
    recipe = Recipe("demo", "demo", f"{DEMO} --eval-only", 0)
    stored = json.loads(json.dumps(vars(recipe.settings())))
    assert recipe.is_of(stored | {"epochs": 0})
    trains = recipe._replace(flags=DEMO)
    assert not trains.is_of(stored | {"eval_only": False, "epochs": 0})


@pytest.mark.parametrize("begun", [None, "1", "2"])
@pytest.mark.parametrize("kept", [None, "1", "2"])
def test_what_is_run_anew_resumed_and_left_alone(begun, kept, in_tmp, stand_in):
    """Folder and record of the recipe of one epoch, or of another one."""
    recipe = Recipe("demo", "name", DEMO, 0)
    folder = in_tmp / "runs" / "demo-name-seed0"
    if kept:
        pretend(folder, f"{DEMO} --epochs {kept} --seed 0".split())
        records.keep("demo", runs.written(recipe))
        (folder / "config.json").unlink()
    if begun:
        pretend(folder, f"{DEMO} --epochs {begun} --seed 0".split())
    runs.start_all([recipe])
    anew = [*DEMO.split(), "--seed", "0", "--name", folder.name, "--force"]
    config = recipe.settings()
    here = ["--data-dir", config.data_dir, "--device", config.device]
    resumed = ["--resume", "runs/demo-name-seed0", *here]
    expected = [resumed if begun == "1" else anew]
    assert stand_in == ([] if kept == "1" else expected)
    (record,) = records.read("demo")
    assert record["epochs"] == 1 and record["run"] == folder.name


def test_the_record_of_a_run_is_its_settings_and_its_last_line(stand_in):
    runs.start(Recipe("demo", "name", DEMO, 3, about={"what": "a demo"}))
    (record,) = records.read("demo")
    assert set(records.PROVENANCE) <= set(record)
    assert (record["name"], record["seed"], record["what"]) == ("name", 3, "a demo")
    assert record["patches"] == 8
    assert record["metrics"]["train_seconds"] == 100.0 and record["metrics"]["linear_top1"] == 0.5
    assert record["seen"] == [{"epoch": 1, "linear_top1": 0.3}] and record["resumed"] == []


def test_a_probe_of_anothers_encoder_has_that_ones_costs(stand_in, capsys):
    trained = Recipe("demo", "trained", DEMO, 0)
    probe = Recipe("demo", "probe", f"{DEMO} --eval-only --eval-patches 4", 0, "trained")
    runs.start_all([trained, probe])
    assert stand_in[1][-5:-3] == ["--checkpoint", "runs/demo-trained-seed0/encoder.pt"]
    _, record = records.read("demo")
    assert record["name"] == "probe" and record["eval_patches"] == 16
    assert record["probe"]["eval_patches"] == 4
    assert record["metrics"]["train_seconds"] == 100.0
    capsys.readouterr()
    runs.start_all([trained, probe])
    assert len(stand_in) == 2
    _, *kept = capsys.readouterr().out.splitlines()
    assert kept == ["  study/results/demo.jsonl"]  # what is to be moved away, named once


def test_an_encoder_that_is_to_be_probed_and_is_gone_is_trained_again(stand_in):
    """As where the records came along to another machine, and the runs did not."""
    trained = Recipe("demo", "trained", DEMO, 0)
    probe = Recipe("demo", "probe", f"{DEMO} --eval-only", 0, "trained")
    runs.start(trained)
    runs.start_all([trained, probe])
    assert ["--checkpoint" in command for command in stand_in] == [False, False, True]
    runs.start_all([trained, probe])
    assert len(stand_in) == 3  # both are on record
    another = probe._replace(name="another")
    (trained.folder() / "encoder.pt").touch()
    runs.start_all([trained, another])
    assert ["--checkpoint" in command for command in stand_in[3:]] == [True]


def test_a_run_that_fails_ends_the_command_with_its_code(results, monkeypatch):
    monkeypatch.setattr(runs, "run", lambda command: 2)
    monkeypatch.setattr(runs, "estimate", lambda recipes: 0.0)
    with pytest.raises(SystemExit) as stop:
        laptop.main(["--seeds", "1"])
    assert stop.value.code == 2 and not results.exists()


def test_a_signal_is_passed_on_and_the_run_may_end_in_peace(in_tmp, monkeypatch):
    """The program says with a file that it is there, and with another that it was asked to end."""
    program = """
import os, pathlib, signal, sys
def end(number, frame):
    pathlib.Path("asked").touch()
    sys.exit(143)
signal.signal(signal.SIGTERM, end)
os.kill(os.getppid(), signal.SIGTERM)
signal.sigtimedwait([signal.SIGUSR1], 30)
"""
    monkeypatch.setattr(signals, "heard", 0)  # and 0 again for the tests after this one
    with signals.listened_to(), pytest.raises(Stopped) as stop:
        runs.run([sys.executable, "-c", program])
    assert stop.value.number == 15 and (in_tmp / "asked").exists()


def test_what_a_run_takes_is_estimated(monkeypatch):
    """Of what trains, from the speed of the first: here 60 patches in 3 s."""
    trained = []

    def train(encoder, images, config, augmentation):
        trained.append((len(images), config.epochs, images.shape[-1]))
        return {"patches_seen": 60, "train_seconds": 3.0}

    monkeypatch.setattr(empssl, "train", train)
    recipes = [
        Recipe("demo", "a", f"{DEMO} --epochs 2 --subset 1000", 0),
        Recipe("demo", "b", f"{DEMO} --eval-only", 0),
        Recipe("demo", "c", "--dataset cifar10 --preset laptop --device cpu --patches 2", 0),
    ]
    assert runs.estimate(recipes) == pytest.approx((1000 * 8 * 2 + 50_000 * 2) / 20)
    assert trained == [(5, 1, 16), (15, 1, 16)]


# ---- the commands ----


def test_the_papers_recipes_are_refused_on_a_cpu_with_an_estimate(results, monkeypatch, capsys):
    def seconds(recipes):
        configs = [recipe.settings() for recipe in recipes]
        return sum(50_000 * config.patches * config.epochs for config in configs) / 100

    monkeypatch.setattr(runs, "estimate", seconds)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    command = ["cifar10", "--seeds", "1"]
    # 1, 10 and 30 epochs of 20 and 200 patches of 50,000 images.
    with pytest.raises(UsageError, match="about 52 days"):
        paper.main(command)
    said = capsys.readouterr().out
    assert "6 runs" in said and "cifar10-30-epochs-200-patches, seed 0" in said
    assert not results.exists()


def test_a_rehearsal_is_kept_apart_and_sees_what_the_paper_sees(stand_in, monkeypatch):
    monkeypatch.setattr(runs, "estimate", lambda recipes: 0.0)
    paper.main(["cifar100", "--seeds", "1", "--subset", "500"])
    found = records.read("rehearsal")
    assert [(r["patches"], r["epochs"]) for r in found] == [
        (patches, epochs) for patches in (20, 200) for epochs in (1, 10, 30)
    ]
    assert {r["dataset"] for r in found} == {"cifar100"} and {r["subset"] for r in found} == {500}
    assert [r["probe_epochs"] for r in found] == [None, None, "1,10"] * 2
    assert records.read("cifar100") == []


def test_the_laptops_figures_are_drawn_in_the_readme(stand_in, monkeypatch, capsys):
    monkeypatch.setattr(runs, "estimate", lambda recipes: 600.0)
    laptop.main(["--seeds", "2", "--data-dir", "my data/cifar10-jpeg"])
    assert "7 runs, about 10 min" in capsys.readouterr().out
    assert ["my data/cifar10-jpeg" in command for command in stand_in].count(True) == 6
    found = [(r["name"], r["seed"], r["epochs"]) for r in records.read("laptop")]
    short = [
        (name, seed, n) for name, n in (("one-pass", 1), ("ten-minutes", 4)) for seed in (0, 1)
    ]
    assert sorted(found) == sorted([*short, ("an-hour", 0, 28), ("an-hour-supervised", 0, 28)])
    assert [row.split(" | ")[:3] for row in tables.result().splitlines()[2:]] == [
        ["| cifar10-jpeg", "EMP-SSL", "1"],
        ["| cifar10-jpeg", "EMP-SSL", "4"],
        ["| cifar10-jpeg", "EMP-SSL", "28"],
        ["| cifar10-jpeg", "all labels", "28"],
        ["| shapes", "EMP-SSL", "1"],
    ]


# ---- end to end ----


@pytest.mark.slow
def test_programs_are_run_once_probed_resumed_and_keep_their_records(in_tmp, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setenv("PYTHONPATH", str(runs.ROOT))
    folder = labelled_images(in_tmp / "my photos", each=30)
    data = f"--dataset imagefolder --data-dir {shlex.quote(str(folder))} --preset laptop {TINY}"
    ours = Recipe("demo", "ours", f"{data} --device cpu", 0)
    probe = f"{data} --device cpu --eval-only --eval-patches 1"
    probed = Recipe("demo", "probed", probe, 0, probes="ours")
    trained, record = runs.start(ours), runs.start(probed)
    assert record["probe"]["checkpoint"] == "runs/demo-ours-seed0/encoder.pt"
    assert record["metrics"]["patches_seen"] == trained["metrics"]["patches_seen"]
    assert "quadrants_top1" in trained["metrics"] and "quadrants_top1" not in record["metrics"]
    assert all(r["command"].startswith("python empssl.py ") for r in (trained, record))
    # A peer is a program of its own, which is resumed where its record is lost.
    simclr = Recipe("demo", "simclr", f"{data} --device cpu --method simclr", 0)
    record = runs.start(simclr)
    (in_tmp / "results" / "demo.jsonl").unlink()
    assert runs.start(simclr) == record and record["method"] == "simclr"
    assert record["command"].startswith("python -m study.baselines ")
    monkeypatch.setattr(runs, "run", lambda command: pytest.fail("it ran again"))
    runs.start(simclr)


def test_the_papers_network_is_seen_after_one_epoch_and_two(stand_in, monkeypatch):
    monkeypatch.setattr(runs, "estimate", lambda recipes: 0.0)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    network.main([])
    found = {r["name"]: r for r in records.read("network")}
    assert list(found) == [
        "native-1-epoch",
        "native-2-epochs",
        "native-16-crops-of-5000",
        "native-128-crops-of-5000",
    ]
    one, two = found["native-1-epoch"], found["native-2-epochs"]
    assert (one["backbone"], one["patches"], one["patch_size"]) == ("resnet18", 20, 16)
    assert (two["epochs"], two["probe_epochs"]) == (2, "1")
    probe = found["native-128-crops-of-5000"]["probe"]
    assert (probe["eval_patches"], probe["eval_augmentation"]) == (128, "train")
    assert probe["subset"] == 5000
    network.main(["--enlarged"])
    enlarged = records.named("network", "enlarged-2-epochs")
    assert [run["patch_size"] for run in enlarged] == [None]  # the image's


# ---- encoders on other images ----


def test_transfer_is_to_any_folder_and_to_some_classes(in_tmp, monkeypatch):
    folder = labelled_images(in_tmp / "my photos", each=30)
    shapes = load_dataset("shapes", subset=500)
    some = {key: getattr(shapes, key)[::5] for key in ("test_images", "test_labels")}
    make, make_trial = transfer.make, transfer.make_trial

    def load(name, place):
        return shapes._replace(**some) if name == "shapes" else load_dataset(name, place)

    def tiny(method, source, target, changes, seed, most=None):
        changes = f"--preset laptop --device cpu --precision float32 {TINY} {changes}"
        return make_trial(method, source, target, changes, seed, most)

    monkeypatch.setattr(transfer, "load_dataset", load)
    monkeypatch.setattr(transfer, "make_trial", tiny)
    transfer.main(["--from", str(folder), "--to", "shapes", "--seeds", "1"])
    transfer.main(["--from", "shapes:0-4", "--to", "shapes:5-9", "--seeds", "1"])
    to_shapes, to_others = records.read("transfer")
    assert to_shapes["name"] == f"empssl from {folder} to shapes"
    assert to_others["name"] == "empssl from shapes:0-4 to shapes:5-9"
    for record in (to_shapes, to_others):
        assert 0 <= record["metrics"]["linear_top1"] <= 1
        assert 0 <= record["metrics"]["source_linear_top1"] <= 1
    monkeypatch.setattr(transfer, "make", lambda *_: pytest.fail("it ran again"))
    transfer.main(["--from", "shapes:0-4", "--to", "shapes:5-9", "--seeds", "1"])
    # Without labels there is nothing to probe with, and nothing is trained.
    plain_folder(in_tmp / "plain", 60)
    trial = make_trial("empssl", "shapes", str(in_tmp / "plain"), TINY, 0)
    monkeypatch.setattr(transfer, "train", lambda *_: pytest.fail("it was trained"))
    with pytest.raises(UsageError, match="plain has no labels"):
        make(trial, "data")
    untrained = f"--preset laptop --device cpu --precision float32 {TINY} --eval-only"
    metrics = make(make_trial("empssl", "shapes:0-4", "shapes:5-9", untrained, 0), "data")
    assert set(metrics) >= {"linear_top1", "source_linear_top1", "raw_pixels_top1"}


def test_some_classes_are_their_images_numbered_from_0():
    data = load_dataset("shapes", subset=200)
    others = transfer.images("shapes:5-9", "data")
    assert others.classes == data.classes[5:]
    whole = load_dataset("shapes")
    rows = (whole.train_labels >= 5).nonzero().flatten()
    assert torch.equal(others.train_images, whole.train_images[rows])
    assert torch.equal(others.train_labels, whole.train_labels[rows] - 5)
    assert set(others.test_labels.tolist()) == set(range(5))
    for wrong in ("shapes:5-10", "shapes:x", "shapes:4-3"):
        with pytest.raises(UsageError, match="names no classes of shapes, which has 10"):
            transfer.images(wrong, "data")


def test_the_table_of_transfer_has_each_method_at_its_best(monkeypatch):
    best = {"chosen": "--optimizer lars --lr 1.5", "epochs": 12}
    monkeypatch.setattr(transfer, "best_try", lambda method: best)
    found = transfer.of_the_table("photos", seeds=2)
    assert len(found) == 2 * 4 * (3 + 1)
    settings = {t.name.partition(",")[0]: t.settings() for t in found}
    untrained = [name for name, config in settings.items() if config.eval_only]
    assert len(untrained) == 4 and all(name.startswith("untrained: ") for name in untrained)
    assert settings["simclr from photos:0-4 to photos:5-9"].lr == 1.5
    assert settings["simclr from shapes to photos"].epochs == 12
    assert settings["empssl from photos to shapes"].epochs == transfer.EPOCHS
    assert settings["empssl from shapes to photos"].dataset == "shapes"
    assert {c.augmentation for n, c in settings.items() if "from shapes" in n} == {"paper"}
    assert {c.augmentation for n, c in settings.items() if "from photos" in n} == {"light"}


# ---- tries for the preset ----


def labelled_images(folder, each=8):
    for part, count in (("train", each), ("test", 3)):
        for of_class in ("cat", "dog"):
            plain_folder(folder / part / of_class, count)
    return folder


def test_tries_see_training_images_alone_and_none_twice(in_tmp):
    data = load_dataset("imagefolder", labelled_images(in_tmp / "photos"))
    part = trials.holdout(data, images=8, test=4)
    train, test = part[:2], part[2:4]
    assert [y.bincount().tolist() for _, y in (train, test)] == [[4, 4], [2, 2]]
    kept = list(zip(data.train_images, data.train_labels.tolist()))
    places = []
    for images, labels in (train, test):
        for image, label in zip(images, labels.tolist()):
            (place,) = [i for i, (x, y) in enumerate(kept) if y == label and torch.equal(x, image)]
            places.append(place)
    assert len(set(places)) == 12
    # With other images to train on, those to test on are the same.
    fewer = trials.holdout(data, images=4, test=4)
    assert torch.equal(fewer.test_images, part.test_images) and len(fewer.train_images) == 4
    # Beside the test images stand the same ones to train on.
    beside = trials.fewer(data, images=4)
    assert len(beside.train_images) == 4 and torch.equal(beside.test_images, data.test_images)


def test_too_few_images_for_tries_are_a_sentence(in_tmp):
    data = load_dataset("imagefolder", labelled_images(in_tmp / "photos"))
    with pytest.raises(UsageError, match="cat has 8 training images; give it 9"):
        trials.holdout(data, images=12, test=6)


def test_a_try_is_the_preset_with_its_changes(in_tmp, monkeypatch):
    """The whole command on a few images: what a try changes is what is trained."""
    folder = labelled_images(in_tmp / "photos")
    split = functools.partial(trials.holdout, test=6)
    tiny = f"{TINY} --batch 5"
    tries = {
        "plain": search.Try(0.5, tiny, images=10),
        "narrow": search.Try(0.6, tiny, stages="54 + 8", images=10),
        "one-step": search.Try(0.7, tiny, newton_schulz=1, images=10),
        "constant": search.Try(0.8, tiny, decay=0.25, images=10),
        "whitened": search.Try(0.9, tiny, stages="w216 8", images=10),
    }
    monkeypatch.setattr(search, "holdout", split)
    monkeypatch.setattr(search, "TRIES", tries)
    encoders = []
    train = empssl.train

    def watched(encoder, *rest):
        encoders.append(encoder)
        return train(encoder, *rest)

    monkeypatch.setattr(empssl, "train", watched)
    before = empssl.small_backbone, empssl.orthogonal, empssl.cosine
    search.main(["--data-dir", str(folder), "--seeds", "1"])
    assert (empssl.small_backbone, empssl.orthogonal, empssl.cosine) == before
    kept = records.read("laptop")
    assert [r["name"] for r in kept] == [f"try-{name}" for name in tries]
    assert [r["predicted"] for r in kept] == [0.5, 0.6, 0.7, 0.8, 0.9]
    assert all(set(records.PROVENANCE) <= set(r) for r in kept)
    assert all(0 <= r["metrics"]["quadrants_top1"] <= 1 for r in kept)
    plain, narrow, one_step, constant, whitened = (e.state_dict() for e in encoders)
    assert narrow["represent.0.weight"].shape == (16, 8)
    assert plain["represent.0.weight"].shape == (16, 256)
    assert not torch.equal(plain["represent.0.weight"], one_step["represent.0.weight"])
    assert not torch.equal(plain["represent.0.weight"], constant["represent.0.weight"])
    # Its first filters whiten still, each with its negative.
    first = whitened["backbone.0.weight"]
    assert first.shape == (216, 3, 6, 6) and torch.equal(first[:108], -first[108:])
    assert not encoders[-1].backbone[0].weight.requires_grad
    # What is kept is not done again, and what nobody wrote down is a sentence.
    monkeypatch.setattr(empssl, "train", lambda *_: pytest.fail("it ran again"))
    search.main(["--data-dir", str(folder), "--seeds", "1", "plain"])
    with pytest.raises(UsageError, match="There is no try sideways"):
        search.main(["sideways"])


def test_a_constant_rate_falls_to_nothing_in_its_last_part():
    rates = [search.falling_late(0.25, 0.1, t, 100) for t in (0, 50, 75, 80, 90, 100)]
    assert rates == pytest.approx([0.1, 0.1, 0.1, 0.08, 0.04, 0])


def test_the_tries_of_today_have_settings_and_predictions():
    for tried in search.TRIES.values():
        assert 0 < tried.predicted < 1
        assert search.make_trial("it", tried, 3, "photos").settings().seed == 3
