"""A run's plan: it is what the run then does, and nothing is written."""

import re
from pathlib import Path

import pytest
import torch

import empssl
from empssl import main
from empssl_support.plan import human_bytes
from recipes import SHAPES, TINY, plain_folder

pytestmark = pytest.mark.usefixtures("in_tmp", "short_runs")


def planned(words, capsys):
    """The plan's lines, by what they are of."""
    capsys.readouterr()
    before = sorted(map(str, Path().rglob("*")))
    assert main([*words, "--plan"]) == {}
    assert sorted(map(str, Path().rglob("*"))) == before
    head, *lines = capsys.readouterr().out.splitlines()
    assert head == "the plan of a run, preset laptop on cpu, float32" and len(lines) == 5
    return {line.split()[0]: line for line in lines}


def megabytes(words, line):
    return float(re.search(rf"([\d.,]+) MB {words}", line).group(1).replace(",", ""))


def test_the_plan_is_what_the_run_does(capsys):
    words = [*SHAPES, "--subset", "50", "--epochs", "3", "--hidden", "512", "--projector", "512"]
    plan = planned([*words, "--export-features", "own.npz"], capsys)
    assert "shapes: 50 images of 32x32, of 10 classes, and 40 to test" in plan["data"]
    assert "enough for a batch of 20" in plan["data"]
    assert "3 x 2 steps of 20 images and 3 patches of each" in plan["training"]
    assert "10 images of an epoch left out" in plan["training"]
    assert "the probes come on top" in plan["time"] and "decode" not in plan["time"]
    assert "in training" in plan["memory"] and "this machine has" in plan["memory"]

    record = main([*words, "--name", "demo", "--export-features", "own.npz"])
    assert f"{record['patches_seen']:,} patches of 16x16" in plan["training"]
    checkpoint = megabytes("for each of two checkpoints", plan["disk"])
    assert checkpoint == pytest.approx(record["checkpoint_bytes"] / 1e6, rel=0.05)
    encoder = Path("runs/demo/encoder.pt").stat().st_size
    assert megabytes("for the encoder", plan["disk"]) == pytest.approx(encoder / 1e6, rel=0.05)
    exported = Path("own.npz").stat().st_size / 1e6
    assert megabytes("for own.npz as .npz", plan["disk"]) == pytest.approx(exported, abs=0.07)
    kept = megabytes("more for the features", plan["memory"])
    assert kept == pytest.approx(90 * 512 * 4 * 5 / 1e6, abs=0.06)  # a bag and four quadrants


@pytest.mark.parametrize("optimizer,moments", [("sgd", 1), ("adamw", 2)])
def test_checkpoints_hold_the_optimizers_state(optimizer, moments, capsys):
    words = [*SHAPES, "--hidden", "512", "--projector", "512", "--optimizer", optimizer]
    plan = planned(words, capsys)
    record = main([*words, "--name", "demo"])
    checkpoint = megabytes("for each of two checkpoints", plan["disk"])
    assert checkpoint == pytest.approx(record["checkpoint_bytes"] / 1e6, rel=0.05)
    encoder = megabytes("for the encoder", plan["disk"])
    assert checkpoint == pytest.approx((1 + moments) * encoder, rel=0.1)


def test_ten_steps_are_timed_and_the_images_embedded(monkeypatch, capsys):
    calls, train = [], empssl.train

    def watched(encoder, images, config, *rest):
        train(encoder, images, config, *rest)
        calls.append((len(images), config.epochs))
        return {"train_seconds": 25.0}  # for ten steps

    monkeypatch.setattr(empssl, "train", watched)
    plan = planned([*SHAPES, "--epochs", "100"], capsys)
    assert calls == [(2 * 20, 1), (10 * 20, 1)]
    assert "10 steps on noise took 2.5 s each" in plan["time"]
    assert "about 12 min of training" in plan["time"]  # 300 steps


def test_a_folder_is_counted_and_not_decoded(in_tmp, capsys):
    plain_folder(in_tmp / "photos", 30)
    (in_tmp / "photos" / "notes.txt").touch()
    words = ["--dataset", "imagefolder", "--data-dir", "photos", *TINY]
    plan = planned(words, capsys)
    assert "imagefolder in photos: 30 images of 32x32, without labels" in plan["data"]
    assert "to decode them, once" in plan["time"] and "probes" not in plan["time"]
    pixels = 30 * 3 * 32 * 32 / 1e6
    assert megabytes("for the decoded images", plan["disk"]) == pytest.approx(pixels, abs=0.06)
    main([*words, "--name", "photos"])
    assert "decode" not in str(planned(words, capsys))


@pytest.mark.parametrize(
    "images,said",
    [
        (1, "There is a single training image, and nothing to tell it apart from"),
        (19, "--batch 20 is larger than the data set's 19 training images"),
    ],
)
def test_too_few_images_for_a_batch_are_a_sentence(images, said, in_tmp, capsys):
    plain_folder(in_tmp / "photos", images)
    with pytest.raises(SystemExit) as stop:
        main(["--dataset", "imagefolder", "--data-dir", "photos", *TINY, "--plan"])
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert said in error
    assert [path.name for path in in_tmp.iterdir()] == ["photos"]


def test_a_schedule_and_other_methods_have_plans(capsys):
    from study.baselines import main as baselines

    plan = planned([*SHAPES, "--size-schedule", "8:0.5,16:0.5"], capsys)
    assert "patches of 8x8, then 16x16 in all" in plan["training"]
    words = [*SHAPES, "--method", "supervised", "--patches", "1", "--augmentation", "light"]
    assert baselines([*words, "--plan"]) == {} and not Path("runs").exists()
    assert "3 steps of 20 images and 1 patches" in capsys.readouterr().out


@pytest.mark.parametrize(
    "count,said", [(0, "0.0 MB"), (1_260_000, "1.3 MB"), (9.9e9, "9,900 MB"), (2.5e10, "25 GB")]
)
def test_bytes_in_a_unit_that_can_be_read(count, said):
    assert human_bytes(count) == said


def test_a_plan_leaves_the_random_numbers_of_others_alone(capsys):
    before = torch.get_rng_state()
    planned(SHAPES, capsys)
    assert torch.equal(torch.get_rng_state(), before)
