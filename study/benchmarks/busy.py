"""Training beside a program that keeps one core busy: python -m study.benchmarks.busy

Preset laptop on random pixels, undisturbed and beside the busy core, with OpenMP's threads set in
several ways. Let nothing else run. The record is kept in study/results/busy.jsonl.
"""

import os
import subprocess
import sys

import torch

import empssl
from empssl_support.cli import one_sentence, progress
from empssl_support.machine import keep_freed_memory, provenance
from empssl_support.settings import read_settings
from study.experiments.records import keep

WAYS = {
    "as it is": {},
    "one thread": {"OMP_NUM_THREADS": "1"},
    "threads bound to cores": {"OMP_PROC_BIND": "true"},
    "threads that never spin": {"GOMP_SPINCOUNT": "0"},
    "threads that spin longer": {"GOMP_SPINCOUNT": "20000"},
}
BUSY = "while True: pass"
IMAGES = 5_000


def patches_a_second() -> float:
    """Of this process: an epoch of the preset, after a first, shorter one."""
    keep_freed_memory()
    flags = ["--dataset", "shapes", "--preset", "laptop", "--device", "cpu"]
    config = read_settings(empssl.Config, empssl.PRESETS, flags, "")
    config.patch_size = 16
    images = torch.randint(256, (IMAGES, 3, 32, 32)).to(torch.uint8)
    encoder = empssl.new_encoder(config, images)
    augmentation = empssl.training_augmentation(config, (32, 32))
    empssl.train(encoder, images[:1000], config, augmentation)
    record = empssl.train(encoder, images, config, augmentation)
    return record["patches_seen"] / record["train_seconds"]


def measure(changes: dict[str, str]) -> float:
    """Of another process: OpenMP reads its environment once, at the start."""
    command = [sys.executable, "-m", "study.benchmarks.busy", "this-process"]
    how = {"env": os.environ | changes, "text": True, "stderr": subprocess.DEVNULL}
    return float(subprocess.check_output(command, **how).split()[-1])


def rows() -> list[dict]:
    found = []
    for way, changes in progress(WAYS.items(), desc="ways", unit="way"):
        alone = measure(changes)
        with subprocess.Popen([sys.executable, "-c", BUSY]) as busy:
            try:
                beside = measure(changes)
            finally:
                busy.kill()
        found.append({"way": way, "environment": changes, "alone": alone, "beside": beside})
        print(f"{way}: {alone:,.0f} patches/s alone, {beside:,.0f} beside a busy core", flush=True)
    return found


def main(argv: list[str] | None = None) -> None:
    if (sys.argv[1:] if argv is None else argv) == ["this-process"]:
        print(patches_a_second())
        return
    about = provenance("cpu") | {"name": "busy-core", "seed": 0}
    keep("busy", about | {"metrics": {"rows": rows()}})


if __name__ == "__main__":
    with one_sentence():
        main()
