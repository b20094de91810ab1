"""A run folder has one writer at a time.

The first rank holds a lock of the operating system on ``run.lock``, which ends with the process however that ends, so
nothing stale can keep a run from starting. The file says who holds it.
"""

from __future__ import annotations

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


class FolderLock:
    """Held from now on until :meth:`release` or the end of this process. The folder is made if it is missing.

    Args:
        key: what names the folder, for messages.

    A POSIX record lock: it works over NFS, and a data loader's worker that outlives a killed run does not inherit it.

    Raises:
        ConfigError: another process holds it, or the folder cannot be made or written.
    """

    def __init__(self, folder: Path, key: str = "train.output_dir") -> None:
        path = folder / LOCK_FILE
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._handle: int | None = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        except OSError as error:
            raise ConfigError(
                f"{key}: {str(folder)!r} cannot be made or written: {error.strerror}; choose a folder this "
                "user may write to"
            ) from None
        try:
            fcntl.lockf(self._handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in _CANNOT_LOCK:
                return
            owner = _read_owner(self._handle)
            self.release()
            raise ConfigError(
                f"{key}: {str(folder)!r} is in use by another run ({owner}); wait for it, stop it, or "
                "choose another folder"
            ) from None
        _write_owner(self._handle)

    def release(self) -> None:
        """Closing any handle of the file in this process ends the lock."""
        if self._handle is not None:
            os.close(self._handle)
            self._handle = None


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
