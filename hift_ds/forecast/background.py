"""The forecast of every group's peak, made beside a run while its first steps are taken.

python -m hift_ds.forecast.background < setting.json > peaks.json
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from dataclasses import asdict
from typing import IO

from hift_ds.forecast.setting import Setting

NICENESS = 10


class BackgroundForecast:
    """Asks for a forecast in another process, politely, and never waits for it.

    Args:
        setting: the run; its model must be readable from another process until :meth:`close`.
    """

    def __init__(self, setting: Setting) -> None:
        self._answer: IO[str] = tempfile.TemporaryFile("w+")  # noqa: SIM115  (closed by close())
        self._peaks: dict[int, int] | None = None
        self._process: subprocess.Popen | None = subprocess.Popen(
            [sys.executable, "-m", "hift_ds.forecast.background"],
            stdin=subprocess.PIPE,
            stdout=self._answer,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        assert self._process.stdin is not None
        with self._process.stdin as question:
            question.write(json.dumps(asdict(setting)))

    def peak_bytes(self, group: int) -> int | None:
        """The expected peak of the step of layer group ``group`` on this rank, in bytes; ``None`` while it is not
        known, or if it cannot be."""
        if self._process is not None and self._process.poll() is not None:
            self._answer.seek(0)
            lines = self._answer.read().splitlines()
            if self._process.returncode == 0 and lines:
                self._peaks = {int(index): peak for index, peak in json.loads(lines[-1]).items()}
            self._process = None
        return None if self._peaks is None else self._peaks.get(group)

    def close(self) -> None:
        """End the process if it still runs; ``peak_bytes`` is not to be called again."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None
        self._answer.close()


def _main() -> None:
    from hift_ds.forecast.steps import Request, read_structure, run_requests

    os.nice(NICENESS)
    setting = Setting(**json.load(sys.stdin))
    answers, sys.stdout = sys.stdout, sys.stderr
    structure = read_structure(setting)
    steps = run_requests([Request(setting, structure)], num_processes=1)[0]
    peaks = {index: steps.step(index).peak_bytes for index in range(structure.num_groups)}
    print(json.dumps(peaks), file=answers, flush=True)


if __name__ == "__main__":
    _main()
