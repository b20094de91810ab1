"""The processes of a job on one machine: they begin together and none outlives another.

``hift-ds train`` is the parent of its ranks (:class:`RankProcesses`). A rank that dies takes the others with it, and
the parent says which one it was, in which step, and what to go on from. A parent that dies takes its ranks with it
(:func:`end_with_launcher`), killed with SIGKILL too, whether it is ours or DeepSpeed's. What a rank is doing stands in
a file that it shares with its parent (:class:`ProgressNotes`), since a killed process says nothing.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

PROGRESS_FILE = "HIFT_DS_PROGRESS"  # variables that a parent sets for its ranks
PARENT = "HIFT_DS_PARENT"
_NOTE_BYTES = 256  # of one rank
_PR_SET_PDEATHSIG = 1
_POLL_S = 0.1
_LAUNCHER_MODULES = (b"deepspeed.launcher.launch", b"deepspeed.launcher.runner", b"torch.distributed.run")
_LAUNCHER_FILES = (
    b"/deepspeed/launcher/launch.py", b"/deepspeed/launcher/runner.py", b"/bin/deepspeed", b"/bin/ds", b"/bin/torchrun",
)  # fmt: skip
GRACE_S = 10.0  # for the other ranks to notice by themselves and say what they know


class ProgressNotes:
    """What each rank is doing, in one line each, in a file of fixed places: written with one system call."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self._handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)

    def write(self, rank: int, note: str) -> None:
        """Note what rank ``rank`` is doing, in place of what it did."""
        os.pwrite(self._handle, note.encode()[:_NOTE_BYTES].ljust(_NOTE_BYTES, b"\0"), rank * _NOTE_BYTES)

    def read(self, rank: int) -> str:
        """What the rank said last; empty if it has not said anything yet."""
        return os.pread(self._handle, _NOTE_BYTES, rank * _NOTE_BYTES).rstrip(b"\0").decode(errors="replace")

    def close(self) -> None:
        os.close(self._handle)


@dataclass(frozen=True)
class FirstEnd:
    """The first rank that ended otherwise than well."""

    rank: int
    code: int  # negative: the signal that killed it
    doing: str  # what it was doing, as far as it said

    def describe(self) -> str:
        """The end in a sentence: which rank, by which signal, and in the middle of what."""
        name = signal.Signals(-self.code).name
        why = " (the system kills processes so when host memory is full)" if -self.code == signal.SIGKILL else ""
        return f"rank {self.rank} was killed by {name}{why} {self.doing or 'before its first step'}"


class RankProcesses:
    """One process for each environment; :meth:`wait` until all have ended.

    Args:
        command: the same for all.
        environments: of each rank, RANK among them.
        progress_file: new, for their notes.
    """

    def __init__(self, command: Sequence[str], environments: Sequence[Mapping[str, str]], progress_file: Path) -> None:
        self._notes = ProgressNotes(progress_file)
        ours = {PROGRESS_FILE: str(progress_file), PARENT: str(os.getpid())}
        self._processes = [
            # In a session of their own: signals, Ctrl-C too, reach them through us alone and once.
            subprocess.Popen(command, env={**env, **ours}, start_new_session=True)
            for env in environments
        ]

    def send_signal(self, number: int) -> None:
        """Send the signal to every process that is still there."""
        for process in self._processes:
            with contextlib.suppress(ProcessLookupError):
                process.send_signal(number)

    def wait(self) -> FirstEnd | None:
        """Wait until all have ended: None if all ended well. After the first that did not, the others get ``GRACE_S``,
        then SIGKILL."""
        first, deadline = None, float("inf")
        try:
            while (codes := [process.poll() for process in self._processes]).count(None):
                first = first or self._first_end(codes)
                if first is not None:
                    deadline = min(deadline, time.monotonic() + GRACE_S)
                if time.monotonic() > deadline:
                    self.send_signal(signal.SIGKILL)
                    deadline = float("inf")
                time.sleep(_POLL_S)
            return first or self._first_end(codes)
        finally:
            self.send_signal(signal.SIGKILL)  # an exception here must leave nothing behind
            self._notes.close()

    def _first_end(self, codes: Sequence[int | None]) -> FirstEnd | None:
        """The process to name when several have ended at once: one that was killed, since the others followed it."""
        ended = {rank: code for rank, code in enumerate(codes) if code}
        if not ended:
            return None
        rank = min(ended, key=lambda rank: (ended[rank] > 0, rank))
        return FirstEnd(rank, ended[rank], self._notes.read(rank))


def end_with_launcher() -> None:
    """Have this process killed, from now on, as soon as the one that launched it is gone, however that ended.

    Only launchers that live as long as their job count: ``hift-ds train``, DeepSpeed's, torchrun. Linux; elsewhere
    nothing happens.
    """
    if not sys.platform.startswith("linux"):
        return
    parent = int(os.environ.pop(PARENT, "0"))  # not for processes that this one starts
    if parent:
        # By the kernel, whatever this process is doing.
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        if os.getppid() != parent:  # before that
            _leave(f"the process that launched it ({parent}) is gone")
    for pid in _launchers_above(os.getppid()):
        threading.Thread(target=_follow, args=(pid,), name="launcher watch", daemon=True).start()


def bind_to_device(local_rank: int, sys_root: Path = Path("/sys")) -> set[int] | None:
    """Run on the cores beside this rank's GPU, so that host memory for its states is taken there: page-locked memory at
    the other socket halves the link. Before other threads begin; ACCELERATE_CPU_AFFINITY and a narrower affinity are
    obeyed.

    Returns:
        The cores; None where nothing was changed (no GPU, one NUMA node, or a system that does not tell).
    """
    import torch

    if not torch.cuda.is_available() or "ACCELERATE_CPU_AFFINITY" in os.environ or not hasattr(os, "sched_setaffinity"):
        return None
    found = torch.cuda.get_device_properties(local_rank)
    numbers = [getattr(found, name, None) for name in ("pci_domain_id", "pci_bus_id", "pci_device_id")]
    if None in numbers:
        return None
    domain, bus, device = numbers
    cpus = _cpus_beside(sys_root / f"bus/pci/devices/{domain:04x}:{bus:02x}:{device:02x}.0")
    allowed = os.sched_getaffinity(0)
    if not cpus & allowed or cpus & allowed == allowed:
        return None
    os.sched_setaffinity(0, cpus & allowed)
    return cpus & allowed


def _cpus_beside(device: Path) -> set[int]:
    cpus: set[int] = set()
    with contextlib.suppress(OSError, ValueError):
        for part in (device / "local_cpulist").read_text().strip().split(","):
            first, _, last = part.partition("-")
            cpus |= set(range(int(first), int(last or first) + 1))
    return cpus


def _launchers_above(pid: int) -> list[int]:
    """Launchers among the processes above, nearest first."""
    found = []
    with contextlib.suppress(OSError, ValueError, IndexError):
        while pid > 1 and _is_launcher(Path(f"/proc/{pid}/cmdline").read_bytes()):
            found.append(pid)
            pid = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    return found


def _is_launcher(command_line: bytes) -> bool:
    """Whether a command line is that of a Python that runs a launcher, not of a shell script that happens to start
    one."""
    words = command_line.split(b"\0")[:8]
    if b"python" not in os.path.basename(words[0]):
        return False
    return any(word in _LAUNCHER_MODULES or word.endswith(_LAUNCHER_FILES) for word in words[1:])


def _follow(pid: int) -> None:
    try:
        handle = os.pidfd_open(pid)
    except (AttributeError, OSError):
        return  # an older kernel; or it has ended, and its own child with it
    select.select([handle], [], [])
    _leave(f"the process that launched it ({pid}) is gone")


def _leave(why: str) -> None:
    with contextlib.suppress(OSError):
        os.write(2, f"hift-ds: rank {os.environ.get('RANK', '0')} ends: {why}\n".encode())
    os.kill(os.getpid(), signal.SIGKILL)
