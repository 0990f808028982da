"""Three pictures, from the records: python -m study.experiments.plot

docs/peers.png is of ten minutes of each method, its accuracy against the seconds of training;
docs/numbers.png of numbers of patches, at equal images and at equal patches; docs/claims.png of
what others claim, and by how much it came out so.
"""

import statistics
from pathlib import Path

from empssl_support.cli import one_sentence
from empssl_support.report import pyplot
from study.experiments import claims, minutes, patches
from study.experiments.cells import METHODS
from study.experiments.comparisons import PAPERS, of_patches
from study.experiments.records import mean_and_deviation, named

DOCS = Path(__file__).resolve().parent.parent.parent / "docs"
COLOURS = {
    "empssl": "#d1342f",
    "simclr": "#2c6fb7",
    "vicreg": "#1f9e89",
    "ressl": "#b07aa1",
    "single": "#8a6d3b",
    "swav": "#e08a1e",
    "byol": "#6b7280",
}


def draw_ten_minutes() -> None:
    """The first seed's line of each method, and at its end the mean and deviation of all seeds."""
    ends = {}
    figure, axes = pyplot().subplots(figsize=(9, 5.4), layout="constrained")
    for method, colour in COLOURS.items():
        runs = named("minutes", method)
        if not runs:
            continue
        seconds, accuracies = zip(*minutes.curve_of(runs[0]), strict=True)
        axes.plot(seconds, accuracies, color=colour, marker="o", markersize=4)
        mean, deviation = mean_and_deviation(runs, "linear_top1")
        axes.errorbar(seconds[-1], mean, deviation, color=colour, marker="o", capsize=5)
        seeds = "1 seed" if len(runs) == 1 else f"{len(runs)} seeds"
        ends[method] = (seconds[-1], mean, f"{METHODS[method]}, {seeds}")
    if not ends:
        return
    label_the_ends(axes, ends)
    axes.set_xlim(left=0)
    axes.set_xlabel("estimated seconds of training on two CPU cores")
    axes.set_ylabel("linear probe of the bag, test images")
    title = """Accuracy while training on 50,000 images
lines: the first seed; last point: mean ± deviation over the seeds"""
    finish(figure, axes, title, "peers.png")


def label_the_ends(axes, ends: dict[str, tuple[float, float, str]]) -> None:
    """Each label beside its line's end, pushed up where it would meet the one below."""
    apart = 0.045 * (axes.get_ylim()[1] - axes.get_ylim()[0])
    right = max(seconds for seconds, _, _ in ends.values())
    lowest = float("-inf")
    for method, (_, mean, label) in sorted(ends.items(), key=lambda end: end[1][1]):
        lowest = max(mean, lowest + apart)
        axes.text(1.03 * right, lowest, label, color=COLOURS[method], fontsize=11, va="center")
    axes.set_xlim(right=1.3 * right)


def draw_numbers_of_patches() -> None:
    """A panel a comparison, a line for each way to choose lambda."""
    if not named("patches", "reference"):
        return
    figure, panels = pyplot().subplots(1, 2, figsize=(10, 4.4), sharey=True, layout="constrained")
    # The first line is the wider one: it shows where another lies on top of it.
    looks = {
        "equal ratio": {"label": "lambda by ratio", "color": "#2c6fb7", "linewidth": 4},
        "equal cosine": {"label": "lambda by cosine", "color": "#d1342f", "capsize": 3},
        "equal lambda": {"label": "lambda fixed", "color": "#1f9e89", "linestyle": "--"},
    }
    # At equal images there is one highest rate, so there lambda by ratio is fixed.
    ways = {"images": ["equal ratio", "equal cosine"], "patches": list(looks)}
    for axes, comparison in zip(panels, patches.COMPARISONS, strict=True):
        for how in ways[comparison]:
            found = {n: of_patches(comparison, n, how) for n in patches.NUMBERS}
            drawn = [
                (n, *mean_and_deviation(runs, "linear_top1")) for n, runs in found.items() if runs
            ]
            numbers, means, deviations = zip(*drawn, strict=True)
            deviations = [deviation or 0.0 for deviation in deviations]
            axes.errorbar(numbers, means, deviations, marker="o", alpha=0.7, **looks[how])
        axes.set_xscale("log")
        axes.set_xticks(patches.NUMBERS, patches.NUMBERS)
        axes.minorticks_off()
        axes.set_xlabel("patches an image")
        axes.legend(frameon=False, loc="lower center")
        titles = {
            "images": "At equal images: more patches take more time\nmean ± deviation over seeds",
            "patches": "At equal patches: in about equal time",
        }
        panels[0].set_ylabel("linear probe, test images")
        finish(figure, axes, titles[comparison], "numbers.png")


def draw_claims() -> None:
    """A row a claim: the interval of the difference, and what was asked of it."""
    found = [(claim, claims.paired(claim)) for claim in claims.CLAIMS]
    found = [(claim, points) for claim, points in found if claims.interval(points)]
    if not found:
        return
    height = 1.2 + 0.3 * len(found)
    figure, axes = pyplot().subplots(figsize=(9.5, height), layout="constrained")
    looks = {
        claims.HOLDS: {"color": "#1f9e89", "marker": "o"},
        claims.FAILS: {"color": "#d1342f", "marker": "s"},
        claims.OPEN: {"color": "#8b8b8b", "marker": "o", "markerfacecolor": "white"},
    }
    asked = {"color": "black", "marker": "|", "markersize": 16, "markeredgewidth": 2}
    asked["linestyle"] = "none"
    axes.axvline(0, color="black", linewidth=0.5)
    for row, (claim, points) in enumerate(found):
        look = {"linewidth": 3, "markersize": 8} | looks[claims.verdict(points, claim.above)]
        low, high = claims.interval(points)
        axes.plot([low, statistics.mean(points), high], [row] * 3, markevery=[1], **look)
        axes.plot(claim.above, row, **asked)
    for said, look in looks.items():
        axes.plot([], [], linewidth=3, markersize=8, label=said, **look)
    axes.plot([], [], label="asked: the interval lies to its right", **asked)
    axes.legend(frameon=False, loc="lower right")
    papers = {key: name.partition("]")[0].lstrip("[") for key, name in PAPERS.items()}
    names = [f"{papers[claim.paper]}: {claim.says}" for claim, _ in found]
    axes.set_yticks(range(len(found)), names)
    axes.set_ylim(len(found) - 0.4, -0.6)  # the first on top
    axes.set_xlabel("difference in accuracy, percentage points")
    title = "What three papers claim or was asked here, and what was found"
    finish(figure, axes, f"{title}\nmean and its 95 % interval over seeds", "claims.png")


def finish(figure, axes, title: str, name: str) -> None:
    axes.grid(axis="y", alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_title(title, loc="left", fontsize=11)
    figure.savefig(DOCS / name, dpi=150)


if __name__ == "__main__":
    with one_sentence():
        draw_ten_minutes()
        draw_numbers_of_patches()
        draw_claims()
