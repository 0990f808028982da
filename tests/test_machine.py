"""What a record says of the program, its commit and the machine."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from empssl_support import machine

ROOT = Path(__file__).parent.parent


@pytest.fixture
def started_as(monkeypatch):
    """`started_as(words, module)` makes it look as if the user had started the program so."""

    def start(words, module=None):
        spec = SimpleNamespace(name=module) if module else None
        monkeypatch.setattr(sys.modules["__main__"], "__spec__", spec)
        monkeypatch.setattr(sys, "argv", words)

    return start


@pytest.mark.parametrize(
    "words,module,recorded",
    [
        (["/home/me/code/empssl.py", "--ops"], None, "python empssl.py --ops"),
        (["/home/me/bin/empssl", "--ops"], None, "empssl --ops"),
        (["/x/__main__.py"], "study.baselines.__main__", "python -m study.baselines"),
        (["empssl.py", "--data-dir", "my photos"], None, "python empssl.py --data-dir 'my photos'"),
        ([""], None, "python empssl.py"),
    ],
)
def test_a_command_is_recorded_as_it_would_be_typed(words, module, recorded, started_as):
    started_as(words, module)
    assert machine.provenance("cpu")["command"] == recorded


def test_what_a_user_is_told_to_type_has_the_path_of_the_program(started_as):
    started_as(["code/empssl.py", "--ops"])
    assert machine.program() == ["python", "code/empssl.py"]


def test_a_figure_stands_beside_where_it_comes_from():
    about = json.loads(json.dumps(machine.provenance("cpu")))
    assert about["versions"]["torch"] == torch.__version__
    assert set(about["versions"]) == {"python", "torch", "torchvision"}
    assert about["processes"] == 1
    assert about["hardware"].startswith("cpu (")
    assert about["commit"] and about["started"][:2] == "20"


# ---- hardware ----


@pytest.mark.parametrize(
    "found,said",
    [
        ({"avx2": True, "avx512_f": True, "avx512_bf16": True}, ", AVX2, AVX-512, bf16"),
        ({"avx2": True, "avx512_f": True}, ", AVX2, AVX-512"),
        ({"avx2": True, "avx512_f": False, "amx_bf16": True}, ", AVX2, AMX"),
        ({}, ""),
    ],
)
def test_hardware_says_which_vector_instructions_there_are(found, said, monkeypatch):
    has = {"cpu_name": "Abacus"} | found
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: has, raising=False)
    threads = torch.get_num_threads()
    assert machine.describe_device("cpu") == f"cpu (Abacus, {threads} threads{said})"


def test_hardware_of_a_torch_that_does_not_say(monkeypatch):
    monkeypatch.delattr(torch.cpu, "get_capabilities", raising=False)
    assert f"{torch.get_num_threads()} threads)" in machine.describe_device("cpu")


def test_a_gpu_is_called_by_its_name(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: f"name of {device}")
    assert machine.describe_device("cuda:1") == "name of cuda:1"


# ---- memory ----


def test_memory_is_in_bytes():
    before = machine.peak_memory("cpu")
    block = torch.ones(50_000_000)
    after = machine.peak_memory("cpu")
    assert set(after) == {"peak_memory"}
    assert before["peak_memory"] <= after["peak_memory"]
    assert block.nbytes < after["peak_memory"] < machine.memory_of_this_machine()


def test_memory_of_a_system_that_does_not_say(monkeypatch):
    monkeypatch.delattr(os, "sysconf", raising=False)
    assert machine.memory_of_this_machine() == float("inf")


@pytest.mark.skipif(sys.platform != "linux", reason="of glibc")
def test_freed_memory_is_kept_for_the_next_step():
    code = (
        "import torch\n"
        "from pathlib import Path\n"
        "from empssl_support.machine import keep_freed_memory\n"
        "def held():\n"
        "    x = torch.zeros(50_000_000)\n"
        "    del x\n"
        "    lines = Path('/proc/self/status').read_text().splitlines()\n"
        "    print(next(line.split()[1] for line in lines if line.startswith('VmRSS')))\n"
        "held()\n"
        "keep_freed_memory()\n"
        "held()\n"
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    said = subprocess.check_output([sys.executable, "-c", code], text=True, env=environment)
    given_back, kept = (int(word) for word in said.split())
    assert kept - given_back > 150_000  # of 195,000 KiB


# ---- the commit ----


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    """The program as if it lay in a repository of one commit."""
    monkeypatch.setattr(machine, "__file__", str(tmp_path / "empssl_support" / "machine.py"))
    for variable in ("GIT_DIR", "GIT_WORK_TREE", "GIT_INDEX_FILE"):
        monkeypatch.delenv(variable, raising=False)
    for name in ("empssl.py", "README.md", "study/results/step.jsonl"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("as it was\n")
    git(tmp_path, "init", "-q")
    git(tmp_path, "add", ".")
    git(tmp_path, "-c", "user.name=a", "-c", "user.email=a@b.c", "commit", "-q", "-m", "one")
    return tmp_path


def git(folder, *words):
    done = subprocess.run(["git", "-C", folder, *words], check=True, capture_output=True, text=True)
    return done.stdout.strip()


def test_a_commit_is_dirty_where_code_was_changed_and_not_where_words_were(checkout):
    head = git(checkout, "rev-parse", "HEAD")
    assert machine.commit() == head
    (checkout / "README.md").write_text("other words\n")
    (checkout / "study" / "results" / "step.jsonl").write_text("another figure\n")
    (checkout / "notes.py").write_text("not tracked\n")
    assert machine.commit() == head
    (checkout / "empssl.py").write_text("other code\n")
    assert machine.commit() == f"{head}-dirty"


def test_the_commit_is_none_of_a_repository_that_the_program_is_only_installed_in(
    checkout, monkeypatch
):
    (checkout / ".gitignore").write_text(".venv\n")
    installed = checkout / ".venv" / "empssl_support"
    installed.mkdir(parents=True)
    monkeypatch.setattr(machine, "__file__", str(installed / "machine.py"))
    assert machine.commit() == "unknown"


def test_the_commit_is_unknown_outside_git_and_without_it(tmp_path, monkeypatch):
    monkeypatch.setattr(machine, "__file__", str(tmp_path / "empssl_support" / "machine.py"))
    assert machine.commit() == "unknown"
    monkeypatch.setenv("PATH", "")
    assert machine.commit() == "unknown"


@pytest.mark.parametrize(
    "given,turns",
    [
        ({}, "1000"),
        ({"GOMP_SPINCOUNT": "7"}, "7"),
        ({"OMP_WAIT_POLICY": "active"}, None),
    ],
    ids=["by default", "chosen by the user", "a policy of the user's"],
)
def test_idle_threads_sleep_unless_the_user_says_otherwise(given, turns):
    """It is in the environment by the time that torch is imported."""
    code = (
        "import os, sys\n"
        "class Watch:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name == 'torch': print(os.environ.get('GOMP_SPINCOUNT'))\n"
        "sys.meta_path.insert(0, Watch())\n"
        "import empssl\n"
    )
    ours = ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")
    environment = {key: value for key, value in os.environ.items() if key not in ours}
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=environment | given,
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.split()[0] == str(turns)


@pytest.mark.skipif(not Path("/proc/self/schedstat").exists(), reason="Linux says it")
def test_the_seconds_without_a_core_are_those_that_others_had_it():
    """Three programs on one core: what this one did not run, it stood ready for."""
    code = (
        "import os, subprocess, sys, time\n"
        "from empssl_support.machine import seconds_without_a_core\n"
        "os.sched_setaffinity(0, [min(os.sched_getaffinity(0))])\n"
        "busy = [sys.executable, '-c', 'while True: pass']\n"
        "others = [subprocess.Popen(busy) for _ in range(2)]\n"
        "try:\n"
        "    began = time.perf_counter(), time.process_time(), seconds_without_a_core()\n"
        "    while time.perf_counter() < began[0] + 2: pass\n"
        "    ended = time.perf_counter(), time.process_time(), seconds_without_a_core()\n"
        "finally:\n"
        "    for other in others: other.kill()\n"
        "print(*(after - before for before, after in zip(began, ended)))\n"
    )
    done = subprocess.check_output([sys.executable, "-c", code], cwd=ROOT, text=True)
    seconds, ran, waited = map(float, done.split())
    assert ran < 0.6 * seconds
    assert waited == pytest.approx(seconds - ran, abs=0.1 * seconds)
