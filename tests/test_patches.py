"""Patches: how their numbers are drawn, and each operation against torchvision's functional."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torchvision.transforms.v2 import functional as V

from empssl import Augmentation, extract_patches, extract_patches_ref, sample_patches
from empssl_support.cli import UsageError
from empssl_support.pixels import COLUMNS, ORDERS, K

NEUTRAL = dict(
    top=0,
    left=0,
    height=8,
    width=8,
    flip=0,
    brightness=1,
    contrast=1,
    saturation=1,
    hue=0,
    order=0,
    grey=0,
    sigma=0,
    solarize=0,
)


def oracle(image, p, s):
    """One patch of one image `(3, H, W)` uint8 by torchvision, in float64; p: numbers by column."""
    x = image.double() / 255
    x = V.resized_crop(
        x, int(p["top"]), int(p["left"]), int(p["height"]), int(p["width"]), [s, s], antialias=True
    )
    if p["flip"]:
        x = V.horizontal_flip(x)
    jitter = [
        lambda x: V.adjust_brightness(x, p["brightness"]),
        lambda x: V.adjust_contrast(x, p["contrast"]),
        lambda x: V.adjust_saturation(x, p["saturation"]),
        lambda x: V.adjust_hue(x, p["hue"]),
    ]
    for operation in list(itertools.permutations(range(4)))[int(p["order"])]:
        x = jitter[operation](x)
    if p["grey"]:
        x = V.rgb_to_grayscale(x, 3)
    if p["sigma"]:
        x = V.gaussian_blur(x, [13, 13], [p["sigma"]] * 2)
    if p["solarize"]:
        x = V.solarize(x, 128 / 255)
    return x * 2 - 1


def assert_matches_oracle(images, index, params, s):
    """Within 1e-5 of torchvision, but for values that rounding solarizes or not."""
    ours = extract_patches(images, index, params, s)
    n, b, _ = params.shape
    assert ours.shape == (n * b, 3, s, s) and ours.dtype == torch.float32
    assert ours.is_contiguous(memory_format=torch.channels_last)
    for row in range(n * b):
        p = dict(zip(COLUMNS, params.flatten(0, 1)[row].double().tolist()))
        image = images[index[row % b]]
        expected = oracle(image, p, s)
        near = (
            ((oracle(image, p | {"solarize": 0}, s) + 1) / 2 - 128 / 255).abs() < 1e-5
            if p["solarize"]
            else False
        )
        wrong = ((ours[row] - expected).abs() > 2e-5) & ~torch.as_tensor(near)
        assert not wrong.any(), f"patch {row}, {p}: off by {(ours[row] - expected).abs().max()}"


def one(**kwargs):
    return torch.tensor([[[float((NEUTRAL | kwargs)[name]) for name in COLUMNS]]])


@st.composite
def patch(draw, H, W):
    height, width = draw(st.integers(1, H)), draw(st.integers(1, W))
    factor = st.one_of(st.just(1.0), st.floats(0, 2, width=32))
    return [
        draw(st.integers(0, H - height)),
        draw(st.integers(0, W - width)),
        height,
        width,
        draw(st.booleans()),
        draw(factor),
        draw(factor),
        draw(factor),
        draw(st.one_of(st.just(0.0), st.floats(-0.5, 0.5, width=32))),
        draw(st.integers(0, 23)),
        draw(st.booleans()),
        draw(st.one_of(st.just(0.0), st.floats(0.125, 2.0, width=32))),
        draw(st.booleans()),
    ]


@settings(max_examples=60)
@given(
    data=st.data(),
    H=st.integers(1, 40),
    W=st.integers(1, 40),
    N=st.integers(1, 3),
    n=st.integers(1, 3),
    b=st.integers(1, 3),
    s=st.integers(7, 40),
    seed=st.integers(0, 999),
)
def test_all_together_against_torchvision(data, H, W, N, n, b, s, seed):
    images = torch.randint(
        0, 256, (N, 3, H, W), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed)
    )
    index = torch.tensor([data.draw(st.integers(0, N - 1)) for _ in range(b)])
    params = torch.tensor(
        [[data.draw(patch(H, W)) for _ in range(b)] for _ in range(n)], dtype=torch.float32
    )
    assert_matches_oracle(images, index, params, s)


@pytest.mark.parametrize(
    "alone",
    [
        dict(flip=1),
        dict(brightness=0.6),
        dict(brightness=1.4),
        dict(contrast=0.6),
        dict(contrast=1.4),
        dict(saturation=0),
        dict(saturation=1.4),
        dict(hue=0.2),
        dict(hue=-0.2),
        dict(hue=0.5),
        dict(grey=1),
        dict(sigma=0.5),
        dict(sigma=2.0),
        dict(solarize=1),
        dict(top=3, left=5),
        dict(height=3, width=9),
        dict(height=13, width=11),
    ],
    ids=str,
)
def test_each_alone_against_torchvision(alone):
    images = torch.randint(0, 256, (1, 3, 13, 14), dtype=torch.uint8)
    params = one(**alone)
    for s in (8, 16, 7):
        assert_matches_oracle(images, torch.tensor([0]), params, s)
        if not {"top", "height"} & alone.keys():
            plain = extract_patches(images, torch.tensor([0]), one(), s)
            changed = (extract_patches(images, torch.tensor([0]), params, s) - plain).abs().max()
            assert changed > 0.05, "the parameter does nothing"


@pytest.mark.parametrize("order", range(24))
def test_every_order_of_the_jitter(order):
    images = torch.randint(0, 256, (1, 3, 8, 8), dtype=torch.uint8)
    params = one(order=order, brightness=1.4, contrast=0.6, saturation=1.4, hue=0.2)
    assert_matches_oracle(images, torch.tensor([0]), params, 8)


@given(value=st.integers(0, 255), hue=st.floats(-0.5, 0.5, width=32))
def test_grey_and_saturated_corners_of_the_colour_cube(value, hue):
    corners = torch.tensor(
        list(itertools.product((0, value, 255), repeat=3)), dtype=torch.uint8
    )  # (27, 3)
    images = corners.T.reshape(1, 3, 3, 9)
    assert_matches_oracle(images, torch.tensor([0]), one(height=3, width=9, hue=hue), 9)


def test_each_patch_is_cut_from_its_own_image():
    images = torch.arange(5, dtype=torch.uint8).view(5, 1, 1, 1).expand(5, 3, 8, 8) * 10
    x = extract_patches(images, torch.tensor([4, 1, 1]), one().expand(2, 3, K), 8)
    values = ((x[:, 0, 0, 0] + 1) / 2 * 255).round().int().tolist()
    assert values == [40, 10, 10, 40, 10, 10]  # patch-major: row i*b + j is patch i of image j


@given(H=st.integers(2, 33), W=st.integers(2, 33), data=st.data())
def test_all_off_is_the_plain_crop_exactly(H, W, data):
    s = data.draw(st.integers(1, min(H, W)))
    top, left = data.draw(st.integers(0, H - s)), data.draw(st.integers(0, W - s))
    images = torch.randint(0, 256, (2, 3, H, W), dtype=torch.uint8)
    x = extract_patches(images, torch.tensor([1]), one(top=top, left=left, height=s, width=s), s)
    assert torch.equal(x[0], images[1, :, top : top + s, left : left + s].float() / 255 * 2 - 1)


def test_augmentation_none_only_crops():
    images = torch.randint(0, 256, (3, 3, 32, 32), dtype=torch.uint8)
    params = sample_patches(3, 5, (32, 32), Augmentation.none())
    x = extract_patches(images, torch.arange(3), params, 16).view(5, 3, 3, 16, 16)
    for i, j in itertools.product(range(5), range(3)):
        top, left = params[i, j, :2].int().tolist()
        assert torch.equal(
            x[i, j], images[j, :, top : top + 16, left : left + 16].float() / 255 * 2 - 1
        )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_dtypes(dtype):
    images = torch.randint(0, 256, (4, 3, 32, 32), dtype=torch.uint8)
    params = sample_patches(4, 3, (32, 32), Augmentation(solarize=0.0))
    x = extract_patches(images, torch.arange(4), params, 32, dtype)
    assert x.dtype == dtype
    torch.testing.assert_close(
        x.double(),
        extract_patches_ref(images, torch.arange(4), params, 32, torch.float64),
        atol={torch.bfloat16: 4e-3, torch.float16: 5e-4, torch.float64: 0}[dtype] + 1e-6,
        rtol=0,
    )


def test_chunks_do_not_show():
    """Three hundred patches run through three chunks of 128; each alone runs through one."""
    images = torch.randint(0, 256, (3, 3, 32, 32), dtype=torch.uint8)
    params = sample_patches(3, 100, (32, 32), Augmentation())
    whole = extract_patches_ref(images, torch.arange(3), params, 64).view(100, 3, 3, 64, 64)
    for i in (0, 42, 43, 85, 99):
        torch.testing.assert_close(
            whole[i],
            extract_patches_ref(images, torch.arange(3), params[i : i + 1], 64),
            atol=1e-6,
            rtol=1e-6,
        )


def test_no_patches():
    images = torch.zeros(2, 3, 8, 8, dtype=torch.uint8)
    assert extract_patches(images, torch.arange(2), torch.zeros(0, 2, K), 8).shape == (0, 3, 8, 8)


@pytest.mark.parametrize(
    "change,sentence",
    [
        (dict(images=torch.zeros(1, 3, 8, 8)), "uint8"),
        (dict(images=torch.zeros(3, 8, 8, dtype=torch.uint8)), "uint8"),
        (dict(params=torch.zeros(1, 1, K - 1)), "params"),
        (dict(index=torch.tensor([0, 0])), "index"),
        (dict(index=torch.tensor([1])), "index"),
        (dict(index=torch.tensor([-1])), "index"),
        (dict(params=one(top=1)), "crop"),
        (dict(params=one(left=-1)), "crop"),
        (dict(params=one(height=0)), "crop"),
        (dict(params=one(width=math.nan)), "crop"),
        (dict(s=0), "at least 1"),
    ],
)
def test_wrong_arguments(change, sentence):
    arguments = dict(
        images=torch.zeros(1, 3, 8, 8, dtype=torch.uint8),
        index=torch.tensor([0]),
        params=one(),
        s=8,
    )
    extract_patches(**arguments)
    with pytest.raises(ValueError, match=sentence):
        extract_patches(**(arguments | change))


# ---- sampling ----


def columns(augmentation, b=300, n=100, image_size=(32, 32), seed=0):
    params = sample_patches(b, n, image_size, augmentation, torch.Generator().manual_seed(seed))
    assert params.shape == (n, b, K) and params.dtype == torch.float32
    return {name: params[..., i].flatten() for i, name in enumerate(COLUMNS)}


def assert_share(mask, p):
    """A Bernoulli(p) sample's share within five standard errors."""
    share, n = mask.double().mean().item(), mask.numel()
    assert abs(share - p) <= 5 * math.sqrt(p * (1 - p) / n) + 1e-12, (share, p)


def assert_uniform(x, lo, hi):
    x = ((x.double() - lo) / (hi - lo)).sort().values
    assert x[0] >= 0 and x[-1] <= 1
    gap = (
        (x - torch.linspace(0, 1, len(x), dtype=torch.float64)).abs().max().item()
    )  # Kolmogorov-Smirnov
    assert gap < 2 / math.sqrt(len(x)), gap


def test_the_papers_distribution():
    c = columns(Augmentation())
    assert (c["height"] == 16).all() and (c["width"] == 16).all()
    for place in (c["top"], c["left"]):
        counts = place.long().bincount(minlength=17)
        assert len(counts) == 17  # 0..16, each as likely as the next
        for value in range(17):
            assert_share(place == value, 1 / 17)
    assert abs(torch.corrcoef(torch.stack([c["top"], c["left"]]))[0, 1]) < 0.03
    for name, p in dict(flip=0.5, grey=0.2, solarize=0.1).items():
        assert set(c[name].unique().tolist()) == {0.0, 1.0}
        assert_share(c[name] == 1, p)
    assert_share(c["sigma"] > 0, 0.1)
    assert_uniform(c["sigma"][c["sigma"] > 0], 0.1, 2.0)
    jittered = c["hue"] != 0
    assert_share(jittered, 0.8)
    for name in ("brightness", "contrast", "saturation"):
        assert (c[name][~jittered] == 1).all()
        assert_uniform(c[name][jittered], 0.6, 1.4)
    assert_uniform(c["hue"][jittered], -0.2, 0.2)
    for code in range(24):
        assert_share(c["order"][jittered] == code, 1 / 24)
    names = ("flip", "brightness", "contrast", "saturation", "grey", "solarize")
    correlation = torch.corrcoef(torch.stack([c[name][jittered] for name in names])) - torch.eye(
        len(names)
    )
    assert correlation.abs().max() < 0.04  # each is drawn on its own


def test_area_and_ratio():
    c = columns(Augmentation(area=(0.2, 0.6), ratio=(0.5, 2.0)), image_size=(200, 300))
    area, ratio = c["height"] * c["width"] / (200 * 300), c["width"] / c["height"]
    fits = (c["width"] < 300) & (c["height"] < 200)
    assert_uniform(ratio.log()[fits & (area < 0.32)], math.log(0.49), math.log(2.04))
    assert area.min() > 0.19 and area.max() < 0.61
    assert_uniform(area[(area > 0.2) & (area < 0.32)], 0.2, 0.32)  # of area, not of side
    assert (c["top"] + c["height"] <= 200).all() and (c["left"] + c["width"] <= 300).all()


@given(H=st.integers(1, 60), W=st.integers(1, 60), lo=st.floats(0.001, 1), seed=st.integers(0, 99))
def test_crops_stay_inside(H, W, lo, seed):
    c = columns(
        Augmentation(area=(lo, 1.0), ratio=(0.25, 4.0)), b=20, n=3, image_size=(H, W), seed=seed
    )
    assert (
        (c["height"] >= 1).all()
        and (c["width"] >= 1).all()
        and (c["top"] >= 0).all()
        and (c["left"] >= 0).all()
    )
    assert (c["top"] + c["height"] <= H).all() and (c["left"] + c["width"] <= W).all()


def test_everything_can_be_off():
    c = columns(Augmentation.none())
    for name, neutral in NEUTRAL.items():
        if name not in ("top", "left", "height", "width"):
            assert (c[name] == neutral).all(), name


def test_a_list_has_an_augmentation_for_each_patch():
    """One of another length would have the loss compare patches of different images."""
    still = Augmentation.none()
    params = sample_patches(5, 2, (32, 32), [Augmentation.none(flip=1.0), still])
    assert params[..., COLUMNS.index("flip")].tolist() == [[1.0] * 5, [0.0] * 5]
    with pytest.raises(ValueError, match="there are 2 augmentations for 4 patches"):
        sample_patches(5, 4, (32, 32), [still, still])


def test_a_seed_gives_the_same_patches():
    draw = lambda seed: sample_patches(
        4, 3, (32, 32), Augmentation(), torch.Generator().manual_seed(seed)
    )
    assert torch.equal(draw(1), draw(1)) and not torch.equal(draw(1), draw(2))


def test_a_crop_larger_than_the_image_is_refused():
    with pytest.raises(UsageError, match="area"):
        sample_patches(1, 2, (32, 32), Augmentation(area=(0.5, 1.5)))


def test_orders_are_all_permutations():
    assert sorted(map(tuple, ORDERS.tolist())) == sorted(itertools.permutations(range(4)))
