"""Whatever a user can mend is one sentence and an exit code; the screen stays readable."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import empssl
from empssl import main
from empssl_support import cli, files, machine
from empssl_support.cli import Stopped, UsageError, one_sentence, progress
from empssl_support.files import read_encoder
from recipes import SHAPES

ROOT = Path(__file__).parent.parent


def python(code, *arguments):
    environment = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": ""}
    return subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, env=environment
    )


@pytest.mark.parametrize(
    "error,code,said",
    [
        (UsageError("This and\nthat."), 2, "error: This and that."),
        (FloatingPointError("Loss."), 1, "error: Loss."),
        (Stopped(15), 143, "stopped; what was written before is kept"),
        (OSError(28, "No space left on device", "x.pt"), 2, "error: The disk is full (x.pt)"),
        (PermissionError(13, "Permission denied", "x.pt"), 2, "x.pt cannot be read or written"),
        (torch.OutOfMemoryError("CUDA out of memory."), 2, "--precision bf16"),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: 9 bytes"), 2, "memory does not suffice"),
    ],
    ids=lambda x: type(x).__name__ if isinstance(x, BaseException) else "",
)
def test_an_error_is_one_sentence_and_a_code(error, code, said, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 0)
    with pytest.raises(SystemExit) as stop, one_sentence():
        raise error
    lines = capsys.readouterr().err.splitlines()
    assert stop.value.code == code and len(lines) == 1 and said in lines[0]


@pytest.mark.parametrize("error", [KeyError("x"), RuntimeError("shapes"), OSError("no name")])
def test_a_fault_of_the_program_shows_its_traceback(error):
    with pytest.raises(type(error)), one_sentence():
        raise error


def test_what_ends_all_processes_is_said_once(monkeypatch, capsys):
    monkeypatch.setenv("LOCAL_RANK", "1")
    with pytest.raises(SystemExit), one_sentence():
        raise UsageError("Everybody sees this.")
    assert capsys.readouterr().err == ""
    with pytest.raises(SystemExit), one_sentence():
        cli_error = UsageError("I alone see this.")
        cli_error.alike = False
        raise cli_error
    assert "I alone" in capsys.readouterr().err


def test_a_log_has_each_line_at_once_and_any_file_name():
    done = python(
        "import os\nfrom empssl_support.cli import one_sentence\n"
        "with one_sentence():\n    print('said \\udcff'); os._exit(0)"
    )
    assert done.stdout == "said \\udcff\n"


def test_a_reader_of_the_output_that_has_gone_is_code_1(tmp_path):
    reader, writer = os.pipe()
    os.close(reader)
    code = (
        "from empssl_support.cli import one_sentence\n"
        "with one_sentence():\n    print('to nobody')\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        stdout=writer,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    os.close(writer)
    assert done.returncode == 1 and "Nobody reads" in done.stderr and "Traceback" not in done.stderr


def test_a_line_is_not_glued_to_the_progress_bar(capsys):
    bar = progress(total=3, desc="training")
    capsys.readouterr()
    bar.write("a line")
    said = capsys.readouterr()
    assert said.out == "a line\n"
    assert said.err.startswith("\r") and "training" in said.err  # cleared, then drawn again
    bar.close()


def test_a_command_is_recorded_as_it_would_be_typed(monkeypatch):
    monkeypatch.setattr(sys.modules["__main__"], "__spec__", None)
    monkeypatch.setattr(sys, "argv", [str(ROOT / "empssl.py"), "--data-dir", "my photos"])
    assert machine.provenance("cpu")["command"] == "python empssl.py --data-dir 'my photos'"
    monkeypatch.setattr(sys, "argv", ["/somewhere/bin/empssl", "--ops"])
    assert machine.provenance("cpu")["command"] == "empssl --ops"


def test_hardware_says_what_the_cpu_has(monkeypatch):
    has = {"cpu_name": "Abacus", "avx2": True, "avx512_f": True, "avx512_bf16": True}
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: has, raising=False)
    threads = torch.get_num_threads()
    said = machine.describe_device("cpu")
    assert said == f"cpu (Abacus, {threads} threads, AVX2, AVX-512, bf16)"
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"cpu_name": "Abacus"})
    assert machine.describe_device("cpu") == f"cpu (Abacus, {threads} threads)"


@pytest.mark.skipif(sys.platform != "linux", reason="of glibc")
def test_freed_memory_is_kept_for_the_next_step():
    code = (
        "import sys, torch\n"
        "from empssl_support.machine import keep_freed_memory\n"
        "if sys.argv[1:]: keep_freed_memory()\n"
        "x = torch.zeros(50_000_000); del x\n"
        "lines = open('/proc/self/status')\n"
        "print(next(line.split()[1] for line in lines if line.startswith('VmRSS')))\n"
    )
    kept, given_back = (int(python(code, *words).stdout) for words in (["keep"], []))
    assert kept - given_back > 150_000  # of 195,000 KiB


@pytest.mark.usefixtures("in_tmp", "short_runs")
def test_a_full_disk_is_one_sentence_and_leaves_the_last_encoder(monkeypatch, capsys):
    written, write = [], files.write_whole

    def full(path, *how):
        written.append(path.name)
        if written.count("encoder.pt") == 2:
            raise OSError(28, "No space left on device", str(path))
        write(path, *how)

    monkeypatch.setattr(files, "write_whole", full)
    with pytest.raises(SystemExit) as stop:
        main([*SHAPES, "--epochs", "2", "--name", "demo"])
    assert stop.value.code == 2 and "disk is full" in capsys.readouterr().err
    read_encoder("runs/demo/encoder.pt")


@pytest.mark.usefixtures("in_tmp", "short_runs")
def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_what_was_saved(monkeypatch, capsys):
    forward, calls = empssl.Objective.forward, []

    def broken(objective, *batch):
        loss, terms = forward(objective, *batch)
        calls.append(1)
        return (loss * float("nan") if len(calls) == 5 else loss), terms

    monkeypatch.setattr(empssl.Objective, "forward", broken)
    with pytest.raises(SystemExit) as stop:
        main([*SHAPES, "--epochs", "3", "--name", "broken"])
    assert stop.value.code == 1 and "not finite at step 6 of 9" in capsys.readouterr().err
    weights = read_encoder("runs/broken/encoder.pt")["weights"]  # of epoch 1, three steps
    assert all(w.isfinite().all() for w in weights.values())
    assert cli.signals.only_note is False
