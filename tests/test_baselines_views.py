"""The baselines' settings, and how they see an image."""

import dataclasses

import pytest
import torch

import empssl
from empssl_support.pixels import COLUMNS
from study import baselines
from study.baselines.common import NAMES, views
from study.baselines.ressl import ReSSL
from study.baselines.swav import SwAV

METHODS = ("simclr", "vicreg", "byol", "swav", "ressl", "single")
SHAPES = "--dataset shapes --preset laptop --device cpu --precision float32"


def config(method, flags=""):
    small = "--batch 32 --hidden 32 --projector 32 --dim 16 --others 20"
    return baselines.settings(f"{SHAPES} {small} --method {method} {flags}".split())


def assert_equal(ours, theirs):
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        same = torch.equal(ours[name], value) if torch.is_tensor(value) else ours[name] == value
        assert same, name


# ---- settings ----


def test_published_settings():
    """Literals, so that none changes unseen."""
    keys = ("patches", "augmentation", "lr", "weight_decay", "batch", "dim")
    keys += ("temperature", "optimizer", "eta")
    found = {}
    for name in METHODS:
        assert set(baselines.METHODS[name]) <= set(keys)
        found[name] = tuple(baselines.METHODS[name].get(key) for key in keys)
    assert found == {
        "simclr": (2, "simclr", 0.4, 1e-4, 256, 256, 0.2, "lars", 0.02),
        "vicreg": (2, "vicreg", 0.3, 1e-4, 256, 2048, None, "lars", 0.02),
        "byol": (2, "byol", 1.0, 1e-5, 256, 256, None, "lars", 0.02),
        "swav": (2, "simclr", 0.6, 1e-6, 256, 128, 0.1, "lars", 0.02),
        "ressl": (2, "ressl", 0.05, 1e-4, 256, 256, 0.1, "sgd", 0.0),
        "single": (1, "single", 1.0, 1e-4, 512, 2048, 0.2, "sgd", 0.0),
    }
    swav, ressl = SwAV(2, 0.1), ReSSL(torch.nn.Identity(), 2, 0.1)
    assert swav.prototypes.shape == (3000, 2) and swav.queue.shape == (2, 3840, 2)
    assert ressl.queue.shape == (4096, 2) and (ressl.sharp, ressl.momentum) == (0.04, 0.99)
    defaults = baselines.Config()
    assert (defaults.cutmix, defaults.bank_momentum) == (0.5, 0.5)
    assert (defaults.distillation, defaults.others) == (20, 10_000)


def test_what_is_typed_comes_before_what_is_published_and_that_before_the_preset():
    found = baselines.settings(["--preset", "laptop", "--device", "cpu", "--method", "byol"])
    assert (found.lr, found.dim, found.batch, found.augmentation) == (1.0, 256, 256, "byol")
    assert (found.hidden, found.backbone) == (2048, "small")  # the preset's
    typed = "--preset laptop --device cpu --method byol --lr 0.7 --augmentation light"
    found = baselines.settings(typed.split())
    assert (found.lr, found.dim, found.augmentation) == (0.7, 256, "light")


def test_every_name_is_a_method():
    assert tuple(baselines.METHODS) == NAMES


def test_empssls_settings_are_its_own():
    theirs = empssl.Config()
    ours = baselines.settings(["--method", "empssl", "--preset", "paper", "--device", "cpu"])
    for field in dataclasses.fields(theirs):
        if field.name not in ("preset", "device", "precision"):
            assert getattr(ours, field.name) == getattr(theirs, field.name), field.name


def test_flags_reach_the_objectives(data):
    def objective(name, flags=""):
        return baselines.method(config(name, flags), data)[2]

    simclr = objective("simclr", "--negatives 3 --temperature 0.7 --noise 0.2 --seed 5")
    assert (simclr.negatives, simclr.temperature) == (3, 0.7)
    assert (simclr.noise, simclr.one_crop, simclr.seed) == (0.2, False, 5)
    assert objective("simclr", "--augmentation noise").one_crop
    typed = "--bank-start random --bank-update average --bank-momentum 0.9 --distillation 2"
    single = objective("single", f"{typed} --temperature 0.3 --cutmix 0.3 --seed 5")
    assert (single.start, single.update, single.momentum) == (None, "average", 0.9)
    assert (single.distillation, single.temperature, single.cutmix) == (2.0, 0.3, 0.3)
    assert (single.others, single.seed, single.bank.shape) == (20, 5, (64, 16))
    assert objective("single").start().shape == (64, 16)
    assert objective("single").update == "gradient"
    assert objective("byol", "--epochs 3").steps == 6
    assert objective("swav", "--temperature 0.7").temperature == 0.7
    assert objective("ressl", "--temperature 0.7").temperature == 0.7


def test_weights_are_of_the_seed_and_chance_outside_is_left_alone(data):
    for name in ("byol", "swav", "ressl"):
        torch.manual_seed(1)
        expected = torch.rand(3)
        torch.manual_seed(1)
        first = baselines.method(config(name), data)[2].state_dict()
        assert torch.equal(torch.rand(3), expected)
        assert_equal(baselines.method(config(name), data)[2].state_dict(), first)
        other = baselines.method(config(name, "--seed 1"), data)[2].state_dict()
        random = {"byol": "predict.0.weight", "swav": "prototypes", "ressl": "queue"}[name]
        assert not torch.equal(first[random], other[random])


# ---- views ----


def colours(a):
    return (a.brightness, a.contrast, a.saturation, a.hue, a.grey, a.blur, a.solarize)


def drawn(method, flags="--crops published"):
    return views(config(method, flags), (32, 32))


def test_views_as_published():
    assert colours(drawn("simclr")) == (0.8, 0.8, 0.8, 0.2, 0.2, 0.5, 0.0)
    assert colours(drawn("vicreg")) == (0.4, 0.4, 0.2, 0.1, 0.2, 0.0, 0.1)
    first, second = drawn("byol")
    assert colours(first) == (0.4, 0.4, 0.2, 0.1, 0.2, 0.0, 0.0)
    assert colours(second) == (0.4, 0.4, 0.2, 0.1, 0.2, 0.0, 0.2)
    assert colours(drawn("ressl")[0]) == (0.4, 0.4, 0.2, 0.1, 0.2, 0.5, 0.0)
    assert colours(drawn("single")) == (0.4, 0.4, 0.4, 0.1, 0.2, 0.0, 0.0)
    areas = [first.area, second.area]
    areas += [drawn(name).area for name in ("simclr", "vicreg", "single")]
    assert areas == [(0.08, 1.0), (0.08, 1.0), (0.08, 1.0), (0.2, 1.0), (0.2, 1.0)]
    assert {a.area for a in drawn("byol", "")} == {(0.25, 0.25)}


def test_ressls_views_are_a_strong_and_a_weak_one():
    chance = torch.Generator().manual_seed(0)
    params = empssl.sample_patches(50, 2, (32, 32), drawn("ressl"), chance)
    column = dict(zip(COLUMNS, params.unbind(-1), strict=True))  # (2, 50) each
    assert (column["brightness"][0] != 1).float().mean() > 0.6
    assert (column["brightness"][1] == 1).all() and (column["grey"][1] == 0).all()
    assert (column["flip"][1] == 1).any() and column["height"].unique().numel() > 10
    strong, weak = drawn("ressl", "--augmentation light")
    assert strong == drawn("byol", "--augmentation light")
    assert weak == empssl.Augmentation.none(flip=0.5)


def test_where_noise_is_the_augmentation_there_is_no_other():
    whole = drawn("simclr", "--augmentation noise --crops published")
    assert whole == empssl.Augmentation.none(area=(1.0, 1.0))
    quarter = drawn("simclr", "--augmentation noise")
    assert quarter == empssl.Augmentation.none(area=(0.25, 0.25))


@pytest.mark.parametrize("method,encoded", [("simclr", 2), ("byol", 2), ("ressl", 1)])
def test_each_view_has_its_own_batch_statistics(method, encoded, data):
    """And ReSSL's weak view is left out."""
    encoder, _, objective = baselines.method(config(method), data)
    x = torch.randn(64, 3, 16, 16)
    z = encoder.train()(x)
    first, second = (encoder.embedding(view) for view in x.chunk(2))
    assert torch.allclose(z[:32], first, atol=1e-5)
    assert torch.allclose(z[32:], second if encoded == 2 else torch.zeros(1), atol=1e-5)
    if method == "byol":  # its target sees the views apart too
        second_alone = objective.target(x[32:].repeat(2, 1, 1, 1))[32:]
        assert torch.allclose(objective.target(x)[32:], second_alone, atol=1e-5)


def seen_by(encoder):
    """What will reach the backbone, a list that grows."""
    seen = []
    encoder.backbone.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    return seen


def test_noise_is_there_in_training_alone(data):
    encoder, _, _ = baselines.method(config("simclr", "--noise 0.5"), data)
    seen = seen_by(encoder)
    x = torch.zeros(64, 3, 16, 16)
    encoder.train()(x)
    encoder.eval()(x)
    assert torch.cat(seen[:2]).std().item() == pytest.approx(0.5, rel=0.05)
    assert len(seen) == 3 and (seen[2] == 0).all()


def test_noise_alone_tells_two_views_apart_and_changes(data):
    flags = "--augmentation noise --noise 0.5"
    encoder, _, objective = baselines.method(config("simclr", flags), data)
    seen = seen_by(encoder.train())
    x = torch.arange(64.0).view(64, 1, 1, 1).expand(64, 3, 16, 16)  # two crops of 32 images
    encoder(x)
    objective.calls += 1
    encoder(x)
    noise = [view - x[:32] for view in seen]  # all are of the first crop
    assert len(noise) == 4
    for i, a in enumerate(noise):
        assert a.std().item() == pytest.approx(0.5, rel=0.05) and a.mean().abs() < 0.1
        assert all((a - b).std() > 0.6 for b in noise[:i])
