"""Embedding, the probes, and what a run's record says."""

import inspect
import json
import math
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import empssl
from empssl import (
    Augmentation,
    embed,
    extract_patches,
    generator_of,
    knn_probe,
    linear_probe,
    main,
)
from empssl_support.data import Dataset
from empssl_support.files import save_encoder
from empssl_support.runs import records
from recipes import SHAPES, TINY, plain_folder, small_encoder

RUNS = Path("runs")
ACCURACIES = ("linear_top1", "linear_top5", "quadrants_top1", "knn_top1")
BEFORE = ("untrained_knn_top1", "raw_pixels_knn_top1")
SCORE = ("effective_rank", "neighbours_kept")
whole_runs = pytest.mark.usefixtures("in_tmp", "short_runs")


def some_images(N, side=32):
    return torch.randint(0, 256, (N, 3, side, side), dtype=torch.uint8)


@pytest.fixture
def encoder():
    encoder = small_encoder(hidden=12)
    encoder(torch.randn(64, 3, 16, 16))  # BatchNorm statistics of some kind
    return encoder


# ---- the bag of patches ----


def test_the_bag_is_the_mean_of_an_images_patches(encoder):
    images = some_images(7)
    h = embed(encoder, images, patches=5, augmentation=Augmentation(), seed=3)
    assert h.shape == (7, 12) and h.dtype == torch.float32 and not encoder.training
    chance = generator_of(3, "embed", 0)
    params = empssl.sample_patches(7, 5, (32, 32), Augmentation(), chance)
    x = extract_patches(images, torch.arange(7), params, 16)
    with torch.no_grad():
        expected = torch.stack([encoder.representation(x[j::7]).mean(0) for j in range(7)])
    torch.testing.assert_close(h, expected)


def crops_of_the_grid(images):
    """The sixteen quarters of 32x32 images at 0, 5, 11 and 16 pixels, row by row."""
    starts = (0, 5, 11, 16)
    crops = [images[:, :, i : i + 16, j : j + 16] for i in starts for j in starts]
    return torch.stack(crops) / 127.5 - 1  # (16, N, 3, 16, 16)


def test_by_default_the_bag_is_of_sixteen_crops_encoded_apart(encoder):
    images = some_images(3)
    encoder.eval()
    with torch.no_grad():
        crops = crops_of_the_grid(images)
        h = encoder.representation(crops.flatten(0, 1)).view(16, 3, 12)
    torch.testing.assert_close(embed(encoder, images), h.mean(0), atol=1e-5, rtol=1e-5)


def test_quadrants_are_the_means_of_the_grids_quadrants_side_by_side(encoder):
    images = some_images(3)
    encoder.eval()
    with torch.no_grad():
        crops = crops_of_the_grid(images)
        h = encoder.representation(crops.flatten(0, 1)).view(4, 4, 3, 12)  # rows and columns
    parts = [h[:2, :2], h[:2, 2:], h[2:, :2], h[2:, 2:]]
    expected = torch.cat([part.mean((0, 1)) for part in parts], dim=1)
    quadrants = embed(encoder, images, quadrants=True)
    torch.testing.assert_close(quadrants, expected, atol=1e-5, rtol=1e-5)
    bag = embed(encoder, images)
    torch.testing.assert_close(quadrants.view(3, 4, 12).mean(1), bag, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("how", [{"patches": 9}, {"patches": 1}, {"augmentation": Augmentation()}])
def test_what_has_no_quadrants(how, encoder):
    with pytest.raises(ValueError, match="quadrants need a grid of even side"):
        embed(encoder, some_images(2), quadrants=True, **how)


def test_no_patches_make_no_bag(encoder):
    with pytest.raises(ValueError, match="there are 0 patches to embed an image by"):
        embed(encoder, some_images(2), patches=0)


@pytest.mark.parametrize(
    "n,tops,lefts",
    [
        (1, [6], [14]),
        (4, [0, 0, 12, 12], [0, 28, 0, 28]),
        (9, [0] * 3 + [6] * 3 + [12] * 3, [0, 14, 28] * 3),
    ],
)
def test_the_grid_is_even_and_the_same_for_each_image(n, tops, lefts):
    """A quarter of a 32 x 48 image is 20 x 20, which leaves room for 12 x 28."""
    params = empssl.grid_patches(3, n, (32, 48))
    assert params[:, 0, 0].tolist() == tops and params[:, 0, 1].tolist() == lefts
    assert params[0, 0].tolist()[2:] == [20, 20, 0, 1, 1, 1, 0, 0, 0, 0, 0]
    assert (params[..., 2:] == params[0, 0, 2:]).all() and (params == params[:, :1]).all()


@pytest.mark.parametrize("image_size", [(1, 1), (1, 5), (3, 2), (33, 31)])
def test_the_grid_of_any_image_lies_inside_it(image_size):
    top, left, height, width = empssl.grid_patches(1, 4, image_size)[:, 0, :4].unbind(-1)
    assert (height >= 1).all() and (width >= 1).all() and (top >= 0).all() and (left >= 0).all()
    assert (top + height).max() == image_size[0] or height.max() == image_size[0]
    assert (left + width <= image_size[1]).all()


def test_embed_keeps_the_order_of_many_images(encoder):
    images = some_images(1100, 1).expand(-1, 3, 16, 16)  # more than a batch
    h = embed(encoder, images, patches=4)
    torch.testing.assert_close(h[700:], embed(encoder, images[700:], 4), atol=1e-5, rtol=1e-5)


# ---- the probes ----


def blobs(N, classes=10, d=20, spread=0.3, seed=0):
    chance, of_centres = (torch.Generator().manual_seed(s) for s in (seed, 99))
    centres = F.normalize(torch.randn(classes, d, generator=of_centres), dim=1)
    y = torch.arange(N) % classes
    return centres[y] + spread * torch.randn(N, d, generator=chance) / d**0.5, y


def test_separable_data_is_separated():
    train, test = blobs(500, seed=1), blobs(300, seed=2)
    top1, top5 = linear_probe(*train, *test)
    assert top1 > 0.97 and top5 >= top1
    assert knn_probe(*train, *test) > 0.97


def test_random_labels_give_chance():
    (x, _), (u, _) = blobs(500, spread=3, seed=1), blobs(2000, spread=3, seed=2)
    y, v = torch.randint(10, (500,)), torch.randint(10, (2000,))
    top1, top5 = linear_probe(x, y, u, v, epochs=20)
    assert 0.06 < top1 < 0.14 and 0.42 < top5 < 0.58
    assert 0.06 < knn_probe(x, y, u, v) < 0.14


def test_the_probe_follows_the_official_recipe():
    """SGD by hand: momentum, decay, cosine by the epoch, the last partial batch included."""
    (x, y), (u, v) = blobs(250, spread=2.5, seed=1), blobs(400, spread=2.5, seed=2)
    epochs, lr = 4, 0.5  # large, so that a weight decay of 5e-5 shows
    torch.manual_seed(0)
    layer = torch.nn.Linear(20, 10)
    weight, bias = layer.weight.detach().clone(), layer.bias.detach().clone()
    weight_step, bias_step = torch.zeros_like(weight), torch.zeros_like(bias)
    for epoch in range(epochs):
        rate = lr / 2 * (1 + math.cos(math.pi * epoch / epochs))
        for index in torch.randperm(250, generator=generator_of(0, "probe", epoch)).split(100):
            p = F.softmax(x[index] @ weight.T + bias, 1)
            error = (p - F.one_hot(y[index], 10)) / len(index)
            weight_step = 0.9 * weight_step + error.T @ x[index] + 5e-5 * weight
            bias_step = 0.9 * bias_step + error.sum(0) + 5e-5 * bias
            weight, bias = weight - rate * weight_step, bias - rate * bias_step
    logits = u @ weight.T + bias
    top1, top5 = linear_probe(x, y, u, v, epochs=epochs, lr=lr)
    assert 0.15 < top1 < 0.95
    hits = logits.topk(5).indices == v.view(-1, 1)
    assert top1 == pytest.approx(hits[:, 0].float().mean().item(), abs=0.0026)  # a tie may turn
    assert top5 == pytest.approx(hits.any(1).float().mean().item(), abs=0.0026)
    assert linear_probe(x, y, u, v, epochs=epochs, lr=lr) == (top1, top5)
    defaults = inspect.signature(linear_probe).parameters
    assert [defaults[name].default for name in ("epochs", "batch", "lr")] == [100, 100, 0.03]


def test_a_probe_leaves_the_random_numbers_of_others_alone(monkeypatch):
    seeded = []
    monkeypatch.setattr(torch.cuda, "manual_seed_all", seeded.append)
    before = torch.get_rng_state()
    linear_probe(*blobs(100, seed=1), *blobs(50, seed=2), epochs=1)
    assert torch.equal(torch.get_rng_state(), before)
    assert not seeded


def test_knn_by_hand():
    """Two near votes for class 1 outweigh three far ones for class 0 by their weights."""
    angle = torch.tensor([0.1, -0.1, 1.2, 1.3, -1.2])
    train = 3 * torch.stack([angle.cos(), angle.sin()], 1)
    y = torch.tensor([1, 1, 0, 0, 0])
    query = torch.tensor([[5.0, 0.0]])
    assert knn_probe(train, y, query, torch.tensor([1])) == 1
    assert knn_probe(train, y, query, torch.tensor([0])) == 0
    # Where the temperature makes all weights alike, three outvote two; of the nearest two, none.
    assert knn_probe(train, y, query, torch.tensor([0]), temperature=1e3) == 1
    assert knn_probe(train, y, query, torch.tensor([1]), k=2, temperature=1e3) == 1
    # Nearest by angle, however long, and however precise.
    train[y == 0] *= 10
    assert knn_probe(train, y, query, torch.tensor([1])) == 1
    assert knn_probe(train.double(), y, query.double(), torch.tensor([1])) == 1


def test_knn_weighs_twenty_neighbours_as_published():
    """One of cosine 1 against four of 0.9: exp(0.1 / T) is 4.2 at T 0.07, and 3.8 at 0.075."""

    def vote(train, labels, **how):
        query, answer = torch.tensor([[1.0, 0.0]]), torch.tensor([1])
        return knn_probe(train, torch.tensor(labels), query, answer, **how)

    angle = torch.tensor([0.0] + [math.acos(0.9)] * 4)
    train = torch.stack([angle.cos(), angle.sin()], 1)
    assert vote(train, [1, 0, 0, 0, 0]) == 1
    assert vote(train, [1, 0, 0, 0, 0], temperature=0.075) == 0

    # Of these 21 the last does not vote, and so class 1 has as many votes as class 0, but nearer.
    many = torch.tensor([[1.0, 0.0]] * 10 + [[0.99999, 0.00447]] * 11)
    assert vote(many, [1] * 10 + [0] * 11) == 1
    assert vote(many, [1] * 10 + [0] * 11, k=21) == 0


def test_raw_pixels_are_the_images_own():
    images = some_images(5)
    assert torch.equal(empssl.raw_pixels(images), (images / 127.5 - 1).flatten(1))
    large = images.repeat_interleave(2, 2).repeat_interleave(2, 3)
    torch.testing.assert_close(empssl.raw_pixels(large), empssl.raw_pixels(images))


@pytest.mark.parametrize("how,patches", [("train", 5), ("grid", 4), ("grid", 16), ("grid", 1)])
def test_the_sign_of_progress_is_of_held_out_images(how, patches, encoder, monkeypatch):
    """kNN of at most four patches: here of 60 images, 10 against 50."""
    config = empssl.Config(device="cpu", precision="float32", augmentation="light")
    config.eval_patches, config.eval_augmentation = patches, how
    images, labels = some_images(60), torch.arange(60) % 10
    data = Dataset(images, labels, None, None, [], "")
    seen = []
    monkeypatch.setattr(empssl, "knn_probe", lambda *arguments: seen.extend(arguments) or 0.0)
    empssl.knn_within_training(encoder, data, config)
    rows = torch.randperm(60, generator=generator_of(0, "holdout", 0))
    drawn = empssl.training_augmentation(config, (32, 32)) if how == "train" else None
    h = embed(encoder, images[rows], min(4, patches), drawn)
    expected = h[10:], labels[rows][10:], h[:10], labels[rows][:10]
    assert len(seen) == 4
    for ours, theirs in zip(seen, expected, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


# ---- what a run says ----


@whole_runs
def test_a_run_and_its_record():
    record = main([*SHAPES, "--epochs", "2", "--name", "demo"])
    assert record == records(RUNS / "demo")[-1]
    assert all(0 <= record[key] <= 1 for key in (*ACCURACIES, *BEFORE))
    assert "raw_pixels_top1" not in record  # it stands beside the untrained encoder alone
    assert record["patches_seen"] == 2 * 60 * 3 and record["train_seconds"] > 0
    assert record["device"].startswith("cpu") and record["R"] > 0 and 0 < record["D"] <= 1
    epochs = [r for r in records(RUNS / "demo") if "train_knn_top1" in r]
    assert [r["epoch"] for r in epochs] == [1, 2]
    last = {key: record[key] for key in SCORE}
    assert {key: epochs[1][key] for key in SCORE} == last
    assert all(1 <= r["effective_rank"] <= 16.01 and 0 <= r["neighbours_kept"] <= 1 for r in epochs)
    assert epochs[0]["effective_rank"] != record["effective_rank"]
    saved = np.load(RUNS / "demo" / "test_features.npz")
    assert saved["test_features"].shape == (40, 16) and saved["test_labels"].shape == (40,)


@whole_runs
def test_the_headline_is_the_bags_and_quadrants_stand_beside(monkeypatch):
    seen = []

    def probe(train, train_labels, test, test_labels, lr=0.03):
        seen.append((train, test, lr))
        return len(seen) / 10, 1.0

    monkeypatch.setattr(empssl, "linear_probe", probe)
    record = main([*SHAPES, "--name", "demo"])
    (bag, _, official), (quadrants, test_quadrants, lr) = seen
    assert bag.shape == (60, 16)
    assert (official, lr) == (0.03, 0.003)  # four times as many features overfit sooner
    assert quadrants.shape == (60, 64) and test_quadrants.shape == (40, 64)
    torch.testing.assert_close(quadrants.view(60, 4, 16).mean(1), bag)
    assert (record["linear_top1"], record["quadrants_top1"]) == (0.1, 0.2)


@whole_runs
def test_the_quadrants_are_let_go_before_there_are_other_features(monkeypatch):
    """They take most of a run's memory: 1.6 GB of 50,000 images."""
    probe, left = empssl.probe, []

    def probe_and_watch(train_h, test_h, data):
        left.extend(weakref.ref(h.quadrants) for h in (train_h, test_h))
        return probe(train_h, test_h, data)

    def untrained(config, images):
        assert [quadrants() for quadrants in left] == [None, None]
        raise empssl.UsageError("that is enough")

    monkeypatch.setattr(empssl, "probe", probe_and_watch)
    monkeypatch.setattr(empssl, "untrained_encoder", untrained)
    with pytest.raises(SystemExit):
        main(SHAPES)
    assert len(left) == 2


@whole_runs
@pytest.mark.parametrize(
    "flags", ["--eval-patches 1", "--eval-patches 9", "--eval-augmentation train --eval-patches 6"]
)
def test_patches_without_quadrants_have_no_such_figure(flags):
    record = main([*SHAPES, "--name", "demo", *flags.split()])
    assert "linear_top1" in record and "quadrants_top1" not in record


@whole_runs
def test_probes_on_the_way():
    whole = main([*SHAPES, "--epochs", "3", "--name", "demo", "--probe-epochs", "1,3"])
    probed = [r for r in records(RUNS / "demo")[:-1] if "linear_top1" in r]
    assert [r["epoch"] for r in probed] == [1, 3]
    assert probed[1]["linear_top1"] == whole["linear_top1"]
    assert probed[0]["train_seconds"] < probed[1]["train_seconds"] <= whole["train_seconds"]
    plain = main([*SHAPES, "--epochs", "3", "--name", "plain"])
    assert plain["linear_top1"] == whole["linear_top1"]


@whole_runs
def test_a_saved_encoder_probes_to_the_same_figures():
    trained = main([*SHAPES, "--name", "demo"])
    encoder = "runs/demo/encoder.pt"
    again = main([*SHAPES, "--name", "again", "--eval-only", "--checkpoint", encoder])
    assert {key: again[key] for key in ACCURACIES} == {key: trained[key] for key in ACCURACIES}
    assert again["checkpoint"] == encoder and "train_seconds" not in again
    untrained = main([*SHAPES, "--name", "untrained", "--eval-only"])
    assert untrained["knn_top1"] == trained["untrained_knn_top1"]
    assert untrained["effective_rank"] == trained["untrained_effective_rank"]
    assert {key: again[key] for key in SCORE} == {key: trained[key] for key in SCORE}
    assert again["untrained_effective_rank"] == trained["untrained_effective_rank"]
    assert untrained["raw_pixels_knn_top1"] == trained["raw_pixels_knn_top1"]
    assert 0 <= untrained["raw_pixels_top1"] <= 1
    of_a_trained_one = {"checkpoint", "train_seconds", "untrained_knn_top1"}
    assert not (of_a_trained_one | {"untrained_effective_rank"}) & untrained.keys()
    images = empssl.load_dataset("shapes").test_images
    saved = np.load("runs/demo/test_features.npz")["test_features"]
    features = embed(empssl.load(encoder), images, 4).numpy()
    np.testing.assert_allclose(features, saved, atol=2e-3, rtol=2e-3)


@whole_runs
def test_plain_images_train_and_save_features(in_tmp, capsys):
    plain_folder(in_tmp / "plain")
    record = main(["--dataset", "imagefolder", "--data-dir", "plain", *TINY, "--name", "plain"])
    said = capsys.readouterr().out
    assert "nothing is probed" in said and "linear_top1" not in record
    assert {*SCORE, "untrained_effective_rank"} <= record.keys()
    assert f"effective rank {record['effective_rank']:.1f} (of the untrained encoder" in said
    (epoch,) = [r for r in records(RUNS / "plain")[:-1] if "effective_rank" in r]
    assert epoch["epoch"] == 1 and "untrained_effective_rank" not in epoch
    saved = np.load("runs/plain/features.npz")
    assert saved["train_features"].shape == (30, 16) and saved["files"][3].endswith("03.png")
    assert (RUNS / "plain" / "encoder.pt").exists()


@whole_runs
def test_without_labels_no_quadrants_are_made(in_tmp, encoder):
    """They are four times as wide, and nothing would probe them."""
    plain_folder(in_tmp / "plain")
    data = empssl.load_dataset("imagefolder", "plain")
    train_h, test_h = empssl.features_of_splits(encoder, data, empssl.Config())
    assert train_h.bag.shape == (30, 12) and (train_h.quadrants, test_h) == (None, None)


@whole_runs
def test_an_encoder_of_larger_patches_is_probed_on_smaller_images():
    """Their crops are enlarged; a training on crops larger than its images is refused."""
    save_encoder(Path("large.pt"), empssl.Encoder("small", 40, 16, 16, 8))
    record = main([*SHAPES, "--eval-only", "--checkpoint", "large.pt"])
    assert 0 <= record["linear_top1"] <= 1 and record["checkpoint"] == "large.pt"


@whole_runs
def test_export_features(in_tmp, capsys):
    main([*SHAPES, "--name", "demo", "--export-features", "own.npz"])
    said = capsys.readouterr().out
    assert "features of 60 training images and 40 test images written to own.npz" in said
    own, data = np.load("own.npz"), empssl.load_dataset("shapes", subset=60)
    assert own["train_features"].shape == (60, 16)
    assert np.array_equal(own["train_labels"], data.train_labels)
    saved = np.load("runs/demo/test_features.npz")["test_features"]
    assert np.array_equal(own["test_features"].astype(np.float16), saved)
    h = embed(empssl.load("runs/demo/encoder.pt"), data.train_images[40:], 4)
    np.testing.assert_allclose(own["train_features"][40:], h, atol=1e-5, rtol=1e-4)

    plain_folder(in_tmp / "plain")
    folder = ["--dataset", "imagefolder", "--data-dir", "plain", *TINY]
    wanted = ["--checkpoint", "runs/demo/encoder.pt", "--export-features", "other.npz"]
    assert main([*folder, *wanted]) == {}
    assert "features of 30 training images written to other.npz" in capsys.readouterr().out
    other = np.load("other.npz")
    assert other["train_features"].shape == (30, 16) and len(other["files"]) == 30
    assert [p.name for p in RUNS.iterdir() if not p.name.startswith(".")] == ["demo"]


@whole_runs
def test_the_record_is_json_of_plain_numbers():
    record = main([*SHAPES, "--name", "demo"])
    assert json.loads(json.dumps(record)) == record
