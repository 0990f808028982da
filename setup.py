"""Builds the compiled ops, module `_empssl`, with ninja. No torch is needed for it.

EMPSSL_CUDA=0   leave CUDA out
EMPSSL_CUDA=1   CUDA even where no driver is seen
EMPSSL_ARCHS    GPU architectures, such as "80 90"; by default 75 80 90 100 120, as far as nvcc goes
CXX             the C++ compiler, with its flags

Where there is a driver and no nvcc, pip fetches one for the build (build_backend.py).
With no C++ compiler the install goes on without the ops, which then run as PyTorch references.
"""

import os
import platform
import shlex
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

from build_backend import cudart, find_cuda, find_cxx, may_have_cuda, must_have_cuda, why_no_nvcc

CSRC = Path(__file__).parent / "csrc"
ARCHITECTURES = (75, 80, 90, 100, 120)

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


class BuildError(Exception):
    """What the compilers said."""


def architectures(nvcc: Path) -> list[int]:
    if chosen := os.environ.get("EMPSSL_ARCHS"):
        numbers = chosen.replace(",", " ").replace(".", "").split()
        if not numbers or not all(number.isdecimal() for number in numbers):
            raise SystemExit(f"EMPSSL_ARCHS is {chosen!r}; give numbers such as 80 90.")
        return sorted(set(map(int, numbers)))
    asked = subprocess.run([nvcc, "--list-gpu-code"], capture_output=True, text=True)
    if asked.returncode:
        raise BuildError(asked.stderr)
    found = [a for a in ARCHITECTURES if f"sm_{a}" in asked.stdout.split()]
    if not found:
        raise BuildError(f"{nvcc} knows none of the architectures {ARCHITECTURES}.")
    return found


def host_compiler() -> str:
    """The C++ compiler as nvcc takes it: one program, and each of its flags by -Xcompiler."""
    words = shlex.split(find_cxx())
    # A launcher such as ccache may stand before the compiler, and flags after it.
    named = (i for i, word in enumerate(words) if "++" in Path(word).name)
    at = next(named, 0)
    options = ["-ccbin", words[at]]
    for flag in words[at + 1 :]:
        options += ["-Xcompiler", flag.replace(",", "\\,")]  # at a bare comma nvcc would split it
    return shlex.join(options)


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
        cuda = find_cuda() if may_have_cuda() else None
        if not cuda and (why := why_no_nvcc()):
            say(why)
        self.build_or_say_why_not(ext, cuda)

    def build_or_say_why_not(self, ext, cuda: Path | None) -> None:
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
            self.build_or_say_why_not(ext, None)

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
            file.compile("cxx", "patches_cpu.cpp", f"patches_{variant}", flags)
            if variant != "avx512":  # its vectors sweep a matrix no faster than those of avx2
                file.compile("cxx", "logdet_cpu.cpp", f"logdet_{variant}", flags)
        link = f"-pthread {os.environ.get('LDFLAGS', '')}"
        if sys.platform == "darwin":
            link += " -undefined dynamic_lookup"
        return "-DEMPSSL_X86" if x86 else "", link

    def add_cuda(self, file: NinjaFile, cuda: Path, archs: list[int]) -> tuple[str, str]:
        """CUDA's kernels: machine code of each architecture, and PTX of the lowest."""
        code = " ".join(f"-gencode=arch=compute_{a},code=sm_{a}" for a in archs)
        # A driver makes machine code of PTX for any later GPU. That of the lowest architecture
        # serves those between two of the list as well, such as sm_110.
        code += f" -gencode=arch=compute_{archs[0]},code=compute_{archs[0]}"
        command = (
            f"{cuda}/bin/nvcc -MD -MF $out.d -O3 -std=c++17 {host_compiler()} --threads 2 {code} "
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


setup(ext_modules=extensions(), cmdclass={"build_ext": NinjaBuild})
