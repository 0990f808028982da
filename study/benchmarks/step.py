"""Where a training step's time goes, and how far each part is from its floor.

    python -m study.benchmarks.step --preset laptop

It takes the flags of empssl.py. Floors are measured in the same run: arithmetic at the rate of a
large matrix product, memory at the rate of a copy. A GPU is waited for after each part, so the sum
is more than a step. The record is kept in study/results/step.jsonl.
"""

import torch
from torch.utils.flop_counter import FlopCounterMode

import empssl
from empssl_support.cli import one_sentence
from empssl_support.machine import keep_freed_memory, provenance
from empssl_support.processes import distribute
from empssl_support.settings import read_settings
from study.benchmarks.timing import copy_rate, median_seconds, now, product_rate
from study.experiments.records import keep

PARTS = ("sampling", "patches", "forward", "loss", "backward", "optimizer")

# Of a patch in float32: resize 34, jitter 56 (hue most), grey 1, blur 16 (26 taps, one patch in
# ten), normalise 8.
OPERATIONS_A_PIXEL = 115


def seconds_of_parts(config: empssl.Config, encoder, images: torch.Tensor) -> list[float]:
    """Medians over eight steps of `empssl.train`, after two others."""
    n, b = config.patches, config.batch
    device = images.device
    dtype = empssl.dtype_of(config.precision)
    augmentation = empssl.training_augmentation(config, (32, 32))
    objective = empssl.Objective(config.lam, config.eps2)
    parameters = list(encoder.parameters())
    optimizer = empssl.new_optimizer(config, parameters, encoder.matrices())
    model = distribute(encoder, config.compile)
    times = []

    def lap():
        times.append(now(device))

    for t in range(10):
        index = torch.randint(len(images), (b,))
        chance = empssl.generator_of(config.seed, "patches", t)
        lap()
        params = empssl.sample_patches(b, n, (32, 32), augmentation, chance)
        lap()
        x = empssl.extract_patches(images, index, params, config.patch_size, dtype, device)
        lap()
        with empssl.autocast(device, config.precision):
            z = model(x).unflatten(0, (n, b))
        lap()
        # The loss and its gradient, down to the embeddings and no further.
        leaf = z.detach().requires_grad_()
        loss, _ = objective(leaf, x, index)
        loss.backward()
        lap()
        optimizer.zero_grad()
        z.backward(leaf.grad)
        lap()
        optimizer.step()
        lap()
    parts = torch.tensor(times, dtype=torch.float64).view(10, -1).diff()  # (10, 6)
    return parts[2:].median(0).values.tolist()


def floors(config: empssl.Config, encoder, device: torch.device) -> list[float]:
    """The least seconds that each part could take on this machine."""
    n, b, d, s = config.patches, config.batch, config.dim, config.patch_size
    dtype = empssl.dtype_of(config.precision)
    bandwidth = copy_rate(device)
    float32_rate = product_rate(device, torch.float32)
    # A GPU's float32 convolutions are TF32 products.
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32
    rate = product_rate(device, dtype)
    torch.backends.cuda.matmul.allow_tf32 = False
    sampling = median_seconds(lambda i: torch.rand(16, n, b), torch.device("cpu"))

    x = torch.zeros(n * b, 3, s, s, dtype=dtype, device=device)
    operations = n * b * s * s * OPERATIONS_A_PIXEL
    patches = max(x.nbytes / bandwidth, operations / float32_rate)
    with FlopCounterMode(display=False) as counter, empssl.autocast(device, config.precision):
        encoder(x)
    forward = counter.get_total_flops() / rate

    # The Gram matrix and its gradient, Cholesky and inverse; z is read twice, its gradient written.
    k, m = min(b, d), max(b, d)
    operations = n * (4 * k * k * m + k**3)
    moved = 3 * n * b * d * 4
    loss = max(operations / float32_rate, moved / bandwidth)

    # Backward goes to the inputs and to the weights. The optimizer takes norms, then reads and
    # writes weight, gradient and momentum.
    optimizer = 7 * sum(p.nbytes for p in encoder.parameters()) / bandwidth
    return [sampling, patches, forward, loss, 2 * forward, optimizer]


def main(argv: list[str] | None = None) -> None:
    config = read_settings(empssl.Config, empssl.PRESETS, argv, "Time the parts of a step.")
    config.patch_size = config.patch_size or 32
    keep_freed_memory()
    images = torch.randint(256, (10_000, 3, 32, 32)).to(config.device, torch.uint8)
    encoder = empssl.new_encoder(config, images)
    seconds = seconds_of_parts(config, encoder, images)
    rows = []
    least = floors(config, encoder, images.device)
    for part, time, floor in zip(PARTS, seconds, least, strict=True):
        share = time / sum(seconds)
        rows.append({"part": part, "seconds": time, "share": share, "floor": floor})
        print(f"{part:10} {time * 1e3:8.1f} ms  {share:6.1%}  {time / floor:6.1f} times its floor")
    name = f"{config.preset}-{config.device.split(':')[0]}-{config.precision}"
    record = {"name": name, "seed": config.seed, "preset": config.preset}
    record["precision"] = config.precision
    keep("step", record | provenance(config.device) | {"metrics": {"parts": rows}})


if __name__ == "__main__":
    with one_sentence():
        main()
