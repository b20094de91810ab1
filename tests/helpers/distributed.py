"""Run a function on N gloo processes and collect what each returns.

``run_distributed(fn, world_size, *args)`` starts fresh interpreters, so ``fn`` must be a module-level function; it
runs after DeepSpeed's process group is up. If it raises on any rank, the test fails with that rank's traceback.
Put several cases into one ``fn``: starting a process costs seconds, a case milliseconds.
"""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hift_ds.ranks import free_port

TIMEOUT_S = 300


def run_distributed(fn: Callable[..., Any], world_size: int, *args: Any, timeout_s: int = TIMEOUT_S) -> list[Any]:
    """``[fn(*args) on rank 0, on rank 1, ...]``."""
    with tempfile.TemporaryDirectory() as folder:
        job = Path(folder) / "job.pkl"
        job.write_bytes(pickle.dumps((fn.__module__, fn.__qualname__, args)))
        port = free_port()
        processes = [_start(job, rank, world_size, port) for rank in range(world_size)]
        try:
            outputs = [process.communicate(timeout=timeout_s)[0] for process in processes]
        finally:
            for process in processes:
                process.kill()
        results, failures = [], []
        for rank in range(world_size):
            answer = Path(folder) / f"result.{rank}.pkl"
            ok, value = (
                pickle.loads(answer.read_bytes()) if answer.exists() else (False, "died:\n" + outputs[rank][-3000:])
            )
            results.append(value)
            if not ok:
                failures.append(f"rank {rank} of {world_size}: {value}")
        assert not failures, "\n".join(failures)
        return results


def deepspeed_launcher(num_processes: int) -> list[str]:
    """The command before a script, or ``--module NAME``, that DeepSpeed starts on so many processes here."""
    runner = [sys.executable, "-m", "deepspeed.launcher.runner"]
    return [*runner, "--num_gpus", str(num_processes), "--master_port", str(free_port())]


def _start(job: Path, rank: int, world_size: int, port: int) -> subprocess.Popen:
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
    command = [sys.executable, "-m", "tests.helpers.distributed", str(job)]
    return subprocess.Popen(
        command,
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=Path(__file__).resolve().parents[2],
    )


def _main(job: str) -> None:
    import importlib
    import logging

    import torch

    logging.disable(logging.INFO)
    torch.set_num_threads(1)
    module, name, args = pickle.loads(Path(job).read_bytes())
    answer = Path(job).with_name(f"result.{os.environ['RANK']}.pkl")
    try:
        import deepspeed

        from hift_ds.process_group import nothing_compiled

        with nothing_compiled():
            deepspeed.init_distributed("gloo")
        value = getattr(importlib.import_module(module), name)(*args)
        answer.write_bytes(pickle.dumps((True, value)))
    except BaseException:
        answer.write_bytes(pickle.dumps((False, traceback.format_exc())))
        raise
    finally:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()


if __name__ == "__main__":
    _main(sys.argv[1])
