"""A run: its folder `runs/<name>/`, and what happens between two steps of its training.

The folder holds `config.json`, `metrics.jsonl` (a JSON object a line), `encoder.pt`,
`checkpoint.pt` and the one before it, and the features that were probed. Under torchrun process 0
alone writes, and every process must see the folder.
"""

import contextlib
import json
import math
import os
import shlex
import shutil
import time
from pathlib import Path

import filelock
import torch
from torch import Tensor

from empssl_support.cli import Stopped, UsageError, progress, signals
from empssl_support.files import named, read_checkpoint, save_encoder, write_text, write_torch
from empssl_support.machine import peak_memory, program, seconds_without_a_core
from empssl_support.processes import (
    agree_on_buffers,
    from_first,
    gather_objects,
    largest,
    rank,
    wait_for_first,
)
from empssl_support.settings import stored_settings


def records(folder: Path) -> list[dict]:
    """The lines of a run's `metrics.jsonl`."""
    path = folder / "metrics.jsonl"
    found = []
    for line in path.read_text(errors="replace").splitlines() if path.exists() else []:
        with contextlib.suppress(ValueError):  # a line that a kill cut short
            found.append(json.loads(line))
    return found


# ---- the folder ----


class RunFolder:
    """`runs/<name>/`, held by this process alone: `with RunFolder(...) as folder`.

    Raises `UsageError` where another process is at work in the folder, and where it holds a run
    that is neither resumed nor to be overwritten.
    """

    def __init__(self, path: Path, config: dict, resume: bool = False, force: bool = False):
        self.path = Path(path)
        self.config = config
        self.resume = resume
        self.force = force
        self.lock = filelock.FileLock(self.path / ".lock", timeout=0)
        self.saving = {"checkpoints": 0, "checkpoint_bytes": 0, "saving_seconds": 0.0}

    def __enter__(self) -> "RunFolder":
        if rank() == 0:
            self.refuse_to_overwrite()
            self.path.mkdir(parents=True, exist_ok=True)
            self.claim()
            self.clear()
            config = self.config | (stored_settings(self.path) if self.resume else {})
            if "data_dir" in self.config:  # the images may have moved
                config["data_dir"] = self.config["data_dir"]
            write_text(self.path / "config.json", json.dumps(config, indent=2))
        wait_for_first()
        return self

    def __exit__(self, kind, error, traceback) -> None:
        self.lock.release()
        if isinstance(error, Stopped) and "--resume" not in error.sentence:
            error.sentence += f"; to go on: {self.how_to_go_on()}"

    def refuse_to_overwrite(self) -> None:
        restarted = any(
            int(os.environ.get(f"{who}_RESTART_COUNT") or 0) for who in ("TORCHELASTIC", "SLURM")
        )
        empty = not self.path.exists() or (self.path.is_dir() and not any(self.path.iterdir()))
        if not self.resume and not empty and (restarted or not self.force):
            raise UsageError(
                f"{self.path} holds a run already; go on with it by --resume {self.path}, choose "
                f"another --name, or overwrite it with --force (which a job that torchrun or Slurm "
                f"has restarted may not)."
            )

    def claim(self) -> None:
        try:
            self.lock.acquire()
        except filelock.Timeout:
            raise UsageError(
                f"Another process is at work in {self.path}; wait for it or stop it first."
            ) from None
        except (NotImplementedError, OSError) as error:
            print(
                f"{self.path} cannot be locked ({error}): "
                f"see to it that no other process works in it."
            )

    def clear(self) -> None:
        """Remove what a kill left half written or, where the run begins, the run before."""
        for old in self.path.glob(".*.[0-9]*" if self.resume else "*"):
            if old.name == ".lock":
                continue
            if old.is_dir() and not old.is_symlink():
                shutil.rmtree(old)
            else:
                old.unlink()

    def how_to_go_on(self) -> str:
        return f"{shlex.join(program())} --resume {os.path.relpath(self.path)}"

    def log(self, record: dict) -> None:
        metrics = self.path / "metrics.jsonl"
        if rank() == 0:
            with named(metrics), open(metrics, "a") as out:
                out.write(json.dumps(record) + "\n")

    def finished(self) -> dict | None:
        """The last record of a run that has come to its end."""
        last = records(self.path)[-1:] if self.resume else []
        if not last or "probe_seconds" not in last[0]:
            return None
        print(f"{self.path} is finished: there is nothing to go on with.")
        return last[0]

    def finish(self, record: dict) -> dict:
        """Log what the run came to, with what it took. Returns that record."""
        record = record | {"device": self.config["hardware"]}
        record |= peak_memory(self.config["device"]) | self.saving
        self.log(record)
        print(f"written to {self.path}")
        return record

    # -- checkpoints --

    def save(self, state: dict) -> None:
        """Keep `state` as `checkpoint.pt`.

        The one before is only renamed, so that one of the two is whole at every moment.
        """
        started = time.perf_counter()
        path = self.path / "checkpoint.pt"

        def keep_the_previous():
            if path.exists():
                os.replace(path, self.path / "checkpoint-previous.pt")

        if rank() == 0:
            write_torch(path, state | {"config": self.config}, keep_the_previous)
            self.saving["checkpoint_bytes"] = path.stat().st_size
        wait_for_first()
        self.saving["checkpoints"] += 1
        self.saving["saving_seconds"] += time.perf_counter() - started

    def load(self) -> dict | None:
        """The newest whole checkpoint of a run that is resumed; None where there is none.

        Metrics that were logged after it are dropped.
        """
        if not self.resume:
            return None
        state, damaged = self.newest_checkpoint()
        step = state["step"] if state else 0
        if len(set(gather_objects(step))) > 1:
            raise UsageError(
                f"The processes read checkpoints of different steps in {self.path}; see that all "
                f"of them see the same files, and resume again."
            )
        if state is None:
            print(f"{self.path} holds no checkpoint yet: its training begins anew.")
        else:
            self.say_what_has_changed(state["config"])
        if damaged:
            previous = self.path / "checkpoint-previous.pt"
            print(f"{damaged} is damaged; going on from {previous}, of step {step}.")
        if rank() == 0:
            if damaged:  # aside, lest the next save take it for the one before
                os.replace(damaged, self.path / "checkpoint-damaged.pt")
            kept = [r for r in records(self.path) if r.get("step", math.inf) <= step]
            here = {key: self.config[key] for key in ("commit", "hardware", "started")}
            kept.append({"step": step, "resumed": here})
            text = "".join(json.dumps(record) + "\n" for record in kept)
            write_text(self.path / "metrics.jsonl", text)
        wait_for_first()
        return state

    def newest_checkpoint(self) -> tuple[dict | None, Path | None]:
        """The newest whole checkpoint, and the file that should have been it but is damaged."""
        damaged = None
        for name in ("checkpoint.pt", "checkpoint-previous.pt"):
            path = self.path / name
            if not path.exists():
                continue
            if state := read_checkpoint(path):
                return state, damaged
            damaged = damaged or path
        if damaged:
            raise UsageError(
                f"{damaged} is damaged and there is no whole one before it; start again with "
                f"--name {self.path.name} --force and the run's flags (config.json has them)."
            )
        return None, None

    def say_what_has_changed(self, before: dict) -> None:
        """Between the run's beginning and now; refuse other images than it began with."""
        now = self.config
        if before.get("images") != now.get("images"):
            raise UsageError(
                f"This run began with {before.get('images')} training images and there are now "
                f"{now.get('images')}; give --data-dir the images it began with, or start a new "
                f"run."
            )
        if before.get("data_key") != now.get("data_key"):
            print(
                "the images have changed since this run began, or lie elsewhere: "
                "the run goes on with what is there now."
            )
        for key, what in (("commit", "the code at {}"), ("processes", "{} processes")):
            if before.get(key) != now.get(key):
                print(
                    f"this run began with {what.format(before.get(key))} and goes on with "
                    f"{now.get(key)}: its end may differ from that of an unbroken run."
                )


# ---- between two steps ----


def nothing_to_add(epoch: int) -> dict:
    return {}


class Run:
    """The policy of a training: when it logs, checks, saves and stops; all of it is here.

    Every tenth step and each epoch's end are checked and logged. An epoch's end is also saved, with
    the encoder alone beside, and logged with what `at_epoch_end(epoch)` returns, a dict. Between
    them a checkpoint is due every `save_every` minutes. A signal is heeded after the step at hand.
    Without a folder nothing is written.
    """

    def __init__(self, folder: RunFolder | None = None, save_every=math.inf, at_epoch_end=None):
        self.folder = folder
        self.save_every = save_every
        self.at_epoch_end = at_epoch_end or nothing_to_add
        self.collapsed_rate = 0.0  # R of embeddings that are all equal: near it is a warning due
        self.told_of_other_work = False
        self.record = {}

    def restore(self, **parts) -> int:
        """The step to begin with: 0, or where the checkpoint in the folder was saved.

        `parts` are what has a state: encoder, optimizer, objective. They get the checkpoint's.
        """
        self.parts = parts
        state = self.folder.load() if self.folder else None
        if state:
            for name, part in parts.items():
                part.load_state_dict(state[name])
            self.record = state["record"]
        self.first = state["step"] if state else 0
        self.seconds_before = state["seconds"] if state else 0.0
        self.saved_at = time.monotonic()
        return self.first

    def steps(self, epochs: int, steps_an_epoch: int, patches_a_step: int):
        """The numbers of the steps to come, with a progress bar and a clock."""
        self.total = epochs * steps_an_epoch
        self.steps_an_epoch = steps_an_epoch
        self.patches_a_step = patches_a_step
        self.started = time.perf_counter()
        self.seconds_aside = 0.0
        self.without_a_core = seconds_without_a_core()
        bar = progress(total=self.total, initial=self.first, desc="training", unit="step")
        with signals.noted(), bar as self.bar:
            for t in range(self.first, self.total):
                yield t
                bar.update()

    def train_seconds(self) -> float:
        """Of training and saving, without what `at_epoch_end` takes."""
        return self.seconds_before + time.perf_counter() - self.started - self.seconds_aside

    def after_step(self, t: int, loss: Tensor, terms: dict[str, Tensor]) -> None:
        """Log, check, save and stop, each where its time has come.

        Raises `FloatingPointError`, before anything is saved, where the loss or a weight is not
        finite, and `Stopped` after a signal.
        """
        step = t + 1
        epoch_ends = step % self.steps_an_epoch == 0
        if step % 10 == 0 or epoch_ends:
            self.log_step(step, loss, terms)
        if epoch_ends:
            self.end_epoch(step)
        # The processes decide together, as each may have heard a signal of its own.
        minutes = (time.monotonic() - self.saved_at) / 60
        heard, due = largest([signals.heard, minutes >= self.save_every])
        if self.folder and (heard or due or epoch_ends):
            self.save(step)
        if heard:
            self.stop(int(heard), step)

    def log_step(self, step: int, loss: Tensor, terms: dict[str, Tensor]) -> None:
        if not loss.isfinite():
            self.refuse(step)
        lr = self.parts["optimizer"].param_groups[0]["lr"]
        speed = (step - self.first) * self.patches_a_step
        speed /= self.train_seconds() - self.seconds_before
        terms = {name: value.item() for name, value in terms.items()}
        self.record = {"step": step, "epoch": step / self.steps_an_epoch, **terms}
        self.record |= {"loss": loss.item(), "lr": lr, "patches_per_second": speed}
        self.log(self.record)
        self.warn_of_collapse(step, terms)
        self.tell_of_other_work()
        shown = [f"{name} {value:.4g}" for name, value in terms.items()]
        self.bar.set_postfix_str("  ".join([*shown, f"lr {lr:.3f}", f"{speed:.0f} patches/s"]))

    def warn_of_collapse(self, step: int, terms: dict[str, float]) -> None:
        """Once: where embeddings collapse, R ends within a tenth of what it cannot fall below."""
        if terms.get("R", math.inf) > 1.1 * self.collapsed_rate:
            return
        self.bar.write(
            f"warning: at step {step} R is {terms['R']:.2f}, and {self.collapsed_rate:.2f} where "
            f"all embeddings are equal: the encoder has collapsed; lower --lam or --lr."
        )
        self.collapsed_rate = 0.0  # said

    def tell_of_other_work(self) -> None:
        """Once, after ten seconds: each layer waits for the last of the threads, so one that
        shares its core with another program holds up all of them."""
        seconds = time.perf_counter() - self.started
        threads = torch.get_num_threads()
        if self.told_of_other_work or seconds < 10 or threads == 1:
            return
        self.told_of_other_work = True
        waited = seconds_without_a_core() - self.without_a_core
        if waited > 0.2 * seconds:
            self.bar.write(
                f"other programs keep the cores busy, and each step waits for them: "
                f"with OMP_NUM_THREADS={threads - 1} before the command it may be faster."
            )

    def end_epoch(self, step: int) -> None:
        began = time.perf_counter()
        epoch = step // self.steps_an_epoch
        encoder = self.parts["encoder"]
        record = {"step": step, "epoch": epoch, "train_seconds": self.train_seconds()}
        self.check_weights(step)
        agree_on_buffers(encoder)
        if self.folder:
            from_first(lambda: save_encoder(self.folder.path / "encoder.pt", encoder))
        self.log(record | self.at_epoch_end(epoch))
        self.seconds_aside += time.perf_counter() - began

    def save(self, step: int) -> None:
        self.check_weights(step)
        state = {name: part.state_dict() for name, part in self.parts.items()}
        state |= {"step": step, "seconds": self.train_seconds(), "record": self.record}
        self.folder.save(state)
        self.saved_at = time.monotonic()

    def check_weights(self, step: int) -> None:
        if not all(p.isfinite().all() for p in self.parts["encoder"].parameters()):
            self.refuse(step)

    def refuse(self, step: int) -> None:
        raise FloatingPointError(
            f"Loss or weights were not finite at step {step} of {self.total}; what was saved "
            f"before is kept. Try a smaller --lr or --precision float32."
        )

    def stop(self, number: int, step: int) -> None:
        saved = f", and saved; to go on: {self.folder.how_to_go_on()}" if self.folder else ""
        raise Stopped(number, f"stopped after step {step} of {self.total}{saved}")

    def log(self, record: dict) -> None:
        if self.folder:
            self.folder.log(record)

    def summary(self) -> dict:
        """What the training came to: its last terms, its seconds, the patches that it saw."""
        last = {key: self.record[key] for key in self.record if key not in LOGGED_ALONE}
        return last | {
            "train_seconds": self.train_seconds(),
            "patches_seen": self.total * self.patches_a_step,
        }


# What a log line has beside the terms of the loss.
LOGGED_ALONE = ("step", "epoch", "loss", "lr", "patches_per_second")
