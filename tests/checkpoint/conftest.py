"""Ranks that start fast, and folders for tests that save thousands of times."""

import contextlib
import shutil
import subprocess
import tempfile
from pathlib import Path

import pytest

from tests.helpers.forked import Launcher


@pytest.fixture(scope="session")
def launcher():
    with Launcher() as launcher:
        yield launcher


@pytest.fixture
def memory_path(tmp_path):
    """A folder in memory where the system has one: waiting for a disk thousands of times proves nothing."""
    shm = Path("/dev/shm")
    if not shm.is_dir():
        yield tmp_path
        return
    try:
        folder = tempfile.TemporaryDirectory(dir=shm)
    except OSError:
        yield tmp_path
        return
    with folder as name:
        yield Path(name)


@contextlib.contextmanager
def disk_of(size: str, folder: Path):
    """A disk of ``size`` (as ``mount`` takes it) at ``folder``, which is made."""
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("cannot mount a small tmpfs here (needs root)")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)
