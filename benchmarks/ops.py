"""Verify each op, then time it against its peers, all in one run: python benchmarks/ops.py [--device cuda] [--out F.json]

Times are medians of repeated calls after a warm-up, on a GPU by device events, over several input sets so that no cache
holds them. A peer that is not installed is left out and said. Figures to trust are the ratios within one run.
"""

import argparse
import json
import random
import statistics
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image, ImageFilter, ImageOps
from threadpoolctl import threadpool_limits
from torchvision import transforms as V1
from torchvision.transforms import v2 as V

sys.path.insert(0, str(Path(__file__).parent.parent))
import empssl
import empssl_io as io
import empssl_ops


def median_seconds(call, device, least=0.5, most=30.0) -> float:
    """Median seconds of `call(i)`, i counting up, for `least` to `most` seconds in all and at least 3 calls. On a GPU ten calls
    between two events, so that work waits in the stream and the host's share of a launch is hidden, as in training."""
    call(0)
    times, started = [], time.perf_counter()
    while (len(times) < 3 or time.perf_counter() - started < least) and time.perf_counter() - started < most or not times:
        if device.type == "cuda":
            before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            torch.cuda.synchronize()
            before.record()
            for i in range(10):
                call(10 * len(times) + i + 1)
            after.record()
            torch.cuda.synchronize()
            times.append(before.elapsed_time(after) / 1e4)
        else:
            t = time.perf_counter()
            call(len(times) + 1)
            times.append(time.perf_counter() - t)
    return statistics.median(times)


# ---- the peers of extract_patches ----

def official_pipeline(s: int):
    """The recipe as PIL runs it: a function that does what the official code does for one patch of an image."""
    crop, flip = V1.RandomResizedCrop(s, scale=(0.25, 0.25), ratio=(1, 1)), V1.RandomHorizontalFlip(0.5)
    jitter, grey = V1.ColorJitter(0.4, 0.4, 0.4, 0.2), V1.RandomGrayscale(0.2)

    def one_patch(image: Image.Image) -> torch.Tensor:
        patch = flip(crop(image))
        if random.random() < 0.8:
            patch = jitter(patch)
        patch = grey(patch)
        if random.random() < 0.1:
            patch = patch.filter(ImageFilter.GaussianBlur(random.uniform(0.1, 2.0)))
        if random.random() < 0.1:
            patch = ImageOps.solarize(patch)
        return V1.functional.to_tensor(patch) * 2 - 1
    return one_patch


def pil_patches(job) -> int:
    """One core's share: `count` patches of each image."""
    images, count, s = job
    one_patch = official_pipeline(s)
    with threadpool_limits(1, user_api="openmp"):
        for image in images:
            for _ in range(count):
                one_patch(image)
    return len(images) * count


def torchvision_pipeline(s: int):
    return V.Compose([V.RandomResizedCrop(s, scale=(0.25, 0.25), ratio=(1, 1), antialias=True), V.RandomHorizontalFlip(0.5),
                      V.ToDtype(torch.float32, scale=True), V.RandomApply([V.ColorJitter(0.4, 0.4, 0.4, 0.2)], 0.8),
                      V.RandomGrayscale(0.2), V.RandomApply([V.GaussianBlur(13, (0.1, 2.0))], 0.1),
                      V.RandomSolarize(128 / 255, 0.1), V.Normalize([0.5] * 3, [0.5] * 3)])


def kornia_pipeline(s: int):
    import kornia.augmentation as A
    return torch.nn.Sequential(
        A.RandomResizedCrop((s, s), scale=(0.25, 0.25), ratio=(1.0, 1.0)), A.RandomHorizontalFlip(),
        A.ColorJitter(0.4, 0.4, 0.4, 0.2, p=0.8), A.RandomGrayscale(p=0.2),
        A.RandomGaussianBlur((13, 13), (0.1, 2.0), p=0.1), A.RandomSolarize(0.0, 0.0, p=0.1))


def bench_patches(device, rows, s=32, b=100, n=20):
    sets = 4
    images = torch.randint(0, 256, (b * sets, 3, 32, 32), dtype=torch.uint8, device=device)
    index = [torch.arange(i * b, (i + 1) * b, device=device) for i in range(sets)]
    params = [empssl.sample_patches(b, n, (32, 32), empssl.Augmentation(), empssl.generator(0, "bench", i)).to(device)
              for i in range(sets)]
    few = params[0][:2]
    exact = empssl.extract_patches_ref(images, index[0], few, s, torch.float64)
    ours = torch.ops.empssl.extract_patches(images, index[0], few, s, torch.float32)
    share_off = ((ours - exact).abs() > 1e-5).double().mean().item()
    assert share_off < 1e-4, f"extract_patches is wrong in {share_off:.2%} of its values: nothing is timed"

    def row(name, seconds, patches, note=""):
        rows.append({"op": "extract_patches", "name": name, "patches_per_second": patches / seconds, "seconds": seconds,
                     "patches": patches, "s": s, "note": note})
        print(f"  {name:44} {patches / seconds:14,.0f} patches/s   {note}", flush=True)
    print(f"extract_patches, {n * b} patches of {s}x{s}, the paper's augmentation, {device}")
    for dtype in (torch.float32, torch.bfloat16):
        t = median_seconds(lambda i: torch.ops.empssl.extract_patches(images, index[i % sets], params[i % sets], s, dtype), device)
        row(f"this op, {str(dtype)[6:]}", t, n * b)
    if device.type == "cpu":
        with threadpool_limits(1, user_api="openmp"):               # torch.set_num_threads spoils batched LU (pytorch/pytorch#141358)
            t = median_seconds(lambda i: torch.ops.empssl.extract_patches(images, index[i % sets], params[i % sets], s, torch.float32), device)
        row("this op, float32, one core", t, n * b)
    t = median_seconds(lambda i: empssl.extract_patches_ref(images, index[i % sets], params[i % sets], s), device)
    row("its PyTorch reference", t, n * b)

    pictures = [Image.fromarray(x.permute(1, 2, 0).cpu().numpy()) for x in images[:50]]
    started = time.perf_counter()
    done = pil_patches((pictures, n, s))
    row("PIL, the official pipeline, one core", time.perf_counter() - started, done)
    cores = len(__import__("os").sched_getaffinity(0))
    with ProcessPoolExecutor(cores) as pool:
        list(pool.map(pil_patches, [(pictures[:1], 1, s)] * cores))                 # start the processes before the clock
        started = time.perf_counter()
        done = sum(pool.map(pil_patches, [(pictures, n, s)] * cores))
        row(f"PIL, the official pipeline, {cores} cores", time.perf_counter() - started, done)
    pipeline = torchvision_pipeline(s)
    t = median_seconds(lambda i: [pipeline(images[j]) for j in range(50)], device, most=5)
    row("torchvision v2, patch by patch", t, 50)
    batch = images[:b].repeat(n, 1, 1, 1)
    t = median_seconds(lambda i: pipeline(batch), device)
    row("torchvision v2, one set of parameters a batch", t, n * b, "not the same work")
    try:
        pipeline = kornia_pipeline(s).to(device)
        floats = batch.float() / 255
        t = median_seconds(lambda i: pipeline(floats), device, most=20)
        row("kornia", t, n * b)
    except ImportError:
        print("  kornia is not installed: not measured")
    if device.type == "cuda":
        bench_common_part(device, row, images, index, b, sets)
        bench_floors(device, rows, images, s, b)


def bench_common_part(device, row, images, index, b, sets, n=200, s=16):
    """What triton-augment does too: native crop, flip, brightness, contrast, saturation, grey, normalise."""
    common = empssl.Augmentation(hue=0.0, blur=0.0, solarize=0.0)
    params = [empssl.sample_patches(b, n, (32, 32), common, empssl.generator(0, "common", i)).to(device) for i in range(sets)]
    t = median_seconds(lambda i: torch.ops.empssl.extract_patches(images, index[i % sets], params[i % sets], s, torch.bfloat16), device)
    row("this op, the common part, bfloat16", t, n * b, "native 16x16 crops")
    try:
        import triton_augment as ta
        pipeline = ta.TritonFusedAugment(crop_size=s, horizontal_flip_p=0.5, brightness=0.4, contrast=0.4, saturation=0.4,
                                         grayscale_p=0.2, mean=(0.5,) * 3, std=(0.5,) * 3)
        floats = images[:b].repeat(n, 1, 1, 1).half() / 255
        t = median_seconds(lambda i: pipeline(floats), device)
        row("triton-augment, the common part, float16", t, n * b, "native 16x16 crops")
    except ImportError:
        print("  triton-augment is not installed: not measured")


OPERATIONS_A_PIXEL = 115    # float32: resize 34, jitter 56 (hue most), grey 1, blur 16 (13 + 13 taps, one patch in ten), normalise 8


def bench_floors(device, rows, images, s, b, n=200):
    """20,000 patches in bfloat16 against the time to write them at the measured copy bandwidth, the time of their
    arithmetic at the measured float32 rate, and the ResNet-18 training step that they are for."""
    source = torch.empty(2 ** 30, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    bandwidth = 2 * source.numel() / median_seconds(lambda i: target.copy_(source), device)
    square = torch.randn(4096, 4096, device=device)
    with torch.no_grad():
        torch.backends.cuda.matmul.allow_tf32 = False
        rate = 2 * 4096 ** 3 / median_seconds(lambda i: square @ square, device)
    params = empssl.sample_patches(b, n, (32, 32), empssl.Augmentation(), empssl.generator(0, "floor", 0)).to(device)
    index = torch.arange(b, device=device)
    t = median_seconds(lambda i: torch.ops.empssl.extract_patches(images, index, params, s, torch.bfloat16), device)
    encoder = empssl.Encoder("resnet18", s).to(device, memory_format=torch.channels_last)
    x = torch.ops.empssl.extract_patches(images, index, params[:20], s, torch.bfloat16)

    def step(i):                                            # a tenth of the 20,000: larger ones do not fit every GPU
        encoder.zero_grad()
        with torch.autocast("cuda", torch.bfloat16):
            encoder(x).float().sum().backward()
    whole = 10 * median_seconds(step, device)
    pixels = n * b * s * s
    row = {"op": "extract_patches", "name": "20,000 patches, bfloat16", "seconds": t, "patches": n * b, "s": s,
           "copy_bandwidth": bandwidth, "float32_rate": rate, "fraction_of_copy_bandwidth": pixels * 6 / t / bandwidth,
           "fraction_of_float32_rate": pixels * OPERATIONS_A_PIXEL / t / rate, "resnet18_step_seconds": whole,
           "fraction_of_the_step": t / whole}
    rows.append(row)
    print(f"  20,000 patches in bfloat16: {t * 1e6:.0f} us, {row['fraction_of_copy_bandwidth']:.1%} of the copy bandwidth "
          f"({bandwidth / 1e12:.2f} TB/s), {row['fraction_of_float32_rate']:.1%} of the float32 rate "
          f"({rate / 1e12:.0f} TFLOP/s), {row['fraction_of_the_step']:.2%} of the ResNet-18 step on them ({whole:.3f} s)")


# ---- the peers of logdet_spd: forward and backward of the coding rate ----

def official_loop(z, eps2=0.2):
    n, b, d = z.shape
    identity = torch.eye(d, device=z.device)
    return sum(torch.logdet(identity + d / (b * eps2) * Z.T @ Z) / 2 for Z in z) / n


def batched_logdet(z, eps2=0.2):
    n, b, d = z.shape
    return torch.logdet(torch.eye(d, device=z.device) + d / (b * eps2) * z.mT @ z).mean() / 2


def small_cholesky(z, eps2=0.2, cholesky=torch.linalg.cholesky):
    n, b, d = z.shape
    L = cholesky(torch.eye(b, device=z.device) + d / (b * eps2) * z @ z.mT)
    return (L[0] if isinstance(L, tuple) else L).diagonal(dim1=-2, dim2=-1).log().sum(-1).mean()


def bench_coding_rate(device, rows, b=100, d=1024):
    n = 200 if device.type == "cuda" else 20
    sets = [F.normalize(torch.randn(n, b, d, device=device), dim=-1).requires_grad_() for _ in range(4)]
    truth = official_loop(sets[0].detach().double().cpu()[:2])
    assert abs(empssl.coding_rate(sets[0][:2]).item() - truth.item()) < 1e-4 * truth.item(), "coding_rate is wrong: nothing is timed"
    peers = {"this op": empssl.coding_rate, "torch.linalg.cholesky, small side": small_cholesky,
             "torch.linalg.cholesky_ex, small side": lambda z: small_cholesky(z, cholesky=torch.linalg.cholesky_ex),
             "torch.logdet, d x d, batched": batched_logdet, "official loop, d x d": official_loop}
    print(f"coding rate, forward and backward, n={n} b={b} d={d}, {device}")
    for name, rate in peers.items():
        def call(i):
            z = sets[i % 4]
            z.grad = None
            rate(z).backward()
        try:
            t = median_seconds(call, device, most=20)
        except RuntimeError as error:                       # a peer's own fault: seen of MKL's batched LU, d x d
            print(f"  {name:44} fails ({str(error).splitlines()[0]}): not measured")
            continue
        rows.append({"op": "coding_rate", "name": name, "seconds": t, "n": n, "b": b, "d": d})
        print(f"  {name:44} {t * 1e3:10.2f} ms", flush=True)


def bench_logdet_sizes(device, rows):
    """The kernel alone against LAPACK or cuSOLVER by size: where to hand over."""
    print(f"logdet_spd by size, 20 matrices, forward with inverse, {device}")
    for k in (16, 32, 64, 100, 128, 192, 256, 384, 512, 768, 1024):
        X = torch.randn(20, k, k, device=device)
        A = X @ X.mT / k + torch.eye(k, device=device)
        theirs = median_seconds(lambda i: empssl.logdet_spd_ref(A), device, least=0.2)
        L, inverse = torch.empty(20, device=device), torch.empty_like(A)
        try:
            ours = median_seconds(lambda i: empssl_ops._logdet_kernel(A, L, inverse), device, least=0.2)
        except RuntimeError:                                # does not fit the GPU's shared memory
            ours = None
        rows.append({"op": "logdet_spd", "k": k, "kernel_seconds": ours, "linalg_seconds": theirs})
        said = "does not fit" if ours is None else f"{ours * 1e3:8.3f} ms"
        print(f"  k={k:4} kernel {said}   torch.linalg {theirs * 1e3:8.3f} ms", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", help="default: results/ops/<cpu or cuda>.json")
    a = parser.parse_args()
    device, rows = torch.device(a.device), []
    for line in empssl_ops.describe(device, 32, 100):
        print(line)
    bench_patches(device, rows)
    bench_coding_rate(device, rows)
    bench_logdet_sizes(device, rows)
    record = {"name": f"ops-{device.type}"} | io.provenance(a.device) | {"seed": 0, "rows": rows}
    out = Path(a.out or Path(__file__).parent.parent / "results" / "ops" / f"{device.type}.json")
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(record, indent=1) + "\n")
    print("written to", out.name)


if __name__ == "__main__":
    main()
