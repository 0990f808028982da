"""LARS against a literal transcription of its rule."""

import math

import pytest
import torch

from empssl import LARS, cosine


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
