"""The objectives of SimCLR, VICReg, BYOL, SwAV, ReSSL: by hand, their gradients, what moves."""

import itertools
import math

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.autograd import gradcheck

import empssl
from study.baselines.byol import BYOL
from study.baselines.ressl import ReSSL
from study.baselines.simclr import SimCLR
from study.baselines.swav import SwAV, sinkhorn
from study.baselines.vicreg import VICReg

MIRROR = torch.eye(2).flip(0)  # maps a direction at an angle a to 90 - a degrees


def unit(*angles):
    """Unit vectors in the plane, at these angles in degrees."""
    radians = torch.tensor(angles, dtype=torch.float64).deg2rad()
    return torch.stack([radians.cos(), radians.sin()], 1)


def cos(angle):
    return math.cos(math.radians(angle))


def double(*shape):
    return torch.randn(*shape, dtype=torch.float64, requires_grad=True)


def loss_of(objective, z, x=None, index=None):
    loss, _ = objective(z, x, index)
    return loss


# ---- all of them ----


def test_r_and_d_of_the_unit_embeddings_are_logged():
    z = torch.randn(2, 5, 8, requires_grad=True)
    _, terms = VICReg()(3 * z, None, None)
    u = F.normalize(z.detach(), dim=-1)
    assert terms.keys() == {"R", "D"}
    assert terms["R"].item() == pytest.approx(empssl.coding_rate(u).item(), rel=1e-5)
    assert terms["D"].item() == pytest.approx(empssl.invariance(u).item(), rel=1e-5)
    assert not terms["R"].requires_grad and not terms["D"].requires_grad


def test_half_precision_embeddings_are_compared_in_float32():
    for objective in (SimCLR(0.2), VICReg(), SwAV(8, 0.1, prototypes=5, queue=8)):
        z = torch.randn(2, 4, 8).bfloat16()
        torch.testing.assert_close(loss_of(objective, z), loss_of(objective, z.float()))


@pytest.mark.parametrize(
    "objective",
    [SimCLR(0.5), SimCLR(0.5, negatives=2), VICReg()],
    ids=["simclr", "simclr-2", "vicreg"],
)
def test_gradients(objective):
    def loss(z):
        objective.calls = 0
        return loss_of(objective, z)

    assert gradcheck(loss, double(2, 4, 3))


# ---- SimCLR ----


def test_simclr_of_two_images_by_hand():
    # Image 0 has views 60 degrees apart, image 1 equal ones.
    z = torch.stack([unit(0, 90), unit(60, 90)])

    def e(angle):
        return math.exp(cos(angle) / 0.5)

    shares = [
        e(60) / (e(60) + 2 * e(90)),  # the first views, of image 0 and of image 1
        e(0) / (e(0) + e(90) + e(30)),
        e(60) / (e(60) + 2 * e(30)),  # and the second ones
        e(0) / (e(0) + e(90) + e(30)),
    ]
    expected = -sum(math.log(share) for share in shares) / 4
    assert loss_of(SimCLR(0.5), z).item() == pytest.approx(expected)


def test_simclr_does_not_care_which_view_is_which_nor_for_lengths():
    z = double(2, 5, 3)
    loss = loss_of(SimCLR(0.2), z)
    assert torch.allclose(loss, loss_of(SimCLR(0.2), z.flip(0)))
    assert torch.allclose(loss, loss_of(SimCLR(0.2), z * torch.rand(2, 5, 1) + z))
    assert torch.allclose(loss, loss_of(SimCLR(0.2), z[:, torch.randperm(5)]))
    two_swapped = torch.stack([z[0], z[1, [1, 0, 2, 3, 4]]])
    assert not torch.allclose(loss, loss_of(SimCLR(0.2), two_swapped))


@pytest.mark.parametrize("negatives", [1, 3, 8, 50])
def test_simclr_has_as_many_negatives_as_asked_for(negatives):
    """Where all are equal, telling one from K others costs log(K + 1); 5 images give 8 others."""
    loss = loss_of(SimCLR(0.2, negatives), torch.ones(2, 5, 3))
    assert loss.item() == pytest.approx(math.log(1 + min(negatives, 8)))


def test_simclrs_negatives_are_drawn_without_replacement():
    z = double(2, 5, 3)
    all_of_them = loss_of(SimCLR(0.2, negatives=8), z).item()
    assert all_of_them == pytest.approx(loss_of(SimCLR(0.2), z).item())


def test_simclrs_negatives_are_of_both_views():
    """Each of two images' four views has one negative of two; all 16 choices turn up."""
    z = torch.stack([unit(0, 90), unit(30, 200)])
    u = z.flatten(0, 1)

    def loss(view, negative):
        positive = (view + 2) % 4
        return math.log(1 + math.exp((u[view] @ u[negative] - u[view] @ u[positive]).item()))

    possible = set()
    for negatives in itertools.product((1, 3), (0, 2), (1, 3), (0, 2)):
        mean = sum(loss(view, negative) for view, negative in enumerate(negatives)) / 4
        possible.add(round(mean, 6))
    one = SimCLR(1.0, negatives=1)
    seen = {round(loss_of(one, z).item(), 6) for _ in range(200)}
    assert len(possible) == 16 and seen == possible


def test_simclrs_negatives_are_of_other_images_and_change():
    # Views of an image equal, images orthogonal: a negative that is the image itself costs log 2.
    z = torch.stack([torch.eye(6, dtype=torch.float64)] * 2)
    one = SimCLR(1.0, negatives=1)
    assert loss_of(one, z).item() == pytest.approx(math.log(1 + math.exp(-1)))
    z = double(2, 6, 3)
    first, second = loss_of(one, z).item(), loss_of(one, z).item()
    again = SimCLR(1.0, negatives=1)
    again.calls = 2
    assert first != second == loss_of(again, z).item()


# ---- VICReg ----


def test_vicregs_invariance():
    z = torch.randn(2, 200, 4, dtype=torch.float64)
    assert VICReg.invariance(torch.stack([z[0], z[0] + 3])).item() == pytest.approx(9)
    opposite = VICReg.invariance(torch.stack([z[0], -z[0]])).item()
    assert opposite == pytest.approx(4 * z[0].pow(2).mean().item())


def test_vicregs_variance():
    z = torch.randn(2, 200, 4, dtype=torch.float64)
    none = math.sqrt(1e-4)  # what counts as the deviation of a constant
    assert VICReg.variance(2 * z).item() == 0  # beyond 1 no more is asked for
    assert VICReg.variance(0 * z).item() == pytest.approx(2 * (1 - none))  # both views
    one_constant = torch.stack([2 * z[0], 0 * z[1]])
    assert VICReg.variance(one_constant).item() == pytest.approx(1 - none)
    assert VICReg.variance(one_constant.flip(0)).item() == pytest.approx(1 - none)
    # The variance is unbiased: of 0 and 0.1 it is 0.005.
    pair = torch.tensor([0.0, 0.1], dtype=torch.float64).view(1, 2, 1).expand(2, 2, 1)
    assert VICReg.variance(pair).item() == pytest.approx(2 * (1 - math.sqrt(0.005 + 1e-4)))


def test_vicregs_covariance():
    z = torch.randn(2, 200, 4, dtype=torch.float64)
    white = torch.linalg.qr(z - z.mean(1, keepdim=True))[0]
    assert VICReg.covariance(white).item() == pytest.approx(0, abs=1e-20)
    a = z[0, :, :1] / z[0, :, :1].std()
    together = torch.cat([a, 3 * a], 1)  # a covariance of 3
    # Two views, two places off the diagonal, divided by d = 2.
    both = VICReg.covariance(torch.stack([together, together])).item()
    assert both == pytest.approx(2 * 2 * 9 / 2)
    one_view = torch.stack([together, torch.zeros(200, 2, dtype=torch.float64)])
    assert VICReg.covariance(one_view).item() == pytest.approx(9)
    assert VICReg.covariance(one_view.flip(0)).item() == pytest.approx(9)


def test_vicreg_is_the_weighted_sum_of_its_terms():
    z = torch.randn(2, 200, 4, dtype=torch.float64)
    expected = 25 * VICReg.invariance(z) + 25 * VICReg.variance(z) + VICReg.covariance(z)
    assert loss_of(VICReg(), z).item() == pytest.approx(expected.item())


# ---- BYOL and its target ----


def linear(weight):
    layer = nn.Linear(2, 2, bias=False).double()
    layer.weight.data.copy_(weight)
    return layer


def test_byol_predicts_the_targets_embedding_of_the_other_view():
    byol = BYOL(linear(torch.eye(2)), 2, 4, steps=10)
    byol.predict = nn.Identity()
    x = torch.cat([unit(0, 40), unit(60, 100)])  # two images, views 60 degrees apart
    z = x.view(2, 2, 2).clone().requires_grad_()
    assert loss_of(byol, z, x).item() == pytest.approx(2 * (2 - 2 * 0.5))
    assert loss_of(byol, 3 * z, x).item() == pytest.approx(2)  # of directions alone
    twice_the_first = x.view(2, 2, 2)[:, [0, 0]]
    assert loss_of(byol, twice_the_first, x[[0, 0, 2, 2]]).item() == pytest.approx(2)

    # A predictor that mirrors: what is at 0 is predicted to be at 90, and its other view is at 60.
    byol.predict = linear(MIRROR)
    between = (90 - 0 - 60, 90 - 40 - 100, 90 - 60 - 0, 90 - 100 - 40)
    expected = 2 * sum(2 - 2 * cos(angle) for angle in between) / 4
    loss = loss_of(byol, z, x)
    assert loss.item() == pytest.approx(expected)
    loss.backward()
    assert all(p.grad is None for p in byol.target.parameters()) and z.grad.abs().sum() > 0

    # The same where the target mirrors; at the last step it stands still.
    byol.predict = nn.Identity()
    byol.calls = 10
    byol.target.network.weight.data.copy_(MIRROR)
    assert loss_of(byol, z, x).item() == pytest.approx(expected)


def test_byols_predictor_is_published_and_sees_one_view_at_a_time():
    byol = BYOL(nn.Linear(3, 8), dim=8, hidden=16, steps=10)
    kinds = [type(layer) for layer in byol.predict]
    assert kinds == [nn.Linear, nn.BatchNorm1d, nn.ReLU, nn.Linear]
    assert [layer.out_features for layer in (byol.predict[0], byol.predict[3])] == [16, 8]
    seen = []
    byol.predict.register_forward_hook(lambda module, inputs, output: seen.append(output))
    z, x = torch.randn(2, 5, 8), torch.randn(10, 3)
    byol(z, x, None)
    byol(torch.stack([z[0], torch.randn(5, 8)]), x, None)  # with another second view
    assert len(seen) == 4
    assert torch.equal(seen[0], seen[2]) and not torch.equal(seen[1], seen[3])


def test_a_target_follows_its_online_network():
    online = nn.Linear(1, 1)
    byol = BYOL(online, 1, 2, steps=100)
    byol.predict = nn.Identity()
    before = byol.target.network.weight.item()
    online.weight.data += 1
    moved = []
    for call in (0, 100, 25):
        byol.calls = call
        byol(torch.ones(2, 1, 1), torch.ones(2, 1), None)
        moved.append(byol.target.network.weight.item() - before)
    # 1 - momentum is 0.01 at first, 0 at the end, and on a cosine on the way.
    on_the_way = 0.005 * (1 + math.cos(math.pi / 4))
    assert moved[0] == pytest.approx(0.01, rel=1e-4)
    assert moved[1] == moved[0]
    assert moved[2] == pytest.approx(0.01 + 0.99 * on_the_way, rel=1e-4)
    assert not any(p is online.weight for p in byol.parameters())


# ---- SwAV ----


def test_sinkhorns_codes_are_balanced():
    codes = sinkhorn(torch.randn(40, 8, dtype=torch.float64), eps=0.5, iterations=100)
    ones = torch.ones(40, dtype=torch.float64)
    assert torch.allclose(codes.sum(1), ones)
    assert torch.allclose(codes.sum(0), 5 * ones[:8], rtol=1e-4)
    assert torch.allclose(sinkhorn(torch.randn(40, 8, dtype=torch.float64)).sum(1), ones)
    assert sinkhorn(torch.tensor([[1e4, 0.0], [0.0, 1e4]])).isfinite().all()


def test_sinkhorn_alternates_three_times_rows_last():
    scores = torch.randn(7, 5, dtype=torch.float64) / 5
    log_q = scores / 0.05
    for _ in range(3):
        log_q = log_q - log_q.logsumexp(0, keepdim=True)
        log_q = log_q - log_q.logsumexp(1, keepdim=True)
    assert torch.allclose(sinkhorn(scores), log_q.exp())


def test_swav_predicts_the_other_views_code():
    swav = SwAV(dim=4, temperature=0.1, prototypes=4, queue=1000)
    swav.prototypes.data.copy_(torch.eye(4))
    # Each image is its own prototype, in both views; or another one in the second view.
    agreeing = torch.eye(4).expand(2, 4, 4)
    swapped = torch.stack([torch.eye(4), torch.eye(4)[[1, 0, 3, 2]]])
    assert loss_of(swav, agreeing).item() < 0.01
    assert loss_of(swav, swapped).item() == pytest.approx(10, rel=0.01)  # cos / temperature
    assert loss_of(swav, swapped.flip(0)).item() == pytest.approx(10, rel=0.01)


def swav_loss(scores, codes):
    return -(codes.flip(0) * F.log_softmax(scores / 0.1, -1)).sum(-1).mean()


def test_swavs_prototypes_are_unit_rows_and_codes_have_no_gradient():
    swav = SwAV(4, 0.1, prototypes=6, queue=8)
    swav.prototypes.data *= 5
    z = torch.randn(2, 3, 4, requires_grad=True)
    loss_of(swav, z).backward()
    assert torch.allclose(swav.prototypes.norm(dim=1), torch.ones(6))
    u = F.normalize(z.detach(), dim=-1).requires_grad_()
    scores = u @ swav.prototypes.detach().T
    codes = torch.stack([sinkhorn(view) for view in scores]).detach()
    swav_loss(scores, codes).backward()
    radial = (u.grad * u.detach()).sum(-1, keepdim=True) * u.detach()
    expected = (u.grad - radial) / z.detach().norm(dim=-1, keepdim=True)
    assert torch.allclose(z.grad, expected, atol=1e-5)


def test_swavs_queue_serves_once_it_is_full_and_gets_no_gradient():
    swav = SwAV(4, 0.1, prototypes=6, queue=8)
    without = SwAV(4, 0.1, prototypes=6, queue=10_000)
    without.prototypes.data.copy_(swav.prototypes.data)
    batches = [torch.randn(2, 4, 4, requires_grad=True) for _ in range(3)]
    losses = [(loss_of(swav, z).item(), loss_of(without, z).item()) for z in batches]
    assert losses[0][0] == losses[0][1] and losses[1][0] == losses[1][1]
    assert losses[2][0] != losses[2][1]

    with torch.no_grad():
        c = swav.prototypes
        oldest, middle, newest = (F.normalize(z, dim=-1) for z in batches)
        scores = newest @ c.T
        before = torch.cat([middle, oldest], 1) @ c.T
        codes = [sinkhorn(torch.cat([scores[v], before[v]]))[:4] for v in (0, 1)]
        expected = swav_loss(scores, torch.stack(codes))
    assert losses[2][0] == pytest.approx(expected.item(), rel=1e-5)
    assert torch.equal(swav.queue, torch.cat([newest, middle], 1))
    assert not swav.queue.requires_grad


def test_swavs_queue_is_saved_with_it():
    swav, again = (SwAV(4, 0.1, prototypes=6, queue=8) for _ in range(2))
    *first, last = torch.randn(4, 2, 4, 4)
    for z in first:
        swav(z, None, None)
    again.load_state_dict(swav.state_dict())
    assert loss_of(again, last).item() == loss_of(swav, last).item()


# ---- ReSSL ----


def relation(weak, strong):
    """Cross-entropy of cosines with the queue, one row an image."""
    wanted = torch.softmax(weak / 0.04, 1)
    return -(wanted * torch.log_softmax(strong / 0.1, 1)).sum() / len(weak)


def test_ressl_relates_to_the_queue_as_the_weak_view_does():
    ressl = ReSSL(nn.Identity(), 2, temperature=0.1, queue=3).double()
    ressl.queue.copy_(unit(0, 90, 180))
    x = torch.cat([unit(10), unit(50)])  # the strong view, then the weak one
    strong, weak = (
        torch.tensor([[cos(q - angle) for q in (0, 90, 180)]], dtype=torch.float64)
        for angle in (10, 50)
    )
    loss = loss_of(ressl, x.view(2, 1, 2), x)
    assert loss.item() == pytest.approx(relation(weak, strong).item())
    assert torch.allclose(ressl.queue, unit(50, 0, 90))  # the weak view's, and the oldest gone


def test_ressl_of_a_batch_is_the_mean_of_its_images():
    ressl = ReSSL(nn.Identity(), 2, temperature=0.1, queue=4).double()
    ressl.queue.copy_(unit(0, 90, 180, 270))
    x = torch.cat([unit(10, 100, 200), unit(50, 120, 300)])
    expected = relation(x[3:] @ ressl.queue.T, x[:3] @ ressl.queue.T)
    assert loss_of(ressl, x.view(2, 3, 2), x).item() == pytest.approx(expected.item())
    assert torch.allclose(ressl.queue, unit(50, 120, 300, 0))  # the whole batch's


def test_ressls_teacher_is_the_target_and_follows():
    online = linear(torch.eye(2))
    ressl = ReSSL(online, 2, temperature=0.1, queue=2).double()
    ressl.queue.copy_(unit(0, 90))
    online.weight.data.copy_(MIRROR)
    x = torch.cat([unit(10), unit(50)])
    loss_of(ressl, x.view(2, 1, 2).requires_grad_(), x).backward()
    followed = 0.99 * torch.eye(2) + 0.01 * MIRROR
    assert torch.allclose(ressl.target.network.weight, followed.double())
    assert ressl.target.network.weight.grad is None
    # The queue has the target's embedding of the weak view, not the online network's.
    of_the_target = F.normalize(x[1] @ ressl.target.network.weight.T, dim=0)
    assert torch.allclose(ressl.queue[0], of_the_target)


def test_ressls_logged_terms_are_of_the_strong_view_alone():
    """The other view's embeddings are zeros, which belong to no image."""
    ressl = ReSSL(nn.Identity(), 4, temperature=0.1, queue=3)
    z = torch.stack([torch.randn(5, 4), torch.zeros(5, 4)])
    _, terms = ressl(z, torch.randn(10, 4), None)
    expected = empssl.coding_rate(F.normalize(z[:1], dim=-1))
    assert terms["R"].item() == pytest.approx(expected.item())
    assert terms["D"].item() == pytest.approx(1)
