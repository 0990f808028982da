"""Other projects' coding rates, each written out as its paper and its code have it.

Each is compared with what replaces it: the code of docs/ops.md, run as it is printed there.
"""

import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from empssl import coding_rate

PAGE = (Path(__file__).parent.parent / "docs" / "ops.md").read_text()
SECTION = PAGE.split("## The coding rate in your own project\n")[1].split("\n## ")[0]
CODES = re.findall(r"^```python\n# ([^:]+): (.*?)^```$", SECTION, re.S | re.M)
BLOCKS = {project: f"# {code}" for project, code in CODES}

SHAPES = [(6, 10), (10, 6), (5, 5), (1, 4)]
DTYPES = [torch.float32, torch.float64]


def documented(project: str, **names) -> dict:
    """The names that the page's code for that project leaves behind."""
    names |= {"coding_rate": coding_rate, "torch": torch, "F": F}
    exec(BLOCKS[project], names)
    return names


def same(ours: Tensor, theirs: Tensor, *inputs: Tensor) -> None:
    """In value and in gradient."""
    tolerance = {"rtol": 2e-4, "atol": 2e-5} if theirs.dtype == torch.float32 else {}
    torch.testing.assert_close(ours, theirs, **tolerance)
    gradients = [torch.autograd.grad(value, inputs, retain_graph=True) for value in (ours, theirs)]
    for of_ours, of_theirs in zip(*gradients):
        torch.testing.assert_close(of_ours, of_theirs, **tolerance)
        assert of_theirs.abs().max() > 1e-4


def leaf(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """Rows of about unit length, as these projects have them."""
    z = F.normalize(torch.randn(shape, dtype=torch.float64), dim=-1)
    return z.to(dtype).requires_grad_()


def identity_plus(scaled: Tensor) -> Tensor:
    at_least = torch.promote_types(scaled.dtype, torch.float32)
    return torch.eye(len(scaled), dtype=at_least) + scaled


def test_the_page_has_a_short_code_for_each_of_four_projects():
    assert list(BLOCKS) == ["EMP-SSL", "SimDINO", "MCR²", "CRATE"]
    assert SECTION.count("```python") == 4
    assert all(len(code.splitlines()) <= 8 for code in BLOCKS.values())


# ---- EMP-SSL (arXiv 2304.03977, tsb0601/EMP-SSL) ----


def empssl_patch_by_patch(z_proj: Tensor, num_patches: int, eps: float) -> Tensor:
    """Embeddings are columns there, and the criterion is minus the rate."""
    loss = 0
    for Z in z_proj.chunk(num_patches):
        columns = Z.T
        d, b = columns.shape
        covariance = d / (b * eps) * (columns @ columns.T)
        loss = loss - torch.logdet(identity_plus(covariance)) / 2
    return loss / num_patches


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("b,d", SHAPES)
@pytest.mark.parametrize("n,eps", [(4, 0.2), (1, 1.5)])
def test_empssl(n, b, d, eps, dtype):
    z_proj = leaf(n * b, d, dtype=dtype)
    names = documented("EMP-SSL", z_proj=z_proj, num_patches=n, eps=eps)
    same(names["loss_TCR"], empssl_patch_by_patch(z_proj, n, eps), z_proj)


# ---- SimDINO (arXiv 2502.10385, RobinWu218/SimDINO) ----


def simdino_expansion(
    processes: list[Tensor], eps: float, reduce_cov: int = 1, rank: int = 0
) -> Tensor:
    """What the process `rank` computes; a tensor (views, m, p) a process."""
    N = len(processes)
    _, m, p = processes[0].shape
    added = processes if reduce_cov else [processes[rank]]
    halves = []
    for of_view in zip(*added):
        covariance = sum(W.T @ W for W in of_view)
        L = torch.linalg.cholesky_ex(identity_plus(p / (m * N * eps) * covariance)).L
        halves.append(L.diagonal().log().sum())
    gamma = (p + N * m) / (p * N * m)
    return gamma * sum(halves) / len(halves)


def documented_expansion(processes: list[Tensor], eps: float, rank: int = 0) -> Tensor:
    def all_gather(views):
        assert views is processes[rank]
        return processes

    names = documented("SimDINO", views=processes[rank], all_gather=all_gather, eps=eps)
    return names["expa_loss"]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("m,p", SHAPES)
@pytest.mark.parametrize("N,eps", [(1, 0.5), (2, 0.05), (3, 0.5)])
def test_simdino(N, m, p, eps, dtype):
    processes = [leaf(2, m, p, dtype=dtype) for _ in range(N)]
    same(documented_expansion(processes, eps), simdino_expansion(processes, eps), *processes)


@pytest.mark.parametrize("m,p", SHAPES)
def test_simdino_that_adds_no_other_processes_covariances(m, p):
    """Its default: the scale is of all samples, the covariance of this process's."""
    N, eps = 2, 0.5
    processes = [leaf(2, m, p) for _ in range(N)]
    gamma = (p + N * m) / (p * N * m)
    for rank, views in enumerate(processes):
        expected = simdino_expansion(processes, eps, reduce_cov=0, rank=rank)
        same(coding_rate(views, scale=p / (N * m * eps)) * gamma, expected, views)


@pytest.mark.parametrize("m,p", SHAPES)
def test_the_scale_does_not_depend_on_how_many_processes_there_are(m, p):
    """Two halves of a batch, on two processes or on one, are the same batch."""
    eps = 0.5
    halves = [leaf(2, m, p), leaf(2, m, p)]
    on_one = [torch.cat(halves, dim=1)]
    same(documented_expansion(halves, eps), simdino_expansion(on_one, eps), *halves)
    # A second process that holds the same samples changes nothing, where the default falls.
    (views, _) = halves
    rate = coding_rate(views, eps)
    torch.testing.assert_close(coding_rate(torch.cat([views, views], dim=1), eps), rate)
    assert coding_rate(views, scale=p / (2 * m * eps)) < 0.9 * rate


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("m,p", [(64, 256), (256, 64)])
def test_simdino_of_half_precision_heads(m, p, dtype):
    """Of a nearly collapsed batch, with the epsilon of its second version.

    Its own code, under autocast too, has a covariance in half precision.
    """
    eps = 0.05
    row = leaf(2, 1, p).detach()
    views = F.normalize(row + 0.05 * leaf(2, m, p), dim=-1).detach().to(dtype).requires_grad_()
    exact = views.detach().double().requires_grad_()
    with torch.autocast("cpu", dtype):
        ours = documented_expansion([views], eps)
        theirs = simdino_expansion([views], eps)
    assert ours.dtype == torch.float32
    expected = simdino_expansion([exact], eps)
    assert ours.item() == pytest.approx(expected.item(), rel=1e-4)
    assert theirs.item() != pytest.approx(expected.item(), rel=1e-3)
    ours.backward()
    expected.backward()
    assert (views.grad.double() - exact.grad).norm() < 0.01 * exact.grad.norm()


# ---- MCR² (arXiv 2006.08558, ryanchankh/mcr2) ----


def mcr2_discrimn(W: Tensor, gam1: float, eps: float) -> Tensor:
    p, m = W.shape
    return torch.logdet(identity_plus(gam1 * p / (m * eps) * (W @ W.T))) / 2


def mcr2_compress(W: Tensor, Pi: Tensor, eps: float) -> Tensor:
    """Class by class; an empty one has trace 1e-8."""
    p, m = W.shape
    loss = 0
    for of_class in Pi:
        trPi = of_class.trace() + 1e-8
        covariance = p / (trPi * eps) * (W @ of_class @ W.T)
        loss = loss + trPi / m * torch.logdet(identity_plus(covariance))
    return loss / 2


def memberships(kind: str, k: int, m: int) -> Tensor:
    """`(k, m, m)`, diagonal. The last class is empty."""
    labels = torch.arange(m) % (k - 1)
    weights = F.one_hot(labels, k).T.double()
    if kind == "soft":
        weights[:-1] = torch.rand(k - 1, m, dtype=torch.float64).softmax(0)
    return torch.diag_embed(weights)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["labels", "soft"])
@pytest.mark.parametrize("m,p", [(7, 11), (11, 7), (40, 3)])
@pytest.mark.parametrize("gam1,eps", [(1.0, 0.5), (0.7, 0.01)])
def test_mcr2(m, p, gam1, eps, kind, dtype):
    Z = leaf(m, p, dtype=dtype)
    W = Z.T
    Pi = memberships(kind, 4, m).to(dtype)
    names = documented("MCR²", W=W, Pi=Pi, gam1=gam1, eps=eps)
    same(names["discrimn_loss"], mcr2_discrimn(W, gam1, eps), Z)
    same(names["compress_loss"], mcr2_compress(W, Pi, eps), Z)
    assert names["rates"].shape == (4,) and names["rates"][-1] == 0


def test_mcr2s_memberships_that_are_learned():
    W = leaf(8, 5).detach().T
    logits = torch.randn(3, 8, dtype=torch.float64, requires_grad=True)
    Pi = torch.diag_embed(logits.softmax(0))
    names = documented("MCR²", W=W, Pi=Pi, gam1=1.0, eps=0.5)
    same(names["compress_loss"], mcr2_compress(W, Pi, 0.5), logits)


def test_mcr2s_classes_in_half_precision():
    Z = leaf(30, 64, dtype=torch.bfloat16)
    Pi = memberships("labels", 4, 30).float()
    names = documented("MCR²", W=Z.T, Pi=Pi, gam1=1.0, eps=0.5)
    expected = mcr2_compress(Z.detach().double().T, Pi.double(), 0.5)
    assert names["compress_loss"].item() == pytest.approx(expected.item(), rel=1e-5)


# ---- CRATE (arXiv 2306.01129, Ma-Lab-Berkeley/CRATE) ----


def crate_rates(X: Tensor, eps: float) -> Tensor:
    """`(b,)`, of the m x m Gram matrix of each head's tokens."""
    rates = []
    for image in X:
        rate = 0
        for tokens in image:
            unit = tokens / tokens.norm(dim=-1, keepdim=True)
            m, d = unit.shape
            rate = rate + torch.logdet(identity_plus(d / (m * eps) * (unit @ unit.T))) / 2
        rates.append(rate)
    return torch.stack(rates)


def crate_rate_reduction(tokens: Tensor, U: Tensor, eps: float) -> Tensor:
    """R(Z) - R^c(Z; U), with tokens as columns."""
    Z = tokens.T
    d, m = Z.shape
    reduction = torch.logdet(identity_plus(d / (m * eps) * (Z.T @ Z))) / 2
    for U_k in U:
        projected = U_k.T @ Z
        p, _ = projected.shape
        gram = projected.T @ projected
        reduction = reduction - torch.logdet(identity_plus(p / (m * eps) * gram)) / 2
    return reduction


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("m,d", [(9, 4), (4, 9), (6, 6)])
@pytest.mark.parametrize("eps", [0.01, 0.5])
def test_crate(m, d, eps, dtype):
    b, h, width = 3, 2, 12
    X = (2.5 * leaf(b, h, m, d, dtype=dtype)).detach().requires_grad_()
    tokens = leaf(m, width, dtype=dtype)
    U = torch.linalg.qr(torch.randn(h, width, d)).Q.to(dtype)  # (h, width, d)
    names = documented("CRATE", X=X, tokens=tokens, U=U, eps=eps)
    expected = crate_rates(X, eps)
    same(names["mean_mcr2"], expected.mean(), X)
    same(names["stdev"], expected.std(), X)
    same(names["delta_R"], crate_rate_reduction(tokens, U, eps), tokens)
