"""What the cells of a table say of a few records. An empty cell: nothing was measured."""

import re
import statistics
from pathlib import Path

from study.experiments.records import mean_and_deviation

METHODS = {
    "empssl": "EMP-SSL",
    "simclr": "SimCLR",
    "vicreg": "VICReg",
    "byol": "BYOL",
    "swav": "SwAV",
    "ressl": "ReSSL",
    "single": "single-branch",
}


def table(columns: list[str], rows: list[list]) -> str:
    """Markdown; nothing where there are no rows."""
    if not rows:
        return ""
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines)


def accuracy(records: list[dict], key: str = "linear_top1") -> str:
    """Mean ± deviation of a metric; empty where a record lacks it."""
    if not records or any(key not in record["metrics"] for record in records):
        return ""
    mean, deviation = mean_and_deviation(records, key)
    return f"{mean:.3f}" if deviation is None else f"{mean:.3f} ± {deviation:.3f}"


def average(records: list[dict], key: str, form: str = ",.0f") -> str:
    """A mean, to whole numbers unless `form` says else; empty where a record lacks it."""
    if not records or any(key not in record["metrics"] for record in records):
        return ""
    return format(mean_and_deviation(records, key)[0], form)


def extent(values: list[int]) -> str:
    """The value, or from which to which they go: 9 to 10."""
    if not values:
        return ""
    least, most = min(values), max(values)
    return f"{least:,}" if least == most else f"{least:,} to {most:,}"


def steps(records: list[dict]) -> str:
    """Empty where none is known: a run whose loss was not finite does not say how far it came."""
    ended = [r for r in records if "patches_seen" in r["metrics"]]
    return extent([r["metrics"]["patches_seen"] // (r["patches"] * r["batch"]) for r in ended])


def differences(firsts: list[dict], seconds: list[dict], key: str = "linear_top1") -> list[float]:
    """First minus second, in points (of 100), of each seed that both have on one kind of device.

    That is, in one precision too.
    """

    def scores(runs: list[dict]) -> dict:
        kept = [run for run in runs if key in run["metrics"]]
        where = ("seed", "device", "precision")
        return {tuple(run.get(what) for what in where): run["metrics"][key] for run in kept}

    first, second = scores(firsts), scores(seconds)
    return [100 * (first[run] - second[run]) for run in first if run in second]


def points(found: list[float]) -> str:
    """Mean ± deviation of differences, with their sign."""
    if not found:
        return ""
    mean = f"{statistics.mean(found):+.1f}"
    return mean if len(found) == 1 else f"{mean} ± {statistics.stdev(found):.1f}"


def data_name(record: dict) -> str:
    if record["dataset"] != "imagefolder":
        return record["dataset"]
    return Path(record["data_dir"]).name


def processors(runs: list[dict]) -> list[str]:
    """Names, each once, and whether there is bf16, without other vector instructions.

    Also those on which a run went on.
    """
    names = []
    for run in runs:
        resumed = [mark["resumed"]["hardware"] for mark in run.get("resumed", [])]
        for hardware in [run["hardware"], *resumed]:
            name = re.sub(r", (AVX|AMX|\d+ threads)[^,)]*", "", hardware)
            names.append(re.sub(r"^cpu \((.*)\)$", r"\1", name))
    return list(dict.fromkeys(names))
