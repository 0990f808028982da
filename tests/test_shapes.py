"""The shapes drawn in memory: always the same, and hard to tell apart by raw pixels."""

import math

import pytest
import torch

from empssl_support.data import load_dataset
from empssl_support.shapes import OUTLINES, outlines, shapes


def test_shapes_say_little_in_their_raw_pixels():
    images, labels, test_images, test_labels = shapes()
    assert images.shape == (10_000, 3, 32, 32)
    assert test_images.shape == (2_000, 3, 32, 32)
    assert images.dtype == torch.uint8
    assert labels.bincount().tolist() == [1000] * 10
    assert test_labels.bincount().tolist() == [200] * 10
    means = [images[labels == c].float().mean((0, 2, 3)) for c in range(10)]
    # No class is brighter or of another colour.
    assert torch.stack(means).std(0).max() < 6


def test_the_data_set_is_these_shapes():
    data = load_dataset("shapes")
    for ours, theirs in zip(shapes(), data[:4], strict=True):
        assert torch.equal(ours, theirs)
    assert data.classes == list(OUTLINES)
    assert data.key == "shapes"
    assert data.files is None


def test_the_numbers_and_the_size_are_a_choice():
    images, labels, test_images, test_labels = shapes(train=30, test=20, size=16)
    assert images.shape == (30, 3, 16, 16)
    assert test_images.shape == (20, 3, 16, 16)
    assert labels.bincount().tolist() == [3] * 10
    assert test_labels.tolist() == list(range(10)) * 2


def test_a_few_literal_pixels():
    """Figures measured on these shapes stay comparable only while the shapes stay the same."""
    images, labels, test_images, _ = shapes(train=80, test=40)
    assert labels[:10].tolist() == [4, 0, 5, 1, 5, 9, 1, 6, 9, 7]
    # Processors round sines differently, so a pixel may differ by one.
    assert images[0, :, 10, 20].tolist() == pytest.approx([70, 83, 120], abs=1)
    assert images[1, :, 10, 20].tolist() == pytest.approx([212, 149, 169], abs=1)
    assert images[2, :, 10, 20].tolist() == pytest.approx([160, 189, 191], abs=1)
    assert test_images[0, :, 16, 16].tolist() == pytest.approx([131, 95, 78], abs=1)
    assert test_images[1, :, 16, 16].tolist() == pytest.approx([118, 107, 126], abs=1)
    assert images.float().mean().item() == pytest.approx(126.79, abs=0.01)


def test_drawing_leaves_the_callers_chance_alone():
    shapes.cache_clear()
    before = torch.get_rng_state()
    shapes(train=10, test=10)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.fixture
def inside():
    """Each outline on a fine grid, by name: `(side, side)` bool."""
    places = (torch.arange(400) + 0.5) / 200 - 1
    v, u = torch.meshgrid(places, places, indexing="ij")
    drawn = outlines(u.unsqueeze(0), v.unsqueeze(0)).squeeze(1)
    return dict(zip(OUTLINES, drawn, strict=True))


def test_areas_are_those_of_geometry(inside):
    """Of the square with sides of 2 that holds each outline."""
    areas = {
        "disc": math.pi * 0.9**2,
        "ring": math.pi * (0.95**2 - 0.6**2),
        "triangle": 3 * math.sqrt(3) * 0.5**2,  # by the circle inside it, of radius 0.5
        "square": 1.5**2,
        "cross": 2 * 1.9 * 0.5 - 0.5**2,  # two beams, which share their middle
        "bar": 2 * 0.5,
        "half-disc": math.pi / 2,
        "frame": 1.6**2 - 1.0**2,
    }
    for name, area in areas.items():
        assert 4 * inside[name].float().mean() == pytest.approx(area, rel=0.03), name


def test_a_star_has_five_arms_and_a_crescent_is_a_bitten_disc(inside):
    angle = torch.arange(720) * math.pi / 360
    circle = outlines(0.8 * angle.cos(), 0.8 * angle.sin())  # (10, 720)
    around = circle[OUTLINES.index("star")]
    assert (around != around.roll(1)).sum() == 10  # in and out, five times
    assert inside["star"][200, 200]
    crescent = inside["crescent"]
    assert not crescent[200, 300]
    assert crescent[200, 30]
    assert torch.equal(crescent, crescent.flip(0))


def test_no_two_outlines_are_alike(inside):
    for i, one in enumerate(OUTLINES):
        for other in OUTLINES[:i]:
            assert (inside[one] != inside[other]).float().mean() > 0.05, (one, other)
