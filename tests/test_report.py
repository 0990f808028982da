"""A run as a page."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import empssl
from empssl import main
from empssl_support import report
from empssl_support.cli import UsageError
from recipes import SHAPES, TINY, plain_folder

pytest.importorskip("matplotlib")
pytest.importorskip("sklearn")
pytestmark = pytest.mark.usefixtures("in_tmp", "short_runs")


def test_a_page_with_its_pictures_inside(capsys):
    record = main([*SHAPES, "--epochs", "2", "--name", "demo"])
    assert main(["--report", "runs/demo"]) == {}
    assert "runs/demo/report.html" in capsys.readouterr().out
    for name in ("patches", "curves", "map"):
        with Image.open(f"runs/demo/{name}.png") as picture:
            assert min(picture.size) > 200
            assert len(picture.convert("L").getcolors()) > 20  # it was drawn on
    page = Path("runs/demo/report.html").read_text()
    assert page.count("data:image/png;base64,") == 3 and "360 patches" in page
    assert f"{record['linear_top1']:.3f}" in page and f"{record['untrained_knn_top1']:.3f}" in page
    # Nothing is fetched: every address is of the page itself.
    assert not re.findall(r"(?:src|href)=\"(?!data:)", page)


def test_images_without_labels_have_a_page_too(in_tmp):
    plain_folder(in_tmp / "plain")
    main(["--dataset", "imagefolder", "--data-dir", "plain", *TINY, "--name", "plain"])
    report.write(Path("runs/plain"))
    assert Path("runs/plain/report.html").read_text().count("data:image/png") == 2


def test_where_there_is_nothing_to_show():
    Path("runs/empty").mkdir(parents=True)
    for run in ("runs/empty", "runs/nothing"):
        with pytest.raises(UsageError, match=run):
            report.write(Path(run))
    (Path("runs/empty") / "config.json").write_text(json.dumps({}))
    with pytest.raises(UsageError, match="runs/empty"):
        report.write(Path("runs/empty"))


def test_the_patches_that_are_kept_are_drawn_as_the_method_draws_them():
    main([*SHAPES, "--name", "demo"])
    saved = np.load("runs/demo/patches.npz")
    data = empssl.load_dataset("shapes", subset=60)
    some = torch.randperm(60, generator=empssl.generator(0, "report", 0))[:6]
    assert np.array_equal(saved["images"], data.train_images[some])
    config = empssl.Config(augmentation="light")
    augmentation = empssl.training_augmentation(config, (32, 32))
    chance = empssl.generator(0, "report", 1)
    params = empssl.sample_patches(6, 12, (32, 32), augmentation, chance)
    x = empssl.extract_patches(data.train_images, some, params, 16).view(12, 6, 3, 16, 16)
    assert np.abs(saved["patches"] / 127.5 - 1 - x.numpy()).max() < 1 / 127
