"""What the project says of itself: the README's commands and tables, its pictures, the file that is read."""

import dataclasses
import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

import baselines
import empssl
import empssl_io as io
import report

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```$", README, re.S | re.M)            # (language, text)
COMMANDS = [line.split("#")[0].strip() for language, block in BLOCKS if not language for line in block.splitlines()]


def test_the_readmes_commands_parse(in_tmp):
    python = [shlex.split(c) for c in COMMANDS if c.startswith("python empssl.py")]
    python += [["python", *shlex.split(c)[2:]] for c in COMMANDS if c.startswith("torchrun")]
    assert len(python) >= 6
    for command in python:
        if "--resume" in command:
            io.RunFolder(command[-1], dataclasses.asdict(empssl.Config()))
        config = io.parse_flags(empssl.Config, command[2:], "")
        assert config.dataset in io.DATASETS
    scripts = [c for c in COMMANDS if c.startswith("bash reproduce.sh")]
    assert scripts == ["bash reproduce.sh", "bash reproduce.sh test"]
    known = re.findall(r"^([\w|-]+)\)$", (ROOT / "reproduce.sh").read_text(), re.M)
    assert known == ["main", "test|test-long", "cifar10|cifar100|tinyimagenet|imagenet100|transfer|ablation|peers", "laptop", "speed",
                     "figures", "all", "gpu"]
    assert all(c.split()[0] in ("python", "bash", "pip", "torchrun") for c in COMMANDS)


def test_reproduce_refuses_an_unknown_command():
    done = subprocess.run(["bash", ROOT / "reproduce.sh", "everything"], capture_output=True, text=True)
    assert done.returncode == 2 and "everything" in done.stderr and len(done.stderr.splitlines()) == 1


def test_the_readmes_python_runs(in_tmp):
    """The five lines that load an encoder, as printed."""
    encoder = empssl.Encoder("small", 16, hidden=16, projector=16, dim=8)
    (in_tmp / "runs" / "photos").mkdir(parents=True)
    io.save_encoder(in_tmp / "runs" / "photos" / "encoder.pt", encoder)
    (code,) = [block for language, block in BLOCKS if language == "python"]
    assert len(code.splitlines()) == 5
    names = {"images": io.load_dataset("shapes").test_images[:5]}
    exec(code, names)
    assert names["features"].shape == (5, 16)


def test_the_readmes_tables_are_those_of_the_records():
    assert report.readme_with_tables(README) == README


def test_the_readmes_pictures_and_links_are_there():
    found = [target for target in re.findall(r"\]\(([^)]+)\)", README) if not target.startswith("http")]
    assert len(found) > 2 and all((ROOT / target).exists() for target in found)


def test_the_laptops_story_is_that_of_the_records():
    story = (ROOT / "results" / "laptop" / "README.md").read_text()
    assert story == report.laptop_story(), "run: python report.py --readme"
    assert all(f"| {t['try']} |" in story for name in ("tries", "maps") for t in json.loads((ROOT / f"results/laptop/{name}.json").read_text())["tries"])


def test_the_readmes_presets_are_the_codes():
    for name in empssl.PRESETS["fast"]:
        row = re.search(rf"^\| `--{name.replace('_', '-')}`[^|]*\| ([^|]*) \| ([^|]*) \| ([^|]*) \|$", README, re.M)
        assert row and row.groups() == tuple(str(preset.get(name, {"patch_size": "the image, 32 for Tiny ImageNet"}.get(name, False)))
                                            for preset in empssl.PRESETS.values()), name


@pytest.mark.parametrize("path", sorted((ROOT / "results").glob("*.json")), ids=lambda p: p.stem)
def test_each_record_says_where_it_comes_from(path):
    record = json.loads(path.read_text())
    assert record["command"].startswith("python empssl.py") and re.match(r"[0-9a-f]{40}", record["commit"])
    for key in ("versions", "hardware", "seed", "metrics"):
        assert key in record


def test_the_file_that_is_read_stays_short():
    assert len((ROOT / "empssl.py").read_text().splitlines()) <= 760


def test_help_names_every_field():
    done = subprocess.run([sys.executable, ROOT / "empssl.py", "--help"], capture_output=True, text=True)
    assert done.returncode == 0
    for name in empssl.Config.__dataclass_fields__:
        assert "--" + name.replace("_", "-") in done.stdout


def test_pictures(in_tmp, capsys):
    pytest.importorskip("matplotlib")
    pytest.importorskip("sklearn")
    from PIL import Image

    empssl.main(["--dataset", "shapes", "--subset", "60", "--patches", "2", "--batch", "20", "--hidden", "16", "--projector", "16", "--dim", "8",
                 "--eval-patches", "1", "--preset", "laptop", "--device", "cpu", "--name", "demo"])
    report.main(["runs/demo"])
    for name in ("patches", "curves", "tsne"):
        with Image.open(f"runs/demo/{name}.png") as picture:
            assert min(picture.size) > 200 and len(picture.convert("L").getcolors()) > 20       # drawn on
    with pytest.raises(io.UsageError, match="runs/nothing"):
        report.main(["runs/nothing"])


def test_a_kept_record_fills_the_table(in_tmp, monkeypatch):
    monkeypatch.setattr(report, "RESULTS", in_tmp / "results")
    run = in_tmp / "runs" / "one"
    run.mkdir(parents=True)
    (run / "config.json").write_text(json.dumps(dict(dataset="imagefolder", data_dir="data/birds", preset="laptop", epochs=1,
                                                     hardware="abacus", seed=3)))
    (run / "metrics.jsonl").write_text(json.dumps(dict(linear_top1=0.5, knn_top1=0.4, untrained_top1=0.3, raw_pixels_top1=0.2,
                                                       patches_seen=1000, train_seconds=9.0, probe_seconds=3.0, peak_memory=2 ** 31)) + "\n")
    report.main(["--record", str(run)])
    assert report.runs_table().splitlines()[-1] == ("| birds | laptop | 1 | 1,000 | 9 s | 3 s | 2.0 GiB | 0.500 | not measured | 0.400 | 0.300 "
                                                    "| 0.200 | abacus | 3 | [one](results/one.json) |")
    (run / "metrics.jsonl").write_text(json.dumps(dict(linear_top1=0.5)) + "\n{")      # probed alone; a line cut short
    with pytest.raises(io.UsageError, match="only probed"):
        report.main(["--record", str(run)])


def test_seeds_of_a_recipe_are_one_row(in_tmp, monkeypatch):
    monkeypatch.setattr(report, "RESULTS", in_tmp / "results")
    (in_tmp / "results" / "laptop").mkdir(parents=True)
    for seed, linear in ((0, 0.70), (1, 0.74)):
        metrics = dict(linear_top1=linear, representation_top1=0.6, knn_top1=0.4, untrained_top1=0.3, raw_pixels_top1=0.2, patches_seen=1000,
                       train_seconds=9.0 + seed, probe_seconds=3.0, peak_memory=2 ** (31 + seed))
        record = dict(dataset="shapes", preset="laptop", method="supervised", epochs=2, hardware="abacus", seed=seed, metrics=metrics)
        (in_tmp / "results" / "laptop" / f"two-seed{seed}.json").write_text(json.dumps(record))
    (in_tmp / "results" / "laptop" / "a-try.json").write_text("{}")
    assert report.runs_table().splitlines()[2:] == [
        "| shapes | laptop, all labels | 2 | 1,000 | 10 s | 3 s | 4.0 GiB | 0.720 ± 0.020 | 0.600 ± 0.000 | 0.400 ± 0.000 | 0.300 ± 0.000 "
        "| 0.200 ± 0.000 | abacus | 0, 1 | [two](results/laptop/two-seed0.json), [1](results/laptop/two-seed1.json) |"]


def test_the_patches_in_a_picture_are_drawn_as_the_method_draws_them(monkeypatch):
    class Drawn(Exception):
        pass

    def sample_patches(rows, columns, size, augmentation, generator):
        raise Drawn(columns, augmentation)
    monkeypatch.setattr(empssl, "sample_patches", sample_patches)
    config, data = baselines.Config(method="byol", augmentation="byol", patch_size=16), io.load_dataset("shapes")
    with pytest.raises(Drawn) as drawn:
        report.draw_patches(None, dataclasses.asdict(config), data, None)
    assert drawn.value.args == (12, baselines.views(config, 32, 32) * 6)
    with pytest.raises(Drawn) as drawn:
        report.draw_patches(None, dataclasses.asdict(empssl.Config(augmentation="light", patch_size=16)), data, None)
    assert drawn.value.args == (12, empssl.augmentations(empssl.Config(augmentation="light"), 32, 32)[0])
