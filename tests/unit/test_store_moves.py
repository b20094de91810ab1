"""Prefetch against a plain dictionary: whatever order, size, number of slots and speed of transfers, fetch
gives what was last evicted. The movers here run copies as late or as early as the rules allow, so a missing
wait gives wrong numbers and not a lucky pass."""

import random
import time
from types import FunctionType

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from hift_ds.errors import StateStoreError
from hift_ds.store import host
from hift_ds.store.base import Traffic
from hift_ds.store.device import DeviceStateStore
from hift_ds.store.disk import DiskStateStore
from hift_ds.store.file_io import page_aligned
from hift_ds.store.host import HostStateStore
from hift_ds.store.layout import aligned
from hift_ds.store.movers import IN, OUT, Mover, StreamMover, ThreadMover
from tests.helpers.fake_streams import use_fake_streams

CPU = torch.device("cpu")
SIZES = [700, 3, 1290, 41, 700, 1]  # elements per key of each chunk: ragged, tiny, repeated
KEYS = {"master": torch.float32, "exp_avg": torch.float32, "codes": torch.uint8}


class Lazy(Mover):
    """Runs a copy only when somebody waits for it, or for one that comes after it."""

    def submit(self, direction, copy, after=()):
        return {"copy": copy, "after": [ticket for ticket in after if ticket], "done": False}

    def wait(self, ticket):
        if ticket is None or ticket["done"]:
            return
        for earlier in ticket["after"]:
            self.wait(earlier)
        ticket["copy"]()
        ticket["done"] = True


class Slow(ThreadMover):
    """Transfers that take long compared with any computation, for different times."""

    def submit(self, direction, copy, after=()):
        delay = random.Random(repr((direction, len(self.delays)))).choice([0, 0.001, 0.004])
        self.delays.append(delay)
        return super().submit(direction, lambda: (time.sleep(delay), copy()), after)

    delays: list = []


def on_fake_streams(monkeypatch, traffic):
    use_fake_streams(monkeypatch)
    return StreamMover(traffic, CPU)


MOVERS = {
    "lazy": lambda patch, traffic: Lazy(traffic),
    "slow": lambda patch, traffic: Slow(traffic, CPU),
    "streams": on_fake_streams,
    "default": None,
}


def behind_a_buffer(path, slots):
    """As between disk and accelerator, through a buffer smaller than most chunks."""
    store = DiskStateStore(CPU, (), 0, slots, path=path)
    store._on_cpu = False
    store._buffers = {direction: page_aligned(4096) for direction in (IN, OUT)}
    return store


PLACES = {
    "host": lambda path, slots: HostStateStore(CPU, (), 0, slots),
    "disk": lambda path, slots: DiskStateStore(CPU, (), 0, slots, path=path),
    "disk, through a buffer": behind_a_buffer,
}


def filled(store, sizes=SIZES):
    """Chunks with known values; and those values."""
    expected = {}
    for chunk, numel in enumerate(sizes):
        for key, dtype in KEYS.items():
            store.ensure(chunk, key, numel, dtype)
        expected[chunk] = {key: torch.full((numel,), chunk, dtype=dtype) for key, dtype in KEYS.items()}
    assert store.start() is store
    for chunk, values in expected.items():
        for key, tensor in values.items():
            store.write(chunk, key, tensor)
    store.synchronize()
    return expected


def visit(store, expected, chunk):
    tensors = store.fetch(chunk)
    assert tensors.keys() == expected[chunk].keys()
    for key, tensor in tensors.items():
        assert torch.equal(tensor, expected[chunk][key]), (chunk, key)
        tensor.add_(1)
        expected[chunk][key] = tensor.clone()
    store.evict(chunk)


def tensors_in(thing, seen=None):
    """All that ``thing`` keeps alive, with elements."""
    seen = set() if seen is None else seen
    if id(thing) in seen or isinstance(thing, type):
        return []
    seen.add(id(thing))
    if isinstance(thing, torch.Tensor):
        return [thing] if thing.numel() else []
    if isinstance(thing, dict):
        parts = list(thing.values())
    elif isinstance(thing, list | tuple | set):
        parts = list(thing)
    elif isinstance(thing, FunctionType):
        parts = [cell.cell_contents for cell in getattr(thing, "__closure__", None) or ()]
    elif type(thing).__module__.startswith("hift_ds."):
        parts = list(vars(thing).values())
    else:
        parts = []
    return [tensor for part in parts for tensor in tensors_in(part, seen)]


@pytest.mark.parametrize("slots", [0, 2])
@pytest.mark.parametrize("place", [*PLACES, "device"])
def test_a_closed_store_keeps_no_tensor(place, slots, tmp_path):
    """transformers holds the engine of a finished run until the next one is built."""
    weights = [torch.ones(1290, dtype=torch.bfloat16)]
    store = PLACES[place](tmp_path, slots) if place in PLACES else DeviceStateStore(CPU)
    store.codecs = ("split_master",)
    store.ensure(7, "master", 1290, torch.float32, lambda: weights)
    expected = filled(store)
    visit(store, expected, 2)
    store.fetch(7)
    store.evict(7)
    for stands in (True, False):  # an update that might be taken back, and one that still might when the run ends
        store.hold(5)
        store.fetch(5)
        store.evict(5)
        store.prefetch(0)
        if stands:
            store.release(5)
    store.fetch(3)  # the run ends in the middle of an update
    store.write(4, "master", torch.ones(1))
    store.prefetch(1)
    assert tensors_in(store)
    store.close()
    assert not tensors_in(store)


@pytest.mark.parametrize("slots", [0, 1, 2, 4])
@pytest.mark.parametrize("mover", MOVERS)
@pytest.mark.parametrize("place", PLACES)
def test_fetch_gives_what_was_evicted(place, mover, slots, tmp_path, monkeypatch):
    if slots == 0 and mover != "default":
        pytest.skip("nothing runs in the background")
    rng = random.Random(f"{place}{mover}{slots}")
    store = PLACES[place](tmp_path, slots)
    if MOVERS[mover]:
        store.mover.close()
        store.mover = MOVERS[mover](monkeypatch, store.traffic)
    expected = filled(store)
    order = []
    for _ in range(12):  # cycles in one order, in changing orders, over few chunks, and one chunk again and again
        order += rng.choice([range(6), rng.sample(range(6), 6), [0, 2] * 3, [2] * 4, [5, 4, 3, 2, 1, 0]])
    for position, chunk in enumerate(order):
        held = dict(expected[chunk]) if rng.random() < 0.4 else None
        if held is not None:  # an update that may be taken back
            store.hold(chunk)
        visit(store, expected, chunk)
        what = rng.random()
        if what < 0.8:
            store.prefetch(*(order + [0])[position + 1 : position + 1 + rng.randrange(1, 6)])
        elif what < 0.9:  # a wrong guess, twice
            store.prefetch(rng.randrange(6))
            store.prefetch(rng.randrange(6))
        if held is not None and rng.random() < 0.5:
            store.take_back(chunk)
            expected[chunk] = held
        elif held is not None:
            store.release(chunk)
        if rng.random() < 0.15:  # a checkpoint
            store.synchronize()
            for other in range(6):
                assert all(torch.equal(v, expected[other][k]) for k, v in store.read(other).items())
        if rng.random() < 0.1:  # resuming from one, with a prefetch under way
            store.synchronize()
            target = rng.randrange(6)
            store.prefetch(target)
            expected[target]["master"] = torch.randn(SIZES[target])
            half = SIZES[target] // 2
            store.write(target, "master", expected[target]["master"][half:], half)
            store.write(target, "master", expected[target]["master"][:half])
            store.prefetch(target)
    store.synchronize()
    store.write(3, "exp_avg", torch.zeros(SIZES[3]))
    expected[3]["exp_avg"].zero_()
    store.synchronize()
    assert store._staged is None  # holds no memory
    assert len(list(tmp_path.rglob("chunk-*"))) == (6 if "disk" in place else 0)
    assert all(torch.equal(v, expected[u][k]) for u in range(6) for k, v in store.read(u).items())
    store.close()


@pytest.mark.parametrize("place", PLACES)
def test_keys_that_appear_during_an_update(place, tmp_path):
    """Adafactor's states have shapes that are known after its first step only; tensors given out must stay
    valid."""
    store = PLACES[place](tmp_path, 1)
    filled(store, [100, 30])
    tensors = store.fetch(1)
    before = tensors["master"]
    store.ensure(1, "row_var:w", 5000, torch.float32)  # larger than the slot
    store.ensure(7, "late", 3, torch.float32)
    store.fetch(1)["row_var:w"].fill_(3)
    before.fill_(9)
    store.evict(1)
    store.prefetch(0)
    store.synchronize()
    assert (store.read(1)["row_var:w"] == 3).all() and (store.read(1)["master"] == 9).all()
    assert (store.fetch(1)["row_var:w"] == 3).all() and (store.fetch(7)["late"] == 0).all()
    store.evict(1)
    store.evict(7)
    store.ensure(0, "row_var:v", 4, torch.float32)  # between updates, as a resumed run does
    store.write(0, "row_var:v", torch.ones(4))
    assert (store.fetch(0)["row_var:v"] == 1).all() and (store.fetch(0)["exp_avg"] == 0).all()
    store.close()


def rotate(store, order, steps):
    """Traffic of each step."""
    taken = []
    for step in range(steps):
        store.fetch(order[step % len(order)])
        store.evict(order[step % len(order)])
        store.prefetch(order[(step + 1) % len(order)])
        taken.append(store.traffic.take())
    return taken


def in_slots(store):
    """The chunks that are not only in their resting place."""
    return sorted(slot.chunk for slot in store._slots if slot.chunk is not None)


def test_each_step_moves_one_chunk_in_and_one_out():
    store = HostStateStore(CPU, (), 0, 1)
    filled(store)
    sizes = [store.num_bytes(chunk) for chunk in range(6)]
    for step, traffic in enumerate(rotate(store, range(6), 18)):
        first = sizes[0] if step == 0 else 0  # nobody announced the first
        assert traffic.bytes_in == sizes[(step + 1) % 6] + first and traffic.bytes_out == sizes[step % 6]
    assert in_slots(store) == [0]
    store.close()


def test_a_group_that_stays_active_does_not_move():
    store = HostStateStore(CPU, (), 0, 1)
    expected = filled(store)
    for _ in range(5):
        visit(store, expected, 2)
        store.prefetch(2)
    traffic = store.traffic.take()
    assert traffic.bytes_in == store.num_bytes(2) and traffic.bytes_out == 0
    store.synchronize()
    assert store.traffic.take().bytes_out == store.num_bytes(2)
    assert torch.equal(store.read(2)["master"], expected[2]["master"])
    store.close()


def test_a_write_back_keeps_what_was_evicted():
    """Also if the chunk is updated again before the copy has begun."""
    store = HostStateStore(CPU, (), 0, 2)
    store.mover = Lazy(store.traffic)
    expected = filled(store)
    visit(store, expected, 0)
    store.prefetch(2)
    store.fetch(0)["master"].fill_(77)
    assert torch.equal(store._decode(0, store._at_rest(0))["master"], expected[0]["master"])
    store.close()


def test_two_chunks_in_two_slots_never_come_in_again():
    store = HostStateStore(CPU, (), 0, 2)
    filled(store)
    taken = rotate(store, [0, 2], 8)
    assert sum(t.bytes_in for t in taken) == store.num_bytes(0) + store.num_bytes(2)
    assert all(t.bytes_out > 0 for t in taken)
    store.close()


def test_hidden_and_stalled_seconds():
    """A transfer of 200 ms behind 400 ms of computation is hidden; behind none it stalls the step. The halves leave
    room for a processor that is busy with other things."""
    store = HostStateStore(CPU, (), 0, 2)
    filled(store, [64, 64, 64])
    copy_in = store._copy_in
    store._copy_in = lambda chunk, memory: (time.sleep(0.2), copy_in(chunk, memory))
    rotate(store, range(3), 3)
    time.sleep(0.4)
    store.fetch(0)
    hidden = store.traffic.take()
    assert hidden.transfer_s > 0.19 and hidden.stalled_s < 0.1
    store.evict(0)
    store.prefetch(1)
    store.fetch(1)
    stalled = store.traffic.take()
    assert stalled.transfer_s > 0.19 and stalled.stalled_s > 0.1
    store.close()


def test_slices_are_fetched_ahead_as_far_as_there_are_slots():
    """Of a group's slices those that have a slot have arrived before its update, and each slot is filled again as soon
    as
    its slice has left; a group that is trained again starts with its first slices too."""
    store = HostStateStore(CPU, (), 0, 4)
    slices = range(6)
    filled(store, [64] * 6)
    for _ in range(2):
        store.prefetch(*slices)
        assert in_slots(store) == [0, 1, 2, 3] and not any(slot.fetched for slot in store._slots)
        for position, chunk in enumerate(slices):
            store.prefetch(*slices[position:])
            store.fetch(chunk)
            store.evict(chunk)
            ahead = [chunk for chunk in in_slots(store) if chunk > position]
            assert len(ahead) >= min(3, len(slices) - position - 1), (position, ahead)
    store.close()


def test_slots_come_as_memory_is_found_for_them():
    store = HostStateStore(CPU, (), 0, 1)
    filled(store, [64] * 6)
    room = aligned(store.largest_bytes())
    assert store.slots_within(2 * room + 1, useful=12) == 3
    assert store.slots_within(100 * room, useful=4) == 4 and store.slots_within(0, 9) == 1
    store.num_slots = 4
    assert store.slots_within(room, useful=4) == store.slots_within(room, useful=2) == 4
    store.prefetch(0, 1, 2, 3)
    assert len(store._slots) == store.num_slots == 4
    store.close()


def test_a_computation_that_is_made_to_wait_for_copies_is_a_stall(monkeypatch):
    """Somebody synchronizes the device between two steps: what the next step begins late is told; a copy that is over
    before it begins is not."""
    use_fake_streams(monkeypatch)
    for synchronizes in (True, False):
        traffic = Traffic()
        mover = StreamMover(traffic, CPU)
        mover.submit(IN, lambda: time.sleep(0.03))
        mover.idle()
        mover._sides[IN].synchronize()
        if not synchronizes:
            time.sleep(0.03)  # the next batch comes late, and of itself
        mover.busy()
        stalled = traffic.take().stalled_s
        assert (stalled > 0.025) is synchronizes, stalled


@pytest.mark.parametrize("is_stall", [True, False])
def test_a_host_that_waits_for_a_copy_is_a_stall_unless_it_works_beside_the_training(is_stall, monkeypatch):
    use_fake_streams(monkeypatch)
    traffic = Traffic()
    mover = StreamMover(traffic, CPU)
    mover.settle(mover.submit(OUT, lambda: time.sleep(0.03)), is_stall)
    taken = traffic.take()
    assert (taken.stalled_s > 0.025) is (taken.waits.get("states_out", 0.0) > 0.025) is is_stall


def test_slots_exist_with_prefetch_only(monkeypatch):
    for slots in (0, 1, 2):
        store = HostStateStore(CPU, (), 0, slots)
        filled(store)
        rotate(store, range(6), 12)
        store.synchronize()
        largest = store.largest_bytes()
        assert sum(slot.memory.numel() for slot in store._slots) == slots * largest
        store.close()


@pytest.mark.parametrize("mover", ["lazy", "default"])
def test_more_chunks_at_once_than_slots(mover):
    store = HostStateStore(CPU, (), 0, 1)
    if mover == "lazy":
        store.mover = Lazy(store.traffic)
    expected = filled(store)
    store.fetch(0)["master"].fill_(50)
    store.fetch(2)["master"].fill_(52)
    store.prefetch(1)  # no slot free: ignored
    store.evict(2)
    store.evict(0)
    for chunk in (0, 2):
        expected[chunk]["master"].fill_(50 + chunk)
        visit(store, expected, chunk)
    assert len(store._slots) == 1
    store.close()


def test_page_locked_memory_is_cut_from_slabs(monkeypatch):
    """Without an accelerator nothing is page-locked, but the cutting can be tried."""
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *a, pin_memory=False, **k: empty(*a, **k))
    monkeypatch.setattr("hift_ds.store.page_locked.SLAB_BYTES", 4096)
    store = HostStateStore(CPU, (), 0, 2)
    store.pin_memory = True
    expected = filled(store)
    assert max(len(segments) for segments in store._host.values()) > 1  # a chunk lies across slabs
    for chunk in [0, 1, 2, 3, 4, 5] * 3:
        visit(store, expected, chunk)
        store.prefetch((chunk + 1) % 6)
    store.close()


def test_long_copies_are_cut_so_that_other_traffic_gets_through(monkeypatch):
    """A copy engine serves one copy at a time. (On meta tensors, which take the accelerator's path.)"""
    copied = []

    class Watching(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func is torch.ops.aten.copy_.default:
                copied.append((args[0].storage_offset(), args[0].numel(), args[2]))
            return func(*args, **(kwargs or {}))

    there, here = torch.empty(100 << 20, dtype=torch.uint8, device="meta"), torch.empty(100 << 20, dtype=torch.uint8)
    with Watching():
        host.copy_bytes(there, here.to("meta"))
    assert [start for start, _, _ in copied] == [0, 32 << 20, 64 << 20, 96 << 20]
    assert sum(numel for _, numel, _ in copied) == 100 << 20 and all(beside for _, _, beside in copied)


@pytest.mark.parametrize("direction", [IN, OUT])
def test_a_failed_transfer_is_an_error_of_the_step_that_needs_it(direction):
    store = HostStateStore(CPU, (), 0, 1)
    filled(store)

    def fail(chunk, memory):
        raise OSError("bus error")

    setattr(store, "_copy_in" if direction == IN else "_copy_out", fail)
    with pytest.raises(StateStoreError, match="bus error"):
        rotate(store, range(6), 3)
    store.close()


@pytest.mark.parametrize("place", PLACES)
def test_a_master_that_is_taken_back_is_the_old_one_to_the_bit(place, tmp_path):
    """Where its weight does not tell, at ties, the positions come back too."""
    old = torch.arange(1, 1291, dtype=torch.float32).mul(2.0**-14).half().float()  # from fp16: one in eight is a tie
    weights = old.to(torch.bfloat16)
    store = PLACES[place](tmp_path, 1)
    store.codecs = ("split_master",)
    store.ensure(7, "master", 1290, torch.float32, lambda: [weights])
    store.fetch(7)["master"].copy_(old)
    store.evict(7)
    store.hold(7)
    new = old + 1.0
    store.fetch(7)["master"].copy_(new)
    weights.copy_(new)
    store.evict(7)
    weights.copy_(old)
    store.take_back(7)
    assert torch.equal(store.fetch(7)["master"], old)
    store.evict(7)
    store.ensure(8, "exp_avg", 1290, torch.float32)
    store.hold(8)  # and one that nobody has written yet
    store.fetch(8)["exp_avg"].fill_(1)
    store.evict(8)
    store.synchronize()
    store.take_back(8)
    assert not store.fetch(8)["exp_avg"].any()
    store.close()
