"""How often the coding rate fails of a half-precision Gram matrix, and what its sign decides.

    python -m study.benchmarks.precision

Batches go from spread to collapsed. Each rate is compared with float64's of the same rounded batch.
The record is kept in study/results/precision.jsonl.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

import empssl
from empssl_support.cli import one_sentence
from empssl_support.machine import provenance
from study.experiments.records import keep

BATCHES = (32, 64, 100, 256, 512)
WIDTHS = (64, 256, 1024)
EPS2 = 0.2

# How much of a row is its own, beside what is common to the batch: 1 is spread, 0 is collapsed.
OWN = (1.0, 0.5, 0.2, 0.1, 0.01, 0.001, 0.0)


def new_batch(b: int, d: int, own: float) -> Tensor:
    """`(b, d)`, unit rows."""
    common = F.normalize(torch.randn(1, d), dim=-1)
    rows = F.normalize(torch.randn(b, d), dim=-1)
    return F.normalize((1 - own) * common + own * rows, dim=-1)


def matrix(columns: Tensor, scale: float) -> Tensor:
    """`(k, k)` of `columns (k, m)`, as one writes it down.

    The Gram matrix has the columns' type. Nothing factorises half precision, but float32's identity
    makes the sum float32.
    """
    at_least = torch.promote_types(columns.dtype, torch.float32)
    identity = torch.eye(len(columns), dtype=at_least)
    return identity + scale * (columns @ columns.T)


def default_scale(z: Tensor) -> float:
    b, d = z.shape
    return d / (b * EPS2)


def by_logdet(z: Tensor) -> Tensor:
    return torch.logdet(matrix(z.T, default_scale(z))) / 2


def by_cholesky(z: Tensor) -> Tensor:
    """NaN where the matrix is not positive definite; `torch.linalg.cholesky` would raise."""
    L, failed = torch.linalg.cholesky_ex(matrix(z.T, default_scale(z)))
    R = L.diagonal().log().sum()
    return R if failed == 0 else R * torch.nan


def by_logdet_b_by_b(z: Tensor) -> Tensor:
    return torch.logdet(matrix(z, default_scale(z))) / 2


def coding_rate(z: Tensor) -> Tensor:
    return empssl.coding_rate(z, EPS2)


WAYS = {
    "Gram d x d, `torch.logdet`": by_logdet,
    "Gram d x d, Cholesky": by_cholesky,
    "Gram b x b, `torch.logdet`": by_logdet_b_by_b,
    "`coding_rate`": coding_rate,
}


def bench_dtype(dtype: torch.dtype, batches=BATCHES, widths=WIDTHS) -> list[dict]:
    """A row a way: how it did in all cases of that type."""
    torch.manual_seed(0)
    errors = {name: [] for name in WAYS}
    for b in batches:
        for d in widths:
            for own in OWN:
                z = new_batch(b, d, own).to(dtype)
                exact = by_logdet(z.double())
                for name, rate in WAYS.items():
                    errors[name].append((rate(z) / exact - 1).item())
    said = str(dtype).removeprefix("torch.")
    rows = [{"dtype": said, "name": name, **summary(errors[name])} for name in WAYS]
    print(*rows, sep="\n", flush=True)
    return rows


def summary(errors: list[float]) -> dict:
    """Of relative errors: how many are NaN or infinite, of the others how many are over 1%."""
    known = [abs(error) for error in errors if math.isfinite(error)]
    return {
        "cases": len(errors),
        "failed": len(errors) - len(known),
        "wrong": sum(error > 0.01 for error in known),
        "largest_error": max(known, default=None),
    }


def bench_sign(n: int = 4, b: int = 64, d: int = 64, lam: float = 200.0) -> list[dict]:
    """The loss of a collapsed batch and of an orthonormal one, under either sign of R.

    Both batches are perfectly invariant, D = 1, so R alone tells them apart.
    """
    batches = {
        "collapsed": torch.eye(1, d).expand(n, b, d),
        "spread": torch.eye(b, d).expand(n, b, d),
    }
    ours, flipped = {}, {}
    for name, z in batches.items():
        ours[name] = empssl.empssl_loss(z, lam, EPS2).item()
        loss = empssl.coding_rate(z, EPS2) - lam * empssl.invariance(z)
        flipped[name] = loss.item()
    sizes = {"n": n, "b": b, "d": d}
    rows = [{"loss": "-(R + 200 D)", **ours, **sizes}, {"loss": "R - 200 D", **flipped, **sizes}]
    print(*rows, sep="\n")
    return rows


def main() -> None:
    rows = bench_dtype(torch.bfloat16) + bench_dtype(torch.float16)
    metrics = {"rows": rows, "signs": bench_sign()}
    record = {"name": "precision-cpu", "seed": 0, "metrics": metrics}
    keep("precision", record | provenance("cpu"))


if __name__ == "__main__":
    with one_sentence():
        main()
