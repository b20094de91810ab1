"""A folder has one writer at a time: a run's, and the one that a model is exported to.

The first rank holds a lock of the operating system on ``run.lock``, which ends with the process however that ends, so
nothing stale can keep a run from starting. The file says who holds it.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import socket
import sys
import time
from pathlib import Path

from hift_ds.errors import ConfigError

LOCK_FILE = "run.lock"
_CANNOT_LOCK = (errno.ENOLCK, errno.ENOTSUP, errno.EINVAL, errno.ENOSYS)  # file systems without locks
_Inode = tuple[int, int]
_held: dict[_Inode, tuple[int, int]] = {}  # of this process: handle, how many hold it
os.register_at_fork(after_in_child=_held.clear)  # a child has none of its parent's locks


class FolderLock:
    """A lock on a folder, held from now on until :meth:`release` or the end of this process. The folder is made if it
    is missing.

    Args:
        key: what names the folder, for messages.
        leaves_file: ``False``: the file goes with the lock, and with it the folder if that is empty and was missing.

    A POSIX record lock: it works over NFS, and a data loader's worker that outlives a killed run does not inherit it.
    It is the process's, so that a second one of the same process shares it (a cell that was interrupted and run again).

    Raises:
        ConfigError: another process holds it, or the folder cannot be made or written.
    """

    def __init__(self, folder: Path, key: str = "train.output_dir", leaves_file: bool = True) -> None:
        self._path, self._leaves_file = folder / LOCK_FILE, leaves_file
        self._made = not os.path.lexists(folder)
        self._inode: _Inode | None = None  # of the file that is held
        while self._inode is None:
            try:
                folder.mkdir(parents=True, exist_ok=True)
                if self._shares():
                    return
                handle = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
            except OSError as error:
                raise ConfigError(
                    f"{key}: {str(folder)!r} cannot be made or written: {error.strerror}; choose a folder this "
                    "user may write to"
                ) from None
            self._take(handle, folder, key)

    def _shares(self) -> bool:
        """Whether this process holds the lock already: closing another handle of the file would end it."""
        try:
            inode = _inode(os.stat(self._path))
        except FileNotFoundError:
            return False
        if inode not in _held:
            return False
        self._inode = inode
        _held[inode] = _held[inode][0], _held[inode][1] + 1
        return True

    def _take(self, handle: int, folder: Path, key: str) -> None:
        """Nothing is taken where another process took the file away between its opening and here."""
        try:
            fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in _CANNOT_LOCK:
                owner = _read_owner(handle)
                os.close(handle)
                raise ConfigError(
                    f"{key}: {str(folder)!r} is in use by another run ({owner}); wait for it, stop it, or "
                    "choose another folder"
                ) from None
        if not self._is_there(handle):
            os.close(handle)
            return
        self._inode = _inode(os.fstat(handle))
        _held[self._inode] = handle, 1
        _write_owner(handle)

    def _is_there(self, handle: int) -> bool:
        try:
            return _inode(os.stat(self._path)) == _inode(os.fstat(handle))
        except OSError:
            return False

    def release(self) -> None:
        """End the lock, if nobody else in this process holds it. A second call does nothing."""
        inode, self._inode = self._inode, None
        if inode is None or inode not in _held:
            return
        handle, num = _held[inode]
        if num > 1:
            _held[inode] = handle, num - 1
            return
        if not self._leaves_file and self._is_there(handle):  # while it is ours
            with contextlib.suppress(OSError):
                self._path.unlink()
                if self._made:
                    self._path.parent.rmdir()  # if it is empty
        del _held[inode]
        os.close(handle)


def _inode(status: os.stat_result) -> _Inode:
    return status.st_dev, status.st_ino


def _write_owner(handle: int) -> None:
    owner = {
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "since": time.strftime("%Y-%m-%d %H:%M:%S"),
        "command": " ".join(sys.argv)[:500],
    }
    try:
        os.ftruncate(handle, 0)
        os.pwrite(handle, json.dumps(owner).encode() + b"\n", 0)
    except OSError:
        pass  # a full disk is said by what needs the room


def _read_owner(handle: int) -> str:
    try:
        owner = json.loads(os.pread(handle, 4096, 0))
        return f"process {owner['pid']} on {owner['host']} since {owner['since']}: {owner['command']}"
    except (OSError, ValueError, KeyError, TypeError):
        return "which has not said who it is"
