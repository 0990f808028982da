"""Several processes train on one batch as one process would, and end together."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import empssl
import two_processes
from empssl_support import processes
from recipes import SHAPES

ROOT = Path(__file__).parent.parent
RUNS = Path("runs")
pytestmark = pytest.mark.usefixtures("in_tmp")


def test_alone_there_is_nothing_to_share():
    z = torch.randn(2, 3, 4)
    assert (processes.rank(), processes.processes()) == (0, 1)
    assert processes.share(7) == slice(0, 7)
    assert processes.gather_images(z) is z and processes.sum_over_processes(z) is z
    assert processes.gather_objects("a") == ["a"] and processes.from_first(lambda: "a") == "a"
    assert processes.largest([3, False]) == [3.0, 0.0]


@pytest.mark.parametrize("count,world", [(8, 2), (7, 3), (2, 4)])
def test_shares_are_disjoint_and_complete(count, world, monkeypatch):
    monkeypatch.setattr(processes, "processes", lambda: world)
    things = []
    for rank in range(world):
        monkeypatch.setattr(processes, "rank", lambda rank=rank: rank)
        things += list(range(count))[processes.share(count)]
    assert things == list(range(count))


def test_those_who_are_done_first_wait_before_they_sum(monkeypatch):
    done = []
    monkeypatch.setattr(processes, "processes", lambda: 2)
    monkeypatch.setattr(processes.dist, "barrier", lambda group: done.append("waited"))
    monkeypatch.setattr(processes.dist, "all_reduce", lambda x: done.append("summed"))
    processes.sum_over_processes(torch.ones(1))
    assert done == ["waited", "summed"]


def test_the_folder_of_a_run_is_the_one_that_process_0_names(monkeypatch):
    named = []

    class Folder:
        def __init__(self, path, *about):
            named.append(path)
            raise StopIteration

    monkeypatch.setattr(empssl, "RunFolder", Folder)
    monkeypatch.setattr(empssl, "from_first", lambda compute: Path("runs/of-process-0"))
    with pytest.raises(StopIteration):
        empssl.main(SHAPES)
    assert named == [Path("runs/of-process-0")]


def torchrun(*arguments, count=2):
    command = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={count}"]
    return subprocess.Popen(
        [sys.executable, *command, *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
    )


@pytest.fixture
def shapes_run():
    started = []

    def start(*arguments):
        recipe = (
            "--dataset shapes --subset 400 --preset laptop --device cpu --patches 3 --batch 20 "
            "--patch-size 8 --hidden 16 --projector 16 --dim 8 --eval-patches 1"
        )
        started.append(torchrun(ROOT / "empssl.py", *recipe.split(), *arguments))
        return started[-1]

    yield start
    for process in started:
        process.kill()


def wait_for(path, process, seconds=100):
    deadline = time.monotonic() + seconds
    while not path.exists():
        assert process.poll() is None, process.stdout.read()
        assert time.monotonic() < deadline
        time.sleep(0.02)


def assert_same(ours, alone):
    """Tensors, or nested lists of them: within a hundred thousandth of each one's largest number.

    Not of each number: a gradient that sums to almost nothing has the rounding of what it sums.
    """
    if isinstance(alone, list):
        for one, other in zip(ours, alone, strict=True):
            assert_same(one, other)
    else:
        assert (ours - alone).abs().max() <= 1e-5 * alone.abs().max()


def test_two_processes_have_the_loss_and_gradients_of_one(tmp_path):
    started = torchrun(ROOT / "tests" / "two_processes.py", tmp_path)
    output = started.communicate(timeout=200)[0]
    assert started.returncode == 0, output
    alone = two_processes.training(steps=3)
    both = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (0, 1)]
    for ours in both:
        assert ours["losses"] == pytest.approx(alone["losses"], rel=1e-5)
        for name in ("gradients", "weights", "features"):
            assert_same(ours[name], alone[name])
        assert ours["knn"] == alone["knn"]
    for step, patches in enumerate(alone["patches"]):  # (3*8, 3, 16, 16): each cut half the images
        halves = [ours["patches"][step].unflatten(0, (3, 4)) for ours in both]
        assert torch.equal(torch.cat(halves, 1), patches.unflatten(0, (3, 8)))


def test_a_batch_that_cannot_be_split_is_refused_once(shapes_run):
    started = shapes_run("--batch", "21", "--name", "two")
    output = started.communicate(timeout=100)[0]
    assert started.returncode != 0
    assert output.count("--batch 21 is split over 2 processes") == 1


@pytest.mark.slow
def test_torchrun_trains_stops_by_sigterm_and_goes_on(shapes_run):
    run = RUNS / "two"
    started = shapes_run("--epochs", "150", "--name", "two", "--save-every", "0")
    wait_for(run / "checkpoint.pt", started)
    started.send_signal(signal.SIGTERM)
    output = started.communicate(timeout=60)[0]
    assert started.returncode != 0
    assert output.count("empssl.py --resume runs/two") == 1
    saved = torch.load(run / "checkpoint.pt", weights_only=True)
    assert 0 < saved["step"] < 3000

    config = json.loads((run / "config.json").read_text())
    soon = {"epochs": -(-saved["step"] // 20), "save_every": 5.0}
    (run / "config.json").write_text(json.dumps(config | soon))
    again = torchrun(ROOT / "empssl.py", "--resume", run)
    output = again.communicate(timeout=200)[0]
    assert again.returncode == 0, output
    assert output.count("linear probe of the bag 0.") == 1
    assert "each process uses the statistics of its own images" in output


@pytest.mark.slow
def test_a_rank_that_dies_ends_the_others_within_a_minute_with_a_message(shapes_run):
    started = shapes_run("--epochs", "150", "--name", "two", "--save-every", "0")
    wait_for(RUNS / "two" / "checkpoint.pt", started)
    pgrep = subprocess.run(["pgrep", "-P", str(started.pid)], capture_output=True, text=True)
    os.kill(int(pgrep.stdout.split()[1]), signal.SIGKILL)
    output = started.communicate(timeout=60)[0]
    assert started.returncode != 0 and "lost the others" in output
    torch.load(RUNS / "two" / "checkpoint.pt", weights_only=True)
