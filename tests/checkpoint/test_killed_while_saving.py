"""A save that dies at any file operation, or in the middle of any write, leaves a whole checkpoint: the
old or the new."""

import io
import os
import shutil
import sys
from pathlib import Path

import pytest
import torch

from hift_ds.checkpoint import files as durable_files
from tests.checkpoint.runs import Case, advance, states_of, whole_weights
from tests.helpers.engines import ds_config

KILLED = 77
_WATCHED = {
    "open",
    "os.rename",
    "os.mkdir",
    "os.remove",
    "os.rmdir",
    "os.truncate",
    "shutil.rmtree",
    "os.listdir",
    "os.scandir",
}


def die_at(operation: int, folder: Path) -> None:
    """From now on: end this process at its ``operation``-th file operation in ``folder``, before it is done;
    a write is done by half."""
    count = 0

    def tick() -> bool:
        nonlocal count
        count += 1
        return count == operation

    def watch(event, args):
        if event in _WATCHED and args and str(args[0]).startswith(str(folder)) and tick():
            os._exit(KILLED)

    class DyingFile(io.FileIO):
        def write(self, block):
            if tick():
                super().write(block[: len(block) // 2])
                os._exit(KILLED)
            return super().write(block)

    sys.addaudithook(watch)
    durable_files.open = lambda path, mode, buffering: DyingFile(path, mode.replace("b", ""))


def state_of(engine):
    return whole_weights(engine), states_of(engine), engine.global_steps, engine.schedule.cursor


def same(a, b) -> bool:
    tensors = all(
        x.keys() == y.keys() and all(torch.equal(x[n], y[n]) for n in x) for x, y in zip(a[:2], b[:2], strict=True)
    )
    return tensors and a[2:] == b[2:]


def die_everywhere(folder: str, tag: str | None, asynchronous: bool) -> dict[str, int]:
    """How many saves ended with the old checkpoint, with the new one, or unharmed."""
    folder = Path(folder)
    case = Case(ds_config(hift={"checkpoint": {"asynchronous": asynchronous}}))
    engine = case.engine(seed=0)
    advance(engine, 0, 3)
    engine.save_checkpoint(folder / "base", tag=tag)
    engine.wait_for_checkpoint()
    old = state_of(engine)
    advance(engine, 3, 7)
    new = state_of(engine)
    outcome = {"old": 0, "new": 0, "unharmed": 0}
    other = case.engine(seed=5)
    for operation in range(1, 1000):
        work = folder / "work"
        shutil.copytree(folder / "base", work)
        pid = os.fork()
        if pid == 0:
            try:
                die_at(operation, work)
                engine.save_checkpoint(work, tag=tag)
                engine.wait_for_checkpoint()
                os._exit(0)
            finally:
                os._exit(1)
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        assert code in (0, KILLED), (operation, code)
        path, _ = other.load_checkpoint(work)
        loaded = state_of(other)
        assert same(loaded, old) or same(loaded, new), (operation, path)
        outcome["unharmed" if code == 0 else "new" if same(loaded, new) else "old"] += 1
        # The next save works and clears what the killed one left.
        assert other.save_checkpoint(work, tag="next") and other.wait_for_checkpoint()
        assert not [p.name for p in work.iterdir() if p.name.startswith(".")], operation
        assert same(state_of(other), loaded)
        shutil.rmtree(work)
        if code == 0:
            break
    engine.destroy()
    other.destroy()
    return outcome


@pytest.mark.parametrize(
    ("asynchronous", "tag"),
    [
        (False, None),
        (True, "best"),
        pytest.param(False, "best", marks=pytest.mark.slow),
        pytest.param(True, None, marks=pytest.mark.slow),
    ],
)
def test_a_save_killed_at_every_file_operation(launcher, memory_path, tag, asynchronous):
    """``best``: the new checkpoint takes the old one's name."""
    outcome = launcher.run(die_everywhere, 1, str(memory_path), tag, asynchronous)[0]
    assert outcome["unharmed"] == 1
    assert outcome["old"] > 30 and outcome["new"] >= 1, outcome
