"""The compiled ops as PyTorch sees them: `torch.ops.empssl.extract_patches` and `torch.ops.empssl.logdet_spd`.

Arguments are checked here, in one place; kernels get plain pointers, sizes and the current stream. `extract_patches`
and `logdet_spd` tell by `implementation` whether a kernel or the PyTorch reference does the work, and why.
"""

import torch
from torch import Tensor

try:
    import _empssl
except ImportError as error:
    _empssl, _missing = None, ("the compiled module is not installed (pip install -e . builds it)"
                               if isinstance(error, ModuleNotFoundError) else f"the compiled module does not load ({error})")

_references = {}            # by name, from empssl.py: what runs where no kernel does
OUT_TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
LAPACK_FROM = 512           # side from which LAPACK is as fast as the CPU kernel, as benchmarks/ops.py measured


def implementation(op: str, device: torch.device, size: int, dtype: torch.dtype) -> tuple[bool, str]:
    """Whether a kernel does `op` ("extract_patches" of side `size`, "logdet_spd" of `size` rows) there, and a reason."""
    if _empssl is None:
        return False, _missing
    if device.type not in ("cpu", "cuda"):
        return False, f"there is no kernel for {device.type}"
    if dtype not in (OUT_TYPES if op == "extract_patches" else (torch.float32, torch.float64)):
        return False, f"there is no kernel for {dtype}"
    if device.type == "cuda":
        if not _empssl.cuda:
            return False, "the module was built without CUDA: no nvcc, or none that works"
        if reason := _unusable(device.index if device.index is not None else torch.cuda.current_device()):
            return False, reason
        with torch.cuda.device(device):
            largest = getattr(_empssl, f"{op}_cuda_largest")(*(() if op == "extract_patches" else (dtype.itemsize,)))
        return size <= largest, f"CUDA kernel, up to {largest}"
    if op == "logdet_spd" and size >= LAPACK_FROM:
        return False, f"LAPACK is faster from {LAPACK_FROM} rows"
    return True, f"CPU kernel, {_empssl.isa()}"


def use_references(extract_patches_ref, logdet_spd_ref) -> None:
    _references.update(extract_patches=extract_patches_ref, logdet_spd=logdet_spd_ref)


_unusable_devices: dict[int, str] = {}


def _unusable(index: int) -> str:
    """Empty where this build's kernels run on the GPU; tried once a device, by running one."""
    if index not in _unusable_devices:
        device = torch.device("cuda", index)
        try:
            A = torch.ones(1, 1, 1, device=device)
            _logdet_kernel(A, torch.empty_like(A[:, 0, 0]), torch.empty_like(A))
            _unusable_devices[index] = ""
        except RuntimeError as error:                       # a driver or an architecture that the build does not fit
            _unusable_devices[index] = f"the build's CUDA kernels do not run on this GPU ({error})"
    return _unusable_devices[index]


def describe(device: torch.device, s: int, k: int) -> list[str]:
    """A line an op: what does patches of side `s` and matrices of `k` rows, and why."""
    lines = []
    for op, size in (("extract_patches", s), ("logdet_spd", k)):
        compiled, why = implementation(op, device, size, torch.float32)
        lines.append(f"{op}: {'compiled' if compiled else 'PyTorch reference'} ({why})")
    return lines


# ---- extract_patches ----

@torch.library.custom_op("empssl::extract_patches", mutates_args=())
def extract_patches(images: Tensor, index: Tensor, params: Tensor, s: int, dtype: torch.dtype) -> Tensor:
    check_patches(images, index, params, s)
    if not dtype.is_floating_point:
        raise ValueError(f"patches can be float32, bfloat16, float16 or, by the reference, float64, not {dtype}.")
    if not index.device == params.device == images.device:
        raise ValueError(f"images, index and params must be on one device, not {images.device}, {index.device} and "
                         f"{params.device}.")
    if not implementation("extract_patches", images.device, s, dtype)[0]:
        return _references["extract_patches"](images, index, params, s, dtype)
    n, b, _ = params.shape
    out = _empty_patches(n * b, s, dtype, images.device)
    index, params = index.contiguous(), params.contiguous()
    arguments = (images.data_ptr(), list(images.shape), list(images.stride()), index.data_ptr(), params.data_ptr(), n, b, s,
                 out.data_ptr(), OUT_TYPES[dtype])
    if images.device.type == "cuda":
        with torch.cuda.device(images.device):
            _empssl.extract_patches_cuda(*arguments, torch.cuda.current_stream().cuda_stream)
    else:
        _empssl.extract_patches_cpu(*arguments, torch.get_num_threads())
    return out


@extract_patches.register_fake
def _(images, index, params, s, dtype):
    return _empty_patches(params.shape[0] * params.shape[1], s, dtype, images.device)


def _empty_patches(count, s: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.empty(count, 3, s, s, dtype=dtype, device=device, memory_format=torch.channels_last)


def check_patches(images: Tensor, index: Tensor, params: Tensor, s: int) -> None:
    if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] != 3:
        raise ValueError(f"images must be (N, 3, H, W) uint8, not {tuple(images.shape)} {images.dtype}.")
    if params.dtype != torch.float32 or params.ndim != 3 or params.shape[2] != 13:
        raise ValueError(f"params must be (n, b, 13) float32, not {tuple(params.shape)} {params.dtype}.")
    if index.dtype != torch.int64 or index.shape != params.shape[1:2]:
        raise ValueError(f"index must be ({params.shape[1]},) int64, not {tuple(index.shape)} {index.dtype}.")
    if s < 1:
        raise ValueError(f"a patch side of {s} pixels makes no patch; it must be at least 1.")


def check_crops(images: Tensor, index: Tensor, params: Tensor) -> None:
    """Values, where `check_patches` looks at types: on a GPU this waits for the device."""
    (N, _, H, W), (top, left, height, width) = images.shape, params[..., :4].unbind(-1)
    if index.numel() and not (0 <= int(index.min()) and int(index.max()) < N):
        raise ValueError(f"index reaches outside the {N} images.")
    order = params[..., 9]
    if not ((params[..., :4] == params[..., :4].floor()).all(-1) & (top >= 0) & (left >= 0) & (height >= 1) & (width >= 1)
            & (top + height <= H) & (left + width <= W) & (order >= 0) & (order < 24)).all():
        raise ValueError(f"a crop is not whole pixels inside its {H}x{W} image, or an order is no code below 24.")


# ---- logdet_spd ----

@torch.library.custom_op("empssl::logdet_spd", mutates_args=())
def logdet_spd(A: Tensor) -> tuple[Tensor, Tensor]:
    if A.dtype not in (torch.float32, torch.float64) or A.ndim != 3 or A.shape[1] != A.shape[2] or A.shape[1] < 1:
        raise ValueError(f"A must be (n, k, k) float32 or float64 with k >= 1, not {tuple(A.shape)} {A.dtype}.")
    A = A.contiguous()
    if not implementation("logdet_spd", A.device, A.shape[1], A.dtype)[0]:
        return _references["logdet_spd"](A)
    logdet, inverse = A.new_empty(A.shape[0]), torch.empty_like(A)
    _logdet_kernel(A, logdet, inverse)
    return logdet, inverse


def _logdet_kernel(A: Tensor, logdet: Tensor, inverse: Tensor) -> None:
    arguments = (A.data_ptr(), A.shape[0], A.shape[1], logdet.data_ptr(), inverse.data_ptr(), A.dtype == torch.float64)
    if A.device.type == "cuda":
        with torch.cuda.device(A.device):
            _empssl.logdet_spd_cuda(*arguments, torch.cuda.current_stream().cuda_stream)
    else:
        _empssl.logdet_spd_cpu(*arguments, torch.get_num_threads())


@logdet_spd.register_fake
def _(A):
    return A.new_empty(A.shape[0]), torch.empty_like(A, memory_format=torch.contiguous_format)


def _save_inverse(ctx, inputs, output):
    ctx.save_for_backward(output[1])


def _logdet_backward(ctx, grad_logdet, grad_inverse):
    """d log det A = tr(A^-1 dA); d A^-1 = -A^-1 dA A^-1."""
    (inverse,) = ctx.saved_tensors
    return grad_logdet.view(-1, 1, 1) * inverse - inverse @ grad_inverse @ inverse


logdet_spd.register_autograd(_logdet_backward, setup_context=_save_inverse)
