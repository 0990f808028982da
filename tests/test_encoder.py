"""The network: backbones, representation, projector, and how a run's encoder begins."""

import pytest
import torch

import empssl
from empssl import Augmentation, Config, Encoder, embed, extract_patches, sample_patches
from empssl_support.files import save_encoder
from recipes import small_encoder

SMALL = {"device": "cpu", "backbone": "small", "patch_size": 16}
SMALL |= {"hidden": 8, "projector": 8, "dim": 4, "augmentation": "light"}


def some_images(N=20):
    return torch.randint(0, 256, (N, 3, 32, 32), dtype=torch.uint8)


@pytest.mark.parametrize("backbone,s,width", [("resnet18", 32, 512), ("small", 16, 256)])
def test_encoder_shapes_and_unit_rows(backbone, s, width):
    encoder = Encoder(backbone, s, hidden=24, projector=24, dim=6)
    x = torch.randn(4, 3, s, s)
    assert encoder.backbone(x).shape == (4, width)
    assert encoder.representation(x).shape == (4, 24) and (encoder.representation(x) >= 0).all()
    torch.testing.assert_close(encoder(x).norm(dim=1), torch.ones(4))
    assert encoder(x).shape == (4, 6)


def test_the_papers_network():
    encoder = Encoder()
    assert encoder.backbone(torch.randn(2, 3, 32, 32)).shape == (2, 512)
    assert encoder.backbone.layer4[1].conv2.weight.shape == (512, 512, 3, 3)
    stem = encoder.backbone.conv1
    assert stem.weight.shape == (64, 3, 3, 3) and stem.stride == (1, 1)
    parts = (encoder.represent, encoder.project)
    matrices = [tuple(p.shape) for part in parts for p in part.parameters() if p.ndim == 2]
    assert matrices == [(4096, 512), (4096, 4096), (1024, 4096)]
    assert Encoder(patch_size=224).backbone.conv1.weight.shape == (64, 3, 7, 7)
    with pytest.raises(ValueError, match="resnet18"):
        Encoder("vgg")


@pytest.mark.parametrize("backbone,whole,less", [("small", 256, 64), ("resnet18", 512, 256)])
def test_dropping_the_last_stage_leaves_the_others_as_they_are(backbone, whole, less):
    widths = {"hidden": 8, "projector": 8, "dim": 4}
    torch.manual_seed(0)
    short = Encoder(backbone, 16, **widths, drop_last_stage=True)
    torch.manual_seed(0)
    full = Encoder(backbone, 16, **widths)
    x = torch.randn(2, 3, 16, 16)
    assert short.backbone(x).shape == (2, less) and full.backbone(x).shape == (2, whole)
    theirs = full.backbone.state_dict()
    ours = short.backbone.state_dict()
    assert ours.keys() < theirs.keys()
    assert all(theirs[name].shape == value.shape for name, value in ours.items())


def test_a_new_encoder_is_a_matter_of_its_seed_and_whitened():
    images = some_images()

    def weights(seed):
        encoder = empssl.new_encoder(Config(**SMALL, seed=seed), images)
        return [p.detach().clone() for p in encoder.parameters()]

    a, b, c = weights(0), weights(0), weights(1)
    assert all(torch.equal(p, q) for p, q in zip(a, b, strict=True))
    assert not any(torch.equal(p, q) for p, q in zip(a, c, strict=True) if p.ndim > 1)
    assert torch.equal(a[0][27:54], -a[0][:27])


def test_a_new_encoder_of_large_images_is_finite():
    images = torch.randint(0, 256, (3, 3, 1500, 1500), dtype=torch.uint8)
    encoder = empssl.new_encoder(Config(**SMALL), images)
    assert all(p.isfinite().all() for p in encoder.parameters())


def test_an_untrained_encoder_has_the_statistics_of_training_patches():
    """The first BatchNorm's, of grey images of one brightness each, jittered."""
    config = Config(**SMALL)
    images = torch.full((64, 3, 32, 32), 100, dtype=torch.uint8)
    images[::2] = 101  # a little difference, so that the whitening has something to do
    convolution, norm = empssl.untrained_encoder(config, images).backbone[:2]
    augmentation = empssl.training_augmentation(config, (32, 32))
    params = sample_patches(64, 100, (32, 32), augmentation)
    x = extract_patches(images, torch.arange(64), params, 16)
    with torch.no_grad():
        y = convolution(x)
    wide = y.var((0, 2, 3)) > 0.01 * y.var((0, 2, 3)).max()
    mean, variance = y.mean((0, 2, 3))[wide], y.var((0, 2, 3))[wide]
    torch.testing.assert_close(norm.running_mean[wide], mean, rtol=0.2, atol=0.1 * y.std().item())
    torch.testing.assert_close(norm.running_var[wide], variance, rtol=0.2, atol=0)


def test_the_callers_chance_is_left_alone(monkeypatch):
    seeded = []
    monkeypatch.setattr(torch.cuda, "manual_seed_all", seeded.append)
    encoder, images = small_encoder(), some_images(4)
    before = torch.get_rng_state()
    embed(encoder, images, patches=4)
    embed(encoder, images, 2, Augmentation())
    empssl.new_encoder(Config(**SMALL), images)
    assert torch.equal(torch.get_rng_state(), before)
    assert not seeded


def test_a_saved_encoder_is_loaded_with_its_weights_and_statistics(tmp_path):
    encoder, images = small_encoder(), some_images()
    encoder(torch.randn(64, 3, 16, 16))  # BatchNorm statistics of some kind
    save_encoder(tmp_path / "encoder.pt", encoder)
    loaded = empssl.load(tmp_path / "encoder.pt")
    assert not loaded.training and loaded.architecture == encoder.architecture
    assert torch.equal(embed(loaded, images), embed(encoder, images))


def test_presets_say_how_patches_are_drawn():
    paper = empssl.training_augmentation(Config(augmentation="paper"), (32, 32))
    colours = {"jitter": 0.8, "brightness": 0.4, "contrast": 0.4, "saturation": 0.4, "hue": 0.2}
    rest = {"grey": 0.2, "blur": 0.1, "sigma": (0.1, 2.0), "solarize": 0.1}
    assert paper == Augmentation((0.25, 0.25), (1, 1), 0.5, **colours, **rest)
    light = empssl.training_augmentation(Config(augmentation="light"), (32, 32))
    less = {"saturation": 0.2, "hue": 0.1, "blur": 0, "solarize": 0}
    assert light == Augmentation((0.25, 0.25), (1, 1), 0.5, **colours | rest | less)
    large = empssl.training_augmentation(Config(augmentation="paper"), (224, 224))
    assert large.ratio == (3 / 4, 4 / 3)
