"""The compiled ops against their references, against float64, and against wrong arguments.

On the CPU and, where there is one, on a GPU. What torchvision says of the references is in
test_patches.py.
"""

import contextlib
import math
import os
import re
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import assume, given, settings
from hypothesis import strategies as st

import empssl
from empssl import Augmentation, coding_rate, extract_patches_ref, sample_patches
from empssl_support import ops
from empssl_support.ops import logdet_spd_ref
from empssl_support.pixels import COLUMNS, K
from test_loss import paper_coding_rate
from test_patches import NEUTRAL, one, patch

pytestmark = pytest.mark.skipif(ops._empssl is None, reason="the compiled module is not installed")
DEVICES = ["cpu"] + ["cuda"] * torch.cuda.is_available()
on_each_device = pytest.mark.parametrize("device", DEVICES)
ISAS = [isa for isa in ("baseline", "avx2", "avx512") if ops._empssl and ops._empssl.use_isa(isa)]
extract, logdet = torch.ops.empssl.extract_patches, torch.ops.empssl.logdet_spd


@pytest.fixture(params=ISAS)
def isa(request):
    """Each instruction set this machine has, then its best one again."""
    assert ops._empssl.use_isa(request.param)
    yield request.param
    ops._empssl.use_isa(ISAS[-1])


def random_images(N, H, W, seed=0, device="cpu"):
    return torch.randint(
        0, 256, (N, 3, H, W), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed)
    ).to(device)


def assert_as_good_as_pytorch(ours, images, index, params, s):
    """Error against float64 at most twice that of the float32 reference, plus 1e-6.

    Values that rounding alone may put on either side of the solarize threshold are left out, and
    counted.
    """
    exact = extract_patches_ref(images, index, params, s, torch.float64)
    reference = extract_patches_ref(images, index, params, s, torch.float32)
    off = params.clone()
    off[..., COLUMNS.index("solarize")] = 0
    before = (extract_patches_ref(images, index, off, s, torch.float64) + 1) / 2
    solarized = (
        (params[..., COLUMNS.index("solarize")] > 0).flatten().view(-1, 1, 1, 1).to(images.device)
    )
    near = solarized & ((before - 128 / 255).abs() < 1e-5)
    allowed = (
        2 * (reference - exact).abs().masked_fill(near, 0).max().item() + 1e-6
        if exact.numel()
        else 0
    )
    error = (ours - exact).abs().masked_fill(near, 0)
    assert not ours.isnan().any()
    assert error.numel() == 0 or error.max().item() <= allowed, (error.max().item(), allowed)
    return near.sum().item()


@on_each_device
@settings(max_examples=60)
@given(
    data=st.data(),
    H=st.integers(1, 70),
    W=st.integers(1, 70),
    N=st.integers(1, 3),
    n=st.integers(0, 3),
    b=st.integers(1, 3),
    s=st.integers(1, 64),
    seed=st.integers(0, 999),
)
def test_random_patches(device, data, H, W, N, n, b, s, seed):
    images = random_images(N, H, W, seed, device)
    index = torch.tensor([data.draw(st.integers(0, N - 1)) for _ in range(b)], device=device)
    params = torch.tensor(
        [[data.draw(patch(H, W)) for _ in range(b)] for _ in range(n)], dtype=torch.float32
    )
    params = params.view(n, b, K).to(device)
    ours = extract(images, index, params, s, torch.float32)
    assert ours.shape == (n * b, 3, s, s) and ours.is_contiguous(memory_format=torch.channels_last)
    assert_as_good_as_pytorch(ours, images, index, params, s)


@on_each_device
@pytest.mark.parametrize("s", [16, 32, 33, 64, 65, 224])
def test_the_papers_patches(device, s, isa):
    images = random_images(20, 48, 40, device=device)
    index = torch.randperm(20, device=device)[:15]
    params = sample_patches(
        15,
        12,
        (48, 40),
        Augmentation(area=(0.05, 1), ratio=(0.5, 2), blur=0.5, solarize=0.3),
        empssl.generator_of(0, "test", s),
    ).to(device)
    near = assert_as_good_as_pytorch(
        extract(images, index, params, s, torch.float32), images, index, params, s
    )
    assert near <= 3e-5 * 12 * 15 * 3 * s * s + 2  # few enough that they hide nothing


@pytest.mark.skipif(len(DEVICES) == 1, reason="no GPU")
def test_cpu_and_gpu_agree():
    images, params = (
        random_images(50, 32, 32),
        sample_patches(50, 20, (32, 32), Augmentation(solarize=0.0)),
    )
    cpu = extract(images, torch.arange(50), params, 32, torch.float32)
    gpu = extract(images.cuda(), torch.arange(50).cuda(), params.cuda(), 32, torch.float32)
    exact, float32 = (
        extract_patches_ref(images, torch.arange(50), params, 32, dtype)
        for dtype in (torch.float64, torch.float32)
    )
    allowed = (
        2 * (float32 - exact).abs().max().item() + 1e-6
    )  # of each, as in `assert_as_good_as_pytorch`
    assert (gpu.cpu() - cpu).abs().max().item() <= 2 * allowed


@on_each_device
@pytest.mark.parametrize(
    "alone",
    [
        dict(),
        dict(flip=1),
        dict(brightness=1.4),
        dict(contrast=0.6),
        dict(saturation=1.4),
        dict(hue=-0.2),
        dict(grey=1),
        dict(sigma=1.5),
        dict(solarize=1),
    ],
    ids=str,
)
def test_each_operation_alone(device, alone, isa):
    images, index, params = (
        random_images(1, 8, 8, device=device),
        torch.zeros(1, dtype=torch.long, device=device),
        one(**alone).to(device),
    )
    for s in (8, 13, 5):
        ours = extract(images, index, params, s, torch.float32)
        assert_as_good_as_pytorch(ours, images, index, params, s)
        assert not alone or not torch.allclose(
            ours, extract(images, index, one().to(device), s, torch.float32), atol=1e-3
        )


@on_each_device
@pytest.mark.parametrize("order", range(24))
def test_every_order(device, order):
    images, index = (
        random_images(1, 8, 8, device=device),
        torch.zeros(1, dtype=torch.long, device=device),
    )
    params = one(order=order, brightness=1.4, contrast=0.6, saturation=1.4, hue=0.2).to(device)
    assert_as_good_as_pytorch(
        extract(images, index, params, 8, torch.float32), images, index, params, 8
    )


@on_each_device
@pytest.mark.parametrize("dtype,error", [(torch.bfloat16, 2**-9), (torch.float16, 2**-12)])
def test_half_precision_is_the_rounded_float32(device, dtype, error, isa):
    images, index = random_images(9, 32, 32, device=device), torch.arange(9, device=device)
    params = sample_patches(9, 6, (32, 32), Augmentation()).to(device)
    half, full = (extract(images, index, params, 32, t) for t in (dtype, torch.float32))
    assert half.dtype == dtype and torch.equal(half, full.to(dtype))
    assert (half.float() - full).abs().max() <= error


@on_each_device
def test_all_off_is_the_plain_crop_exactly(device, isa):
    images = random_images(3, 20, 30, device=device)
    params = one(top=2, left=7, height=16, width=16).expand(1, 3, K).to(device)
    x = extract(images, torch.arange(3, device=device), params, 16, torch.float32)
    assert torch.equal(
        x.cpu(), images[:, :, 2:18, 7:23].cpu().float() / 255 * 2 - 1
    )  # a GPU's PyTorch divides less exactly


@on_each_device
def test_strided_and_offset_inputs(device):
    base = random_images(12, 40, 60, device=device)
    index = torch.arange(8, device=device)[::2]
    for images in (
        base[2:, :, 3:35, 5:37],
        base[:, :, 4:36, ::2],
        base.permute(0, 1, 3, 2)[:, :, :32, :32],
        base[:, :1, :32, :32].expand(-1, 3, -1, -1),
        base.contiguous(memory_format=torch.channels_last)[:, :, :32, :32],
    ):
        p = sample_patches(4, 6, images.shape[2:], Augmentation()).to(device)
        strided = p.transpose(0, 1).contiguous().transpose(0, 1)
        expected = extract(
            images.contiguous(), index.contiguous(), p.contiguous(), 32, torch.float32
        )
        assert torch.equal(extract(images, index, strided, 32, torch.float32), expected)


@on_each_device
def test_large_images_and_shrinking(device):
    images, index = (
        random_images(1, 4096, 1500, device=device),
        torch.zeros(1, dtype=torch.long, device=device),
    )
    for p in (
        dict(height=4096, width=1500),
        dict(top=4095, height=1, width=1500),
        dict(top=1000, left=3, height=2999, width=1),
    ):
        params = one(**p).to(device)
        assert_as_good_as_pytorch(
            extract(images, index, params, 32, torch.float32), images, index, params, 32
        )


@on_each_device
def test_nothing_to_do(device):
    images, empty = (
        random_images(2, 8, 8, device=device),
        torch.zeros(0, dtype=torch.long, device=device),
    )
    assert extract(
        images,
        torch.arange(2, device=device),
        torch.zeros(0, 2, K, device=device),
        8,
        torch.float32,
    ).shape == (0, 3, 8, 8)
    assert extract(images, empty, torch.zeros(3, 0, K, device=device), 8, torch.float32).shape == (
        0,
        3,
        8,
        8,
    )


@on_each_device
@pytest.mark.parametrize("factor", ["brightness", "contrast", "saturation", "hue"])
def test_a_factor_that_is_nan_makes_its_patch_nan_alone(device, factor, isa):
    images, index = random_images(1, 8, 8, device=device), torch.zeros(1, dtype=torch.long)
    params = torch.cat([one(), one(**{factor: math.nan}), one()]).to(device)
    for extracted in (extract, extract_patches_ref):
        x = extracted(images, index.to(device), params, 8, torch.float32)
        assert x.flatten(1).isnan().float().mean(1).tolist() == [0, 1, 0]


BAD_PATCHES = [
    dict(index=1),
    dict(index=-1),
    dict(index=2**40),
    dict(top=1),
    dict(left=-1),
    dict(height=0),
    dict(width=0.5),
    dict(top=0.5, height=7),
    dict(height=math.nan),
    dict(width=math.inf),
    dict(order=24),
    dict(order=-1),
    dict(top=2.0**40),
]


@pytest.mark.parametrize("bad", BAD_PATCHES, ids=str)
def test_outside_is_an_exception_on_the_cpu(bad):
    bad = dict(bad)
    index = torch.tensor([0, bad.pop("index", 0)])
    params = torch.cat([one(), one(**bad)], 1)
    with pytest.raises(ValueError, match="reaches outside|inside its .*image"):
        empssl.extract_patches(random_images(1, 8, 8), index, params, 8)


@pytest.mark.parametrize("row", [-1, 3])
def test_images_that_are_gathered_for_another_device_are_those_of_a_valid_index(row):
    images = random_images(3, 8, 8)
    elsewhere = torch.device("meta")
    assert empssl.extract_patches(images, torch.tensor([2]), one(), 8, device=elsewhere).is_meta
    with pytest.raises(ValueError, match="reaches outside the 3 images"):
        empssl.extract_patches(images, torch.tensor([row]), one(), 8, device=elsewhere)


@pytest.mark.parametrize("device,waits", [("cpu", True), ("cuda", False)])
def test_what_a_cpu_gets_has_arrived(device, waits):
    copies = []

    class OnAGPU:
        is_cuda = True

        def to(self, device, non_blocking=False):
            copies.append((device.type, not non_blocking))

    ops.send(OnAGPU(), torch.device(device))
    assert copies == [(device, waits)]


@pytest.mark.skipif(sys.platform != "linux", reason="limits memory as Linux does")
def test_where_no_thread_can_be_started_those_there_are_do_the_work():
    program = """
        import resource
        import torch
        import empssl
        from empssl_support import ops

        images = torch.randint(256, (4, 3, 32, 32), dtype=torch.uint8)
        index = torch.arange(4)
        params = empssl.sample_patches(4, 50, (32, 32), empssl.Augmentation())
        torch.set_num_threads(1)
        alone = empssl.extract_patches(images, index, params, 16)
        out = torch.zeros_like(alone)

        # Less than a thread's stack is left.
        pages = int(open("/proc/self/statm").read().split()[0])
        limit = pages * resource.getpagesize() + 2**20
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
        torch.get_num_threads = lambda: 4
        ops.run_patches_kernel(images, index, params, out)
        assert torch.equal(out, alone)
    """
    command = [sys.executable, "-c", textwrap.dedent(program)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr


@pytest.mark.skipif(len(DEVICES) == 1, reason="no GPU")
@pytest.mark.parametrize("bad", BAD_PATCHES, ids=str)
def test_outside_is_nan_on_the_gpu_and_an_exception_when_checked(bad):
    bad = dict(bad)
    index = torch.tensor([0, bad.pop("index", 0)], device="cuda")
    params, images = torch.cat([one(), one(**bad)], 1).cuda(), random_images(1, 8, 8, device="cuda")
    x = empssl.extract_patches(images, index, params, 8)
    assert x[1].isnan().all() and not x[0].isnan().any()
    with pytest.raises(ValueError, match="reaches outside|inside its .*image"):
        empssl.extract_patches(images, index, params, 8, check=True)


@on_each_device
@pytest.mark.parametrize(
    "change",
    [
        dict(images=torch.zeros(1, 3, 8, 8)),
        dict(images=torch.zeros(3, 8, 8, dtype=torch.uint8)),
        dict(images=torch.zeros(1, 4, 8, 8, dtype=torch.uint8)),
        dict(index=torch.tensor([0.0])),
        dict(index=torch.tensor([0], dtype=torch.int32)),
        dict(index=torch.tensor([0, 0])),
        dict(params=torch.zeros(1, 1, 12)),
        dict(params=one().double()),
        dict(s=0),
        dict(dtype=torch.int32),
    ],
    ids=lambda c: next(iter(c)),
)
def test_wrong_arguments(device, change):
    good = dict(
        images=random_images(1, 8, 8),
        index=torch.tensor([0]),
        params=one(),
        s=8,
        dtype=torch.float32,
    )
    on_device = lambda d: {
        k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in d.items()
    }
    extract(**on_device(good))
    with pytest.raises((ValueError, RuntimeError)):
        extract(**on_device(good | change))


@pytest.mark.skipif(len(DEVICES) == 1, reason="no GPU")
def test_mixed_devices_are_refused():
    with pytest.raises((ValueError, RuntimeError)):
        extract(
            random_images(1, 8, 8, device="cuda"), torch.tensor([0]), one().cuda(), 8, torch.float32
        )


def test_columns_are_the_headers():
    header = (Path(__file__).parent.parent / "csrc" / "pixel.h").read_text()
    names = re.search(r"enum[^{]*\{([^}]*)\}", header).group(1)
    assert (
        tuple(re.findall(r"[A-Z]+", names))[:K] == tuple(name.upper() for name in COLUMNS)
        and K == len(NEUTRAL) == 13
    )


@on_each_device
def test_pytorch_sees_the_ops_whole(device):
    images, index = random_images(3, 16, 16, device=device), torch.arange(3, device=device)
    params = sample_patches(3, 2, (16, 16), Augmentation()).to(device)
    torch.library.opcheck(extract, (images, index, params, 8, torch.float32))
    torch.library.opcheck(extract, (images, index, params, 8, torch.bfloat16))
    A = spd(3, 5, device=device).requires_grad_()
    torch.library.opcheck(logdet, (A,))
    z = F.normalize(torch.randn(2, 6, 9, device=device), dim=-1).requires_grad_()

    @torch.compile(fullgraph=True, backend="aot_eager")
    def both(images, index, params, z):
        return extract(images, index, params, 8, torch.float32).mean() + coding_rate(z, 0.2)

    whole = both(images, index, params, z)
    whole.backward()
    (expected,) = torch.autograd.grad(coding_rate(z, 0.2), z)
    torch.testing.assert_close(z.grad, expected)
    torch.testing.assert_close(
        whole, extract(images, index, params, 8, torch.float32).mean() + coding_rate(z, 0.2)
    )


@pytest.mark.skipif(len(DEVICES) == 1, reason="no GPU")
def test_cuda_graph_capture(monkeypatch):
    images, index = random_images(8, 32, 32, device="cuda"), torch.arange(8, device="cuda")
    params, A = sample_patches(8, 4, (32, 32), Augmentation()).cuda(), spd(4, 20, device="cuda")
    expected = extract(images, index, params, 32, torch.float32), logdet(A)
    torch.cuda.synchronize()
    monkeypatch.setattr(ops, "_tried", {})  # as if these were the first calls
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = extract(images, index, params, 32, torch.float32), logdet(A)
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(captured[0], expected[0]) and torch.equal(captured[1][1], expected[1][1])


@pytest.mark.skipif(len(DEVICES) == 1, reason="no GPU")
@pytest.mark.parametrize("how", ["captured", "compiled"])
def test_a_training_step_is_captured_or_compiled(how, monkeypatch):
    """Patches, encoder, loss and gradients, in one CUDA graph or with a compiled encoder.

    On other patches they give what eager steps give.
    """
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    torch.manual_seed(0)
    images, index = random_images(40, 32, 32, device="cuda"), torch.arange(10, device="cuda")
    encoder = empssl.Encoder("resnet18", 16, hidden=64, projector=64, dim=32, drop_last_stage=True)
    encoder = encoder.to("cuda", memory_format=torch.channels_last).train()
    params = [
        sample_patches(10, 4, (32, 32), Augmentation(), empssl.generator_of(0, "graph", t)).cuda()
        for t in range(3)
    ]
    weights, place = list(encoder.parameters()), params[0].clone()

    def step(encode, params):
        x = empssl.extract_patches(images, index, params, 16)
        loss = empssl.empssl_loss(encode(x).unflatten(0, (4, 10)), 20.0)
        return loss, torch.autograd.grad(loss, weights)

    if how == "compiled":
        compiled = torch.compile(encoder)
        other = lambda params: step(compiled, params)
    else:
        aside = torch.cuda.Stream()
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):
            for _ in range(3):
                step(encoder, place)
        torch.cuda.current_stream().wait_stream(aside)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = step(encoder, place)

        def other(params):
            place.copy_(params)
            graph.replay()
            return captured

    losses = []
    for p in params:
        loss, gradients = other(p)
        expected, theirs = step(encoder, p)
        losses.append(loss.item())
        assert losses[-1] == pytest.approx(expected.item(), rel=1e-4)
        ours, theirs = (torch.cat([g.flatten() for g in each]) for each in (gradients, theirs))
        assert (ours - theirs).norm() <= 1e-2 * theirs.norm()
    assert len({round(loss, 3) for loss in losses}) == 3


# ---- logdet_spd ----


def spd(n, k, device="cpu", dtype=torch.float64, condition=10.0, seed=0):
    g = torch.Generator().manual_seed(seed)
    Q = torch.linalg.qr(torch.randn(n, k, k, generator=g, dtype=torch.float64)).Q
    eigenvalues = torch.logspace(0, math.log10(condition), k, dtype=torch.float64)
    return ((Q * eigenvalues) @ Q.mT).to(dtype).to(device)


@on_each_device
@settings(max_examples=60)
@given(
    n=st.sampled_from([0, 1, 20]),
    k=st.integers(1, 70),
    condition=st.sampled_from([1.0, 50.0, 1e4]),
    seed=st.integers(0, 99),
    dtype=st.sampled_from([torch.float32, torch.float64]),
)
def test_logdet_and_inverse(device, n, k, condition, seed, dtype):
    A = spd(n, k, device, dtype, condition, seed)
    L, inverse = logdet(A)
    assert L.shape == (n,) and inverse.shape == (n, k, k) and L.dtype == inverse.dtype == dtype
    assert torch.equal(inverse, inverse.mT)
    assume(n > 0)
    # PyTorch's largest error on 200 such matrices is the measure: on a few it can be small by luck.
    many = spd(200, k, device, dtype, condition, seed + 1000)
    measure = errors_of(logdet_spd_ref(many), many)
    for (error, size), (theirs, _) in zip(errors_of((L, inverse), A), measure):
        assert error <= 2 * theirs + 1e-6 * size


def errors_of(found, A):
    """Largest errors of log-determinants and of inverses, and how large these are, at least 1."""
    A = A.double().cpu()
    exact = (torch.linalg.slogdet(A).logabsdet, torch.linalg.inv(A))
    return [
        ((ours.double().cpu() - truth).abs().max(), truth.abs().max().clamp(min=1))
        for ours, truth in zip(found, exact)
    ]


@on_each_device
@pytest.mark.parametrize("k", [1, 2, 31, 32, 33, 100, 128, 200, 255, 256, 300, 511, 512])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_sizes_on_both_sides_of_every_handover(device, k, dtype, isa):
    A = spd(3, k, device, dtype)
    L, inverse = logdet(A)
    tolerance = (
        dict(rtol=3e-5, atol=3e-5) if dtype == torch.float32 else dict(rtol=1e-12, atol=1e-12)
    )
    torch.testing.assert_close(L, torch.logdet(A.double()).to(dtype), **tolerance)
    torch.testing.assert_close(inverse, torch.linalg.inv(A.double()).to(dtype), **tolerance)


@on_each_device
@pytest.mark.parametrize("k", [2, 40, 300])
def test_a_matrix_that_is_not_positive_definite_is_nan_alone(device, k, isa):
    A = spd(6, k, device, torch.float32)
    A[1] = -A[1]
    A[2, k // 2, k // 2] = math.nan
    A[3] = 0
    A[4, 0, 0] = math.inf
    L, inverse = logdet(A)
    assert L.isnan().tolist() == [False, True, True, True, True, False]
    assert inverse[1:5].isnan().all() and not inverse[[0, 5]].isnan().any()


@on_each_device
def test_only_the_lower_triangle_is_read(device):
    A = spd(2, 9, device)
    spoiled = A.tril() + torch.full_like(A, 7.0).triu(1)
    for ours, theirs in zip(logdet(spoiled), logdet(A)):
        assert torch.equal(ours, theirs)


@on_each_device
@pytest.mark.parametrize("k", [1, 5, 260])
def test_gradients_of_both_outputs(device, k):
    X = torch.randn(2, k, k, dtype=torch.float64, device=device) / k**0.5
    X.requires_grad_()
    make = lambda X: X @ X.mT + torch.eye(k, dtype=torch.float64, device=device)
    if k < 100:
        assert torch.autograd.gradcheck(lambda X: logdet(make(X)), X)
        assert torch.autograd.gradgradcheck(lambda X: logdet(make(X))[0], X)
    ours, theirs = (
        torch.autograd.grad(f(make(X)).sum(), X)[0] for f in (lambda A: logdet(A)[0], torch.logdet)
    )
    torch.testing.assert_close(ours, theirs)


@on_each_device
def test_strided_matrices(device):
    A = spd(6, 8, device)
    torch.testing.assert_close(logdet(A[::2])[0], torch.logdet(A[::2]))
    torch.testing.assert_close(logdet(A.mT)[0], torch.logdet(A))


@pytest.mark.parametrize(
    "A",
    [
        torch.zeros(3, 3),
        torch.zeros(1, 2, 3),
        torch.zeros(1, 2, 2, dtype=torch.int64),
        torch.zeros(1, 2, 2, dtype=torch.bfloat16),
        torch.zeros(1, 0, 0),
    ],
    ids=lambda A: str(A.shape),
)
def test_wrong_matrices(A):
    with pytest.raises(ValueError, match="A must be"):
        logdet(A)


@pytest.mark.parametrize("shape", [(3,), (0, 0), (2, 0, 0), (2, 5, 0, 0), (2, 3, 4)], ids=str)
def test_wrong_shapes_of_matrices(shape):
    with pytest.raises(ValueError, match="A must be"):
        empssl.logdet_spd(torch.zeros(shape))


@on_each_device
@pytest.mark.parametrize("b,d", [(100, 1024), (100, 64), (300, 400)])
def test_coding_rate_and_its_gradient_are_the_papers(device, b, d):
    z = F.normalize(torch.randn(3, b, d), dim=-1)
    exact = z.double().requires_grad_()
    ours = z.to(device).requires_grad_()
    paper_coding_rate(exact, 0.2).backward()
    R = coding_rate(ours, 0.2)
    R.backward()
    assert R.item() == pytest.approx(paper_coding_rate(z, 0.2).item(), rel=1e-5)
    torch.testing.assert_close(ours.grad.cpu().double(), exact.grad, rtol=1e-4, atol=1e-6)


# ---- which implementation, and why ----


def test_the_cpu_kernels_are_in_use():
    lines = ops.describe(torch.device("cpu"), 32, 100)
    assert lines == [
        f"extract_patches: compiled (CPU kernel, {ISAS[-1]})",
        f"logdet_spd: compiled (CPU kernel, {ISAS[:2][-1]})",
    ]


def test_without_the_module_the_references_run_and_say_so(monkeypatch):
    images, params = random_images(4, 32, 32), sample_patches(4, 3, (32, 32), Augmentation())
    compiled = empssl.extract_patches(images, torch.arange(4), params, 32)
    monkeypatch.setattr(ops, "_empssl", None)
    monkeypatch.setattr(ops, "_missing", "it is missing", raising=False)
    torch.testing.assert_close(
        empssl.extract_patches(images, torch.arange(4), params, 32), compiled, atol=1e-5, rtol=0
    )
    z = F.normalize(torch.randn(2, 6, 9), dim=-1)
    assert coding_rate(z).item() == pytest.approx(paper_coding_rate(z, 0.2).item(), rel=1e-5)
    assert all(
        "PyTorch reference (it is missing)" in line
        for line in ops.describe(torch.device("cpu"), 32, 100)
    )


class StandInForAGPU:
    """As far as the trial of a kernel needs one; `fails` names the call that raises."""

    def __init__(self, monkeypatch):
        self.calls, self.fails, self.capturing = [], None, False
        ones = torch.ones
        monkeypatch.setattr(torch, "ones", lambda *shape, device, dtype: ones(*shape, dtype=dtype))
        monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: self.capturing)
        monkeypatch.setattr(torch.cuda, "synchronize", lambda index: self.call("wait", index))
        monkeypatch.setattr(ops, "run_logdet_kernel", lambda *matrices: self.call("launch"))
        monkeypatch.setattr(ops, "_tried", {})
        module = SimpleNamespace(cuda=True, logdet_spd_cuda_largest=lambda size: 240)
        monkeypatch.setattr(ops, "_empssl", module)

    def call(self, *call):
        self.calls.append(call)
        if call[0] == self.fails:
            raise RuntimeError(f"the {call[0]} failed")

    def implementation(self):
        return ops.implementation("logdet_spd", torch.device("cuda", 1), 100, torch.float32)


@pytest.mark.parametrize("fails", [None, "launch", "wait"])
def test_a_gpu_is_tried_once_and_its_kernel_waited_for(monkeypatch, fails):
    gpu = StandInForAGPU(monkeypatch)
    gpu.fails = fails
    first = gpu.implementation()
    assert gpu.calls == ([("launch",)] if fails == "launch" else [("launch",), ("wait", 1)])
    assert first[0] == (fails is None) and (fails is None or f"the {fails} failed" in first[1])
    gpu.calls.clear()
    assert gpu.implementation() == first and gpu.calls == []


def test_no_gpu_is_tried_while_a_graph_is_captured(monkeypatch):
    gpu = StandInForAGPU(monkeypatch)
    gpu.fails, gpu.capturing = "wait", True
    assert gpu.implementation()[0] and gpu.calls == []
    # What is taken to work then is not taken to work for good.
    gpu.capturing = False
    assert not gpu.implementation()[0]
    assert gpu.calls == [("launch",), ("wait", 1)]
    gpu.capturing = True
    assert not gpu.implementation()[0]


@on_each_device
def test_solarize_inverts_from_128_up(device):
    """The kernel and the reference, on both sides of the threshold."""
    images = (
        torch.tensor([127, 128], dtype=torch.uint8, device=device)
        .view(2, 1, 1, 1)
        .expand(2, 3, 8, 8)
    )
    params = one(height=8, width=8, solarize=1).expand(1, 2, K).contiguous().to(device)
    for extracted in (extract, extract_patches_ref):
        x = (
            (extracted(images, torch.tensor([0, 1], device=device), params, 8, torch.float32) + 1)
            / 2
            * 255
        )
        assert x[0].round().unique().tolist() == [127] and x[1].round().unique().tolist() == [127]
        params[..., COLUMNS.index("solarize")] = 0
        x = (
            (extracted(images, torch.tensor([0, 1], device=device), params, 8, torch.float32) + 1)
            / 2
            * 255
        )
        assert x[1].round().unique().tolist() == [128]
        params[..., COLUMNS.index("solarize")] = 1


@on_each_device
@pytest.mark.parametrize("seed", range(4))
def test_a_training_with_kernels_and_one_with_references_agree(device, seed, monkeypatch):
    """Twenty steps with kernels, the paper's augmentation.

    At each the references give, from the same weights, the same loss and gradient, but for the few
    steps at which rounding carries a ReLU's input across 0. And twenty steps with references alone
    follow, as far as rounding, of which training makes ten times as much each step, lets them.
    """
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    images = random_images(200, 32, 32, device=device)
    config = empssl.Config(
        patches=8, batch=10, patch_size=16, lr=0.1, lam=20.0, precision="float32"
    )
    extracted, module, apart, losses = (
        empssl.extract_patches,
        ops._empssl,
        [],
        {True: [], False: []},
    )
    monkeypatch.setattr(ops, "_missing", "left out", raising=False)

    def run(kernels):
        torch.manual_seed(seed)
        encoder, layers = empssl.Encoder("small", 16, hidden=64, projector=64, dim=32), []
        for inputs, outputs, kernel in ((3, 96, 3), (96, 192, 3), (192, 256, 2)):
            layers += [
                torch.nn.Conv2d(inputs, outputs, kernel, 2, kernel // 3),
                torch.nn.BatchNorm2d(outputs),
                torch.nn.ReLU(),
            ]
        encoder.backbone = torch.nn.Sequential(
            *layers, torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten()
        )
        encoder, last = encoder.to(device), {}
        weights = list(encoder.parameters())

        def extract_twice(images, index, params, s, *how):
            last["x"] = extract_patches_ref(images, index.to(device), params.to(device), s)
            return extracted(images, index, params, s, *how)

        class Both(empssl.Objective):
            def forward(self, z, x, index):
                ours, terms = super().forward(z, x, index)
                losses[kernels].append(ours.item())
                if kernels:
                    self.compare(ours, z, index)
                return ours, terms

            def compare(self, ours, z, index):
                with monkeypatch.context() as patch:
                    patch.setattr(ops, "_empssl", None)
                    z = encoder(last["x"]).unflatten(0, z.shape[:2])
                    theirs, _ = super().forward(z, last["x"], index)
                gradients = []
                for each in (ours, theirs):
                    of_weights = torch.autograd.grad(each, weights, retain_graph=True)
                    gradients.append(torch.cat([g.flatten() for g in of_weights]))
                distance = (gradients[0] - gradients[1]).norm() / gradients[1].norm()
                apart.append((abs(ours / theirs - 1).item(), distance.item()))

        monkeypatch.setattr(empssl, "extract_patches", extract_twice)
        monkeypatch.setattr(ops, "_empssl", module if kernels else None)
        empssl.train(encoder, images, config, Augmentation(), Both(config.lam))

    run(True), run(False)
    of_losses, of_gradients = zip(*apart)
    assert len(apart) == 20 and max(of_losses) < 1e-5
    assert sorted(of_gradients)[10] < 1e-4 and max(of_gradients) < 3e-2
    assert losses[True] != losses[False]
    assert_losses_follow(losses[True], losses[False])


def short_training(device, eta=0.005):
    """The losses of twenty steps, patches and first weights the same on every device."""
    torch.manual_seed(0)
    encoder = empssl.Encoder("resnet18", 16, hidden=64, projector=64, dim=32, drop_last_stage=True)
    encoder = encoder.to(device, memory_format=torch.channels_last)
    config, losses = (
        empssl.Config(
            patches=8, batch=10, patch_size=16, lr=0.1, lam=20.0, eta=eta, precision="float32"
        ),
        [],
    )
    encoder.register_forward_hook(
        lambda _, inputs, z: losses.append(
            empssl.empssl_loss(z.detach().unflatten(0, (8, -1)), 20.0).item()
        )
    )
    empssl.train(encoder, random_images(200, 32, 32, device=device), config, Augmentation())
    return losses


@pytest.mark.skipif(len(DEVICES) == 1, reason="no GPU")
def test_a_training_on_a_gpu_follows_the_cpus(monkeypatch):
    """At first to float32's rounding, which grows tenfold each step; then on the average."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    cpu, gpu = short_training("cpu"), short_training("cuda")
    assert_losses_follow(gpu, cpu)
    with pytest.raises(AssertionError):
        assert_losses_follow(short_training("cuda", eta=0.0045), cpu)


def assert_losses_follow(ours, theirs):
    assert len(ours) == len(theirs) == 20
    for t, bound in enumerate((1e-5, 2e-4, 3e-3)):
        assert ours[t] == pytest.approx(theirs[t], rel=bound)
    assert sum(ours[10:]) == pytest.approx(sum(theirs[10:]), rel=1e-2)


def test_threads_do_not_change_the_result(monkeypatch):
    images, params = random_images(20, 32, 32), sample_patches(20, 20, (32, 32), Augmentation())
    results = []
    for count in (1, 2, 5):
        # Not torch.set_num_threads, which spoils batched LU for the tests to come (pytorch#141358).
        monkeypatch.setattr(torch, "get_num_threads", lambda count=count: count)
        results.append(extract(images, torch.arange(20), params, 32, torch.float32))
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


@pytest.mark.skipif(
    not (shutil.which("nvcc") or Path("/usr/local/cuda/bin/nvcc").exists()), reason="no nvcc"
)
@pytest.mark.skipif(os.environ.get("EMPSSL_CUDA") == "0", reason="CUDA was left out")
def test_cuda_kernels_are_in_the_module_wherever_nvcc_is():
    assert ops._empssl.cuda
    module = Path(ops._empssl.__file__).read_bytes()
    for kernel in (b"extract_patches_kernel", b"logdet_spd_kernel"):
        assert kernel in module
    for architecture in ops._empssl.cuda_architectures.split():
        assert f"sm_{architecture}".encode() in module
