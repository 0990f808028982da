"""Several processes on one batch, as torchrun starts them: who this one is, what they exchange.

Every function here also works in a single process, where it has next to nothing to do.
"""

import datetime
import os
import sys

import torch
import torch.distributed as dist
from torch import Tensor, nn

# Messages between hosts' memories go through this group, which gives up after a minute.
_prompt = None
# While process 0 decodes images or probes, the others wait in this one, a day if need be.
_patient = None


def join_processes(device: str) -> None:
    """Meet the other processes that torchrun started, if it did. Then only process 0 prints."""
    global _prompt, _patient
    if not started_by_torchrun() or dist.is_initialized():
        return
    on_gpu = device.startswith("cuda")
    if on_gpu:
        torch.cuda.set_device(device)
    minute = datetime.timedelta(minutes=1)
    dist.init_process_group("nccl" if on_gpu else "gloo", timeout=minute)
    _prompt = dist.new_group(backend="gloo", timeout=minute)
    _patient = dist.new_group(backend="gloo", timeout=datetime.timedelta(days=1))
    if rank() > 0:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115, it stays open until the end


def leave_processes() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


def started_by_torchrun() -> bool:
    return "TORCHELASTIC_RUN_ID" in os.environ


def rank() -> int:
    """The number of this process, from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def processes() -> int:
    """How many processes there are."""
    return dist.get_world_size() if dist.is_initialized() else 1


def share(count: int) -> slice:
    """Which of `count` things are this process's: an equal share, in order."""
    return slice(rank() * count // processes(), (rank() + 1) * count // processes())


def others_are_lost(error: RuntimeError) -> bool:
    """Whether it says that another process is gone or silent, as NCCL and gloo say it."""
    return processes() > 1 and (isinstance(error, dist.DistError) or "gloo" in str(error))


# ---- waiting and telling ----


def wait_for_first() -> None:
    """Wait, as long as it takes, until process 0 has come to this line too."""
    if processes() > 1:
        dist.barrier(_patient)


def first_process_first(load):
    """`load()` in process 0, that may download or decode; then in the others too."""
    if rank() > 0:
        wait_for_first()
    value = load()
    if rank() == 0:
        wait_for_first()
    return value


def from_first(compute):
    """`compute()` in process 0; every process gets its value."""
    if processes() == 1:
        return compute()
    answer = [compute() if rank() == 0 else None]
    dist.broadcast_object_list(answer, group=_patient)
    return answer[0]


def gather_objects(value) -> list:
    """`value` of each process."""
    values = [value] * processes()
    if processes() > 1:
        dist.all_gather_object(values, value, group=_patient)
    return values


def largest(numbers: list[float]) -> list[float]:
    """Each number's maximum over the processes, so that all of them decide alike."""
    answer = torch.tensor(numbers, dtype=torch.float64)
    if processes() > 1:
        dist.all_reduce(answer, dist.ReduceOp.MAX, group=_prompt)
    return answer.tolist()


def sum_over_processes(x: Tensor) -> Tensor:
    """Of what each process may have worked on for long: the first to be done wait for the last."""
    if processes() > 1:
        dist.barrier(_patient)
        dist.all_reduce(x)
    return x


# ---- training on one batch together ----


class _Gather(torch.autograd.Function):
    """Concatenate what the processes have, along the images.

    Every process computes the whole loss, so the gradient of its own rows is its own slice of what
    comes back. DistributedDataParallel then averages over the processes where the whole gradient is
    their sum, hence the factor.
    """

    @staticmethod
    def forward(ctx, z):
        parts = [torch.empty_like(z) for _ in range(processes())]
        dist.all_gather(parts, z)
        return torch.cat(parts, dim=1)

    @staticmethod
    def backward(ctx, grad):
        return grad.chunk(processes(), dim=1)[rank()] * processes()


def gather_images(z: Tensor) -> Tensor:
    """`(n, b / W, d)` of each of W processes -> `(n, b, d)` on each of them; differentiable."""
    return _Gather.apply(z.contiguous()) if processes() > 1 else z


def distribute(encoder: nn.Module, compiled: bool = False) -> nn.Module:
    """What runs `encoder`: compiled or not, and its gradients averaged over the processes."""
    model = encoder
    if processes() > 1:
        if next(encoder.parameters()).is_cuda:
            nn.SyncBatchNorm.convert_sync_batchnorm(encoder)
        else:
            print(
                "PyTorch synchronises BatchNorm on GPUs only: "
                "each process uses the statistics of its own images."
            )
        model = nn.parallel.DistributedDataParallel(encoder)
    return torch.compile(model) if compiled else model


def agree_on_buffers(encoder: nn.Module) -> None:
    """Process 0's BatchNorm statistics for all: those of unsynchronised processes differ."""
    if processes() > 1:
        for buffer in encoder.buffers():
            dist.broadcast(buffer, 0)
