"""Steps of the real engine on a device that has no memory, every allocation counted: settings in, results out.

    python -m hift_ds.simulation     # lines of [number of processes, settings] on stdin, a line of results for each

A fake device changes the whole process that has one, so this is a process of its own and nobody imports this package:
:mod:`hift_ds.forecast.simulator` starts it. Each line is answered by a fork, and everything that steps need is imported
before: that takes as long as dozens of steps.
"""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import sys
import traceback
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from typing import Any, NoReturn, TextIO

from hift_ds import errors
from hift_ds.forecast.setting import Result, Setting
from hift_ds.simulation.step import run

with contextlib.suppress(ImportError):  # it is needed where a setting offloads activations, which then says so
    import trl.models.activation_offloading  # noqa: F401


def _run_all(settings: Sequence[Setting], num_processes: int) -> list[Result]:
    """Run the settings in this process, or in forks of it: one process is a rank of one number of ranks only."""
    indices_of: dict[int, list[int]] = {}
    for i, setting in enumerate(settings):
        indices_of.setdefault(setting.world_size, []).append(i)
    if num_processes == 1 and len(indices_of) == 1:
        return [run(setting) for setting in settings]
    results: dict[int, Result] = {}
    for indices in indices_of.values():
        with ProcessPoolExecutor(min(num_processes, len(indices)), multiprocessing.get_context("fork")) as pool:
            results |= dict(zip(indices, pool.map(run, [settings[i] for i in indices]), strict=True))
    return [results[i] for i in range(len(settings))]


def main() -> None:
    """Answer each line of stdin on stdout, both JSON, until a line cannot be answered: why not is on stderr then."""
    answers, sys.stdout = sys.stdout, sys.stderr  # whatever libraries print is not the answer
    for line in sys.stdin:
        child = os.fork()
        if child == 0:
            _answer(line, answers)
        if os.waitpid(child, 0)[1] != 0:
            raise SystemExit(1)


def _answer(line: str, answers: TextIO) -> NoReturn:
    code = 1
    try:
        num_processes, settings = json.loads(line)
        try:
            results = _run_all([Setting(**setting) for setting in settings], num_processes)
            answer: Any = [asdict(result) for result in results]
        except errors.HiFTError as error:
            answer = {"kind": type(error).__name__, "message": str(error)}
        print(json.dumps(answer), file=answers, flush=True)
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code)


if __name__ == "__main__":
    main()
