"""Gathers what :class:`StateArithmetic` is computed from: counts of this run, measurements of this
machine."""

from __future__ import annotations

import math

import torch
from torch import nn

from hift_ds.config import StateConfig
from hift_ds.layers.grouping import ALWAYS
from hift_ds.optim.group_optimizer import GroupOptimizer
from hift_ds.store.arithmetic import StateArithmetic, measure_flops, measure_link, measure_update
from hift_ds.store.disk import DiskStateStore
from hift_ds.store.encoded import EncodedStateStore
from hift_ds.store.host import HostStateStore
from hift_ds.store.parked import ParkedStateStore

_CPU = torch.device("cpu")


def gather_state_arithmetic(
    optimizer: GroupOptimizer, module: nn.Module, state: StateConfig, device: torch.device
) -> StateArithmetic:
    """For this process. Takes some tens of milliseconds of measuring, once.

    Args:
        device: where the model computes.
    """
    store = optimizer.store
    assert isinstance(store, EncodedStateStore)
    rotating = [group for index, group in optimizer.groups.items() if index != ALWAYS]
    numels = [sum(member.numel for member in group.members) for group in rotating]
    chunk_bytes = [store.num_bytes(chunk.id) for group in rotating for chunk in group.chunks]
    model_numel = sum(math.prod(optimizer.parameters.shape_of(param)) for param in module.parameters())
    dtype = next(param.dtype for group in rotating for param in (m.param for m in group.members))
    on_cpu = device.type == "cpu"
    largest = max(numels)
    host_s = measure_update(_CPU, max(largest, 1))
    return StateArithmetic(
        residency=_residency(store, optimizer.update_device),
        total_bytes=store.total_bytes(),
        step_bytes=sum(chunk_bytes) / len(rotating),
        link=store.measured_link() if isinstance(store, ParkedStateStore) else None,
        prefetch=state.prefetch,
        slots=state.first_slots,
        model_numel=model_numel,
        flops_s=measure_flops(device, dtype, _side(device, model_numel)),
        update_numel=sum(numels) / len(numels),
        device_s=host_s if on_cpu else measure_update(device, max(largest, 1)),
        host_s=host_s,
        host_link=None if on_cpu else measure_link(device, 4 * max(largest, 1), state.pin_memory),
        weight_bytes=dtype.itemsize,
        step_on=state.step_on,
        own_numel=max(sum(numels), 1),
        chunk_bytes=max(chunk_bytes),
    )


def _residency(store: EncodedStateStore, update_device: torch.device) -> str:
    if isinstance(store, DiskStateStore):
        return f"on disk ({'direct' if store.speed is None or store.speed.direct else 'buffered'} I/O)"
    if isinstance(store, HostStateStore) or update_device.type == "cpu":
        return "in host memory"
    return "on the device"


def _side(device: torch.device, model_numel: int) -> int:
    """Of the matrices to multiply: large enough to be typical, small enough to take milliseconds."""
    if device.type != "cpu":
        return 4096
    return 1024 if model_numel > 10_000_000 else 128
