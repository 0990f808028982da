"""Seconds of a call, and the rates that floors are measured by."""

import statistics
import time

import torch


def now(device: torch.device) -> float:
    """Seconds on the clock, once a GPU has done what it was told."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def median_seconds(call, device: torch.device) -> float:
    """Median seconds of `call(i)`, i counting up from 1, after a warm-up with i = 0.

    Of at least three calls and half a second, but no more calls after 20 seconds. A GPU is given
    ten calls at once, so that the host's share of a launch is hidden, as in training.
    """
    at_once = 10 if device.type == "cuda" else 1
    call(0)
    times = []
    while sum(times) < 20 and (len(times) < 3 or sum(times) < 0.5):
        started = now(device)
        for i in range(at_once):
            call(len(times) * at_once + i + 1)
        times.append(now(device) - started)
    return statistics.median(times) / at_once


def product_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Floating-point operations a second of a large matrix product."""
    size = 8192 if device.type == "cuda" else 2048
    a = torch.randn(size, size, device=device).to(dtype)
    return 2 * size**3 / median_seconds(lambda i: a @ a, device)


def copy_rate(device: torch.device) -> float:
    """Bytes read and written a second by a large copy."""
    source = torch.ones(2**28 if device.type == "cuda" else 2**26, device=device)
    target = torch.empty_like(source)
    return 2 * source.nbytes / median_seconds(lambda i: target.copy_(source), device)
