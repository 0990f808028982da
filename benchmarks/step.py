"""Where a training step's time goes, and how far each part is from its floor: python benchmarks/step.py [--preset laptop]

Floors are of the same run: products at the rate of a large matrix product (bf16 with --precision bf16; else float32, on a GPU the
convolutions' as TF32, PyTorch's default), memory at the rate of a copy. Medians over steps after a warm-up; a GPU is synchronised
after each part, so the sum is more than a step.
"""

import argparse
import json
import statistics
import sys
import time
from pathlib import Path

import torch
from torch.utils.flop_counter import FlopCounterMode

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import empssl               # noqa: E402
import empssl_io as io      # noqa: E402
import report               # noqa: E402


def once(call, device: torch.device) -> float:
    started = time.perf_counter()
    call()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - started


def seconds(call, device: torch.device, repeat: int = 5) -> float:
    return statistics.median([once(call, device) for _ in range(repeat + 1)][1:])


def product_rate(device: torch.device, dtype: torch.dtype, tf32: bool = False) -> float:
    """Floating-point operations a second of a large matrix product."""
    size = 8192 if device.type == "cuda" else 2048
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    before, torch.backends.cuda.matmul.allow_tf32 = torch.backends.cuda.matmul.allow_tf32, tf32
    try:
        return 2 * size ** 3 / seconds(lambda: a @ b, device)
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


def copy_rate(device: torch.device) -> float:
    """Bytes read and written a second by a large copy."""
    source = torch.empty(2 ** 28 if device.type == "cuda" else 2 ** 26, device=device)
    target = torch.empty_like(source)
    return 2 * source.numel() * 4 / seconds(lambda: target.copy_(source), device)


def profile(config: empssl.Config, steps: int = 8) -> list[dict]:
    device, n, b, d, s = torch.device(config.device), config.patches, config.batch, config.dim, config.patch_size
    images = torch.zeros(10_000, 3, 32, 32, dtype=torch.uint8).random_().to(device)
    encoder = empssl.new_encoder(config, images).train()
    encode = torch.compile(encoder) if config.compile else encoder
    optimizer = empssl.new_optimizer(config, list(encoder.parameters()))
    augmentation, _ = empssl.augmentations(config, 32, 32)
    autocast = lambda: torch.autocast(device.type, torch.bfloat16, enabled=config.precision == "bf16")
    names = ("sampling", "patches", "forward", "loss", "backward", "optimizer")
    times = {name: [] for name in names}
    state = {}

    def sampling():
        state["params"] = empssl.sample_patches(b, n, (32, 32), augmentation, empssl.generator(0, "profile", len(times["sampling"])))

    def patches():
        state["x"] = empssl.cut(images, torch.randint(len(images), (b,)), state["params"], s, device, config.precision)

    def forward():
        with autocast():
            state["z"] = encode(state["x"]).unflatten(0, (n, b))

    def loss():                                                     # and its gradient, down to z
        leaf = state["z"].detach().requires_grad_()
        empssl.empssl_loss(leaf, config.lam, config.eps2).backward()
        state["grad"] = leaf.grad

    def backward():
        optimizer.zero_grad()
        state["z"].backward(state["grad"])
    calls = dict(sampling=sampling, patches=patches, forward=forward, loss=loss, backward=backward, optimizer=optimizer.step)
    for _ in range(steps + 2):
        for name in names:
            times[name].append(once(calls[name], device))
    encode = encoder                                                # whose operations can be counted
    with FlopCounterMode(display=False) as counter:
        forward()
    forward_flops, bf16 = counter.get_total_flops(), config.precision == "bf16"
    flops = product_rate(device, torch.bfloat16 if bf16 else torch.float32, tf32=torch.backends.cudnn.allow_tf32)
    float32_flops, bandwidth = product_rate(device, torch.float32), copy_rate(device)
    k, m = min(b, d), max(b, d)
    weights = sum(p.numel() for p in encoder.parameters())
    floors = {"sampling": seconds(lambda: torch.rand(16, n, b), torch.device("cpu")),       # 16 uniform numbers a patch
              "patches": n * b * 3 * s * s * (2 if bf16 else 4) / bandwidth,                # written once
              "forward": forward_flops / flops,
              "loss": max(n * (4 * k * k * m + k ** 3) / float32_flops,                     # Gram, Cholesky and inverse, gradient
                          3 * n * b * d * 4 / bandwidth),                                   # z read twice, its gradient written
              "backward": 2 * forward_flops / flops,        # to inputs and to weights; PyTorch's counter takes depthwise ones for dense
              "optimizer": 7 * 4 * weights / bandwidth}                                     # norms; then weight, gradient, momentum
    total = sum(statistics.median(t[2:]) for t in times.values())
    return [{"part": name, "seconds": statistics.median(times[name][2:]), "share": statistics.median(times[name][2:]) / total,
             "floor": floors[name]} for name in names]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--preset", default="auto", choices=("auto", *empssl.PRESETS))
    parser.add_argument("--precision", default="auto", choices=("auto", "bf16", "float32"))
    flags = parser.parse_args()
    with io.mistakes_in_one_sentence():
        config = io.settings(empssl.Config(preset=flags.preset, precision=flags.precision), empssl.PRESETS)
        config.patch_size = config.patch_size or 32
        parts = profile(config)
        for part in parts:
            print(f"{part['part']:10} {part['seconds'] * 1e3:8.1f} ms  {part['share']:6.1%}  {part['seconds'] / part['floor']:6.1f} times its floor")
        path = report.RESULTS / "profile" / f"{config.preset}-{config.device.split(':')[0]}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({"preset": config.preset, "seed": 0, **io.provenance(config.device), "parts": parts}, indent=1) + "\n")
