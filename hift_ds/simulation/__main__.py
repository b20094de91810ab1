"""Steps of the real engine on a device that has no memory, every allocation counted: settings in, results out.

    python -m hift_ds.simulation [PROCESSES] < settings.json > results.json

A fake device changes the whole process that has one, so this is a process of its own and nobody imports this package:
:func:`hift_ds.forecast.setting.simulate` starts it. Everything that steps need is imported before the first fork: that
takes as long as dozens of steps.
"""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import sys
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from typing import Any

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


def main(processes: int = 1) -> None:
    """Read settings from stdin and write their results to stdout, both JSON."""
    answers, sys.stdout = sys.stdout, sys.stderr  # whatever libraries print is not the answer
    settings = [Setting(**setting) for setting in json.load(sys.stdin)]
    try:
        answer: Any = [asdict(result) for result in _run_all(settings, processes)]
    except errors.HiFTError as error:
        answer = {"kind": type(error).__name__, "message": str(error)}
    print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main(int((sys.argv[1:] or ["1"])[0]))
