"""Facts of the machine and of this program: what a figure needs beside it to be trusted."""

import contextlib
import ctypes
import math
import os
import platform
import shlex
import subprocess
import sys
import time
from pathlib import Path

import torch
import torchvision

from empssl_support.processes import processes


def program() -> list[str]:
    """How the user started this program, without its flags."""
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    if spec is not None:
        return ["python", "-m", spec.name.removesuffix(".__main__")]
    if os.path.basename(sys.argv[0]) == "empssl":
        return ["empssl"]
    if sys.argv[0].endswith(".py"):
        return ["python", sys.argv[0]]
    return ["python", "empssl.py"]


def without_folders(words: list[str]) -> list[str]:
    """Where this program lies is nobody else's business."""
    return [os.path.basename(word) for word in words]


def describe_device(device: str) -> str:
    """The GPU's name; of a CPU its name, its threads, and which vector instructions it has."""
    if device.startswith("cuda"):
        return torch.cuda.get_device_name(device)
    found = getattr(torch.cpu, "get_capabilities", dict)()
    name = found.get("cpu_name") or platform.processor() or platform.machine()
    instructions = {"AVX2": "avx2", "AVX-512": "avx512_f", "bf16": "avx512_bf16", "AMX": "amx_bf16"}
    has = [said for said, key in instructions.items() if found.get(key)]
    return f"{device} ({', '.join([name, f'{torch.get_num_threads()} threads', *has])})"


def cpu_multiplies_bf16() -> bool:
    """As far as PyTorch can say; elsewhere products in bf16 are far slower than in float32."""
    found = getattr(torch.cpu, "get_capabilities", dict)()
    return bool(found.get("avx512_bf16") or found.get("amx_bf16"))


def memory_of_this_machine() -> float:
    """In bytes; infinite where the system does not say."""
    if not hasattr(os, "sysconf"):
        return math.inf
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def peak_memory(device: str) -> dict:
    """The most bytes that this process has held so far, on the host and on the GPU."""
    peak = {}
    with contextlib.suppress(ImportError):  # Windows has no such module
        import resource

        unit = 1 if sys.platform == "darwin" else 1024
        peak["peak_memory"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    if device.startswith("cuda"):
        peak["peak_gpu_memory"] = torch.cuda.max_memory_allocated(device)
    return peak


def seconds_without_a_core() -> float:
    """For which threads of this process stood ready to run while others had the cores.

    All threads together. 0 where the system does not say (it is Linux that does).
    """
    nanoseconds = 0
    for path in Path("/proc/self/task").glob("*/schedstat"):
        with contextlib.suppress(OSError):  # a thread that has just ended
            nanoseconds += int(path.read_text().split()[1])
    return nanoseconds / 1e9


def provenance(device: str) -> dict:
    """What a figure needs beside it to be trusted and repeated."""
    return {
        "command": shlex.join([*without_folders(program()), *sys.argv[1:]]),
        "commit": commit(),
        "versions": {
            "python": platform.python_version(),
            "torch": str(torch.__version__),
            "torchvision": torchvision.__version__,
        },
        "hardware": describe_device(device),
        "processes": processes(),
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
    }


def commit(folder: Path | None = None) -> str:
    """The commit of the code in a folder, by default of this program.

    With `-dirty` where tracked code was changed; `unknown` outside git, and where the folder only
    lies in a repository that does not track it, as one that code is installed in.
    """
    here = folder or Path(__file__).resolve().parent.parent
    try:
        head = git(here, "rev-parse", "HEAD")
        tracked = git(here, "ls-files", "--", ".")
        code = ["--", ".", ":!study/results", ":!*.md"]
        changed = git(here, "status", "--porcelain", "--untracked-files=no", *code)
    except OSError:  # there is no git on this machine
        return "unknown"
    if not (head and tracked):
        return "unknown"
    return head + ("-dirty" if changed else "")


def git(folder: Path, *words: str) -> str:
    done = subprocess.run(["git", "-C", folder, *words], capture_output=True, text=True)
    return done.stdout.strip()


def keep_freed_memory() -> None:
    """Have glibc keep what one step frees for the next one.

    By default it gives large blocks back to the system, which zeroes and maps them anew each time.
    The two numbers are its M_MMAP_MAX and M_TRIM_THRESHOLD.
    """
    libc = ctypes.CDLL(None) if sys.platform == "linux" else None
    if hasattr(libc, "mallopt"):
        libc.mallopt(-4, 0)
        libc.mallopt(-1, 2**31 - 1)
