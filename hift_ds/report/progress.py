"""Progress of a run: one live line where there is a terminal, plain lines where there is a log file."""

from __future__ import annotations

import atexit
import time
from collections import deque
from typing import Protocol

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, TaskID, TextColumn
from rich.progress import Progress as RichProgress
from rich.text import Text

from hift_ds.report.metrics import StepRecord, share_waited, waited_for


def print_line(text: str) -> None:
    """Print a line: on a terminal wrapped at words, whatever its width; in a log it stays one line."""
    console = Console(highlight=False)
    console.print(Text(text), soft_wrap=not console.is_terminal)


class Progress(Protocol):
    """What a run shows; see :func:`make_progress`."""

    def start(self, total_steps: int, done_steps: int = 0, window: int = 20) -> None:
        """Begin to show a run. ``window``: steps over which speed and loss are averaged; a cycle, since groups differ
        in time."""

    def update(self, record: StepRecord) -> None:
        """Show that one optimizer step was made."""

    def note(self, text: str, style: str = "") -> None:
        """Print a line that stays."""

    def close(self) -> None:
        """Leave the terminal as it was; may be called twice."""


def make_progress(console: Console | None = None, interval_s: float = 10.0) -> Progress:
    """A live line on a terminal; else plain lines, first and last step and every ``interval_s`` seconds."""
    console = console or Console()
    if console.is_terminal and not console.is_dumb_terminal:
        return LiveProgress(console)
    return PlainProgress(console, interval_s)


class Pace:
    """Averages of the last steps, a multiple of ``window``, and the time left that follows from them."""

    def __init__(self, total_steps: int, done_steps: int, window: int) -> None:
        self.total_steps = total_steps
        self.step = done_steps
        kept = window * max(1, round(10 / window))  # whole cycles, however short
        self._times: deque[float] = deque(maxlen=kept)
        self._rates: deque[float] = deque(maxlen=kept)
        self._losses: deque[float] = deque(maxlen=kept)
        self._waits: deque[StepRecord] = deque(maxlen=kept)

    def add(self, record: StepRecord) -> None:
        """Take in one step's record."""
        self.step = record["step"]
        for values, key in (
            (self._times, "step_time_s"),
            (self._rates, "tokens_per_s"),
            (self._losses, "loss"),
        ):
            if record.get(key) is not None:
                values.append(record[key])  # type: ignore[literal-required]  # one of the record's keys
        self._waits.append(record)

    @property
    def loss(self) -> float | None:
        """The mean loss of the window; ``None`` before the first."""
        return sum(self._losses) / len(self._losses) if self._losses else None

    @property
    def step_time_s(self) -> float | None:
        """The mean seconds of a step of the window; ``None`` before the first."""
        return sum(self._times) / len(self._times) if self._times else None

    @property
    def tokens_per_s(self) -> float | None:
        """Tokens a second over the window as a whole; ``None`` where they are not counted."""
        # Of the window as a whole: the mean of the rates would count fast steps for more than their time.
        if not self._rates or len(self._rates) != len(self._times):
            return None
        seconds = sum(self._times)
        return sum(r * t for r, t in zip(self._rates, self._times, strict=True)) / seconds if seconds else None

    @property
    def left_s(self) -> float | None:
        """The seconds that the other steps will take at this pace; ``None`` before the first."""
        return None if self.step_time_s is None else self.step_time_s * max(self.total_steps - self.step, 0)

    def parts(self, record: StepRecord) -> list[str]:
        """What is worth a reader's eye, most important first."""
        out = []
        if "cycle" in record:
            out.append(f"cycle {record['cycle']}")
        if "group_name" in record:
            out.append(record["group_name"])
        if self.loss is not None:
            out.append(f"loss {self.loss:.3f}")
        if self.tokens_per_s is not None:
            out.append(f"{self.tokens_per_s:,.0f} tok/s")
        waited, shares = share_waited(self._waits)
        if waited and waited >= 0.01:
            mostly = "" if len(shares) == 1 else "mostly "
            out.append(f"{waited:.0%} waiting, {mostly}for {waited_for(next(iter(shares)))}")
        if self.left_s is not None:
            out.append(f"{clock(self.left_s)} left")
        return out


class LiveProgress:
    """One line that is redrawn: bar, step, cycle, active group, loss, tokens/s, time left."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._bar: RichProgress | None = None
        self._task: TaskID | None = None
        self._group_width = 0

    def start(self, total_steps: int, done_steps: int = 0, window: int = 20) -> None:
        self._pace = Pace(total_steps, done_steps, window)
        self._bar = RichProgress(
            BarColumn(bar_width=24, complete_style="cyan", finished_style="green"),
            TextColumn("[bold]{task.completed:.0f}[/]/{task.total:.0f}"),
            TextColumn("{task.description}"),
            console=self._console,
        )
        self._task = self._bar.add_task("starting", total=total_steps, completed=done_steps)
        self._bar.start()
        # A run that dies must not leave the terminal without a cursor.
        atexit.register(self.close)

    def update(self, record: StepRecord) -> None:
        if self._bar is None or self._task is None:
            return
        self._pace.add(record)
        parts = [escape(part) for part in self._pace.parts(record)]
        if "group_name" in record:
            name = escape(record["group_name"])
            self._group_width = max(self._group_width, len(name))
            parts[parts.index(name)] = f"[cyan]{name:<{self._group_width}}[/]"
        if record.get("skipped"):
            parts.append("[yellow]overflow, skipped[/]")
        self._bar.update(self._task, completed=record["step"], description="  ".join(parts))

    def note(self, text: str, style: str = "") -> None:
        # A Text, not style=: that would colour the redrawn bar as well.
        self._console.print(Text(text, style=style))

    def close(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None
            atexit.unregister(self.close)


class PlainProgress:
    """A line at the first and the last step, and otherwise at most one every ``interval_s`` seconds."""

    def __init__(self, console: Console, interval_s: float) -> None:
        self._console = console
        self._interval_s = interval_s
        self._last = float("-inf")

    def start(self, total_steps: int, done_steps: int = 0, window: int = 20) -> None:
        self._pace = Pace(total_steps, done_steps, window)
        self._last = float("-inf")

    def update(self, record: StepRecord) -> None:
        self._pace.add(record)
        now = time.monotonic()
        if now - self._last < self._interval_s and record["step"] < self._pace.total_steps:
            return
        self._last = now
        width = len(str(self._pace.total_steps))
        parts = [f"step {record['step']:>{width}}/{self._pace.total_steps}", *self._pace.parts(record)]
        if record.get("lr") is not None:
            parts.append(f"lr {record['lr']:.2e}")
        if record.get("grad_norm") is not None:
            parts.append(f"grad norm {record['grad_norm']:.3g}")
        if record.get("skipped"):
            parts.append("overflow, skipped")
        self.note("  ".join(parts))

    def note(self, text: str, style: str = "") -> None:
        # soft_wrap: a log line is one line however wide the terminal would have been.
        self._console.print(Text(text, style=style), soft_wrap=True)

    def close(self) -> None:
        pass


class SilentProgress:
    """A progress that shows nothing: for ranks other than 0, and for who wants none."""

    def start(self, total_steps: int, done_steps: int = 0, window: int = 20) -> None: ...

    def update(self, record: StepRecord) -> None: ...

    def note(self, text: str, style: str = "") -> None: ...

    def close(self) -> None: ...


def clock(seconds: float) -> str:
    """A time as one reads it: "0:07", "12:34", "3:02:10", "2d 04:10"."""
    minutes, secs = divmod(int(seconds + 0.5), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    if days:
        return f"{days}d {hours:02d}:{minutes:02d}"
    return f"{hours}:{minutes:02d}:{secs:02d}" if hours else f"{minutes}:{secs:02d}"
