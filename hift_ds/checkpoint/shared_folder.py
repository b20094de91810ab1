"""A checkpoint folder on its way: written by all ranks under a temporary name, then published by one.

Several ranks that see the same folder form a storage group; its lowest rank leads: it writes what is common
and publishes. With a shared file system there is one group; with node-local storage one per node. Which ranks
share a folder is found by looking, not by configuration.

Ranks meet through files alone, so that a thread can publish: collectives belong to the main thread.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from hift_ds.checkpoint.files import (
    FileRecord,
    as_json,
    is_temporary,
    publish_folder,
    replace_text,
    show_text,
    temporary_folder,
)
from hift_ds.checkpoint.manifest import LATEST, write_manifest
from hift_ds.errors import CheckpointError

T = TypeVar("T")

VISIBLE_AFTER_S = 30.0  # how long a network file system may take to show another node's new file
_POLL_S = 0.02


@dataclass
class SharedFolder:
    """One rank's view of the folder.

    Args:
        token: random, the same on all ranks: no earlier attempt's folder is mistaken for this one's.
    """

    save_dir: Path
    tag: str
    token: str
    rank: int
    leader: int = field(default=-1, init=False)
    members: Sequence[int] = field(default=(), init=False)  # the ranks of this storage group

    @property
    def path(self) -> Path:
        """The folder while it is written, under its temporary name."""
        return temporary_folder(self.final, self.token)

    @property
    def final(self) -> Path:
        """The folder's final name."""
        return self.save_dir / self.tag

    @property
    def leads(self) -> bool:
        """True on the rank that writes what is common, and publishes."""
        return self.rank == self.leader

    def create(self) -> None:
        """Make the folder and mark it. Called by every rank that may lead."""
        self.path.mkdir(parents=True, exist_ok=True)
        (self.path / f"leader-{self.rank:05d}").touch()

    def find_leader(self) -> int:
        """The lowest rank whose folder this is. Called after every possible leader's :meth:`create`.

        Raises:
            CheckpointError: no rank's: the folder is not shared.
        """
        candidates = _poll(lambda: sorted(self.path.glob("leader-*")), VISIBLE_AFTER_S)
        if not candidates:
            raise CheckpointError(
                f"{self.save_dir} is not the same folder on all nodes: save to a shared file system, or set "
                '"checkpoint": {"use_node_local_storage": true} in the DeepSpeed config'
            )
        return int(candidates[0].name.removeprefix("leader-"))

    def join(self, leaders: Sequence[int]) -> None:
        """Take over what every rank found: ``leaders``."""
        self.leader = leaders[self.rank]
        self.members = [rank for rank, leader in enumerate(leaders) if leader == self.leader]

    def remove_leftovers(self) -> None:
        """Remove folders of saves that were killed. Called by the leader, when all ranks have joined."""
        for path in self.save_dir.iterdir():
            if is_temporary(path) and path != self.path:
                shutil.rmtree(path, ignore_errors=True)

    def write_part(self, records: Mapping[str, FileRecord]) -> None:
        """Say that this rank's files are complete and on disk. The leader may publish, which renames the folder, before
        this returns."""
        show_text(self._part(self.rank), json.dumps(as_json(records)))

    def write_failure(self, reason: str) -> None:
        """Say that this rank's files will not come. The leader need not wait; if even this cannot be written, it times
        out."""
        with contextlib.suppress(OSError):
            show_text(self.path / f"failed-{self.rank:05d}", reason)

    def publish(
        self,
        global_steps: int,
        save_latest: bool,
        node_local: bool,
        timeout_s: float,
        given_up: Callable[[], bool] = lambda: False,
    ) -> None:
        """Write the manifest when all members' parts are there; then give the folder its final name; then write
        ``latest``. Called by the leader.

        Args:
            given_up: true as soon as the parts need not be waited for any more.

        Raises:
            CheckpointError: a member failed, or its part did not come in time.
        """
        files = self._collect_parts(timeout_s, given_up)
        for path in [*self.path.glob("leader-*"), *self.path.glob("part-*")]:
            path.unlink()
        write_manifest(self.path, self.tag, global_steps, files, node_local)
        publish_folder(self.path, self.final)
        if save_latest:
            replace_text(self.save_dir / LATEST, self.tag)

    def discard(self) -> None:
        """Remove the folder and what is in it."""
        shutil.rmtree(self.path, ignore_errors=True)

    def _part(self, rank: int) -> Path:
        return self.path / f"part-{rank:05d}"

    def _collect_parts(self, timeout_s: float, given_up: Callable[[], bool]) -> dict[str, FileRecord]:
        def arrived() -> bool:
            if given_up():
                raise CheckpointError("given up: another rank failed")
            if failed := sorted(self.path.glob("failed-*")):
                rank = int(failed[0].name.removeprefix("failed-"))
                raise CheckpointError(f"rank {rank}: {failed[0].read_text(encoding='utf-8')}")
            return all(self._part(rank).exists() for rank in self.members)

        if not _poll(arrived, timeout_s):
            missing = next(rank for rank in self.members if not self._part(rank).exists())
            raise CheckpointError(f"rank {missing} did not finish its files in {self.path} within {timeout_s:.0f} s")
        files: dict[str, FileRecord] = {}
        for rank in self.members:
            part = json.loads(self._part(rank).read_text(encoding="utf-8"))
            files |= {name: FileRecord(**record) for name, record in part.items()}
        return files


def _poll(ready: Callable[[], T], timeout_s: float) -> T:
    """The first true value of ``ready``, or its last one."""
    deadline = time.monotonic() + timeout_s
    while not (value := ready()) and time.monotonic() < deadline:
        time.sleep(_POLL_S)
    return value
