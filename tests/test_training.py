"""The training loop: order, patches, encoder, loss, optimizer and schedule together."""

import math
import time

import numpy as np
import pytest
import torch

import empssl
from empssl import Augmentation, Config, Encoder, train
from empssl_support.runs import Run
from recipes import SHAPES, Watching, small_encoder, tiny_training

# Batches of 16 and a small trust keep rounding small: another number of threads changes 3e-5.
TEN_LOSSES = [-7.0830, -7.3711, -7.2944, -7.4717, -7.7118]
TEN_LOSSES += [-7.5048, -7.7167, -7.5985, -7.7730, -7.7245]


class Logging(Run):
    """A run without a folder, which keeps what it would log."""

    def __init__(self, at_epoch_end=None):
        super().__init__(at_epoch_end=at_epoch_end)
        self.lines = []

    def log(self, record):
        self.lines.append(record)


def trained(encoder, images, config, run=None):
    objective = Watching(config)
    result = train(encoder, images, config, Augmentation(), objective, run)
    return objective, result


def test_ten_literal_losses():
    """A change of order, patches, encoder, loss, optimizer or schedule shows here."""
    objective, _ = trained(*tiny_training(batch=16, eta=0.001))
    assert objective.losses == pytest.approx(TEN_LOSSES, rel=1e-3)


def test_one_step_by_hand():
    """The first step's weights from the public pieces alone, no setting its default."""
    settings = {"seed": 3, "eps2": 0.5, "eta": 0.05, "weight_decay": 0.1}
    encoder, images, config = tiny_training(steps=1, **settings)
    torch.manual_seed(5)
    ours = small_encoder()
    order = torch.randperm(len(images), generator=empssl.generator_of(3, "order", 0))[:8]
    chance = empssl.generator_of(3, "patches", 0)
    params = empssl.sample_patches(8, 3, (32, 32), Augmentation(), chance)
    z = ours(empssl.extract_patches(images, order, params, 16)).view(3, 8, 8)
    empssl.empssl_loss(z, config.lam, 0.5).backward()
    empssl.LARS(ours.parameters(), lr=config.lr, eta=0.05, weight_decay=0.1).step()
    train(encoder, images, config, Augmentation())
    for a, b in zip(encoder.parameters(), ours.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_two_runs_with_one_seed_end_in_equal_weights():
    weights = []
    for seed in (0, 0, 1):
        encoder, images, config = tiny_training(seed=seed)
        train(encoder, images, config, Augmentation())
        weights.append(torch.cat([p.detach().flatten() for p in encoder.parameters()]))
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])


@pytest.mark.parametrize("precision", ["float32", "bf16"])
def test_training_lowers_the_loss(precision):
    encoder, images, config = tiny_training(steps=4, epochs=8, precision=precision)
    objective, _ = trained(encoder, images, config)
    losses = objective.losses
    assert len(losses) == 32 and np.mean(losses[-4:]) < np.mean(losses[:4]) - 0.25
    assert objective.patches[0].dtype == empssl.dtype_of(precision)
    h, exact = (empssl.embed(encoder, images, 4, precision=how) for how in (precision, "float32"))
    alike = torch.nn.functional.cosine_similarity(h, exact).min()
    assert h.dtype == torch.float32 and alike > 0.99
    assert torch.equal(h, exact) == (precision == "float32")


def test_an_epoch_shows_every_image_once_and_the_cosine_ends_at_zero(monkeypatch):
    encoder, images, config = tiny_training(steps=5, epochs=2)
    rates, step = [], empssl.LARS.step

    def watched(optimizer):
        rates.append(optimizer.param_groups[0]["lr"])
        step(optimizer)

    monkeypatch.setattr(empssl.LARS, "step", watched)
    objective, result = trained(encoder, images, config)
    first, second = torch.cat(objective.seen[:5]), torch.cat(objective.seen[5:])
    assert len(first.unique()) == len(second.unique()) == 40 and not torch.equal(first, second)
    patches = objective.patches  # new ones at each step
    assert not any(torch.equal(patches[i], patches[j]) for i in range(10) for j in range(i))
    assert rates == [pytest.approx(0.05 * (1 + math.cos(math.pi * t / 10))) for t in range(10)]
    assert result["patches_seen"] == 10 * 8 * 3


def test_a_size_schedule_gives_each_side_its_share_of_the_steps():
    objective, _ = trained(*tiny_training(steps=10, size_schedule="8:0.3,12:0.5,16:0.2"))
    assert [x.shape[-1] for x in objective.patches] == [8] * 3 + [12] * 5 + [16] * 2


def test_the_encoder_trains_again_after_an_epochs_evaluation():
    encoder, images, config = tiny_training(steps=2, epochs=2)
    modes = []
    encoder.register_forward_hook(lambda module, *_: modes.append(module.training))
    run = Run(at_epoch_end=lambda epoch: empssl.embed(encoder, images, 1) is None or {})
    train(encoder, images, config, Augmentation(), run=run)
    assert modes == [True] * 4


def test_another_objective_trains_its_own_parameters():
    encoder, images, config = tiny_training(steps=2)

    class Scaled(empssl.Objective):
        def __init__(self):
            super().__init__(config.lam)
            self.scale = torch.nn.Parameter(torch.full((2, 2), 3.0))

        def forward(self, z, x, index):
            assert z.shape == (3, 8, 8) and x.shape == (24, 3, 16, 16) and index.shape == (8,)
            return self.scale.pow(2).sum() + z.sum(), {"mine": z.sum().detach()}

    objective = Scaled()
    result = train(encoder, images, config, Augmentation(), objective)
    assert "mine" in result and "R" not in result
    assert (objective.scale < 3).all()


def test_r_and_d_are_reported_with_their_own_signs():
    run = Logging()
    encoder, images, config = tiny_training()
    trained(encoder, images, config, run)
    first = run.lines[0]
    assert first["step"] == 10 and first["R"] > 0 and 0 < first["D"] <= 1
    assert first["loss"] == pytest.approx(-(first["R"] + config.lam * first["D"]), rel=1e-4)
    assert 0 < first["lr"] == pytest.approx(empssl.cosine(config.lr, 9, 10))


def test_seconds_of_training_are_without_what_follows_an_epoch():
    run = Logging(at_epoch_end=lambda epoch: time.sleep(0.3) or {"after": epoch})
    started = time.perf_counter()
    trained(*tiny_training(steps=2, epochs=3), run)
    whole = time.perf_counter() - started
    assert whole - max(line.get("train_seconds", 0) for line in run.lines) >= 0.9
    assert [line["after"] for line in run.lines if "after" in line] == [1, 2, 3]


class Unsound(empssl.Objective):
    """In its last call of ten either the loss is not finite, or the gradient is not."""

    def __init__(self, what):
        super().__init__()
        self.what = what
        self.calls = 0

    def forward(self, z, x, index):
        self.calls += 1
        loss = z.sum() * 0
        if self.calls == 10 and self.what == "loss":
            loss = loss + math.nan
        if self.calls == 10 and self.what == "gradient":
            z.register_hook(lambda gradient: gradient * math.nan)
        return loss, {}


@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_neither_a_loss_nor_weights_that_are_not_finite_pass(what):
    encoder, images, config = tiny_training()
    with pytest.raises(FloatingPointError, match="not finite at step 10 of 10"):
        train(encoder, images, config, Augmentation(), Unsound(what))


def test_an_encoder_has_the_size_of_the_images_that_it_was_trained_on():
    encoder, images, config = tiny_training(steps=1)
    train(encoder, images[..., :20], config, Augmentation())
    assert encoder.image_size == 20


def test_a_batch_larger_than_the_data_is_refused():
    encoder, images, config = tiny_training(steps=1)
    with pytest.raises(ValueError, match="--batch 8 is larger than the 7 training images"):
        train(encoder, images[:7], config, Augmentation())


@pytest.mark.parametrize(
    "name,kind",
    [
        ("lars", empssl.LARS),
        ("muon", empssl.Muon),
        ("sgd", torch.optim.SGD),
        ("adamw", torch.optim.AdamW),
    ],
)
def test_optimizers(name, kind):
    p = torch.nn.Parameter(torch.ones(2, 2))
    config = Config(optimizer=name, lr=0.25, weight_decay=0.5, eta=0.01)
    group = empssl.new_optimizer(config, [p]).param_groups[0]
    assert type(empssl.new_optimizer(config, [p])) is kind
    assert group["lr"] == 0.25 and group["weight_decay"] == 0.5
    assert group.get("eta", 0.01) == 0.01 and group.get("momentum", 0.9) == 0.9
    assert group.get("nesterov", True)


def test_generator_hashes_all_of_its_arguments():
    keys = [
        (0, "order", 0),
        (1, "order", 0),
        (0, "patches", 0),
        (0, "order", 1),
        (2**32, "order", 0),
    ]
    draws = [torch.rand(1, generator=empssl.generator_of(*key)).item() for key in keys]
    assert len(set(draws)) == len(draws)
    assert draws[0] == torch.rand(1, generator=empssl.generator_of(0, "order", 0)).item()


def test_the_papers_encoder_is_the_default():
    assert Encoder().architecture == {
        "backbone": "resnet18",
        "patch_size": 32,
        "hidden": 4096,
        "projector": 4096,
        "dim": 1024,
        "drop_last_stage": False,
    }


# ---- a training that fails ----

whole_runs = pytest.mark.usefixtures("in_tmp", "short_runs")


@whole_runs
def test_no_checkpoint_is_written_after_a_loss_that_is_not_finite(fifth_loss_is_nan):
    with pytest.raises(SystemExit) as stop:
        empssl.main([*SHAPES, "--epochs", "4", "--name", "broken", "--save-every", "0"])
    saved = torch.load("runs/broken/checkpoint.pt", weights_only=True)
    assert stop.value.code == 1 and saved["step"] == 4
    assert all(w.isfinite().all() for w in saved["encoder"].values())


@whole_runs
def test_no_checkpoint_is_written_of_weights_that_are_not_finite(monkeypatch):
    """A finite loss with a gradient that is not: the next loss would show it, one save too late."""
    step, calls = empssl.Muon.step, []

    def poison(optimizer):
        step(optimizer)
        calls.append(1)
        if len(calls) == 5:
            optimizer.param_groups[0]["params"][0].data[0] = float("nan")

    monkeypatch.setattr(empssl.Muon, "step", poison)
    with pytest.raises(SystemExit) as stop:
        empssl.main([*SHAPES, "--epochs", "4", "--name", "broken", "--save-every", "0"])
    assert stop.value.code == 1
    assert torch.load("runs/broken/checkpoint.pt", weights_only=True)["step"] == 4
