"""docs/peers.png: how well each method does, and in how many seconds of training.

    python -m study.experiments.plot
"""

from pathlib import Path

from empssl_support.cli import UsageError, one_sentence
from study.experiments.records import mean_and_deviation, read
from study.experiments.tables import METHODS, peers_runs, representation

PLOT = Path(__file__).resolve().parent.parent.parent / "docs" / "peers.png"

PALE = "#8b929c"
COLOURS = {
    "empssl": "#d1342f",
    "simclr": "#2c6fb7",
    "vicreg": "#1f9e89",
    "ressl": "#b07aa1",
    "single": "#8a6d3b",
    "swav": "#e08a1e",
    "byol": "#6b7280",
}


def draw_peers() -> None:
    """Linear accuracy of the representation against seconds, after one epoch and at equal seconds.

    Raises `UsageError` where matplotlib is not installed.
    """
    try:
        import matplotlib
    except ImportError:
        raise UsageError("drawing needs matplotlib; pip install -e '.[figures]' gets it.") from None
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(9, 5.4), layout="constrained")
    ends = {what: draw_method(axes, what) for what in METHODS if peers_runs(what, "one epoch")}
    draw_untrained(axes)
    furnish(axes)
    label(axes, ends)
    figure.savefig(PLOT, dpi=150)


def draw_method(axes, what: str) -> tuple[float, float]:
    """A line from one epoch to equal seconds; returns where it ends, seconds and accuracy."""
    ours = what == "empssl"
    points = []
    for budget in ("one epoch", "equal seconds"):
        runs = peers_runs(what, budget)
        seconds, _ = mean_and_deviation(runs, "train_seconds")
        mean, deviation = mean_and_deviation(runs, representation(runs))
        points.append((seconds, mean, deviation or 0.0))
    seconds, means, deviations = zip(*points, strict=True)
    axes.errorbar(
        seconds,
        means,
        yerr=deviations,
        color=COLOURS[what],
        marker="*" if ours else "o",
        markersize=17 if ours else 7,
        linewidth=1.6,
        capsize=3,
        zorder=3 if ours else 2,
    )
    return seconds[-1], means[-1]


def draw_untrained(axes) -> None:
    runs = [r for r in read("peers") if r["what"] == "untrained"]
    if not runs:
        return
    mean, _ = mean_and_deviation(runs, representation(runs))
    axes.axhline(mean, color=PALE, linestyle=":", linewidth=1.5, zorder=1)
    axes.annotate(
        "untrained encoder",
        (13, mean),
        xytext=(0, 5),
        textcoords="offset points",
        color=PALE,
    )


def furnish(axes) -> None:
    axes.set_xscale("log")
    axes.set_xlim(12, 480)
    ticks = (15, 30, 60, 120, 240)
    axes.set_xticks(ticks, [str(tick) for tick in ticks])
    axes.minorticks_off()
    axes.yaxis.set_major_formatter("{x:.2f}")
    axes.grid(axis="y", color="#e6e8eb", linewidth=1)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_xlabel("seconds of training on two CPU cores; mean ± deviation of three seeds")
    axes.set_title(
        "Test accuracy of a linear probe of the representation\n"
        "left end of a line: one epoch; right end: the seconds of EMP-SSL's one epoch",
        loc="left",
        fontsize=12,
    )


def label(axes, ends: dict[str, tuple[float, float]], apart: float = 0.0088) -> None:
    """Each method's name right of its line's end, pushed up where it would meet the one below."""
    lowest = float("-inf")
    for what, (seconds, mean) in sorted(ends.items(), key=lambda end: end[1][1]):
        lowest = max(mean, lowest + apart)
        axes.annotate(
            METHODS[what],
            (seconds, mean),
            xytext=(268, lowest),
            color=COLOURS[what],
            fontsize=13,
            fontweight="bold" if what == "empssl" else "normal",
            verticalalignment="center",
            arrowprops={"arrowstyle": "-", "color": COLOURS[what], "linewidth": 0.8, "shrinkB": 9},
        )


if __name__ == "__main__":
    with one_sentence():
        draw_peers()
