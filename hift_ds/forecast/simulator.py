"""The process that answers forecasts: it steps settings on the fake device (``python -m hift_ds.simulation``).

Its imports take as long as dozens of steps, so a command that asks several times keeps it (:func:`one_simulator`).
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import Any

from hift_ds import errors
from hift_ds.forecast.setting import Result, Setting

_COMMAND = (sys.executable, "-m", "hift_ds.simulation")
_kept: list[_Simulator] = []  # inside one_simulator, its process


class SimulationError(errors.HiFTError):
    """The engine could not be run on the fake device."""


def simulate(settings: Sequence[Setting], num_processes: int = 1) -> list[Result]:
    """Run each setting in a fresh process, or in ``num_processes``: forks of one that has imported what they need.

    Raises:
        HiFTError: the engine refuses a setting.
        SimulationError: a process failed; the last line that it wrote is in the message.
    """
    with one_simulator():
        answer = _kept[0].ask(settings, num_processes)
    if isinstance(answer, dict):
        raise getattr(errors, answer["kind"], errors.HiFTError)(answer["message"])
    return [Result.from_dict(data) for data in answer]


@contextlib.contextmanager
def one_simulator() -> Iterator[None]:
    """All simulations inside this block are forks of one process, which ends with it. The environment and the current
    folder are those of the first."""
    if _kept:
        yield
        return
    _kept.append(_Simulator())
    try:
        yield
    finally:
        _kept.pop().close()


class _Simulator:
    """The process, from the first question on."""

    def __init__(self) -> None:
        self._process: subprocess.Popen | None = None
        self._stderr = tempfile.TemporaryFile()  # noqa: SIM115

    def ask(self, settings: Sequence[Setting], num_processes: int) -> Any:
        """Its answer: a list with a dict for each setting, or the kind and the message of an error."""
        if self._process is None:
            self._process = self._start()
        assert self._process.stdin is not None and self._process.stdout is not None
        written = os.fstat(self._stderr.fileno()).st_size
        with contextlib.suppress(BrokenPipeError):  # it has ended, and said why
            self._process.stdin.write(json.dumps([num_processes, [asdict(setting) for setting in settings]]) + "\n")
            self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line:
            said = os.pread(self._stderr.fileno(), 1 << 20, written).decode(errors="replace")
            raise SimulationError(f"the step could not be simulated: {last_error(said)}")
        return json.loads(line)

    def _start(self) -> subprocess.Popen:
        env = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
        env.pop("TORCH_CUDA_SANITIZER", None)  # which asks a GPU at every operation
        return subprocess.Popen(
            _COMMAND,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._stderr,
            text=True,
            env=env,
            start_new_session=True,  # with its forks it can be ended as one
        )

    def close(self) -> None:
        """End the process and its forks."""
        if self._process is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            with contextlib.suppress(BrokenPipeError):
                self._process.communicate()
        self._stderr.close()


def last_error(stderr: str) -> str:
    """The last line of a traceback that names an error, without the rank before it and what follows its first
    sentence (torch lists every backend there)."""
    lines = [line.partition("]: ")[2] or line for line in stderr.splitlines()]
    named = [line for line in lines if re.match(r"[\w.]+(Error|Exception|Interrupt)\b", line)]
    return (named or [line for line in lines if line.strip()] or ["no message"])[-1].split(". ")[0][:300]
