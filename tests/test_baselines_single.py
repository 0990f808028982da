"""Single-branch instance discrimination: its bank, its two updates, CutMix; and the yardstick."""

import math

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

import empssl
from study import baselines
from study.baselines.single_branch import SingleBranch, cut_mix, sqrt_kl, untrained_features
from study.baselines.supervised import Supervised

HALF_MIXED = (torch.tensor([1, 0]), 0.6)  # partners of two images, and the share that stayed


def unit(*angles):
    """Unit vectors in the plane, at these angles in degrees."""
    radians = torch.tensor(angles, dtype=torch.float64).deg2rad()
    return torch.stack([radians.cos(), radians.sin()], 1)


def with_bank(*angles, others=10, **settings):
    """An objective whose bank is unit vectors at these angles."""
    single = with_random_bank(len(angles), 2, others=others, **settings)
    single.bank.copy_(unit(*angles))
    return single


def with_random_bank(N=6, d=3, start=None, **settings):
    given = {"temperature": 0.5, "others": 2, "distillation": 0.0} | settings
    return SingleBranch(baselines.Config(dim=d, **given), N, start).double()


def call(single, z, *index):
    """The loss of one view `(b, d)` of the images with these numbers."""
    loss, _ = single(z.unsqueeze(0), None, torch.tensor(index))
    return loss


def random_unit(*shape):
    return F.normalize(torch.randn(*shape, dtype=torch.float64), dim=-1)


# ---- the loss ----


def test_single_is_cross_entropy_over_its_own_row_the_batchs_and_the_others():
    single = with_bank(0, 90, 180, 270)

    def e(angle, row):
        return math.exp(math.cos(math.radians(angle - row)) / 0.5)

    loss = 0.0
    for angle, own in ((30, 0), (80, 180)):
        loss -= math.log(e(angle, own) / sum(e(angle, row) for row in (0, 90, 180, 270))) / 2
    assert call(single, unit(30, 80), 0, 2).item() == pytest.approx(loss)
    alone = with_bank(0, 90, 180, 270, others=0)
    assert call(alone, unit(30), 0).item() == pytest.approx(0)  # nothing to be told from


def test_mixed_images_belong_to_both_rows():
    single = with_bank(0, 90, others=0)
    single.mixed = (torch.tensor([1, 0]), 0.75)
    log_p = torch.log_softmax(unit(30, 80) @ unit(0, 90).T / 0.5, 1)
    t = torch.tensor([[0.75, 0.25], [0.25, 0.75]], dtype=torch.float64)
    expected = -(t * log_p).sum() / 2
    assert call(single, unit(30, 80), 0, 1).item() == pytest.approx(expected.item())
    pulled = 0.5 * unit(0, 90) + 0.5 * (t - log_p.exp()).T @ unit(30, 80)
    assert torch.allclose(single.bank, F.normalize(pulled, dim=1))


def test_singles_distillation_is_of_the_cosines_without_temperature():
    z = unit(30, 80)
    plain = call(with_bank(0, 90, 180, 270), z, 0, 2)
    distilled = call(with_bank(0, 90, 180, 270, distillation=3.0), z, 0, 2)
    expected = 3 * sqrt_kl(z @ unit(0, 90, 180, 270).T)
    assert (distilled - plain).item() == pytest.approx(expected.item())


def test_sqrt_kl():
    uniform = torch.full((3, 7), 0.4, dtype=torch.float64)
    assert sqrt_kl(uniform).item() == pytest.approx(0)  # it is its own square root
    # p = (4, 1) / 5, and so u = (2, 1) / 3.
    cos = torch.tensor([[math.log(4.0), 0.0]], dtype=torch.float64, requires_grad=True)
    value = sqrt_kl(cos)
    assert value.item() == pytest.approx(0.8 * math.log(0.8 * 1.5) + 0.2 * math.log(0.2 * 3))
    value.backward()
    p, u = torch.tensor([0.8, 0.2]), torch.tensor([2 / 3, 1 / 3])
    inner = (p / u).log() + 1
    # u is a constant: no gradient goes through it.
    assert torch.allclose(cos.grad.float(), p * (inner - (p * inner).sum()))


# ---- the bank ----


def test_others_are_rows_outside_the_batch_and_change():
    single = with_random_bank(N=50, others=5)
    touched = []
    for _ in range(2):
        before = single.bank.clone()
        call(single, torch.randn(2, 3, dtype=torch.float64), 3, 7)
        rows = (single.bank != before).any(1).nonzero().flatten().tolist()
        assert {3, 7} < set(rows) and len(rows) == 7
        assert torch.allclose(single.bank.norm(dim=1), torch.ones(50, dtype=torch.float64))
        touched.append(rows)
    assert touched[0] != touched[1]


def test_the_corrected_update_is_a_step_against_autograds_gradient():
    """Without CutMix, a step of (1 - m) tau b; of the batch's own rows only m is kept before it."""
    single = with_random_bank(others=2, bank_momentum=0.7)
    z, index = random_unit(3, 3), torch.tensor([4, 0, 2])
    before = single.bank.clone()
    call(single, z, *index)
    moved = (single.bank != before).any(1).nonzero().flatten()
    rows = torch.cat([index, moved[~torch.isin(moved, index)]])
    assert len(rows) == 5
    w = before[rows].clone().requires_grad_()
    F.cross_entropy(z @ w.T / 0.5, torch.arange(3)).backward()
    kept = torch.tensor([0.7] * 3 + [1.0] * 2, dtype=torch.float64).view(-1, 1)
    expected = kept * w.detach() - 0.3 * 0.5 * 3 * w.grad
    assert torch.allclose(single.bank[rows], F.normalize(expected, dim=1))


@pytest.mark.parametrize("mixed", [None, HALF_MIXED], ids=["plain", "mixed"])
def test_the_moving_average_moves_the_batchs_rows_alone(mixed):
    """As released: with CutMix too, an image moves its own row and no other."""
    single = with_random_bank(bank_update="average", bank_momentum=0.7)
    single.mixed = mixed
    z, before = random_unit(2, 3), single.bank.clone()
    call(single, z, 1, 5)
    assert torch.allclose(single.bank[[1, 5]], F.normalize(0.7 * before[[1, 5]] + 0.3 * z, dim=1))
    assert torch.equal(single.bank[[0, 2, 3, 4]], before[[0, 2, 3, 4]])


def test_a_bank_that_begins_as_features():
    features = torch.randn(5, 3, dtype=torch.float64)
    one = torch.ones(1, 3, dtype=torch.float64)
    single = with_random_bank(N=5, bank_update="average", start=lambda: features)
    call(single, one, 2)
    assert torch.allclose(single.bank[[0, 1, 3, 4]], F.normalize(features, dim=1)[[0, 1, 3, 4]])

    def begin_again():
        pytest.fail("it began again")

    single.start = begin_again
    call(single, one, 2)
    resumed = with_random_bank(N=5, start=begin_again)
    resumed.load_state_dict(single.state_dict())
    call(resumed, one, 2)


# ---- the untrained network's features ----


class MeanColour(nn.Module):
    """An encoder that sees each image's mean colour."""

    def __init__(self, last_layer):
        super().__init__()
        self.last_layer = last_layer

    def embedding(self, x):
        return self.last_layer(x.mean((2, 3)))


def features_of(images, last_layer):
    """In batches of 4."""
    config = baselines.Config(batch=4, patch_size=16, device="cpu")
    return untrained_features(MeanColour(last_layer), images, config, empssl.Augmentation.none())


def test_the_untrained_networks_features_are_in_the_images_order():
    """10 images in batches of 4 do not divide."""
    colours = (torch.arange(30, dtype=torch.uint8) * 8).view(10, 3, 1, 1)
    images = colours.expand(10, 3, 32, 32).contiguous()
    features = features_of(images, nn.Identity())
    assert torch.allclose(features, images[:, :, 0, 0] / 127.5 - 1, atol=1e-5)


def test_the_untrained_networks_batch_norm_uses_the_batch():
    """Else its features are those of an initialisation that has seen no data."""
    images = torch.randint(256, (12, 3, 32, 32), dtype=torch.uint8)
    features = features_of(images, nn.BatchNorm1d(3))
    assert features.mean(0).abs().max() < 1e-4 and features.std(0, unbiased=False).min() > 0.5


def test_the_untrained_networks_batches_are_drawn_from_all_classes():
    """A folder's images stand class by class; a batch of one class would lose what they share."""
    images = torch.zeros(40, 3, 32, 32, dtype=torch.uint8)
    images[20:] = 200
    features = features_of(images, nn.BatchNorm1d(3))
    assert (features[20:].mean(0) - features[:20].mean(0)).min() > 1


# ---- CutMix ----


def test_cut_mix_pastes_what_it_says():
    x = torch.arange(4.0).view(4, 1, 1, 1).expand(4, 3, 16, 16)
    shares = []
    for seed in range(200):
        mixed, (partner, share) = cut_mix(x, 0.5, torch.Generator().manual_seed(seed))
        kept = (mixed == x).float().mean((1, 2, 3))
        has_another = partner != torch.arange(4)
        assert torch.allclose(kept[has_another], torch.tensor(share))
        for j in range(4):
            assert set(mixed[j].unique().tolist()) <= {float(j), float(partner[j])}
        shares.append(share)
    # The larger part of Beta(1/2, 1/2) stays: a mean of 1/2 + 1/pi where no box leaves the image,
    # and more where it does.
    assert min(shares) >= 0.49 and 0.82 < sum(shares) / 200 < 0.92
    assert len(set(shares)) > 30
    assert x.unique().tolist() == [0, 1, 2, 3] and (x[1] == 1).all()  # what came in is as it was


def test_single_hears_which_images_were_mixed():
    single = with_random_bank(N=8, cutmix=1.0)
    x = torch.arange(8.0).view(8, 1, 1, 1).expand(8, 3, 16, 16)
    mixed = single.prepare(x)
    partner, share = single.mixed
    assert partner.sort().values.tolist() == list(range(8)) and 0.4 < share < 1
    expected, _ = cut_mix(x, 1.0, empssl.generator_of(0, "cutmix", 0))
    assert torch.equal(mixed, expected)
    t = single.targets(8, 10)
    assert torch.allclose(t.sum(1), torch.ones(8))
    for j in range(8):
        assert t[j, j].item() == pytest.approx(1.0 if partner[j] == j else share)


def test_without_cutmix_nothing_is_mixed():
    single = with_random_bank(cutmix=0.0)
    x = torch.randn(6, 3, 16, 16)
    assert torch.equal(single.prepare(x), x) and single.mixed is None


# ---- the yardstick ----


def test_the_yardstick_sees_the_labels():
    # Two patches of images 1 and 2, whose labels are 0 and 1.
    z = torch.tensor([[[2.0, 0, 0], [0, 1, 0]], [[0.0, 0, 0], [0, 0, 3]]])
    e = math.exp
    log_p = [2 - math.log(e(2) + 2), 1 - math.log(e(1) + 2), -math.log(3), -math.log(e(3) + 2)]
    loss, _ = Supervised(torch.tensor([2, 0, 1]))(z, None, torch.tensor([1, 2]))
    assert loss.item() == pytest.approx(-sum(log_p) / 4)
