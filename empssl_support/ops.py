"""The two compiled ops as PyTorch sees them.

`extract_patches` cuts and augments patches; `logdet_spd` gives log-determinants and inverses. Each
is a kernel for the CPU and one for CUDA (csrc/), and a reference in plain PyTorch: `logdet_spd_ref`
below, `extract_patches_ref` in pixels.py. Which of them does the work, and why, is what
`implementation` says. Types, shapes and, but for the CUDA kernel, values are checked here. Kernels
get plain pointers, sizes and the current stream; csrc/bindings.cpp checks again what would lead a
pointer out of its memory.
"""

import math

import torch
from torch import Tensor

from empssl_support.pixels import COLUMNS, ORDERS, K, empty_patches, extract_patches_ref

try:
    import _empssl

    _missing = ""
except ModuleNotFoundError:
    _empssl = None
    _missing = "the compiled module is not installed (pip install -e . builds it)"
except ImportError as error:
    _empssl = None
    _missing = f"the compiled module does not load ({error})"

# What a kernel can write, by the code that it knows the type by.
OUT_TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}

# LAPACK does matrices of so many rows. It gains on the CPU kernel as they grow: at 500 rows, the
# most that study/benchmarks/ops.py measures, it takes a sixth longer, at 100 four times as long.
LAPACK_FROM = 512


# ---- which implementation, and why ----


def implementation(
    op: str, device: torch.device, size: int, dtype: torch.dtype
) -> tuple[bool, str]:
    """Whether a kernel does `op` there, and the reason.

    op: "extract_patches", `size` the side of a patch, or "logdet_spd", `size` the rows of a matrix.
    """
    known = OUT_TYPES if op == "extract_patches" else (torch.float32, torch.float64)
    if _empssl is None:
        return False, _missing
    if device.type not in ("cpu", "cuda"):
        return False, f"there is no kernel for {device.type}"
    if dtype not in known:
        return False, f"there is no kernel for {dtype}"
    if device.type == "cuda":
        return cuda_implementation(op, device, size, dtype)
    if op == "logdet_spd" and size >= LAPACK_FROM:
        return False, f"LAPACK does matrices from {LAPACK_FROM} rows"
    return True, f"CPU kernel, {_empssl.isa(op)}"


def cuda_implementation(
    op: str, device: torch.device, size: int, dtype: torch.dtype
) -> tuple[bool, str]:
    if not _empssl.cuda:
        return False, "the module was built without CUDA: no nvcc, or none that works"
    index = torch.cuda.current_device() if device.index is None else device.index
    if reason := why_unusable(index):
        return False, reason
    with torch.cuda.device(device):
        if op == "extract_patches":
            largest = _empssl.extract_patches_cuda_largest()
        else:
            largest = _empssl.logdet_spd_cuda_largest(dtype.itemsize)
    if size > largest:
        return False, f"the CUDA kernel goes up to {largest}"
    return True, f"CUDA kernel, up to {largest}"


_tried: dict[int, str] = {}


def why_unusable(index: int) -> str:
    """Empty where this build's kernels run on that GPU; found out once, by running one.

    While a CUDA graph is captured nothing may wait for the GPU. A launch is taken to work then,
    and raises `RuntimeError` itself where it does not; the next call outside of a capture asks.
    """
    if index in _tried:
        return _tried[index]
    if torch.cuda.is_current_stream_capturing():
        return ""
    A = torch.ones(1, 1, 1, dtype=torch.float32, device=torch.device("cuda", index))
    try:
        run_logdet_kernel(A, torch.empty_like(A[:, 0, 0]), torch.empty_like(A))
        torch.cuda.synchronize(index)  # the launch returns before the kernel can have failed
        _tried[index] = ""
    except RuntimeError as error:  # a driver or a GPU that the build does not fit
        _tried[index] = f"the build's CUDA kernels do not run on this GPU ({error})"
    return _tried[index]


def describe(device: torch.device, s: int, k: int) -> list[str]:
    """A line an op: what does patches of side `s` and matrices of `k` rows, and why."""
    lines = []
    for op, size in (("extract_patches", s), ("logdet_spd", k)):
        compiled, why = implementation(op, device, size, torch.float32)
        lines.append(f"{op}: {'compiled' if compiled else 'PyTorch reference'} ({why})")
    return lines


# ---- extract_patches ----


def extract_patches(
    images: Tensor,
    index: Tensor,
    params: Tensor,
    s: int,
    dtype: torch.dtype = torch.float32,
    device: torch.device | None = None,
    check: bool = False,
) -> Tensor:
    """Cut and augment the patches that `params` describes, scaled to [-1, 1].

    images `(N, 3, H, W)` uint8; index `(b,)` int64, rows of `images`; params `(n, b, K)` float32
    from `sample_patches`; s side of a patch in pixels; device where the patches are made, by
    default the images'. Returns `(n*b, 3, s, s)` of `dtype`, channels-last, patch-major.

    Raises `ValueError` for wrong shapes or types, and where a crop or an index leaves what it
    indexes; the CUDA kernel makes such a patch NaN instead, which spares it waiting for the GPU,
    unless `check`.
    """
    device = images.device if device is None else device
    check_patches(images, index, params, s)
    if images.device.type != device.type:
        # A data set too large for the device: gather the batch's images, and send them alone.
        check_index(images, index)
        images = images[index]
        index = torch.arange(len(index))
    on_gpu = device.type == "cuda"
    if check or not (on_gpu and implementation("extract_patches", device, s, dtype)[0]):
        check_values(images, index, params)
    images, index, params = (send(x, device) for x in (images, index, params))
    return torch.ops.empssl.extract_patches(images, index, params, s, dtype)


def send(x: Tensor, device: torch.device) -> Tensor:
    """`x` on `device`: a GPU gets it while the program goes on, a CPU before."""
    to_gpu = device.type == "cuda"
    if to_gpu and not x.is_cuda:
        x = x.pin_memory()
    return x.to(device, non_blocking=to_gpu)


def check_patches(images: Tensor, index: Tensor, params: Tensor, s: int) -> None:
    if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] != 3:
        raise ValueError(f"images must be (N, 3, H, W) uint8, not {described(images)}.")
    if params.dtype != torch.float32 or params.ndim != 3 or params.shape[2] != K:
        raise ValueError(f"params must be (n, b, {K}) float32, not {described(params)}.")
    if index.dtype != torch.int64 or index.shape != params.shape[1:2]:
        raise ValueError(f"index must be ({params.shape[1]},) int64, not {described(index)}.")
    if s < 1:
        raise ValueError(f"a patch side of {s} pixels makes no patch; it must be at least 1.")


def described(x: Tensor) -> str:
    return f"{tuple(x.shape)} {x.dtype}"


def check_index(images: Tensor, index: Tensor) -> None:
    N = len(images)
    if index.numel() and not (index.min() >= 0 and index.max() < N):
        raise ValueError(f"index reaches outside the {N} images.")


def check_values(images: Tensor, index: Tensor, params: Tensor) -> None:
    """Values, where `check_patches` looks at types: on a GPU this waits for the device."""
    check_index(images, index)
    _, _, H, W = images.shape
    crop = params[..., :4]
    top, left, height, width = crop.unbind(-1)
    order = params[..., COLUMNS.index("order")]
    inside = (top >= 0) & (left >= 0) & (top + height <= H) & (left + width <= W)
    whole = (crop == crop.floor()).all(-1) & (height >= 1) & (width >= 1)
    known = (order >= 0) & (order < len(ORDERS))
    if not (inside & whole & known).all():
        raise ValueError(
            f"a crop is not whole pixels inside its {H}x{W} image, "
            f"or an order is no code below {len(ORDERS)}."
        )


@torch.library.custom_op("empssl::extract_patches", mutates_args=())
def _extract_patches(
    images: Tensor, index: Tensor, params: Tensor, s: int, dtype: torch.dtype
) -> Tensor:
    check_patches(images, index, params, s)
    if not dtype.is_floating_point:
        raise ValueError(
            f"patches can be float32, bfloat16, float16 or, by the reference, float64, not {dtype}."
        )
    if not index.device == params.device == images.device:
        raise ValueError(
            f"images, index and params must be on one device, not {images.device}, "
            f"{index.device} and {params.device}."
        )
    if not implementation("extract_patches", images.device, s, dtype)[0]:
        return extract_patches_ref(images, index, params, s, dtype)
    n, b, _ = params.shape
    out = empty_patches(n * b, s, dtype, images.device)
    run_patches_kernel(images, index.contiguous(), params.contiguous(), out)
    return out


def run_patches_kernel(images: Tensor, index: Tensor, params: Tensor, out: Tensor) -> None:
    n, b, _ = params.shape
    arguments = (
        images.data_ptr(),
        list(images.shape),
        list(images.stride()),
        index.data_ptr(),
        params.data_ptr(),
        n,
        b,
        out.shape[-1],
        out.data_ptr(),
        OUT_TYPES[out.dtype],
    )
    if images.device.type == "cuda":
        with torch.cuda.device(images.device):
            stream = torch.cuda.current_stream().cuda_stream
            _empssl.extract_patches_cuda(*arguments, stream)
    else:
        _empssl.extract_patches_cpu(*arguments, torch.get_num_threads())


@_extract_patches.register_fake
def _(images, index, params, s, dtype):
    n, b, _ = params.shape
    return empty_patches(n * b, s, dtype, images.device)


# ---- logdet_spd ----


def logdet_spd(A: Tensor) -> tuple[Tensor, Tensor]:
    """Log-determinants and inverses of symmetric positive definite matrices.

    `A (..., k, k)` float32 or float64, of which the lower triangle is read -> `(...)` and
    `(..., k, k)`. NaN, for that matrix alone, where it is not positive definite. Differentiable in
    both outputs: the gradient of log det A is the inverse, so nothing is factorised twice. Raises
    `ValueError` for another shape or type.
    """
    if A.ndim < 2 or 0 in A.shape[-2:]:
        raise ValueError(f"A must be (..., k, k) with k >= 1, not {described(A)}.")
    logdet, inverse = torch.ops.empssl.logdet_spd(A.reshape(-1, *A.shape[-2:]))
    return logdet.view(A.shape[:-2]), inverse.view(A.shape)


@torch.library.custom_op("empssl::logdet_spd", mutates_args=())
def _logdet_spd(A: Tensor) -> tuple[Tensor, Tensor]:
    square = A.ndim == 3 and A.shape[1] == A.shape[2] >= 1
    if A.dtype not in (torch.float32, torch.float64) or not square:
        raise ValueError(f"A must be (n, k, k) float32 or float64 with k >= 1, not {described(A)}.")
    A = A.contiguous()
    if not implementation("logdet_spd", A.device, A.shape[1], A.dtype)[0]:
        return logdet_spd_ref(A)
    logdet, inverse = A.new_empty(A.shape[0]), torch.empty_like(A)
    run_logdet_kernel(A, logdet, inverse)
    return logdet, inverse


def run_logdet_kernel(A: Tensor, logdet: Tensor, inverse: Tensor) -> None:
    n, k, _ = A.shape
    is_double = A.dtype == torch.float64
    arguments = (A.data_ptr(), n, k, logdet.data_ptr(), inverse.data_ptr(), is_double)
    if A.device.type == "cuda":
        with torch.cuda.device(A.device):
            _empssl.logdet_spd_cuda(*arguments, torch.cuda.current_stream().cuda_stream)
    else:
        _empssl.logdet_spd_cpu(*arguments, torch.get_num_threads())


@_logdet_spd.register_fake
def _(A):
    return A.new_empty(A.shape[0]), torch.empty_like(A, memory_format=torch.contiguous_format)


def save_inverse(ctx, inputs, output):
    _, inverse = output
    ctx.save_for_backward(inverse)
    # An output that the loss does not use has no gradient, rather than one of zeros.
    ctx.set_materialize_grads(False)


def logdet_backward(ctx, grad_logdet, grad_inverse):
    """d log det A = tr(A^-1 dA), and d A^-1 = -A^-1 dA A^-1."""
    (inverse,) = ctx.saved_tensors
    grad = torch.zeros_like(inverse)
    if grad_logdet is not None:
        grad = grad_logdet.view(-1, 1, 1) * inverse
    if grad_inverse is not None:
        grad = grad - inverse @ grad_inverse @ inverse
    return grad


_logdet_spd.register_autograd(logdet_backward, setup_context=save_inverse)


def logdet_spd_ref(A: Tensor) -> tuple[Tensor, Tensor]:
    """`logdet_spd` in PyTorch."""
    L, failed = torch.linalg.cholesky_ex(A)
    bad = (failed != 0).view(-1, 1, 1)
    # A factor that is not there is replaced by one that can be inverted; its results become NaN.
    identity = torch.eye(A.shape[-1], dtype=A.dtype, device=A.device)
    L = torch.where(bad, identity, L)
    logdet = 2 * L.diagonal(dim1=-2, dim2=-1).log().sum(-1)
    inverse = torch.cholesky_inverse(L.detach())
    bad |= ~logdet.isfinite().view(-1, 1, 1)
    return logdet.masked_fill(bad.flatten(), math.nan), inverse.masked_fill(bad, math.nan)
