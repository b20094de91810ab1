"""States in files, one per chunk and rank, for models whose states no host memory holds.

A chunk is written to a new file that then takes the old one's name, so the only good copy is never
overwritten. Host memory holds the slots on a CPU (one or two chunks, and what the update decodes), and with an
accelerator one page-locked buffer per direction.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor

from hift_ds.store.base import StateStore
from hift_ds.store.file_io import (
    PAGE_BYTES,
    DiskSpeed,
    measure,
    page_aligned,
    read_file,
    whole_pages,
    write_file,
)
from hift_ds.store.machine import Machine
from hift_ds.store.movers import IN, OUT, ThreadMover
from hift_ds.store.parked import ParkedStateStore
from hift_ds.store.speeds import Link
from hift_ds.store.state_folder import StateFolder
from hift_ds.store.streams import SideStream, streams_of

PROBE_BYTES = 1 << 25
# Between disk and accelerator. With the page that aligns it a power of two, as torch would make it anyway.
BUFFER_BYTES = (1 << 28) - PAGE_BYTES


@dataclass
class DiskStateStore(ParkedStateStore):
    """One file per chunk, in a folder of this process.

    Args:
        path: where that folder is made, and removed at the end.
        io: ``direct``, ``buffered``, or ``auto`` for whichever is faster there.
        pin_memory: page-lock the buffers between disk and accelerator.
    """

    path: str | Path = ""
    io: str = "auto"
    pin_memory: bool = True
    speed: DiskSpeed | None = field(default=None, init=False)  # as measured at the start
    _folder: StateFolder = field(init=False)
    # Per direction; with an accelerator only.
    _buffers: dict[str, Tensor] = field(default_factory=dict, init=False)
    _sides: dict[str, SideStream] = field(default_factory=dict, init=False)  # likewise
    # Bytes in the file of each chunk that has one.
    _written: dict[int, int] = field(default_factory=dict, init=False)
    # Of each chunk's file: a disk that gives back other bytes must not train on.
    _checksums: dict[int, int] = field(default_factory=dict, init=False)
    _second_names: set[int] = field(default_factory=set, init=False)  # chunks whose file has the other of two names
    # Of held chunks whose newer form is in a file already: bytes and checksum of the old one.
    _before: dict[int, tuple[int, int]] = field(default_factory=dict, init=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.num_slots:
            self.mover = ThreadMover(self.traffic, self.device)
        self.mover.causes = dict.fromkeys((IN, OUT), "disk")
        self._on_cpu = self.device.type == "cpu"
        self._folder = StateFolder(self.path)

    def start(self) -> StateStore:
        self._folder.promise(self.needed_bytes())
        self._measure()
        return super().start()

    def host_bytes(self) -> int:
        return 0  # but for the slots

    def check_room(self, machine: Machine, beside: int = 0) -> None:
        super().check_room(machine, beside)
        self._folder.promise(self.needed_bytes())

    def needed_bytes(self) -> int:
        """Bytes on the disk: all chunks, the largest once more while it is rewritten, and what may be held."""
        sizes = [self._file_bytes(chunk) for chunk in self._layouts]
        held = (sum(self._file_bytes(chunk) for chunk in chunks) for chunks in self.may_hold)
        return sum(sizes) + max(sizes, default=0) + max(held, default=0)

    def close(self) -> None:
        super().close()
        self._folder.close()
        self._buffers.clear()
        self._sides.clear()

    def _measure(self) -> DiskSpeed:
        if self.speed is None:
            self.speed = measure(self._folder.file("probe"), min(PROBE_BYTES, max(self.largest_bytes(), 1)), self.io)
        return self.speed

    @property
    def place(self) -> str:
        return f"on disk ({'direct' if self._measure().direct else 'buffered'} I/O)"

    def _measured_link(self) -> Link:
        speed = self._measure()
        return Link(speed.read, speed.write)

    # -- ParkedStateStore ----------------------------------------------------------------------------------

    def _new_memory(self, num_bytes: int) -> Tensor:
        return page_aligned(num_bytes) if self._on_cpu else super()._new_memory(num_bytes)

    def _copy_in(self, chunk: int, memory: Tensor) -> None:
        if self._on_cpu:
            self._read(chunk, [self._whole_pages(chunk, memory)])
        else:
            self._read(chunk, self._through_buffer(IN, memory))

    def _copy_out(self, chunk: int, memory: Tensor) -> None:
        if self._on_cpu:
            self._write(chunk, [self._whole_pages(chunk, memory)])
        else:
            self._write(chunk, self._through_buffer(OUT, memory))

    def _at_rest(self, chunk: int) -> Tensor:
        memory = page_aligned(self.num_bytes(chunk))
        self._read(chunk, [memory])
        return memory[: self.num_bytes(chunk)]

    def _put(self, chunk: int, memory: Tensor) -> None:
        self._write(chunk, [self._whole_pages(chunk, memory)])

    def _divert(self, chunk: int) -> None:
        self._before[chunk] = self._written.pop(chunk, 0), self._checksums.pop(chunk, 0)
        self._second_names ^= {chunk}

    def _end_diversion(self, chunk: int, back: bool) -> None:
        written, checksum = self._before.pop(chunk)
        new = self._file(chunk)
        self._second_names ^= {chunk}
        old = self._file(chunk)
        if not back:
            self._second_names ^= {chunk}
            old.unlink(missing_ok=True)
            return
        new.unlink(missing_ok=True)
        self._written.pop(chunk, None)
        if written:
            self._written[chunk], self._checksums[chunk] = written, checksum

    # -- files ---------------------------------------------------------------------------------------------

    def _file_bytes(self, chunk: int) -> int:
        return whole_pages(self.num_bytes(chunk))

    def _file(self, chunk: int) -> Path:
        return self._folder.file(f"chunk-{chunk:05d}{'b' if chunk in self._second_names else ''}")

    def _read(self, chunk: int, pieces: Iterable[Tensor]) -> None:
        known = self._written.get(chunk, 0)
        if known and known == self.num_bytes(chunk):
            read_file(self._file(chunk), pieces, self._measure().direct, self._checksums[chunk])
            return
        # Zeros before the first update, and for what has grown since the last.
        whole, done = page_aligned(known), 0
        if known:
            read_file(self._file(chunk), [whole], self._measure().direct, self._checksums[chunk])
        for piece in pieces:
            # NumPy: an operation of torch would leave this thread with a pool of its own, and more threads
            # than cores make OpenMP put them all to sleep after each operation of the computation.
            there, target = whole[done:known][: piece.numel()].numpy(), piece.numpy()
            target[: there.size] = there
            target[there.size :] = 0
            done += piece.numel()

    def _write(self, chunk: int, pieces: Iterable[Tensor]) -> None:
        self._checksums[chunk] = write_file(self._file(chunk), pieces, self._measure().direct)
        self._written[chunk] = self.num_bytes(chunk)

    def _whole_pages(self, chunk: int, memory: Tensor) -> Tensor:
        """``memory`` up to the end of its last page, which belongs to it (``page_aligned``)."""
        return memory.as_strided((self._file_bytes(chunk),), (1,), memory.storage_offset())

    def _through_buffer(self, direction: str, memory: Tensor) -> Iterator[Tensor]:
        """One page-locked buffer, again and again: handed out with the next bytes of ``memory`` (which is on
        an accelerator) in it, to be written, or to be filled with them."""
        if direction not in self._buffers:
            self._buffers[direction] = page_aligned(BUFFER_BYTES, self.pin_memory)
        buffer = self._buffers[direction]
        for start in range(0, memory.numel(), buffer.numel()):
            part = memory[start : start + buffer.numel()]
            here = buffer[: part.numel()]
            if direction == OUT:
                self._across(direction, here, part)
            yield buffer[: whole_pages(part.numel())]
            if direction == IN:
                self._across(direction, part, here)

    def _across(self, direction: str, target: Tensor, source: Tensor) -> None:
        """One copy on the direction's stream; returns when it has ended. The mover has waited for the computation."""
        streams = streams_of(self.device)
        if streams is None:
            target.copy_(source)
            return
        if direction not in self._sides:  # torch has 32 and then hands out the first again
            self._sides[direction] = streams.Stream(self.device)
        side = self._sides[direction]
        with streams.stream(side):
            target.copy_(source, non_blocking=True)
        side.synchronize()
