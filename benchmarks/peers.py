"""EMP-SSL and the other methods at equal epochs and at equal seconds: python benchmarks/peers.py [--seeds 3] [NAME ...]

On a CPU: preset laptop on 15,000 images of CIFAR-10's JPEG copy, so that one epoch of EMP-SSL takes three minutes on two
cores. On a GPU: the paper's preset on all of CIFAR-10. A method's epochs at equal seconds come from its own run of one
epoch and EMP-SSL's. Each run is resumed if it was cut off, and left alone once it has a record in results/peers/.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import empssl_io as io      # noqa: E402
import report               # noqa: E402

PEERS = report.RESULTS / "peers"
METHODS = {                             # each on EMP-SSL's patches but for ReSSL's two kinds and the noise
    "empssl": "",
    "simclr": "--method simclr --augmentation light",
    "simclr-one-negative": "--method simclr --augmentation light --negatives 1",
    "simclr-noise": "--method simclr --augmentation noise --noise 0.2",
    "vicreg": "--method vicreg --augmentation light",
    "byol": "--method byol --augmentation light",
    "swav": "--method swav --augmentation light",
    "ressl": "--method ressl",
    "single": "--method single --augmentation light",
}
ABLATIONS = {                           # at equal seconds, one seed
    "single-random-bank": "--method single --augmentation light --bank-start random",
    "single-moving-average": "--method single --augmentation light --bank-update average",
    "single-no-distillation": "--method single --augmentation light --distillation 0",
    "single-none-of-the-three": "--method single --augmentation light --bank-start random --bank-update average --distillation 0",
    "simclr-published-views": "--method simclr --crops published",
    "simclr-batch-64": "--method simclr --augmentation light --batch 64",
    "empssl-upsampled-32": "--patch-size 32",
    "empssl-sizes-8-16": "--patch-size 16 --size-schedule 8:0.5,16:0.5",
    "empssl-no-last-stage": "--drop-last-stage",
    "empssl-no-lars": "--optimizer sgd",
    "empssl-lambda-10": "--lam 10",
    "empssl-lambda-400": "--lam 400",
    "empssl-batch-50": "--batch 50",
    "empssl-batch-200": "--batch 200",
    "empssl-2-patches": "--patches 2",
    "empssl-5-patches": "--patches 5",
    "empssl-10-patches": "--patches 10",
    "empssl-centre-crop-at-evaluation": "--eval-patches 1",
}
FEWER_IMAGES = {                        # the same patches seen, of fewer images: one epoch
    "empssl-60-patches-of-5000": "--patches 60 --subset 5000",
    "empssl-200-patches-of-1500": "--patches 200 --subset 1500",
}


def common(gpu: bool) -> list[str]:
    """The bench: data, preset and evaluation, the same for all."""
    if gpu:
        return ["--dataset", "cifar10", "--preset", "paper"]
    return ["--dataset", "imagefolder", "--data-dir", "data/cifar10-jpeg", "--preset", "laptop", "--device", "cpu", "--subset", "15000",
            "--eval-patches", "9"]


def seconds(name: str) -> float:
    return json.loads((PEERS / f"{name}.json").read_text())["metrics"]["train_seconds"]


def run(name: str, flags: list[str]) -> None:
    if (PEERS / f"{name}.json").exists():
        return
    folder = io.RUNS / f"peers-{name}"
    half_way = (ROOT / folder / "config.json").exists()
    method = [] if "--method" in flags else ["--method", "empssl"]
    command = ["--resume", str(folder)] if half_way else [*method, *flags, "--name", folder.name]
    print("python baselines.py", *command, flush=True)
    subprocess.run([sys.executable, "baselines.py", *command], cwd=ROOT, check=True)
    report.keep_record(ROOT / folder, "peers", name)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=3, help="of the methods; an ablation has one")
    parser.add_argument("names", nargs="*", help="methods and ablations to run (all)")
    flags = parser.parse_args()
    known = [*METHODS, *ABLATIONS, *FEWER_IMAGES]
    if unknown := set(flags.names) - set(known):
        raise io.UsageError(f"there is no {', '.join(sorted(unknown))}; choose from {', '.join(known)}.")
    bench = common(torch.cuda.is_available())
    wanted = flags.names or known

    def at_equal_seconds(name: str, arguments: str, seed: int) -> None:
        rest = [*bench, *arguments.split(), "--seed", str(seed)]
        run(f"{name}-1-epoch-seed{seed}", [*rest, "--epochs", "1"])
        epochs = max(1, round(seconds(f"empssl-1-epoch-seed{seed}") / seconds(f"{name}-1-epoch-seed{seed}")))
        if epochs > 1:
            run(f"{name}-equal-seconds-seed{seed}", [*rest, "--epochs", str(epochs)])
    for seed in range(flags.seeds):
        run(f"empssl-1-epoch-seed{seed}", [*bench, "--seed", str(seed), "--epochs", "1"])
        for name in METHODS:
            if name in wanted:
                at_equal_seconds(name, METHODS[name], seed)
        for name, arguments in (ABLATIONS | FEWER_IMAGES).items() if seed == 0 else ():
            if name in wanted:
                at_equal_seconds(name, arguments, seed)
    report.main(["--peers"])


if __name__ == "__main__":
    with io.mistakes_in_one_sentence():
        main()
