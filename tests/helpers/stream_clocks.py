"""A race detector for code that works on streams, and the log of what it gave an accelerator to do.

:class:`Machine` is a dispatch mode over the device without memory of :mod:`hift_ds.simulation.device`. Everything
that acts is an *agent* with a vector clock (Lamport 1978, Mattern 1988): the host's threads, and each stream. What
orders two agents joins their clocks: launching (host before stream), events, ``wait_stream``, synchronising, a thread's
start and result. Two accesses to the same bytes, one of them a write, whose agents' clocks do not order them are a
*hazard*: on an accelerator either may come first. So is a block that goes back to the caching allocator while another
stream than its own may still use it, unless ``record_stream`` told the allocator.

Nothing depends on timing: code that is right by luck is found every time. What it cannot see: values, and the reuse of
one address by two tensors.

Rules, as CUDA has them:

* a copy between host and device returns at once only if ``non_blocking`` and the host's memory is page-locked;
* reading a value (``item``, ``nonzero``, an index that is a mask, ``equal``) waits for the current stream;
* memory is allocated for the current stream, which may still compute on what it held before;
* ``Event.query`` says no as long as nothing has made sure that the event has happened;
* a collective with ``async_op`` runs on a stream of the communicator's, any other on the current one;
* a thread starts on the default stream; here it runs at once, under its own clock.
"""

from __future__ import annotations

import contextlib
import sys
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from hift_ds.simulation import device as fake_device

_ALLOCATES_ONLY = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "resize_"}
_READS_VALUES = {"_local_scalar_dense", "nonzero", "masked_select", "equal", "is_nonzero", "unique2"}
# Which arguments of a collective are written. The others are read.
_COLLECTIVES = {
    "allreduce_": {0},
    "allgather_": {0},
    "_allgather_base_": {0},
    "allgather_into_tensor_coalesced_": {0},
    "_reduce_scatter_base_": {0},
    "reduce_scatter_tensor_coalesced_": {0},
    "reduce_scatter_": {0},
    "broadcast_": {0},
    "reduce_": {0},
    "scatter_": {0},
    "gather_": {0},
    "alltoall_base_": {0},
    "alltoall_": {0},
    "barrier": set(),
}
_OF_OURS = ("hift_ds", "deepspeed", "trl", "transformers", "tests")


class Agent:
    """Something that acts in an order of its own: a thread of the host, or a stream."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.clock: dict[Agent, int] = {self: 0}

    def tick(self) -> int:
        self.clock[self] += 1
        return self.clock[self]

    def join(self, clock: dict[Agent, int]) -> None:
        """What ``clock`` has seen has happened before whatever this agent does next."""
        mine = self.clock
        for agent, count in clock.items():
            if mine.get(agent, 0) < count:
                mine[agent] = count

    def __repr__(self) -> str:
        return self.name


@dataclass(frozen=True)
class Access:
    """Of bytes [start, end) of a storage, by ``agent`` when its own clock stood at ``count``."""

    agent: Agent
    count: int
    start: int
    end: int
    is_write: bool
    what: tuple  # (name, agent, place)


@dataclass
class Block:
    """A storage, or a file."""

    name: str
    owner: Agent | None = None  # the stream that it was allocated for
    page_locked: bool = False
    accesses: dict[tuple, Access] = field(default_factory=dict)
    recorded: set[Agent] = field(default_factory=set)  # told by ``record_stream``


@dataclass(frozen=True)
class Entry:
    """One line of the log.

    Attributes:
        kind: "op" (a kernel, a copy, a collective, or the host's arithmetic), "wait" (``agent`` waits for the entries
            of ``after``), "sync" (the host waits for them), "start" (the thread ``agent`` begins, no sooner than
            ``host`` has come here), "mark".
        agent: the name of who does it.
        host: the name of the thread that launched it.
        name: of the operation, or of the mark.
        place: where in the code.
        bytes_moved: read and written by the agent.
        link: "in" or "out" for a copy between host and device, "read" or "written" for a file.
        flops: of matrix products.
        after: indices of the entries that it waits for, besides the agent's own and the launch.
        numel: elements of the largest tensor.
    """

    kind: str
    agent: str
    host: str
    name: str
    place: Any = ""
    bytes_moved: int = 0
    link: str = ""
    flops: int = 0
    after: tuple[int, ...] = ()
    numel: int = 0


@dataclass
class Hazard:
    """Two accesses without an order."""

    block: str
    first: str
    second: str

    def __str__(self) -> str:
        return f"{self.block}: {self.first}, and without an order {self.second}"


class Machine(TorchDispatchMode):
    """Inside, every operation is checked and logged. Enter ``fake_device`` first.

    Attributes:
        hazards: found so far.
        syncs: (mark in force, what, where) of every wait of the host for the device or another thread.
        page_locked: bytes of each page-locked block that was asked for.
        log: every operation in the order of its launch.
    """

    def __init__(self, device_type: str, count_flops: bool = False) -> None:
        super().__init__()
        self.device_type = device_type
        self.hazards: list[Hazard] = []
        self.syncs: list[tuple[str, str, str]] = []
        self.log: list[Entry] = []
        self.mark_now = ""
        self.blocks: dict[Any, Block] = {}
        self.page_locked: list[int] = []
        self.main = Agent("host")
        self.host = self.main
        self.streams: list[Stream] = []
        self.default = Stream(self, "compute")
        self._current: dict[Agent, Stream] = {}
        self._last: dict[Agent, int] = {}  # index in the log of each agent's last entry
        self._communicator: Stream | None = None
        self._unseen: Any = None
        self._count_flops = count_flops

    # -- agents -----------------------------------------------------------------------------------------------

    @property
    def current(self) -> Stream:
        """The current stream of the running thread."""
        return self._current.get(self.host, self.default)

    @contextlib.contextmanager
    def on_stream(self, stream: Stream | None) -> Iterator[None]:
        before, self._current[self.host] = self.current, stream or self.current
        try:
            yield
        finally:
            self._current[self.host] = before

    @contextlib.contextmanager
    def on_thread(self, agent: Agent) -> Iterator[None]:
        before, self.host = self.host, agent
        try:
            yield
        finally:
            self.host = before

    def mark(self, name: str) -> None:
        """What follows belongs to ``name``."""
        self.mark_now = name
        self._write(Entry("mark", self.host.name, self.host.name, name), self.host)

    def host_waits(self, clock: dict[Agent, int], what: str, after: tuple[int, ...] = ()) -> None:
        place = _place()
        self.syncs.append((self.mark_now, what, str(place)))
        self._write(Entry("sync", self.host.name, self.host.name, what, place, after=after), self.host)
        self.host.join(clock)

    def _write(self, entry: Entry, agent: Agent) -> int:
        self.log.append(entry)
        self._last[agent] = len(self.log) - 1
        return len(self.log) - 1

    def write_host(self, name: str, bytes_moved: int, link: str) -> None:
        """Work of the running thread itself, of which no operation of torch tells."""
        host = self.host.name
        self._write(Entry("op", host, host, name, _place(), bytes_moved, link), self.host)

    def last(self, agent: Agent) -> tuple[int, ...]:
        return (self._last[agent],) if agent in self._last else ()

    # -- operations -------------------------------------------------------------------------------------------

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.prim.device.default:
            return args[0].device
        kwargs = kwargs or {}
        name = func._schema.name.partition("::")[2]
        if name == "is_pinned":
            return self._is_page_locked(args[0])
        page_locked = bool(kwargs.get("pin_memory"))
        if page_locked:
            kwargs = {**kwargs, "pin_memory": False}
        if name == "_pin_memory":
            func, args, page_locked = torch.ops.aten.clone.default, args[:1], True
        before = self._reads_and_writes(func, name, args, kwargs)
        out = func(*args, **kwargs)
        results = [leaf for leaf in ([out] if isinstance(out, Tensor) else tree_leaves(out)) if _is_tensor(leaf)]
        self._note(func, name, args, kwargs, *before, results, page_locked)
        return out

    def _reads_and_writes(self, func: Any, name: str, args: Any, kwargs: Any) -> tuple[list, list]:
        """The tensors among the arguments that ``func`` reads, and those that it writes."""
        reads: list[Tensor] = []
        writes: list[Tensor] = []
        collective = _COLLECTIVES.get(name) if func.namespace == "c10d" else None
        for position, argument in enumerate(func._schema.arguments):
            value = args[position] if position < len(args) else kwargs.get(argument.name)
            if value is None:
                continue
            tensors = [value] if isinstance(value, Tensor) else [x for x in tree_leaves(value) if _is_tensor(x)]
            if collective is not None:
                written = position in collective
            else:
                written = argument.alias_info is not None and argument.alias_info.is_write
            (writes if written else reads).extend(tensors)
        return reads, writes

    def _note(
        self,
        func: Any,
        name: str,
        args: Any,
        kwargs: Any,
        reads: list,
        writes: list,
        results: list,
        page_locked: bool,
    ) -> None:
        known = {tensor.untyped_storage()._cdata for tensor in (*reads, *writes)}
        made = [tensor for tensor in results if tensor.untyped_storage()._cdata not in known]
        if not made and not writes and results:
            return  # a view
        on_device = any(t.device.type == self.device_type for t in (*reads, *writes, *made))
        agent: Agent = self.current if on_device else self.host
        if on_device:
            agent.join(self.host.clock)
        agent.tick()
        for tensor in made:
            self._allocate(tensor, page_locked)
        if name in _ALLOCATES_ONLY:
            return
        place = _place()
        what = (name, agent, place)
        moves = 0
        crosses = on_device and (
            _is_copy(name) and {t.device.type for t in (*reads, *writes, *made)} != {self.device_type}
        )
        for tensor in reads:
            if not on_device or tensor.device.type == self.device_type or crosses:
                moves += self.touch(tensor, agent, False, what)
            else:  # a number: goes with the launch
                self.touch(tensor, self.host, False, what)
        for tensor in (*writes, *made):
            moves += self.touch(tensor, agent, True, what)
        link = ""
        if crosses:
            source = reads[0] if reads else args[0]
            link = "in" if source.device.type != self.device_type else "out"
            moves //= 2
        tensors = (*reads, *writes, *made)
        entry = Entry(
            "op", agent.name, self.host.name, name, place, moves, link, self._flops(func, args, kwargs, results),
            numel=max((t.numel() for t in tensors), default=0),
        )  # fmt: skip
        self._write(entry, agent)
        if crosses and not self._is_asynchronous(name, args, kwargs, reads, writes, made):
            self.host_waits(agent.clock, f"copy {link}, blocking", self.last(agent))
        elif on_device and (name in _READS_VALUES or _has_mask(name, args)):
            self.host_waits(agent.clock, f"value read by {name}", self.last(agent))

    def _flops(self, func: Any, args: Any, kwargs: Any, results: list) -> int:
        if not self._count_flops or (formula := flop_registry.get(func.overloadpacket)) is None:
            return 0
        return int(formula(*args, **kwargs, out_val=results[0] if len(results) == 1 else tuple(results)))

    def _is_asynchronous(self, name: str, args: Any, kwargs: Any, reads: list, writes: list, made: list) -> bool:
        if name == "copy_":
            non_blocking = args[2] if len(args) > 2 else kwargs.get("non_blocking", False)
        else:
            non_blocking = kwargs.get("non_blocking", False)
        if not non_blocking:
            return False
        on_host = [t for t in (*reads, *writes, *made) if t.device.type != self.device_type]
        for tensor in made:  # ``to("cpu", non_blocking=True)`` gives page-locked memory
            if tensor.device.type != self.device_type:
                self.block_of(tensor).page_locked = True
        return all(self._is_page_locked(tensor) for tensor in on_host)

    # -- memory -----------------------------------------------------------------------------------------------

    def block_of(self, tensor: Tensor) -> Block:
        storage = tensor.untyped_storage()
        block = self.blocks.get(storage._cdata)
        if block is None:
            block = self.blocks[storage._cdata] = Block(f"{tensor.device.type} {tuple(tensor.shape)} {tensor.dtype}")
            weakref.finalize(storage, self._free, storage._cdata, block).atexit = False
        return block

    def page_lock(self, tensor: Tensor) -> Tensor:
        self.block_of(tensor).page_locked = True
        self.page_locked.append(tensor.nbytes)
        return tensor

    def _is_page_locked(self, tensor: Tensor) -> bool:
        return self.block_of(tensor).page_locked

    def _allocate(self, tensor: Tensor, page_locked: bool) -> None:
        block = self.block_of(tensor)
        block.page_locked = page_locked
        if page_locked:
            self.page_locked.append(tensor.nbytes)
        if tensor.device.type == self.device_type:
            owner = block.owner = self.current
            owner.join(self.host.clock)
            num_bytes = tensor.untyped_storage().nbytes()
            # What the allocator gives may be in use on its stream until now.
            self._access(block, Access(owner, owner.tick(), 0, num_bytes, True, ("allocation", owner, _place())))

    def _free(self, key: int, block: Block) -> None:
        if self.blocks.get(key) is block:
            del self.blocks[key]
        owner = block.owner
        if owner is None:
            return
        for access in block.accesses.values():
            if access.agent is owner or access.agent in block.recorded or not isinstance(access.agent, Stream):
                continue
            seen = max(owner.clock.get(access.agent, 0), self.host.clock.get(access.agent, 0))
            if seen < access.count:
                self.hazards.append(Hazard(block.name, _words(access.what), f"freed for {owner} at {_place()}"))
                return

    def touch(self, tensor: Tensor, agent: Agent, is_write: bool, what: tuple) -> int:
        """Check and note an access to all elements; their bytes."""
        if tensor.numel() == 0:
            return 0
        size = tensor.element_size()
        start = tensor.storage_offset() * size
        span = sum((n - 1) * abs(s) for n, s in zip(tensor.shape, tensor.stride(), strict=True)) + 1
        access = Access(agent, agent.clock[agent], start, start + span * size, is_write, what)
        self._access(self.block_of(tensor), access)
        return tensor.numel() * size

    def touch_file(self, path: Any, is_write: bool, what: tuple) -> None:
        block = self.blocks.setdefault(("file", str(path)), Block(f"file {Path(path).name}"))
        self._access(block, Access(self.host, self.host.tick(), 0, 1, is_write, what))

    def _access(self, block: Block, access: Access) -> None:
        clock, covered = access.agent.clock, []
        for key, other in block.accesses.items():
            if other.end <= access.start or access.end <= other.start:
                continue
            ordered = other.agent is access.agent or clock.get(other.agent, 0) >= other.count
            if not ordered and (access.is_write or other.is_write):
                self.hazards.append(Hazard(block.name, _words(other.what), _words(access.what)))
                covered.append(key)  # told once
            elif access.is_write and ordered and access.start <= other.start and other.end <= access.end:
                covered.append(key)
        for key in covered:
            del block.accesses[key]
        block.accesses[access.agent, access.start, access.end, access.is_write] = access


class Stream(Agent):
    """``torch.cuda.Stream``."""

    def __init__(self, machine: Machine, name: str | None = None) -> None:
        super().__init__(name or f"stream {len(machine.streams)}")
        self.machine = machine
        machine.streams.append(self)

    def wait_stream(self, other: Stream) -> None:
        other.join(self.machine.host.clock)
        self._wait(other.clock, self.machine.last(other))

    def wait_event(self, event: Event) -> None:
        self._wait(event.clock, event.after)

    def _wait(self, clock: dict[Agent, int], after: tuple[int, ...]) -> None:
        host = self.machine.host
        self.machine._write(Entry("wait", self.name, host.name, "wait", _place(), after=after), self)
        self.join(host.clock)
        self.join(clock)

    def record_event(self, event: Event | None = None) -> Event:
        event = event or Event(self.machine)
        event.record(self)
        return event

    def synchronize(self) -> None:
        self.machine.host_waits(self.clock, f"{self.name} synchronized", self.machine.last(self))

    def query(self) -> bool:
        return _has_seen(self.machine.host, self.clock)

    def __enter__(self) -> Stream:
        self._block = self.machine.on_stream(self)
        self._block.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._block.__exit__(*error)


class Event:
    """``torch.cuda.Event``."""

    def __init__(self, machine: Machine) -> None:
        self.machine = machine
        self.clock: dict[Agent, int] = {}
        self.after: tuple[int, ...] = ()

    def record(self, stream: Stream | None = None) -> None:
        stream = stream or self.machine.current
        stream.join(self.machine.host.clock)
        self.clock, self.after = dict(stream.clock), self.machine.last(stream)

    def wait(self, stream: Stream | None = None) -> None:
        (stream or self.machine.current).wait_event(self)

    def synchronize(self) -> None:
        self.machine.host_waits(self.clock, "event synchronized", self.after)

    def query(self) -> bool:
        return _has_seen(self.machine.host, self.clock)

    def elapsed_time(self, end: Event) -> float:
        return 1.0


def _has_seen(agent: Agent, clock: dict[Agent, int]) -> bool:
    return all(agent.clock.get(other, 0) >= count for other, count in clock.items())


# -- in place of what a program finds on a machine ------------------------------------------------------------------


class ThreadOfOne:
    """``ThreadPoolExecutor(1)`` whose thread is an agent. Tasks run when they are submitted."""

    def __init__(self, machine: Machine, name: str) -> None:
        self.machine, self.agent = machine, Agent(name)

    def submit(self, fn: Callable[..., Any], *args: Any, **kwargs: Any) -> FinishedTask:
        submitter = self.machine.host.name
        self.machine._write(Entry("start", self.agent.name, submitter, "thread starts", _place()), self.agent)
        self.agent.join(self.machine.host.clock)
        error, value = None, None
        with self.machine.on_thread(self.agent):
            try:
                value = fn(*args, **kwargs)
            except Exception as raised:
                error = raised
        return FinishedTask(self.machine, dict(self.agent.clock), self.machine.last(self.agent), value, error)

    def shutdown(self, wait: bool = True) -> None: ...


@dataclass
class FinishedTask:
    """``concurrent.futures.Future``."""

    machine: Machine
    clock: dict[Agent, int]
    after: tuple[int, ...]
    value: Any
    error: Exception | None

    def result(self, timeout: float | None = None) -> Any:
        self.machine.host_waits(self.clock, "thread's result", self.after)
        if self.error is not None:
            raise self.error
        return self.value

    def done(self) -> bool:
        return _has_seen(self.machine.host, self.clock)


class AsynchronousWork:
    """What a collective with ``async_op`` returns."""

    def __init__(self, machine: Machine, work: Any, ended: Event, tensors: Any) -> None:
        self.machine, self._work, self._ended = machine, work, ended
        self._kept = tensors  # as NCCL's does, until somebody waits

    def wait(self, timeout: Any = None) -> bool:
        self.machine.current.wait_event(self._ended)
        self._kept = None
        return True

    def is_completed(self) -> bool:
        return self._ended.query()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._work, name)


@contextlib.contextmanager
def installed(machine: Machine) -> Iterator[Machine]:
    """Inside, streams, events, threads of the stores, collectives and files are the machine's. The fake accelerator is
    DeepSpeed's by now."""
    from deepspeed.accelerator import get_accelerator
    from deepspeed.runtime.zero import partitioned_param_coordinator

    from hift_ds.simulation import accelerator as fake_accelerator
    from hift_ds.store import disk, movers

    device = getattr(torch, machine.device_type)
    accelerator = type(get_accelerator())

    def stream_class(*args: Any, **kwargs: Any) -> Stream:
        return Stream(machine)

    def event_class(*args: Any, **kwargs: Any) -> Event:
        return Event(machine)

    event_class.elapsed_time = None  # what tells an accelerator with timed events

    def synchronize(device: Any = None) -> None:
        clock: dict[Agent, int] = {}
        joined = Agent("all streams")
        for stream in machine.streams:
            joined.join(stream.clock)
        clock = joined.clock
        machine.host_waits(clock, "device synchronized", tuple(i for s in machine.streams for i in machine.last(s)))

    def record_stream(tensor: Tensor, stream: Stream) -> None:
        machine.block_of(tensor).recorded.add(stream)

    def numbers_to_device(real: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def tensor(data: Any, *args: Any, **kwargs: Any) -> Tensor:
            made = real(data, *args, **kwargs)
            if isinstance(made, Tensor) and made.device.type == machine.device_type:
                machine.host_waits(machine.current.clock, "torch.tensor on the device")
            return made

        return tensor

    replaced: list[tuple[Any, str, Any]] = [
        (fake_device, "Stream", stream_class),
        (fake_device, "Event", event_class),
        (device, "Stream", stream_class),
        (device, "Event", event_class),
        (device, "current_stream", lambda device=None: machine.current),
        (device, "default_stream", lambda device=None: machine.default),
        (device, "stream", machine.on_stream),
        (device, "synchronize", synchronize),
        (fake_accelerator.FakeAccelerator, "synchronize", lambda self, device=None: synchronize()),
        (fake_accelerator.FakeAccelerator, "resolves_data_dependency", lambda self: False),
        (fake_accelerator.FakeAccelerator, "handles_memory_backpressure", lambda self: False),
        (
            fake_accelerator.FakeAccelerator,
            "pin_memory",
            lambda self, tensor, align_bytes=1: machine.page_lock(tensor),
        ),
        (Tensor, "record_stream", record_stream),
        (torch, "tensor", numbers_to_device(torch.tensor)),
        (
            partitioned_param_coordinator,
            "assert_ints_same_as_other_ranks",
            lambda ints: machine.host_waits(machine.current.clock, "ranks compared"),
        ),
        (
            movers,
            "ThreadPoolExecutor",
            lambda n, thread_name_prefix="": ThreadOfOne(machine, thread_name_prefix),
        ),
        (disk, "read_file", _file_reader(machine)),
        (disk, "write_file", _file_writer(machine)),
        (disk, "page_aligned", _page_aligned),
        (disk, "measure", lambda path, num_bytes, io="auto": disk.DiskSpeed(1e9, 1e9, True)),
        (
            disk.DiskStateStore,
            "_read",
            lambda self, chunk, pieces: disk.read_file(self._file(chunk), pieces, True),
        ),
    ]
    for name in (
        "all_reduce",
        "all_gather_into_tensor",
        "all_gather",
        "reduce_scatter_tensor",
        "broadcast",
        "reduce",
    ):
        replaced.append((dist, name, _collective(machine, getattr(dist, name))))
    assert issubclass(accelerator, fake_accelerator.FakeAccelerator)
    saved = [(owner, name, owner.__dict__.get(name)) for owner, name, _ in replaced]
    for owner, name, value in replaced:
        setattr(owner, name, value)
    try:
        with machine:
            yield machine
    finally:
        for owner, name, value in saved:
            if value is None:
                delattr(owner, name)
            else:
                setattr(owner, name, value)


def _collective(machine: Machine, real: Callable[..., Any]) -> Callable[..., Any]:
    def collective(*args: Any, **kwargs: Any) -> Any:
        if not kwargs.get("async_op"):
            return real(*args, **kwargs)
        if machine._communicator is None:
            machine._communicator = Stream(machine, "communicator")
        stream, ended = machine._communicator, Event(machine)
        stream.wait_stream(machine.current)
        with machine.on_stream(stream):
            work = real(*args, **kwargs)
        ended.record(stream)
        return AsynchronousWork(machine, work, ended, (args, kwargs))

    return collective


def _file_reader(machine: Machine) -> Callable[..., None]:
    def read_file(path: Any, pieces: Any, direct: bool) -> None:
        machine.touch_file(path, False, ("file read", machine.host, _place()))
        for piece in pieces:
            machine.host.tick()
            moved = machine.touch(piece, machine.host, True, ("read from file", machine.host, _place()))
            machine.write_host("file read", moved, "read")

    return read_file


def _file_writer(machine: Machine) -> Callable[..., None]:
    def write_file(path: Any, pieces: Any, direct: bool) -> None:
        for piece in pieces:
            machine.host.tick()
            moved = machine.touch(piece, machine.host, False, ("written to file", machine.host, _place()))
            machine.write_host("file written", moved, "written")
        machine.touch_file(path, True, ("file written", machine.host, _place()))

    return write_file


def _page_aligned(num_bytes: int, pin_memory: bool = False) -> Tensor:
    from hift_ds.store.file_io import whole_pages

    return torch.empty(whole_pages(num_bytes), dtype=torch.uint8, pin_memory=pin_memory)


def _words(what: tuple) -> str:
    return f"{what[0]} on {what[1]} at {what[2]}"


def _is_tensor(value: Any) -> bool:
    return isinstance(value, Tensor)


def _is_copy(name: str) -> bool:
    return name in ("copy_", "_to_copy", "_copy_from")


def _has_mask(name: str, args: Any) -> bool:
    if name not in ("index", "index_put_", "index_put"):
        return False
    return any(_is_tensor(i) and i.dtype in (torch.bool, torch.uint8) for i in args[1])


_named: dict[Any, str] = {}  # by code object: its name, or "" if it is not under test


class _Place:
    """The innermost lines of the code under test, put into words when asked for."""

    __slots__ = ("lines",)

    def __init__(self) -> None:
        frame, self.lines = sys._getframe(2), []
        while frame is not None and len(self.lines) < 3:
            name = _named.get(frame.f_code)
            if name is None:
                name = _named[frame.f_code] = _name_of(frame.f_code)
            if name:
                self.lines.append((frame.f_code, frame.f_lineno))
            frame = frame.f_back

    def __str__(self) -> str:
        """ "movers.py:77 submit < parked.py:130 _load" """
        return " < ".join(f"{Path(code.co_filename).name}:{line} {code.co_name}" for code, line in self.lines)


def _name_of(code: Any) -> str:
    under_test = code.co_filename != __file__ and any(f"/{name}/" in code.co_filename for name in _OF_OURS)
    return code.co_name if under_test else ""


def _place() -> _Place:
    return _Place()
