"""How fast this machine is, measured: matrix products, updates, copies between host and device."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from hift_ds.store.streams import streams_of

_SIDE, _SIDE_ON_CPU = 4096, 512  # of the matrices that are multiplied: typical, and milliseconds
_UPDATE_NUMEL = 1 << 20  # parameters updated at once to measure an update
_LINK_BYTES = 1 << 26  # copied to measure a link
_LONG_ENOUGH_S = 0.1  # a measurement of such length needs no repetition


@dataclass(frozen=True)
class Link:
    """Bytes a second between the update device and where states rest, one way at a time."""

    into: float
    out: float


@dataclass(frozen=True)
class Speeds:
    """How fast a device and its host are.

    Attributes:
        flops_s: matrix products on the device, operations a second.
        link: bytes a second between the device and host memory, one way.
        device_s, host_s: an AdamW update, seconds a parameter.
    """

    flops_s: float
    link: float
    device_s: float = 3e-11
    host_s: float = 2e-10


# Where there is nothing to measure: a card that reaches a third of an A100's peak, on 16 lanes of PCIe 4 at 80 % of
# theirs, and a host with 8 memory channels.
ASSUMED_SPEEDS = Speeds(flops_s=100e12, link=20e9)


def measure_flops(device: torch.device, dtype: torch.dtype, side: int | None = None) -> float:
    """Operations a second of a product of two matrices of ``side`` rows and columns; the best of up to three.

    Args:
        side: ``None`` for one that is typical of the device.
    """
    side = side or (_SIDE_ON_CPU if device.type == "cpu" else _SIDE)
    a = torch.ones(side, side, device=device, dtype=dtype)
    return 2 * side**3 / _best_s(device, lambda: a @ a)


def measure_update(device: torch.device, numel: int) -> float:
    """Seconds per parameter of torch's AdamW in fp32, the usual optimizer; fused where the device has that kernel.

    Args:
        numel: parameters updated at once; no more than a million are.
    """
    numel = min(numel, _UPDATE_NUMEL)
    param = torch.nn.Parameter(torch.ones(numel, device=device))
    param.grad = torch.ones_like(param)
    try:
        return _best_s(device, torch.optim.AdamW([param], fused=True).step) / numel
    except RuntimeError:
        return _best_s(device, torch.optim.AdamW([param]).step) / numel


def measure_link(device: torch.device, num_bytes: int, pin_memory: bool) -> Link:
    """Copy ``num_bytes``, up to 64 MiB, between host memory and ``device``; the best of up to three each way."""
    num_bytes = max(min(num_bytes, _LINK_BYTES), 1)
    host = torch.zeros(num_bytes, dtype=torch.uint8, pin_memory=pin_memory and device.type != "cpu")
    there = torch.zeros(num_bytes, dtype=torch.uint8, device=device)
    into = _best_s(device, lambda: there.copy_(host, non_blocking=True))
    return Link(num_bytes / into, num_bytes / _best_s(device, lambda: host.copy_(there, non_blocking=True)))


def _best_s(device: torch.device, work: Callable[[], object]) -> float:
    streams, seconds = streams_of(device), []
    for _ in range(4):  # the first warms up
        started = time.perf_counter()
        work()
        if streams is not None:
            streams.current_stream(device).synchronize()
        seconds.append(time.perf_counter() - started)
        if sum(seconds[1:]) > _LONG_ENOUGH_S:  # processors without bf16 take seconds for a product
            break
    return max(min(seconds[1:]), 1e-9)
