"""Verify each op, then time it against its peers in the same run.

    python -m study.benchmarks.ops [--device cuda]

Inputs take turns, so that no cache holds them. A peer that is not installed is left out and said.
Figures to trust are the ratios within one run. The record is kept in study/results/ops.jsonl.
"""

import argparse
import multiprocessing
from concurrent.futures import ProcessPoolExecutor

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.transforms import v2

import empssl
from empssl_support import ops
from empssl_support.cli import one_sentence
from empssl_support.machine import provenance
from empssl_support.pixels import empty_patches
from study.benchmarks import pipelines
from study.benchmarks.timing import median_seconds
from study.experiments.records import keep


def verify(what: str, ours: Tensor, exact: Tensor) -> None:
    """Raise `ArithmeticError` where one value in 10,000 is off, relative to the largest.

    A few may be: a pixel at solarize's threshold falls to either side.
    """
    right = (ours - exact).abs() <= 1e-5 * exact.abs().max()
    off = 1 - right.double().mean().item()
    if off > 1e-4:
        raise ArithmeticError(f"{what} is wrong in {off:.2%} of its values: nothing is timed.")


def rows_of(op: str, calls: dict, device: torch.device, **sizes) -> list[dict]:
    """Time each `call(i)`, by its name."""
    rows = []
    for name, call in calls.items():
        try:
            seconds = median_seconds(call, device)
        except RuntimeError as error:  # seen of MKL's batched LU; matrices too large for a GPU
            print(f"{op:16} {name:40} fails: {str(error).splitlines()[0]}")
            continue
        print(f"{op:16} {name:40} {seconds * 1e3:12.3f} ms", flush=True)
        rows.append({"op": op, "name": name, "seconds": seconds, **sizes})
    return rows


# ---- extract_patches ----


def cutting(op, device, b, n, s, dtype=torch.float32, augmentation=None):
    """A `call(i)` that cuts n patches of each of b images by `op`, of four batches by turns."""
    augmentation = augmentation or empssl.Augmentation()
    chance = empssl.generator_of(0, "benchmark", 0)
    images = torch.randint(256, (4, b, 3, 32, 32), generator=chance).to(device, torch.uint8)
    params = [empssl.sample_patches(b, n, (32, 32), augmentation, chance) for _ in range(4)]
    params = torch.stack(params).to(device)  # (4, n, b, K)
    index = torch.arange(b, device=device)

    def call(i):
        return op(images[i % 4], index, params[i % 4], s, dtype)

    return call


def bench_patches(device, b=100, n=20, s=32) -> list[dict]:
    """The paper's augmentation, n patches of each of b images of 32x32."""
    ours, reference = empssl.extract_patches, empssl.extract_patches_ref
    exact = cutting(reference, device, b, 2, s, torch.float64)(0)
    verify("extract_patches", cutting(ours, device, b, 2, s)(0), exact)
    calls = {
        "this op, float32": cutting(ours, device, b, n, s),
        "this op, bfloat16": cutting(ours, device, b, n, s, torch.bfloat16),
        "its PyTorch reference": cutting(reference, device, b, n, s),
    }
    batch = torch.rand(n * b, 3, 32, 32, device=device)
    calls |= installed({"kornia": lambda: whole(pipelines.kornia(s), batch)})
    if device.type == "cuda":
        calls |= installed({"DALI": lambda: pipelines.dali(s, (batch * 255).byte())})
    rows = rows_of("extract_patches", calls, device, patches=n * b, s=s)

    calls = {"torchvision v2, patch by patch": one_by_one(pipelines.torchvision(s), batch[:b])}
    rows += rows_of("extract_patches", calls, device, patches=b, s=s)

    # torch.set_num_threads spoils batched LU (pytorch/pytorch#141358): in a process of its own.
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, spawn, torch.set_num_threads, (1,)) as pool:
        return rows + pool.submit(bench_patches_on_one_core, b, n, s).result()


def bench_patches_on_one_core(b, n, s) -> list[dict]:
    """The op as called, checks and memory for the patches included, and its kernel alone."""
    cpu = torch.device("cpu")
    calls = {
        "this op, float32, one core": cutting(empssl.extract_patches, cpu, b, n, s),
        "its kernel alone, float32, one core": kernel_alone(b, n, s),
    }
    rows = rows_of("extract_patches", calls, cpu, patches=n * b, s=s)
    images = torch.rand(b, 3, 32, 32)
    pictures = [v2.functional.to_pil_image(image) for image in images]
    arrays = [np.asarray(picture) for picture in pictures]
    official = pipelines.torchvision(s, on_pil=True)
    calls = {"PIL, the official pipeline, one core": one_by_one(official, pictures)}
    name = "albumentations, one core"
    calls |= installed({name: lambda: one_by_one(pipelines.albumentations(s), arrays)})
    return rows + rows_of("extract_patches", calls, cpu, patches=b, s=s)


def kernel_alone(b, n, s):
    """A `call(i)` of the compiled function, its output there already."""
    chance = empssl.generator_of(0, "benchmark", 0)
    images = torch.randint(256, (b, 3, 32, 32), generator=chance).to(torch.uint8)
    params = empssl.sample_patches(b, n, (32, 32), empssl.Augmentation(), chance)
    index = torch.arange(b)
    out = empty_patches(n * b, s, torch.float32, images.device)

    def call(i):
        ops.run_patches_kernel(images, index, params, out)

    return call


def installed(makers: dict) -> dict:
    """The calls that can be made; a peer that is not installed is said."""
    calls = {}
    for name, make in makers.items():
        try:
            calls[name] = make()
        except ImportError as error:
            print(f"{name} is not measured: {error}")
    return calls


def whole(pipeline, batch):
    return lambda i: pipeline(batch)


def one_by_one(pipeline, images):
    return lambda i: [pipeline(image) for image in images]


def bench_common_part(device, b=100, n=200, s=16) -> list[dict]:
    """What triton-augment does too, 20,000 patches.

    A crop in its own size, flip, brightness, contrast, saturation, grey, normalise.
    """
    common = empssl.Augmentation(hue=0.0, blur=0.0, solarize=0.0)
    ours = cutting(empssl.extract_patches, device, b, n, s, torch.bfloat16, common)
    calls = {"this op, the common part, bfloat16": ours}
    batch = torch.rand(n * b, 3, 32, 32, device=device).half()
    name = "triton-augment, the common part, float16"
    calls |= installed({name: lambda: whole(pipelines.triton_augment(s), batch)})
    return rows_of("extract_patches", calls, device, patches=n * b, s=s)


# ---- the coding rate, forward and backward ----


def official_loop(z: Tensor, eps2: float = 0.2) -> Tensor:
    n, b, d = z.shape
    identity = torch.eye(d, dtype=z.dtype, device=z.device)
    R = 0
    for Z in z:
        covariance = d / (b * eps2) * Z.T @ Z
        R = R + torch.logdet(identity + covariance) / 2
    return R / n


def small_cholesky(z: Tensor, eps2: float = 0.2) -> Tensor:
    n, b, d = z.shape
    identity = torch.eye(b, device=z.device)
    gram = d / (b * eps2) * z @ z.mT
    L = torch.linalg.cholesky(identity + gram)
    return L.diagonal(dim1=-2, dim2=-1).log().sum(-1).mean()


def with_gradient(rate, z: Tensor) -> tuple[Tensor, Tensor]:
    z = z.detach().requires_grad_()
    R = rate(z)
    R.backward()
    return R.detach(), z.grad


def bench_coding_rate(device, n, b=100, d=1024) -> list[dict]:
    z = F.normalize(torch.randn(4, n, b, d, device=device), dim=-1)
    ours = with_gradient(empssl.coding_rate, z[0, :2])
    official = with_gradient(official_loop, z[0, :2].double())
    for value, exact in zip(ours, official, strict=True):
        verify("coding_rate", value, exact)

    def call(rate):
        return lambda i: with_gradient(rate, z[i % 4])

    calls = {
        "this op": call(empssl.coding_rate),
        "torch.linalg.cholesky, small side": call(small_cholesky),
        "official loop, d x d": call(official_loop),
    }
    return rows_of("coding_rate", calls, device, n=n, b=b, d=d)


# ---- logdet_spd ----


def bench_logdet(device, k) -> list[dict]:
    """20 matrices of k rows, by the op and by LAPACK or cuSOLVER: where do they catch up?"""
    X = torch.randn(20, k, k, device=device)
    identity = torch.eye(k, device=device)
    A = X @ X.mT / k + identity
    exact = ops.logdet_spd_ref(A.double())
    for ours, truth in zip(empssl.logdet_spd(A), exact, strict=True):
        verify("logdet_spd", ours, truth)
    calls = {
        f"this op, {k} rows": lambda i: empssl.logdet_spd(A),
        f"cholesky_ex and cholesky_inverse, {k} rows": lambda i: ops.logdet_spd_ref(A),
    }
    return rows_of("logdet_spd", calls, device, k=k)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Verify each op, then time it and its peers.")
    default = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", type=torch.device, default=default)
    device = parser.parse_args(argv).device
    on_gpu = device.type == "cuda"
    print(*ops.describe(device, 32, 100), sep="\n")
    rows = bench_patches(device) + bench_coding_rate(device, 200 if on_gpu else 20)
    if on_gpu:
        rows += bench_common_part(device)
    for k in (32, 100, 256, 500):
        rows += bench_logdet(device, k)
    record = {"name": f"ops-{device.type}", "seed": 0, "metrics": {"rows": rows}}
    keep("ops", record | provenance(str(device)))


if __name__ == "__main__":
    with one_sentence():
        main()
