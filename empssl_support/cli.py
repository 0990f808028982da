"""The command line: flags from a dataclass, signals, progress, a mistake in one sentence."""

import argparse
import contextlib
import dataclasses
import errno
import functools
import os
import signal
import sys
import threading
import time

import torch
from tqdm import tqdm

from empssl_support.processes import others_are_lost, processes, rank


class UsageError(ValueError):
    """A mistake in arguments or data: shown as one sentence, exit code 2."""

    # Whether every process of a run would say the same.
    alike = True


class Stopped(BaseException):
    """A signal asked for the end; what was written is kept. Exit code 128 + the signal's number."""

    def __init__(self, number: int, sentence: str = "stopped; what was written before is kept"):
        super().__init__(sentence)
        self.alike = True
        self.number = number
        self.sentence = sentence


# ---- flags ----


def flag(default, help: str, *, choices=None, least=None, above=None):
    """A field of a dataclass that is a flag too. `least` and `above` bound a number from below."""
    about = {"help": help, "choices": choices, "least": least, "above": above}
    return dataclasses.field(default=default, metadata=about)


def flag_name(field: str) -> str:
    return "--" + field.replace("_", "-")


def parse_flags(kind: type, argv: list[str] | None, description: str) -> dict:
    """What was typed, by field of the dataclass `kind`; what was not typed is absent."""
    return vars(parser_of(kind, description).parse_args(argv))


@functools.cache
def parser_of(kind: type, description: str) -> argparse.ArgumentParser:
    """Made once: the tables of study/ read the settings of hundreds of runs."""
    parser = argparse.ArgumentParser(
        description=description,
        argument_default=argparse.SUPPRESS,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    for field in dataclasses.fields(kind):
        help = field.metadata["help"]
        if field.default not in (None, False):
            help = f"{help} (default: {field.default})"
        if field.type is bool:
            how = {"action": argparse.BooleanOptionalAction}
        else:
            how = {"type": field.type, "choices": field.metadata["choices"]}
        parser.add_argument(flag_name(field.name), help=help, **how)
    return parser


# ---- signals ----


class Signals:
    """Ctrl-C, SIGTERM, and a terminal that closes: each asks the program to stop.

    As a rule the first one raises `Stopped` at once. While `noted` is in force it is only
    remembered in `heard`, for a training loop to read between two steps. A second one, more than a
    second later (torchrun passes on what the terminal has sent already), ends the process.
    """

    def __init__(self):
        self.heard = 0
        self.heard_at = 0.0
        self.only_note = False

    @contextlib.contextmanager
    def listened_to(self):
        """Handle the signals in this block, and leave all as it was."""
        self.heard = 0
        wanted = [signal.SIGINT, signal.SIGTERM]
        if hasattr(signal, "SIGHUP"):
            wanted.append(signal.SIGHUP)
        if threading.current_thread() is not threading.main_thread():
            wanted = []  # Python hears signals in its main thread alone
        # What is ignored, as under nohup, stays ignored.
        wanted = [number for number in wanted if signal.getsignal(number) != signal.SIG_IGN]
        before = {number: signal.signal(number, self.hear) for number in wanted}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    @contextlib.contextmanager
    def noted(self):
        self.only_note = True
        try:
            yield
        finally:
            self.only_note = False

    def hear(self, number, frame) -> None:
        if self.heard:
            if time.monotonic() - self.heard_at > 1:
                signal.signal(number, signal.SIG_DFL)
                signal.raise_signal(number)
            return
        self.heard = number
        self.heard_at = time.monotonic()
        if not self.only_note:
            raise Stopped(number)


signals = Signals()


# ---- a mistake in one sentence ----


@contextlib.contextmanager
def one_sentence():
    """Whatever a user can mend ends the program with one sentence.

    Exit code 2: arguments, data, a full disk or memory. 1: a loss that is not finite, a lost
    process, nobody who reads the output. 128 + its number: a signal. Anything else is a fault of
    this program and shows its traceback.
    """
    with contextlib.suppress(AttributeError):  # each line at once, file names that are no text too
        sys.stdout.reconfigure(line_buffering=True, errors="backslashreplace")
    try:
        with signals.listened_to():
            yield
    except (
        UsageError,
        Stopped,
        FloatingPointError,
        MemoryError,
        OSError,
        RuntimeError,
    ) as error:
        if (told := explain(error)) is None:
            raise
        sentence, code = told
        # What ends all processes alike is said by one of each machine.
        alike = isinstance(error, FloatingPointError) or getattr(error, "alike", False)
        if not alike or os.environ.get("LOCAL_RANK", "0") == "0":
            with until_the_reader_goes():
                print(" ".join(sentence.split()), file=sys.stderr, flush=True)
        sys.exit(code)


def explain(error: BaseException) -> tuple[str, int] | None:
    """One sentence and an exit code for an error that is not this program's fault; else None."""
    if isinstance(error, Stopped):
        return error.sentence, 128 + error.number
    if isinstance(error, UsageError):
        return f"error: {error}", 2
    if isinstance(error, FloatingPointError):
        return f"error: {error}", 1
    if isinstance(error, torch.OutOfMemoryError):
        gpus = range(torch.cuda.device_count())
        held = max(map(torch.cuda.max_memory_allocated, gpus), default=0) / 2**30
        return (
            f"error: The GPU is out of memory (this run held {held:.1f} GiB); lower --batch, "
            f"--patches or --patch-size, or give --precision bf16."
        ), 2
    if isinstance(error, OSError):
        return explain_file_error(error)
    first_line = (str(error).splitlines() or [""])[0]
    if isinstance(error, MemoryError) or "DefaultCPUAllocator" in first_line:
        asked = first_line.split("DefaultCPUAllocator: ")[-1] or "Python asked for more"
        return (
            f"error: This machine's memory does not suffice ({asked}); "
            f"lower --batch, --patches, --patch-size or, of a folder's images, --image-size."
        ), 2
    if others_are_lost(error):
        return (
            f"error: Process {rank()} of {processes()} lost the others and ends ({first_line}); "
            f"see what they say, then go on with --resume."
        ), 1
    return None


def explain_file_error(error: OSError) -> tuple[str, int] | None:
    kept = "what was written before is kept"
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return f"error: The disk is full ({error.filename or 'while writing'}); {kept}.", 2
    if error.errno in (errno.EPIPE, errno.EIO) and error.filename is None:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115, Python flushes it at the very end
        return f"error: Nobody reads this program's output any more; {kept}.", 1
    if error.filename is None:
        return None
    file = error.filename2 or error.filename
    return f"error: {file} cannot be read or written ({error.strerror}); {kept}.", 2


# ---- progress ----


@contextlib.contextmanager
def until_the_reader_goes():
    """A reader of stderr that has gone must neither end a training nor change its exit code."""
    try:
        yield
    except OSError:
        sys.stderr = open(os.devnull, "w")  # noqa: SIM115, Python flushes it at the very end


class Screen:
    """Where a progress bar is drawn: stderr, as long as somebody reads it."""

    def write(self, text: str) -> None:
        with until_the_reader_goes():
            sys.stderr.write(text)

    def flush(self) -> None:
        with until_the_reader_goes():
            sys.stderr.flush()

    def __eq__(self, other) -> bool:
        """tqdm.write, of a line to stderr, then knows that the bar is to be cleared first."""
        return other is sys.stderr

    def __getattr__(self, name):
        return getattr(sys.stderr, name)


def progress(iterable=None, **how) -> tqdm:
    """A progress bar with an estimate of the time to come, in process 0 alone."""
    return tqdm(iterable, file=Screen(), dynamic_ncols=True, disable=rank() > 0, **how)


def human_time(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
