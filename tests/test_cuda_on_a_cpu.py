"""The CUDA kernels where there is no GPU: their source, compiled for the CPU.

It is compiled by way of cuda_on_a_cpu.h, and held against the specification that test_ops.py is.
What a GPU adds, its arithmetic, its memory and its speed, is for a GPU to test.
"""

import ctypes
import re
import shutil
import subprocess
import sys
from inspect import signature
from pathlib import Path

import pytest
import torch

import test_ops
from empssl import Augmentation, sample_patches
from empssl_support import ops
from test_patches import one

COMPILER = next(filter(shutil.which, ("c++", "g++", "clang++")), None)
pytestmark = pytest.mark.skipif(
    ops._empssl is None or COMPILER is None or sys.platform != "linux",
    reason="no compiled module, no compiler, or none of Linux's fibers",
)
HERE, CSRC = Path(__file__).parent, Path(__file__).parent.parent / "csrc"
LARGEST = {torch.float32: 239, torch.float64: 169}  # rows of a matrix in an H100's shared memory
WRAPPERS = """
#include "empssl.h"
extern "C" const char* extract_patches(const PatchJob* job) {
    return extract_patches_cuda(*job, nullptr);
}
template <typename T>
const char* run(const void* A, int64_t n, int64_t k, void* logdet, void* inverse) {
    return logdet_spd_cuda((const T*)A, n, k, (T*)logdet, (T*)inverse, nullptr);
}
extern "C" const char* logdet_spd(const void* A, int64_t n, int64_t k, void* logdet,
                                  void* inverse, bool is_double) {
    return is_double ? run<double>(A, n, k, logdet, inverse) : run<float>(A, n, k, logdet, inverse);
}
extern "C" int64_t largest(int64_t element_bytes) {
    return element_bytes ? logdet_spd_cuda_largest(element_bytes) : extract_patches_cuda_largest();
}
"""


def as_cpp(source: str) -> str:
    """A launch as a call, and the shared memory that a launch sizes as a pointer to it."""
    source, launches = re.subn(
        r"(\w+<\w+>)\s*<<<(.*?)>>>\((.*?)\);", r"on_a_cpu::launch([&] { \1(\3); }, \2);", source
    )
    source, arrays = re.subn(
        r"extern __shared__ (?:__align__\(16\) )?([\w ]+) (\w+)\[\];",
        r"\1* \2 = (\1*)on_a_cpu::shared;",
        source,
    )
    assert launches == arrays == 1
    return source


def compiled(folder: Path, change=lambda source: source) -> ctypes.CDLL:
    for name in ("cuda_runtime.h", "cuda_bf16.h", "cuda_fp16.h"):
        (folder / name).write_text("")
    (folder / "wrappers.cpp").write_text(WRAPPERS)
    for name in ("patches_cuda", "logdet_cuda"):
        (folder / f"{name}.cpp").write_text(as_cpp(change((CSRC / f"{name}.cu").read_text())))
    subprocess.run(
        [
            COMPILER,
            "-O1",
            "-std=c++17",
            "-fno-strict-aliasing",
            "-w",
            "-shared",
            "-fPIC",
            "-I",
            folder,
            "-I",
            CSRC,
            "-include",
            HERE / "cuda_on_a_cpu.h",
            *folder.glob("*.cpp"),
            "-o",
            folder / "kernels.so",
        ],
        check=True,
    )
    library = ctypes.CDLL(str(folder / "kernels.so"))
    library.extract_patches.restype = library.logdet_spd.restype = ctypes.c_char_p
    library.largest.restype = ctypes.c_int64
    return library


class Job(ctypes.Structure):
    """`PatchJob` of csrc/empssl.h."""

    _fields_ = (
        [("images", ctypes.c_void_p)]
        + [(name, ctypes.c_int64) for name in "N H W stride_n stride_c stride_h stride_w".split()]
        + [("index", ctypes.c_void_p), ("params", ctypes.c_void_p)]
        + [(name, ctypes.c_int64) for name in "nbs"]
        + [("out", ctypes.c_void_p), ("out_type", ctypes.c_int)]
    )


class InThePlaceOfTheCPUs:
    """The compiled module, but the CPU's kernels are CUDA's."""

    def __init__(self, library: ctypes.CDLL):
        self.library, self.module, self.calls = library, ops._empssl, 0

    def __getattr__(self, name):
        return getattr(self.module, name)

    def extract_patches_cpu(
        self, images, shape, strides, index, params, n, b, s, out, out_type, threads
    ):
        N, _, H, W = shape
        self.run(
            self.library.extract_patches,
            ctypes.byref(Job(images, N, H, W, *strides, index, params, n, b, s, out, out_type)),
        )

    def logdet_spd_cpu(self, A, n, k, logdet, inverse, is_double, threads):
        integer, pointer = ctypes.c_int64, ctypes.c_void_p
        self.run(
            self.library.logdet_spd,
            pointer(A),
            integer(n),
            integer(k),
            pointer(logdet),
            pointer(inverse),
            ctypes.c_bool(is_double),
        )

    def run(self, call, *arguments):
        self.calls += 1
        if error := call(*arguments):
            raise RuntimeError(error.decode())


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    return compiled(tmp_path_factory.mktemp("kernels"))


@pytest.fixture
def kernels(library, monkeypatch):
    kernels = InThePlaceOfTheCPUs(library)
    monkeypatch.setattr(ops, "_empssl", kernels)
    yield kernels
    assert kernels.calls


def test_patches(kernels):
    test_ops.test_random_patches("cpu")
    for s in (16, 32, 33, 64):
        test_ops.test_the_papers_patches("cpu", s, None)


@pytest.mark.parametrize(
    "alone",
    [
        dict(),
        dict(flip=1),
        dict(brightness=1.4),
        dict(contrast=0.6),
        dict(saturation=1.4),
        dict(hue=-0.2),
        dict(grey=1),
        dict(sigma=1.5),
        dict(solarize=1),
    ],
    ids=str,
)
def test_each_operation_alone(kernels, alone):
    test_ops.test_each_operation_alone("cpu", alone, None)


def test_every_order(kernels):
    for order in range(24):
        test_ops.test_every_order("cpu", order)


@pytest.mark.parametrize(
    "test",
    [
        "all_off_is_the_plain_crop_exactly",
        "large_images_and_shrinking",
        "strided_and_offset_inputs",
        "solarize_inverts_from_128_up",
    ],
)
def test_special_patches(kernels, test):
    test = getattr(test_ops, f"test_{test}")
    test("cpu", None) if "isa" in signature(test).parameters else test("cpu")


@pytest.mark.parametrize("s", [16, 5])  # stored 16 bytes at a time, and one by one
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_the_rounded_float32(kernels, s, dtype):
    images, index = test_ops.random_images(9, 32, 32), torch.arange(9)
    params = sample_patches(9, 6, (32, 32), Augmentation())
    half, full = (test_ops.extract(images, index, params, s, t) for t in (dtype, torch.float32))
    assert half.dtype == dtype and torch.equal(half, full.to(dtype))


@pytest.mark.parametrize("bad", test_ops.BAD_PATCHES, ids=str)
def test_outside_is_nan_for_that_patch_alone(kernels, bad):
    bad = dict(bad)
    index = torch.tensor([0, bad.pop("index", 0)])
    x = test_ops.extract(
        test_ops.random_images(1, 8, 8), index, torch.cat([one(), one(**bad)], 1), 16, torch.float32
    )
    assert x[1].isnan().all() and not x[0].isnan().any()


@pytest.mark.parametrize("factor", ["brightness", "contrast", "saturation", "hue"])
def test_a_factor_that_is_nan_makes_its_patch_nan_alone(kernels, factor):
    test_ops.test_a_factor_that_is_nan_makes_its_patch_nan_alone("cpu", factor, None)


def test_matrices(kernels):
    test_ops.test_logdet_and_inverse("cpu")
    test_ops.test_only_the_lower_triangle_is_read("cpu")
    test_ops.test_coding_rate_and_its_gradient_are_the_papers("cpu", 100, 1024)


@pytest.mark.parametrize("dtype", LARGEST)
def test_sizes_up_to_the_largest(kernels, dtype):
    largest = kernels.library.largest(dtype.itemsize)
    assert largest == LARGEST[dtype] and kernels.library.largest(0) == 64
    for k in (1, 2, 31, 32, 33, 100, 128, largest):
        test_ops.test_sizes_on_both_sides_of_every_handover("cpu", k, dtype, None)
    with pytest.raises(RuntimeError, match="more shared memory than a block has"):
        test_ops.logdet(test_ops.spd(1, largest + 1, dtype=dtype))


@pytest.mark.parametrize("k", [2, 40])
def test_a_matrix_that_is_not_positive_definite_is_nan_alone(kernels, k):
    test_ops.test_a_matrix_that_is_not_positive_definite_is_nan_alone("cpu", k, None)


def test_a_training_follows_the_references(kernels, monkeypatch):
    test_ops.test_a_training_with_kernels_and_one_with_references_agree("cpu", 0, monkeypatch)


@pytest.mark.parametrize(
    "change,seen",
    [
        (
            lambda source: source.replace("__syncthreads();", ""),
            (AssertionError, RuntimeError),  # wrong, or a deadlock that is seen
        ),
        (
            lambda source: source.replace("__syncthreads();", "if (threadIdx.x) __syncthreads();"),
            RuntimeError,
        ),
        (
            lambda source: source.replace("* element", "* element / 2").replace(
                "return 3 *", "return 1 *"
            ),
            RuntimeError,
        ),
    ],
    ids=["no barrier", "a barrier that one thread passes by", "half the shared memory"],
)
def test_what_is_wrong_on_a_gpu_is_seen(change, seen, tmp_path, monkeypatch):
    monkeypatch.setattr(ops, "_empssl", InThePlaceOfTheCPUs(compiled(tmp_path, change)))
    with pytest.raises(seen):
        test_ops.test_each_operation_alone("cpu", dict(sigma=1.5), None)
    with pytest.raises(seen):
        test_ops.test_sizes_on_both_sides_of_every_handover("cpu", 33, torch.float32, None)
