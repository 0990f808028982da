"""The build: what it finds to build with, what pip is asked to fetch, what the compilers are told.

Compilers, nvcc and the driver are stand-ins; that real ones take it is test_ops.py's to say.
"""

import importlib
import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement

for needed in ("setuptools", "pybind11", "ninja"):
    pytest.importorskip(needed)
import build_backend  # noqa: E402

ROOT = Path(__file__).parent.parent
# It writes down what it is called with, and makes an empty file of what it is to make.
TOOL = """#!{python}
import json, os, subprocess, sys
tool = os.path.basename(sys.argv[0])
with open({log!r}, "a") as log:
    log.write(json.dumps(sys.argv) + "\\n")
if sys.argv[1:] == ["--list-gpu-code"]:
    print(os.environ.get("GPU_CODE", "sm_75\\nsm_80\\nsm_90\\nsm_110"))
elif tool in os.environ.get("FAILING", "").split():
    sys.exit(tool + " cannot")
elif tool == "ccache":
    sys.exit(subprocess.run(sys.argv[1:]).returncode)
elif "-o" in sys.argv:
    open(sys.argv[sys.argv.index("-o") + 1], "w").close()
"""


@pytest.fixture
def tools(tmp_path):
    """A toolkit's folder, first on PATH, that has a compiler and a launcher too."""
    for name in ("nvcc", "g++", "ccache"):
        file = tmp_path / "cuda" / "bin" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(TOOL.format(python=sys.executable, log=str(tmp_path / "log")))
        file.chmod(0o755)
    toolkit(tmp_path / "cuda")
    return tmp_path


def toolkit(folder):
    for name in ("bin/nvcc", "lib64/libcudart_static.a"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch(0o755)
    return folder


def python(tools, code, folder=ROOT, **variables):
    """`code` in a process of its own, with no terminal to write to."""
    environment = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("EMPSSL_", "CUDA_", "CXX", "LDFLAGS"))
    }
    environment["PATH"] = f"{tools / 'cuda' / 'bin'}:{environment['PATH']}"
    return subprocess.run(
        [sys.executable, "-c", code],
        cwd=folder,
        env=environment | {"CXX": "g++"} | variables,
        capture_output=True,
        text=True,
        start_new_session=True,
    )


def build(tools, before="", **variables):
    """setup.py build_ext, after the code `before`."""
    arguments = ["setup.py", "build_ext", "--build-lib", str(tools / "lib")]
    arguments += ["--build-temp", str(tools / "temp")]
    code = f"import runpy, sys\n{before}\nsys.argv = {arguments!r}\n"
    return python(tools, code + "runpy.run_path('setup.py', run_name='__main__')", **variables)


def module(tools):
    return list((tools / "lib").glob("_empssl*.so"))


def calls(tools, tool):
    """The arguments of each of its calls that compiled or linked."""
    lines = [json.loads(line) for line in (tools / "log").read_text().splitlines()]
    return [words[1:] for words in lines if Path(words[0]).name == tool and "-o" in words]


# ---- what there is, and what pip is to fetch ----


@pytest.mark.parametrize(
    "version,failed,expected",
    [
        (13000, 0, (13, 0)),
        (12040, 0, (12, 4)),
        (13110, 0, (13, 11)),
        (0, 0, None),
        (13000, 34, None),
    ],
)
def test_the_driver_is_asked_for_its_cuda(monkeypatch, version, failed, expected):
    class Driver:
        def __init__(self, name):
            assert name == "libcuda.so.1"

        def cuDriverGetVersion(self, pointer):
            pointer._obj.value = version
            return failed

    monkeypatch.setattr(build_backend.ctypes, "CDLL", Driver)
    assert build_backend.driver_cuda() == expected


@pytest.mark.parametrize("library", [object, lambda: os.stat("/no/such/file")])
def test_no_driver(monkeypatch, library):
    """Neither a library that is not there nor one that knows nothing of it."""
    monkeypatch.setattr(build_backend.ctypes, "CDLL", lambda name: library())
    assert build_backend.driver_cuda() is None


@pytest.fixture
def machine(monkeypatch):
    def with_(driver, asked=None, cxx="g++", cuda=None):
        monkeypatch.setattr(build_backend, "driver_cuda", lambda: driver)
        monkeypatch.setattr(build_backend, "find_cxx", lambda: cxx)
        monkeypatch.setattr(build_backend, "find_cuda", lambda: cuda)
        monkeypatch.delenv("EMPSSL_CUDA", raising=False)
        if asked:
            monkeypatch.setenv("EMPSSL_CUDA", asked)

    return with_


@pytest.mark.parametrize(
    "driver,asked,taken,refused",
    [
        ((13, 0), None, "13.0.88", "13.1.80"),
        ((13, 0), "1", "13.0.48", "13.5.37"),
        ((13, 10), None, "13.10.1", "13.11.0"),
        ((14, 1), None, "14.1.0", "14.2.0"),
        (None, "1", "13.5.37", "12.9.86"),
    ],
)
def test_pip_is_to_fetch_an_nvcc_that_the_driver_can_run(machine, driver, asked, taken, refused):
    machine(driver, asked)
    text = (ROOT / "pyproject.toml").read_text()
    name = re.search(r'build-backend = "(\w+)"\nbackend-path = \["."\]', text).group(1)
    backend = importlib.import_module(name)
    for hook in (backend.get_requires_for_build_wheel, backend.get_requires_for_build_editable):
        wheels = [Requirement(wheel) for wheel in hook({})]
        assert {wheel.name.removeprefix("nvidia-") for wheel in wheels} == {
            *("cuda-nvcc", "cuda-crt", "nvvm", "cuda-runtime", "cuda-cccl")
        }
        for wheel in wheels:
            assert taken in wheel.specifier and refused not in wheel.specifier
            assert "12.9.86" not in wheel.specifier


@pytest.mark.parametrize(
    "has",
    [
        dict(driver=None),
        dict(driver=(13, 0), asked="0"),
        dict(driver=(13, 0), cuda=Path("/cuda")),
        dict(driver=(13, 0), cxx=None),
        dict(driver=(12, 9)),
        dict(driver=(12, 9), asked="1"),
        dict(driver=None, asked="1", cuda=Path("/cuda")),
    ],
    ids=str,
)
def test_pip_is_to_fetch_nothing(machine, has):
    machine(**has)
    assert build_backend.get_requires_for_build_editable() == []


def test_what_to_do_without_nvcc(machine):
    machine((12, 4))
    assert "update the driver" in build_backend.why_no_nvcc()
    assert build_backend.why_no_nvcc().count("CUDA 12.4") == 2
    machine((13, 0))
    assert "pip install -e ." in build_backend.why_no_nvcc()
    machine(None, "1")
    assert "pip install -e ." in build_backend.why_no_nvcc()
    for nothing in (dict(driver=None), dict(driver=(13, 0), asked="0")):
        machine(**nothing)
        assert build_backend.why_no_nvcc() == ""


def test_the_toolkit_is_found(monkeypatch, tmp_path):
    cudart = build_backend.cudart
    monkeypatch.setattr(
        build_backend, "cudart", lambda cuda: cudart(cuda) if tmp_path in cuda.parents else None
    )
    for name in ("CUDA_HOME", "CUDA_PATH"):
        monkeypatch.delenv(name, raising=False)
    wrapper = tmp_path / "wrapper" / "bin" / "nvcc"
    wrapper.parent.mkdir(parents=True)
    wrapper.touch(0o755)
    monkeypatch.setenv("PATH", str(wrapper.parent))
    monkeypatch.setattr(sys, "path", [str(tmp_path / "site-packages")])
    of_cuda_12 = tmp_path / "site-packages" / "nvidia" / "cuda_nvcc" / "bin" / "ptxas"
    of_cuda_12.parent.mkdir(parents=True)
    of_cuda_12.touch(0o755)
    assert build_backend.find_cuda() is None
    wheels = toolkit(tmp_path / "site-packages" / "nvidia" / "cu13")
    assert build_backend.find_cuda() == wheels
    monkeypatch.setenv("CUDA_HOME", str(toolkit(tmp_path / "home")))
    assert build_backend.find_cuda() == tmp_path / "home"
    monkeypatch.setenv("PATH", str(toolkit(tmp_path / "on_path") / "bin"))
    assert build_backend.find_cuda() == tmp_path / "on_path"


# ---- what the compilers are told ----


@pytest.mark.parametrize(
    "variables,archs",
    [
        (dict(), [75, 80, 90]),
        (dict(EMPSSL_ARCHS="9.0,80 80"), [80, 90]),
        (dict(GPU_CODE="sm_90"), [90]),
    ],
    ids=str,
)
def test_later_gpus_find_the_lowest_architectures_ptx(tools, variables, archs):
    done = build(tools, **variables)
    assert done.returncode == 0 and module(tools), done.stderr
    assert f"for CUDA sm_{', sm_'.join(map(str, archs))}." in done.stderr
    of_nvcc = calls(tools, "nvcc")
    assert sorted(Path(words[words.index("-c") + 1]).name for words in of_nvcc) == [
        "logdet_cuda.cu",
        "patches_cuda.cu",
    ]
    for words in of_nvcc:
        code = [word for word in words if word.startswith("-gencode")]
        expected = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in archs]
        assert code == expected + [f"-gencode=arch=compute_{archs[0]},code=compute_{archs[0]}"]


@pytest.mark.parametrize(
    "before,after,flags",
    [
        ("", "", []),
        ("ccache ", "", []),
        ("", " -m64", ["-m64"]),
        ("ccache ", " -m64 -stdlib=libc++ '-DTWO=1, 2'", None),
    ],
)
def test_nvcc_has_the_compiler_that_cxx_names(tools, before, after, flags):
    """Apart from a launcher before it, and with the flags after it."""
    cxx = str(tools / "cuda" / "bin" / "g++")
    done = build(tools, CXX=f"{before}{cxx}{after}")
    assert done.returncode == 0 and module(tools), done.stderr
    flags = ["-m64", "-stdlib=libc++", "-DTWO=1, 2"] if flags is None else flags
    for words in calls(tools, "g++"):
        assert words[: len(flags)] == flags
    assert len(calls(tools, "nvcc")) == 2 and bool(before) == bool(calls(tools, "ccache"))
    for words in calls(tools, "nvcc"):
        assert words[words.index("-ccbin") + 1] == cxx
        passed = [words[i + 1] for i, word in enumerate(words) if word == "-Xcompiler"]
        assert passed[:-1] == [flag.replace(",", "\\,") for flag in flags]


def test_where_nvcc_fails_the_cpu_is_built_for(tools):
    done = build(tools, FAILING="nvcc")
    assert done.returncode == 0 and module(tools)
    assert "nvcc could not compile the CUDA kernels" in done.stderr
    assert "built for the CPU, without CUDA." in done.stderr


def test_where_cuda_is_a_must_nvccs_failure_is_an_error(tools):
    done = build(tools, FAILING="nvcc", EMPSSL_CUDA="1")
    assert done.returncode == 1 and not module(tools)
    assert "nvcc cannot" in done.stdout
    assert done.stderr.splitlines()[-1].endswith("could not be built (see above).")


def test_where_both_compilers_fail_it_is_an_error_without_traceback(tools):
    done = build(tools, FAILING="nvcc g++")
    assert done.returncode == 1 and not module(tools)
    assert "Traceback" not in done.stderr
    assert done.stderr.splitlines()[-1].endswith("could not be built (see above).")


def test_cuda_left_out(tools):
    assert build(tools, EMPSSL_CUDA="0").returncode == 0 and module(tools)
    assert calls(tools, "nvcc") == [] and len(calls(tools, "g++")) > 2


@pytest.mark.parametrize("archs", ["ninety", " , "])
def test_architectures_that_are_none(tools, archs):
    done = build(tools, EMPSSL_ARCHS=archs)
    assert done.returncode and done.stderr.splitlines()[-1].endswith("give numbers such as 80 90.")


def test_an_nvcc_that_knows_none_of_the_architectures(tools):
    done = build(tools, GPU_CODE="sm_35")
    assert done.returncode == 0 and module(tools) and calls(tools, "nvcc") == []
    assert "knows none of the architectures" in done.stderr


def test_a_driver_that_no_wheel_fits_is_said(tools):
    before = "import build_backend as b\n"
    before += "b.driver_cuda, b.find_cuda = lambda: (12, 4), lambda: None"
    done = build(tools, before)
    assert done.returncode == 0 and module(tools) and calls(tools, "nvcc") == []
    said = [line for line in done.stderr.splitlines() if "update the driver" in line]
    assert len(said) == 1 and "toolkit of CUDA 12.4" in said[0]


def test_without_a_compiler_the_install_goes_on(tools):
    done = build(tools, CXX="no-such-compiler")
    assert done.returncode == 0 and not module(tools)
    assert "no C++ compiler was found" in done.stderr


def test_a_wheel_is_built_of_the_source_distribution(tools):
    """It holds all that a build needs, and the wheel holds the ops but not what built them."""
    source = tools / "source"
    files = "setup.py build_backend.py MANIFEST.in pyproject.toml README.md LICENSE empssl.py"
    for name in ("csrc", "empssl_support"):
        shutil.copytree(ROOT / name, source / name)
    for name in files.split():
        shutil.copy(ROOT / name, source)
    code = "import build_backend as b; b.build_{}('..')"
    done = python(tools, code.format("sdist"), source)
    assert done.returncode == 0, done.stderr
    (archive,) = tools.glob("empssl-*.tar.gz")
    shutil.unpack_archive(archive, tools / "extracted")
    (folder,) = (tools / "extracted").iterdir()
    done = python(tools, code.format("wheel"), folder)
    assert done.returncode == 0, done.stderr
    (wheel,) = (tools / "extracted").glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert {"empssl.py", "empssl_support/ops.py"} < set(names)
    assert any(re.fullmatch(r"_empssl.*\.so", name) for name in names)
    assert not any("build_backend" in name or "csrc" in name for name in names)
    assert len(calls(tools, "nvcc")) == 2
