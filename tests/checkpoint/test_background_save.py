"""The asynchronous save's promises that equality at the end does not show: bounded memory, and who waits
how long."""

import gc
import os
import stat
import subprocess
import sys
import threading
import weakref
from pathlib import Path

import pytest

from hift_ds.checkpoint.background_save import GROUPS_IN_MEMORY, BackgroundSave
from hift_ds.checkpoint.manifest import read_manifest
from hift_ds.checkpoint.writer import CheckpointWriter
from hift_ds.errors import CheckpointError
from tests.checkpoint.runs import Case, advance, states_of, whole_weights
from tests.helpers.engines import ds_config

HIFT = {"checkpoint": {"asynchronous": True}}


@pytest.fixture
def engine():
    engine = Case(ds_config(hift=HIFT)).engine(seed=0)
    advance(engine, 0, 3)
    yield engine
    engine.destroy()


def test_training_waits_for_a_slow_disk_before_it_holds_more_copies(engine, tmp_path, monkeypatch):
    """The thread is stopped at its first tensors; the main thread may then copy two groups' worth and no
    more."""
    disk_works, alive, most = threading.Event(), 0, 0
    lock = threading.Lock()
    put, add = BackgroundSave._put_copies, CheckpointWriter.add

    def counted_put(self, tensors):
        put(self, counted(tensors))

    def counted(tensors):
        nonlocal alive, most
        for i, item in enumerate(tensors):  # the copies of a model without buffers are none
            if i == 0:
                with lock:
                    alive += 1
                    most = max(most, alive)
            yield item

    def slow_add(self, tensors):
        nonlocal alive
        disk_works.wait()
        add(self, tensors)
        with lock:
            alive -= bool(tensors)

    monkeypatch.setattr(BackgroundSave, "_put_copies", counted_put)
    monkeypatch.setattr(CheckpointWriter, "add", slow_add)
    threading.Timer(0.5, disk_works.set).start()
    engine.save_checkpoint(tmp_path)
    advance(engine, 3, 8)
    assert disk_works.is_set()  # the steps could not all be made before
    assert 1 <= most <= GROUPS_IN_MEMORY
    assert engine.wait_for_checkpoint() and (tmp_path / "latest").read_text() == "global_step3"


def test_the_time_that_training_waited_is_in_the_reports(engine, tmp_path, monkeypatch):
    add, works = CheckpointWriter.add, threading.Event()

    def slow_add(self, tensors):
        works.wait()
        add(self, tensors)

    engine.checkpointer.take_waited_s()
    advance(engine, 3, 4)
    assert engine.last_report.checkpoint_s == 0.0
    monkeypatch.setattr(CheckpointWriter, "add", slow_add)
    threading.Timer(0.3, works.set).start()
    engine.save_checkpoint(tmp_path)
    held = 0.0
    for i in range(4, 9):
        advance(engine, i, i + 1)
        held += engine.last_report.checkpoint_s
    assert held > 0.2
    engine.wait_for_checkpoint()


def test_nothing_has_a_name_before_it_is_whole(engine, tmp_path, monkeypatch):
    close, may_close = CheckpointWriter.close, threading.Event()

    def slow_close(self):
        may_close.wait()
        close(self)

    monkeypatch.setattr(CheckpointWriter, "close", slow_close)
    engine.save_checkpoint(tmp_path)
    background = weakref.ref(engine.checkpointer._background)
    assert engine.last_checkpoint is None
    advance(engine, 3, 10)
    assert all(p.name.startswith(".") for p in tmp_path.iterdir())
    may_close.set()
    engine.wait_for_checkpoint()
    assert engine.last_checkpoint == tmp_path / "global_step3"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["global_step3", "latest"]
    assert {p.name for p in (tmp_path / "global_step3").iterdir()} == {
        "manifest.json", *read_manifest(tmp_path / "global_step3").files,
    }  # fmt: skip
    gc.collect()
    assert background() is None  # or the end of the program would wait to let go of the model


def test_all_is_on_disk_before_it_has_its_name_and_takes_the_place_of_what_kills_left(engine, tmp_path, monkeypatch):
    final, on_disk, late = tmp_path / "global_step3", {}, []
    fsync, rename, replace = os.fsync, os.rename, os.replace

    def noted(handle):
        status = os.fstat(handle)
        on_disk[status.st_ino] = set(os.listdir(handle)) if stat.S_ISDIR(status.st_mode) else set()
        fsync(handle)

    def lacking(folder):
        """What of a folder would be lost."""
        names = on_disk.get(folder.stat().st_ino, set())
        return [
            p.name for p in folder.iterdir() if p.name not in names or (p.is_file() and p.stat().st_ino not in on_disk)
        ]

    def renames(old, new):
        if Path(new) == final:
            late.extend(lacking(Path(old)))
        rename(old, new)

    def replaces(old, new):
        if Path(new).name == "latest":
            late.extend(set(lacking(tmp_path)) & {final.name})
        replace(old, new)

    monkeypatch.setattr(os, "fsync", noted)
    monkeypatch.setattr(os, "rename", renames)
    monkeypatch.setattr(os, "replace", replaces)
    for _ in range(2):
        (tmp_path / "global_step3.replaced").mkdir()
        (tmp_path / "global_step3.replaced" / "a file").touch()
        (tmp_path / ".latest.tmp").touch()
        on_disk.clear()
        engine.save_checkpoint(tmp_path)
        engine.wait_for_checkpoint()
        assert sorted(p.name for p in tmp_path.iterdir()) == ["global_step3", "latest"]
        assert not late and not lacking(tmp_path)


def test_a_failure_is_raised_at_the_next_save_and_the_one_after_works(engine, tmp_path, monkeypatch):
    def broken(self):
        raise CheckpointError("the disk is gone")

    with monkeypatch.context() as patch:
        patch.setattr(CheckpointWriter, "close", broken)
        engine.save_checkpoint(tmp_path)
        advance(engine, 3, 10)
        with pytest.raises(CheckpointError, match="the disk is gone"):
            engine.save_checkpoint(tmp_path)
    assert list(tmp_path.iterdir()) == []
    engine.save_checkpoint(tmp_path)
    expected = {**whole_weights(engine), **states_of(engine)}
    advance(engine, 10, 13)
    engine.load_checkpoint(tmp_path)  # waits for it first
    loaded = {**whole_weights(engine), **states_of(engine)}
    assert loaded.keys() == expected.keys() and all(loaded[n].equal(t) for n, t in expected.items())


def end_without_asking(folder: str) -> None:
    engine = Case(ds_config(hift=HIFT)).engine(seed=0)
    advance(engine, 0, 3)
    engine.save_checkpoint(folder)


def test_a_program_that_just_ends_gets_its_checkpoint(tmp_path):
    job = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    env = {name: value for name, value in os.environ.items() if name not in job}
    call = f"from {__name__} import end_without_asking; end_without_asking({str(tmp_path)!r})"
    subprocess.run([sys.executable, "-c", call], check=True, timeout=120, env=env)
    assert (tmp_path / "latest").read_text() == "global_step3"


def test_a_program_that_ends_starts_no_collective(engine, tmp_path, monkeypatch, caplog):
    """Copies of partitioned weights are gathers: at the end of a program nobody may be there to take part."""
    copied = []
    monkeypatch.setattr(BackgroundSave, "_copy_next", lambda self: copied.append(self._remaining.popleft()))
    engine.save_checkpoint(tmp_path)
    background = engine.checkpointer._background
    background._collective = True
    try:
        background._finish_at_exit()
        assert not copied and "ended without wait_for_checkpoint()" in caplog.text
    finally:  # else the engine would wait for it
        monkeypatch.undo()
        engine.checkpointer._background = None
        background.forget()
    assert not (tmp_path / "latest").exists()


def test_a_failed_rank_of_several_keeps_the_states_that_its_save_has_not_copied(engine, tmp_path, monkeypatch):
    """It does not wait while it fails, since the others may never come; the end of the program writes what it can."""
    engine.save_checkpoint(tmp_path)
    expected = {**whole_weights(engine), **states_of(engine)}
    with monkeypatch.context() as patch:
        patch.setattr(engine, "world_size", 2)
        engine.end_training(failed=True)
    assert not (tmp_path / "latest").exists()
    engine.checkpointer._background._finish_at_exit()
    resumed = Case(ds_config(hift=HIFT)).engine(seed=1)
    resumed.load_checkpoint(tmp_path)
    loaded = {**whole_weights(resumed), **states_of(resumed)}
    assert loaded.keys() == expected.keys() and all(loaded[n].equal(t) for n, t in expected.items())
    resumed.destroy()
