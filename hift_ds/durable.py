"""Putting files on disk so that a crash of the machine does not lose them."""

from __future__ import annotations

import errno
import os
from pathlib import Path

CANNOT_SYNC = (errno.EINVAL, errno.ENOTSUP, errno.EBADF)  # network file systems, of folders: they need not, or cannot


def sync(path: Path) -> None:
    """Put a file's contents, or a folder's entries (names, not contents), on disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in CANNOT_SYNC:
            raise
    finally:
        os.close(handle)
