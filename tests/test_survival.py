"""Whole processes that are killed, cut off from their terminal, or out of disk."""

import contextlib
import os
import pty
import random
import select
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent
RUNS = Path("runs")
RECIPE = (
    "--dataset shapes --subset 400 --preset laptop --device cpu --patches 3 --batch 20 "
    "--patch-size 8 --hidden 16 --projector 16 --dim 8 --eval-patches 1"
).split()  # 20 steps an epoch
pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("in_tmp")]

# Children hear signals even where whoever started the tests has had them ignored.
HEAR = (
    "import signal; signal.signal(signal.SIGINT, signal.default_int_handler); "
    "signal.signal(signal.SIGHUP, signal.SIG_DFL)\n"
)


@pytest.fixture
def program():
    """Start `empssl.py` in a process of its own, which does not outlive the test."""
    started = []

    def start(*arguments, **how):
        command = [sys.executable, ROOT / "empssl.py", *arguments]
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True}
        started.append(subprocess.Popen(command, **quiet | how))
        return started[-1]

    yield start
    for process in started:
        process.kill()


def python(code, **how):
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [sys.executable, "-c", HEAR + code], env=environment, capture_output=True, text=True, **how
    )


def weights(name):
    return torch.load(RUNS / name / "encoder.pt", weights_only=True)["weights"]


def when_saved(run):
    with contextlib.suppress(FileNotFoundError):  # between two renames it has no checkpoint.pt
        return (run / "checkpoint.pt").stat().st_mtime_ns
    return 0


def finish(process):
    error = process.communicate()[1]
    assert process.returncode == 0, error


def test_a_run_that_is_killed_again_and_again_ends_in_the_weights_of_a_whole_one(program):
    """Every other time it dies while it writes a checkpoint, which is due at every step."""
    recipe = [*RECIPE, "--epochs", "6", "--save-every", "0"]
    finish(program(*recipe, "--name", "whole"))
    chance, run = random.Random(0), RUNS / "killed"
    process = program(*recipe, "--name", "killed")
    while process.poll() is None and not (run / "checkpoint.pt").exists():
        time.sleep(0.01)
    for round in range(4):
        before = when_saved(run)
        while process.poll() is None and when_saved(run) == before:
            time.sleep(0.01)  # until it has begun to train
        time.sleep(chance.uniform(0, 0.3))
        while round % 2 and process.poll() is None and not list(run.glob(".checkpoint.pt.*")):
            pass
        assert process.poll() is None, "it came to its end before it was killed"
        process.kill()
        process.communicate()
        process = program("--resume", run)
    finish(process)
    assert all(
        torch.equal(value, weights("whole")[key]) for key, value in weights("killed").items()
    )


def test_a_second_signal_ends_the_process_at_once():
    """But one within a second is torchrun's echo of the first."""
    done = python(
        "import os, time\n"
        "from empssl_support.cli import signals\n"
        "with signals.listened_to(), signals.noted():\n"
        "    for pause in (0, 0.2, 1.0):\n"
        "        time.sleep(pause); os.kill(os.getpid(), signal.SIGINT)\n"
        "        print('alive', flush=True)\n"
    )
    assert done.returncode == -signal.SIGINT and done.stdout.count("alive") == 2


def test_a_terminal_that_closes_saves_the_run(program):
    terminal, end = pty.openpty()
    become_its_session = (
        HEAR + "import fcntl, os, sys, termios; os.setsid();"
        "fcntl.ioctl(0, termios.TIOCSCTTY, 0); os.execv(sys.executable, sys.argv[1:])"
    )
    recipe = [*RECIPE, "--epochs", "50", "--name", "closed"]
    command = [sys.executable, ROOT / "empssl.py", *recipe]
    process = subprocess.Popen(
        [sys.executable, "-c", become_its_session, *command], stdin=end, stdout=end, stderr=end
    )
    os.close(end)
    try:
        while not (RUNS / "closed" / "checkpoint.pt").exists():
            if select.select([terminal], [], [], 0.02)[0]:
                os.read(terminal, 4096)
            assert process.poll() is None
    finally:
        os.close(terminal)
    assert process.wait(60) == 128 + signal.SIGHUP
    assert torch.load("runs/closed/checkpoint.pt", weights_only=True)["step"] < 50 * 20


def test_a_disk_that_is_really_full():
    """A file that the system refuses to let grow: no traceback, and what was whole stays."""
    done = python(
        "import resource; signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "import empssl\n"
        "from empssl_support.runs import RunFolder\n"
        "save = RunFolder.save\n"
        "def limited(folder, state):\n"
        "    if state['step'] == 2:\n"
        "        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))\n"
        "    save(folder, state)\n"
        "RunFolder.save = limited\n"
        f"empssl.main({[*RECIPE, '--name', 'demo', '--save-every', '0']!r})\n"
    )
    assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr
    assert "kept" in done.stderr.splitlines()[-1]
    assert torch.load("runs/demo/checkpoint.pt", weights_only=True)["step"] == 1
    assert not list((RUNS / "demo").glob(".*.[0-9]*"))


def test_a_reader_of_the_progress_bar_that_goes_does_not_end_the_training(program):
    reader, writer = os.pipe()
    process = program(*RECIPE, "--name", "alone", stderr=writer)
    os.close(reader)
    os.close(writer)
    assert process.wait(300) == 0
    assert "probe_seconds" in (RUNS / "alone" / "metrics.jsonl").read_text()
