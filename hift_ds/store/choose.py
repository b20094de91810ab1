"""Which store a run gets: by name, or by what the machine has."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from typing import NoReturn

import torch

from hift_ds.config import StateConfig
from hift_ds.errors import StateStoreError
from hift_ds.store.base import StateStore, Weights
from hift_ds.store.device import DeviceStateStore
from hift_ds.store.disk import DiskStateStore
from hift_ds.store.encoded import EncodedStateStore
from hift_ds.store.host import HostStateStore
from hift_ds.store.machine import THIS_MACHINE, HostBytes, Machine, disk_bytes_free, processes_on_node
from hift_ds.store.split import SplitStateStore

logger = logging.getLogger(__name__)

# Shares of what is free now that states may take: activations, gradients and data come later.
DEVICE_SHARE, HOST_SHARE, DISK_SHARE = 0.5, 0.7, 0.95


def build_store(
    state: StateConfig, device: torch.device, *, seed: int = 0, machine: Machine = THIS_MACHINE
) -> StateStore:
    """The store of the rotating groups.

    Args:
        device: where updates run. With ``step_on: host`` that is the CPU, and host memory is where states
            rest.
        seed: of stochastic rounding; different on every rank.
        machine: what it has room for.

    Raises:
        StateStoreError: the folder for the disk tier cannot be written.
    """
    if state.residency == "auto":
        return AutoStateStore(device, state, seed, machine)
    return _build(state, state.residency, device, seed, machine)


def build_split_store(state: StateConfig, device: torch.device, *, seed: int, machine: Machine) -> SplitStateStore:
    """The store of rotating groups of which the host updates a part.

    Args:
        device: where the others are updated. The rest as for :func:`build_store`.
    """
    moved = _build(state, state.residency, device, seed, machine)
    return SplitStateStore(device, moved, DeviceStateStore(torch.device("cpu"), state.codec, seed))


def build_resident_store(state: StateConfig, device: torch.device, *, seed: int = 0) -> StateStore:
    """The store of the always-active group: never moved, in the same compact form."""
    return DeviceStateStore(device, state.codec, seed)


def _build(state: StateConfig, residency: str, device: torch.device, seed: int, machine: Machine) -> EncodedStateStore:
    num_slots = state.first_slots
    if residency == "disk":
        assert state.path is not None
        return DiskStateStore(
            device, state.codec, seed, num_slots, path=state.path, io=state.io, pin_memory=state.pin_memory
        )
    if residency == "host" and state.step_on != "host":
        return HostStateStore(device, state.codec, seed, num_slots, pin_memory=state.pin_memory, machine=machine)
    return DeviceStateStore(device, state.codec, seed)  # states rest where updates run: nothing to move


def pick_residency(
    needed: int, processes: int, free_on_device: int | None, host: HostBytes, free_on_disk: int | None
) -> tuple[str, str]:
    """The fastest place with room for ``needed`` bytes of each of ``processes``.

    Args:
        free_on_device: ``None`` if the update device is the CPU.
        free_on_disk: ``None`` without a path.

    Returns:
        (residency, the reason in words).

    Raises:
        StateStoreError: no place has the room.
    """
    wanted = needed * processes
    tried = [f"optimizer states need {_gib(needed)} a process, {processes} on this node"]
    if free_on_device is not None:
        tried.append(f"{_gib(free_on_device)} free on the device, of which they may take {DEVICE_SHARE:.0%}")
        if needed <= DEVICE_SHARE * free_on_device:
            return "device", "; ".join(tried)
    tried.append(f"{_gib(host.available)} of host memory available, of which they may take {HOST_SHARE:.0%}")
    if wanted <= HOST_SHARE * host.available:
        return ("device" if free_on_device is None else "host"), "; ".join(tried)
    if free_on_disk is not None:
        tried.append(f"{_gib(free_on_disk)} free on the disk, of which they may take {DISK_SHARE:.0%}")
        if wanted <= DISK_SHARE * free_on_disk:
            return "disk", "; ".join(tried)
    else:
        tried.append('no "hift.state.path" for a disk')
    raise StateStoreError(f'"hift.state.residency": auto found no room: {"; ".join(tried)}; try "hift.state.codec"')


def device_bytes_free(device: torch.device) -> int:
    """The free memory of ``device``, in bytes; 0 if this kind of accelerator does not tell, so that nothing is put
    there on trust."""
    tell = getattr(torch.get_device_module(device), "mem_get_info", None)
    return tell(device)[0] if tell is not None else 0


def _gib(num_bytes: float) -> str:
    return f"{num_bytes / 2**30:.2f} GiB"


@dataclass
class AutoStateStore(StateStore):
    """Collects what is to be kept until ``start``, when its size is known, and then makes way for a store
    with room."""

    state: StateConfig
    seed: int
    machine: Machine = THIS_MACHINE
    _wanted: list[tuple] = field(default_factory=list, init=False)

    def ensure(self, chunk: int, key: str, numel: int, dtype: torch.dtype, weights: Weights | None = None) -> None:
        self._wanted.append((chunk, key, numel, dtype, weights))

    def start(self) -> StateStore:
        on_cpu = self.device.type == "cpu"
        laid_out = self._laid_out(DeviceStateStore(self.device, self.state.codec, self.seed))
        residency, reason = pick_residency(
            laid_out.total_bytes() + laid_out.held_bytes(),
            processes_on_node(),
            None if on_cpu else device_bytes_free(self.device),
            self.machine.host_bytes(),
            disk_bytes_free(self.state.path) if self.state.path else None,
        )
        logger.info("hift.state.residency: auto takes %s: %s", residency, reason)
        return self._laid_out(_build(self.state, residency, self.device, self.seed, self.machine)).start()

    def _laid_out(self, store: EncodedStateStore) -> EncodedStateStore:
        for reservation in self._wanted:
            store.ensure(*reservation)
        store.may_hold = self.may_hold
        return store

    def _not_started(self, *args: object) -> NoReturn:
        raise AssertionError("start() chooses the store; go on with what it returns")

    # One function that raises, whatever it is called with, in place of many signatures.
    keys = fetch = evict = read = write = hold = release = take_back = _not_started  # type: ignore[assignment]
    host_bytes = check_room = _not_started  # type: ignore[assignment]
