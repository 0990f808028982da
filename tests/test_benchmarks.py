"""The benchmarks verify before they time, and keep what they timed."""

import subprocess

import pytest
import torch
from torchvision.transforms.v2.functional import to_pil_image

import empssl
from study.benchmarks import busy, ops, pipelines, step
from study.experiments import records, tables

CPU = torch.device("cpu")
TINY = "--patches 2 --batch 20 --patch-size 8 --hidden 16 --projector 16 --dim 8 --eval-patches 4"


@pytest.fixture(autouse=True)
def results(tmp_path, monkeypatch):
    monkeypatch.setattr(records, "RESULTS", tmp_path / "results")


def never(call, device):
    pytest.fail("it was timed")


def slightly_off(*arguments):
    patches = empssl.extract_patches_ref(*arguments).clone()
    patches[0, 0, 0, 0] += 0.01
    return patches


def not_a_number(*arguments):
    return torch.full_like(empssl.extract_patches_ref(*arguments), torch.nan)


@pytest.mark.parametrize("wrong", [slightly_off, not_a_number])
def test_wrong_patches_are_not_timed(wrong, monkeypatch):
    monkeypatch.setattr(empssl, "extract_patches", wrong)
    monkeypatch.setattr(ops, "median_seconds", never)
    with pytest.raises(ArithmeticError, match="extract_patches is wrong .* nothing is timed"):
        ops.bench_patches(CPU, b=2, n=2, s=8)


empssl_rate = empssl.coding_rate


def wrong_gradient(z):
    return empssl_rate(z).detach() + z.sum() - z.sum().detach()


@pytest.mark.parametrize("wrong", [lambda z: -empssl_rate(z), wrong_gradient])
def test_a_wrong_coding_rate_is_not_timed(wrong, monkeypatch):
    monkeypatch.setattr(empssl, "coding_rate", wrong)
    monkeypatch.setattr(ops, "median_seconds", never)
    with pytest.raises(ArithmeticError, match="coding_rate is wrong"):
        ops.bench_coding_rate(CPU, n=2, b=4, d=8)


def test_a_wrong_inverse_is_not_timed(monkeypatch):
    monkeypatch.setattr(empssl, "logdet_spd", lambda A: (torch.logdet(A), A))
    monkeypatch.setattr(ops, "median_seconds", never)
    with pytest.raises(ArithmeticError, match="logdet_spd is wrong"):
        ops.bench_logdet(CPU, 4)


def called_once(call, device):
    call(0)
    return 1e-3


def test_what_is_right_is_timed_beside_its_peers(monkeypatch):
    """Peers that work: each is called once."""
    monkeypatch.setattr(ops, "median_seconds", called_once)
    rows = ops.bench_patches(CPU, b=4, n=2, s=8)
    rows += ops.bench_coding_rate(CPU, n=2, b=4, d=8) + ops.bench_logdet(CPU, 5)
    rows += ops.bench_common_part(CPU, b=2, n=2)
    names = [row["name"] for row in rows]
    for name in (
        "this op, float32",
        "this op, bfloat16",
        "its PyTorch reference",
        "torchvision v2, patch by patch",
        "this op, float32, one core",
        "its kernel alone, float32, one core",
        "PIL, the official pipeline, one core",
        "official loop, d x d",
        "cholesky_ex and cholesky_inverse, 5 rows",
    ):
        assert name in names
    records.keep("ops", {"name": "a", "seed": 0, "hardware": "abacus", "metrics": {"rows": rows}})
    assert "| `extract_patches` | this op, bfloat16 | 8,000 patches/s |" in tables.ops()


def test_the_kernel_alone_makes_the_ops_patches(monkeypatch):
    """What is timed as the kernel alone leaves all patches in its output."""
    kernel, made = ops.ops.run_patches_kernel, []

    def kept(images, index, params, out):
        kernel(images, index, params, out)
        made.append((out, empssl.extract_patches_ref(images, index, params, 8)))

    monkeypatch.setattr(ops.ops, "run_patches_kernel", kept)
    ops.kernel_alone(4, 3, 8)(0)
    ((ours, expected),) = made
    torch.testing.assert_close(ours, expected, atol=1e-5, rtol=0)


def test_peers_make_patches_in_their_range():
    batch = torch.rand(8, 3, 32, 32)
    torchvision, on_pil = pipelines.torchvision(16), pipelines.torchvision(16, on_pil=True)
    patches = [torchvision(image) for image in batch]
    patches += [on_pil(to_pil_image(image)) for image in batch]
    patches = torch.stack(patches)
    assert patches.shape == (16, 3, 16, 16)
    assert patches.min() >= -1 and patches.max() <= 1 and patches.std() > 0.1


def test_albumentations_makes_patches():
    pytest.importorskip("albumentations")
    pipeline = pipelines.albumentations(16)
    image = (torch.rand(32, 32, 3) * 255).byte().numpy()
    patch = pipeline(image)
    assert patch.shape == (16, 16, 3) and abs(patch).max() <= 1 and patch.std() > 0.1


def test_dali_makes_patches():
    pytest.importorskip("nvidia.dali")
    (patches,) = pipelines.dali(16, (torch.rand(8, 3, 32, 32) * 255).byte())(0)
    patches = patches.as_array()
    assert patches.shape == (8, 16, 16, 3) and abs(patches).max() <= 1 and patches.std() > 0.1


def test_a_peer_that_is_not_installed_is_said(capsys):
    def missing():
        raise ImportError("No module named 'x'")

    assert ops.installed({"x": missing, "y": lambda: 3}) == {"y": 3}
    assert "x is not measured: No module named 'x'" in capsys.readouterr().out


def test_a_peer_that_fails_is_left_out(capsys):
    def fails(i):
        raise RuntimeError("Intel oneMKL ERROR")

    assert ops.rows_of("coding_rate", {"a peer": fails}, CPU) == []
    assert "Intel oneMKL ERROR" in capsys.readouterr().out


def test_the_peers_of_the_coding_rate_are_the_coding_rate():
    z = torch.nn.functional.normalize(torch.randn(3, 4, 8, dtype=torch.float64), dim=-1)
    for rate in (ops.official_loop, ops.small_cholesky):
        torch.testing.assert_close(rate(z), empssl.coding_rate(z))


@pytest.fixture
def busy_programs(monkeypatch):
    """Those that the benchmark started; what is timed says whether one of them runs."""
    programs, popen = [], subprocess.Popen

    def started(command, **how):
        programs.append(popen(command, **how))
        return programs[-1]

    def measured(changes):
        runs = any(program.poll() is None for program in programs)
        return 60.0 if runs and changes else 40.0 if runs else 100.0

    monkeypatch.setattr(busy.subprocess, "Popen", started)
    monkeypatch.setattr(busy, "measure", measured)
    yield programs
    assert programs and all(program.poll() is not None for program in programs)


def test_a_core_is_busy_for_the_second_measurement_alone(busy_programs):
    busy.main([])
    default, one_thread, *_ = tables.busy().splitlines()[2:]
    assert default.startswith("| as it is | 100 | 40 | 40% |")
    assert one_thread.startswith("| one thread, `OMP_NUM_THREADS=1` | 100 | 60 | 60% |")


def test_the_busy_program_ends_with_a_measurement_that_fails(busy_programs, monkeypatch):
    calls = []

    def failing(changes):
        calls.append(changes)
        if len(calls) == 2:
            raise OSError
        return 100.0

    monkeypatch.setattr(busy, "measure", failing)
    with pytest.raises(OSError):
        busy.main([])


def test_what_is_timed_runs_in_a_process_with_the_ways_environment(monkeypatch):
    """A stand-in for Python says which threads it was given."""
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    shown = 'import os; print("seconds"); print(os.environ["OMP_NUM_THREADS"])'
    output = subprocess.check_output

    def called(command, **how):
        assert command[1:] == ["-m", "study.benchmarks.busy", "this-process"]
        return output([command[0], "-c", shown], **how)

    monkeypatch.setattr(busy.subprocess, "check_output", called)
    assert busy.measure({}) == 2 and busy.measure({"OMP_NUM_THREADS": "1"}) == 1
    monkeypatch.setattr(busy, "IMAGES", 50)
    assert busy.patches_a_second() > 0


def test_the_parts_of_a_step_are_kept_and_drawn(monkeypatch):
    monkeypatch.setattr(step, "median_seconds", called_once)
    monkeypatch.setattr(step, "product_rate", lambda device, dtype: 1e9)
    monkeypatch.setattr(step, "copy_rate", lambda device: 1e9)
    step.main(f"--preset laptop --device cpu --precision float32 {TINY}".split())
    (record,) = records.read("step")
    assert set(records.PROVENANCE) <= set(record)
    assert (record["name"], record["preset"]) == ("laptop-cpu-float32", "laptop")
    parts = record["metrics"]["parts"]
    assert [part["part"] for part in parts] == list(step.PARTS)
    assert sum(part["share"] for part in parts) == pytest.approx(1)
    floors = {part["part"]: part["floor"] for part in parts}
    # 40 patches of 8 x 8: 115 operations a pixel; backward does twice what forward does.
    assert floors["patches"] == pytest.approx(40 * 64 * 115 / 1e9)
    assert floors["backward"] == 2 * floors["forward"] > 0
    *rows, whole = tables.step().splitlines()[2:]
    assert [row.split(" | ")[3] for row in rows] == list(step.PARTS)
    seconds = sum(part["seconds"] for part in parts)
    assert whole.endswith(f"| all | {seconds * 1e3:.1f} ms |  |  |")
