"""docs/peers.png: how well each method does, and in how many seconds of training.

    python -m study.experiments.plot
"""

from pathlib import Path

from empssl_support.cli import one_sentence
from empssl_support.report import pyplot
from study.experiments.records import mean_and_deviation, read
from study.experiments.tables import METHODS, peers_runs, representation

PLOT = Path(__file__).resolve().parent.parent.parent / "docs" / "peers.png"
TITLE = """Test accuracy of a linear probe of the representation
left end of a line: one epoch; right end: the seconds of EMP-SSL's one epoch"""
COLOURS = {
    "empssl": "#d1342f",
    "simclr": "#2c6fb7",
    "vicreg": "#1f9e89",
    "ressl": "#b07aa1",
    "single": "#8a6d3b",
    "swav": "#e08a1e",
    "byol": "#6b7280",
}
PALE = "#8b929c"


def draw_peers() -> None:
    """A line a method. Raises `UsageError` where matplotlib is not installed."""
    figure, axes = pyplot().subplots(figsize=(9, 5.4), layout="constrained")
    ends = {}
    for what, colour in COLOURS.items():
        points = [point(peers_runs(what, budget)) for budget in ("one epoch", "equal seconds")]
        seconds, means, deviations = zip(*points, strict=True)
        look = {"marker": "*", "markersize": 17} if what == "empssl" else {"marker": "o"}
        axes.errorbar(seconds, means, deviations, color=colour, capsize=3, **look)
        ends[what] = means[-1]

    untrained = [run for run in read("peers") if run["what"] == "untrained"]
    _, mean, _ = point(untrained)
    axes.axhline(mean, color=PALE, linestyle=":")
    axes.text(13, mean + 0.001, "untrained encoder", color=PALE)

    axes.set_xscale("log")
    axes.set_xlim(12, 480)
    ticks = (15, 30, 60, 120, 240)
    axes.set_xticks(ticks, ticks)
    axes.minorticks_off()
    axes.grid(axis="y", alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_xlabel("seconds of training on two CPU cores; mean ± deviation of three seeds")
    axes.set_title(TITLE, loc="left", fontsize=11)
    label(axes, ends)
    figure.savefig(PLOT, dpi=150)


def point(runs: list[dict]) -> tuple[float, float, float]:
    """Mean seconds, mean accuracy, and its deviation."""
    seconds = [run["metrics"].get("train_seconds", 0) for run in runs]
    mean, deviation = mean_and_deviation(runs, representation(runs))
    return sum(seconds) / len(seconds), mean, deviation or 0.0


def label(axes, ends: dict[str, float], apart: float = 0.0088) -> None:
    """Each method's name at its line's end, pushed up where it would meet the one below."""
    lowest = float("-inf")
    for what, mean in sorted(ends.items(), key=lambda end: end[1]):
        lowest = max(mean, lowest + apart)
        axes.text(280, lowest, METHODS[what], color=COLOURS[what], fontsize=13, va="center")


if __name__ == "__main__":
    with one_sentence():
        draw_peers()
