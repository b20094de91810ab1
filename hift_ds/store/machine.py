"""How much memory and disk this process may count on: what the machine has, or what a container allows."""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from hift_ds.errors import StateStoreError


class HostBytes(NamedTuple):
    """Host memory, in bytes."""

    total: int
    available: int  # without swapping


def host_bytes(proc: Path = Path("/proc"), cgroup: Path = Path("/sys/fs/cgroup")) -> HostBytes:
    """The memory of this machine, bounded by this control group's limit (version 2 or 1) where there is one."""
    total, available = _physical(proc)
    for limit_file, usage_file in (
        ("memory.max", "memory.current"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"),
    ):
        limit, used = _number(cgroup / limit_file), _number(cgroup / usage_file)
        if limit is not None and limit < total:
            total = limit
            available = min(available, max(limit - (used or 0), 0))
    return HostBytes(total, available)


@dataclass(frozen=True)
class Machine:
    """What a store knows of where it runs. The default is this machine; a simulation hands in another.

    Attributes:
        host: the host memory that there is, in bytes; ``None``: what the system says when it is asked.
        copies_on_threads: copies on the CPU may run on threads beside the computation.
        noted: what the system said when it was asked before; ``None``: it was not.
    """

    host: HostBytes | None = None
    copies_on_threads: bool = True
    noted: HostBytes | None = None

    def host_bytes(self) -> HostBytes:
        """The memory of this machine, in bytes."""
        return self.host or self.noted or host_bytes()

    def check_room(self, states: int, beside: int) -> None:
        """See that host memory has room for what each process of this node keeps there.

        Args:
            states: bytes of masters and optimizer states.
            beside: bytes of gradients.

        Raises:
            StateStoreError: it has not.
        """
        processes, total = processes_on_node(), self.host_bytes().total
        if (states + beside) * processes > total:
            gradients = f" and {beside * processes / 2**30:.1f} GiB for gradients" if beside else ""
            smaller = ', give a smaller "hift.group_size"' if beside else ""
            raise StateStoreError(
                f"the optimizer states need {states * processes / 2**30:.1f} GiB{gradients} of host memory on this "
                f"node ({processes} processes), it has {total / 2**30:.1f} GiB; set "
                f'"hift.state.codec" to a compact form or "hift.state.residency" to "disk"{smaller}'
            )


THIS_MACHINE = Machine()


def disk_bytes_free(path: str | os.PathLike[str]) -> int:
    """Free bytes of the disk where ``path`` is or will be."""
    folder = Path(path).expanduser().absolute()
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free


def processes_on_node() -> int:
    """Ranks that share this machine's memory, by the launchers' variables."""
    for name in ("LOCAL_WORLD_SIZE", "LOCAL_SIZE", "OMPI_COMM_WORLD_LOCAL_SIZE", "MPI_LOCALNRANKS"):
        if os.environ.get(name, "").isdigit():
            return max(int(os.environ[name]), 1)
    return 1


def _physical(proc: Path) -> HostBytes:
    try:
        lines = (proc / "meminfo").read_text().splitlines()
    except OSError:  # not Linux
        total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        return HostBytes(total, total)
    kib = {name: int(rest.split()[0]) for name, _, rest in (line.partition(":") for line in lines)}
    return HostBytes(kib["MemTotal"] * 1024, kib.get("MemAvailable", kib["MemFree"]) * 1024)


def _number(path: Path) -> int | None:
    try:
        text = path.read_text().strip()
    except OSError:
        return None
    return int(text) if text.isdigit() else None  # "max": no limit
