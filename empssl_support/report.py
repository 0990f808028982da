"""A run as one HTML page, `report.html` in the run's folder, which opens with no network.

It shows what was trained and what came out, images beside patches that training cut from them, the
curves of training, and a map of the features. The three pictures are left beside it as .png.
"""

import base64
import html
import json
from pathlib import Path

import numpy as np

from empssl_support.cli import UsageError
from empssl_support.runs import records

PAGE = """<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>
body {{ font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto }}
img {{ max-width: 100%; height: auto }}
td {{ padding: 0 1.5rem 0 0 }}
</style>
<h1>{title}</h1>
<p>{trained}</p>
<table>{rows}</table>
{pictures}
</html>
"""
FIGURES = {
    "linear_top1": "linear probe, bag of patches",
    "quadrants_top1": "linear probe, quadrants",
    "knn_top1": "kNN, bag of patches",
    "untrained_knn_top1": "kNN, untrained encoder",
    "raw_pixels_knn_top1": "kNN, raw pixels",
}


def write(run: Path) -> None:
    """Draw the run in that folder. Raises `UsageError` where there is none, or nothing to show."""
    plt = pyplot()
    try:
        config = json.loads((run / "config.json").read_text())
        log = records(run)
    except (OSError, ValueError):
        log = []
    if not log:
        raise UsageError(f"{run} is no run's folder, or has nothing to show yet; give another.")
    pictures = [("Images, and patches that training cut from them", draw_patches(plt, run))]
    pictures.append(("Training", draw_curves(plt, run, log)))
    pictures.append(("A map of the test images' features", draw_map(plt, run)))
    drawn = [(title, path) for title, path in pictures if path]
    page = PAGE.format(
        title=html.escape(run.name),
        trained=html.escape(what_was_trained(config, log[-1])),
        rows="".join(row(label, log[-1][key]) for key, label in FIGURES.items() if key in log[-1]),
        pictures="".join(embedded(title, path) for title, path in drawn),
    )
    (run / "report.html").write_text(page)
    print(f"drawn: {run / 'report.html'}, with", ", ".join(path.name for _, path in drawn))


def what_was_trained(config: dict, last: dict) -> str:
    if "patches_seen" not in last:
        return f"An encoder was probed on {config['dataset']}, on {config['hardware']}."
    return (
        f"{config.get('method', 'EMP-SSL')}, preset {config['preset']}, was trained without labels "
        f"on {config['images']:,} images of {config['dataset']}: {config['epochs']} epochs, "
        f"{last['patches_seen']:,} patches, {last['train_seconds']:.0f} seconds "
        f"on {config['hardware']}."
    )


def row(label: str, value: float) -> str:
    return f"<tr><td>{label}</td><td>{value:.3f}</td></tr>"


def embedded(title: str, path: Path) -> str:
    content = base64.b64encode(path.read_bytes()).decode()
    return f'<h2>{title}</h2>\n<img alt="{title}" src="data:image/png;base64,{content}">\n'


def pyplot():
    try:
        import matplotlib
        import sklearn  # noqa: F401
    except ImportError:
        raise UsageError(
            "a report needs matplotlib and scikit-learn; "
            "install them with pip install -e '.[figures]'."
        ) from None
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt


def draw_patches(plt, run: Path) -> Path | None:
    if not (run / "patches.npz").is_file():
        return None
    saved = np.load(run / "patches.npz")
    images, patches = saved["images"], saved["patches"]  # (6, 3, H, W), (12, 6, 3, s, s)
    columns, rows = patches.shape[:2]
    figure, axes = plt.subplots(
        rows,
        columns + 1,
        figsize=(columns + 1, rows),
        squeeze=False,
        gridspec_kw={"wspace": 0.05, "hspace": 0.05},
    )
    for j in range(rows):
        for ax, pixels in zip(axes[j], [images[j], *patches[:, j]], strict=True):
            ax.imshow(pixels.transpose(1, 2, 0))
            ax.axis("off")
    axes[0][0].set_title("image")
    axes[0][1].set_title(f"patches, {patches.shape[-1]}x{patches.shape[-1]}", loc="left")
    return save(figure, run / "patches.png")


def draw_curves(plt, run: Path, log: list[dict]) -> Path | None:
    steps = [record for record in log if "R" in record and "step" in record]
    epochs = [record for record in log if "holdout_knn_top1" in record]
    if not steps:
        return None
    figure, axes = plt.subplots(1, 3, figsize=(12, 3), layout="constrained")
    titles = {"R": "R, coding rate (nats)", "D": "D, invariance"}
    for ax, (key, title) in zip(axes, titles.items(), strict=False):
        ax.plot([record["step"] for record in steps], [record[key] for record in steps])
        ax.set(title=title, xlabel="step")
    ax = axes[2]
    at = [record["step"] for record in epochs]
    ax.plot(at, [record["holdout_knn_top1"] for record in epochs], "o-", label="kNN, held out")
    styles = ("-", "-.", "--", ":", (0, (1, 4)))
    for (key, label), style in zip(FIGURES.items(), styles, strict=True):
        if key in log[-1]:
            value = log[-1][key]
            ax.axhline(value, color="grey", linestyle=style, label=f"{label} {value:.3f}")
    ax.set(title="top-1 accuracy", xlabel="step", ylim=(0, 1))
    ax.legend(fontsize=7)
    return save(figure, run / "curves.png")


def draw_map(plt, run: Path, most: int = 2000) -> Path | None:
    """t-SNE of at most `most` test images, coloured by class."""
    if not (run / "test_features.npz").is_file():
        return None
    from sklearn.manifold import TSNE

    saved = np.load(run / "test_features.npz")
    chosen = np.random.default_rng(0).permutation(len(saved["test_labels"]))[:most]
    features = saved["test_features"][chosen].astype(np.float32)
    features /= np.linalg.norm(features, axis=1, keepdims=True) + 1e-8
    perplexity = min(30, (len(chosen) - 1) / 3)
    xy = TSNE(random_state=0, perplexity=perplexity, init="pca").fit_transform(features)

    labels, classes = saved["test_labels"][chosen], saved["classes"]
    few = len(classes) <= 10
    colours = plt.get_cmap("tab10" if few else "gist_rainbow", max(10, len(classes)))
    figure, ax = plt.subplots(figsize=(7, 6), layout="constrained")
    for number, name in enumerate(classes):
        ax.scatter(*xy[labels == number].T, s=5, color=colours(number), label=name)
    if len(classes) <= 20:
        ax.legend(markerscale=3, fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    ax.set(title=f"t-SNE of {len(chosen)} test images' features", xticks=[], yticks=[])
    return save(figure, run / "map.png")


def save(figure, path: Path) -> Path:
    figure.savefig(path, dpi=120, bbox_inches="tight")
    return path
