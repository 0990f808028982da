"""Image features by k-means on patches, without a network: what learning deeply has to beat.

Coates, Ng and Lee, "An analysis of single-layer networks in unsupervised feature learning", 2011.

    python -m study.baselines.kmeans --centroids 1600

Patches of 6x6 pixels are normalised in contrast and whitened, and k-means finds their centroids.
At every place of an image, a centroid's feature is how much nearer it is than centroids are on
average; the features of each quadrant are added up. What is probed are the four sums side by side.
The probe is the paper's, a linear SVM with squared hinge loss; its C is chosen on 5,000 of the
training images. The record is kept in study/results/kmeans.jsonl, and what is there is left alone.
"""

import argparse
import time

import torch
import torch.nn.functional as F
from sklearn.cluster import MiniBatchKMeans
from torch import Tensor

from empssl import generator_of
from empssl_support.cli import one_sentence, progress
from empssl_support.data import load_dataset
from empssl_support.machine import provenance
from study.experiments.records import keep, named

SIDE = 6  # of a patch, in pixels
PATCHES = 400_000  # that the centroids are learnt from
HELD_OUT = 5_000  # training images that choose C
CS = (1.0, 3.0, 10.0, 30.0, 100.0)  # tried, of features whose mean squared length is 1


def contrast_normalised(x: Tensor) -> Tensor:
    """Each patch `(..., 108)`, of values 0 to 255, to mean 0 and deviation about 1.

    The paper's constant, 10, keeps a patch without contrast from being blown up.
    """
    x = x - x.mean(-1, keepdim=True)
    return x / (x.var(-1, keepdim=True) + 10).sqrt()


def all_patches(images: Tensor) -> Tensor:
    """Every patch of images `(N, 3, H, W)` uint8, as `(N, places, 108)`, contrast normalised."""
    return contrast_normalised(F.unfold(images.float(), SIDE).mT)


def some_patches(images: Tensor, seed: int) -> Tensor:
    """`(PATCHES, 108)`: as many from each image, places drawn by the seed."""
    chance = generator_of(seed, "kmeans patches", 0)
    each = -(-PATCHES // len(images))
    found = []
    for part in images.split(500):
        x = all_patches(part)
        places = torch.rand(x.shape[:2], generator=chance).topk(each).indices  # (500, each)
        found.append(x.gather(1, places[..., None].expand(-1, -1, x.shape[-1])).flatten(0, 1))
    return torch.cat(found)[:PATCHES]


class KMeansFeatures:
    """Learn whitening and centroids from images; then call it on images for their features."""

    def __init__(self, images: Tensor, centroids: int, seed: int):
        x = some_patches(images, seed)
        # ZCA whitening. The constant, the paper's .1, keeps directions that hold next to nothing,
        # such as noise, from being blown up.
        self.mean = x.mean(0)
        variance, components = torch.linalg.eigh(x.T.cov())
        self.whitening = components / (variance + 0.1).sqrt() @ components.T  # (108, 108)
        x = (x - self.mean) @ self.whitening
        means = MiniBatchKMeans(
            centroids, batch_size=10_000, max_iter=10, n_init=1, init="random", random_state=seed
        )
        self.centroids = torch.from_numpy(means.fit(x.numpy()).cluster_centers_).float()  # (K, 108)

    def __call__(self, images: Tensor) -> Tensor:
        """`(N, 3, H, W)` uint8 -> `(N, 4 K)`, the quadrants side by side."""
        side = images.shape[-1] - SIDE + 1  # places in a row
        features = torch.empty(len(images), 4 * len(self.centroids))
        # Two images at a time: their distances then stay in the processor's cache.
        rows_and_images = list(zip(features.split(2), images.split(2), strict=True))
        for rows, part in progress(rows_and_images, desc="features", unit="batch", leave=False):
            x = (all_patches(part) - self.mean) @ self.whitening
            # "Triangle" activation: how much nearer than the mean distance, or nothing.
            distance = torch.cdist(x, self.centroids)  # (2, places, K)
            nearer = (distance.mean(-1, keepdim=True) - distance).relu_()
            nearer = nearer.unflatten(1, (side, side))
            halves = (slice(None, side // 2), slice(side // 2, None))
            sums = [nearer[:, tall, wide].sum((1, 2)) for tall in halves for wide in halves]
            torch.cat(sums, dim=1, out=rows)
        return features


class LinearSVM:
    """One against all others, squared hinge loss, as liblinear's L2-regularised L2-loss SVM.

        1/2 |w|^2 + C sum over images of  max(0, 1 - y (w x + bias))^2

    of each class, over all images at once, by L-BFGS. Features are far from independent, so in
    their own coordinates hundreds of steps do not arrive. `fit` therefore steps in coordinates u in
    which ridge regression's Hessian, I + C X^T X = L L^T, is the identity: w = L^-T u.
    """

    def __init__(self, x: Tensor, y: Tensor):
        self.gram = x.T @ x  # (width, width); of more images than `fit` has, it serves as well
        self.classes = int(y.max()) + 1

    def fit(self, x: Tensor, y: Tensor, C: float, steps: int = 100) -> "LinearSVM":
        sign = 2 * F.one_hot(y, self.classes) - 1  # (N, classes)
        width = x.shape[1]
        factor = torch.linalg.cholesky(torch.eye(width) + C * self.gram)  # L
        u = torch.zeros(width, self.classes, requires_grad=True)
        shift = torch.zeros(self.classes, requires_grad=True)
        optimizer = torch.optim.LBFGS([u, shift], max_iter=steps, line_search_fn="strong_wolfe")

        def solution() -> tuple[Tensor, Tensor]:
            weight = torch.linalg.solve_triangular(factor.mT, u, upper=True)
            return weight, shift / (C * len(x)) ** 0.5

        def closure() -> Tensor:
            optimizer.zero_grad()
            weight, bias = solution()
            hinge = (1 - sign * (x @ weight + bias)).relu()
            loss = weight.square().sum() / 2 + C * hinge.square().sum()
            loss.backward()
            return loss

        optimizer.step(closure)
        with torch.no_grad():
            self.weight, self.bias = solution()
        return self

    def accuracy(self, x: Tensor, y: Tensor) -> float:
        return ((x @ self.weight + self.bias).argmax(1) == y).float().mean().item()


def probe(x: Tensor, y: Tensor, test_x: Tensor, test_y: Tensor, seed: int) -> dict:
    """Test accuracy of an SVM on standardised features; the test data are read once, at its end."""
    mean, deviation = x.mean(0), x.std(0) + 1e-6
    width = x.shape[1]
    for features in (x, test_x):
        # In place, since a copy would be gigabytes; the mean squared length is then 1.
        features.sub_(mean).div_(deviation).div_(width**0.5)
    order = torch.randperm(len(y), generator=generator_of(seed, "held out", 0))
    held_out, rest = order[:HELD_OUT], order[HELD_OUT:]
    svm = LinearSVM(x, y)
    on_held_out = {}
    x_rest, y_rest = x[rest], y[rest]
    for C in progress(CS, desc="choosing C", unit="fit", leave=False):
        on_held_out[C] = svm.fit(x_rest, y_rest, C).accuracy(x[held_out], y[held_out])
    del x_rest
    best = max(CS, key=on_held_out.get)
    top1 = svm.fit(x, y, best).accuracy(test_x, test_y)
    return {"svm_top1": top1, "C": best, "held_out_top1": on_held_out}


def run(images, centroids: int, seed: int) -> dict:
    """The metrics of one data set, by `load_dataset`."""
    started = time.perf_counter()
    features = KMeansFeatures(images.train_images, centroids, seed)
    learnt = time.perf_counter()
    x, test_x = features(images.train_images), features(images.test_images)
    computed = time.perf_counter()
    accuracies = probe(x, images.train_labels, test_x, images.test_labels, seed)
    ended = time.perf_counter()
    return accuracies | {
        "centroid_seconds": learnt - started,
        "feature_seconds": computed - learnt,
        "probe_seconds": ended - computed,
    }


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="K-means on whitened patches, and an SVM.")
    parser.add_argument("--data-dir", default="data/cifar10-jpeg", help="a folder of images")
    parser.add_argument("--centroids", type=int, default=1600, help="K")
    parser.add_argument("--seed", type=int, default=0)
    typed = parser.parse_args(argv)
    name = f"kmeans-{typed.centroids}"
    kept = [(record["seed"], record["data_dir"]) for record in named("kmeans", name)]
    if (typed.seed, typed.data_dir) in kept:
        print(f"{name} of seed {typed.seed} is on record in study/results/kmeans.jsonl")
        return
    # Before anything is made: of when it began, and of the code that was loaded.
    code = provenance("cpu")
    images = load_dataset("imagefolder", typed.data_dir)
    metrics = run(images, typed.centroids, typed.seed)
    print(metrics)
    record = {
        "name": name,
        "seed": typed.seed,
        "centroids": typed.centroids,
        "dataset": "imagefolder",
        "data_dir": typed.data_dir,
    }
    keep("kmeans", record | code | {"metrics": metrics})


if __name__ == "__main__":
    with one_sentence():
        main()
