"""What the project says of itself: the README's commands, code, tables, pictures and links."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import empssl
from empssl_support.cli import parse_flags
from empssl_support.data import DATASETS
from empssl_support.files import save_encoder
from empssl_support.settings import resumed_settings
from study.experiments import tables

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]


def blocks(language, pages=PAGES):
    """The code blocks of that language, and those of commands where it is empty."""
    text = "\n".join(page.read_text() for page in pages)
    found = re.findall(r"^```(\w*)\n(.*?)^```$", text, re.S | re.M)
    return [code for its_language, code in found if its_language == language]


def commands(pages=PAGES):
    lines = [line for block in blocks("", pages) for line in block.splitlines()]
    without_comments = [line.split("#")[0].strip() for line in lines]
    return [command for command in without_comments if command]


def test_the_commands_parse():
    """Of README.md and docs/, whatever starts empssl.py."""
    words = [shlex.split(command) for command in commands()]
    words = [w[w.index("empssl.py") + 1 :] for w in words if "empssl.py" in w]
    assert len(words) >= 6
    for arguments in words:
        typed = parse_flags(empssl.Config, arguments, "")
        assert typed.get("dataset", "cifar10") in DATASETS and (typed or not arguments)
    assert all(c.split()[0] in ("python", "bash", "pip", "torchrun") for c in commands())


def test_reproduce_knows_the_commands_that_are_printed():
    script = (ROOT / "reproduce.sh").read_text()
    known = "|".join(re.findall(r"^([\w|-]+)\)$", script, re.M)).split("|")
    printed = [shlex.split(c)[2:] for c in commands() if c.startswith("bash reproduce.sh")]
    assert [] in printed and ["test"] in printed
    assert all(words == [] or words[0] in known for words in printed)
    assert all(f"bash reproduce.sh {name}" in script or name == "main" for name in ("main", "gpu"))


def test_reproduce_refuses_an_unknown_command():
    command = ["bash", ROOT / "reproduce.sh", "everything"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2 and "everything" in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_help_names_every_flag():
    done = subprocess.run(
        [sys.executable, ROOT / "empssl.py", "--help"], capture_output=True, text=True
    )
    assert done.returncode == 0
    for name in empssl.Config.__dataclass_fields__:
        assert "--" + name.replace("_", "-") in done.stdout


def test_the_readmes_encoder_loads_and_embeds(in_tmp):
    encoder = empssl.Encoder("small", 16, hidden=16, projector=16, dim=8)
    (in_tmp / "runs" / "photos").mkdir(parents=True)
    save_encoder(in_tmp / "runs" / "photos" / "encoder.pt", encoder)
    found = [block for block in blocks("python") if "empssl.load(" in block]
    assert len(found) == 2  # in README.md and docs/running.md
    for code in found:
        names = {"images": torch.randint(0, 256, (5, 3, 32, 32), dtype=torch.uint8)}
        exec(code, names)
        assert names["features"].shape == (5, 16)


def test_the_training_from_python_trains_and_probes(in_tmp, short_runs):
    (code,) = [block for block in blocks("python") if "empssl.train(" in block]
    names = {}
    exec(code, names)
    assert names["record"]["patches_seen"] == 50 * 8 and names["encoder"].image_size == 32
    assert 0 <= names["top1"] <= names["top5"] <= 1


def test_the_readmes_method_is_the_codes():
    """Its fifteen lines, run as printed on one batch, give the loss and gradient of empssl.py."""
    (code,) = [block for block in blocks("python") if "def coding_rate" in block]
    assert len([line for line in code.splitlines() if line.strip()]) <= 15
    b, n, s = 6, 4, 16
    images = torch.randint(0, 256, (b, 3, 32, 32), dtype=torch.uint8)
    names = {
        **{name: getattr(empssl, name) for name in ("Augmentation", "logdet_spd", "F", "torch")},
        **{name: getattr(empssl, name) for name in ("sample_patches", "extract_patches")},
        "encoder": empssl.Encoder("small", s, hidden=16, projector=16, dim=8),
        "batches": [torch.arange(b)],
        **{"images": images, "b": b, "n": n, "s": s, "image_size": (32, 32)},
    }
    exec(code, names)
    torch.testing.assert_close(names["loss"], empssl.empssl_loss(names["z"]))
    assert all(p.grad.isfinite().all() for p in names["encoder"].parameters())


def test_the_readmes_presets_are_the_codes():
    head, _, *rows = (
        re.search(r"^\| \| `--patches`.*?\n\n", README, re.S | re.M).group(0).splitlines()
    )
    names = [flag.replace("-", "_") for flag in re.findall(r"--([\w-]+)", head)]
    shown = [[cell.strip(" `") for cell in row.strip("| ").split("|")] for row in rows if row]
    laptop = empssl.PRESETS["laptop"]
    assert sorted(names) == sorted(laptop)
    paper = {name: str(getattr(empssl.Config(), name)) for name in names}
    paper["patch_size"] = "the image's"
    assert shown == [
        ["paper", *(paper[name] for name in names)],
        ["laptop", *(str(laptop[name]) for name in names)],
    ]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_and_pictures_are_there(page):
    found = re.findall(r"\]\(([^)#]+)\)", page.read_text())
    assert all((page.parent / link).exists() for link in found if not link.startswith("http"))


def test_what_the_pages_name_is_there():
    """Functions and classes in the README's table, files in CONTRIBUTING.md's."""
    named = re.search(r"\| to find in `empssl.py`.*?\n\n", README, re.S).group(0)
    names = [name for name in re.findall(r"`(\w+)`", named) if name != "empssl"]
    assert len(names) > 10 and all(hasattr(empssl, name) for name in names)
    text = (ROOT / "CONTRIBUTING.md").read_text()
    files = re.findall(r"`((?:\w+/)+[\w.]*)`", text) + re.findall(r"`(\w+\.py)`", text)
    places = [ROOT, ROOT / "tests"]
    assert all(any((place / file).exists() for place in places) for file in files), files


def test_the_readmes_tables_are_those_of_the_records():
    assert tables.with_tables(README) == README


def test_what_cannot_be_resumed_is_not_promised():
    """The flags that docs/running.md lets change beside --resume are those that may."""
    page = " ".join((ROOT / "docs" / "running.md").read_text().split())
    sentence = re.search(r"((?:`--[\w-]+`(?:, | and )?)+) may change", page).group(1)
    fields = [flag[2:].replace("-", "_") for flag in re.findall(r"--[\w-]+", sentence)]
    for name in empssl.Config.__dataclass_fields__:
        if name in fields or name == "resume":
            continue
        with pytest.raises(ValueError, match="leave --"):
            resumed_settings(empssl.Config, {"resume": "runs/none", name: 1})
    for name in fields:
        with pytest.raises(ValueError, match="There is no run"):
            resumed_settings(empssl.Config, {"resume": "runs/none", name: 1})
