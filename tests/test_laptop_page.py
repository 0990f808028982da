"""docs/laptop.md tells a search that is over: its tables are those of the records."""

import re
from pathlib import Path

import pytest

from study.experiments.records import by_key, mean_and_deviation, read
from study.experiments.tables import accuracy, average, scores, table

PAGE = Path(__file__).parent.parent / "docs" / "laptop.md"

# What was changed, the try in which it was, and the try that it is compared with.
TEN_TRIES = (
    ("batches of 50 images, not 100", "now-batch-50", "now"),
    ("batches of 200, 4 patches an image, not 8", "now-batch-200", "now"),
    ("SGD without LARS, learning rate unchanged", "now-sgd", "now"),
    ("a block more in both stages, fewer patches", "now-deeper", "now"),
    ("a block less, more patches", "now-shallower", "now-batch-50"),
    ("a thin ResNet", "now-thin-resnet", "now-batch-50"),
    ("a representation of 2,048, not 1,024", "now-hidden-2048", "now-batch-50"),
    ("patches enlarged from 16 to 32 pixels", "now-patch-32", "now-batch-50"),
    ("the paper's augmentation, not a lighter one", "now-paper-augmentation", "now-batch-50"),
    ("a first layer that starts whitened", "third-whitened", "third"),
)

LAPTOP_MAPS = {
    "ten-minutes": "the preset, ten minutes",
    "ten-minutes-supervised": "the same patches, encoder and epochs, trained on all labels",
    "an-hour": "the preset, an hour",
    "an-hour-hidden-4096": "representation of 4,096, the paper's augmentation",
    "an-hour-batch-100": "batches of 100, representation of 2,048, the paper's augmentation",
    "shapes": "`shapes`, the paper's augmentation",
}


def laptop_search() -> str:
    """Ten tries: what each was predicted to gain, and what it gained."""
    tries = by_key(read("laptop_search"), "name")
    rows = []
    for changed, name, against in TEN_TRIES:
        pairs = paired(tries[name], tries[against])
        predicted = tries[name][0]["predicted"]
        row = [
            changed,
            re.match(r"[+-]?[\d.]+", predicted)[0],
            gain(pairs, "holdout_linear_top1"),
            gain(pairs, "holdout_maps_top1"),
            cost(pairs, "patches_seen"),
            cost(pairs, "train_seconds"),
            len(pairs),
        ]
        rows.append(row)
    columns = ["changed", "predicted", "bag of patches", "maps", "patches seen", "seconds", "seeds"]
    return table(columns, rows)


def gain(pairs: list[tuple[dict, dict]], key: str) -> str:
    """Accuracy, and in brackets the points over the other recipe."""
    runs = [run for run, _ in pairs]
    if any(key not in run["metrics"] for run in runs):
        return ""
    points = [
        {"metrics": {"gain": 100 * (run["metrics"][key] - other["metrics"][key])}}
        for run, other in pairs
    ]
    mean, deviation = mean_and_deviation(points, "gain")
    spread = "" if deviation is None else f" ± {deviation:.1f}"
    return f"{mean_and_deviation(runs, key)[0]:.3f} ({mean:+.1f}{spread})"


def cost(pairs: list[tuple[dict, dict]], key: str) -> str:
    """Of a recipe and of the other; no seconds where other work ran beside one of them."""
    disturbed = any(r.get("other_work_on_the_machine") for pair in pairs for r in pair)
    if key == "train_seconds" and disturbed:
        return ""
    mine, theirs = (average(list(runs), key) for runs in zip(*pairs, strict=True))
    return mine if mine == theirs else f"{mine}, not {theirs}"


def laptop_maps() -> str:
    """The preset on test images, by the older evaluation."""
    found = by_key(read("laptop_maps"), "name")
    rows = []
    for name, said in LAPTOP_MAPS.items():
        runs = found[name]
        maps = [accuracy(runs, key) for key in ("linear_top1", "untrained_top1")]
        seconds = average(runs, "train_seconds", " s")
        rows.append([said, runs[0]["epochs"], seconds, *maps, *scores(runs), len(runs)])
    columns = ["run", "epochs", "training", "maps", "maps, untrained", "representation", "kNN"]
    return table([*columns, "seeds"], rows)


def paired(runs: list[dict], others: list[dict]) -> list[tuple[dict, dict]]:
    """Runs of two recipes, seed by seed, where both have the seed."""
    of_seed = {r["seed"]: r for r in others}
    return [(r, of_seed[r["seed"]]) for r in runs if r["seed"] in of_seed]


@pytest.mark.parametrize("written", [laptop_search, laptop_maps])
def test_the_tables_are_those_of_the_records(written):
    assert written() in PAGE.read_text()


def test_gains_are_paired_by_seed():
    def run(seed, value):
        return {"seed": seed, "metrics": {"accuracy": value}}

    runs, others = [run(1, 0.64), run(0, 0.52)], [run(0, 0.50), run(2, 0.9), run(1, 0.60)]
    pairs = paired(runs, others)
    assert pairs == [(runs[0], others[2]), (runs[1], others[0])]
    # 4 and 2 points: 3 on average, the deviation is the root of 2.
    assert gain(pairs, "accuracy") == "0.580 (+3.0 ± 1.4)"
    assert gain(pairs[1:], "accuracy") == "0.520 (+2.0)"
