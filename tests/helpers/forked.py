"""Ranks that start in milliseconds: forked from a process that has already imported torch and DeepSpeed.

``with Launcher() as launcher: launcher.run(fn, world_size, *args)`` is ``run_distributed`` for many short
jobs; ``launcher.start(...)`` gives a :class:`Job` whose ranks can be killed. ``fn`` is a module-level
function.
"""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hift_ds.ranks import free_port


@dataclass
class Job:
    """The ranks of one start."""

    launcher: Launcher
    folder: Path
    pids: list[int]

    def wait(self) -> list[int]:
        """When all ranks have ended: exit codes, negative for signals."""
        return self.launcher._ask(("wait", self.pids))

    def output(self, rank: int) -> str:
        return (self.folder / f"{rank}.log").read_text(errors="replace")

    def result(self, rank: int) -> Any:
        """(True, what ``fn`` returned), (False, traceback), or None for a rank that was killed."""
        path = self.folder / f"{rank}.pkl"
        return pickle.loads(path.read_bytes()) if path.exists() else None


class Launcher:
    """Owns the process that forks. Close it (or use ``with``)."""

    def __init__(self) -> None:
        self._folder = tempfile.TemporaryDirectory()
        self._count = 0
        env = dict(os.environ, OMP_NUM_THREADS="1", CUDA_VISIBLE_DEVICES="")
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.helpers.forked"],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=env,
            cwd=Path(__file__).resolve().parents[2],
        )  # fmt: skip

    def preload(self, module: str) -> None:
        """Import it once, for all ranks started from now on."""
        self._ask(("import", module))

    def start(self, fn: Callable[..., Any], world_size: int, *args: Any) -> Job:
        self._count += 1
        folder = Path(self._folder.name) / str(self._count)
        folder.mkdir()
        pids = self._ask(("start", fn.__module__, fn.__qualname__, args, world_size, free_port(), folder))
        return Job(self, folder, pids)

    def run(self, fn: Callable[..., Any], world_size: int, *args: Any) -> list[Any]:
        """``[fn(*args) on rank 0, on rank 1, ...]``; fails with the traceback of a rank that raised."""
        job = self.start(fn, world_size, *args)
        job.wait()
        results = [job.result(rank) or (False, "died:\n" + job.output(rank)[-3000:]) for rank in range(world_size)]
        failures = [f"rank {rank} of {world_size}: {value}" for rank, (ok, value) in enumerate(results) if not ok]
        assert not failures, "\n".join(failures)
        return [value for _, value in results]

    def close(self) -> None:
        self._process.stdin.close()
        self._process.wait(30)
        self._folder.cleanup()

    def __enter__(self) -> Launcher:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def _ask(self, request: Any) -> Any:
        pickle.dump(request, self._process.stdin)
        self._process.stdin.flush()
        return pickle.load(self._process.stdout)


def _serve() -> None:
    answers, sys.stdout = os.fdopen(os.dup(1), "wb"), sys.stderr
    os.dup2(2, 1)
    _import_what_ranks_need()
    children: set[int] = set()
    while True:
        try:
            kind, *rest = pickle.load(sys.stdin.buffer)
        except EOFError:
            break
        if kind == "import":
            import importlib

            importlib.import_module(rest[0])
            answer = None
        elif kind == "start":
            module, name, args, world_size, port, folder = rest
            answer = [_fork(module, name, args, rank, world_size, port, folder) for rank in range(world_size)]
            children |= set(answer)
        else:
            answer = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in rest[0]]
            children -= set(rest[0])
        pickle.dump(answer, answers)
        answers.flush()
    for pid in children:
        os.kill(pid, 9)
    os._exit(0)  # seconds faster than taking torch down


def _import_what_ranks_need() -> None:
    import logging

    import torch

    import hift_ds.engine.initialize  # noqa: F401

    logging.disable(logging.INFO)
    torch.set_num_threads(1)
    torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))])  # imports for seconds when the first one is made


def _fork(module: str, name: str, args: tuple, rank: int, world_size: int, port: int, folder: Path) -> int:
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        log = os.open(folder / f"{rank}.log", os.O_WRONLY | os.O_CREAT, 0o600)
        os.dup2(log, 1)
        os.dup2(log, 2)
        os.environ.update(
            RANK=str(rank),
            LOCAL_RANK=str(rank),
            WORLD_SIZE=str(world_size),
            MASTER_ADDR="127.0.0.1",
            MASTER_PORT=str(port),
        )
        code = _run(module, name, args, folder / f"{rank}.pkl")
    finally:
        os._exit(code)


def _run(module: str, name: str, args: tuple, answer: Path) -> int:
    import importlib

    import torch

    from hift_ds.process_group import ensure_process_group

    try:
        ensure_process_group()
        result = (True, getattr(importlib.import_module(module), name)(*args))
    except SystemExit as error:
        return int(error.code or 0)
    except BaseException:
        result = (False, traceback.format_exc())
        print(result[1], file=sys.stderr, flush=True)
    answer.write_bytes(pickle.dumps(result))
    if result[0]:
        torch.distributed.destroy_process_group()
    return 0 if result[0] else 1


if __name__ == "__main__":
    from tests.helpers.forked import _serve as serve  # one module object, whatever name Python ran it under

    serve()
