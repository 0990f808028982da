"""The peers' objectives: values by hand, gradients, invariances, what gets a gradient and what moves."""

import dataclasses
import itertools
import json
import math
import signal
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.autograd import gradcheck

import baselines
import empssl
import empssl_io as io
from baselines import BYOL, ReSSL, SimCLR, SingleBranch, SwAV, VICReg, cut_mix, sinkhorn, sqrt_kl
from test_survival import stop_after


def unit(*angles):
    """Unit vectors in the plane, at these angles in degrees."""
    return torch.tensor([[math.cos(math.radians(a)), math.sin(math.radians(a))] for a in angles], dtype=torch.float64)


def double(*shape):
    return torch.randn(*shape, dtype=torch.float64, requires_grad=True)


# ---- SimCLR ----

def test_simclr_of_two_images_by_hand():
    z = torch.stack([unit(0, 90), unit(60, 90)])            # image 0: views 60 degrees apart; image 1: equal views
    e = lambda angle: math.exp(math.cos(math.radians(angle)) / 0.5)
    rows = [e(60) / (e(60) + 2 * e(90)), e(0) / (e(0) + e(90) + e(30)),         # views 0: image 0, image 1
            e(60) / (e(60) + 2 * e(30)), e(0) / (e(0) + e(90) + e(30))]
    assert SimCLR(0.5)(z).item() == pytest.approx(-sum(map(math.log, rows)) / 4)


def test_simclr_does_not_care_which_view_is_which_nor_for_lengths():
    z = double(2, 5, 3)
    loss = SimCLR(0.2)(z)
    assert torch.allclose(loss, SimCLR(0.2)(z.flip(0))) and torch.allclose(loss, SimCLR(0.2)(z * torch.rand(2, 5, 1) + z))
    order = torch.randperm(5)
    assert torch.allclose(loss, SimCLR(0.2)(z[:, order])) and not torch.allclose(loss, SimCLR(0.2)(torch.stack([z[0], z[1, [1, 0, 2, 3, 4]]])))


@pytest.mark.parametrize("negatives", [1, 3, 8, 50])
def test_simclr_has_as_many_negatives_as_asked_for(negatives):
    """Where all embeddings are equal, telling one from K others costs log(K + 1); of 5 images there are 8 others."""
    assert SimCLR(0.2, negatives)(torch.ones(2, 5, 3)).item() == pytest.approx(math.log(1 + min(negatives, 8)))


def test_simclrs_negatives_are_drawn_without_replacement():
    z = double(2, 5, 3)
    assert SimCLR(0.2, negatives=8)(z).item() == pytest.approx(SimCLR(0.2)(z).item())           # all 8 of them


def test_simclrs_negatives_are_of_both_views():
    """Two images, each view alone in its direction: one negative is one of two, and both turn up for each view."""
    z = torch.stack([unit(0, 90), unit(30, 200)])
    u, seen = z.flatten(0, 1), set()
    loss = lambda j, k: math.log(1 + math.exp((u[j] @ u[k] - u[j] @ u[(j + 2) % 4]).item()))
    negatives = {0: (1, 3), 1: (0, 2), 2: (1, 3), 3: (0, 2)}
    means = {round(sum(loss(j, k) for j, k in enumerate(chosen)) / 4, 6): chosen for chosen in itertools.product(*negatives.values())}
    one = SimCLR(1.0, negatives=1)
    for _ in range(200):
        seen.add(means[round(one(z).item(), 6)])
    assert len(means) == 16 and seen == set(means.values())


def test_simclrs_negatives_are_of_other_images_and_change():
    z = torch.stack([torch.eye(6, dtype=torch.float64)] * 2)                    # views of an image equal, images orthogonal
    one = SimCLR(1.0, negatives=1)
    assert one(z).item() == pytest.approx(math.log(1 + math.exp(-1)))           # never the image itself: that were log 2
    z = double(2, 6, 3)
    first, second = one(z).item(), one(z).item()
    again = SimCLR(1.0, negatives=1)
    again.calls = 2
    assert first != second == again(z).item()


@pytest.mark.parametrize("objective", [SimCLR(0.5), SimCLR(0.5, negatives=2), VICReg()], ids=["simclr", "simclr-2", "vicreg"])
def test_gradients(objective):
    def loss(z):
        objective.calls = 0
        return objective(z)
    assert gradcheck(loss, double(2, 4, 3))


# ---- VICReg ----

def test_vicregs_terms_one_by_one():
    z = torch.randn(2, 200, 4, dtype=torch.float64)
    assert VICReg.invariance(torch.stack([z[0], z[0] + 3])).item() == pytest.approx(9)
    assert VICReg.invariance(torch.stack([z[0], -z[0]])).item() == pytest.approx(4 * z[0].pow(2).mean().item())
    assert VICReg.variance(2 * z).item() == 0                                   # deviations beyond 1 are not asked for more
    assert VICReg.variance(0 * z).item() == pytest.approx(2 * (1 - 0.01))       # both views, sqrt(1e-4) each
    assert VICReg.variance(torch.stack([2 * z[0], 0 * z[1]])).item() == pytest.approx(1 - 0.01) == VICReg.variance(
        torch.stack([0 * z[0], 2 * z[1]])).item()
    pair = torch.tensor([0.0, 0.1], dtype=torch.float64).view(1, 2, 1).expand(2, 2, 1)          # unbiased variance 0.005
    assert VICReg.variance(pair).item() == pytest.approx(2 * (1 - math.sqrt(0.005 + 1e-4)))
    white = torch.linalg.qr(z - z.mean(1, keepdim=True))[0]
    assert VICReg.covariance(white).item() == pytest.approx(0, abs=1e-20)
    a = z[0, :, :1] / z[0, :, :1].std()
    assert VICReg.covariance(torch.stack([torch.cat([a, 3 * a], 1)] * 2)).item() == pytest.approx(2 * 2 * 9 / 2)   # views, places, d
    one_view = torch.stack([torch.cat([a, 3 * a], 1), torch.zeros(200, 2, dtype=torch.float64)])
    assert VICReg.covariance(one_view).item() == pytest.approx(9) == VICReg.covariance(one_view.flip(0)).item()
    loss = 25 * VICReg.invariance(z) + 25 * VICReg.variance(z) + VICReg.covariance(z)
    assert VICReg()(z).item() == pytest.approx(loss.item())


# ---- BYOL and its target ----

def test_byol_predicts_the_targets_embedding_of_the_other_view():
    online = nn.Linear(2, 2, bias=False).double()
    nn.init.eye_(online.weight)
    byol = BYOL(online, 2, 4, steps=10)
    byol.predict = nn.Identity()
    x = torch.cat([unit(0, 40), unit(60, 100)])                                 # two images, views 60 degrees apart
    z = x.view(2, 2, 2).clone().requires_grad_()
    assert byol(z, x).item() == pytest.approx(2 * (2 - 2 * 0.5))
    assert byol(3 * z, x).item() == pytest.approx(2)                            # of directions alone
    assert byol(x.view(2, 2, 2)[:, [0, 0]], x[[0, 0, 2, 2]]).item() == pytest.approx(2)
    byol.predict = nn.Linear(2, 2, bias=False).double()
    byol.predict.weight.data.copy_(torch.eye(2).flip(0))                        # mirrored: 90 - angle
    far = [2 - 2 * math.cos(math.radians(a)) for a in (90 - 0 - 60, 90 - 40 - 100, 90 - 60 - 0, 90 - 100 - 40)]
    loss = byol(z, x)
    assert loss.item() == pytest.approx(2 * sum(far) / 4)
    loss.backward()
    assert all(p.grad is None for p in byol.target.parameters()) and z.grad.abs().sum() > 0
    byol.predict, byol.steps, byol.calls = nn.Identity(), 10, 10                # the target stands still
    byol.target.network.weight.data.copy_(torch.eye(2).flip(0))                 # and mirrors: 90 - angle
    assert byol(z, x).item() == pytest.approx(2 * sum(far) / 4)


def test_byols_predictor_is_published_and_sees_one_view_at_a_time():
    byol = BYOL(nn.Linear(3, 8), dim=8, hidden=16, steps=10)
    assert [type(layer) for layer in byol.predict] == [nn.Linear, nn.BatchNorm1d, nn.ReLU, nn.Linear]
    assert [layer.out_features for layer in (byol.predict[0], byol.predict[3])] == [16, 8]
    seen = []
    byol.predict.register_forward_hook(lambda module, inputs, output: seen.append(output))
    z, x = torch.randn(2, 5, 8), torch.randn(10, 3)
    for _ in range(2):
        byol(z, x)
        z = torch.stack([z[0], torch.randn(5, 8)])                              # another second view
    assert len(seen) == 4 and torch.equal(seen[0], seen[2]) and not torch.equal(seen[1], seen[3])


def test_a_target_follows_its_online_network():
    online = nn.Linear(1, 1)
    byol = BYOL(online, 1, 2, steps=100)
    before = byol.target.network.weight.item()
    online.weight.data += 1
    byol.predict = nn.Identity()
    byol(torch.ones(2, 1, 1), torch.ones(2, 1))
    assert byol.target.network.weight.item() == pytest.approx(before + 0.01)    # momentum 0.99 at first
    byol.calls = 100
    byol(torch.ones(2, 1, 1), torch.ones(2, 1))
    assert byol.target.network.weight.item() == pytest.approx(before + 0.01)    # and 1 at the end
    byol.calls = 25
    byol(torch.ones(2, 1, 1), torch.ones(2, 1))                                 # by a cosine on the way
    assert byol.target.network.weight.item() == pytest.approx(before + 0.01 + 0.99 * 0.005 * (1 + math.cos(math.pi / 4)), rel=1e-5)
    assert not any(p is online.weight for p in byol.parameters())


# ---- SwAV ----

def test_sinkhorns_codes_are_balanced():
    codes = sinkhorn(torch.randn(40, 8, dtype=torch.float64), eps=0.5, iterations=100)
    assert torch.allclose(codes.sum(1), torch.ones(40, dtype=torch.float64))
    assert torch.allclose(codes.sum(0), torch.full((8,), 5.0, dtype=torch.float64), rtol=1e-4)
    three = sinkhorn(torch.randn(40, 8, dtype=torch.float64))
    assert torch.allclose(three.sum(1), torch.ones(40, dtype=torch.float64))
    assert sinkhorn(torch.tensor([[1e4, 0.0], [0.0, 1e4]])).isfinite().all()


def test_sinkhorn_alternates_three_times_rows_last():
    scores = torch.randn(7, 5, dtype=torch.float64) / 5
    log_q = scores / 0.05
    for _ in range(3):
        log_q = log_q - log_q.logsumexp(0, keepdim=True)
        log_q = log_q - log_q.logsumexp(1, keepdim=True)
    assert torch.allclose(sinkhorn(scores), log_q.exp())


def test_swavs_queue_is_saved_with_it():
    swav, again = (SwAV(4, 0.1, prototypes=6, queue=8) for _ in range(2))
    batches = torch.randn(4, 2, 4, 4)
    for z in batches[:3]:
        swav(z)
    again.load_state_dict(swav.state_dict())
    assert again(batches[3]).item() == swav(batches[3]).item()


def test_swav_predicts_the_other_views_code():
    swav = SwAV(dim=4, temperature=0.1, prototypes=4, queue=1000)
    swav.prototypes.data.copy_(torch.eye(4))
    z = torch.eye(4).expand(2, 4, 4)
    agree = swav(z).item()
    assert agree < 0.01                                                         # each image its own prototype, in both views
    assert swav(torch.stack([torch.eye(4), torch.eye(4)[[1, 0, 3, 2]]])).item() == pytest.approx(10, rel=0.01)  # cos / temperature
    assert swav(torch.stack([torch.eye(4), torch.eye(4)[[1, 0, 3, 2]]]).flip(0)).item() == pytest.approx(10, rel=0.01)


def test_swavs_prototypes_are_unit_rows_and_codes_have_no_gradient():
    swav = SwAV(4, 0.1, prototypes=6, queue=8)
    swav.prototypes.data *= 5
    z = torch.randn(2, 3, 4, requires_grad=True)
    swav(z).backward()
    assert torch.allclose(swav.prototypes.norm(dim=1), torch.ones(6))
    u = F.normalize(z.detach(), dim=-1).requires_grad_()
    scores = u @ swav.prototypes.detach().T
    codes = torch.stack([sinkhorn(view) for view in scores]).detach()
    (-(codes.flip(0) * F.log_softmax(scores / 0.1, -1)).sum(-1).mean()).backward()
    radial = (u.grad * u.detach()).sum(-1, keepdim=True) * u.detach()
    assert torch.allclose(z.grad, (u.grad - radial) / z.detach().norm(dim=-1, keepdim=True), atol=1e-5)


def test_swavs_queue_serves_once_it_is_full_and_gets_no_gradient():
    swav, plain = (SwAV(4, 0.1, prototypes=6, queue=queue) for queue in (8, 10_000))
    plain.prototypes.data.copy_(swav.prototypes.data)
    batches = [torch.randn(2, 4, 4, requires_grad=True) for _ in range(4)]
    losses = [(swav(z).item(), plain(z).item()) for z in batches[:3]]
    assert losses[0][0] == losses[0][1] and losses[1][0] == losses[1][1] and losses[2][0] != losses[2][1]
    with torch.no_grad():
        scores = [F.normalize(batches[2], dim=-1) @ swav.prototypes.T, torch.cat([F.normalize(batches[i], dim=-1) for i in (1, 0)], 1) @ swav.prototypes.T]
        codes = torch.stack([sinkhorn(torch.cat([scores[0][v], scores[1][v]]))[:4] for v in (0, 1)])
        wanted = -(codes.flip(0) * F.log_softmax(scores[0] / 0.1, -1)).sum(-1).mean()
    assert losses[2][0] == pytest.approx(wanted.item(), rel=1e-5)
    newest = torch.cat([F.normalize(batches[i], dim=-1) for i in (2, 1)], 1)
    assert torch.equal(swav.queue, newest) and not swav.queue.requires_grad


# ---- ReSSL ----

def test_ressl_relates_to_the_queue_as_the_weak_view_does():
    online = nn.Identity()
    ressl = ReSSL(online, 2, temperature=0.1, queue=3).double()
    ressl.queue.copy_(unit(0, 90, 180))
    x = torch.cat([unit(10), unit(50)])                                         # the strong view, then the weak one
    cos = lambda a: torch.tensor([math.cos(math.radians(q - a)) for q in (0, 90, 180)], dtype=torch.float64)
    wanted = -(torch.softmax(cos(50) / 0.04, 0) * torch.log_softmax(cos(10) / 0.1, 0)).sum()
    assert ressl(x.view(2, 1, 2), x).item() == pytest.approx(wanted.item())
    assert torch.allclose(ressl.queue, unit(50, 0, 90))                         # the weak view's embedding, the oldest gone


def test_ressl_of_a_batch_is_the_mean_of_its_images():
    ressl = ReSSL(nn.Identity(), 2, temperature=0.1, queue=4).double()
    ressl.queue.copy_(unit(0, 90, 180, 270))
    x = torch.cat([unit(10, 100, 200), unit(50, 120, 300)])
    weak, strong = x[3:] @ ressl.queue.T, x[:3] @ ressl.queue.T
    wanted = -(torch.softmax(weak / 0.04, 1) * torch.log_softmax(strong / 0.1, 1)).sum() / 3
    assert ressl(x.view(2, 3, 2), x).item() == pytest.approx(wanted.item())
    assert torch.allclose(ressl.queue, unit(50, 120, 300, 0))                   # the whole batch's, and the oldest gone


def test_ressls_teacher_is_the_target_and_follows():
    online = nn.Linear(2, 2, bias=False).double()
    nn.init.eye_(online.weight)
    ressl = ReSSL(online, 2, temperature=0.1, queue=2).double()
    ressl.queue.copy_(unit(0, 90))
    online.weight.data.copy_(torch.eye(2).flip(0))
    x = torch.cat([unit(10), unit(50)])
    ressl(x.view(2, 1, 2).requires_grad_(), x).backward()
    assert torch.allclose(ressl.target.network.weight, torch.tensor([[0.99, 0.01], [0.01, 0.99]], dtype=torch.float64))
    assert ressl.target.network.weight.grad is None
    assert torch.allclose(ressl.queue[0], F.normalize(x[1] @ ressl.target.network.weight.T, dim=0))     # the target's, not z


# ---- single-branch discrimination ----

def bank(N=6, d=3, **how):
    settings = dict(start=None, N=N, dim=d, temperature=0.5, others=2, distillation=0.0, momentum=0.5, update="gradient") | how
    return SingleBranch(**settings).double()


def test_single_is_cross_entropy_over_its_own_row_the_batchs_and_the_others():
    single = bank(N=4, d=2, others=10)
    single.bank.copy_(unit(0, 90, 180, 270))
    z = unit(30, 80).unsqueeze(0)
    e = lambda a, row: math.exp(math.cos(math.radians(a - row)) / 0.5)
    p = [e(a, own) / sum(e(a, row) for row in (0, 90, 180, 270)) for a, own in ((30, 0), (80, 180))]
    assert single(z, None, torch.tensor([0, 2])).item() == pytest.approx(-sum(map(math.log, p)) / 2)
    alone = bank(N=4, d=2, others=0)
    alone.bank.copy_(unit(0, 90, 180, 270))
    assert alone(z[:, :1], None, torch.tensor([0])).item() == pytest.approx(0)  # nothing to be told from


def test_others_are_rows_outside_the_batch_and_change():
    single, index = bank(N=50, others=5), torch.tensor([3, 7])
    touched = []
    for _ in range(2):
        before = single.bank.clone()
        single(torch.randn(1, 2, 3, dtype=torch.float64), None, index)
        touched.append({int(i) for i in (single.bank != before).any(1).nonzero()})
        assert {3, 7} < touched[-1] and len(touched[-1]) == 7
        assert torch.allclose(single.bank.norm(dim=1), torch.ones(50, dtype=torch.float64))
    assert touched[0] != touched[1]


def test_the_corrected_update_is_a_step_against_autograds_gradient():
    """For a batch without CutMix: own rows m w - (1 - m) tau b dL/dw, other rows w - (1 - m) tau b dL/dw, made unit."""
    single = bank(others=2, momentum=0.7)
    z, index = F.normalize(torch.randn(3, 3, dtype=torch.float64), dim=1), torch.tensor([4, 0, 2])
    before = single.bank.clone()
    single(z.unsqueeze(0), None, index)
    moved = (single.bank != before).any(1).nonzero().flatten()
    rows = torch.cat([index, moved[~torch.isin(moved, index)]])
    w = before[rows].clone().requires_grad_()
    loss = F.cross_entropy(z @ w.T / 0.5, torch.arange(3))
    loss.backward()
    kept = torch.tensor([0.7] * 3 + [1.0] * 2, dtype=torch.float64).view(-1, 1)
    assert len(rows) == 5
    assert torch.allclose(single.bank[rows], F.normalize(kept * w.detach() - 0.3 * 0.5 * 3 * w.grad, dim=1))


def test_the_moving_average_moves_the_batchs_rows_alone():
    single = bank(update="average", momentum=0.7)
    z, before = F.normalize(torch.randn(2, 3, dtype=torch.float64), dim=1), single.bank.clone()
    single(z.unsqueeze(0), None, torch.tensor([1, 5]))
    assert torch.allclose(single.bank[[1, 5]], F.normalize(0.7 * before[[1, 5]] + 0.3 * z, dim=1))
    assert torch.allclose(single.bank[[0, 2, 3, 4]], before[[0, 2, 3, 4]])
    mixed = bank(update="average", momentum=0.7, mixed=lambda: (torch.tensor([1, 0]), 0.6))     # as released: its own row alone
    mixed.bank.copy_(before)
    mixed(z.unsqueeze(0), None, torch.tensor([1, 5]))
    assert torch.allclose(mixed.bank[[1, 5]], F.normalize(0.7 * before[[1, 5]] + 0.3 * z, dim=1))


def test_mixed_images_belong_to_both_rows():
    single = bank(N=2, d=2, others=0, mixed=lambda: (torch.tensor([1, 0]), 0.75))
    single.bank.copy_(unit(0, 90))
    log_p = torch.log_softmax(unit(30, 80) @ unit(0, 90).T / 0.5, 1)
    wanted = -(0.75 * (log_p[0, 0] + log_p[1, 1]) + 0.25 * (log_p[0, 1] + log_p[1, 0])) / 2
    assert single(unit(30, 80).unsqueeze(0), None, torch.tensor([0, 1])).item() == pytest.approx(wanted.item())
    pull = torch.tensor([[0.75, 0.25], [0.25, 0.75]], dtype=torch.float64) - log_p.exp()
    assert torch.allclose(single.bank, F.normalize(0.5 * unit(0, 90) + 0.5 * pull.T @ unit(30, 80), dim=1))


def test_singles_distillation_is_of_the_cosines_without_temperature():
    plain, distilled = bank(N=4, d=2, others=10), bank(N=4, d=2, others=10, distillation=3.0)
    for single in (plain, distilled):
        single.bank.copy_(unit(0, 90, 180, 270))
    z = unit(30, 80)
    added = [single(z.unsqueeze(0), None, torch.tensor([0, 2])).item() for single in (distilled, plain)]
    assert added[0] - added[1] == pytest.approx(3 * sqrt_kl(z @ unit(0, 90, 180, 270).T).item())


def test_sqrt_kl():
    assert sqrt_kl(torch.full((3, 7), 0.4, dtype=torch.float64)).item() == pytest.approx(0)     # uniform: its own square root
    cos = torch.tensor([[math.log(4.0), 0.0]], dtype=torch.float64, requires_grad=True)        # p = (4, 1) / 5, u = (2, 1) / 3
    value = sqrt_kl(cos)
    assert value.item() == pytest.approx(0.8 * math.log(0.8 * 1.5) + 0.2 * math.log(0.2 * 3))
    value.backward()
    p, u = torch.tensor([0.8, 0.2]), torch.tensor([2 / 3, 1 / 3])
    inner = (p / u).log() + 1
    assert torch.allclose(cos.grad.float(), p * (inner - (p * inner).sum()))    # u is a constant: no gradient through it


def test_a_bank_that_begins_as_features():
    start = torch.randn(5, 3, dtype=torch.float64)
    single = bank(N=5, update="average", start=lambda: start)
    single(torch.ones(1, 1, 3, dtype=torch.float64), None, torch.tensor([2]))
    others = [0, 1, 3, 4]
    assert torch.allclose(single.bank[others], F.normalize(start[others], dim=1))
    single.start = lambda: pytest.fail("it began again")
    single(torch.ones(1, 1, 3, dtype=torch.float64), None, torch.tensor([2]))
    again = bank(N=5, start=lambda: pytest.fail("it began again"))
    again.load_state_dict(single.state_dict())                                  # a resumed run has its bank
    again(torch.ones(1, 1, 3, dtype=torch.float64), None, torch.tensor([2]))


def test_the_untrained_networks_features_are_in_the_images_order():
    """A network that sees each image's mean colour; 10 images in batches of 4 do not divide."""
    network = nn.Module()
    network.representation, network.project = lambda x: x.mean((2, 3)), lambda h: 2 * h
    images = (torch.arange(30, dtype=torch.uint8) * 8).view(10, 3, 1, 1).expand(10, 3, 32, 32).contiguous()
    c = config("single")
    c.batch = 4
    features = baselines.untrained_features(network, images, c, empssl.Augmentation.none())
    assert torch.allclose(features, 2 * (images[:, :, 0, 0] / 127.5 - 1), atol=1e-5)


def test_the_untrained_networks_batch_norm_uses_the_batch():
    """Else its features are those of an initialisation that has seen no data."""
    network = nn.Module()
    network.representation, network.project = lambda x: x.mean((2, 3)), nn.BatchNorm1d(3)
    images, c = torch.randint(256, (12, 3, 32, 32), dtype=torch.uint8), config("single")
    features = baselines.untrained_features(network, images, c, empssl.Augmentation.none())
    assert features.mean(0).abs().max() < 1e-4 and features.std(0, unbiased=False).min() > 0.5


def test_single_hears_which_images_were_mixed():
    images = io.load_dataset("shapes", subset=64).train_images
    encoder, objective, _ = baselines.method(config("single", cutmix=1.0), SimpleNamespace(train_images=images))
    encoder.train()(torch.randn(32, 3, 16, 16))
    partner, share = objective.mixed()
    assert partner.sort().values.tolist() == list(range(32)) and (partner, share) == encoder.mixed and 0 <= share <= 1


# ---- views ----

def test_cut_mix_pastes_what_it_says():
    x = torch.arange(4.0).view(4, 1, 1, 1).expand(4, 3, 16, 16)
    shares = []
    for seed in range(200):
        mixed, (partner, share) = cut_mix(x, 0.5, torch.Generator().manual_seed(seed))
        kept = (mixed == x).float().mean((1, 2, 3))
        here = partner != torch.arange(4)
        assert torch.allclose(kept[here], torch.full_like(kept[here], share))
        assert all(set(mixed[j].unique().tolist()) <= {float(j), float(partner[j])} for j in range(4))
        shares.append(share)
    # Beta(1/2, 1/2), the larger part stays: a mean of 1/2 + 1/pi where no box leaves the image, and more where it does
    assert min(shares) >= 0.49 and 0.82 < sum(shares) / 200 < 0.92 and len(set(shares)) > 30


def test_each_view_has_its_own_batch_statistics_and_ressls_weak_one_is_left_out():
    images = io.load_dataset("shapes", subset=64).train_images
    x = torch.randn(64, 3, 16, 16)
    for method, views in (("simclr", 2), ("ressl", 1), ("byol", 2)):
        encoder, objective, _ = baselines.method(config(method), SimpleNamespace(train_images=images))
        z = encoder.train()(x)
        alone = [encoder.project(encoder.representation(view)) for view in x.chunk(2)]
        assert torch.allclose(z[:32], alone[0], atol=1e-5) and torch.allclose(z[32:], alone[1] if views == 2 else torch.zeros(1), atol=1e-5)
    answer = objective.target(x)                                                # BYOL's target sees the views apart too
    assert torch.allclose(answer[32:], objective.target(x[32:].repeat(2, 1, 1, 1))[32:], atol=1e-5)


def config(method, **settings):
    c = baselines.Config(method=method, dataset="shapes", preset="laptop", device="cpu", precision="float32", batch=32,
                         hidden=32, projector=32, dim=16, others=20, **settings)
    return io.settings(c, {"laptop": empssl.PRESETS["laptop"] | baselines.PUBLISHED[method]})


def test_views_as_published():
    byol = baselines.views(config("byol", crops="published"), 32, 32)
    assert [a.solarize for a in byol] == [0.0, 0.2] and byol[0].area == (0.08, 1.0)
    assert {a.area for a in baselines.views(config("byol"), 32, 32)} == {(0.25, 0.25)}
    strong, weak = baselines.views(config("ressl", crops="published"), 32, 32)
    params = empssl.sample_patches(50, 2, (32, 32), [strong, weak], torch.Generator().manual_seed(0))
    column = dict(zip(empssl.COLUMNS, params.unbind(-1)))                       # (2, 50) each
    assert (column["brightness"][0] != 1).float().mean() > 0.6 and (column["brightness"][1] == 1).all()
    assert (column["grey"][1] == 0).all() and (column["flip"][1] == 1).any() and column["height"].unique().numel() > 10
    noise = [baselines.views(config("simclr", augmentation="noise", crops=crops), 32, 32) for crops in ("published", "patches")]
    assert [a.area for a in noise] == [(1.0, 1.0), (0.25, 0.25)] and all(a == empssl.Augmentation.none(area=a.area) for a in noise)
    strong, weak = baselines.views(config("ressl", augmentation="light"), 32, 32)
    assert strong == baselines.views(config("byol", augmentation="light"), 32, 32) and weak == empssl.Augmentation.none(flip=0.5)


def test_published_settings():
    """Literals, so that none changes unseen."""
    said = {name: (c["patches"], c["augmentation"], c["lr"], c["weight_decay"], c["batch"], c["dim"], c.get("temperature"), c["optimizer"], c["eta"])
            for name, c in baselines.PUBLISHED.items() if name not in ("empssl", "supervised")}
    assert said == {"simclr": (2, "simclr", 0.4, 1e-4, 256, 256, 0.2, "lars", 0.02), "vicreg": (2, "vicreg", 0.3, 1e-4, 256, 2048, None, "lars", 0.02),
                    "byol": (2, "byol", 1.0, 1e-5, 256, 256, None, "lars", 0.02), "swav": (2, "simclr", 0.6, 1e-6, 256, 128, 0.1, "lars", 0.02),
                    "ressl": (2, "ressl", 0.05, 1e-4, 256, 256, 0.1, "sgd", 0.0), "single": (1, "single", 1.0, 1e-4, 512, 2048, 0.2, "sgd", 0.0)}
    swav, ressl = SwAV(2, 0.1), ReSSL(nn.Identity(), 2, 0.1)
    assert swav.prototypes.shape == (3000, 2) and swav.queue.shape == (2, 3840, 2)
    assert ressl.queue.shape == (4096, 2) and (ressl.sharp, ressl.momentum) == (0.04, 0.99)
    colours = lambda a: (a.brightness, a.contrast, a.saturation, a.hue, a.grey, a.blur, a.solarize)
    views = lambda name: baselines.views(config(name, crops="published"), 32, 32)
    assert colours(views("simclr")) == (0.8, 0.8, 0.8, 0.2, 0.2, 0.5, 0.0) and colours(views("vicreg")) == (0.4, 0.4, 0.2, 0.1, 0.2, 0.0, 0.1)
    assert [colours(a) for a in views("byol")] == [(0.4, 0.4, 0.2, 0.1, 0.2, 0.0, 0.0), (0.4, 0.4, 0.2, 0.1, 0.2, 0.0, 0.2)]
    assert colours(views("ressl")[0]) == (0.4, 0.4, 0.2, 0.1, 0.2, 0.5, 0.0) and colours(views("single")) == (0.4, 0.4, 0.4, 0.1, 0.2, 0.0, 0.0)
    assert [views(name).area for name in ("simclr", "vicreg", "single")] == [(0.08, 1.0), (0.2, 1.0), (0.2, 1.0)]
    assert baselines.Config().cutmix == baselines.Config().bank_momentum == 0.5
    assert (baselines.Config().distillation, baselines.Config().others) == (20, 10_000)


def test_half_precision_embeddings_are_compared_in_float32():
    for objective in (SimCLR(0.2), VICReg(), SwAV(8, 0.1, prototypes=5, queue=8)):
        z = torch.randn(2, 4, 8).bfloat16()
        torch.testing.assert_close(objective(z), objective(z.float()))


def test_flags_reach_the_objectives():
    data = io.load_dataset("shapes", subset=64)
    objective = lambda name, **settings: baselines.method(config(name, **settings), data)[1]
    simclr = objective("simclr", negatives=3, temperature=0.7, seed=5)
    assert (simclr.negatives, simclr.temperature, simclr.seed) == (3, 0.7, 5)
    single = objective("single", bank_start="random", bank_update="average", bank_momentum=0.9, distillation=2.0, temperature=0.3, seed=5)
    assert (single.start, single.update, single.momentum, single.distillation, single.temperature, single.others, single.seed) \
        == (None, "average", 0.9, 2.0, 0.3, 20, 5)
    assert objective("single").start is not None and objective("single").update == "gradient"
    assert objective("byol", epochs=3).steps == 6                               # 64 images in batches of 32
    assert objective("swav", temperature=0.7).temperature == objective("ressl", temperature=0.7).temperature == 0.7
    encoder, _, _ = baselines.method(config("single", cutmix=0.3), data)
    assert encoder.cutmix == 0.3 and baselines.method(config("simclr"), data)[0].cutmix == 0


def test_empssl_here_is_empssl_itself():
    assert baselines.PUBLISHED["empssl"] == {key: getattr(empssl.Config(), key) for key in ("optimizer", "eta", "weight_decay")}


@pytest.mark.parametrize("name", ["byol", "swav"])
def test_training_moves_what_the_objective_learns(name):
    images, c = io.load_dataset("shapes", subset=64).train_images, config(name)
    encoder, objective, augmentation = baselines.method(c, SimpleNamespace(train_images=images))
    learned = [(p, F.normalize(p.detach().clone(), dim=-1)) for p in objective.parameters() if p.requires_grad and p.ndim == 2]
    empssl.train(encoder, images, c, augmentation, objective=objective)
    assert learned and all((F.normalize(p, dim=-1) - before).abs().max() > 1e-5 for p, before in learned)


def test_noise_is_there_in_training_alone():
    encoder, objective, _ = baselines.method(config("simclr", noise=0.5), io.load_dataset("shapes", subset=64))
    seen = []
    encoder.backbone.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    x = torch.zeros(64, 3, 16, 16)
    encoder.train()(x)
    encoder.eval()(x)
    assert torch.cat(seen[:2]).std().item() == pytest.approx(0.5, rel=0.05) and len(seen) == 3 and (seen[2] == 0).all()


def test_noise_alone_tells_two_views_apart_and_changes():
    encoder, objective, _ = baselines.method(config("simclr", augmentation="noise", noise=0.5), io.load_dataset("shapes", subset=64))
    seen = []
    encoder.backbone.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    x = torch.arange(64.0).view(64, 1, 1, 1).expand(64, 3, 16, 16)              # what was cut: 32 images, 2 crops each
    encoder.train()(x)
    objective.calls += 1
    encoder(x)
    noise = [view - x[:32] for view in seen]                                    # of the first crop, in both views
    assert len(noise) == 4 and all(n.std().item() == pytest.approx(0.5, rel=0.05) for n in noise)
    assert all((a - b).std() > 0.6 for i, a in enumerate(noise) for b in noise[:i])


# ---- whole methods ----

METHODS = [dict(method=name) for name in ("simclr", "vicreg", "byol", "swav", "ressl", "single")]


@pytest.mark.parametrize("settings", METHODS, ids=lambda s: s["method"])
def test_ten_steps_lower_the_objective(settings):
    images = io.load_dataset("shapes", subset=64).train_images
    c = config(**settings)
    encoder, objective, augmentation = baselines.method(c, SimpleNamespace(train_images=images))
    index = torch.arange(32)
    params = empssl.sample_patches(32, c.patches, (32, 32), augmentation, torch.Generator().manual_seed(0))
    x = empssl.extract_patches(images, index, params, 16)
    optimizer = torch.optim.SGD([*encoder.parameters(), *objective.parameters()], lr=0.02, momentum=0.9)
    encoder.cutmix, encoder.mixed, losses = 0.0, None, []
    if c.method == "ressl":
        objective.queue = objective.queue[:0].new_empty(64, 16).copy_(F.normalize(torch.randn(64, 16), dim=1))
    for _ in range(11):
        loss = objective(encoder.train()(x).unflatten(0, (c.patches, 32)), x, index)
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < losses[0]
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in objective.parameters() if p.requires_grad)


@pytest.mark.parametrize("arguments", [["single"], ["single", "--bank-start", "random", "--bank-update", "average"],
                                       ["simclr", "--negatives", "2", "--noise", "0.1"], ["byol"], ["swav"], ["ressl"]],
                         ids=lambda a: "-".join(a[::2]))
def test_a_stopped_run_goes_on_to_the_same_weights(arguments, in_tmp, short_runs, monkeypatch):
    run = ["--method", *arguments, "--dataset", "shapes", "--subset", "60", "--preset", "laptop", "--device", "cpu", "--batch", "20",
           "--hidden", "16", "--projector", "16", "--dim", "8", "--eval-patches", "1", "--epochs", "3"]
    baselines.main([*run, "--name", "whole"])
    with monkeypatch.context() as patch:
        stop_after(5, patch, signal.SIGTERM)
        with pytest.raises(SystemExit):
            baselines.main([*run, "--name", "stopped"])
    with pytest.raises(SystemExit):                                             # not as EMP-SSL's
        empssl.main(["--resume", "runs/stopped"])
    baselines.main(["--resume", "runs/stopped"])
    ours, theirs = (torch.load(f"runs/{name}/checkpoint.pt", weights_only=True) for name in ("stopped", "whole"))
    for part in ("encoder", "objective"):
        assert ours[part].keys() == theirs[part].keys()
        assert all(torch.equal(ours[part][k], v) if isinstance(v, torch.Tensor) else ours[part][k] == v
                   for k, v in theirs[part].items())


@pytest.mark.parametrize("arguments,sentence", [
    (["--method", "byol", "--patches", "4"], "sees 2 views"),
    (["--method", "single", "--augmentation", "ressl"], "sees one"),
    (["--method", "byol", "--augmentation", "light", "--crops", "published"], "leave it or --crops published out"),
    (["--method", "byol", "--augmentation", "noise"], "are SimCLR's"),
    (["--method", "swav", "--negatives", "2"], "are SimCLR's"),
    (["--warm-last-stage", "nothing.pt"], "There is no checkpoint nothing.pt"),
    (["--method", "empssl", "--patches", "1"], "at least 2"),
], ids=lambda a: a[0] if isinstance(a, list) else "")
def test_mistakes_are_sentences(arguments, sentence, in_tmp, capsys):
    with pytest.raises(SystemExit) as stop:
        baselines.main(["--dataset", "shapes", "--preset", "laptop", "--device", "cpu", *arguments])
    assert stop.value.code == 2 and sentence in capsys.readouterr().err


def test_a_last_stage_is_added_and_what_is_below_it_stays(in_tmp, short_runs, capsys):
    run = ["--method", "empssl", "--dataset", "shapes", "--subset", "60", "--preset", "laptop", "--device", "cpu", "--batch", "20",
           "--patches", "2", "--hidden", "16", "--projector", "16", "--dim", "8", "--eval-patches", "1"]
    baselines.main([*run, "--drop-last-stage", "--name", "short"])
    baselines.main([*run, "--warm-last-stage", "runs/short/encoder.pt", "--name", "warm"])
    short, warm = (torch.load(f"runs/{name}/encoder.pt", weights_only=True) for name in ("short", "warm"))
    assert short["weights"]["represent.0.weight"].shape == (16, 128) and warm["weights"]["represent.0.weight"].shape == (16, 384)
    below = [k for k in short["weights"] if k.startswith("backbone.") and "batches" not in k]
    assert len(below) == 15 and all(torch.equal(short["weights"][k], warm["weights"][k]) for k in below)
    fresh = empssl.new_encoder(empssl.Config(**{f.name: json.loads(Path("runs/warm/config.json").read_text())[f.name]
                                                for f in dataclasses.fields(empssl.Config)}), io.load_dataset("shapes", subset=60).train_images)
    above = [k for k, p in fresh.state_dict().items() if k not in below and k.endswith(".weight") and p.ndim > 1]
    assert len(above) > 8 and not any(torch.equal(fresh.state_dict()[k], warm["weights"][k]) for k in above)
    with pytest.raises(SystemExit) as stop:
        baselines.main([*run, "--warm-last-stage", "runs/warm/encoder.pt", "--name", "again"])
    assert stop.value.code == 2 and "is no encoder of --drop-last-stage" in capsys.readouterr().err


def test_the_yardstick_sees_the_labels(in_tmp):
    z = torch.tensor([[[2.0, 0, 0], [0, 1, 0]], [[0.0, 0, 0], [0, 0, 3]]])                  # two patches of two images
    exp = math.exp
    expected = -(2 - math.log(exp(2) + 2) + 1 - math.log(exp(1) + 2) - math.log(3) + 0 - math.log(exp(3) + 2)) / 4
    assert baselines.Supervised(torch.tensor([2, 0, 1]))(z, None, torch.tensor([1, 2])).item() == pytest.approx(expected)
    record = baselines.main(["--method", "supervised", "--dataset", "shapes", "--subset", "1000", "--preset", "laptop", "--device", "cpu",
                             "--epochs", "12", "--patches", "4", "--eval-patches", "4", "--eval-augmentation", "grid", "--name", "demo"])
    assert record["linear_top1"] > record["untrained_top1"] + 0.1
    assert torch.load("runs/demo/encoder.pt", weights_only=True)["architecture"]["dim"] == 10
    with pytest.raises(io.UsageError, match="labelled images"):
        baselines.method(config("supervised"), SimpleNamespace(train_images=torch.zeros(8, 3, 32, 32), train_labels=None))


def test_empssl_learns(in_tmp):
    record = baselines.main(["--method", "empssl", "--dataset", "shapes", "--subset", "2000", "--preset", "laptop", "--device", "cpu", "--patches", "20",
                             "--augmentation", "paper", "--batch", "50", "--eval-patches", "4", "--eval-augmentation", "grid", "--name", "demo"])
    assert record["linear_top1"] > record["untrained_top1"] + 0.05


@pytest.mark.parametrize("arguments", [["--augmentation", "paper", "--negatives", "1"], ["--augmentation", "noise", "--noise", "0.5"]], ids=["one-negative", "noise"])
def test_simclr_learns_from_one_negative_and_from_noise_alone(arguments, in_tmp):
    record = baselines.main(["--method", "simclr", "--dataset", "shapes", "--subset", "2000", "--preset", "laptop", "--device", "cpu", "--batch", "100",
                             "--epochs", "12", "--eval-patches", "4", "--eval-augmentation", "grid", "--name", "demo", *arguments])
    assert record["linear_top1"] > record["untrained_top1"] + 0.02
