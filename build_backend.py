"""What pip asks before it builds, and the compilers that there are to build with.

It is setuptools' backend, but where CUDA is wanted and there is no nvcc, the wheels that hold one
are among what pip fetches for the build. setup.py builds with what is found here.
"""

import ctypes
import os
import shlex
import shutil
import sys
from pathlib import Path

from setuptools.build_meta import *  # noqa: F403

# nvcc needs them all: its front end and back end, headers, and the runtime that is linked.
CUDA_WHEELS = [f"nvidia-{name}" for name in ("cuda-nvcc", "cuda-crt", "nvvm")]
CUDA_WHEELS += ["nvidia-cuda-runtime", "nvidia-cuda-cccl"]
FIRST_WHEELS = (13, 0)  # of the CUDA before, the wheels have ptxas but no nvcc


def get_requires_for_build_wheel(config_settings=None) -> list[str]:
    return cuda_wheels()


get_requires_for_build_editable = get_requires_for_build_wheel


def cuda_wheels() -> list[str]:
    """What pip is to fetch to have nvcc: nothing where there is one, or none is wanted."""
    driver = driver_cuda()
    if find_cuda() or not find_cxx() or not wants_cuda(driver):
        return []
    if driver is None:
        return [f"{wheel}>={FIRST_WHEELS[0]}" for wheel in CUDA_WHEELS]
    if driver < FIRST_WHEELS:
        return []
    # A driver compiles no PTX of a CUDA newer than its own.
    major, minor = driver
    return [f"{wheel}>={FIRST_WHEELS[0]},<{major}.{minor + 1}" for wheel in CUDA_WHEELS]


def why_no_nvcc() -> str:
    """What to do where CUDA is wanted and nothing compiles it; empty where it is not wanted."""
    driver = driver_cuda()
    if not wants_cuda(driver):
        return ""
    if driver is None or driver >= FIRST_WHEELS:
        return "there is no nvcc here; pip install -e . fetches one for the build."
    has, first = (".".join(map(str, version)) for version in (driver, FIRST_WHEELS))
    return (
        f"the GPU's driver goes up to CUDA {has} and pip has nvcc from CUDA {first} on; update "
        f"the driver, or install the toolkit of CUDA {has} and set CUDA_HOME to its folder."
    )


def wants_cuda(driver: tuple[int, int] | None) -> bool:
    return must_have_cuda() or (driver is not None and may_have_cuda())


def may_have_cuda() -> bool:
    return os.environ.get("EMPSSL_CUDA") != "0"


def must_have_cuda() -> bool:
    return os.environ.get("EMPSSL_CUDA") == "1"


def driver_cuda() -> tuple[int, int] | None:
    """The newest CUDA that the driver runs, such as (12, 4), or None where there is no driver.

    The driver's own library says so, in every container that a GPU is lent to; nvidia-smi is a
    tool that may be missing, and its text is for people.
    """
    version = ctypes.c_int()
    try:
        failed = ctypes.CDLL("libcuda.so.1").cuDriverGetVersion(ctypes.byref(version))
    except (OSError, AttributeError):
        return None
    if failed or not version.value:
        return None
    return version.value // 1000, version.value % 1000 // 10


def find_cxx() -> str | None:
    names = ["c++", "g++", "clang++"]
    if os.environ.get("CXX"):
        names = [os.environ["CXX"]]  # it may be several words, such as "ccache g++ -m64"
    return next((name for name in names if shutil.which(shlex.split(name)[0])), None)


def find_cuda() -> Path | None:
    """The toolkit's folder: of nvcc on PATH, CUDA_HOME, /usr/local/cuda, or the wheels."""
    places = []
    if nvcc := shutil.which("nvcc"):
        places.append(Path(nvcc).resolve().parent.parent)
    places += [Path(os.environ[v]) for v in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(v)]
    places.append(Path("/usr/local/cuda"))
    for entry in map(Path, sys.path):
        places += sorted(entry.glob("nvidia/cu1*"), reverse=True)
    return next((p for p in places if (p / "bin" / "nvcc").exists() and cudart(p)), None)


def cudart(cuda: Path) -> Path | None:
    """The static runtime, so that torch's CUDA version need not match; a wrapper has none."""
    folders = (cuda / "lib64", cuda / "lib", *sorted(cuda.glob("targets/*/lib")))
    files = (folder / "libcudart_static.a" for folder in folders)
    return next((file for file in files if file.exists()), None)
