"""A run as one HTML page, `report.html` in the run's folder, which opens with no network.

It is drawn from what lies in that folder alone, as the images may be gone. The page's frame and
style are in report.html beside this file, its parts in report_sections.py.
"""

import html
import json
import zipfile
from pathlib import Path
from string import Template

import numpy as np
from torch import Tensor

from empssl_support import report_pictures as pictures
from empssl_support import report_sections as sections
from empssl_support.cli import UsageError
from empssl_support.files import halved, write_features, write_text
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
        features=halved(features),
        untrained=None if untrained is None else halved(untrained),
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
    """Draw the run in that folder.

    Raises `UsageError` where it is no run's, has nothing to show yet, or the extra is missing.
    """
    plt = pyplot()
    config, log = read_run(run)
    # The map takes most of the time, and says nothing before it is there.
    print("drawing a page of the run", flush=True)
    shown = read_kept(run, config.get("data_dir", ""))
    script, element = "", ""
    if shown and len(shown.features) > 1:
        code, element = pictures.draw_map(shown)
        script = bokeh_code() + code
    parts = [sections.figures(log[-1], shown)]
    if element and shown.thumbnails:
        parts.append(sections.neighbours(shown))
    if element:
        parts.append(sections.map_of(shown, element))
    if element and shown.thumbnails:
        parts.append(sections.odd_ones_out(shown))
        parts.append(sections.near_duplicates(shown))
    parts.append(sections.patches(read_arrays(run / "patches.npz")))
    parts.append(sections.curves(plt, log))
    page = Template(FRAME.read_text()).substitute(
        title=html.escape(run.resolve().name),
        trained=html.escape(sections.what_was_trained(config, log[-1], shown)),
        missing=what_is_missing(shown),
        sections="\n".join(parts),
        scripts=script,
    )
    # The name of a folder or a class may be no text.
    write_text(run / "report.html", page.encode(errors="replace").decode())
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


def what_is_missing(shown: Shown | None) -> str:
    if shown and shown.thumbnails:
        return ""
    return (
        f'<p class="pale" id="missing">This run has no whole {KEPT}, which a run leaves at its '
        f"end, so its images and their neighbours cannot be shown.</p>"
    )
