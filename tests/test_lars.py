"""LARS and Muon against a literal transcription of their rules."""

import math

import pytest
import torch

from empssl import LARS, Muon, cosine, orthogonal
from recipes import small_encoder


def literal_step(p, g, buffer, lr, momentum=0.9, decay=1e-4, eta=0.005):
    """One tensor, one step, in float64, as the rule is written."""
    if p.ndim != 1:
        p_norm, g_norm = math.sqrt((p**2).sum()), math.sqrt((g**2).sum())
        if p_norm != 0 and g_norm != 0:
            trust = eta * p_norm / (g_norm + decay * p_norm + 1e-8)
            g = (g + decay * p) * min(trust / lr, 1)
    buffer = g.clone() if buffer is None else momentum * buffer + g
    return p - lr * (g + momentum * buffer), buffer


# Gradients of 1e-4 |p| leave the trust above the learning rate: the clip acts. Of 10 |p| they leave
# it below: it does not.
@pytest.mark.parametrize("scale", [1e-4, 10.0])
@pytest.mark.parametrize("shape", [(7,), (5, 7), (4, 3, 3, 3), ()])
def test_several_steps(shape, scale):
    p = torch.randn(shape, dtype=torch.float64)
    parameter = torch.nn.Parameter(p.clone())
    optimizer = LARS([parameter], lr=0.3)
    buffer = None
    for t in range(5):
        g = scale * torch.randn(shape, dtype=torch.float64)
        lr = cosine(0.3, t, 5)
        optimizer.param_groups[0]["lr"] = lr
        parameter.grad = g.clone()
        optimizer.step()
        p, buffer = literal_step(p, g, buffer, lr)
        torch.testing.assert_close(parameter.data, p, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(
            parameter.grad, g, rtol=0, atol=0
        )  # the gradient is the caller's


@pytest.mark.parametrize("zero", ["gradient", "parameter"])
def test_zero_norms_are_left_alone(zero):
    p = torch.nn.Parameter(torch.zeros(3, 3) if zero == "parameter" else torch.randn(3, 3))
    before = p.detach().clone()
    p.grad = torch.zeros(3, 3) if zero == "gradient" else torch.randn(3, 3)
    LARS([p], lr=0.1).step()
    torch.testing.assert_close(p.detach(), before - 0.1 * 1.9 * p.grad)  # plain Nesterov, no decay


def test_one_dimensional_tensors_are_neither_scaled_nor_decayed():
    p = torch.nn.Parameter(torch.full((4,), 5.0))
    p.grad = torch.ones(4)
    LARS([p], lr=0.1, weight_decay=0.5).step()
    torch.testing.assert_close(p.detach(), torch.full((4,), 5.0 - 0.19))


def test_with_trust_never_clipping_it_is_torchs_sgd():
    a, b = (torch.nn.Parameter(torch.arange(6.0).view(2, 3) + 1) for _ in range(2))
    ours, theirs = (
        LARS([a], lr=0.1, eta=1e9),
        torch.optim.SGD([b], lr=0.1, momentum=0.9, nesterov=True, weight_decay=1e-4),
    )
    for _ in range(4):
        a.grad, b.grad = a.detach().sin(), b.detach().sin()
        ours.step(), theirs.step()
    torch.testing.assert_close(a, b)


def test_it_is_an_ordinary_optimizer():
    p = torch.nn.Parameter(torch.randn(3, 3))
    unused = torch.nn.Parameter(torch.randn(3))
    optimizer = LARS([{"params": [p]}, {"params": [unused], "lr": 1.0}], lr=0.1)
    loss = optimizer.step(lambda: (p.square().sum(), p.square().sum().backward())[0])
    assert loss > 0 and p in optimizer.state and unused not in optimizer.state
    again = LARS([{"params": [p]}, {"params": [unused]}], lr=0.5)
    again.load_state_dict(optimizer.state_dict())
    assert again.param_groups[1]["lr"] == 1.0
    torch.testing.assert_close(
        again.state[p]["momentum_buffer"], optimizer.state[p]["momentum_buffer"]
    )


def test_cosine():
    assert cosine(0.3, 0, 10) == 0.3
    assert cosine(0.3, 5, 10) == pytest.approx(0.15)
    assert cosine(0.3, 10, 10) == pytest.approx(0)
    assert cosine(0.3, 1, 4) == pytest.approx(0.3 / 2 * (1 + math.sqrt(0.5)))


# ---- Muon ----


def polar(G):
    """U V^T by a singular value decomposition."""
    U, _, Vh = torch.linalg.svd(G, full_matrices=False)
    return U @ Vh


@pytest.mark.parametrize("shape", [(8, 8), (5, 40), (40, 5), (1, 6), (64, 64)])
@pytest.mark.parametrize("scale", [1e-5, 1.0, 1e5])
def test_orthogonal_keeps_the_directions_and_evens_their_lengths(shape, scale):
    torch.manual_seed(0)
    G = scale * torch.randn(shape, dtype=torch.float64)
    even = orthogonal(G, steps=8)
    sigma = torch.linalg.svdvals(even)
    assert sigma.min() > 0.6 and sigma.max() < 1.25
    # The singular vectors are G's: what is left of it in G's own basis is diagonal.
    U, _, Vh = torch.linalg.svd(G, full_matrices=False)
    inside = U.T @ even @ Vh.T
    off = inside - torch.diag(inside.diagonal())
    assert off.abs().max() < 1e-6 and (inside.diagonal() > 0.6).all()
    assert torch.allclose(even, polar(G), atol=0.4)


def test_a_gradient_of_zeros_moves_nothing():
    p = torch.nn.Parameter(torch.randn(3, 4))
    before = p.detach().clone()
    p.grad = torch.zeros(3, 4)
    Muon([p], [p]).step()
    assert torch.equal(p.detach(), before)


@pytest.mark.parametrize(
    "shape,rows,columns", [((6, 4), 6, 4), ((4, 6), 4, 6), ((30, 2, 3, 3), 30, 18)]
)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_muon_follows_its_rule(shape, rows, columns, dtype):
    torch.manual_seed(0)
    start = torch.randn(shape, dtype=torch.float64)
    p = torch.nn.Parameter(start.clone())
    optimizer = Muon([p], [p], dtype, lr=0.3, momentum=0.9, weight_decay=0.5)
    expected, velocity = start.clone(), torch.zeros(shape, dtype=torch.float64)
    for _ in range(4):
        p.grad = torch.randn(shape, dtype=torch.float64)
        optimizer.step()
        velocity = 0.9 * velocity + p.grad
        G = (p.grad + 0.9 * velocity).view(rows, columns)
        length = 0.05 * max(1, rows / columns) ** 0.5
        expected = expected - length * orthogonal(G.to(dtype)).double().view(shape)
    assert p.dtype == torch.float64
    torch.testing.assert_close(p.detach(), expected)


def test_half_precision_hardly_turns_an_orthogonal_step():
    torch.manual_seed(0)
    G = torch.randn(64, 200)
    exact, rounded = orthogonal(G), orthogonal(G.bfloat16())
    assert rounded.dtype == torch.bfloat16
    error = (rounded - exact).norm() / exact.norm()
    assert 0 < error < 0.05


def test_what_is_not_among_muons_matrices_has_lars():
    torch.manual_seed(0)
    start = [torch.randn(shape) for shape in ((6, 4), (4,), (3, 2, 3, 3), (5, 5))]
    gradients = [torch.randn_like(p) for p in start]
    ends = []
    for new in (lambda ps: LARS(ps, lr=0.1), lambda ps: Muon(ps, [ps[0]], lr=0.1)):
        ps = [torch.nn.Parameter(p.clone()) for p in start]
        optimizer = new(ps)
        for _ in range(3):
            for p, g in zip(ps, gradients):
                p.grad = g.clone()
            optimizer.step()
        ends.append([p.detach() for p in ps])
    assert not torch.equal(ends[0][0], ends[1][0])
    assert all(torch.equal(lars, muon) for lars, muon in zip(ends[0][1:], ends[1][1:]))


def test_an_encoders_matrices_end_with_its_representation():
    encoder = small_encoder()
    names = {id(p): name for name, p in encoder.named_parameters()}
    chosen = [names[id(p)] for p in encoder.matrices()]
    assert "represent.0.weight" in chosen and not any("project" in name for name in chosen)
    assert len(chosen) == 6  # five convolutions
