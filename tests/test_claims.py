"""The claims of others: what is compared is alike in what the claim says, and decided by rule."""

import pytest
import torch

import empssl
from empssl_support import settings as settings_module
from empssl_support.cli import UsageError
from empssl_support.data import load_dataset
from study.baselines.common import views
from study.experiments import claims, methods, minutes, records, transfer


@pytest.fixture
def searched(monkeypatch, tmp_path):
    """The methods' best tries: SimCLR by Muon, for 12 epochs."""
    monkeypatch.setattr(records, "RESULTS", tmp_path / "results")
    best = {}
    for method, optimizer in (("simclr", "muon"), ("single", "sgd"), ("vicreg", "lars")):
        chosen = f"{methods.flags_of_kind(optimizer, 128)} --lr 0.4"
        best[method] = {"chosen": chosen, "epochs": 12, "lr": 0.4}
    monkeypatch.setattr(claims, "best_try", best.get)


@pytest.fixture
def made(searched, monkeypatch):
    """Instead of training: seconds by the images, an accuracy by the rate. Returns all made."""
    made = []

    def speed(trial, data):
        return {"seconds_an_epoch": trial.about["images"] / 1000}  # 15 s of all

    def score(trial, data):
        config = trial.settings()
        made.append((trial, config))
        return {"linear_top1": 1 / (1 + abs(config.lr - 1.2)), "train_seconds": 1.0}

    monkeypatch.setattr(claims, "load_dataset", lambda *_: None)
    monkeypatch.setattr(claims, "to_device", lambda data, device: data)
    monkeypatch.setattr(claims, "time_epochs", speed)
    monkeypatch.setattr(claims, "score_on_held_out", score)
    monkeypatch.setattr(claims, "make", score)
    return made


def test_variants_have_the_seconds_epochs_or_steps_that_they_are_given(made):
    for what in ("speed", "search", "compare"):
        claims.main([what, "--seeds", "1"])
    of = {t.name: (t, c) for t, c in made}
    assert of["simclr"][1].epochs == 12
    # 45 s of 2 s an epoch; 45 s of 5 s.
    assert of["few-simclr"][1].epochs == 22 and of["small-simclr"][1].epochs == 9
    assert of["single-5000"][1].epochs == 100
    # A third of the images for three times the epochs: as many steps.
    assert of["a-third-of-the-images"][0].about["images"] == 5000
    assert of["a-third-of-the-images"][1].epochs == 36
    # The rate that was best on held-out images, of those around the method's; beyond, if at an end.
    assert {of[name][1].lr for name in ("batch-64", "one-negative", "noise-1")} == {1.2}
    assert {of[name][1].lr for name in ("simclr", "untrained")} == {0.4}
    assert of["few-empssl"][1].lr == 1.35  # of .05, .15, .45 and 1.35
    rates_of = {
        name: sorted({c.lr for t, c in made if t.name.startswith(f"search-{name}-")})
        for name in ("noise-1", "batch-64")
    }
    assert rates_of["noise-1"] == [0.000549, 0.00165, 0.00494, 0.0148, 0.0444, 0.133, 0.4, 1.2]
    assert [lr for lr in rates_of["batch-64"] if lr < 4] == [0.0444, 0.133, 0.4, 1.2, 3.6][:5]
    # The second phase is tried and compared on top of the best of the first.
    phases = {t.about["before"] for t, _ in made if "last-stage-added" in t.name}
    (before,) = phases
    assert "--drop-last-stage" in before and "--lr 1.2" in before and "--epochs 2" in before
    assert not of["last-stage-added"][1].drop_last_stage
    # The same run under two names, searched once.
    again, once = of["all-stages-at-once"], of["one-size"]
    assert again[0].flags == once[0].flags and again[0].about == once[0].about
    assert not any(t.name.startswith("search-all-stages") for t, _ in made)
    for _, config in made:
        views(config, (32, 32))


def test_the_runs_of_a_claim_are_alike_in_what_it_says(searched, made):
    for what in ("speed", "search", "compare"):
        claims.main([what, "--seeds", "1"])
    of = {t.name: (t, c) for t, c in made}
    for claim in claims.CLAIMS:
        first, second = of[claim.first], of[claim.second]
        if claim.equal == "epochs":
            assert first[1].epochs == second[1].epochs, claim
            assert first[0].about["images"] == second[0].about["images"], claim
        if claim.equal == "steps":
            steps = [t.about["images"] * c.epochs // c.batch for t, c in (first, second)]
            assert steps[0] == steps[1], claim
        if claim.equal == "seconds":
            budgets = []
            for name in (claim.first, claim.second):
                variant = claims.VARIANTS[claims.VARIANTS[name].like or name]
                before = claims.VARIANTS[variant.before].seconds if variant.before else 0
                budgets.append(variant.seconds + before)
            assert budgets[0] == budgets[1], claim


def test_what_is_to_be_no_worse_has_twice_the_seeds(made):
    for what in ("speed", "search", "compare"):
        claims.main([what, "--seeds", "2"])
    seeds = {}
    for trial, _ in made:
        if trial.name in claims.VARIANTS:
            seeds.setdefault(trial.name, []).append(trial.seed)
    for claim in claims.CLAIMS:
        wanted = [0, 1, 2, 3] if claim.above < 0 else [0, 1]
        both = set(seeds[claim.first]) & set(seeds[claim.second])
        assert both >= set(wanted), claim
    assert seeds["noise-1"] == [0, 1] and seeds["batch-64"] == [0, 1, 2, 3]


def test_a_gpu_trains_and_a_cpu_is_timed(made, monkeypatch):
    monkeypatch.setattr(claims, "pick_device", lambda wanted: wanted)
    monkeypatch.setattr(claims, "to_device", lambda data, device: data)
    asked = []
    monkeypatch.setattr(claims, "make_all", lambda *all_of: asked.append(all_of[-1]))
    monkeypatch.setattr(claims, "comparisons", lambda *_: [])
    for what in ("speed", "compare"):
        claims.main([what, "--device", "cuda"])
    assert asked == ["cpu", "cuda"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is one")
@pytest.mark.parametrize("module", [claims, minutes, transfer])
def test_a_gpu_that_is_not_there_is_said(module, searched, monkeypatch):
    if module is not transfer:
        monkeypatch.setattr(module, "load_dataset", lambda *_: pytest.fail("it was read before"))
    monkeypatch.setattr(transfer, "of_the_table", lambda *_: [])
    with pytest.raises(UsageError, match="--device cuda cannot be used here"):
        module.main(["search"] * (module is claims) + ["--device", "cuda"])


def test_what_comes_first_is_said(searched):
    with pytest.raises(UsageError, match="claims speed first"):
        claims.epochs_of("few-simclr")
    with pytest.raises(UsageError, match="claims search first"):
        claims.best_rate("batch-64")
    assert claims.best_rate("simclr") == 1


def test_speeds_are_of_any_rate_and_temperature(made, monkeypatch):
    claims.main(["speed"])
    other = {"chosen": "--optimizer muon --eta 0.005 --batch 128 --lr 0.7 --temperature 0.3"}
    best = claims.best_try("simclr") | other
    monkeypatch.setattr(claims, "best_try", lambda method: best)
    assert claims.epochs_of("few-simclr") == 22
    best["chosen"] = best["chosen"].replace("128", "64")
    with pytest.raises(UsageError, match="claims speed first"):
        claims.epochs_of("few-simclr")


def test_differences_are_of_pairs_of_one_seed_in_points(searched):
    for name, accuracies in (("a", (0.5, 0.6, 0.7)), ("b", (0.4, 0.55))):
        for seed, top1 in enumerate(accuracies):
            records.keep("claims", {"name": name, "seed": seed, "metrics": {"linear_top1": top1}})
    claim = claims.Claim("paper", "a is better", "a", "b", "epochs")
    assert claims.paired(claim) == pytest.approx([10, 5])


@pytest.mark.parametrize(
    "points,above,said",
    [
        ([3.0, 4.0, 5.0], 0.0, "holds"),
        ([-3.0, -4.0, -5.0], 0.0, "does not hold here"),
        ([-0.2, 0.0, 0.2], -1.0, "holds"),  # no worse by a point
        ([-2.2, -2.0, -1.8], -1.0, "does not hold here"),
        ([1.0, 2.0, 3.0], 0.0, "not decided"),  # t is 3.5, of 4.3
        ([5.0, -4.0, 1.0], 0.0, "not decided"),
        ([5.0, 5.0], 0.0, "not decided"),
        ([], 0.0, "not decided"),
    ],
)
def test_a_verdict_asks_for_an_interval_of_95_percent(points, above, said):
    assert claims.verdict(points, above) == said


SMALL = "--method simclr --dataset shapes --preset laptop --device cpu --augmentation light "
SMALL += "--batch 10 --hidden 8 --projector 8 --dim 4 --eval-patches 1 --precision float32"


def test_the_last_stage_is_trained_upon_what_was_trained_without_it(monkeypatch):
    data = load_dataset("shapes", subset=300)
    monkeypatch.setattr(claims, "IMAGES", 40)
    about = {"images": 20, "settled": False, "whole": False}
    about |= {"before": f"{SMALL} --drop-last-stage"}
    trial = claims.Trial("a", SMALL, 0, about)
    encoders = []
    train = claims.train

    def watched(config, part):
        encoder, metrics = train(config, part)
        encoders.append(encoder)
        return encoder, metrics

    monkeypatch.setattr(claims, "train", watched)
    metrics = claims.make(trial, data)
    first, second = (encoder.backbone.state_dict() for encoder in encoders)
    counts = "num_batches_tracked"
    assert all((second[k] == v).all() for k, v in first.items() if not k.endswith(counts))
    assert len(second) > len(first)
    assert metrics["seconds_before"] > 0 and metrics["patches_seen"] == 40
    assert 0 <= metrics["linear_top1"] <= 1


def test_both_phases_train_on_the_device_of_the_trial(monkeypatch):
    monkeypatch.setattr(settings_module, "pick_device", lambda wanted: wanted)
    monkeypatch.setattr(settings_module, "pick_precision", lambda wanted, device: wanted)
    encoder = empssl.Encoder("small", 16, hidden=8, projector=8, dim=4)
    devices = []

    def watched(config, part):
        devices.append(config.device)
        return encoder, {"train_seconds": 1.0}

    monkeypatch.setattr(claims, "train", watched)
    trial = claims.Trial("a", SMALL, 0, {"before": f"{SMALL} --drop-last-stage"})
    claims.trained_in_two_phases(trial.on("cuda"), None)
    assert devices == ["cuda", "cuda"]


def test_rates_are_scored_on_training_images_that_nothing_was_trained_on(monkeypatch):
    """A part of the images trains, the labels of `IMAGES` probe, and neither is scored."""
    data = load_dataset("shapes")
    monkeypatch.setattr(claims, "IMAGES", 40)
    trained, probed = [], []
    monkeypatch.setattr(claims, "trained", lambda trial, part: (trained.append(part), {}))
    monkeypatch.setattr(claims, "probe_bag", lambda e, c, part, _: probed.append(part) or {})
    about = {"images": 20, "settled": False, "whole": False}
    claims.score_on_held_out(claims.Trial("a", SMALL, 0, about), data)
    (part,), (with_labels,) = trained, probed

    def among(images, others):
        kept = {image.numpy().tobytes() for image in others}
        return [image.numpy().tobytes() in kept for image in images]

    assert len(part.train_images) == 20 and len(with_labels.train_images) == 40
    assert all(among(part.train_images, with_labels.train_images))
    assert all(among(with_labels.test_images, data.train_images))
    assert not any(among(with_labels.test_images, with_labels.train_images))


def test_an_untrained_encoder_is_probed_without_training(monkeypatch):
    data = load_dataset("shapes", subset=300)
    monkeypatch.setattr(claims, "IMAGES", 40)
    monkeypatch.setattr(empssl, "train", lambda *_: pytest.fail("it was trained"))
    about = {"images": 20, "settled": True, "whole": False}
    metrics = claims.make(claims.Trial("a", f"{SMALL} --eval-only", 0, about), data)
    assert set(metrics) == {"linear_top1", "knn_top1"}


def test_what_saw_whole_images_is_settled_and_probed_on_them(monkeypatch):
    data = load_dataset("shapes", subset=300)
    monkeypatch.setattr(claims, "IMAGES", 40)
    crops = []
    extract = empssl.extract_patches

    def watched(images, index, params, *rest, **settings):
        crops.append(params[..., :4].reshape(-1, 4))
        return extract(images, index, params, *rest, **settings)

    monkeypatch.setattr(empssl, "extract_patches", watched)
    about = {"images": 20, "settled": True, "whole": True}
    noisy = SMALL.replace("light", "noise --noise 1 --crops published")
    for flags in (noisy, f"{SMALL} --eval-only"):
        claims.make(claims.Trial("a", flags, 0, about), data)
        side = data.train_images.shape[-1]
        assert (torch.cat(crops) == torch.tensor([0, 0, side, side])).all()


def test_after_noise_the_averages_are_of_patches_without_it():
    """As those of the untrained encoder, to which noise is compared."""
    data = load_dataset("shapes", subset=300)
    noisy = SMALL.replace("--augmentation light", "--augmentation noise --noise 2 --lr 1e-12")
    about = {"images": 20, "settled": True, "whole": False}
    encoder, _ = claims.trained(claims.Trial("a", noisy, 0, about), data)
    untrained, _ = claims.trained(claims.Trial("a", f"{SMALL} --eval-only", 0, about), data)
    ours, theirs = encoder.backbone[1].running_var, untrained.backbone[1].running_var
    assert (ours / theirs - 1).abs().max() < 0.3
    noised, _ = claims.trained(claims.Trial("a", noisy, 0, about | {"settled": False}), data)
    assert (noised.backbone[1].running_var / theirs - 1).abs().max() > 1
