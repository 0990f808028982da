"""The comparison of numbers of patches: equal steps, and lambda by ratio or by cosine."""

import math

import pytest
import torch

import empssl
from empssl_support.data import load_dataset
from study.experiments import patches, records


def test_the_highest_rate_is_that_of_embeddings_at_right_angles():
    z = torch.eye(50, 512).unsqueeze(0)
    assert patches.highest_rate(50) == pytest.approx(empssl.coding_rate(z).item(), rel=1e-5)
    assert 100 / patches.highest_rate(50) == pytest.approx(1.011, abs=0.001)  # as in the preset


def test_the_pairwise_cosine_is_that_of_all_pairs(monkeypatch):
    """Against a literal mean over pairs, of an encoder that hands its patches through."""
    images = load_dataset("shapes", subset=60).train_images
    flags = patches.flags_of("empssl", "photos", "--batch 50 --precision float32")
    config = patches.Trial("a", flags).settings()

    class Itself(torch.nn.Module):
        def forward(self, x):
            return torch.nn.functional.normalize(x.flatten(1)[:, ::50], dim=1)

    seen = []
    extract = empssl.extract_patches
    monkeypatch.setattr(empssl, "extract_patches", lambda *a: seen.append(extract(*a)) or seen[-1])
    data = load_dataset("shapes", subset=60)._replace(train_images=images)
    c = patches.pairwise_cosine(Itself(), config, data)
    of_image = []
    for x in seen:
        z = Itself()(x).unflatten(0, (8, -1))
        for j in range(z.shape[1]):
            pairs = [z[i, j] @ z[k, j] for i in range(8) for k in range(8) if i != k]
            of_image.append(sum(pairs) / len(pairs))
    assert len(of_image) == 60
    assert c == pytest.approx(torch.stack(of_image).mean().item(), abs=1e-5)


def test_the_next_lambda_lies_on_the_line_through_the_nearest_two():
    tried = [(30.0, 0.1), (100.0, 0.5), (1000.0, 0.6)]
    lam = patches.next_lambda(tried, 0.3)
    assert math.log(lam) == pytest.approx((math.log(30) + math.log(100)) / 2)
    # More is more, also while there is one try, and never three times more at once.
    assert 10 < patches.next_lambda([(10.0, 0.1)], 0.2) < 30.01
    assert patches.next_lambda([(10.0, 0.1)], 0.9) == pytest.approx(30)
    assert patches.next_lambda([(10.0, 0.9)], 0.1) == pytest.approx(10 / 3)


@pytest.fixture
def made(monkeypatch, tmp_path):
    """Instead of training: a cosine that rises with lambda, and more slowly with few patches."""
    made = []

    def cosine(config):
        strength = config.lam / patches.highest_rate(config.batch)
        return 0.4 + 0.15 * math.log(strength * (1 - 1.5 / config.patches))

    def for_cosine(trial, data):
        return {"cosine": cosine(trial.settings())}

    def make(trial, data):
        config = trial.settings()
        made.append((trial, config, cosine(config)))
        return {"cosine": cosine(config), "linear_top1": 0.5}

    monkeypatch.setattr(records, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(patches, "load_dataset", lambda *_: None)
    monkeypatch.setattr(patches, "train_for_cosine", for_cosine)
    monkeypatch.setattr(patches, "make", make)
    return made


def test_each_number_has_equal_steps_and_a_lambda_by_ratio_and_by_cosine(made):
    patches.main(["--seeds", "2"])
    wanted = 0.4 + 0.15 * math.log(1 - 1.5 / 20)
    steps, seen = set(), {}
    for trial, config, cosine in made:
        steps.add(config.subset // config.batch * config.epochs)
        if trial.name == "reference":
            assert (config.patches, config.batch) == (20, 50)
            continue
        seen.setdefault(trial.about["comparison"], set()).add(config.batch * config.patches)
        if trial.about["lambda_by"] == "equal ratio":
            ratio = config.lam / patches.highest_rate(config.batch)
            assert ratio == pytest.approx(1, abs=1e-3)
        elif trial.about["lambda_by"] == "equal lambda":
            assert config.lam == pytest.approx(patches.highest_rate(50), abs=0.01)
        else:
            assert cosine == pytest.approx(wanted, abs=patches.NEAR_ENOUGH + 1e-3)
    assert steps == {patches.STEPS}
    assert seen["patches"] == {1000}
    assert seen["images"] == {50 * n for n in patches.NUMBERS if n != 20}
    rates = {(t.about["n"], t.about["comparison"]) for t, c, _ in made if c.lr != 0.15}
    assert rates == {(2, "patches"), (50, "patches")}
    assert len(made) == 2 * (1 + (2 + 3) * (len(patches.NUMBERS) - 1) + len(rates))
    # What was made is left alone, and no other lambda is looked for.
    lines = len(records.read("patches"))
    patches.main(["--seeds", "2"])
    assert len(records.read("patches")) == lines


def test_a_number_of_patches_is_trained_and_probed(monkeypatch):
    data = load_dataset("shapes", subset=300)
    monkeypatch.setattr(patches, "IMAGES", 60)
    monkeypatch.setattr(patches, "STEPS", 12)
    monkeypatch.setattr(patches, "flags_of", lambda *a: FLAGS + a[-1])
    one = patches.make_trial("a", "photos", n=2, b=10, lam=5.0, seed=0, comparison="images")
    assert (one.settings().subset, one.settings().epochs) == (60, 2)
    metrics = patches.make(one, data)
    assert metrics["patches_seen"] == 2 * 10 * 12
    assert -1 <= metrics["cosine"] <= 1
    # Its cosine is measured without a trace: the accuracy is that of the encoder alone.
    monkeypatch.setattr(patches, "pairwise_cosine", lambda *_: 0.0)
    assert patches.make(one, data)["linear_top1"] == metrics["linear_top1"]


FLAGS = "--method empssl --dataset shapes --preset laptop --device cpu --hidden 8 --projector 8 "
FLAGS += "--dim 16 --eval-patches 1 --precision float32 "
