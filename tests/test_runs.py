"""A run that is stopped, killed or damaged goes on to the end that it would have had."""

import itertools
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import empssl
from empssl import main
from empssl_support import runs
from empssl_support.runs import Run, RunFolder, records
from recipes import SHAPES

ROOT = Path(__file__).parent.parent
pytestmark = pytest.mark.usefixtures("in_tmp", "short_runs", "heard_signals")
RUNS = Path("runs")

# 60 images in batches of 20, four epochs: 12 steps, an epoch's end at 3, 6, 9 and 12.
RUN = [*SHAPES, "--epochs", "4"]


@pytest.fixture
def heard_signals():
    """Whoever started the tests may have had signals ignored; here they have their meaning."""
    meaning = {
        signal.SIGINT: signal.default_int_handler,
        signal.SIGTERM: signal.SIG_DFL,
        signal.SIGHUP: signal.SIG_DFL,
    }
    before = {number: signal.signal(number, handler) for number, handler in meaning.items()}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture
def stop_after(monkeypatch):
    """`stop_after(step)` sends this process a signal in that step of the next training."""

    def arrange(step, number=signal.SIGTERM):
        after_step = Run.after_step

        def send(run, t, loss, terms):
            if t + 1 == step:
                os.kill(os.getpid(), number)
            after_step(run, t, loss, terms)

        patch = pytest.MonkeyPatch()
        patch.setattr(Run, "after_step", send)
        return patch

    return arrange


@pytest.fixture
def stopped_run(stop_after):
    """`stopped_run(step)` is a run, `runs/stopped`, that a signal stopped after that step."""

    def run(step, number=signal.SIGTERM, *flags):
        with pytest.raises(SystemExit) as stop:
            patch = stop_after(step, number)
            try:
                main([*RUN, "--name", "stopped", *flags])
            finally:
                patch.undo()
        assert stop.value.code == 128 + number
        return RUNS / "stopped"

    return run


def weights(name):
    return torch.load(RUNS / name / "encoder.pt", weights_only=True)["weights"]


def assert_equal_weights(a, b):
    assert weights(a).keys() == weights(b).keys()
    assert all(torch.equal(weights(a)[key], value) for key, value in weights(b).items())


def refused(arguments, capsys):
    """The sentence with which a command is refused."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 2
    return capsys.readouterr().err


# ---- stopping and going on ----


@pytest.mark.parametrize("step", [2, 3, 7, 12])  # in an epoch, at an epoch's end, at the very end
def test_a_stopped_run_goes_on_to_the_same_weights_and_records(
    step, stopped_run, monkeypatch, capsys
):
    whole = main([*RUN, "--name", "whole"])
    capsys.readouterr()
    stopped_run(step)
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert f"after step {step} of 12" in said and "--resume runs/stopped" in said

    steps, one = [], empssl.Muon.step
    monkeypatch.setattr(empssl.Muon, "step", lambda *a: steps.append(1) or one(*a))
    resumed = main(["--resume", "runs/stopped"])
    assert len(steps) == 12 - step  # it went on rather than began again
    assert_equal_weights("whole", "stopped")

    changes = ("seconds", "patches_per_second", "peak_memory", "checkpoint")

    def lasting(record):
        return {k: v for k, v in record.items() if not any(change in k for change in changes)}

    def logged(name):
        return [lasting(r) for r in records(RUNS / name) if "resumed" not in r]

    assert lasting(resumed) == lasting(whole)
    assert logged("stopped") == logged("whole")


def test_sigint_has_a_code_of_its_own_and_handlers_are_put_back(stopped_run):
    before = signal.getsignal(signal.SIGINT)
    stopped_run(2, signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before


def test_a_signal_during_the_probe_at_an_epochs_end_stops_there(monkeypatch, capsys):
    def knn_within_training(*_):
        os.kill(os.getpid(), signal.SIGTERM)
        return {}

    monkeypatch.setattr(empssl, "knn_within_training", knn_within_training)
    with pytest.raises(SystemExit) as stop:
        main([*RUN, "--name", "stopped"])
    assert stop.value.code == 128 + signal.SIGTERM
    assert "after step 3 of 12" in capsys.readouterr().err


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_while_probing_is_a_sentence_and_the_training_is_kept(number, monkeypatch, capsys):
    whole = main([*RUN, "--name", "whole"])
    probe = empssl.probe
    with monkeypatch.context() as patch:
        patch.setattr(empssl, "probe", lambda *a: os.kill(os.getpid(), number) or probe(*a))
        with pytest.raises(SystemExit) as stop:
            main([*RUN, "--name", "stopped"])
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert stop.value.code == 128 + number
    assert said.startswith("stopped") and "--resume runs/stopped" in said

    monkeypatch.setattr(empssl.Muon, "step", lambda *a: pytest.fail("it trained again"))
    assert main(["--resume", "runs/stopped"])["linear_top1"] == whole["linear_top1"]


def test_checkpoints_come_by_the_clock(monkeypatch):
    steps, save = [], RunFolder.save
    monkeypatch.setattr(
        RunFolder, "save", lambda folder, state: steps.append(state["step"]) or save(folder, state)
    )
    main([*RUN, "--name", "each", "--save-every", "0"])
    assert steps == list(range(1, 13))
    steps.clear()
    main([*RUN, "--name", "few"])
    assert steps == [3, 6, 9, 12]


def test_a_finished_run_is_left_alone(capsys):
    record = main([*RUN, "--name", "done"])
    before = {p.name: p.read_bytes() for p in (RUNS / "done").iterdir()}
    assert main(["--resume", "runs/done"]) == record
    assert "finished" in capsys.readouterr().out
    assert {p.name: p.read_bytes() for p in (RUNS / "done").iterdir()} == before


def test_a_run_whose_exports_folder_has_gone_can_go_on_with_another(stopped_run):
    Path("there").mkdir()
    stopped_run(2, signal.SIGTERM, "--export-features", "there/features.npz")
    Path("there").rmdir()
    main(["--resume", "runs/stopped", "--export-features", "here.npz"])
    assert Path("here.npz").exists()


def test_other_images_are_noticed(stopped_run, monkeypatch, capsys):
    stopped_run(2)
    load = empssl.load_dataset

    def fewer(*how):
        data = load(*how)
        return data._replace(train_images=data.train_images[:40])

    with monkeypatch.context() as patch:
        patch.setattr(empssl, "load_dataset", fewer)
        said = refused(["--resume", "runs/stopped"], capsys)
    assert "began with 60 training images and there are now 40" in said
    monkeypatch.setattr(empssl, "load_dataset", lambda *how: load(*how)._replace(key="another"))
    main(["--resume", "runs/stopped"])
    assert "images have changed" in capsys.readouterr().out


@pytest.mark.parametrize("rubbish", [None, b"", b"{", bytes(range(128, 256))], ids=repr)
def test_a_lost_config_is_taken_from_the_checkpoint(rubbish, stopped_run):
    main([*RUN, "--name", "whole"])
    run = stopped_run(5)
    (run / "config.json").unlink()
    if rubbish is not None:
        (run / "config.json").write_bytes(rubbish)
    (run / "metrics.jsonl").write_bytes(rubbish or b"")
    main(["--resume", "runs/stopped"])
    assert_equal_weights("whole", "stopped")


@pytest.mark.parametrize(
    "arguments,sentence",
    [
        (["--resume", "runs/nothing"], "There is no run to go on with in runs/nothing"),
        (["--resume", "runs/done", "--lr", "0.2"], "leave --lr out"),
        (["--resume", "runs/broken"], "There is no run to go on with in runs/broken"),
    ],
)
def test_what_cannot_be_resumed(arguments, sentence, capsys):
    (RUNS / "broken").mkdir(parents=True)
    (RUNS / "broken" / "config.json").write_text('{"dataset": ')
    assert sentence in refused(arguments, capsys)


# ---- the folder is one run's ----


def test_a_folder_in_use_is_refused_to_a_second_run_even_with_force(stopped_run, capsys):
    run = stopped_run(2)
    hold = (
        "from empssl_support.runs import RunFolder\n"
        "with RunFolder('runs/stopped', {}, resume=True):\n"
        "    print('held', flush=True); input()"
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    other = subprocess.Popen(
        [sys.executable, "-c", hold],
        env=environment,
        text=True,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    assert other.stdout.readline() == "held\n"
    before = sorted(path.name for path in run.iterdir())
    for arguments in (["--resume", "runs/stopped"], [*RUN, "--name", "stopped", "--force"]):
        assert "Another process is at work in runs/stopped" in refused(arguments, capsys)
    assert sorted(path.name for path in run.iterdir()) == before
    other.communicate("")
    main(["--resume", "runs/stopped"])


def test_a_resumed_folder_says_where_its_images_are_now_and_otherwise_how_it_began():
    def opened(resume=False, **config):
        with RunFolder(RUNS / "x", config, resume=resume):
            return json.loads((RUNS / "x" / "config.json").read_text())

    opened(data_dir="here", lr=1, commit="a")
    now = opened(True, data_dir="there", lr=1, commit="b")
    assert now == {"data_dir": "there", "lr": 1, "commit": "a"}
    (RUNS / "x" / "config.json").write_text("{")
    now = opened(True, data_dir="there", lr=2, commit="b")
    assert now == {"data_dir": "there", "lr": 2, "commit": "b"}


def test_a_folder_with_anything_in_it_is_not_overwritten(capsys):
    main([*RUN, "--name", "demo"])
    (RUNS / "demo" / "config.json").unlink()
    saved = (RUNS / "demo" / "checkpoint.pt").read_bytes()
    assert "holds a run already" in refused([*RUN, "--name", "demo"], capsys)
    assert (RUNS / "demo" / "checkpoint.pt").read_bytes() == saved


def test_force_overwrites():
    main([*RUN, "--name", "demo"])
    main([*SHAPES, "--name", "demo", "--seed", "1", "--force"])
    assert json.loads((RUNS / "demo" / "config.json").read_text())["seed"] == 1
    assert torch.load("runs/demo/checkpoint.pt", weights_only=True)["step"] == 3


def test_a_restarted_job_does_not_overwrite_its_own_run(monkeypatch, capsys):
    main([*SHAPES, "--name", "demo"])
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    assert "--resume runs/demo" in refused([*SHAPES, "--name", "demo", "--force"], capsys)
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "0")
    main([*SHAPES, "--name", "demo", "--force"])


def test_what_a_kill_left_half_written_is_cleared_away(stopped_run, capsys):
    run = stopped_run(2)
    for file in run.glob("checkpoint*"):
        file.unlink()
    (run / ".checkpoint.pt.12345").write_bytes(b"half of it")
    main(["--resume", "runs/stopped"])
    assert not list(run.glob(".*.[0-9]*"))
    assert "holds no checkpoint yet: its training begins anew" in capsys.readouterr().out


# ---- damage, and disks ----


def cut_short(path):
    path.write_bytes(path.read_bytes()[:-1000])


def turn_one_bit(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def fill_with_zeros(path):
    path.write_bytes(bytes(path.stat().st_size))


@pytest.mark.parametrize("damage", [cut_short, turn_one_bit, fill_with_zeros, Path.unlink])
def test_a_damaged_checkpoint_is_named_and_the_one_before_it_used(damage, stopped_run, capsys):
    main([*RUN, "--name", "whole"])
    run = stopped_run(7)
    damage(run / "checkpoint.pt")
    capsys.readouterr()
    main(["--resume", "runs/stopped"])
    named = f"{run}/checkpoint.pt is damaged; going on from {run}/checkpoint-previous.pt, of step 6"
    # Where it is not there at all, the run was killed between two renames, and there is no damage.
    assert (named in capsys.readouterr().out) == (damage is not Path.unlink)
    assert_equal_weights("whole", "stopped")


def test_two_damaged_checkpoints_are_a_sentence(stopped_run, capsys):
    run = stopped_run(7)
    for name in ("checkpoint.pt", "checkpoint-previous.pt"):
        turn_one_bit(run / name)
    assert "checkpoint.pt is damaged" in refused(["--resume", "runs/stopped"], capsys)


def test_a_damaged_checkpoint_never_takes_the_place_of_a_whole_one(stopped_run, monkeypatch):
    run = stopped_run(7)
    turn_one_bit(run / "checkpoint.pt")
    monkeypatch.setattr(RunFolder, "save", lambda *a: pytest.fail("as if killed here"))
    with pytest.raises(BaseException, match="as if killed here"):
        main(["--resume", "runs/stopped"])
    assert torch.load(run / "checkpoint-previous.pt", weights_only=True)["step"] == 6
    assert not (run / "checkpoint.pt").exists() and (run / "checkpoint-damaged.pt").exists()


def test_a_checkpoint_with_code_in_it_is_not_run(stopped_run, capsys):
    run = stopped_run(2)

    class Code:
        def __reduce__(self):
            return (os.mkdir, ("code-was-run",))

    torch.save({"step": Code()}, run / "checkpoint.pt")
    refused(["--resume", "runs/stopped"], capsys)
    assert not Path("code-was-run").exists()


def test_a_disk_that_fills_up_while_saving_keeps_the_checkpoint_before(monkeypatch, capsys):
    write = runs.write_torch

    def full(path, content, before=None):
        if content["step"] == 6:
            raise OSError(28, "No space left on device", str(path))
        write(path, content, before)

    monkeypatch.setattr(runs, "write_torch", full)
    assert "disk is full" in refused([*RUN, "--name", "full"], capsys)
    assert torch.load("runs/full/checkpoint.pt", weights_only=True)["step"] == 3


def test_a_disk_that_cannot_be_read_is_not_a_damaged_checkpoint(stopped_run, monkeypatch, capsys):
    run = stopped_run(7)
    load, before = torch.load, sorted(p.name for p in run.iterdir())

    def unreadable(path, **how):
        if Path(path).name.startswith("checkpoint"):
            raise OSError(5, "Input/output error", str(path))
        return load(path, **how)

    monkeypatch.setattr(torch, "load", unreadable)
    assert "Input/output error" in refused(["--resume", "runs/stopped"], capsys)
    assert sorted(p.name for p in run.iterdir()) == before


# ---- beside other programs ----


@pytest.mark.parametrize(
    "share,threads,told",
    [(0.3, 2, 1), (0.1, 2, 0), (0.3, 1, 0)],
    ids=["busy cores", "free cores", "one thread"],
)
def test_training_beside_other_programs_says_what_to_do(share, threads, told, monkeypatch, capfd):
    """Time runs fast here, and of each second some share was spent without a core."""
    clock = itertools.count(step=3)
    monkeypatch.setattr(runs, "time", SimpleNamespace(**vars(time)))
    monkeypatch.setattr(runs.time, "perf_counter", lambda: next(clock))
    monkeypatch.setattr(runs, "seconds_without_a_core", lambda: 7 + share * next(clock))
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    main(RUN)
    said = "".join(capfd.readouterr())
    assert said.count("before the command it may be faster") == told
    assert said.count("with OMP_NUM_THREADS=1 ") == told


@pytest.mark.skipif(sys.platform != "linux", reason="no /dev/full")
def test_a_disk_that_is_full_is_named_where_metrics_are_logged():
    with RunFolder(RUNS / "a", {}) as folder:
        (folder.path / "metrics.jsonl").symlink_to("/dev/full")
        with pytest.raises(OSError) as error:
            folder.log({"step": 1})
    assert error.value.filename == str(RUNS / "a" / "metrics.jsonl")
