"""The disk tier: the only good copy survives a failed write, and nothing is left behind by any way of
ending."""

import errno
import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch

from hift_ds.errors import StateStoreError
from hift_ds.store import file_io, state_folder
from hift_ds.store.disk import DiskStateStore
from hift_ds.store.file_io import PAGE_BYTES, measure, page_aligned, read_file, write_file
from hift_ds.store.state_folder import StateFolder

CPU = torch.device("cpu")
MEMORY_FILE_SYSTEM = Path("/dev/shm")


def folders_in(path):
    return [p for p in path.iterdir() if p.name.startswith("hift-states-")]


def random_pages(num_bytes):
    memory = page_aligned(num_bytes)
    return memory.copy_(torch.randint(0, 256, memory.shape, dtype=torch.uint8))


@pytest.fixture(params=["disk", "memory"])
def folder(request, tmp_path):
    if request.param == "disk":
        yield tmp_path
        return
    if not os.access(MEMORY_FILE_SYSTEM, os.W_OK):
        pytest.skip("no file system in memory")
    path = MEMORY_FILE_SYSTEM / f"hift-test-{os.getpid()}"
    path.mkdir()
    yield path
    for file in path.iterdir():
        file.unlink()
    path.rmdir()


@pytest.mark.parametrize("num_bytes", [1, PAGE_BYTES, 5 * PAGE_BYTES + 3])
def test_files_come_back_as_they_were(folder, num_bytes, monkeypatch):
    monkeypatch.setattr(file_io, "_CALL_BYTES", 2 * PAGE_BYTES)
    direct = measure(folder / "probe", num_bytes).direct
    assert not (folder / "probe").exists()
    for way in {False, direct}:
        memory, back = random_pages(num_bytes), page_aligned(num_bytes)
        assert memory.data_ptr() % PAGE_BYTES == 0 and memory.numel() % PAGE_BYTES == 0
        write_file(folder / "file", [memory], way)
        read_file(folder / "file", [back], way)
        assert torch.equal(memory, back)
    with pytest.raises(StateStoreError, match="bytes of optimizer states expected"):
        read_file(folder / "file", [page_aligned(num_bytes + PAGE_BYTES)], False)
    with pytest.raises(StateStoreError, match="No such file"):
        read_file(folder / "none", [back], False)


def test_direct_io_that_the_file_system_refuses(tmp_path, monkeypatch):
    """O_DIRECT gives EINVAL on some file systems: found out by measuring, an error only if it was asked
    for."""
    real = os.open

    def no_direct(path, flags, *args):
        if flags & os.O_DIRECT:
            raise OSError(errno.EINVAL, "Invalid argument")
        return real(path, flags, *args)

    monkeypatch.setattr(os, "open", no_direct)
    assert measure(tmp_path / "probe", 100).direct is False
    with pytest.raises(StateStoreError, match="Invalid argument"):
        measure(tmp_path / "probe", 100, io="direct")


def test_a_write_that_fails_half_way_leaves_the_old_bytes(tmp_path, monkeypatch):
    monkeypatch.setattr(file_io, "_CALL_BYTES", PAGE_BYTES)
    old, new = random_pages(3 * PAGE_BYTES), random_pages(3 * PAGE_BYTES)
    write_file(tmp_path / "file", [old], False)
    real, calls = os.pwrite, []

    def full(handle, data, offset):
        calls.append(offset)
        if len(calls) == 2:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(handle, data, offset)

    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(StateStoreError, match="No space left"):
        write_file(tmp_path / "file", [new], False)
    back = page_aligned(3 * PAGE_BYTES)
    read_file(tmp_path / "file", [back], False)
    assert torch.equal(back, old) and [p.name for p in tmp_path.iterdir()] == ["file"]


def small_store(path, **options):
    store = DiskStateStore(CPU, (), 0, 2, path=path, **options)
    for chunk, numel in enumerate((100, 3000, 7)):
        store.ensure(chunk, "master", numel, torch.float32)
    return store.start()


@pytest.mark.parametrize("io", ["direct", "buffered"])
def test_one_file_per_chunk_removed_at_the_end(io, tmp_path):
    store = small_store(tmp_path, io=io)
    for chunk in range(3):
        store.fetch(chunk)["master"].fill_(chunk)
        store.evict(chunk)
        store.prefetch((chunk + 1) % 3)
    store.synchronize()
    (folder,) = folders_in(tmp_path)
    assert sorted(p.name for p in folder.iterdir() if p.name.startswith("chunk")) == [
        f"chunk-0000{i}" for i in range(3)
    ]
    assert store.read(1)["master"].eq(1).all() and store.speed.direct == (io == "direct")
    store.close()
    store.close()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("slots", [0, 1])
def test_a_disk_that_gives_back_other_bytes_does_not_train_on(tmp_path, slots):
    """64 bytes of a file, a page of an earlier version, two pages that changed places: each is found when it is
    read."""
    store = DiskStateStore(CPU, (), 0, slots, path=tmp_path)
    store.ensure(0, "master", 8 * PAGE_BYTES // 4, torch.float32)
    store.ensure(1, "master", 7, torch.float32)
    store.start()
    versions = []
    for _ in range(2):
        store.fetch(0)["master"].copy_(torch.randn(8 * PAGE_BYTES // 4))
        store.evict(0)
        store.fetch(1)
        store.evict(1)
        store.synchronize()
        (file,) = tmp_path.glob("hift-states-*/chunk-00000")
        versions.append(file.read_bytes())
    older, good = versions
    page = PAGE_BYTES
    for damaged in (
        good[:5000] + bytes(64) + good[5064:],
        good[:page] + older[page : 2 * page] + good[2 * page :],
        good[:page] + good[2 * page : 3 * page] + good[page : 2 * page] + good[3 * page :],
        good[:-1] + bytes([good[-1] ^ 128]),
    ):
        file.write_bytes(damaged)
        with pytest.raises(StateStoreError, match="chunk-00000 is not what was written"):
            store.read(0)
    with pytest.raises(StateStoreError, match="is not what was written"):
        store.fetch(0)
        store.synchronize()
    file.write_bytes(good)
    assert store.read(0)["master"].abs().sum() > 0
    store.close()


def test_refused_with_bytes_needed_and_found(tmp_path, monkeypatch):
    """Two processes share the path: what one has been promised and not yet written is not there for the
    other."""
    free = shutil_free(monkeypatch, tmp_path, 60_000)
    first = small_store(tmp_path)  # 3 files of 4096, 12288 and 4096 bytes, and the largest once more
    assert first.needed_bytes() == 4096 + 12288 + 4096 + 12288
    with pytest.raises(StateStoreError, match=re.escape("32,768 bytes needed, 27,232 found (32,768 more are promised")):
        small_store(tmp_path)
    first.fetch(1)
    first.evict(1)
    first.synchronize()
    free[0] -= 12288  # it has written some of it: the rest is still promised
    with pytest.raises(StateStoreError, match="27,232 found"):
        small_store(tmp_path)
    first.close()
    free[0] = 60_000
    small_store(tmp_path).close()
    assert not folders_in(tmp_path)


def shutil_free(monkeypatch, path, num_bytes):
    free = [num_bytes]

    class Usage:
        @property
        def free(self):
            return free[0]

    monkeypatch.setattr(state_folder.shutil, "disk_usage", lambda where: Usage())
    return free


def test_a_path_that_cannot_be_a_folder(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StateStoreError, match="hift.state.path"):
        StateFolder(tmp_path / "file")
    with pytest.raises(StateStoreError, match="hift.state.path"):
        StateFolder(tmp_path / "file" / "below")


RUN = """
import sys, time
from hift_ds.store.state_folder import StateFolder
folder = StateFolder(sys.argv[1])
folder.file("chunk-00000").write_bytes(bytes(5000))
print("ready", flush=True)
if sys.argv[2] == "raise":
    raise RuntimeError("training failed")
if sys.argv[2] == "wait":
    time.sleep(60)
"""


def start_run(path, ending):
    process = subprocess.Popen(
        [sys.executable, "-c", RUN, str(path), ending],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    assert process.stdout.readline() == "ready\n"
    return process


def test_every_ending_cleans_up_or_is_cleaned_up_after(tmp_path, caplog):
    for ending in ("return", "raise"):
        start_run(tmp_path, ending).wait()
        assert not folders_in(tmp_path), ending
    living, killed = start_run(tmp_path, "wait"), start_run(tmp_path, "wait")
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    assert len(folders_in(tmp_path)) == 2
    StateFolder(tmp_path).close()
    assert [f"-{living.pid}-" in p.name for p in folders_in(tmp_path)] == [True]
    assert "removing the state files of a run that has ended" in caplog.text
    living.kill()
    living.wait()
    foreign = tmp_path / "hift-states-another-host-1-abcdef"
    foreign.mkdir()
    StateFolder(tmp_path).close()
    assert folders_in(tmp_path) == [foreign]  # its machine may be alive


def test_a_forked_child_leaves_its_parents_files(tmp_path):
    store = small_store(tmp_path)
    store.fetch(0)
    store.evict(0)
    store.synchronize()
    child = os.fork()
    if child == 0:
        store._folder.close()
        os._exit(0)
    os.waitpid(child, 0)
    assert folders_in(tmp_path) and store.read(0)
    store.close()


def test_memory_is_bounded_by_the_slots(tmp_path):
    """Sixteen chunks of 8 MB through two slots: resident memory must not grow with the number of chunks."""
    store = DiskStateStore(CPU, (), 0, 2, path=tmp_path)
    for chunk in range(16):
        store.ensure(chunk, "exp_avg", 1 << 21, torch.float32)
    store.start()

    def resident_bytes():
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    before = resident_bytes()
    for chunk in [*range(16)] * 2:
        store.fetch(chunk)["exp_avg"].add_(chunk)
        store.evict(chunk)
        store.prefetch((chunk + 1) % 16)
    grown = resident_bytes() - before
    assert store.fetch(5)["exp_avg"].eq(10).all()
    assert grown < 3 * (8 << 20)
    store.close()


def test_the_slow_disk_is_not_waited_for_when_compute_is_slower(tmp_path):
    """Same order of events as in training; sleeping threads stand for a slow disk and a slow model."""
    store = small_store(tmp_path)
    copy_in, over = store._copy_in, threading.Event()

    def copy_slowly(chunk, memory):
        time.sleep(0.05)
        copy_in(chunk, memory)
        over.set()

    store._copy_in = copy_slowly
    for step in range(5):
        store.fetch(step % 3)
        store.evict(step % 3)
        over.clear()
        store.prefetch((step + 1) % 3)
        if step == 0:
            store.traffic.take()
        assert over.wait(60)  # the model computes until the copy is there
    traffic = store.traffic.take()
    assert traffic.transfer_s > 4 * 0.05 and traffic.stalled_s < 0.1
    store.close()
