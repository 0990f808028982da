"""The tables of methods, minutes, patches, claims, transfer and the paper's network."""

import pytest

from study.experiments import claims, comparisons, methods, plot, records
from study.experiments.cells import differences, points, steps


@pytest.fixture(autouse=True)
def results(tmp_path, monkeypatch):
    """A folder of results of the test's own."""
    monkeypatch.setattr(records, "RESULTS", tmp_path / "results")


def keep(of, name, values, about=None, **metrics):
    """A record a seed, with an accuracy each."""
    for seed, value in enumerate(values):
        measured = metrics | {"linear_top1": value}
        records.keep(of, {"name": name, "seed": seed, "metrics": measured} | (about or {}))


def rows(table):
    """The cells of a table's rows, under their columns' names."""
    head, _, *lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table]
    assert all(len(line) == len(head) for line in lines)
    return [dict(zip(head, line, strict=True)) for line in lines]


def test_without_records_there_is_no_table():
    for table in comparisons.TABLES.values():
        assert table() == ""


def test_differences_are_of_pairs_of_one_seed_in_points():
    keep("methods", "a", (0.5, 0.7, 0.9))
    keep("methods", "b", (0.4, 0.5))
    a, b = (records.named("methods", name) for name in "ab")
    found = differences(a, b)
    assert found == pytest.approx([10, 20])
    assert points(found) == "+15.0 ± 7.1"
    assert points(differences(b[1:], a)) == "-20.0"
    assert points([]) == ""


def test_runs_of_different_precision_are_no_pair():
    keep("methods", "a", (0.5, 0.7), {"precision": "bf16"})
    keep("methods", "b", (0.4, 0.5), {"precision": "float32"})
    keep("methods", "b", (0.3,), {"precision": "bf16"})
    a, b = (records.named("methods", name) for name in "ab")
    assert differences(a, b) == pytest.approx([20])


def test_runs_on_a_gpu_and_on_a_cpu_are_no_pair():
    keep("methods", "a", (0.5, 0.7), {"precision": "bf16", "device": "cuda"})
    keep("methods", "b", (0.4,), {"precision": "bf16", "device": "cpu"})
    b = {"name": "b", "seed": 1, "precision": "bf16", "device": "cuda"}
    records.keep("methods", b | {"metrics": {"linear_top1": 0.3}})
    a, b = (records.named("methods", name) for name in "ab")
    assert differences(a, b) == pytest.approx([40])


def test_steps_are_the_patches_seen_over_those_of_a_batch():
    keep("methods", "a", (0.5,), {"patches": 2, "batch": 10}, patches_seen=600)
    keep("methods", "b", (0.5,), {"patches": 2, "batch": 10}, patches_seen=800)
    both = records.named("methods", "a") + records.named("methods", "b")
    assert steps(both) == "30 to 40"


def test_the_settings_are_those_of_the_best_try_beside_the_published_ones():
    about = {"batch": 256, "lr": 0.5, "temperature": 0.5, "epochs": 7}
    keep("methods", "search-simclr-lars-256-0.5", (0.6,), about | {"optimizer": "lars"})
    about |= {"lr": 0.15, "temperature": 0.25}
    keep("methods", "search-simclr-muon-256-0.15", (0.7,), about | {"optimizer": "muon"})
    keep("methods", "simclr-equal-seconds", (0.8,), about | {"optimizer": "muon"})
    (row,) = rows(comparisons.settings().splitlines())
    assert row["method"] == "SimCLR" and row["chosen"] == "muon, 256, 0.15"
    assert row["temperature"] == "0.25" and row["epochs"] == "7"
    assert row["tries"] == "2" and row["held out"] == "0.700"
    # EMP-SSL is the preset; its tries are those that were written down before.
    about |= {"epochs": 2, "batch": 50, "predicted": 0.7, "optimizer": "muon"}
    keep("laptop", "try-two-epochs", (0.8, 0.9), about)
    keep("laptop", "ten-minutes", (0.5,))
    ours, _ = rows(comparisons.settings().splitlines())
    assert (ours["method"], ours["tries"]) == ("EMP-SSL", "2")
    assert ours["published optimizer, batch, rate"] == "lars, 100, 0.3"
    assert ours["chosen"] == "muon, 50, 0.15" and ours["held out"] == "0.850 ± 0.071"


@pytest.fixture
def speeds(monkeypatch):
    """Ten seconds an epoch of any method."""
    speed = {"seconds_an_epoch": 10.0, "seconds_before": 0.0}
    monkeypatch.setattr(methods, "speed_of", lambda *_: speed)


def test_methods_stand_beside_empssl_seed_by_seed(speeds):
    about = {"patches": 2, "batch": 10, "epochs": 3, "method": "a", "optimizer": "b"}
    spent = {"knn_top1": 0.2, "train_seconds": 60.0, "patches_seen": 600}
    keep("methods", "empssl-equal-seconds", (0.5, 0.7), about, **spent)
    keep("methods", "simclr-equal-seconds", (0.4, 0.5), about, **spent)
    keep("methods", "simclr-equal-epochs", (0.1, 0.2), about, **spent)
    ours, simclr = rows(comparisons.equal_seconds().splitlines())
    assert (ours["method"], ours["minus EMP-SSL"]) == ("EMP-SSL", "")
    assert simclr["minus EMP-SSL"] == "-15.0 ± 7.1" and simclr["steps"] == "30"
    assert simclr["bag of patches"] == "0.450 ± 0.071"
    assert simclr["seconds, estimated"] == "30"  # by the speeds, whatever the run itself took
    # Of EMP-SSL equal seconds and equal epochs are one training.
    ours, simclr = rows(comparisons.equal_epochs().splitlines())
    assert ours["bag of patches"] == "0.600 ± 0.141"
    assert simclr["bag of patches"] == "0.150 ± 0.071"


def test_seconds_to_an_accuracy_are_of_the_first_seed(speeds):
    about = {"epochs": 4, "method": "empssl", "optimizer": "muon", "batch": 50}
    about["hardware"] = "cpu (AMD EPYC, 1 threads, AVX2, AVX-512, bf16)"
    points = ((1, 0.5), (2, 0.7), (4, 0.74))
    curve = [{"epoch": epoch, "linear_top1": accuracy} for epoch, accuracy in points]
    keep("minutes", "empssl", (0.74, 0.76), about, curve=curve, images=30_000)
    (row,) = rows(comparisons.ten_minutes().splitlines())
    # 20 seconds an epoch: .60 half the way from the first probe to the second.
    assert row["seconds to 0.60"] == "30" and row["seconds to 0.70"] == "40"
    assert row["seconds to 0.75"] == "not reached" and row["seconds, estimated"] == "80"
    assert row["bag of patches"] == "0.750 ± 0.014" and row["on"] == "AMD EPYC, bf16"
    # Before the first probe nothing is known.
    curve[0]["linear_top1"] = 0.65
    keep("minutes", "empssl", (0.74,), about, curve=curve, images=30_000)
    (row,) = rows(comparisons.ten_minutes().splitlines())
    assert row["seconds to 0.60"] == "at most 20"


def test_twenty_patches_stand_once_in_both_comparisons():
    about = {"batch": 50, "lam": 98.0, "lr": 0.15}
    keep("patches", "reference", (0.6,), about, cosine=0.38)
    keep("patches", "equal-images-2-equal-cosine", (0.5,), about | {"lam": 300.4}, cosine=0.379)
    keep("patches", "equal-images-2-equal-ratio", (0.4,), about, cosine=0.1)
    keep("patches", "equal-patches-50-equal-ratio", (0.3,), about | {"batch": 20}, cosine=0.5)
    keep("patches", "equal-patches-50-equal-lambda", (0.1,), about | {"batch": 20}, cosine=0.6)
    slower = about | {"batch": 20, "lr": 0.05}
    keep("patches", "equal-patches-50-another-rate", (0.2,), slower, cosine=0.5)
    for how in ("ratio", "cosine"):  # of one lambda: one row
        keep("patches", f"equal-images-50-equal-{how}", (0.7,), about, cosine=0.38)
    keep("patches", "lambda-images-2-300", (0.9,), about, cosine=0.9)  # a try of lambda alone
    found = rows(comparisons.numbers_of_patches().splitlines())
    shown = [(r["equal"], r["patches"], r["lambda by"], r["lambda"], r["cosine"]) for r in found]
    assert shown == [
        ("images", "2", "ratio", "98", "0.10"),
        ("images", "2", "cosine", "300", "0.38"),
        ("images", "20", "both", "98", "0.38"),
        ("images", "50", "both", "98", "0.38"),
        ("patches", "20", "both", "98", "0.38"),
        ("patches", "50", "ratio", "98", "0.50"),
        ("patches", "50", "fixed", "98", "0.60"),
        ("patches", "50", "cosine", "98", "0.50"),
    ]
    assert [r["rate"] for r in found] == ["0.15"] * 7 + ["0.05"]
    ahead = [r["minus 20 patches"] for r in found]
    assert ahead == ["-20.0", "-10.0", "", "+10.0", "", "-30.0", "-50.0", "-40.0"]


def test_numbers_of_patches_are_drawn_as_far_as_they_go(tmp_path, monkeypatch):
    monkeypatch.setattr(plot, "DOCS", tmp_path)
    plot.draw_numbers_of_patches()
    assert not list(tmp_path.glob("*.png"))
    keep("patches", "reference", (0.6, 0.7))
    keep("patches", "equal-images-2-equal-ratio", (0.4,))
    plot.draw_numbers_of_patches()
    assert (tmp_path / "numbers.png").read_bytes().startswith(b"\x89PNG")


def test_claims_are_drawn_with_their_intervals_and_what_is_asked(tmp_path, monkeypatch):
    drawn = []

    def keep_figure(figure, axes, title, name):
        ends = [tuple(line.get_xdata()) for line in axes.lines if len(line.get_xdata())]
        drawn.append((name, [label.get_text() for label in axes.get_yticklabels()], ends))

    monkeypatch.setattr(plot, "finish", keep_figure)
    plot.draw_claims()
    keep("claims", "one-negative", (0.601, 0.602))
    keep("claims", "simclr", (0.600, 0.600, 0.600))
    plot.draw_claims()
    assert not drawn  # two seeds make no interval
    keep("claims", "one-negative", (0.601, 0.602, 0.603))
    plot.draw_claims()
    ((name, labels, (zero, (low, mean, high), asked)),) = drawn
    assert name == "claims.png" and labels == ["asked here: one negative is enough"]
    half = 4.3 * 0.1 / 3**0.5
    assert (low, mean, high) == pytest.approx((0.2 - half, 0.2, 0.2 + half))
    assert zero == (0, 0) and asked == (-1.0,)


def test_a_claim_has_its_pair_and_its_verdict():
    keep("claims", "one-negative", (0.601, 0.602, 0.603))
    keep("claims", "simclr", (0.600, 0.601, 0.602))
    keep("claims", "untrained", (0.501, 0.503, 0.505))
    keep("claims", "single-5000", (0.3, 0.3, 0.3))  # without what stands beside it, no row
    trains, row = rows(comparisons.claims_table().splitlines())
    assert "2303.01986" in trains["paper"] and trains["points"] == "+9.9 ± 0.1"
    assert row["paper"] == "asked here" and row["at equal"] == "epochs"
    assert row["points"] == "+0.1 ± 0.0" and row["seeds"] == "3"
    assert row["here"] == "holds" and row["asked"] == "over -1"
    assert row["points by kNN"] == ""
    assert claims.verdict([-3.0, -3.1, -2.9], -1.0) == "does not hold here"


def test_the_runs_of_claims_say_what_they_are(monkeypatch):
    """Images and changes, the chosen rate and those tried, and the seconds of both phases."""
    monkeypatch.setattr(claims, "seconds_an_epoch", lambda name: 3.0)
    cpu = "cpu (AMD EPYC, 2 threads, AVX2)"
    settings = {"eval_only": False, "lr": 0.45, "epochs": 9, "hardware": cpu}
    settings |= {"patches": 2, "batch": 50}
    keep("claims", "last-stage-added", (0.6, 0.7), settings, patches_seen=1200)
    for rate, lr in ((1, 0.45), (3, 1.35)):
        keep("claims", f"search-last-stage-added-{rate}", (0.5,), {"rate": rate, "lr": lr})
    keep("claims", "search-one-size-1", (0.5,), {"rate": 1, "lr": 1.35})
    keep("claims", "all-stages-at-once", (0.6,), settings, patches_seen=1200)
    keep("claims", "untrained", (0.3,), settings | {"eval_only": True})
    untrained, added, again = rows(comparisons.claims_runs().splitlines())
    assert untrained["epochs"] == untrained["rate"] == untrained["seconds, estimated"] == ""
    assert added["run"] == "`last-stage-added`" and added["images"] == "15,000"
    assert "`without-last-stage`" in added["what is changed"]
    assert (added["patches seen"], added["steps"]) == ("1,200", "12")
    assert untrained["patches seen"] == untrained["steps"] == ""
    assert added["rate"] == "0.45" and added["rates tried"] == "0.45 to 1.35"
    assert added["seconds, estimated"] == "57"  # 9 epochs, and 30 s of the first phase
    assert added["bag of patches"] == "0.650 ± 0.071" and added["seeds"] == "2"
    assert added["on"] == "AMD EPYC"
    assert again["what is changed"] == "as `one-size`"
    assert again["rates tried"] == "1.35 to 1.35" and again["seconds, estimated"] == "27"


def test_a_run_whose_loss_was_not_finite_has_a_row_without_steps():
    settings = {"eval_only": False, "lr": 0.45, "epochs": 9, "patches": 2, "batch": 50}
    settings |= {"hardware": "cpu (AMD EPYC, 2 threads)"}
    keep("claims", "batch-64", (0.0,), settings, diverged=True)
    (row,) = rows(comparisons.claims_runs().splitlines())
    assert row["bag of patches"] == "0.000" and row["steps"] == row["patches seen"] == ""


def test_transfer_has_a_column_a_method_and_leaves_other_pairs_out():
    there = {"source": "data/photos:0-4", "target": "data/photos:5-9", "images": 15_000}
    back = {"source": "data/photos:5-9", "target": "data/photos:0-4", "images": 15_000}
    of_empssl = {"method": "empssl", "eval_only": False}
    untrained = {"method": "empssl", "eval_only": True}
    keep("transfer", "EMP-SSL there", (0.8, 0.8), there | of_empssl)
    keep("transfer", "SimCLR there", (0.7, 0.7), there | of_empssl | {"method": "simclr"})
    keep("transfer", "untrained there", (0.4, 0.4), there | untrained, raw_pixels_top1=0.3)
    own = {"source_linear_top1": 0.9, "source_knn_top1": 0.6}
    keep("transfer", "EMP-SSL back", (0.75,), back | of_empssl, **own)
    other = {"source": "a", "target": "b", "images": None}
    keep("transfer", "another pair", (0.1,), other | of_empssl)
    raw_pixels, untrained, empssl, simclr, back = rows(comparisons.transfer_table().splitlines())
    for row in (untrained, empssl, simclr):
        assert (row["trained on"], row["probed on"]) == ("photos:0-4", "photos:5-9")
    assert raw_pixels["features"] == "raw pixels" and raw_pixels["bag of patches"] == "0.300"
    assert untrained["bag of patches"] == "0.400 ± 0.000" and untrained["minus EMP-SSL"] == ""
    assert empssl["bag of patches"] == "0.800 ± 0.000" and empssl["minus EMP-SSL"] == ""
    assert simclr["minus EMP-SSL"] == "-10.0 ± 0.0" and simclr["seeds"] == "2"
    # What the other way was trained on is what this way is probed on.
    assert empssl["trained on such images"] == "0.900" and simclr["trained on such images"] == ""
    assert empssl["by kNN"] == "0.600" and simclr["by kNN"] == ""
    assert back["trained on"] == "photos:5-9" and back["trained on such images"] == ""


def test_the_network_has_a_row_for_each_epoch_that_was_probed():
    seen = [{"epoch": 1, "R": 160.0, "D": 0.79, "linear_top1": 0.7, "knn_top1": 0.6}]
    measured = {"R": 168.0, "D": 0.8, "knn_top1": 0.7, "train_seconds": 7200.0}
    about = {"epochs": 2, "seen": seen, "hardware": "a processor"}
    keep("network", "enlarged-2-epochs", (0.8,), about, **measured)
    first, second = rows(comparisons.network().splitlines())
    assert (first["epoch"], second["epoch"]) == ("1 of 2", "2 of 2")
    assert first["bag of patches"] == "0.700" and second["bag of patches"] == "0.800"
    assert (second["R"], second["D"]) == ("168.0", "0.800")
    assert (first["training, s"], second["training, s"]) == ("", "7,200")
    about |= {"other_work_on_the_machine": True}
    keep("network", "enlarged-2-epochs", (0.8,), about, **measured)
    assert rows(comparisons.network().splitlines())[1]["training, s"] == ""  # others slowed them
