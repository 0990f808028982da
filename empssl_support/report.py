"""A run as one HTML page, `report.html` in the run's folder, which opens with no network.

It is drawn from what lies in that folder alone, as the images may be gone. The page's frame and its
style are in report.html beside this file.
"""

import html
import json
import zipfile
from pathlib import Path
from string import Template

import numpy as np
from torch import Tensor

from empssl_support import report_pictures as pictures
from empssl_support.cli import UsageError, human_time
from empssl_support.files import write_features, write_text
from empssl_support.report_pictures import Shown
from empssl_support.runs import records

FRAME = Path(__file__).with_name("report.html")
KEPT = "report.npz"


# ---- what a run keeps for its report ----


def keep(
    run: Path,
    images: Tensor,
    features: Tensor,
    untrained: Tensor | None = None,
    labels: Tensor | None = None,
    classes: list[str] | None = None,
    files: list[str] | None = None,
) -> None:
    """Write `report.npz`: small copies of images (N, 3, H, W) uint8, and what is known of them.

    features and untrained `(N, width)` are those after and before training.
    """
    small = pictures.thumbnails(images.cpu().numpy())
    write_features(
        run / KEPT,
        thumbnails=np.frombuffer(b"".join(small), np.uint8),  # N WebP files, end to end
        lengths=[len(file) for file in small],
        features=features.half(),
        untrained=None if untrained is None else untrained.half(),
        labels=labels,
        classes=classes or None,
        files=files,
    )


def read_kept(run: Path, data_dir: str) -> Shown | None:
    """What `keep` wrote; without it the features that were probed, which older runs have."""
    kept = read_arrays(run / KEPT)
    small = []
    if "features" in kept:
        ends = np.cumsum(kept["lengths"])
        pieces = np.split(kept["thumbnails"], ends[:-1])
        small = [pictures.data_uri(piece.tobytes()) for piece in pieces]
    elif old := read_arrays(run / "test_features.npz"):
        kept = {"features": old["test_features"], "labels": old["test_labels"]}
        kept["classes"] = old["classes"]
    elif old := read_arrays(run / "features.npz"):
        kept = {"features": old["train_features"], "files": old["files"]}
    else:
        return None
    some = np.random.default_rng(0).permutation(len(kept["features"]))[:3000]
    rows = np.arange(len(small)) if small else np.sort(some)
    labels, untrained = kept.get("labels"), kept.get("untrained")
    names = [f"image {row + 1}" for row in rows]
    if "files" in kept:
        names = [short(str(kept["files"][row]), data_dir) for row in rows]
    return Shown(
        features=unit_rows(kept["features"][rows]),
        untrained=None if untrained is None else unit_rows(untrained[rows]),
        thumbnails=small,
        labels=None if labels is None else labels[rows],
        classes=[str(name) for name in kept.get("classes", [])],
        names=names,
    )


def read_arrays(path: Path) -> dict[str, np.ndarray]:
    """What an `.npz` holds; nothing where it is missing or damaged."""
    try:
        with np.load(path) as saved:
            return dict(saved)
    except (OSError, ValueError, EOFError, zipfile.BadZipFile):
        return {}


def short(file: str, folder: str) -> str:
    """The file's path within the folder of images, with what is no text shown as `?`."""
    path = Path(file)
    if path.is_relative_to(folder):
        path = path.relative_to(folder)
    return str(path).encode(errors="replace").decode()


def unit_rows(features: np.ndarray) -> np.ndarray:
    features = features.astype(np.float32)
    return features / (np.linalg.norm(features, axis=1, keepdims=True) + 1e-8)


# ---- the page ----


def write_at_the_end(run: Path) -> None:
    """As `write`; what it cannot do is said in a line, for the run has come to its end."""
    try:
        write(run)
    except UsageError as error:
        print(f"no report: {error}")


def write(run: Path) -> None:
    """Draw the run in that folder. Raises `UsageError` where there is none, or nothing to show."""
    plt = pyplot()
    config, log = read_run(run)
    shown = read_kept(run, config.get("data_dir", ""))
    last = log[-1]
    drawn = ("", "")
    if shown and len(shown.features) > 1:
        drawn = pictures.draw_map(shown)
    sections = [figures(last, shown)]
    if shown and shown.thumbnails and len(shown.thumbnails) > 1:
        sections += [neighbours(shown), map_of(shown, drawn[1])]
        sections += [odd_ones_out(shown), near_duplicates(shown)]
    elif drawn[1]:
        sections.append(map_of(shown, drawn[1]))
    sections += [patches(run), curves(plt, log)]
    page = Template(FRAME.read_text()).substitute(
        title=html.escape(run.name or run.resolve().name),
        trained=html.escape(what_was_trained(config, log, shown)),
        missing=what_is_missing(shown),
        sections="\n".join(sections),
        scripts=bokeh_code() + drawn[0] if drawn[0] else "",
    )
    write_text(run / "report.html", page)
    print(f"drawn: {run / 'report.html'}, a page to open in a browser")


def read_run(run: Path) -> tuple[dict, list[dict]]:
    """A run's settings and the lines of its log."""
    try:
        config = json.loads((run / "config.json").read_text())
        log = records(run)
    except (OSError, ValueError):
        config, log = {}, []
    if not (log and isinstance(config, dict) and "dataset" in config):
        raise UsageError(f"{run} is no run's folder, or has nothing to show yet; give another.")
    return config, log


def pyplot():
    try:
        import bokeh  # noqa: F401
        import matplotlib
        import sklearn  # noqa: F401
    except ImportError:
        raise UsageError(
            "a report needs matplotlib, scikit-learn and bokeh; "
            "install them with pip install -e '.[figures]'."
        ) from None
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt


def bokeh_code() -> str:
    """Bokeh's own script, whole, so that nothing is fetched; without its tables and formulas."""
    from bokeh.resources import Resources

    return Resources(mode="inline", components=["bokeh"]).render()


def section(name: str, title: str, captions: list[str], content: str = "") -> str:
    text = "".join(f"<p>{caption}</p>\n" for caption in captions if caption)
    return f'<section id="{name}">\n<h2>{title}</h2>\n{text}{content}\n</section>'


def what_was_trained(config: dict, log: list[dict], shown: Shown | None) -> str:
    """Two sentences: what was trained, on what, in how long; and what is shown."""
    last, hardware = log[-1], config.get("hardware", "an unknown machine")
    images = f"{config.get('images', 0):,} images of {name_of_data(config)}"
    if "patches_seen" in last:
        method = config.get("method", "EMP-SSL")
        epochs = f"{config['epochs']} epoch{'s' if config['epochs'] > 1 else ''}"
        told = (
            f"{method} (preset {config['preset']}) looked at {last['patches_seen']:,} small "
            f"patches of {images}, with no labels to learn from, for "
            f"{human_time(last['train_seconds'])} ({epochs}) on {hardware}."
        )
    elif "probe_seconds" in last:
        whose = config.get("checkpoint") or "an encoder that was not trained"
        told = f"Nothing was trained here: {whose} was tried on {images}, on {hardware}."
    else:
        told = f"Training on {images} has not come to its end: this is step {last.get('step', 0)}."
    if not shown:
        return told
    test = "training" if shown.labels is None else "test"
    return f"{told} Below is what it makes of {len(shown.features):,} {test} images."


def name_of_data(config: dict) -> str:
    if config["dataset"] == "imagefolder":
        return f"the folder {Path(config.get('data_dir', '')).name or 'given'}"
    return config["dataset"]


def what_is_missing(shown: Shown | None) -> str:
    if shown and shown.thumbnails:
        return ""
    return (
        f'<p class="pale" id="missing">This run has no whole {KEPT}, which a run leaves at its '
        f"end, so its images and their neighbours cannot be shown.</p>"
    )


# ---- the parts of the page, in order ----

SCORES = (
    # what is scored; with this encoder; before training; with raw pixels
    ("a linear classifier, bag of patches", "linear_top1", None, "raw_pixels_top1"),
    ("a linear classifier, quadrants", "quadrants_top1", None, None),
    ("nearest neighbours (kNN)", "knn_top1", "untrained_knn_top1", "raw_pixels_knn_top1"),
)


def figures(last: dict, shown: Shown | None) -> str:
    rows = []
    for name, *keys in SCORES:
        if keys[0] in last:
            cells = [percent(last.get(key)) for key in keys]
            rows.append((name, *cells))
    captions = []
    content = ""
    if rows:
        head = ("test images whose class is told by", "this encoder", "untrained", "raw pixels")
        content = table(head, rows)
        captions = [*captions_of_scores(shown), verdict(last)]
    captions += without_labels(last)
    if not captions:
        captions = ["There are no labels to score with; look at the pictures below instead."]
    return section("figures", "In figures", captions, content)


def percent(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.1f} %"


def table(head: tuple, rows: list[tuple]) -> str:
    lines = ["".join(f"<th>{cell}</th>" for cell in head)]
    for name, trained, *others in rows:
        cells = "".join(f"<td>{cell}</td>" for cell in others)
        lines.append(f'<td>{name}</td><td class="trained">{trained}</td>{cells}')
    return "<table>" + "".join(f"<tr>{line}</tr>" for line in lines) + "</table>"


def captions_of_scores(shown: Shown | None) -> list[str]:
    guess = ""
    if shown and shown.classes:
        guess = f" Guessing among {len(shown.classes)} classes is right in about "
        guess += f"{percent(1 / len(shown.classes))}."
    return [
        "The encoder never saw a label. Here its features are used to tell the class of test "
        f"images, in two or three ways; higher is better.{guess}",
        "A good result is clearly above both the untrained encoder and raw pixels. As good as "
        "untrained means that nothing was learned.",
    ]


def verdict(last: dict) -> str:
    """What kNN says of the training, which every run with labels has beside what it has to beat."""
    if not {"knn_top1", "untrained_knn_top1", "raw_pixels_knn_top1"} <= last.keys():
        return ""
    trained, untrained = last["knn_top1"], last["untrained_knn_top1"]
    pixels = last["raw_pixels_knn_top1"]
    from_to = f"from {percent(untrained)} to {percent(trained)}"
    if trained <= untrained:
        return f"Here kNN went {from_to}: by this measure training has gained nothing."
    if trained <= pixels:
        return (
            f"Here training took kNN {from_to}, but raw pixels alone reach {percent(pixels)}: "
            f"something was learned, and by this measure not yet enough."
        )
    return f"Here training took kNN {from_to}, beyond raw pixels: what is on them counts."


def without_labels(last: dict) -> list[str]:
    """A sentence for each score that needs no labels, where the run has it."""
    captions = []
    if "effective_rank" in last:
        before = last.get("untrained_effective_rank")
        before = "" if before is None else f" (untrained: {before:.1f})"
        captions.append(
            f"<b>Effective rank {last['effective_rank']:.1f}</b>{before}: in about so many "
            f"independent ways the encoder tells images apart; near 1 it sees them all alike."
        )
    if "neighbours_kept" in last:
        captions.append(
            f"<b>Neighbours kept {percent(last['neighbours_kept'])}</b>: this share of an image's "
            f"nearest images stays the same when other patches are looked at; the higher, the "
            f"more one can rely on them."
        )
    return captions


def neighbours(shown: Shown) -> str:
    some = np.random.default_rng(0).permutation(len(shown.features))[:12]
    captions = [
        "A dozen images, drawn by chance, and beside each the eight that the encoder finds most "
        "like it, nearest first. If the upper rows go together to your eye, by what is on them and "
        "not only by colour, and the lower rows, of the encoder before training, do so less, "
        "then it has learned to see. If both rows look equally random, it has not."
    ]
    if shown.untrained is None:
        captions = [
            "A dozen images, drawn by chance, and beside each the eight that the encoder finds "
            "most like it, nearest first. There is no training to compare with."
        ]
    if shown.labels is not None:
        after = pictures.share_of_same_class(shown.features, shown.labels)
        text = f"A green frame means the image's own class, a grey one another: {percent(after)} "
        text += "of all images' neighbours are of their own class"
        if shown.untrained is not None:
            before = pictures.share_of_same_class(shown.untrained, shown.labels)
            text += f", and {percent(before)} before training"
        captions.append(text + ".")
    return section("neighbours", "Neighbours", captions, pictures.neighbour_rows(shown, some))


def map_of(shown: Shown, element: str) -> str:
    colour = "its class" if shown.labels is not None else "one of the groups that they fall into"
    picture = "move over a dot, or touch it, to see the image" if shown.thumbnails else "no images"
    caption = (
        f"Every dot is an image, its colour {colour}; {picture}. Images that the encoder finds "
        f"alike lie close together. Islands of one kind are a good result, an even mixture is a "
        f"bad one. Which island is left or right, and how far islands lie apart, means nothing."
    )
    content = pictures.legend(shown) + f'<div class="map">{element}</div>'
    return section("map", "A map", [caption], content)


def odd_ones_out(shown: Shown, k: int = 8) -> str:
    _, cosine = pictures.nearest(shown.features, k)
    odd = np.argsort(cosine.mean(axis=1), kind="stable")[:12]
    caption = (
        "The images least like even their nearest neighbours. Among photos these are often "
        "screenshots, scans, broken files, or the only one of its kind."
    )
    tiles = "".join(pictures.figure(shown, i) for i in odd)
    return section("odd", "The odd ones out", [caption], f'<div class="tiles">{tiles}</div>')


def near_duplicates(shown: Shown, most: int = 12) -> str:
    pairs = pictures.twins(shown.features)
    caption = "No two images are nearly the same to the encoder."
    if pairs:
        caption = (
            f"{len(pairs):,} pair{'s' if len(pairs) > 1 else ''} of images far more alike than "
            f"neighbours usually are; the most alike come first. Copies and bursts of photos "
            f"show here; if the two images of a pair have nothing in common, the encoder "
            f"mistakes them."
        )
    parts = []
    for i, j, cosine in pairs[:most]:
        two = pictures.tile(shown, i) + pictures.tile(shown, j)
        names = html.escape(f"{shown.names[i]}, {shown.names[j]}")
        about = f"<figcaption>{names}: {cosine:.4f}</figcaption>"
        parts.append(f"<figure><div>{two}</div>{about}</figure>")
    content = f'<div class="pairs">{"".join(parts)}</div>'
    return section("duplicates", "Near-duplicates", [caption], content)


def patches(run: Path) -> str:
    saved = read_arrays(run / "patches.npz")
    if not {"images", "patches"} <= saved.keys():
        return ""
    tiles = []
    images, cut = saved["images"], saved["patches"]  # (6, 3, H, W), (12, 6, 3, s, s)
    for j in range(len(images)):
        for number, pixels in enumerate([images[j], *cut[:, j]]):
            about = f"patch {number} of image {j + 1}" if number else f"image {j + 1}"
            uri = pictures.data_uri(pictures.webp(pixels, 64, 90))
            tiles.append(pictures.image(uri, about))
    caption = (
        "What training looked at: left an image, beside it patches that were cut from it at "
        "random places and recoloured. The encoder learns to recognise that the patches of a row "
        "belong together. If you could not tell that either, training is too hard."
    )
    content = f'<div class="patches">{"".join(tiles)}</div>'
    return section("patches", "Patches", [caption], content)


CURVES = {
    "R": ("R, how spread out images are", {}),
    "D": ("D, how much patches agree", {}),
    "holdout_knn_top1": ("right by kNN, held-out images", {"ylim": (0, 1)}),
    "effective_rank": ("effective rank", {}),
}


def curves(plt, log: list[dict]) -> str:
    drawn = []
    for key, (title, ends) in CURVES.items():
        points = [(r["step"], r[key]) for r in log if key in r and "step" in r]
        if points:
            drawn.append(pictures.draw_curve(plt, *zip(*points, strict=True), title, ends))
    if not drawn:
        return ""
    caption = (
        "Training step by step. R and D should rise and then level off; R that falls towards 0 "
        "would mean that all images become alike to the encoder."
    )
    content = f'<div class="curves">{"".join(drawn)}</div>'
    return section("curves", "Training", [caption], content)
