"""K-means on whitened patches against a literal transcription, and its SVM against liblinear."""

import pytest
import torch

from empssl_support.data import load_dataset
from study.baselines import kmeans
from study.experiments import records

sklearn_svm = pytest.importorskip("sklearn.svm")


@pytest.fixture
def images():
    return load_dataset("shapes", subset=300).train_images


@pytest.fixture(autouse=True)
def few_patches(monkeypatch):
    monkeypatch.setattr(kmeans, "PATCHES", 5_000)


def test_patches_are_all_that_fit_each_with_its_own_mean_and_deviation(images):
    x = kmeans.all_patches(images[:2])
    assert x.shape == (2, 27 * 27, 108)
    row, column = 3, 20
    patch = images[1, :, row : row + 6, column : column + 6].float().flatten()
    expected = (patch - patch.mean()) / (patch.var() + 10) ** 0.5
    torch.testing.assert_close(x[1, row * 27 + column], expected)


def test_some_patches_are_of_all_images_and_of_a_seed(images):
    x = kmeans.some_patches(images, 0)
    assert x.shape == (5_000, 108)
    assert torch.equal(x, kmeans.some_patches(images, 0))
    assert not torch.equal(x, kmeans.some_patches(images, 1))
    # 17 of each image, none of them twice in its list.
    first = x[:17]
    everywhere = kmeans.all_patches(images[:1])[0]
    assert all((everywhere == patch).all(1).any() for patch in first)


def test_a_feature_is_how_much_nearer_a_centroid_is_than_the_mean_one(images):
    features = kmeans.KMeansFeatures(images, centroids=7, seed=0)
    h = features(images[:3])
    assert h.shape == (3, 4 * 7)
    x = (kmeans.all_patches(images[2:3])[0] - features.mean) @ features.whitening
    expected = torch.zeros(4, 7)
    for place, patch in enumerate(x):
        row, column = divmod(place, 27)
        distance = (features.centroids - patch).norm(dim=1)
        quadrant = 2 * (row >= 13) + (column >= 13)
        expected[quadrant] += (distance.mean() - distance).clamp(min=0)
    torch.testing.assert_close(h[2], expected.flatten(), rtol=1e-3, atol=1e-2)


def test_whitened_patches_have_equal_strength_in_all_strong_directions(images):
    x = kmeans.some_patches(images, 0)
    features = kmeans.KMeansFeatures(images, centroids=7, seed=0)
    covariance = ((x - features.mean) @ features.whitening).T.cov()
    variance = torch.linalg.eigvalsh(x.T.cov())
    expected = variance / (variance + 0.1)
    torch.testing.assert_close(torch.linalg.eigvalsh(covariance), expected, rtol=1e-2, atol=1e-3)
    assert torch.allclose(features.whitening, features.whitening.T, atol=1e-4)  # ZCA's is symmetric


@pytest.mark.parametrize("C", [0.01, 1.0])
@pytest.mark.parametrize("common", [0, 30])
def test_the_svm_is_liblinears_of_features_that_are_nearly_equal_too(C, common):
    torch.manual_seed(0)
    x = torch.randn(200, 12) + common * torch.randn(200, 1)
    y = (x[:, :3] + 0.5 * torch.randn(200, 3)).argmax(1)
    ours = kmeans.LinearSVM(x, y).fit(x, y, C)
    # liblinear penalises the bias too, unless what it multiplies is large.
    theirs = sklearn_svm.LinearSVC(C=C, intercept_scaling=1e3, tol=1e-8, max_iter=10**6)
    theirs.fit(x.double().numpy(), y.numpy())
    weight = torch.from_numpy(theirs.coef_).float()
    torch.testing.assert_close(ours.weight.T, weight, rtol=1e-2, atol=2e-3)
    said = theirs.score(x.double().numpy(), y.numpy())
    assert ours.accuracy(x, y) == pytest.approx(said, abs=0.011)


def test_the_probe_reads_the_test_data_once_and_learns(monkeypatch):
    monkeypatch.setattr(kmeans, "HELD_OUT", 60)
    torch.manual_seed(0)
    centres = 3 * torch.randn(4, 20)
    y, test_y = torch.randint(4, (300,)), torch.randint(4, (80,))
    x, test_x = centres[y] + torch.randn(300, 20), centres[test_y] + torch.randn(80, 20)
    read = []
    accuracy = kmeans.LinearSVM.accuracy

    def watched(self, features, labels):
        read.append(len(labels))
        return accuracy(self, features, labels)

    monkeypatch.setattr(kmeans.LinearSVM, "accuracy", watched)
    found = kmeans.probe(x, y, test_x, test_y, seed=0)
    assert found["svm_top1"] > 0.95
    assert read == [60] * len(kmeans.CS) + [80]
    assert found["C"] == max(kmeans.CS, key=found["held_out_top1"].get)


def test_the_command_keeps_a_record(tmp_path, monkeypatch):
    monkeypatch.setattr(records, "RESULTS", tmp_path)
    monkeypatch.setattr(kmeans, "HELD_OUT", 60)
    monkeypatch.setattr(kmeans, "load_dataset", lambda *_: load_dataset("shapes", subset=300))
    kmeans.main(["--centroids", "9", "--seed", "2"])
    (record,) = records.read("kmeans")
    assert set(records.PROVENANCE) <= set(record)
    assert (record["name"], record["seed"]) == ("kmeans-9", 2)
    assert record["metrics"]["svm_top1"] > 0.2
    parts = ("centroid", "feature", "probe")
    assert all(record["metrics"][f"{part}_seconds"] > 0 for part in parts)


def test_a_record_says_when_it_began(tmp_path, monkeypatch):
    """Not when it ended: by then the code in the folder may be another."""
    monkeypatch.setattr(records, "RESULTS", tmp_path)
    monkeypatch.setattr(kmeans, "load_dataset", lambda *_: None)
    clock = iter(["before", "after"])
    monkeypatch.setattr(kmeans, "provenance", lambda _: {"started": next(clock)})
    monkeypatch.setattr(kmeans, "run", lambda *_: {"when": next(clock)})
    kmeans.main([])
    (record,) = records.read("kmeans")
    assert (record["started"], record["metrics"]["when"]) == ("before", "after")


def test_what_is_on_record_is_left_alone(tmp_path, monkeypatch):
    monkeypatch.setattr(records, "RESULTS", tmp_path)
    monkeypatch.setattr(kmeans, "load_dataset", lambda *_: None)
    made = []
    monkeypatch.setattr(kmeans, "run", lambda _, *which: made.append(which) or {})
    kmeans.main([])
    kmeans.main([])
    assert made == [(1600, 0)]
    kmeans.main(["--seed", "1"])
    kmeans.main(["--centroids", "9"])
    kmeans.main(["--data-dir", "others"])
    assert made == [(1600, 0), (1600, 1), (9, 0), (1600, 0)]
