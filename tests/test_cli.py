"""Whatever a user can mend is one sentence and an exit code; the screen stays readable."""

import dataclasses
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch

import empssl
from empssl import main
from empssl_support import processes
from empssl_support.cli import (
    Signals,
    Stopped,
    UsageError,
    flag,
    human_time,
    one_sentence,
    parse_flags,
    progress,
    signals,
)
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
        (MemoryError(), 2, "memory does not suffice"),
    ],
    ids=lambda x: type(x).__name__ if isinstance(x, BaseException) else "",
)
def test_an_error_is_one_sentence_and_a_code(error, code, said, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 0)
    with pytest.raises(SystemExit) as stop, one_sentence():
        raise error
    lines = capsys.readouterr().err.splitlines()
    assert stop.value.code == code and len(lines) == 1 and said in lines[0]


@pytest.mark.parametrize("error", [KeyError("x"), RuntimeError("shapes"), OSError("no name")])
def test_a_fault_of_the_program_shows_its_traceback(error):
    with pytest.raises(type(error)), one_sentence():
        raise error


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("[third_party/gloo/gloo/transport/tcp/pair.cc:553] Connection closed by peer"),
        torch.distributed.DistBackendError("NCCL communicator was aborted"),
    ],
    ids=["gloo", "nccl"],
)
def test_others_that_are_lost_are_told_from_a_fault_of_ones_own(error, monkeypatch, capsys):
    monkeypatch.setattr(processes, "processes", lambda: 2)
    with pytest.raises(SystemExit) as stop, one_sentence():
        raise error
    assert stop.value.code == 1 and "lost the others" in capsys.readouterr().err
    with pytest.raises(RuntimeError, match="illegal memory access"), one_sentence():
        raise RuntimeError("CUDA error: an illegal memory access was encountered")


def test_what_ends_all_processes_is_said_once(monkeypatch, capsys):
    monkeypatch.setenv("LOCAL_RANK", "1")
    with pytest.raises(SystemExit), one_sentence():
        raise UsageError("Everybody sees this.")
    assert capsys.readouterr().err == ""
    with pytest.raises(SystemExit), one_sentence():
        mistake = UsageError("I alone see this.")
        mistake.alike = False
        raise mistake
    assert "I alone" in capsys.readouterr().err


def test_a_log_has_each_line_at_once_and_any_file_name():
    done = python(
        "import os\nfrom empssl_support.cli import one_sentence\n"
        "with one_sentence():\n    print('said \\udcff'); os._exit(0)"
    )
    assert done.stdout == "said \\udcff\n"


def test_a_reader_of_the_output_that_has_gone_is_code_1():
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


def test_a_reader_of_the_progress_that_has_gone_does_not_end_the_work():
    reader, writer = os.pipe()
    os.close(reader)
    code = (
        "from empssl_support.cli import one_sentence, progress\n"
        "with one_sentence():\n"
        "    print(sum(progress(range(50), mininterval=0)))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        stdout=subprocess.PIPE,
        stderr=writer,
        text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    os.close(writer)
    assert done.returncode == 0 and done.stdout == "1225\n"


def test_a_line_is_not_glued_to_the_progress_bar(capsys):
    bar = progress(total=3, desc="training")
    capsys.readouterr()
    bar.write("a line")
    said = capsys.readouterr()
    assert said.out == "a line\n"
    assert said.err.startswith("\r") and "training" in said.err  # cleared, then drawn again
    bar.close()


# ---- signals ----


@pytest.fixture
def heard_signals():
    """Whoever started the tests may have had signals ignored; here they have their meaning."""
    meaning = {signal.SIGINT: signal.default_int_handler, signal.SIGTERM: signal.SIG_DFL}
    before = {number: signal.signal(number, handler) for number, handler in meaning.items()}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_stops_at_once_and_handlers_are_put_back(number, heard_signals, capsys):
    before = signal.getsignal(number)
    with pytest.raises(SystemExit) as stop, one_sentence():
        signal.raise_signal(number)
        pytest.fail("it went on")
    assert stop.value.code == 128 + number
    assert capsys.readouterr().err == "stopped; what was written before is kept\n"
    assert signal.getsignal(number) == before


def test_a_signal_between_two_steps_is_noted_and_forgotten_by_the_next_run(heard_signals):
    signals = Signals()
    with signals.listened_to():
        with signals.noted():
            signal.raise_signal(signal.SIGTERM)
            assert signals.heard == signal.SIGTERM
        assert not signals.only_note
    with signals.listened_to():
        assert not signals.heard


def test_what_is_ignored_stays_ignored(heard_signals):
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with one_sentence():
        assert signal.getsignal(signal.SIGINT) == signal.SIG_IGN
        signal.raise_signal(signal.SIGINT)
        assert signal.getsignal(signal.SIGTERM) != signal.SIG_DFL


def test_outside_the_main_thread_no_signal_is_heard_and_nothing_fails(heard_signals):
    heard_by = []

    def work():
        with one_sentence():
            heard_by.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join(30)
    assert heard_by == [signal.SIG_DFL]


def test_a_second_signal_ends_the_process_but_not_within_a_second():
    """torchrun passes on what the terminal has sent already, at the same moment."""
    done = python(
        "import signal\n"
        "from empssl_support.cli import one_sentence, signals\n"
        "signal.signal(signal.SIGTERM, signal.SIG_DFL)\n"
        "with one_sentence(), signals.noted():\n"
        "    signal.raise_signal(signal.SIGTERM)\n"
        "    signal.raise_signal(signal.SIGTERM)\n"
        "    print('still here', signals.heard)\n"
        "    signals.heard_at -= 2\n"
        "    signal.raise_signal(signal.SIGTERM)\n"
        "    print('never')\n"
    )
    assert done.stdout == "still here 15\n" and done.returncode == -signal.SIGTERM


# ---- flags ----


@dataclasses.dataclass
class FewFlags:
    some_number: int = flag(3, "a number")
    word: str = flag(None, "a word", choices=("a", "b"))
    switch: bool = flag(True, "on or off")


def test_only_what_was_typed_is_told():
    assert parse_flags(FewFlags, [], "") == {}
    typed = parse_flags(FewFlags, "--some-number 3 --word b --no-switch".split(), "")
    assert typed == {"some_number": 3, "word": "b", "switch": False}


@pytest.mark.parametrize("words", ["--word c", "--some-number 1.5", "--other 1", "stray"])
def test_what_is_no_flag_is_code_2(words, capsys):
    with pytest.raises(SystemExit) as stop:
        parse_flags(FewFlags, words.split(), "")
    assert stop.value.code == 2 and "error: " in capsys.readouterr().err.splitlines()[-1]


def test_help_has_each_default_that_says_something(capsys):
    with pytest.raises(SystemExit) as stop:
        parse_flags(FewFlags, ["--help"], "What it does.")
    said = capsys.readouterr().out
    assert stop.value.code == 0 and "What it does." in said
    assert "a number (default: 3)" in said and "None" not in said


@pytest.mark.parametrize(
    "seconds,said",
    [(0.4, "0 s"), (89, "89 s"), (90, "2 min"), (5399, "90 min"), (5400, "1.5 h")],
)
def test_time_in_a_unit_that_can_be_read(seconds, said):
    assert human_time(seconds) == said


# ---- whole runs ----


@pytest.mark.usefixtures("in_tmp", "short_runs")
def test_a_full_disk_is_one_sentence_and_leaves_the_last_encoder(monkeypatch, capsys):
    written, replace = [], os.replace

    def full(scratch, path):
        written.append(Path(path).name)
        if written.count("encoder.pt") == 2:
            raise OSError(28, "No space left on device", str(path))
        replace(scratch, path)

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(SystemExit) as stop:
        main([*SHAPES, "--epochs", "2", "--name", "demo"])
    assert stop.value.code == 2 and "disk is full" in capsys.readouterr().err
    read_encoder("runs/demo/encoder.pt")
    whole = ["checkpoint.pt", "config.json", "encoder.pt", "metrics.jsonl", "patches.npz"]
    assert sorted(path.name for path in Path("runs/demo").iterdir()) == [".lock", *whole]


@pytest.mark.usefixtures("in_tmp", "short_runs")
@pytest.mark.parametrize(
    "error,said",
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB"), "--patches"),
        (None, "memory does not suffice"),
    ],
)
def test_too_little_memory_names_the_flags(error, said, monkeypatch, capsys):
    def train(*_):
        if error:
            raise error
        torch.empty(2**50)

    monkeypatch.setattr(empssl, "train", train)
    with pytest.raises(SystemExit) as stop:
        main([*SHAPES, "--name", "demo"])
    message = capsys.readouterr().err.splitlines()[-1]
    assert stop.value.code == 2 and said in message and "lower --batch" in message


@pytest.mark.usefixtures("in_tmp", "short_runs")
def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_rest(fifth_loss_is_nan, capsys):
    with pytest.raises(SystemExit) as stop:
        main([*SHAPES, "--epochs", "3", "--name", "broken"])
    assert stop.value.code == 1 and "not finite at step 6 of 9" in capsys.readouterr().err
    weights = read_encoder("runs/broken/encoder.pt")["weights"]  # of epoch 1, three steps
    assert all(w.isfinite().all() for w in weights.values())
    assert not (signals.heard or signals.only_note)
