"""The folder of one process for state files: made, watched and removed.

State files are swap, not a checkpoint: nothing reads them after their process has ended. A living process
holds a lock on its folder, so a folder without one is stale, whatever ended its process, and the next run
removes it.
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import shutil
import socket
import uuid
import weakref
from collections.abc import Iterator
from pathlib import Path

from hift_ds.errors import StateStoreError

logger = logging.getLogger(__name__)

PREFIX = "hift-states-"
_LOCK, _PROMISED = "lock", "promised_bytes"


class StateFolder:
    """``<path>/hift-states-<host>-<pid>-<random>/``, removed by ``close`` or when the process ends in any
    orderly way.

    Raises:
        StateStoreError: ``path`` cannot be made or written.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.parent = Path(path).expanduser()
        try:
            self.parent.mkdir(parents=True, exist_ok=True)
            with self._turn():
                self._remove_stale()
                name = f"{PREFIX}{socket.gethostname()}-{os.getpid()}-{uuid.uuid4().hex[:8]}"
                self.folder = self.parent / name
                self.folder.mkdir()
                lock = os.open(self.folder / _LOCK, os.O_CREAT | os.O_RDWR)
                fcntl.flock(lock, fcntl.LOCK_EX)
        except OSError as error:
            raise StateStoreError(
                f'"hift.state.path": {str(self.parent)!r} is not a folder that this process can write: {error.strerror}'
            ) from None
        self._remove = weakref.finalize(self, _remove, self.folder, lock, os.getpid())

    def file(self, name: str) -> Path:
        """The path of a file of this folder."""
        return self.folder / name

    def promise(self, num_bytes: int) -> None:
        """Set ``num_bytes`` of the disk aside for this folder, against other living runs on the same path.

        Raises:
            StateStoreError: there is not as much.
        """
        with self._turn():
            promised = sum(_unused_promise(other) for other in self._folders() if other != self.folder)
            free = shutil.disk_usage(self.parent).free + _bytes_in(self.folder) - promised
            if num_bytes > free:
                others = f" ({promised:,} more are promised to other running processes)" if promised else ""
                raise StateStoreError(
                    f'"hift.state.path": {str(self.parent)!r} cannot hold the optimizer states of this '
                    f"process: {num_bytes:,} bytes needed, {max(free, 0):,} found{others}; give another path "
                    'or a more compact "hift.state.codec"'
                )
            (self.folder / _PROMISED).write_text(str(num_bytes))

    def close(self) -> None:
        """Remove the folder and give back the disk that was promised to it."""
        self._remove()

    def _folders(self) -> list[Path]:
        return [folder for folder in self.parent.glob(PREFIX + "*") if folder.is_dir()]

    def _remove_stale(self) -> None:
        for folder in self._folders():
            if not folder.name.startswith(f"{PREFIX}{socket.gethostname()}-") or _is_locked(folder):
                continue  # another machine's, on a shared file system: its locks may not be seen here
            logger.warning(
                "removing the state files of a run that has ended: %s (%s bytes)",
                folder,
                f"{_bytes_in(folder):,}",
            )
            shutil.rmtree(folder, ignore_errors=True)

    @contextlib.contextmanager
    def _turn(self) -> Iterator[None]:
        """One process at a time looks at the folders of this path."""
        handle = os.open(self.parent, os.O_RDONLY)
        try:
            with contextlib.suppress(OSError):  # some network file systems cannot lock a folder
                fcntl.flock(handle, fcntl.LOCK_EX)
            yield
        finally:
            os.close(handle)


def _remove(folder: Path, lock: int, owner: int) -> None:
    if os.getpid() != owner:  # a forked child ends: the files are its parent's
        return
    shutil.rmtree(folder, ignore_errors=True)
    os.close(lock)


def _is_locked(folder: Path) -> bool:
    try:
        handle = os.open(folder / _LOCK, os.O_RDWR)
    except OSError:
        return False
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return False
    except OSError:
        return True
    finally:
        os.close(handle)


def _unused_promise(folder: Path) -> int:
    with contextlib.suppress(OSError, ValueError):
        return max(int((folder / _PROMISED).read_text()) - _bytes_in(folder), 0)
    return 0


def _bytes_in(folder: Path) -> int:
    total = 0
    for file in folder.iterdir():
        if file.name in (_LOCK, _PROMISED):
            continue
        with contextlib.suppress(OSError):  # replaced meanwhile
            total += file.stat().st_blocks * 512
    return total
