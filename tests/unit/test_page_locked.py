"""Page-locked memory: what is locked is what was asked for, and where none is left the run goes on."""

from __future__ import annotations

import logging
from types import SimpleNamespace

import pytest
import torch

import model_zoo
from hift_ds.engine.zero3 import shards
from hift_ds.hf.model_structure import build_on_meta
from hift_ds.store.host import HostStateStore
from hift_ds.store.machine import HostBytes, Machine
from hift_ds.store.page_locked import SLAB_BYTES, PageLockedMemory, return_page_locked


def without_memory(num_bytes):
    return torch.empty(num_bytes, dtype=torch.uint8, device="meta")


@pytest.mark.parametrize("size", ["llama2_7b", "llama2_13b", "llama3_8b"])
def test_shards_take_little_more_than_their_bytes(size):
    """Each weight by itself would be rounded up to a power of two: 1.3 to 1.7 times the bytes for Llama 2."""
    numels = [param.numel() for param in build_on_meta(model_zoo.config(size)).parameters()]
    memory = PageLockedMemory(2 * sum(numels), without_memory)
    pieces = [memory.whole(numel, torch.bfloat16) for numel in numels]
    assert [piece.numel() for piece in pieces] == numels
    assert memory.num_bytes <= 1.08 * 2 * sum(numels)


def test_pieces_do_not_overlap_and_start_as_zeros_where_promised():
    memory = PageLockedMemory(0, lambda n: torch.full((n,), 7, dtype=torch.uint8)[: 1 << 20])
    pieces = [
        memory.whole(1000, torch.int16).fill_(1),
        memory.some(500),
        memory.whole(77, torch.float32).fill_(1),
    ]
    pieces[1].fill_(1)
    spans = sorted((p.data_ptr(), p.data_ptr() + p.numel() * p.element_size()) for p in pieces)
    assert all(end <= start for (_, end), (start, _) in zip(spans, spans[1:], strict=False))
    assert all(start % 4 == 0 for start, _ in spans)
    assert not memory.some(300).any() and memory.some(0).numel() == 0
    assert memory.some(1 << 30).numel() < 1 << 20  # the rest of that slab, not more


def test_memory_that_cannot_be_locked_is_ordinary_and_said_once(caplog):
    def refuses(num_bytes):
        raise RuntimeError("CUDA error: out of memory\nmore of it")

    memory = PageLockedMemory(0, refuses)
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            assert memory.whole(SLAB_BYTES // 2 + 1, torch.uint8).numel() == SLAB_BYTES // 2 + 1
    assert memory.exhausted and memory.num_bytes == 0
    assert len(caplog.records) == 1 and "out of memory)" in caplog.records[0].message


def test_shards_that_are_loaded_as_such_are_cut_from_slabs_too(monkeypatch):
    monkeypatch.setattr(shards, "get_accelerator", lambda: SimpleNamespace(device_name=lambda: "cuda"))
    memory = PageLockedMemory(0, without_memory)
    init = SimpleNamespace(remote_device="cpu", pin_memory=True, local_device="cpu")
    for numel in (1000, 3001):
        weight = torch.nn.Parameter(torch.empty(0, dtype=torch.bfloat16))
        weight.ds_numel, weight.ds_zero_partition_world_size = numel, 2
        shards._give_shard(weight, init, None, memory)
        assert weight.ds_tensor.device.type == "meta" and weight.ds_tensor.numel() == -(-numel // 2)
    assert memory.num_bytes == SLAB_BYTES  # both
    init.pin_memory = False
    shards._give_shard(weight, init, None, memory)
    assert weight.ds_tensor.device.type == "cpu"


@pytest.mark.parametrize(
    ("processes", "available", "locks"),
    [(1, 10_000, False), (1, 1_000_000, True), (4, 30_000, False), (4, 100_000, True)],
)
def test_states_are_not_page_locked_beyond_what_is_free(processes, available, locks, caplog, monkeypatch):
    """20 kB of each of the processes on the node."""
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(processes))
    store = HostStateStore(torch.device("cpu"), machine=Machine(HostBytes(1 << 40, available)))
    store.pin_memory, store._locked = (
        True,
        PageLockedMemory(0, lambda n: torch.empty(1 << 16, dtype=torch.uint8)),
    )
    store.ensure(0, "master", 5000, torch.float32)
    with caplog.at_level(logging.WARNING):
        assert store.start() is store
    assert store.pin_memory is locks and bool(store._locked.num_bytes) is locks
    assert ("GiB are free: they are not page-locked" in caplog.text) is not locks
    assert not store.read(0)["master"].any()
    store.close()
    assert not store._host and store._locked.num_bytes == 0  # given back


def test_the_system_gets_back_what_torch_keeps_for_the_next_time(monkeypatch):
    """Where there is such memory, and where torch can give it back."""
    given_back = []
    monkeypatch.setattr(torch.accelerator, "empty_host_cache", lambda: given_back.append(1), raising=False)
    return_page_locked(torch.device("cpu"))
    assert not given_back
    return_page_locked(torch.device("meta"))
    assert given_back == [1]

    def refuses():
        raise RuntimeError("no allocator for host memory on this accelerator")

    monkeypatch.setattr(torch.accelerator, "empty_host_cache", refuses)
    return_page_locked(torch.device("meta"))
