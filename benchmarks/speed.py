"""The official way, preset `paper` and preset `fast`, side by side in one run: python benchmarks/speed.py [--rehearse] [--search]

1. The official way is rebuilt (PIL patches in worker processes, float32, one d x d log-determinant a patch) and its loss compared
   with ours. It gets our LARS and pinned batches, so it is a little faster here than as published. Then each way's patches/s,
   and where a step's time goes, with the floor of each part: the official one and `paper` in float32, `paper` in bf16, `fast`.
2. A step of 20,000 patches in one forward (200 an image), in bf16 and in float32: its memory, or that it does not fit.
3. `paper`, in bf16, and `fast` train for one epoch and for ten, probed after each; seconds to 80, 85 and 90 %, compiling
   included. The official way sees the patches that `paper` sees, so its seconds are those patches over its own patches/s.
--search tries changes of `fast` on 45,000 training images, scored on the other 5,000: results/speed/tries/.
--rehearse runs all of it small, on a CPU too, to results/rehearsal/. What has a record of the same recipe on the same hardware is
not run again, and a run that was cut off goes on.
"""

import argparse
import contextlib
import dataclasses
import functools
import itertools
import json
import math
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]
import empssl               # noqa: E402
import empssl_io as io      # noqa: E402
import empssl_ops           # noqa: E402
import evidence             # noqa: E402
import laptop               # noqa: E402
import ops                  # noqa: E402
import report               # noqa: E402
import step                 # noqa: E402

WAYS = {"official": "--preset paper --precision float32", "paper": "--preset paper --precision float32",
        "paper-bf16": "--preset paper --precision auto", "fast": "--preset fast"}
SMALL = "--subset 300 --patches 2 --batch 20 --eval-patches 1 --eval-augmentation grid --hidden 64 --projector 64 --dim 32"      # a rehearsal


@contextlib.contextmanager
def replaced(owner, name: str, by):
    before = getattr(owner, name)
    setattr(owner, name, by)
    try:
        yield
    finally:
        setattr(owner, name, before)


def cuda_graphs():
    """The compiled encoder's passes are captured and replayed."""
    return replaced(torch, "compile", functools.partial(torch.compile, mode="reduce-overhead"))


def compiled_optimizer():
    """LARS's many small kernels, fused."""
    before = empssl.new_optimizer

    def new_optimizer(config, parameters):
        optimizer = before(config, parameters)
        optimizer.step = torch.compile(optimizer.step)
        return optimizer
    return replaced(empssl, "new_optimizer", new_optimizer)


class Try(NamedTuple):
    predicted: str              # points of holdout accuracy, and patches/s, over preset fast after as many epochs
    flags: str
    change: Callable[[], contextlib.AbstractContextManager] = contextlib.nullcontext       # what is no flag


TRIES = {
    "as-it-is": Try("0.84 after one epoch", ""),
    "upsampled": Try("+1, at a quarter of the patches/s: the blown-up crop has nothing new, but finer maps", "--patch-size 32"),
    "all-stages": Try("+0.5, at 0.7 of the patches/s", "--no-drop-last-stage"),
    "sizes": Try("-0.5, at 1.3 times the patches/s", "--size-schedule 12:0.5,16:0.5"),
    "paper-colours": Try("-1: blur and solarizing hurt small crops", "--augmentation paper"),
    "patches-10": Try("-1.5, at half the seconds", "--patches 10"),
    "patches-50": Try("+1, at 2.5 times the seconds", "--patches 50"),
    "batch-50": Try("+0.5: twice the steps", "--batch 50 --lam 100"),
    "batch-200": Try("-1: half the steps", "--batch 200"),
    "lr-0.15": Try("-0.5", "--lr 0.15"),
    "lr-0.6": Try("0: with the clip the learning rate is a cap", "--lr 0.6"),
    "warm-up": Try("0: LARS's clip bounds the first steps already", "", functools.partial(laptop.changed_schedule, 50)),
    "lambda-100": Try("0", "--lam 100"),
    "wide": Try("+1, at 0.9 of the patches/s: twice the features to probe", "--hidden 4096"),
    "narrow-projector": Try("-0.3, at 1.05 times the patches/s", "--projector 1024"),
    "no-lars": Try("-20: an independent run lost 31", "--optimizer sgd"),
    "adamw": Try("-3", "--optimizer adamw --lr 0.001 --weight-decay 0.01"),
    "eager": Try("0, at 0.8 of the patches/s", "--no-compile"),
    "graphs": Try("0, at 1.1 times the patches/s: some 200 launches less a step", "", cuda_graphs),
    "compiled-optimizer": Try("0, at 1.1 times the patches/s: some 300 launches less a step", "", compiled_optimizer),
    "float32": Try("0, at 0.4 of the patches/s", "--precision float32"),
    "eval-patches-4": Try("-1.5, probed four times as soon", "--eval-patches 4"),
    "eval-patches-64": Try("+0.3, probed four times as late", "--eval-patches 64"),
    "ten-epochs": Try("0.90 after ten", "--epochs 10"),
    "ten-epochs-patches-10": Try("-0.5 after ten, in half the seconds", "--epochs 10 --patches 10"),
    "ten-epochs-all-stages": Try("+1 after ten, at 0.7 of the patches/s: in a long run the last stage learns", "--epochs 10 --no-drop-last-stage"),
    "ten-epochs-upsampled": Try("+1.5 after ten, at a quarter of the patches/s", "--epochs 10 --patch-size 32"),
}


def data_flags() -> str:
    """CIFAR-10 where it is, else its JPEG copy."""
    with open(os.devnull, "w") as nowhere:
        try:
            stdout, sys.stdout = sys.stdout, nowhere
            io.load_dataset("cifar10")
            return "--dataset cifar10"
        except io.UsageError:
            return "--dataset imagefolder --data-dir data/cifar10-jpeg"
        finally:
            sys.stdout = stdout


# ---- 1. patches a second, and where they go ----

class OfficialPatches(torch.utils.data.Dataset):
    """n patches of an image, by PIL."""

    def __init__(self, images: torch.Tensor, n: int, s: int):
        self.images, self.n, self.one_patch = images.permute(0, 2, 3, 1).numpy(), n, ops.official_pipeline(s)

    def __len__(self):
        return len(self.images)

    def __getitem__(self, i):
        image = Image.fromarray(self.images[i])
        return torch.stack([self.one_patch(image) for _ in range(self.n)])           # (n, 3, s, s)


def official_loss(z: torch.Tensor, lam: float, eps2: float) -> torch.Tensor:
    mean = z.mean(0)
    return -ops.official_loop(z, eps2) - lam * sum(F.cosine_similarity(Z, mean, dim=-1).mean() for Z in z) / len(z)


def check_official_loss() -> None:
    z = F.normalize(torch.randn(3, 20, 16, dtype=torch.float64), dim=-1)
    theirs, ours = official_loss(z, 200.0, 0.2).item(), empssl.empssl_loss(z, 200.0, 0.2).item()
    assert abs(theirs - ours) < 1e-9 * abs(ours), f"the official loss is {theirs} and ours {ours}: nothing is timed"


def official(config: empssl.Config, images: torch.Tensor, warm: int, steps: int) -> dict:
    """Seconds of each part of an official step, one after the other as there, and patches/s of whole steps."""
    n, b, device = config.patches, config.batch, torch.device(config.device)
    encoder = empssl.new_encoder(config, images).to(memory_format=torch.contiguous_format).train()
    optimizer = empssl.new_optimizer(config, list(encoder.parameters()))
    workers = len(os.sched_getaffinity(0))
    warm = max(warm, 4 * workers)                                   # until the workers' queues are not a head start
    loader = torch.utils.data.DataLoader(OfficialPatches(images, n, config.patch_size), b, shuffle=True, drop_last=True,
                                         num_workers=workers, pin_memory=device.type == "cuda", persistent_workers=True)
    batches = itertools.chain.from_iterable(loader for _ in itertools.count())
    times = {name: [] for name in ("patches", "forward", "loss", "backward", "optimizer")}
    state, started = {}, 0.0

    def patches():
        state["x"] = next(batches).transpose(0, 1).flatten(0, 1).to(device)                 # (n*b, 3, s, s)

    def forward():
        state["z"] = encoder(state["x"]).unflatten(0, (n, b))

    def loss():
        state["loss"] = official_loss(state["z"], config.lam, config.eps2)

    def backward():
        optimizer.zero_grad()
        state["loss"].backward()
    calls = dict(patches=patches, forward=forward, loss=loss, backward=backward, optimizer=optimizer.step)
    for i in range(warm + steps):
        if i == warm:
            started = time.perf_counter()
        for name, call in calls.items():
            times[name].append(step.once(call, device))
    seconds = (time.perf_counter() - started) / steps
    return {"patches_per_second": n * b / seconds, "step_seconds": seconds, "workers": workers,
            "parts": [{"part": name, "seconds": sum(t[warm:]) / steps, "share": sum(t[warm:]) / steps / seconds} for name, t in times.items()]}


def ours(config: empssl.Config, images: torch.Tensor, warm: int, steps: int) -> dict:
    """The same of `empssl.train`, whole steps as they run, then its parts one by one and the share of time without a kernel."""
    device, clock = torch.device(config.device), []
    encoder = empssl.new_encoder(config, images)
    augmentation, _ = empssl.augmentations(config, *images.shape[2:])
    total = warm + steps
    epochs = -(-total * config.batch // len(images))
    read = lambda record: clock.append((record["step"], time.perf_counter()))       # the record's figures have been read by then
    empssl.train(encoder, images.to(device), dataclasses.replace(config, epochs=epochs), augmentation, read)
    (first, began), (last, ended) = clock[0], clock[-1]
    seconds = (ended - began) / (last - first)
    return {"patches_per_second": config.patches * config.batch / seconds, "step_seconds": seconds, "idle": idle(config, images),
            "parts": step.profile(config)}


def idle(config: empssl.Config, images: torch.Tensor, steps: int = 100) -> float | None:
    """Share of the time from the first kernel of a training to its last in which none runs; None on a CPU."""
    if not config.device.startswith("cuda"):
        return None
    encoder = empssl.new_encoder(config, images)
    augmentation, _ = empssl.augmentations(config, *images.shape[2:])
    images = images[:steps * config.batch].to(config.device)
    run = lambda: empssl.train(encoder, images, dataclasses.replace(config, epochs=1), augmentation)
    run()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
        run()
        torch.cuda.synchronize()
    return idle_share([(e.time_range.start, e.time_range.end) for e in profiler.events() if e.device_type == torch.autograd.DeviceType.CUDA])


def idle_share(spans: list[tuple[float, float]]) -> float:
    """Share of the time between the first start and the last end that no span covers."""
    assert spans, "the profiler saw no kernel: idle time cannot be said"
    busy, until = 0.0, -math.inf
    for start, end in sorted(spans):
        busy += max(0.0, end - max(start, until))
        until = max(until, end)
    return 1 - busy / (until - min(spans)[0])


def measure(way: str, flags: str, warm: int, steps: int) -> dict:
    config = evidence.settled(flags.split())
    config.patch_size = config.patch_size or 32
    data = io.load_dataset(config.dataset, config.data_dir, config.image_size, config.subset)
    found = (official if way == "official" else ours)(config, data.train_images, warm, steps)
    device = torch.device(config.device)
    return recorded(config, flags) | {"way": way, "float32_rate": step.product_rate(device, torch.float32),
                                      "copy_bandwidth": step.copy_rate(device)} | found


def recorded(config: empssl.Config, flags: str) -> dict:
    return dataclasses.asdict(config) | io.provenance(config.device) | {
        "command": f"python benchmarks/speed.py, of {flags}",
        "ops": empssl_ops.describe(torch.device(config.device), config.patch_size, min(config.batch, config.dim))}


# ---- 2. 20,000 patches in one forward ----

def memory(flags: str) -> dict:
    """Peak GPU memory, in bytes, of two training steps, and what the GPU has; None where they do not fit, or on a CPU."""
    config = evidence.settled(flags.split())
    config.patch_size = config.patch_size or 32
    data, device = io.load_dataset(config.dataset, config.data_dir, config.image_size, config.subset), torch.device(config.device)
    images = data.train_images[:2 * config.batch].to(device)
    augmentation, _ = empssl.augmentations(config, *images.shape[2:])
    found = {"patches_in_one_forward": config.patches * config.batch, "peak_bytes": None, "device_bytes": None}
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        found["device_bytes"] = torch.cuda.mem_get_info()[1]
    try:
        empssl.train(empssl.new_encoder(config, images), images, dataclasses.replace(config, epochs=1), augmentation)
        found["peak_bytes"] = torch.cuda.max_memory_allocated() if device.type == "cuda" else None
    except torch.OutOfMemoryError as error:
        print(f"{flags}: does not fit ({str(error).splitlines()[0]})")
    return recorded(config, flags) | found


# ---- 3. seconds to an accuracy: runs of empssl.py ----

def training_runs(flags: str, seeds: int) -> list[evidence.Run]:
    each = lambda epochs: f" --probe-epochs {','.join(map(str, range(1, epochs)))}" if epochs > 1 else ""
    return [evidence.Run(f"{way}-{epochs}-epochs-seed{seed}", f"{flags} {WAYS[way]} --epochs {epochs} --seed {seed}{each(epochs)}")
            for seed in range(seeds) for way in ("fast", "paper-bf16") for epochs in (1, 10)]


# ---- the search for preset fast ----

def search(name: str, flags: str, folder: Path) -> None:
    chosen = TRIES[name]
    config = evidence.settled([*flags.split(), "--preset", "fast", *chosen.flags.split()])
    data = io.load_dataset(config.dataset, config.data_dir, config.image_size, config.subset)
    held = min(5000, len(data.train_images) // 10)
    (images, labels), (held_out, their_labels) = laptop.holdout_split(data, held)
    images = images.to(config.device)
    encoder, log = empssl.new_encoder(config, images), []
    augmentation, at_eval = empssl.augmentations(config, *images.shape[2:])
    try:
        with chosen.change():
            metrics = empssl.train(encoder, images, config, augmentation, log.append)
        h, held_h = (empssl.features(encoder, io.Dataset(x, None, None, None, [], ""), config, at_eval)[0] for x in (images, held_out))
        metrics["holdout_linear_top1"] = empssl.linear_probe(h, labels, held_h, their_labels)[0]
        metrics["patches_per_second"] = steady_rate([r for r in log if "patches_per_second" in r], config.patches * config.batch)
        gave = f"{metrics['holdout_linear_top1']:.4f}, {metrics['patches_per_second']:,.0f} patches/s"
    except (FloatingPointError, RuntimeError) as error:             # it diverged, or does not fit: a miss like others
        gave = (str(error) or type(error).__name__).splitlines()[0]
        metrics = {"failed": gave}
    print(f"{name}: predicted {chosen.predicted}; gave {gave}")
    save(folder / f"{name}.json", {"try": name, "predicted": chosen.predicted, "flags": chosen.flags, "seed": config.seed,
                                   **io.provenance(config.device), "metrics": metrics, "log": log[4::5]})


def steady_rate(log: list[dict], patches: int) -> float:
    """Patches a second from the log's second line on: what is compiled or tuned at first is left out. Of one line, its own rate."""
    if len(log) == 1:
        return log[0]["patches_per_second"]
    seconds = lambda r: r["step"] * patches / r["patches_per_second"]                # the log's rate is since the start
    first, last = log[min(1, len(log) - 2)], log[-1]
    return (last["step"] - first["step"]) * patches / (seconds(last) - seconds(first))


def save(path: Path, record: dict) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record, indent=1) + "\n")
    print(f"kept as {path.relative_to(report.RESULTS.parent)}")


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rehearse", action="store_true", help="small, and on a CPU too")
    parser.add_argument("--search", action="store_true", help="try changes of preset fast on a holdout")
    parser.add_argument("--seeds", type=int, default=3)
    flags = parser.parse_args(argv)
    if not (evidence.GPU or flags.rehearse):
        raise io.UsageError("This compares ways to use a GPU and PyTorch sees none; rehearse it small with --rehearse.")
    data = f"{data_flags()} {SMALL}" if flags.rehearse else data_flags()
    folder = report.RESULTS / ("rehearsal/speed" if flags.rehearse else "speed")
    what = f"{len(TRIES)} tries" if flags.search else f"{', '.join(WAYS)}, then runs of 1 and 10 epochs, {1 if flags.rehearse else flags.seeds} seeds"
    print(f"speed: {what} (how long: not measured); records in {folder.relative_to(report.RESULTS.parent)}/")
    if evidence.GPU:
        for op, size in (("extract_patches", 32), ("logdet_spd", 100)):
            compiled, why = empssl_ops.implementation(op, torch.device("cuda"), size, torch.float32)
            if not compiled:
                raise io.UsageError(f"The compiled {op} is not in use on this GPU ({why}); build it with pip install -e . first.")
    check_official_loss()
    if flags.search:
        for name, chosen in TRIES.items():
            path = folder / "tries" / f"{name}.json"
            if not (path.exists() and json.loads(path.read_text())["flags"] == chosen.flags):
                search(name, data, folder / "tries")
        return
    hardware = io.provenance("cuda" if evidence.GPU else "cpu")["hardware"]
    known = lambda path, flags: (path.exists() and evidence.same_recipe(path, flags.split())
                                 and json.loads(path.read_text())["hardware"] == hardware)
    warm, steps = (10, 10) if flags.rehearse else (20, 200)
    for way, its in WAYS.items():
        path, recipe = folder / f"{way}.json", f"{its} {data}"
        if not known(path, recipe):
            record = measure(way, recipe, warm, steps)
            print(f"{way}: {record['patches_per_second']:,.0f} patches/s")
            save(path, record)
    for precision in ("bf16", "float32"):
        path, recipe = folder / f"memory-{precision}.json", f"--preset paper {data} --patches {4 if flags.rehearse else 200} --precision {precision}"
        if not known(path, recipe):
            save(path, memory(recipe))
    for run in training_runs(data, 1 if flags.rehearse else flags.seeds):
        evidence.start(run, str(folder.relative_to(report.RESULTS)))


if __name__ == "__main__":
    with io.mistakes_in_one_sentence():
        main()
