"""Kill one training again and again, and see that it ends in the weights of a training that nobody touched.

    python tests/kill.py --kills 20                         prints what happened
    python tests/kill.py --kills 20 --record results/kill.json

Each round starts `empssl.py --resume` with a checkpoint due at every step and sends SIGKILL: every other time at a
random moment, otherwise as soon as the temporary file of a checkpoint appears, so that it dies while writing.
"""

import argparse
import json
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import empssl_io as io      # noqa: E402

RECIPE = ["--dataset", "shapes", "--subset", "800", "--preset", "laptop", "--device", "cpu", "--batch", "20", "--patches", "4",
          "--hidden", "256", "--projector", "256", "--dim", "64", "--eval-patches", "1", "--save-every", "0"]        # 40 steps an epoch


def start(folder: Path, *arguments: str) -> subprocess.Popen:
    return subprocess.Popen([sys.executable, ROOT / "empssl.py", *arguments], cwd=folder, stdout=subprocess.DEVNULL,
                            stderr=subprocess.PIPE)


def finish(process: subprocess.Popen) -> None:
    error = process.communicate()[1].decode()
    if process.returncode:
        raise SystemExit(f"a run that nobody killed ended with code {process.returncode}: {error[-2000:]}")


def weights(folder: Path, name: str) -> dict:
    return torch.load(folder / "runs" / name / "encoder.pt", weights_only=True)["weights"]


def lines(run: Path) -> int:
    return (run / "metrics.jsonl").read_bytes().count(b"\n") if (run / "metrics.jsonl").exists() else 0


def kill_and_resume(folder: Path, kills: int, epochs: int, seed: int = 0) -> dict:
    chance = random.Random(seed)
    finish(start(folder, *RECIPE, "--epochs", str(epochs), "--name", "whole"))
    run, done, writing, steps = folder / "runs" / "killed", 0, 0, []
    process = start(folder, *RECIPE, "--epochs", str(epochs), "--name", "killed")
    while done < kills:
        while process.poll() is None and not (run / "checkpoint.pt").exists():
            time.sleep(0.01)
        first = lines(run)
        while process.poll() is None and lines(run) == first and done:          # it has begun to train
            time.sleep(0.01)
        deadline = time.monotonic() + chance.uniform(0, 1.0)
        while process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.001)
        if done % 2:
            while process.poll() is None and not list(run.glob(".checkpoint.pt.*")):
                pass
        if process.poll() is not None:
            raise SystemExit(f"the run ended after {done} kills, before the next; give more --epochs")
        process.kill()
        process.communicate()
        writing += bool(list(run.glob(".checkpoint.pt.*")))
        saved = io.RunFolder(run, json.loads((run / "config.json").read_text()), resume=True).load()
        io.release_folders()
        steps.append(saved["step"] if saved else 0)
        done += 1
        process = start(folder, "--resume", "runs/killed")
    finish(process)
    ours, theirs = weights(folder, "killed"), weights(folder, "whole")
    return {"kills": done, "died_while_writing_a_checkpoint": writing, "steps_at_each_resume": steps, "of_steps": 40 * epochs,
            "equal_weights": all(torch.equal(ours[k], theirs[k]) for k in theirs)}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--record", type=Path, help="write the outcome there")
    flags = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        outcome = kill_and_resume(Path(folder), flags.kills, flags.epochs)
    print(json.dumps(outcome))
    if flags.record:
        flags.record.parent.mkdir(parents=True, exist_ok=True)
        flags.record.write_text(json.dumps({"seed": 0, **io.provenance("cpu"), "metrics": outcome}, indent=1) + "\n")
    sys.exit(not outcome["equal_weights"])
