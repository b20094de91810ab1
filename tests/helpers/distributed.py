"""Run a function on N gloo processes and collect what each returns.

``run_distributed(fn, world_size, *args)`` starts fresh interpreters, so ``fn`` must be a module-level function; it
runs after DeepSpeed's process group is up. If it raises on any rank, the test fails with that rank's traceback.
Put several cases into one ``fn``: starting a process costs seconds, a case milliseconds.
"""

from __future__ import annotations

import faulthandler
import os
import pickle
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hift_ds.ranks import free_port

TIMEOUT_S = 300
AFTER_A_FAILURE_S = 20  # what the others of a rank that failed have to notice


def run_distributed(fn: Callable[..., Any], world_size: int, *args: Any, timeout_s: int = TIMEOUT_S) -> list[Any]:
    """``[fn(*args) on rank 0, on rank 1, ...]``. Ranks that hang say where, after ``timeout_s``."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "job.pkl").write_bytes(pickle.dumps((fn.__module__, fn.__qualname__, args, timeout_s)))
        port = free_port()
        processes = [_start(folder, rank, world_size, port) for rank in range(world_size)]
        try:
            _wait(processes, timeout_s + AFTER_A_FAILURE_S)
        finally:
            for process in processes:
                process.kill()
                process.wait()
        results, failures = [], []
        for rank in range(world_size):
            answer = folder / f"result.{rank}.pkl"
            if answer.exists():
                ok, value = pickle.loads(answer.read_bytes())
            else:
                ok, value = False, "died:\n" + (folder / f"{rank}.log").read_text(errors="replace")[-5000:]
            results.append(value)
            if not ok:
                failures.append(f"rank {rank} of {world_size}: {value}")
        assert not failures, "\n".join(failures)
        return results


def _wait(processes: list[subprocess.Popen], timeout_s: float) -> None:
    """Until all have ended, or ``timeout_s`` have passed, or ``AFTER_A_FAILURE_S`` after one failed."""
    end = time.monotonic() + timeout_s
    failed = False
    while any(process.poll() is None for process in processes) and time.monotonic() < end:
        if not failed and any(process.poll() for process in processes):
            failed, end = True, time.monotonic() + AFTER_A_FAILURE_S
        time.sleep(0.05)


def deepspeed_launcher(num_processes: int) -> list[str]:
    """The command before a script, or ``--module NAME``, that DeepSpeed starts on so many processes here."""
    runner = [sys.executable, "-m", "deepspeed.launcher.runner"]
    return [*runner, "--num_gpus", str(num_processes), "--master_port", str(free_port())]


def _start(folder: Path, rank: int, world_size: int, port: int) -> subprocess.Popen:
    env = dict(
        os.environ,
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(world_size),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        OMP_NUM_THREADS="1",
        CUDA_VISIBLE_DEVICES="",
    )
    with (folder / f"{rank}.log").open("w") as log:
        return subprocess.Popen(
            [sys.executable, "-m", "tests.helpers.distributed", str(folder)],
            env=env,
            stdout=log,
            stderr=subprocess.STDOUT,
            cwd=Path(__file__).resolve().parents[2],
        )


def _main(folder: Path) -> None:
    import importlib
    import logging

    module, name, args, timeout_s = pickle.loads((folder / "job.pkl").read_bytes())
    faulthandler.dump_traceback_later(timeout_s, exit=True)

    import torch

    logging.disable(logging.INFO)
    torch.set_num_threads(1)
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    answer = folder / f"result.{rank}.pkl"
    try:
        import deepspeed

        from hift_ds.process_group import nothing_compiled

        with nothing_compiled():
            # They meet at a file: another test may take a port in the seconds that they need to get there.
            store = f"file://{folder / 'store'}"
            deepspeed.init_distributed("gloo", init_method=store, rank=rank, world_size=world_size)
        value = getattr(importlib.import_module(module), name)(*args)
        answer.write_bytes(pickle.dumps((True, value)))
    except BaseException:
        answer.write_bytes(pickle.dumps((False, traceback.format_exc())))
        raise
    finally:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()


if __name__ == "__main__":
    _main(Path(sys.argv[1]))
