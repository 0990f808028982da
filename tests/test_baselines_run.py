"""The baselines' trainings: what is learned, resumed, refused, and added to."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import empssl
from empssl_support.cli import UsageError, signals
from empssl_support.runs import Run
from study import baselines

ROOT = Path(__file__).parent.parent
METHODS = ("simclr", "vicreg", "byol", "swav", "ressl", "single")
SHAPES = "--dataset shapes --preset laptop --device cpu --precision float32"
# 60 images in batches of 20: 3 steps an epoch.
RUN = f"{SHAPES} --subset 60 --batch 20 --hidden 16 --projector 16 --dim 8 --eval-patches 1".split()


def config(method, flags=""):
    small = "--batch 32 --hidden 32 --projector 32 --dim 16 --others 20"
    return baselines.settings(f"{SHAPES} {small} --method {method} {flags}".split())


def weights(name):
    return torch.load(f"runs/{name}/encoder.pt", weights_only=True)["weights"]


def assert_equal(ours, theirs):
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        same = torch.equal(ours[name], value) if torch.is_tensor(value) else ours[name] == value
        assert same, name


# ---- trainings ----


@pytest.mark.parametrize("name", ["byol", "swav"])
def test_training_moves_what_the_objective_learns(name, data):
    c = config(name)
    encoder, augmentation, objective = baselines.method(c, data)
    learned = [p for p in objective.parameters() if p.requires_grad and p.ndim == 2]
    before = [F.normalize(p.detach().clone(), dim=-1) for p in learned]
    empssl.train(encoder, data.train_images, c, augmentation, objective)
    assert learned
    for p, was in zip(learned, before, strict=True):
        assert (F.normalize(p, dim=-1) - was).abs().max() > 1e-5


@pytest.mark.parametrize("name", METHODS)
def test_ten_steps_lower_the_objective(name, data):
    c = config(name, "--cutmix 0")
    encoder, augmentation, objective = baselines.method(c, data)
    index = torch.arange(32)
    chance = torch.Generator().manual_seed(0)
    params = empssl.sample_patches(32, c.patches, (32, 32), augmentation, chance)
    x = empssl.extract_patches(data.train_images, index, params, 16)
    optimizer = torch.optim.SGD(
        [*encoder.parameters(), *objective.parameters()], lr=0.02, momentum=0.9
    )
    if name == "ressl":
        objective.queue = F.normalize(torch.randn(64, 16), dim=1)
    losses = []
    for _ in range(11):
        loss, _ = objective(encoder.train()(x).unflatten(0, (c.patches, 32)), x, index)
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < losses[0]
    for p in objective.parameters():
        assert not p.requires_grad or p.grad.abs().sum() > 0


@pytest.mark.parametrize(
    "flags",
    [
        "single",
        "single --bank-start random --bank-update average",
        "simclr --negatives 2 --noise 0.1",
        "byol",
        "swav",
        "ressl",
    ],
)
def test_a_stopped_run_goes_on_to_the_same_weights(flags, in_tmp, short_runs, monkeypatch):
    run = ["--method", *flags.split(), *RUN, "--epochs", "2"]
    whole = baselines.main([*run, "--name", "whole"])
    after_step = Run.after_step

    def hear_a_signal(run, t, loss, terms):
        if t + 1 == 4:
            signals.hear(signal.SIGTERM, None)
        after_step(run, t, loss, terms)

    with monkeypatch.context() as patch:
        patch.setattr(Run, "after_step", hear_a_signal)
        with pytest.raises(SystemExit) as stop:
            baselines.main([*run, "--name", "stopped"])
    assert stop.value.code == 128 + signal.SIGTERM
    with pytest.raises(SystemExit):  # it is no run of empssl.py
        empssl.main(["--resume", "runs/stopped"])
    resumed = baselines.main(["--resume", "runs/stopped"])
    assert resumed["linear_top1"] == whole["linear_top1"] and {"R", "D"} <= resumed.keys()
    ours, theirs = (
        torch.load(f"runs/{name}/checkpoint.pt", weights_only=True) for name in ("stopped", "whole")
    )
    assert_equal(ours["encoder"], theirs["encoder"])
    assert_equal(ours["objective"], theirs["objective"])


def test_empssl_here_is_empssl_itself(in_tmp, short_runs):
    baselines.main([*RUN, "--patches", "2", "--method", "empssl", "--name", "here"])
    empssl.main([*RUN, "--patches", "2", "--name", "there"])
    assert_equal(weights("here"), weights("there"))


MISTAKES = {
    "--method byol --patches 4": "sees 2 views",
    "--method single --augmentation ressl": "sees 1; choose another",
    "--method byol --augmentation light --crops published": "leave it or --crops published out",
    "--method byol --augmentation noise": "are SimCLR's",
    "--method byol --noise 0.1": "are SimCLR's",
    "--method swav --negatives 2": "are SimCLR's",
    "--method vicreg --batch 1": "give at least 2",
    "--method simclr --negatives -1": "must be at least 0",
    "--method empssl --patches 1": "at least 2",
    "--warm-last-stage nothing.pt": "There is no checkpoint nothing.pt",
    "--warm-last-stage nothing.pt --drop-last-stage": "give one of them",
}


@pytest.mark.parametrize("flags", MISTAKES)
def test_mistakes_are_sentences(flags, in_tmp, short_runs, capsys):
    with pytest.raises(SystemExit) as stop:
        baselines.main([*RUN, *flags.split()])
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert stop.value.code == 2 and said.startswith("error: ") and MISTAKES[flags] in said


def test_they_run_in_one_process(data, monkeypatch):
    monkeypatch.setattr(baselines, "processes", lambda: 2)
    with pytest.raises(UsageError, match="in one process"):
        baselines.method(config("simclr"), data)
    baselines.method(config("empssl"), data)  # which may have several


def test_the_command(in_tmp):
    """`python -m study.baselines`, on a folder of images, and what it leaves."""
    for number, pixels in enumerate(torch.randint(256, (24, 32, 32, 3), dtype=torch.uint8)):
        Image.fromarray(pixels.numpy()).save(f"{number}.png")
    folder = ["--dataset", "imagefolder", "--data-dir", ".", "--subset", "24", "--name", "a"]
    ran = subprocess.run(
        [sys.executable, "-m", "study.baselines", "--method", "single", *RUN, *folder],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert ran.returncode == 0, ran.stderr
    assert "written to runs/a\ndrawing a page of the run\ndrawn: runs/a/report.html" in ran.stdout
    assert "RuntimeWarning" not in ran.stderr


# ---- a last stage ----


def test_a_last_stage_is_added_and_what_is_below_it_stays(in_tmp, short_runs, capsys, few_shapes):
    run = ["--method", "empssl", *RUN, "--patches", "2"]
    baselines.main([*run, "--drop-last-stage", "--name", "short"])
    add_to_it = ["--warm-last-stage", "runs/short/encoder.pt"]
    baselines.main([*run, *add_to_it, "--name", "warm"])
    short, warm = weights("short"), weights("warm")
    assert short["represent.0.weight"].shape == (16, 64)
    assert warm["represent.0.weight"].shape == (16, 256)
    below = [k for k in short if k.startswith("backbone.") and "batches" not in k]
    assert len(below) == 10
    assert_equal({k: warm[k] for k in below}, {k: short[k] for k in below})

    # All above has moved from where a run begins.
    stored = json.loads(Path("runs/warm/config.json").read_text())
    begun = empssl.Config(**{f.name: stored[f.name] for f in dataclasses.fields(empssl.Config)})
    fresh = empssl.new_encoder(begun, few_shapes[0][:60]).state_dict()
    matrices = [k for k in fresh if k.endswith(".weight") and fresh[k].ndim > 1]
    above = [k for k in matrices if k not in below]
    assert len(above) == 6 and not any(torch.equal(fresh[k], warm[k]) for k in above)

    for flags, sentence in (
        (["--warm-last-stage", "runs/warm/encoder.pt"], "is no encoder of --drop-last-stage"),
        ([*add_to_it, "--name", "short", "--force"], "--force would delete"),
    ):
        with pytest.raises(SystemExit) as stop:
            baselines.main([*run, *flags])
        assert stop.value.code == 2 and sentence in capsys.readouterr().err


# ---- the yardstick, and what is learned ----


def test_the_yardstick_needs_labels_and_has_a_class_for_each_output(in_tmp, short_runs, data):
    with pytest.raises(UsageError, match="labelled images"):
        baselines.method(config("supervised"), data._replace(train_labels=None))
    baselines.main(["--method", "supervised", *RUN, "--patches", "3", "--name", "a"])
    assert torch.load("runs/a/encoder.pt", weights_only=True)["architecture"]["dim"] == 10


SIMCLR = "simclr --subset 2000 --epochs 12 --batch 100"


@pytest.mark.slow
@pytest.mark.timeout(1800)  # a minute alone, many beside other work
@pytest.mark.parametrize(
    "flags,gain",
    [
        ("supervised --subset 1000 --epochs 12 --patches 4", 0.1),
        ("empssl --subset 2000 --patches 20 --augmentation paper --batch 50", 0.05),
        (f"{SIMCLR} --augmentation paper --negatives 1 --lr 0.15", 0.05),
        (f"{SIMCLR} --augmentation noise --noise 0.5", 0.1),
    ],
    ids=["supervised", "empssl", "one-negative", "noise-alone"],
)
def test_it_learns_more_than_the_untrained_encoder_has(flags, gain, in_tmp):
    run = [*SHAPES.split(), "--eval-patches", "4", "--method", *flags.split()]
    learned = baselines.main([*run, "--name", "learned"])
    untrained = baselines.main([*run, "--eval-only", "--name", "untrained"])
    assert learned["linear_top1"] > untrained["linear_top1"] + gain
