"""The parts of a report's page, with captions that say what one sees and what would be good."""

import html
from pathlib import Path

import numpy as np

from empssl_support import report_pictures as pictures
from empssl_support.cli import human_time
from empssl_support.report_pictures import Shown


def section(name: str, title: str, captions: list[str], content: str = "") -> str:
    text = "".join(f"<p>{caption}</p>\n" for caption in captions if caption)
    return f'<section id="{name}">\n<h2>{title}</h2>\n{text}{content}\n</section>'


def what_was_trained(config: dict, last: dict, shown: Shown | None) -> str:
    """Two sentences: what was trained, on what, in how long; and what is shown."""
    hardware = config.get("hardware", "an unknown machine")
    images = f"{config.get('images', 0):,} images of {name_of_data(config)}"
    if "patches_seen" in last:
        method = config.get("method", "EMP-SSL")
        epochs = f"{config['epochs']} epoch{'s' if config['epochs'] > 1 else ''}"
        labels = "" if method == "supervised" else ", with no labels to learn from,"
        told = (
            f"{method} (preset {config['preset']}) looked at {last['patches_seen']:,} small "
            f"patches of {images}{labels} for {human_time(last['train_seconds'])} ({epochs}) "
            f"on {hardware}."
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
        content = table(head, rows) + f"<p>{verdict(last)}</p>"
        captions = captions_of_scores(shown)
    captions += without_labels(last)
    if "probe_seconds" not in last:
        captions.append("The run has not come to its end, so nothing has been scored yet.")
    elif not captions:
        captions.append("There are no labels to score with; look at the pictures below instead.")
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
        "How often the encoder's features tell the class of a test image, found out in several "
        f"ways; higher is better.{guess}",
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
    return f"Here training took kNN {from_to}, beyond raw pixels: it sees what they do not show."


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
        "like it, nearest first."
    ]
    if shown.untrained is not None:
        captions.append(
            "If the upper rows go together to your eye, by what is on them and not only by colour, "
            "and the lower rows, of the encoder before training, do so less, then it has learned "
            "to see. If both rows look equally random, it has not."
        )
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
    captions = [
        "Every dot is an image, and images that the encoder finds alike lie close together. What "
        "is left or right, and how far islands lie apart, means nothing."
    ]
    if shown.thumbnails:
        captions[0] += " Move over a dot, or touch it, to see the image."
    if shown.labels is None:
        captions.append(
            "Colours are groups that the computer made, for you to find your way. In a good result "
            "dots side by side show the same sort of thing; in a bad one anything lies beside "
            "anything."
        )
    else:
        captions.append(
            "Colours are the classes. Islands of one colour are a good result, an even mixture of "
            "all colours is a bad one."
        )
    content = pictures.legend(shown) + f'<div class="map">{element}</div>'
    return section("map", "A map", captions, content)


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
            f"neighbours usually are, the most alike first (1 would be equal). Copies and bursts "
            f"of photos show here; if the two images of a pair have nothing in common, the "
            f"encoder mistakes them."
        )
    parts = []
    for i, j, cosine in pairs[:most]:
        two = pictures.tile(shown, i) + pictures.tile(shown, j)
        names = html.escape(f"{shown.names[i]} and {shown.names[j]}")
        about = f"<figcaption>{names}, {cosine:.3f}</figcaption>"
        parts.append(f"<figure><div>{two}</div>{about}</figure>")
    content = f'<div class="pairs">{"".join(parts)}</div>'
    return section("duplicates", "Near-duplicates", [caption], content)


def patches(saved: dict[str, np.ndarray]) -> str:
    """The images, each beside its patches, that patches.npz holds."""
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
    "train_knn_top1": ("right by kNN within the training images", {"ylim": (0, 1)}),
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
