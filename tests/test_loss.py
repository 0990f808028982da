"""The objective: coding rate, invariance, their sum and its direction."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch.autograd import gradcheck, gradgradcheck

from empssl import coding_rate, collapsed_rate, empssl_loss, invariance
from empssl_support.ops import logdet_spd_ref


def unit(*shape, dtype=torch.float64):
    return F.normalize(torch.randn(*shape, dtype=dtype), dim=-1)


def paper_coding_rate(z, eps2):
    """Equation 2 as it stands: d x d, one patch at a time, float64."""
    n, b, d = z.shape
    rates = [
        torch.logdet(torch.eye(d, dtype=torch.float64) + d / (b * eps2) * Z.double().T @ Z.double())
        / 2
        for Z in z
    ]
    return torch.stack(rates).mean()


@given(
    n=st.integers(1, 4),
    b=st.integers(1, 12),
    d=st.integers(1, 12),
    eps2=st.floats(0.05, 2),
    seed=st.integers(0, 99),
)
def test_coding_rate_is_the_papers_on_both_sides_of_b_equals_d(n, b, d, eps2, seed):
    torch.manual_seed(seed)
    z = unit(n, b, d)
    torch.testing.assert_close(
        coding_rate(z, eps2), paper_coding_rate(z, eps2), rtol=1e-10, atol=1e-10
    )
    torch.testing.assert_close(
        coding_rate(z.float(), eps2).double(), paper_coding_rate(z, eps2), rtol=2e-5, atol=2e-5
    )


def test_calibration_values():
    same = torch.eye(1, 1024).expand(3, 100, -1)
    orthonormal = torch.eye(100, 1024).expand(3, -1, -1)
    assert coding_rate(same).item() == pytest.approx(4.2706, abs=1e-4)
    assert coding_rate(orthonormal).item() == pytest.approx(
        50 * math.log(52.2), abs=1e-3
    )  # 197.754


def test_a_collapsed_batch_loses_to_a_spread_one():
    """The sign that a widely used library has flipped.

    Both batches are perfectly invariant; only the spread differs.
    """
    n, b, d = 4, 50, 64
    collapsed, spread = unit(1, 1, d).expand(n, b, d), unit(1, b, d).expand(n, b, d)
    assert coding_rate(collapsed) < coding_rate(spread)
    assert empssl_loss(collapsed) > empssl_loss(spread)
    assert invariance(collapsed).item() == pytest.approx(1) and invariance(
        spread
    ).item() == pytest.approx(1)


def test_agreeing_patches_beat_disagreeing_ones():
    agreeing, disagreeing = unit(1, 50, 64).expand(4, -1, -1), unit(4, 50, 64)
    assert invariance(agreeing) > invariance(disagreeing) + 0.3
    assert empssl_loss(agreeing) < empssl_loss(disagreeing)


def test_a_gradient_step_spreads_a_nearly_collapsed_batch():
    z = (torch.ones(2, 20, 32) + 0.01 * torch.randn(2, 20, 32)).requires_grad_()
    before = coding_rate(F.normalize(z, dim=-1))
    empssl_loss(F.normalize(z, dim=-1), lam=0.0).backward()
    assert coding_rate(F.normalize(z.detach() - 0.01 * z.grad, dim=-1)) > before


def test_invariance_by_hand():
    z = torch.tensor([[[1.0, 0.0]], [[0.0, 1.0]]])  # two patches of one image at a right angle
    assert invariance(z).item() == pytest.approx(math.sqrt(0.5))
    assert invariance(torch.cat([z, -z])).item() == pytest.approx(
        0, abs=1e-6
    )  # their mean is no direction


def test_loss_is_minus_r_plus_lambda_d():
    z = unit(3, 7, 5)
    assert empssl_loss(z, lam=3, eps2=0.5).item() == pytest.approx(
        -(coding_rate(z, 0.5) + 3 * invariance(z)).item()
    )


@pytest.mark.parametrize("b,d", [(6, 9), (9, 6)])
def test_r_ignores_order_and_rotation_but_not_scale(b, d):
    z = unit(3, b, d)
    rotation = torch.linalg.qr(torch.randn(d, d, dtype=torch.float64)).Q
    R = coding_rate(z)
    torch.testing.assert_close(coding_rate(z[:, torch.randperm(b)]), R)
    torch.testing.assert_close(coding_rate(z @ rotation), R)
    torch.testing.assert_close(invariance(z @ rotation), invariance(z))
    assert coding_rate(2 * z) > R + 1


@pytest.mark.parametrize("n,b,d", [(2, 3, 5), (2, 5, 3), (3, 1, 4), (1, 4, 1)])
def test_gradients(n, b, d):
    z = unit(n, b, d).requires_grad_()
    assert gradcheck(lambda z: coding_rate(z, 0.2), z)
    assert gradcheck(lambda z: empssl_loss(F.normalize(z, dim=-1), 200.0, 0.2), z)
    if n > 1:
        assert gradcheck(invariance, z)


@pytest.mark.parametrize("b,d", [(100, 1024), (100, 64)])
def test_half_precision_inputs_of_a_nearly_collapsed_batch_stay_exact(b, d):
    z = F.normalize(torch.ones(2, b, d) + 1e-3 * torch.randn(2, b, d), dim=-1).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        R = coding_rate(z)
        assert invariance(z).dtype == torch.float32
    assert R.dtype == torch.float32
    assert R.item() == pytest.approx(paper_coding_rate(z, 0.2).item(), rel=1e-4)


def test_logdet_spd_ref():
    X = torch.randn(5, 6, 6, dtype=torch.float64)
    A = X @ X.mT + torch.eye(6, dtype=torch.float64)
    A[2] -= 100 * torch.eye(6, dtype=torch.float64)  # not positive definite
    logdet, inverse = logdet_spd_ref(A)
    good = [0, 1, 3, 4]
    torch.testing.assert_close(logdet[good], torch.logdet(A[good]))
    torch.testing.assert_close(inverse[good], torch.linalg.inv(A[good]))
    assert logdet[2].isnan() and inverse[2].isnan().all()


def test_nan_in_nan_out():
    z = unit(2, 3, 4)
    z[0, 0, 0] = math.nan
    assert coding_rate(z).isnan() and empssl_loss(z).isnan()


@pytest.mark.parametrize("leading", [(), (4,), (2, 3), (2, 1, 3), (0,)])
@pytest.mark.parametrize("b,d", [(6, 9), (9, 6)])
def test_any_leading_dimensions_a_scale_and_a_value_a_matrix(leading, b, d):
    z = torch.randn(*leading, b, d, dtype=torch.float64)
    rates = coding_rate(z, scale=0.7, reduction="none")
    assert rates.shape == leading
    identity = torch.eye(d, dtype=torch.float64)
    expected = torch.logdet(identity + 0.7 * z.mT @ z) / 2
    torch.testing.assert_close(rates, expected)
    if 0 not in leading:
        torch.testing.assert_close(coding_rate(z, scale=0.7), expected.mean())
        torch.testing.assert_close(coding_rate(z, scale=d / (b * 0.3)), coding_rate(z, 0.3))


@pytest.mark.parametrize("b,d,eps2", [(5, 8, 0.2), (9, 4, 0.5)])
def test_no_batch_has_a_smaller_rate_than_a_collapsed_one(b, d, eps2):
    least = collapsed_rate(d, eps2)
    same = unit(1, 1, d).expand(2, b, d)
    assert coding_rate(same, eps2).item() == pytest.approx(least, rel=1e-5)
    assert least == pytest.approx(math.log(1 + d / eps2) / 2)
    nearly = F.normalize(same + 0.1 * torch.randn(2, b, d), dim=-1)
    assert coding_rate(nearly, eps2) > 1.01 * least


def test_another_reduction_is_refused():
    with pytest.raises(ValueError, match="reduction is 'sum'; give mean or none"):
        coding_rate(unit(2, 3, 4), reduction="sum")


@pytest.mark.parametrize("shape", [(3, 5), (2, 3, 5), (2, 5, 3), (1, 4), (4, 1), (2, 2, 3, 4)])
def test_gradients_of_gradients(shape):
    z = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    scale = torch.rand(shape[:-2], dtype=torch.float64, requires_grad=True)
    assert gradcheck(coding_rate, z) and gradgradcheck(coding_rate, z)

    def rates(z, scale):
        return coding_rate(z, scale=scale, reduction="none")

    assert gradcheck(rates, (z, scale)) and gradgradcheck(rates, (z, scale))


@pytest.mark.parametrize("of", [(), (3,), (2, 1), (2, 3)])
@pytest.mark.parametrize("b,d", [(6, 9), (9, 6)])
def test_a_scale_a_matrix(of, b, d):
    z = torch.randn(2, 3, b, d, dtype=torch.float64)
    scale = torch.rand(of, dtype=torch.float64) + 0.1
    rates = coding_rate(z, scale=scale, reduction="none")
    of_each = scale.expand(2, 3)
    for i in range(2):
        for j in range(3):
            expected = coding_rate(z[i, j], scale=of_each[i, j].item())
            torch.testing.assert_close(rates[i, j], expected)
    torch.testing.assert_close(coding_rate(z, scale=scale), rates.mean())


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64, torch.int64])
def test_a_scale_of_another_type_leaves_the_precision_alone(dtype):
    z = unit(3, 4, 5, dtype=torch.float32)
    rates = coding_rate(z, scale=torch.tensor([1, 2, 4], dtype=dtype), reduction="none")
    assert rates.dtype == torch.float32
    expected = torch.stack([coding_rate(z[i], scale=2**i) for i in range(3)])
    torch.testing.assert_close(rates, expected)


@pytest.mark.parametrize("of", [(2,), (3, 1, 1), (4, 3)])
def test_a_scale_that_is_not_one_a_matrix_is_refused(of):
    """Three matrices; (3, 1, 1) would silently give nine rates, of each with each other's scale."""
    with pytest.raises(RuntimeError, match="size"):
        coding_rate(unit(3, 4, 5), scale=torch.ones(of))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("own", [0, 1e-3, 0.1])
@pytest.mark.parametrize("b,d", [(100, 1024), (512, 64), (64, 64), (1, 64)])
def test_a_collapsed_batch_has_a_finite_rate_and_gradient(b, d, own, dtype):
    """Even under autocast, whose products are bfloat16."""
    row = unit(2, 1, d)
    z = F.normalize(row + own * unit(2, b, d), dim=-1).to(dtype).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        R = coding_rate(z)
    R.backward()
    assert R.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert z.grad.dtype == dtype and z.grad.isfinite().all()
    exact = z.detach().double().requires_grad_()
    expected = paper_coding_rate(exact, 0.2)
    expected.backward()
    assert R.item() == pytest.approx(expected.item(), rel=3e-4)
    off = (z.grad.double() - exact.grad).norm() / exact.grad.norm()
    assert off < 1e-2


@pytest.mark.parametrize("precision", ["highest", "high", "medium"])
def test_faster_float32_products_do_not_make_it_nan(precision, request):
    """They round what is multiplied, not the sums, so the matrix stays positive definite."""
    before = torch.get_float32_matmul_precision()
    request.addfinalizer(lambda: torch.set_float32_matmul_precision(before))
    torch.set_float32_matmul_precision(precision)
    row = unit(2, 1, 1024, dtype=torch.float32)
    z = F.normalize(row + 0.1 * unit(2, 100, 1024, dtype=torch.float32), dim=-1)
    assert coding_rate(z).item() == pytest.approx(paper_coding_rate(z, 0.2).item(), rel=1e-2)


def test_long_rows_need_float64():
    """Where the docstring says that float32 ends."""
    z = 1000 * unit(1, 1, 64).expand(1, 512, 64)
    assert coding_rate(z.float()).item() != pytest.approx(coding_rate(z).item(), rel=1e-3)
    assert coding_rate(z).item() == pytest.approx(math.log1p(5 * 64 * 1000**2) / 2)
    short = z / 100
    assert coding_rate(short.float()).item() == pytest.approx(coding_rate(short).item(), rel=1e-3)
