"""``auto``: the fastest place that has the room, and the reason in one line."""

import logging

import pytest
import torch

from hift_ds.config import StateConfig
from hift_ds.errors import StateStoreError
from hift_ds.store import machine as room
from hift_ds.store.choose import build_resident_store, build_store, pick_residency
from hift_ds.store.device import DeviceStateStore
from hift_ds.store.disk import DiskStateStore
from hift_ds.store.host import HostStateStore
from hift_ds.store.machine import HostBytes, Machine, host_bytes, processes_on_node

CPU = torch.device("cpu")
GIB = 1 << 30


@pytest.mark.parametrize(
    ("needed", "processes", "device", "host", "disk", "expected"),
    [
        (10, 1, 24, 64, None, "device"),
        (20, 1, 24, 64, None, "host"),  # half of the device is for activations
        (20, 4, 24, 64, 900, "disk"),  # four processes share the host
        (40, 1, None, 64, 900, "device"),  # on a CPU the device is the host: nothing to move
        (60, 1, None, 64, 900, "disk"),
    ],
)
def test_the_fastest_place_with_room(needed, processes, device, host, disk, expected):
    picked, reason = pick_residency(
        needed * GIB, processes, device and device * GIB, HostBytes(64 * GIB, host * GIB), disk and disk * GIB
    )
    assert picked == expected and f"{needed:.2f} GiB" in reason


def test_no_room_anywhere_says_what_was_found():
    with pytest.raises(StateStoreError, match='81.00 GiB.*64.00 GiB of host memory.*no "hift.state.path"'):
        pick_residency(81 * GIB, 1, 24 * GIB, HostBytes(64 * GIB, 64 * GIB), None)
    with pytest.raises(StateStoreError, match="70.00 GiB free on the disk"):
        pick_residency(81 * GIB, 1, 24 * GIB, HostBytes(64 * GIB, 64 * GIB), 70 * GIB)


@pytest.mark.parametrize(("available", "kind"), [(1 << 40, DeviceStateStore), (4096, DiskStateStore)])
def test_auto_makes_way_for_the_store_it_chose(available, kind, tmp_path, caplog):
    machine = Machine(HostBytes(1 << 40, available))
    caplog.set_level(logging.INFO)
    store = build_store(StateConfig(residency="auto", path=str(tmp_path), codec="bf16_moments"), CPU, machine=machine)
    for chunk in range(2):
        store.ensure(chunk, "exp_avg", 1000, torch.float32)
        store.ensure(chunk, "exp_avg_sq", 1000, torch.float32)
    chosen = store.start()
    assert isinstance(chosen, kind) and chosen.keys(1) == ["exp_avg", "exp_avg_sq"] and chosen.total_bytes() == 8192
    assert sum("hift.state.residency: auto takes" in line for line in caplog.messages) == 1
    chosen.close()


def test_by_name():
    assert isinstance(build_store(StateConfig(), CPU), HostStateStore)
    assert build_store(StateConfig(), CPU).num_slots == 1
    assert build_store(StateConfig(slots=2), CPU).num_slots == 2
    assert build_store(StateConfig(prefetch=False, slots=2), CPU).num_slots == 0
    assert isinstance(build_store(StateConfig(step_on="host"), CPU), DeviceStateStore)
    assert isinstance(build_resident_store(StateConfig(), CPU), DeviceStateStore)


def test_a_node_with_too_little_memory_is_refused():
    store = HostStateStore(CPU, machine=Machine(HostBytes(1000, 1000)))
    store.ensure(0, "exp_avg", 1000, torch.float32)
    with pytest.raises(StateStoreError, match="disk"):
        store.start()


def test_a_container_limits_what_is_there(tmp_path):
    (tmp_path / "meminfo").write_text("MemTotal:  1000 kB\nMemFree: 10 kB\nMemAvailable: 800 kB\n")
    assert host_bytes(tmp_path, tmp_path) == (1000 * 1024, 800 * 1024)
    (tmp_path / "memory.max").write_text("max\n")
    assert host_bytes(tmp_path, tmp_path) == (1000 * 1024, 800 * 1024)
    (tmp_path / "memory.max").write_text(str(500 * 1024))
    (tmp_path / "memory.current").write_text(str(400 * 1024))
    assert host_bytes(tmp_path, tmp_path) == (500 * 1024, 100 * 1024)


def test_processes_on_this_node(monkeypatch):
    for name in ("LOCAL_WORLD_SIZE", "LOCAL_SIZE", "OMPI_COMM_WORLD_LOCAL_SIZE", "MPI_LOCALNRANKS"):
        monkeypatch.delenv(name, raising=False)
    assert processes_on_node() == 1
    monkeypatch.setenv("LOCAL_SIZE", "4")
    assert processes_on_node() == 4


def test_free_bytes_of_a_folder_that_is_not_there_yet(tmp_path):
    assert room.disk_bytes_free(tmp_path / "a" / "b") > 0
