"""What was measured: its records, and the tables that are written from them."""

import json
import os
import statistics
from pathlib import Path

import pytest

from empssl_support.cli import UsageError
from study.experiments import records, tables

ROOT = Path(__file__).resolve().parent.parent
FILES = sorted(records.RESULTS.iterdir())


@pytest.fixture
def results(tmp_path, monkeypatch):
    """A folder of results of the test's own."""
    monkeypatch.setattr(records, "RESULTS", tmp_path / "results")
    return tmp_path / "results"


def a_record(name, seed, **metrics):
    return {"name": name, "seed": seed, "metrics": metrics}


# ---- the records ----


def test_there_are_few_files_and_each_is_a_table():
    assert 1 <= len(FILES) <= 15
    assert {path.suffix for path in FILES} == {".jsonl"}


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_every_run_says_where_it_comes_from(path):
    runs = [json.loads(line) for line in path.read_text().splitlines()]
    assert runs
    for run in runs:
        assert set(records.PROVENANCE) <= set(run), run.get("name")
        assert run["name"] and run["hardware"] and run["metrics"]
        assert run["versions"]["torch"]
        assert isinstance(run["seed"], int)
        # The first tries for the laptop preset recorded no more, and say so.
        if "provenance_note" not in run:
            assert run["command"].startswith("python ") and run["started"]
            assert len(run["commit"].removesuffix("-dirty")) == 40
    of_each = [(run["name"], run["seed"]) for run in runs]
    assert len(set(of_each)) == len(of_each)


def test_runs_probed_by_the_maps_say_so():
    runs = [run for path in FILES for run in records.read(path.stem)]
    by_maps = [run for run in runs if run.get("eval_augmentation") == "maps"]
    assert len(by_maps) > 80
    # The probe of one run was another one than its training's settings say.
    probe = {run["name"]: run.get("probe", {}).get("eval_augmentation") for run in by_maps}
    others = [run for run in by_maps if run.get("features") != "maps"]
    assert [run["name"] for run in others] == ["empssl-centre-crop-at-evaluation-1-epoch"]
    assert probe[others[0]["name"]] == "grid"


def test_a_kept_record_replaces_the_one_of_its_name_and_seed(results):
    for seed in (0, 1):
        records.keep("runs", a_record("a", seed, accuracy=0.1))
    records.keep("runs", a_record("b", 0, accuracy=0.2))
    records.keep("runs", a_record("a", 0, accuracy=0.3))
    kept = [
        a_record("a", 0, accuracy=0.3),
        a_record("a", 1, accuracy=0.1),
        a_record("b", 0, accuracy=0.2),
    ]
    assert records.read("runs") == kept
    assert records.read("other runs") == []
    assert (results / "runs.jsonl").read_text().count("\n") == 3
    assert os.listdir(results) == ["runs.jsonl"]


def test_a_record_that_cannot_be_written_leaves_the_others(results):
    records.keep("runs", a_record("a", 0, accuracy=0.1))
    with pytest.raises(TypeError):
        records.keep("runs", a_record("b", 0, accuracy=object()))
    assert records.read("runs") == [a_record("a", 0, accuracy=0.1)]
    assert os.listdir(results) == ["runs.jsonl"]


def test_a_reader_never_finds_half_a_file(results, monkeypatch):
    """The old file stands, whole, until the moment at which the new one takes its place."""
    records.keep("runs", a_record("a", 0, accuracy=0.1))
    seen = []
    replace = os.replace

    def looked_at(scratch, path):
        seen.append((records.read("runs"), Path(scratch).read_text().count("\n"), Path(path).name))
        replace(scratch, path)

    monkeypatch.setattr(os, "replace", looked_at)
    records.keep("runs", a_record("b", 0, accuracy=0.2))
    assert seen == [([a_record("a", 0, accuracy=0.1)], 2, "runs.jsonl")]
    assert len(records.read("runs")) == 2


def test_mean_and_deviation_by_hand():
    three = [a_record("a", seed, accuracy=value) for seed, value in enumerate((0.5, 0.6, 0.7))]
    mean, deviation = records.mean_and_deviation(three, "accuracy")
    # The squares of the distances from 0.6 add up to 0.02, over two of three runs: 0.01.
    assert mean == pytest.approx(0.6)
    assert deviation == pytest.approx(0.1)
    assert records.mean_and_deviation(three[:1], "accuracy") == (0.5, None)


def test_pairs_are_of_the_same_seed():
    runs = [a_record("a", seed) for seed in (2, 0)]
    others = [a_record("b", seed) for seed in (0, 1, 2)]
    assert records.paired(runs, others) == [(runs[0], others[2]), (runs[1], others[0])]


# ---- the tables ----


@pytest.mark.parametrize("path", sorted((ROOT / "docs").glob("*.md")), ids=lambda path: path.stem)
def test_the_tables_of_the_docs_are_those_of_the_records(path):
    assert tables.with_tables(path.read_text()) == path.read_text()


def test_the_docs_show_every_table_but_the_readmes():
    text = "".join(path.read_text() for path in (ROOT / "docs").glob("*.md"))
    for name in set(tables.TABLES) - {"result", "peers"}:
        assert text.count(f"<!-- {name}: generated by python -m study.experiments.tables -->") == 1


def marked(name, between):
    start = f"<!-- {name}: generated by python -m study.experiments.tables -->"
    return f"before\n{start}\n{between}<!-- end of {name} -->\nafter\n"


def test_what_stands_between_markers_is_written_anew_and_nothing_else(monkeypatch):
    monkeypatch.setitem(tables.TABLES, "step", lambda: "| new |")
    monkeypatch.setitem(tables.TABLES, "ops", lambda: "")
    text = marked("step", "| old |\n") + marked("ops", "| old |\n")
    assert tables.with_tables(text) == marked("step", "| new |\n") + marked("ops", "")
    assert tables.with_tables("no markers\n") == "no markers\n"


def test_a_marker_that_nothing_belongs_to_is_refused():
    with pytest.raises(UsageError, match="no table is called stepp"):
        tables.with_tables(marked("stepp", ""))
    with pytest.raises(UsageError, match="step has no end"):
        tables.with_tables(marked("step", "").replace("<!-- end of step -->", ""))


def test_the_result_is_a_row_a_recipe_over_its_seeds(results):
    assert tables.result() == ""
    settings = {
        "hardware": "abacus",
        "dataset": "imagefolder",
        "data_dir": "data/cifar10-jpeg",
        "epochs": 2,
    }
    for seed, value in enumerate((0.5, 0.6, 0.7)):
        metrics = {"linear_top1": value, "quadrants_top1": 0.7, "train_seconds": 600.4}
        metrics |= {"untrained_knn_top1": 0.4, "raw_pixels_knn_top1": 0.3}
        records.keep("laptop", a_record("ten-minutes", seed, **metrics) | settings)
    metrics = {"linear_top1": 0.9, "knn_top1": 0.8, "train_seconds": 60.0}
    shapes = {"hardware": "abacus", "dataset": "shapes", "epochs": 1}
    records.keep("shapes", a_record("shapes", 0, **metrics) | shapes)
    head, line, ten_minutes, shapes = tables.result().splitlines()
    assert head.count("|") == line.count("|") == ten_minutes.count("|") == shapes.count("|") == 10
    assert ten_minutes == (
        "| cifar10-jpeg | 0.806 / 0.907 / 0.931 | 0.600 ± 0.100 | 0.700 ± 0.000 |  "
        "| 0.400 ± 0.000, 0.300 ± 0.000 | 2 epochs, 600 s | abacus | 3 |"
    )
    assert shapes == "| shapes |  | 0.900 |  | 0.800 |  | 1 epoch, 60 s | abacus | 1 |"


def test_at_equal_seconds_a_method_has_its_longer_runs(results):
    """EMP-SSL's one epoch is what the others' seconds are measured by."""
    settings = {
        "budget": "one epoch",
        "epochs": 1,
        "patches": 20,
        "batch": 100,
    }
    metrics = {
        "knn_top1": 0.3,
        "train_seconds": 100.0,
        "patches_seen": 4000,
    }
    run = a_record("empssl-1-epoch", 0, linear_top1=0.6, **metrics) | settings
    records.keep("peers", run | {"what": "empssl"})
    for seed in range(2):
        run = a_record("byol-1-epoch", seed, linear_top1=0.4, **metrics) | settings
        records.keep("peers", run | {"what": "byol"})
        longer = {"budget": "equal seconds", "epochs": 5 + seed, "what": "byol"}
        run = a_record("byol-equal-seconds", seed, linear_top1=0.5 + seed / 5, **metrics)
        records.keep("peers", run | settings | longer)
    deviation = statistics.stdev((0.5, 0.7))
    assert tables.peers().splitlines()[2:] == [
        "| EMP-SSL | 0.600 | 0.300 | 100 | 1 | 4,000 |",
        f"| BYOL | 0.600 ± {deviation:.3f} | 0.300 ± 0.000 | 100 | 5 to 6 | 4,000 |",
    ]


def test_figures_of_the_older_evaluation_are_said_to_be(results):
    metrics = {"linear_top1": 0.7, "representation_top1": 0.6, "knn_top1": 0.5}
    run = a_record("empssl-1-epoch", 0, **metrics) | {
        "what": "empssl",
        "budget": "one epoch",
        "features": "maps",
        "epochs": 1,
        "patches": 20,
        "batch": 100,
    }
    records.keep("peers", run)
    assert "| EMP-SSL | 0.600 | 0.500 |" in tables.peers()
    assert "older evaluation" in tables.peers()


def test_gains_are_paired_by_seed():
    runs = [a_record("a", seed, accuracy=value) for seed, value in enumerate((0.52, 0.64))]
    others = [a_record("b", seed, accuracy=value) for seed, value in enumerate((0.50, 0.60))]
    pairs = records.paired(runs, others)
    # 2 and 4 points: 3 on average, the deviation is the root of 2.
    assert tables.gain(pairs, "accuracy") == "0.580 (+3.0 ± 1.4)"
    assert tables.gain(pairs[:1], "accuracy") == "0.520 (+2.0)"
