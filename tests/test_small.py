"""The encoder for CPUs: its layers, the weights that it starts from, and whitening."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from empssl_support.small import Residual, small_backbone, whiten


@pytest.mark.parametrize("drop_last_stage,expected", [(False, 256), (True, 64)])
def test_patches_of_any_side_become_one_row_each(drop_last_stage, expected):
    backbone, width = small_backbone(drop_last_stage)
    assert width == expected
    for s in (8, 16, 32):
        assert backbone(torch.randn(2, 3, s, s)).shape == (2, width)


def test_the_names_and_shapes_of_the_weights_are_those_of_saved_encoders():
    backbone, _ = small_backbone()
    weights = {}
    for name, parameter in backbone.named_parameters():
        if parameter.ndim > 1:
            weights[name] = "x".join(str(side) for side in parameter.shape)
    assert weights == {
        "0.weight": "64x3x3x3",
        "3.0.weight": "64x64x3x3",
        "4.weight": "256x64x3x3",
        "7.0.weight": "256x256x3x3",
        "8.0.weight": "256x256x3x3",
    }
    # What has a bias is a BatchNorm, and one follows each convolution.
    biases = [name for name in backbone.state_dict() if name.endswith("bias")]
    norms = ["1", "3.1", "5", "7.1", "8.1"]
    assert biases == [f"{norm}.bias" for norm in norms]
    assert all(f"{norm}.running_mean" in backbone.state_dict() for norm in norms)


def test_a_few_literal_weights():
    """A seed stands for the same first weights as long as layers are made in the same order."""
    torch.manual_seed(0)
    backbone, _ = small_backbone()
    first = backbone[0].weight[0, 0, 0].tolist()
    assert first == pytest.approx([-0.0014, 0.1032, -0.1584], abs=1e-4)
    widening = backbone[4].weight[0, 0, 0].tolist()
    assert widening == pytest.approx([-0.0060, 0.0095, 0.0177], abs=1e-4)
    last = backbone[8][0].weight[-1, -1, -1].tolist()
    assert last == pytest.approx([0.0081, 0.0143, 0.0187], abs=1e-4)


def test_dropping_the_last_stage_leaves_the_first_as_it_is():
    torch.manual_seed(0)
    short, less = small_backbone(drop_last_stage=True)
    torch.manual_seed(0)
    full, whole = small_backbone()
    ours = dict(short.named_parameters())
    theirs = dict(full.named_parameters())
    assert set(ours) < set(theirs)
    for name, weight in ours.items():
        assert torch.equal(weight, theirs[name]), name
    x = torch.randn(2, 3, 16, 16)
    assert less == 64
    assert short(x).shape == (2, less)
    assert whole == 256
    assert full(x).shape == (2, whole)


def test_the_stages_see_eight_and_four_places():
    backbone, _ = small_backbone()
    x = torch.randn(2, 3, 16, 16)
    assert backbone[:4](x).shape == (2, 64, 8, 8)
    last = backbone[:9](x)
    assert last.shape == (2, 256, 4, 4)
    torch.testing.assert_close(backbone(x), last.mean((2, 3)))


def test_a_residual_block_adds_to_what_came_in():
    block = Residual(nn.Conv2d(3, 3, 1), nn.ReLU())
    x = torch.randn(2, 3, 4, 4)
    torch.testing.assert_close(block(x), x + F.relu(block[0](x)))


# ---- whitening ----


def smooth_images():
    """Channels and neighbours are strongly correlated: `(300, 3, 32, 32)` uint8."""
    grey = torch.rand(300, 1, 8, 8) * torch.rand(300, 3, 1, 1)
    smooth = F.interpolate(grey, size=32, mode="bilinear")
    noisy = smooth + 0.1 * torch.rand(300, 3, 32, 32)
    return (255 * noisy.clamp(0, 1)).to(torch.uint8)


def test_whitening_starts_the_first_convolution_at_unit_variance_without_correlation():
    images = smooth_images()
    first = nn.Conv2d(3, 60, 3, stride=2, padding=1, bias=False)
    whiten(first, images)
    y = F.conv2d(images / 127.5 - 1, first.weight, stride=3)
    y = y.transpose(0, 1).flatten(1)  # (60, places)
    covariance = y[:27].cov()
    # The constant holds weak components back.
    strong = covariance.diagonal() > 0.5
    assert strong.sum() >= 5
    identity = torch.eye(int(strong.sum()))
    torch.testing.assert_close(covariance[strong][:, strong], identity, atol=0.3, rtol=0)
    between = covariance - covariance.diagonal().diag()
    assert between.abs().max() < 0.05
    assert torch.equal(first.weight[27:54], -first.weight[:27])  # both signs
    assert 0.3 < y[54:].var(1).mean() < 1.1


def test_whitening_is_a_matter_of_its_generator_and_asks_for_no_gradient():
    images = smooth_images()
    weights = []
    for seed in (0, 0, 1):
        first = nn.Conv2d(3, 60, 3, bias=False)
        before = torch.get_rng_state()
        whiten(first, images, torch.Generator().manual_seed(seed))
        assert torch.equal(torch.get_rng_state(), before)
        assert first.weight.requires_grad
        assert first.weight.grad_fn is None
        weights.append(first.weight.detach())
    assert torch.equal(weights[0], weights[1])
    assert torch.equal(weights[0][:54], weights[2][:54])
    assert not torch.equal(weights[0][54:], weights[2][54:])
