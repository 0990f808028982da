"""What goes wrong without `coding_rate`: the measurement, and its table."""

import math

import pytest
import torch

import empssl
from study.benchmarks import precision
from study.experiments import records, tables


@pytest.mark.parametrize("own,least,most", [(1.0, -0.1, 0.1), (0.5, 0.4, 0.6), (0.0, 1, 1)])
def test_batches_go_from_spread_to_collapsed(own, least, most):
    """Unit rows; their mean cosine goes from 0 to 1, and of equal parts is 1/2."""
    z = precision.new_batch(12, 256, own).double()
    torch.testing.assert_close(z.norm(dim=-1), torch.ones(12, dtype=torch.float64))
    cosines = (z @ z.T)[~torch.eye(12, dtype=torch.bool)]
    assert least - 1e-6 <= cosines.mean() <= most + 1e-6


@pytest.mark.parametrize("b,d", [(6, 9), (9, 6)])
def test_every_way_is_the_coding_rate_where_precision_suffices(b, d):
    z = precision.new_batch(b, d, 0.5).double()
    for rate in precision.WAYS.values():
        torch.testing.assert_close(rate(z), empssl.coding_rate(z, precision.EPS2))


def test_a_half_precision_gram_matrix_is_worse_than_the_coding_rate():
    rows = precision.bench_dtype(torch.bfloat16, batches=(64,), widths=(512,))
    rows = {row["name"]: row for row in rows}
    ours, cholesky = rows["`coding_rate`"], rows["Gram d x d, Cholesky"]
    assert {row["cases"] for row in rows.values()} == {len(precision.OWN)}
    assert ours["failed"] == ours["wrong"] == 0 and ours["largest_error"] < 1e-3
    assert cholesky["failed"] + cholesky["wrong"] >= 3


def test_failures_and_errors_are_counted_apart():
    errors = [0.0, 0.009, -0.02, 0.5, math.nan, math.inf]
    expected = {"cases": 6, "failed": 2, "wrong": 2, "largest_error": 0.5}
    assert precision.summary(errors) == expected
    assert precision.summary([math.nan])["largest_error"] is None


def test_collapse_wins_under_the_flipped_sign():
    """By hand: R is ln(1 + d / 0.2) / 2 of a collapsed batch, d ln(1 + 1 / 0.2) / 2 of a spread."""
    ours, flipped = precision.bench_sign()
    collapsed, spread = math.log(321) / 2, 32 * math.log(6)
    assert ours["collapsed"] == pytest.approx(-200 - collapsed, abs=1e-2)
    assert ours["spread"] == pytest.approx(-200 - spread, abs=1e-2)
    assert flipped["collapsed"] == pytest.approx(-200 + collapsed, abs=1e-2)
    assert flipped["spread"] == pytest.approx(-200 + spread, abs=1e-2)


def test_the_record_and_its_table(tmp_path, monkeypatch):
    monkeypatch.setattr(records, "RESULTS", tmp_path)
    assert tables.precision() == ""
    whole = precision.bench_dtype

    def small(dtype):
        return whole(dtype, batches=(4,), widths=(8,))

    monkeypatch.setattr(precision, "bench_dtype", small)
    precision.main()
    (record,) = records.read("precision")
    assert set(records.PROVENANCE) <= set(record)
    rates, signs = tables.precision().split("\n\n")
    assert len(rates.splitlines()) == 2 + 2 * len(precision.WAYS)
    assert "| float16 | `coding_rate` | 0 of 7 | 0 of 7 | 0.0" in rates
    assert signs.splitlines()[2:] == [
        "| `-(R + 200 D)` | -202.9 | -257.3 | the spread |",
        "| `R - 200 D` | -197.1 | -142.7 | the collapsed |",
    ]


def test_a_way_that_always_fails_has_no_error(tmp_path, monkeypatch):
    monkeypatch.setattr(records, "RESULTS", tmp_path)
    row = {"dtype": "float16", "name": "a way", **precision.summary([math.nan])}
    record = {"name": "a", "seed": 0, "metrics": {"rows": [row], "signs": []}}
    records.keep("precision", record)
    assert tables.precision().splitlines()[-1] == "| float16 | a way | 1 of 1 | 0 of 1 |  |"
