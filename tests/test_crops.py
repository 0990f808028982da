"""What to probe of an encoder: crops, mirror images, layers."""

import functools

import pytest
import torch

import empssl
from recipes import small_encoder
from study.experiments import crops, records, trials

NAMES = [
    "4 crops",
    "9 crops",
    "16 crops",
    "25 crops",
    "16 crops and their mirror images",
    "16 crops, the last convolution",
    "16 crops, both layers side by side",
]


@pytest.fixture
def found():
    torch.manual_seed(0)
    encoder = small_encoder(hidden=12)
    encoder(torch.randn(64, 3, 16, 16))  # BatchNorm statistics of some kind
    images = torch.randint(0, 256, (5, 3, 32, 32), dtype=torch.uint8)
    ways = {name: h for name, _, h in crops.ways_to_probe(encoder, images, "float32")}
    return encoder, images, ways


def test_each_way_is_what_its_name_says(found):
    encoder, images, ways = found
    assert list(ways) == NAMES
    for count in (4, 9, 16, 25):
        assert torch.equal(ways[f"{count} crops"], empssl.embed(encoder, images, count))
    convolutions = ways["16 crops, the last convolution"]
    params = empssl.grid_patches(5, 16, (32, 32))
    x = empssl.extract_patches(images, torch.arange(5), params, 16)
    with torch.no_grad():
        wanted = encoder.backbone(x).unflatten(0, (16, 5)).mean(0)
    torch.testing.assert_close(convolutions, wanted)
    both = ways["16 crops, both layers side by side"]
    assert torch.equal(both, torch.cat([ways["16 crops"], convolutions], 1))


def test_with_mirror_images_left_and_right_are_the_same(found):
    encoder, images, ways = found
    mirrored = [h for _, _, h in crops.ways_to_probe(encoder, images.flip(3), "float32")]
    name = "16 crops and their mirror images"
    torch.testing.assert_close(mirrored[NAMES.index(name)], ways[name])
    assert not torch.allclose(mirrored[NAMES.index("16 crops")], ways["16 crops"])


@pytest.fixture
def few(in_tmp, monkeypatch):
    """Small trainings on few images: `shapes`."""
    monkeypatch.setattr(records, "RESULTS", in_tmp / "results")
    monkeypatch.setattr(crops, "IMAGES", 40)
    monkeypatch.setattr(crops, "holdout", functools.partial(trials.holdout, test=20))
    shapes = empssl.load_dataset("shapes", subset=300)
    monkeypatch.setattr(crops, "load_dataset", lambda *_: shapes)
    flags = "--patches 2 --batch 20 --hidden 16 --projector 16 --dim 8 --precision float32"
    trials_of = crops.trials_of

    def small(*how):
        return [t._replace(flags=f"{t.flags} {flags}") for t in trials_of(*how)]

    monkeypatch.setattr(crops, "trials_of", small)
    return shapes


def test_each_way_is_probed_on_held_out_images(few, monkeypatch):
    probe = functools.partial(empssl.linear_probe, epochs=1)
    monkeypatch.setattr(empssl, "linear_probe", probe)
    crops.main(["--seeds", "2"])
    kept = records.read("crops")
    made = [(record["name"], record["seed"]) for record in kept]
    assert made == [("crops", 0), ("crops", 1), ("rates", 0), ("rates", 1)]
    for record in kept[:2]:
        assert record["metrics"]["patches_seen"] == 3 * 40 * 2
        rows = record["metrics"]["rows"]
        assert [row["what"] for row in rows] == NAMES
        assert [row["crops"] for row in rows] == [4, 9, 16, 25, 32, 16, 16]
        assert all(0 <= row[key] <= 1 for row in rows for key in ("linear_top1", "knn_top1"))


def test_bag_and_quadrants_are_probed_at_each_rate(few, monkeypatch):
    given = []

    def linear_probe(h, y, test_h, test_y, lr):
        given.append((len(y), len(test_y), h.shape[1], test_h.shape[1], lr))
        return len(given) / 100, 1.0

    monkeypatch.setattr(empssl, "linear_probe", linear_probe)
    (trial,) = crops.trials_of("rates", "", 1)
    metrics = crops.make_rates(trial, few)
    widths = {"bag": 16, "quadrants": 64}
    wanted = [(what, lr) for what in widths for lr in (0.03, 0.01, 0.003, 0.001)]
    assert given == [(40, 20, widths[what], widths[what], lr) for what, lr in wanted]
    assert [(row["what"], row["lr"]) for row in metrics["rows"]] == wanted
    assert [row["linear_top1"] for row in metrics["rows"]] == [i / 100 for i in range(1, 9)]
