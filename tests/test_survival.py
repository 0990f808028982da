"""Runs that are stopped, killed, damaged, or spread over processes."""

import json
import os
import pty
import select
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch

import empssl
import empssl_io as io
import kill
import two_processes
from empssl import main
from test_run import SHAPES

ROOT = Path(__file__).parent.parent
pytestmark = pytest.mark.usefixtures("in_tmp", "short_runs")
RUN = [*SHAPES, "--epochs", "4"]            # 60 images, batches of 20: 12 steps


def weights(name):
    return torch.load(io.RUNS / name / "encoder.pt", weights_only=True)["weights"]


def assert_equal_weights(a, b):
    assert all(torch.equal(weights(a)[key], value) for key, value in weights(b).items())


def stop_after(step, monkeypatch, number=signal.SIGTERM):
    """Send this process the signal in that step of the next training."""
    steps, asked = [], io.RunFolder.asked

    def send_then_ask(folder):
        steps.append(1)
        if len(steps) == step:
            os.kill(os.getpid(), number)
        return asked(folder)
    monkeypatch.setattr(io.RunFolder, "asked", send_then_ask)


def test_a_signal_during_the_probe_at_an_epochs_end_stops_there(monkeypatch, capsys):
    monkeypatch.setattr(empssl, "holdout_knn", lambda *_: os.kill(os.getpid(), signal.SIGTERM) or {})
    with pytest.raises(SystemExit) as stop:
        main([*RUN, "--name", "stopped"])
    assert stop.value.code == 128 + signal.SIGTERM and "after step 3 of 12" in capsys.readouterr().err


@pytest.mark.parametrize("step", [2, 3, 7, 12])                     # in an epoch, at an epoch's end, at the very end
def test_a_stopped_run_goes_on_to_the_same_weights_and_records(step, monkeypatch, capsys):
    whole = main([*RUN, "--name", "whole"])
    with monkeypatch.context() as patch:
        stop_after(step, patch)
        with pytest.raises(SystemExit) as stop:
            main([*RUN, "--name", "stopped"])
    assert stop.value.code == 128 + signal.SIGTERM
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert f"after step {step} of 12" in said and "--resume runs/stopped" in said
    steps, one = [], empssl.LARS.step
    monkeypatch.setattr(empssl.LARS, "step", lambda *a: steps.append(1) or one(*a))
    resumed = main(["--resume", "runs/stopped"])
    assert len(steps) == 12 - step                                  # it went on rather than began again
    assert_equal_weights("whole", "stopped")
    changes = ("train_seconds", "probe_seconds", "patches_per_second", "peak_memory", "checkpoints", "checkpoint_bytes",
               "saving_seconds")
    same = lambda record: {k: v for k, v in record.items() if k not in changes}
    assert same(resumed) == same(whole)
    records = lambda name: [same(r) for r in io.records(io.RUNS / name) if "resumed" not in r]
    assert records("stopped") == records("whole")


def test_sigint_has_a_code_of_its_own_and_handlers_are_put_back(monkeypatch):
    before = signal.getsignal(signal.SIGINT)
    stop_after(2, monkeypatch, signal.SIGINT)
    with pytest.raises(SystemExit) as stop:
        main([*RUN, "--name", "stopped"])
    assert stop.value.code == 130 and signal.getsignal(signal.SIGINT) is before


def test_a_second_signal_ends_the_process_at_once():
    code = ("import os, signal, time, empssl_io as io\n"
            "folder = io.RunFolder('runs/x', {})\n"
            "with folder.catching_signals():\n"
            "    for pause in (0, 0.2, 1.0):\n"                     # the second comes within a second: torchrun's echo
            "        time.sleep(pause); os.kill(os.getpid(), signal.SIGINT); print('alive', flush=True)\n")
    done = subprocess.run([sys.executable, "-c", code], env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
    assert done.returncode == -signal.SIGINT and done.stdout.count("alive") == 2


@pytest.mark.parametrize("where", ["probe", "linear_probe"])         # the second in a thread beside others
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=lambda number: number.name)
def test_a_signal_while_probing_is_a_sentence_and_the_training_is_kept(where, number, monkeypatch, capsys):
    whole = main([*RUN, "--name", "whole"])
    probe = getattr(empssl, where)
    with monkeypatch.context() as patch:
        patch.setattr(empssl, where, lambda *a, **how: os.kill(os.getpid(), number) or probe(*a, **how))
        with pytest.raises(SystemExit) as stop:
            main([*RUN, "--name", "stopped"])
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert stop.value.code == 128 + number and said.startswith("stopped") and "--resume runs/stopped" in said
    patched = lambda *a: pytest.fail("it trained again")
    monkeypatch.setattr(empssl.LARS, "step", patched)
    assert main(["--resume", "runs/stopped"])["linear_top1"] == whole["linear_top1"]


def test_a_folder_in_use_is_refused_to_a_second_run_even_with_force(monkeypatch, capsys):
    stop_after(2, monkeypatch)
    with pytest.raises(SystemExit):
        main([*RUN, "--name", "busy"])
    code = "import empssl_io as io; io.RunFolder('runs/busy', {}, resume=True); print('held', flush=True); input()"
    other = subprocess.Popen([sys.executable, "-c", code], env=os.environ | {"PYTHONPATH": str(ROOT)}, text=True,
                             stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert other.stdout.readline() == "held\n"
    before = sorted(path.name for path in (io.RUNS / "busy").iterdir())
    for arguments in (["--resume", "runs/busy"], [*RUN, "--name", "busy", "--force"]):
        with pytest.raises(SystemExit) as stop:
            main(arguments)
        assert stop.value.code == 2 and "Another process is at work in runs/busy" in capsys.readouterr().err
    assert sorted(path.name for path in (io.RUNS / "busy").iterdir()) == before
    other.communicate("")
    main(["--resume", "runs/busy"])


def test_a_resumed_folder_says_where_its_images_are_now_and_otherwise_how_it_began():
    stored = lambda: json.loads((io.RUNS / "x" / "config.json").read_text())
    io.RunFolder(io.RUNS / "x", {"data_dir": "here", "lr": 1, "commit": "a"})
    io.RunFolder(io.RUNS / "x", {"data_dir": "there", "lr": 1, "commit": "b"}, resume=True)
    assert stored() == {"data_dir": "there", "lr": 1, "commit": "a"}
    (io.RUNS / "x" / "config.json").write_text("{")
    io.RunFolder(io.RUNS / "x", {"data_dir": "there", "lr": 2, "commit": "b"}, resume=True)
    assert stored() == {"data_dir": "there", "lr": 2, "commit": "b"}
    io.release_folders()


def test_a_run_whose_exports_folder_has_gone_can_go_on_with_another(monkeypatch):
    Path("there").mkdir()
    stop_after(2, monkeypatch)
    with pytest.raises(SystemExit):
        main([*RUN, "--name", "stopped", "--export-features", "there/features.npz"])
    Path("there").rmdir()
    main(["--resume", "runs/stopped", "--export-features", "here.npz"])
    assert Path("here.npz").exists()


def test_a_folder_with_anything_in_it_is_not_overwritten(capsys):
    main([*RUN, "--name", "demo"])
    (io.RUNS / "demo" / "config.json").unlink()
    saved = (io.RUNS / "demo" / "checkpoint.pt").read_bytes()
    with pytest.raises(SystemExit) as stop:
        main([*RUN, "--name", "demo"])
    assert stop.value.code == 2 and "holds a run already" in capsys.readouterr().err
    assert (io.RUNS / "demo" / "checkpoint.pt").read_bytes() == saved


def test_what_a_kill_left_half_written_is_cleared_away(monkeypatch, capsys):
    stop_after(2, monkeypatch)
    with pytest.raises(SystemExit):
        main([*RUN, "--name", "demo"])
    for file in (io.RUNS / "demo").glob("checkpoint*"):
        file.unlink()
    (io.RUNS / "demo" / ".checkpoint.pt.12345").write_bytes(b"half of it")
    main(["--resume", "runs/demo"])
    assert not list((io.RUNS / "demo").glob(".*.[0-9]*"))
    assert "holds no checkpoint yet: its training begins anew" in capsys.readouterr().out


def test_training_goes_on_while_a_checkpoint_is_written_and_stops_when_that_fails(monkeypatch):
    """What is saved is the state at the time of saving; the error of a write that failed comes with the next step."""
    folder, written = io.RunFolder(io.RUNS / "demo", {}), threading.Event()
    save = io._save
    monkeypatch.setattr(io, "_save", lambda *a: written.wait() and save(*a))
    weights = torch.ones(3)
    folder.save({"step": 1, "weights": weights})
    weights.zero_()
    assert folder.asked() == (0, False)
    written.set()
    folder.written()
    assert torch.equal(torch.load("runs/demo/checkpoint.pt", weights_only=True)["weights"], torch.ones(3))
    monkeypatch.setattr(io, "_save", lambda *a: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    folder.save({"step": 2, "weights": weights})
    with pytest.raises(OSError, match="No space"):
        for _ in range(1000):
            folder.asked()
            time.sleep(0.001)
    assert torch.load("runs/demo/checkpoint.pt", weights_only=True)["step"] == 1


def test_a_terminal_that_closes_saves_the_run():
    terminal, end = pty.openpty()
    become_its_session = ("import fcntl, os, signal, sys, termios; signal.signal(signal.SIGHUP, signal.SIG_DFL); os.setsid();"
                          "fcntl.ioctl(0, termios.TIOCSCTTY, 0); os.execv(sys.executable, sys.argv[1:])")
    arguments = [sys.executable, str(ROOT / "empssl.py"), *RUN, "--subset", "400", "--epochs", "50", "--name", "closed"]
    process = subprocess.Popen([sys.executable, "-c", become_its_session, *arguments], stdin=end, stdout=end, stderr=end)
    os.close(end)
    try:
        while not (io.RUNS / "closed" / "checkpoint.pt").exists():
            if select.select([terminal], [], [], 0.02)[0]:
                os.read(terminal, 4096)
            assert process.poll() is None
    finally:
        os.close(terminal)
    assert process.wait(60) == 128 + signal.SIGHUP
    assert torch.load("runs/closed/checkpoint.pt", weights_only=True)["step"] < 50 * 20


def damage_by_cutting(path):
    path.write_bytes(path.read_bytes()[:-1000])


def damage_one_bit(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def damage_by_zeros(path):
    path.write_bytes(bytes(path.stat().st_size))


@pytest.mark.parametrize("damage", [damage_by_cutting, damage_one_bit, damage_by_zeros, Path.unlink], ids=lambda f: f.__name__)
def test_a_damaged_checkpoint_is_named_and_the_one_before_it_used(damage, monkeypatch, capsys):
    main([*RUN, "--name", "whole"])
    with monkeypatch.context() as patch:
        stop_after(7, patch)
        with pytest.raises(SystemExit):
            main([*RUN, "--name", "stopped"])
    damage(io.RUNS / "stopped" / "checkpoint.pt")
    capsys.readouterr()
    main(["--resume", "runs/stopped"])
    if damage is not Path.unlink:                   # one that is not there: killed between the two renames
        assert "checkpoint.pt is damaged; going on from runs/stopped/checkpoint-previous.pt, of step 6" in capsys.readouterr().out
    assert_equal_weights("whole", "stopped")


def test_two_damaged_checkpoints_are_a_sentence(monkeypatch, capsys):
    stop_after(7, monkeypatch)
    with pytest.raises(SystemExit):
        main([*RUN, "--name", "stopped"])
    for name in ("checkpoint.pt", "checkpoint-previous.pt"):
        damage_one_bit(io.RUNS / "stopped" / name)
    with pytest.raises(SystemExit) as stop:
        main(["--resume", "runs/stopped"])
    assert stop.value.code == 2 and "checkpoint.pt is damaged" in capsys.readouterr().err


def test_a_checkpoint_with_code_in_it_is_not_run(monkeypatch, capsys):
    stop_after(2, monkeypatch)
    with pytest.raises(SystemExit):
        main([*RUN, "--name", "stopped"])

    class Code:
        def __reduce__(self):
            return (os.mkdir, ("code-was-run",))
    torch.save({"step": Code()}, io.RUNS / "stopped" / "checkpoint.pt")
    with pytest.raises(SystemExit) as stop:
        main(["--resume", "runs/stopped"])
    assert stop.value.code == 2 and not Path("code-was-run").exists()


def test_a_disk_that_fills_up_while_saving_keeps_the_checkpoint_before(monkeypatch, capsys):
    stop_after(7, monkeypatch)

    def full(state, out, save=io._save):
        if state.get("step") == 7:
            out.write(b"half of it")
            raise OSError(28, "No space left on device", "checkpoint.pt")
        save(state, out)
    with monkeypatch.context() as patch:
        patch.setattr(io, "_save", full)
        with pytest.raises(SystemExit) as stop:
            main([*RUN, "--name", "stopped"])
    assert stop.value.code == 2 and "disk is full" in capsys.readouterr().err
    assert torch.load("runs/stopped/checkpoint.pt", weights_only=True)["step"] == 6
    assert not list((io.RUNS / "stopped").glob(".*.[0-9]*"))


def test_a_disk_that_is_really_full(tmp_path):
    """A file that the system refuses to let grow, in a process of its own: no traceback, and what was whole stays."""
    code = ("import resource, signal, sys; signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
            "import empssl, empssl_io as io\n"
            "save = io.RunFolder.save\n"
            "def limited(folder, state):\n"
            "    if state['step'] == 2: resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))\n"
            "    save(folder, state)\n"
            "io.RunFolder.save = limited\n"
            f"empssl.main({[*RUN, '--name', 'demo', '--save-every', '0']!r})\n")
    done = subprocess.run([sys.executable, "-c", code], env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
    assert done.returncode == 2 and "Traceback" not in done.stderr and "kept" in done.stderr.splitlines()[-1], done.stderr
    assert torch.load("runs/demo/checkpoint.pt", weights_only=True)["step"] == 1
    assert not list((io.RUNS / "demo").glob(".*.[0-9]*"))


def test_checkpoints_come_by_the_clock(monkeypatch):
    steps = []
    save = io.RunFolder.save
    monkeypatch.setattr(io.RunFolder, "save", lambda folder, state: steps.append(state["step"]) or save(folder, state))
    main([*RUN, "--name", "each", "--save-every", "0"])
    assert steps == list(range(1, 13))
    steps.clear()
    main([*RUN, "--name", "few"])
    assert steps == [3, 6, 9, 12]


def test_no_checkpoint_is_written_after_a_loss_that_is_not_finite(monkeypatch):
    loss, calls = empssl.empssl_loss, []
    monkeypatch.setattr(empssl, "empssl_loss", lambda *a: loss(*a) * (float("nan") if calls.append(1) or len(calls) == 5 else 1))
    with pytest.raises(SystemExit) as stop:
        main([*RUN, "--name", "broken", "--save-every", "0"])
    saved = torch.load("runs/broken/checkpoint.pt", weights_only=True)
    assert stop.value.code == 1 and saved["step"] == 4 and all(w.isfinite().all() for w in saved["encoder"].values())


def test_no_checkpoint_is_written_of_weights_that_are_not_finite(monkeypatch):
    """A finite loss with a gradient that is not: the next loss would show it, one save too late."""
    step, calls = empssl.LARS.step, []

    def poison(optimizer):
        step(optimizer)
        if calls.append(1) or len(calls) == 5:
            optimizer.param_groups[0]["params"][0].data[0] = float("nan")
    monkeypatch.setattr(empssl.LARS, "step", poison)
    with pytest.raises(SystemExit) as stop:
        main([*RUN, "--name", "broken", "--save-every", "0"])
    assert stop.value.code == 1 and torch.load("runs/broken/checkpoint.pt", weights_only=True)["step"] == 4


def test_a_restarted_job_does_not_overwrite_its_own_run(monkeypatch, capsys):
    main([*RUN, "--name", "demo"])
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    with pytest.raises(SystemExit) as stop:
        main([*RUN, "--name", "demo", "--force"])
    assert stop.value.code == 2 and "--resume runs/demo" in capsys.readouterr().err
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "0")
    main([*RUN, "--name", "demo", "--force"])


def test_a_disk_that_cannot_be_read_is_not_a_damaged_checkpoint(monkeypatch, capsys):
    stop_after(7, monkeypatch)
    with pytest.raises(SystemExit):
        main([*RUN, "--name", "stopped"])
    load, before = torch.load, sorted(p.name for p in (io.RUNS / "stopped").iterdir())

    def unreadable(path, **how):
        if Path(path).name.startswith("checkpoint"):
            raise OSError(5, "Input/output error", str(path))
        return load(path, **how)
    monkeypatch.setattr(torch, "load", unreadable)
    with pytest.raises(SystemExit) as stop:
        main(["--resume", "runs/stopped"])
    assert stop.value.code == 2 and "Input/output error" in capsys.readouterr().err
    assert sorted(p.name for p in (io.RUNS / "stopped").iterdir()) == before


def test_a_damaged_checkpoint_never_takes_the_place_of_a_whole_one(monkeypatch):
    stop_after(7, monkeypatch)
    with pytest.raises(SystemExit):
        main([*RUN, "--name", "stopped"])
    damage_one_bit(io.RUNS / "stopped" / "checkpoint.pt")
    monkeypatch.setattr(io.RunFolder, "save", lambda *a: pytest.fail("as if killed here"))
    with pytest.raises(BaseException):
        main(["--resume", "runs/stopped"])
    assert torch.load("runs/stopped/checkpoint-previous.pt", weights_only=True)["step"] == 6
    assert not (io.RUNS / "stopped" / "checkpoint.pt").exists() and (io.RUNS / "stopped" / "checkpoint-damaged.pt").exists()


def test_a_reader_of_the_progress_bar_that_goes_does_not_end_the_training():
    reader, writer = os.pipe()
    process = subprocess.Popen([sys.executable, str(ROOT / "empssl.py"), *RUN, "--name", "alone"], stdout=subprocess.DEVNULL, stderr=writer)
    os.close(reader), os.close(writer)
    assert process.wait(120) == 0 and io.RunFolder(io.RUNS / "alone", {}, resume=True).finished()


def test_a_signal_after_the_last_step_is_not_forgotten(monkeypatch):
    with pytest.raises(io.Stopped, match="training is done"):
        folder = io.RunFolder(io.RUNS / "demo", {})
        with folder.catching_signals():
            os.kill(os.getpid(), signal.SIGTERM)


@pytest.mark.parametrize("arguments,sentence", [
    (["--resume", "runs/nothing"], "There is no run to go on with in runs/nothing"),
    (["--resume", "runs/done", "--lr", "0.2"], "leave --lr out"),
    (["--resume", "runs/broken"], "There is no run to go on with in runs/broken"),
], ids=lambda x: x[-1] if isinstance(x, list) else "")
def test_what_cannot_be_resumed(arguments, sentence, capsys):
    (io.RUNS / "broken").mkdir(parents=True)
    (io.RUNS / "broken" / "config.json").write_text('{"dataset": ')
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 2 and sentence in capsys.readouterr().err


def test_other_images_are_noticed(monkeypatch, capsys):
    with monkeypatch.context() as patch:
        stop_after(2, patch)
        with pytest.raises(SystemExit):
            main([*RUN, "--name", "stopped"])
    load = io.load_dataset
    with monkeypatch.context() as patch:
        patch.setattr(empssl, "load_dataset", lambda *a: load(*a)._replace(train_images=load(*a).train_images[:40]))
        with pytest.raises(SystemExit) as stop:
            main(["--resume", "runs/stopped"])
    assert stop.value.code == 2 and "began with 60 training images and there are now 40" in capsys.readouterr().err
    monkeypatch.setattr(empssl, "load_dataset", lambda *a: load(*a)._replace(key="another"))
    main(["--resume", "runs/stopped"])
    assert "images have changed" in capsys.readouterr().out


@pytest.mark.parametrize("rubbish", [None, b"", b"{", bytes(range(128, 256))], ids=repr)
def test_a_lost_config_is_taken_from_the_checkpoint(rubbish, monkeypatch):
    main([*RUN, "--name", "whole"])
    stop_after(5, monkeypatch)
    with pytest.raises(SystemExit):
        main([*RUN, "--name", "stopped"])
    (io.RUNS / "stopped" / "config.json").unlink()
    if rubbish is not None:
        (io.RUNS / "stopped" / "config.json").write_bytes(rubbish)
    (io.RUNS / "stopped" / "metrics.jsonl").write_bytes(rubbish or b"")
    main(["--resume", "runs/stopped"])
    assert_equal_weights("whole", "stopped")


def test_a_finished_run_is_left_alone(capsys):
    record = main([*RUN, "--name", "done"])
    before = {p.name: p.read_bytes() for p in (io.RUNS / "done").iterdir()}
    assert main(["--resume", "runs/done"]) == record and "finished" in capsys.readouterr().out
    assert {p.name: p.read_bytes() for p in (io.RUNS / "done").iterdir()} == before


def test_force_overwrites(capsys):
    main([*RUN, "--name", "demo"])
    main([*SHAPES, "--name", "demo", "--seed", "1", "--force"])
    assert json.loads((io.RUNS / "demo" / "config.json").read_text())["seed"] == 1
    assert torch.load("runs/demo/checkpoint.pt", weights_only=True)["step"] == 3


def test_killed_runs_end_in_the_weights_of_a_whole_one(tmp_path):
    outcome = kill.kill_and_resume(tmp_path, kills=3, epochs=3)
    assert outcome["equal_weights"] and outcome["kills"] == 3


# ---- several processes ----

def torchrun(*arguments, processes=2, **kwargs):
    return subprocess.Popen([sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}",
                             *map(str, arguments)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                            env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}, **kwargs)


def test_two_processes_have_the_loss_and_gradients_of_one(tmp_path):
    started = torchrun(ROOT / "tests" / "two_processes.py", tmp_path)
    assert started.wait() == 0, started.stdout.read()
    alone = two_processes.training(steps=3)
    both = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (0, 1)]
    for ours in both:
        assert ours["losses"] == pytest.approx(alone["losses"], rel=1e-5)
        for name in ("gradients", "weights", "features"):
            torch.testing.assert_close(ours[name], alone[name], rtol=1e-5, atol=1e-6)
        assert (ours["knn"], ours["linear"]) == (alone["knn"], alone["linear"])
    for step, patches in enumerate(alone["seen"]):                  # (3*8, 3, 16, 16): each cut its half of the images
        halves = [ours["seen"][step].unflatten(0, (3, 4)) for ours in both]
        assert torch.equal(torch.cat(halves, 1), patches.unflatten(0, (3, 8)))


@pytest.fixture
def shapes_run():
    def start(*arguments, processes=2):
        return torchrun(ROOT / "empssl.py", *SHAPES, "--subset", 2000, *arguments, processes=processes)
    return start


def wait_for(condition, process, seconds=120):
    deadline = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, process.stdout.read()
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_torchrun_trains_stops_by_sigterm_and_goes_on(shapes_run):
    run = io.RUNS / "two"
    started = shapes_run("--epochs", "30", "--name", "two", "--save-every", "0")
    wait_for((run / "checkpoint.pt").exists, started)
    started.send_signal(signal.SIGTERM)
    output = started.communicate(timeout=60)[0]
    assert started.returncode != 0 and output.count(f"to go on: python {ROOT / 'empssl.py'} --resume runs/two") == 1
    saved = torch.load(run / "checkpoint.pt", weights_only=True)
    assert 0 < saved["step"] < 3000
    config = json.loads((run / "config.json").read_text())
    (run / "config.json").write_text(json.dumps(config | {"epochs": -(-saved["step"] // 100), "save_every": 5}))
    again = torchrun(ROOT / "empssl.py", "--resume", run)
    output = again.communicate(timeout=120)[0]
    assert again.returncode == 0, output
    assert output.count("linear probe 0") == 1 and "each process uses the statistics of its own images" in output


def test_a_rank_that_dies_ends_the_others_within_a_minute_with_a_message(shapes_run):
    started = shapes_run("--epochs", "30", "--name", "two", "--save-every", "0")
    wait_for((io.RUNS / "two" / "checkpoint.pt").exists, started)
    children = subprocess.run(["pgrep", "-P", str(started.pid)], capture_output=True, text=True).stdout.split()
    os.kill(int(children[1]), signal.SIGKILL)
    begun = time.monotonic()
    output = started.communicate(timeout=60)[0]
    assert time.monotonic() - begun < 60 and started.returncode != 0 and "lost the others" in output
    torch.load(io.RUNS / "two" / "checkpoint.pt", weights_only=True)


def test_a_batch_that_cannot_be_split_is_refused_once(shapes_run):
    started = shapes_run("--batch", "21", "--name", "two")
    output = started.communicate(timeout=120)[0]
    assert started.returncode != 0 and output.count("--batch 21 is split over 2 processes") == 1
