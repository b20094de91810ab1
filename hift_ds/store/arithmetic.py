"""The line at the start of a run: what a step moves, over which link, and when computing hides it."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from hift_ds.store.movers import streams_of

# A token costs 6 operations a parameter in full training: 2 forward, 4 backward. A layer group's turn has all
# of the forward and, averaged over the groups, half of the backward for inputs and its own part of the other.
FLOPS_PER_TOKEN_AND_PARAMETER = 3.1

_UPDATE_NUMEL = 1 << 20
_LINK_BYTES = 1 << 26


@dataclass(frozen=True)
class Link:
    """Bytes a second between the update device and where states rest, one way at a time."""

    into: float
    out: float


@dataclass(frozen=True)
class StateArithmetic:
    """One process's figures, measured or counted; the sentences follow from them.

    Args:
        residency: in words.
        total_bytes: kept by this process.
        step_bytes: moved each way in a step, averaged over a cycle.
        link: ``None`` if nothing moves.
        prefetch, slots: as configured.
        model_numel: parameters that a token passes.
        flops_s: matrix products in the weights' dtype.
        update_numel: parameters that this process updates in a step, averaged.
        device_s, host_s: seconds per updated parameter; equal without an accelerator.
        host_link: ``None`` without an accelerator.
        weight_bytes: of one weight, and of its gradient.
        step_on: as configured.
        own_numel: parameters whose states this process keeps.
        chunk_bytes: of the largest run of states that moves at once.
    """

    residency: str
    total_bytes: int
    step_bytes: float
    link: Link | None
    prefetch: bool
    slots: int
    model_numel: int
    flops_s: float
    update_numel: float
    device_s: float
    host_s: float
    host_link: Link | None
    weight_bytes: int
    step_on: str
    own_numel: int = 0
    chunk_bytes: int = 0

    @property
    def transfer_s(self) -> float:
        """Of a step. Two slots let both directions run at once."""
        if self.link is None:
            return 0.0
        one_way = (self.step_bytes / self.link.into, self.step_bytes / self.link.out)
        return max(one_way) if self.slots > 1 else sum(one_way)

    @property
    def token_s(self) -> float:
        """Computing, per token of a step."""
        return FLOPS_PER_TOKEN_AND_PARAMETER * self.model_numel / self.flops_s

    @property
    def hiding_tokens(self) -> float:
        """Tokens a step, on this process, from which computing takes longer than the transfers."""
        return self.transfer_s / self.token_s

    @property
    def host_step_s(self) -> float:
        """Of ``step_on: host``: gradients down, update, weights up, none of it behind computing."""
        assert self.host_link is not None
        moved = self.update_numel * self.weight_bytes
        return moved / self.host_link.out + self.update_numel * self.host_s + moved / self.host_link.into

    def line(self) -> str:
        return f"states: {_bytes(self.total_bytes)} {self.residency}; {self._moves()}; {self._where_to_step()}"

    def _moves(self) -> str:
        if self.link is None:
            return "nothing moves"
        text = (
            f"a step moves {_bytes(self.step_bytes)} in at {_bytes(self.link.into)}/s and out at "
            f"{_bytes(self.link.out)}/s: {self.transfer_s:.3g} s"
        )
        if not self.prefetch:
            return text + ", all of it waited for (prefetch: false)"
        return (
            f"{text}, hidden from {self.hiding_tokens:,.0f} tokens a step on "
            f"({_count(self.model_numel).strip()} parameters at {_count(self.flops_s)}FLOP/s)"
        )

    def _where_to_step(self) -> str:
        if self.host_link is None:
            return f"an update takes {self.update_numel * self.host_s:.3g} s, here device and host are one"
        device, host = self.update_numel * self.device_s, self.host_step_s
        text = f"an update takes {device:.3g} s on the device, {host:.3g} s on the host with its transfers"
        # step_on device costs max(computing, transfer) + device, step_on host costs computing + host.
        equal_tokens = (self.transfer_s + device - host) / self.token_s
        if self.step_on == "host" or self.link is None or equal_tokens <= 0:
            faster = "device" if device <= host else "host"
            return f"{text}: step_on {faster} is faster here"
        return f"{text}: step_on host is faster here below {equal_tokens:,.0f} tokens a step, device above"


def measure_flops(device: torch.device, dtype: torch.dtype, side: int) -> float:
    """Of a product of two square matrices; best of three after one that warms up."""
    a = torch.ones(side, side, device=device, dtype=dtype)
    return 2 * side**3 / _best_s(device, lambda: a @ a)


def measure_update(device: torch.device, numel: int) -> float:
    """Seconds per parameter of torch's AdamW, the usual optimizer; fused where the device has that kernel."""
    numel = min(numel, _UPDATE_NUMEL)
    param = torch.nn.Parameter(torch.ones(numel, device=device))
    param.grad = torch.ones_like(param)
    try:
        return _best_s(device, torch.optim.AdamW([param], fused=True).step) / numel
    except RuntimeError:
        return _best_s(device, torch.optim.AdamW([param]).step) / numel


def measure_link(device: torch.device, num_bytes: int, pin_memory: bool) -> Link:
    """Between host memory and ``device``."""
    num_bytes = max(min(num_bytes, _LINK_BYTES), 1)
    host = torch.zeros(num_bytes, dtype=torch.uint8, pin_memory=pin_memory and device.type != "cpu")
    there = torch.zeros(num_bytes, dtype=torch.uint8, device=device)
    into = _best_s(device, lambda: there.copy_(host, non_blocking=True))
    return Link(num_bytes / into, num_bytes / _best_s(device, lambda: host.copy_(there, non_blocking=True)))


def _best_s(device: torch.device, work: Callable[[], object]) -> float:
    streams, seconds = streams_of(device), []
    for _ in range(4):
        started = time.perf_counter()
        work()
        if streams is not None:
            streams.current_stream(device).synchronize()
        seconds.append(time.perf_counter() - started)
    return max(min(seconds[1:]), 1e-9)


def _bytes(number: float) -> str:
    for unit, size in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if number >= size:
            return f"{number / size:.3g} {unit}"
    return f"{number:.0f} bytes"


def _count(number: float) -> str:
    """With a prefix: "6.74 G", "17.4 k"."""
    for prefix, size in (("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= size:
            return f"{number / size:.3g} {prefix}"
    return f"{number:.3g} "
