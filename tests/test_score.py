"""A score without labels, and the warning that an encoder has collapsed."""

import math

import pytest
import torch

import empssl
from empssl import effective_rank, main, neighbours_kept
from recipes import SHAPES, small_encoder

whole_runs = pytest.mark.usefixtures("in_tmp", "short_runs")

# 60 images in batches of 20, four epochs: 12 steps, an epoch's end at 3, 6, 9 and 12.
RUN = [*SHAPES, "--epochs", "4"]


# ---- the two numbers ----


def orthogonal(N):
    return torch.linalg.qr(torch.randn(N, N))[0]


@pytest.mark.parametrize("N,d", [(30, 8), (8, 30)])
def test_the_effective_rank_is_the_formulas(N, d):
    """From singular values that are known, not centred, to their own sum."""
    sigma = torch.linspace(3, 0.1, 8)
    h = 50 * orthogonal(N)[:, :8] @ torch.diag(sigma) @ orthogonal(d)[:8]
    p = (sigma / sigma.sum()).double() + 1e-7
    assert effective_rank(h) == pytest.approx(math.exp(-(p * p.log()).sum()), rel=1e-4)


def test_the_effective_rank_of_equal_and_of_one_and_of_no_directions():
    for k in (1, 5, 20):
        assert effective_rank(orthogonal(20)[:, :k]) == pytest.approx(k, rel=1e-4)
    same = torch.rand(1, 40).expand(30, 40)  # a collapsed encoder: a mean, and nothing beside it
    assert effective_rank(same) == pytest.approx(1, abs=1e-3)
    assert effective_rank(torch.zeros(5, 4)) == pytest.approx(1, abs=1e-4)
    assert math.isnan(effective_rank(torch.tensor([[1.0, math.nan]])))
    assert effective_rank(orthogonal(8).bfloat16()) == pytest.approx(8, rel=1e-2)


def on_a_circle(degrees):
    angle = torch.tensor(degrees).deg2rad()
    return torch.stack([angle.cos(), angle.sin()], 1)


def test_neighbours_kept_by_hand():
    """Two of five images change places: whose nearest two are the same two, and whose one."""
    h = on_a_circle([0.0, 10.0, 21.0, 90.0, 102.0])
    assert neighbours_kept(h, h, k=2) == 1
    moved = on_a_circle([0.0, 10.0, 90.0, 21.0, 102.0])
    # Of 0: {1, 2} and {1, 3}. Of 1: {0, 2}, {0, 3}. Of 2: {1, 0}, {4, 3}. Of 3: {4, 2}, {1, 0}.
    # Of 4: {3, 2} and {2, 3}. In common: 1, 1, 0, 0 and 2 of 2.
    assert neighbours_kept(h, moved, k=2) == pytest.approx(4 / 10)
    # Nearest by angle, however long; and not an image itself, though it is the nearest of all.
    lengths = torch.tensor([[1.0], [9.0], [0.1], [3.0], [7.0]])
    assert neighbours_kept(h, lengths * h, k=2) == 1
    assert neighbours_kept(h, moved, k=1) == pytest.approx(2 / 5)
    # Of four others at most, all are among the ten nearest.
    assert neighbours_kept(h, moved) == 1


def test_neighbours_kept_are_few_by_chance():
    h1, h2 = torch.randn(401, 20), torch.randn(401, 20)
    assert neighbours_kept(h1, h2) == pytest.approx(10 / 400, abs=0.01)
    assert 0.5 < neighbours_kept(h1, h1 + 0.1 * torch.randn(401, 20)) < 1
    assert neighbours_kept(h1, h2) == neighbours_kept(h2, h1)


def test_the_score_is_of_few_images_and_of_training_patches(monkeypatch):
    config = empssl.Config(device="cpu", precision="float32", augmentation="light")
    images = torch.randint(0, 256, (2100, 3, 2, 2), dtype=torch.uint8)
    calls = []

    def embedded(_, some, **how):
        calls.append((some, how))
        return torch.randn(len(some), 12)

    monkeypatch.setattr(empssl, "embed", embedded)
    assert set(empssl.score(small_encoder(), images, config)) == {
        "effective_rank",
        "neighbours_kept",
    }
    assert [len(some) for some, _ in calls] == [1024, 1024, 2048]
    assert all(torch.equal(some, calls[2][0][: len(some)]) for some, _ in calls)
    assert len({x.numpy().tobytes() for x in calls[2][0]}) > 2000
    first, second, grid = (how for _, how in calls)
    drawn = empssl.training_augmentation(config, (2, 2))
    assert first["augmentation"] == second["augmentation"] == drawn
    assert first["seed"] != second["seed"] and "augmentation" not in grid
    assert all(how["patches"] == 4 for _, how in calls)


# ---- a batch that collapses ----


class Falling(empssl.Objective):
    """The R that it reports, by the step; the least that R can be is 2.704 in these runs."""

    def forward(self, z, x, index):
        loss, terms = super().forward(z, x, index)
        self.calls = getattr(self, "calls", 0) + 1
        return loss, terms | {"R": torch.tensor(self.reported[self.calls - 1])}


@whole_runs
@pytest.mark.parametrize(
    "reported,warned",
    [
        ([7.0, 2.97, 2.71, 2.7], 6),  # within a tenth: steps 3, 6, 9, 10 and 12 are looked at
        ([7.0, 2.98, 3.0, 2.8], 10),
        ([7.0, 2.98, 2.98, 2.98], None),
    ],
)
def test_a_collapse_is_said_once(reported, warned, monkeypatch, capsys):
    assert empssl.collapsed_rate(8, 0.036) == pytest.approx(2.704, abs=1e-3)
    Falling.reported = [r for r in reported for _ in range(3)]
    monkeypatch.setattr(empssl, "Objective", Falling)
    main([*RUN, "--eps2", "0.036", "--name", "falling"])
    said = [line for line in capsys.readouterr().out.splitlines() if "warning" in line]
    assert len(said) == (warned is not None)
    if warned:
        R = Falling.reported[warned - 1]
        assert f"at step {warned} R is {R:.2f}, and 2.70 where" in said[0]


@whole_runs
def test_a_run_that_does_not_collapse_and_a_batch_of_one_are_not_warned_of(capsys):
    main([*RUN, "--lam", "1", "--name", "usual"])
    main([*SHAPES, "--subset", "3", "--batch", "1", "--eval-patches", "1", "--name", "one"])
    assert "warning" not in capsys.readouterr().out
