"""Builds the compiled ops, module `_empssl`, with ninja. No torch is needed; everything else is in pyproject.toml.

EMPSSL_CUDA=0     leave CUDA out
EMPSSL_CUDA=1     CUDA even where no driver is seen; with no nvcc on the machine, the compiler comes as wheels
EMPSSL_ARCHS      GPU architectures, such as "80 90"; default: 75 80 90 100 120 as far as nvcc knows them
CXX               the C++ compiler

With no C++ compiler the install goes on without the ops; every op then runs as its PyTorch reference.
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


def say(sentence: str) -> None:
    """To the terminal even under pip, which swallows what a successful build prints."""
    print(f"empssl: {sentence}", file=sys.stderr)
    try:
        with open("/dev/tty", "w") as terminal:
            print(f"empssl: {sentence}", file=terminal)
    except OSError:
        pass


def find_cxx() -> str | None:
    wanted = [os.environ["CXX"]] if os.environ.get("CXX") else ["c++", "g++", "clang++"]        # one may be "ccache g++"
    return next((name for name in wanted if shutil.which(name.split()[0])), None)


def find_cuda() -> Path | None:
    """The toolkit's folder: nvcc on PATH, CUDA_HOME, /usr/local/cuda, or the wheels."""
    places = [Path(os.environ[v]) for v in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(v)] + [Path("/usr/local/cuda")]
    if found := shutil.which("nvcc"):
        places.insert(0, Path(found).resolve().parent.parent)
    for entry in map(Path, sys.path):
        places += sorted(entry.glob("nvidia/cu1*"), reverse=True)
    return next((p for p in places if (p / "bin" / "nvcc").exists() and cudart(p)), None)


def cudart(cuda: Path) -> Path | None:
    """The static runtime, so that torch's CUDA version need not match; an nvcc that is a wrapper has none beside it."""
    places = (cuda / "lib64", cuda / "lib", *sorted(cuda.glob("targets/*/lib")))
    return next((p / "libcudart_static.a" for p in places if (p / "libcudart_static.a").exists()), None)


def wants_cuda() -> bool:
    return os.environ.get("EMPSSL_CUDA") != "0"


def needs_cuda_wheels() -> bool:
    driver = Path("/proc/driver/nvidia/version").exists() or shutil.which("nvidia-smi")
    return wants_cuda() and "build_ext" not in sys.argv and not find_cuda() and bool(find_cxx()) and (os.environ.get("EMPSSL_CUDA") == "1" or bool(driver))


def architectures(nvcc: Path) -> list[int]:
    if chosen := os.environ.get("EMPSSL_ARCHS"):
        archs = chosen.replace(",", " ").replace(".", "").split()
        if not all(a.isdecimal() for a in archs):
            raise SystemExit(f"EMPSSL_ARCHS is {chosen!r}; give numbers such as 80 90.")
        return sorted(map(int, archs))
    asked = subprocess.run([nvcc, "--list-gpu-code"], capture_output=True, text=True)
    if asked.returncode:
        raise BuildError(asked.stderr)
    return [a for a in ARCHITECTURES if f"sm_{a}" in asked.stdout.split()]


class BuildError(Exception):
    """What the compilers said."""


class NinjaBuild(build_ext):
    """One edge a source file and instruction set, all in parallel, rebuilt only when something changed."""

    def build_extension(self, ext):
        cuda = find_cuda() if wants_cuda() else None
        try:
            self.build(ext, cuda)
        except BuildError as error:
            if not cuda or os.environ.get("EMPSSL_CUDA") == "1":
                raise SystemExit(f"{error}\nempssl: the compiled ops could not be built (see above).") from None
            print(error, file=sys.stderr)
            say(f"{cuda / 'bin' / 'nvcc'} could not compile the CUDA kernels, so the ops are built for the CPU alone; "
                f"EMPSSL_CUDA=1 pip install -v -e . shows why.")
            self.build(ext, None)

    def build(self, ext, cuda: Path | None):
        import ninja
        import pybind11

        cxx = find_cxx()
        folder = Path(self.build_temp).resolve()
        folder.mkdir(parents=True, exist_ok=True)
        module = Path(self.get_ext_fullpath(ext.name)).resolve()
        module.parent.mkdir(parents=True, exist_ok=True)
        x86 = platform.machine().lower() in ("x86_64", "amd64")
        include = " ".join("-I" + shlex.quote(path).replace("$", "$$") for path in (pybind11.get_include(), sysconfig.get_path("include")))
        flags = f"-O3 -std=c++17 -fPIC -fvisibility=hidden -fno-math-errno -fno-trapping-math -Wall {os.environ.get('CXXFLAGS', '')}"
        objects, edges = [], []

        def compile(rule, source, name, **variables):
            objects.append(f"{name}.o")
            edges.append(f"build {name}.o: {rule} {escape(CSRC.resolve() / source)}\n"
                         + "".join(f"  {k} = {v}\n" for k, v in variables.items()))

        variants = {"baseline": "-DEMPSSL_BASELINE"}
        if x86:
            variants |= {"avx2": "-mavx2 -mfma", "avx512": "-mavx512f -mavx512dq -mavx512bw -mavx512vl -mavx2 -mfma "
                                                           "-mprefer-vector-width=512"}
        for variant, machine in variants.items():
            for source in ("patches", "logdet"):
                compile("cxx", f"{source}_cpu.cpp", f"{source}_{variant}", extra=f"-DVARIANT={variant} {machine}")
        define, link = "-DEMPSSL_X86" if x86 else "", f"-pthread {os.environ.get('LDFLAGS', '')}"
        if sys.platform == "darwin":
            link += " -undefined dynamic_lookup"
        rules = f"rule cxx\n  command = {cxx} -MD -MF $out.d {flags} {include} $extra -c $in -o $out\n  depfile = $out.d\n"
        if cuda:
            archs = architectures(cuda / "bin" / "nvcc")
            code = " ".join(f"-gencode=arch=compute_{a},code=sm_{a}" for a in archs)
            code += f" -gencode=arch=compute_{archs[-1]},code=compute_{archs[-1]}"
            rules += (f"rule nvcc\n  command = {cuda}/bin/nvcc -MD -MF $out.d -O3 -std=c++17 -ccbin {cxx.split()[-1]} --threads 2 {code} "
                      f"-Xcompiler -fPIC,-fvisibility=hidden -c $in -o $out\n  depfile = $out.d\n")
            compile("nvcc", "patches_cuda.cu", "patches_cuda")
            compile("nvcc", "logdet_cuda.cu", "logdet_cuda")
            define += f" -DEMPSSL_CUDA '-DEMPSSL_CUDA_ARCHITECTURES=\"{' '.join(map(str, archs))}\"'"
            link += f" {escape(cudart(cuda))} -ldl -lrt -Wl,--exclude-libs,ALL"
        compile("cxx", "bindings.cpp", "bindings", extra=define)
        rules += f"rule link\n  command = {cxx} -shared $in -o $out {link}\n"
        (folder / "build.ninja").write_text(rules + "".join(edges) + f"build {escape(module)}: link {' '.join(objects)}\n")
        done = subprocess.run([Path(ninja.BIN_DIR) / "ninja", "-C", folder], capture_output=not self.verbose, text=True)
        if done.returncode:
            raise BuildError(f"{done.stdout or ''}{done.stderr or ''}")
        say(f"compiled ops built for the CPU{' and for CUDA sm_' + ', sm_'.join(map(str, archs)) if cuda else ', without CUDA'}.")


def escape(path: Path) -> str:
    return str(path).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")


extensions = []
if not find_cxx():
    say("no C++ compiler was found, so the ops are not compiled and run as their PyTorch references.")
elif not (Path(sysconfig.get_path("include")) / "Python.h").exists():
    say("Python's headers were not found, so the ops are not compiled and run as their PyTorch references.")
else:
    extensions = [Extension("_empssl", [])]

setup(ext_modules=extensions, cmdclass={"build_ext": NinjaBuild},
      setup_requires=["nvidia-cuda-nvcc", "nvidia-cuda-runtime", "nvidia-cuda-cccl"] if needs_cuda_wheels() else [])
