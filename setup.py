"""Builds the compiled ops, module `_empssl`, with ninja. No torch is needed for it.

EMPSSL_CUDA=0   leave CUDA out
EMPSSL_CUDA=1   CUDA even where no driver is seen; where there is no nvcc, it comes as wheels
EMPSSL_ARCHS    GPU architectures, such as "80 90"; by default 75 80 90 100 120, as far as nvcc goes
CXX             the C++ compiler

With no C++ compiler the install goes on without the ops, which then run as PyTorch references.
"""

import os
import platform
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

CSRC = Path(__file__).parent / "csrc"
ARCHITECTURES = (75, 80, 90, 100, 120)
CUDA_WHEELS = ["nvidia-cuda-nvcc", "nvidia-cuda-runtime", "nvidia-cuda-cccl"]

CXX_FLAGS = (
    "-O3 -std=c++17 -fPIC -fvisibility=hidden -fno-math-errno -fno-trapping-math -Wall "
    + os.environ.get("CXXFLAGS", "")
)
# Inner loops are compiled for each of these, and chosen at run time.
VARIANTS = {
    "baseline": "-DEMPSSL_BASELINE",
    "avx2": "-mavx2 -mfma",
    "avx512": (
        "-mavx512f -mavx512dq -mavx512bw -mavx512vl -mavx2 -mfma -mprefer-vector-width=512"
    ),
}


def say(sentence: str) -> None:
    """To the terminal even under pip, which swallows what a successful build prints."""
    print(f"empssl: {sentence}", file=sys.stderr)
    try:
        with open("/dev/tty", "w") as terminal:
            print(f"empssl: {sentence}", file=terminal)
    except OSError:
        pass


# ---- what there is to build with ----


def find_cxx() -> str | None:
    names = ["c++", "g++", "clang++"]
    if os.environ.get("CXX"):
        names = [os.environ["CXX"]]  # it may be two words, such as "ccache g++"
    return next((name for name in names if shutil.which(name.split()[0])), None)


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


def wants_cuda() -> bool:
    return os.environ.get("EMPSSL_CUDA") != "0"


def must_have_cuda() -> bool:
    return os.environ.get("EMPSSL_CUDA") == "1"


def needs_cuda_wheels() -> bool:
    driver = Path("/proc/driver/nvidia/version").exists() or shutil.which("nvidia-smi")
    asked = wants_cuda() and (must_have_cuda() or driver)
    return bool(asked and find_cxx() and not find_cuda() and "build_ext" not in sys.argv)


def architectures(nvcc: Path) -> list[int]:
    if chosen := os.environ.get("EMPSSL_ARCHS"):
        numbers = chosen.replace(",", " ").replace(".", "").split()
        if not all(number.isdecimal() for number in numbers):
            raise SystemExit(f"EMPSSL_ARCHS is {chosen!r}; give numbers such as 80 90.")
        return sorted(map(int, numbers))
    asked = subprocess.run([nvcc, "--list-gpu-code"], capture_output=True, text=True)
    if asked.returncode:
        raise BuildError(asked.stderr)
    return [a for a in ARCHITECTURES if f"sm_{a}" in asked.stdout.split()]


# ---- building ----


class BuildError(Exception):
    """What the compilers said."""


class NinjaFile:
    """The text of a build.ninja that is being put together."""

    def __init__(self):
        self.rules = []
        self.edges = []
        self.objects = []

    def rule(self, name: str, command: str, depfile: bool = True) -> None:
        deps = "  depfile = $out.d\n" if depfile else ""
        self.rules.append(f"rule {name}\n  command = {command}\n{deps}")

    def compile(self, rule: str, source: str, name: str, extra: str = "") -> None:
        path = escape(CSRC.resolve() / source)
        self.objects.append(f"{name}.o")
        self.edges.append(f"build {name}.o: {rule} {path}\n  extra = {extra}\n")

    def text(self, module: Path) -> str:
        link = f"build {escape(module)}: link {' '.join(self.objects)}\n"
        return "".join([*self.rules, *self.edges, link])


def escape(path: Path) -> str:
    return str(path).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")


class NinjaBuild(build_ext):
    """One edge a source file and instruction set: parallel, and rebuilt when something changed."""

    def build_extension(self, ext):
        cuda = find_cuda() if wants_cuda() else None
        try:
            self.build(ext, cuda)
        except BuildError as error:
            if not cuda or must_have_cuda():
                message = "empssl: the compiled ops could not be built (see above)."
                raise SystemExit(f"{error}\n{message}") from None
            print(error, file=sys.stderr)
            say(
                f"{cuda / 'bin' / 'nvcc'} could not compile the CUDA kernels, so the ops are built "
                f"for the CPU alone; EMPSSL_CUDA=1 pip install -v -e . shows why."
            )
            self.build(ext, None)

    def build(self, ext, cuda: Path | None) -> None:
        import ninja

        folder = Path(self.build_temp).resolve()
        folder.mkdir(parents=True, exist_ok=True)
        module = Path(self.get_ext_fullpath(ext.name)).resolve()
        module.parent.mkdir(parents=True, exist_ok=True)

        file = NinjaFile()
        define, link = self.add_cpu(file)
        built = "for the CPU, without CUDA"
        if cuda:
            archs = architectures(cuda / "bin" / "nvcc")
            cuda_define, cuda_link = self.add_cuda(file, cuda, archs)
            define, link = f"{define} {cuda_define}", f"{link} {cuda_link}"
            built = f"for the CPU and for CUDA sm_{', sm_'.join(map(str, archs))}"
        file.compile("cxx", "bindings.cpp", "bindings", define)
        file.rule("link", f"{find_cxx()} -shared $in -o $out {link}", depfile=False)

        (folder / "build.ninja").write_text(file.text(module))
        command = [Path(ninja.BIN_DIR) / "ninja", "-C", folder]
        done = subprocess.run(command, capture_output=not self.verbose, text=True)
        if done.returncode:
            raise BuildError(f"{done.stdout or ''}{done.stderr or ''}")
        say(f"compiled ops built {built}.")

    def add_cpu(self, file: NinjaFile) -> tuple[str, str]:
        """The CPU's kernels; returns definitions for the bindings, and flags of the linker."""
        import pybind11

        folders = (pybind11.get_include(), sysconfig.get_path("include"))
        include = " ".join("-I" + shlex.quote(path).replace("$", "$$") for path in folders)
        command = f"{find_cxx()} -MD -MF $out.d {CXX_FLAGS} {include} $extra -c $in -o $out"
        file.rule("cxx", command)
        x86 = platform.machine().lower() in ("x86_64", "amd64")
        for variant in VARIANTS if x86 else ["baseline"]:
            flags = f"-DVARIANT={variant} {VARIANTS[variant]}"
            for source in ("patches", "logdet"):
                file.compile("cxx", f"{source}_cpu.cpp", f"{source}_{variant}", flags)
        link = f"-pthread {os.environ.get('LDFLAGS', '')}"
        if sys.platform == "darwin":
            link += " -undefined dynamic_lookup"
        return "-DEMPSSL_X86" if x86 else "", link

    def add_cuda(self, file: NinjaFile, cuda: Path, archs: list[int]) -> tuple[str, str]:
        """CUDA's kernels: machine code of each architecture, and PTX of the newest."""
        code = " ".join(f"-gencode=arch=compute_{a},code=sm_{a}" for a in archs)
        code += f" -gencode=arch=compute_{archs[-1]},code=compute_{archs[-1]}"
        host = find_cxx().split()[-1]
        command = (
            f"{cuda}/bin/nvcc -MD -MF $out.d -O3 -std=c++17 -ccbin {host} --threads 2 {code} "
            f"-Xcompiler -fPIC,-fvisibility=hidden -c $in -o $out"
        )
        file.rule("nvcc", command)
        file.compile("nvcc", "patches_cuda.cu", "patches_cuda")
        file.compile("nvcc", "logdet_cuda.cu", "logdet_cuda")
        names = " ".join(map(str, archs))
        define = f"-DEMPSSL_CUDA '-DEMPSSL_CUDA_ARCHITECTURES=\"{names}\"'"
        return define, f"{escape(cudart(cuda))} -ldl -lrt -Wl,--exclude-libs,ALL"


def extensions() -> list[Extension]:
    missing = None
    if not find_cxx():
        missing = "no C++ compiler was found"
    elif not (Path(sysconfig.get_path("include")) / "Python.h").exists():
        missing = "Python's headers were not found"
    if missing:
        say(f"{missing}, so the ops are not compiled and run as their PyTorch references.")
        return []
    return [Extension("_empssl", [])]


setup(
    ext_modules=extensions(),
    cmdclass={"build_ext": NinjaBuild},
    setup_requires=CUDA_WHEELS if needs_cuda_wheels() else [],
)
