"""Stopping a run that is no longer worth its power: it diverges, or it hangs. The error names the step, the
layer group and the last good checkpoint.

``DivergenceGuard`` is asked before each update, with the gradient norm that all ranks agree on and this
step's losses, so a bad step changes nothing, whatever happens then:

``stop``      raise :class:`TrainingError` (the default)
``skip``      leave the update out and retry the group with the next batch, as after an fp16 overflow
``rollback``  the same, and go back to the last checkpoint; the data goes on, so the batch is not met again

``HangWatchdog`` is a thread that ends the process when nothing has happened for a while; a rank waiting for
another one in a collective cannot help itself.
"""

from __future__ import annotations

import faulthandler
import math
import os
import statistics
import sys
import threading
import time
from collections import defaultdict, deque
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
import torch.distributed as dist
from transformers import TrainerCallback

from hift_ds.errors import TrainingError
from hift_ds.precision import LossScaler
from hift_ds.train.processes import PROGRESS_FILE, ProgressNotes

if TYPE_CHECKING:
    from transformers import TrainerControl, TrainerState, TrainingArguments

    from hift_ds.engine.engine import HiFTEngine

HANG_EXIT_CODE = 75  # EX_TEMPFAIL: trying again may well work
_NORMS_KEPT = 16  # per group; a layer's gradients are compared with its own earlier ones
_NORMS_NEEDED = 4
_LOSS_NOT_FINITE = "the loss is not finite"  # the question to all ranks

Policy = Literal["stop", "skip", "rollback"]


class DivergenceGuard:
    """Judges each optimizer step before its update.

    Args:
        engine: a ``HiFTEngine``.
        policy: what happens to a bad step.
        max_norm_ratio: a gradient norm that many times the median of the group's last ones is an explosion;
            0: any finite norm is fine.
        max_in_a_row: so many steps left out one after another end the run under every policy.
        max_rollbacks: so many rollbacks end the run: what comes back each time is not the batch's fault.
    """

    def __init__(
        self,
        engine: HiFTEngine,
        policy: Policy = "stop",
        max_norm_ratio: float = 1000.0,
        max_in_a_row: int = 100,
        max_rollbacks: int = 3,
    ) -> None:
        self.engine = engine
        self.policy = policy
        self.max_norm_ratio = max_norm_ratio
        self.max_in_a_row = max_in_a_row
        self.rollbacks_left = max_rollbacks
        self.lines: list[str] = []  # what was left out, and why
        self._norms: dict[int, deque[float]] = defaultdict(lambda: deque(maxlen=_NORMS_KEPT))
        self._in_a_row = 0
        self._go_back = False
        engine.optimizer.questions[_LOSS_NOT_FINITE] = self._loss_is_not_finite
        engine.optimizer.scaler = _GuardedScaler(engine.optimizer.scaler, self._refuses, self._saw_overflow)

    def after_step(self) -> None:
        """Roll back between two optimizer steps, if a rollback is due.

        Raises:
            TrainingError: there is nothing to go back to, or it was tried too often.
        """
        if not self._go_back:
            return
        self._go_back = False
        last: Path | None = self.engine.last_checkpoint
        if last is None:
            raise TrainingError(f"{self.lines[-1]}; no checkpoint to go back to")
        if self.rollbacks_left == 0:
            raise TrainingError(f"{self.lines[-1]}; this keeps coming back after rollbacks to {last}")
        self.rollbacks_left -= 1
        self.engine.load_checkpoint(last.parent, tag=last.name)
        self._norms.clear()

    def _refuses(self, norm: float) -> bool:
        """Whether this step's update is left out. Every rank decides alike."""
        group = self.engine.schedule.active
        reason = self._reason(norm, self._norms[group])
        if reason is None:
            self._norms[group].append(norm)
            self._in_a_row = 0
            return False
        line = f"step {self.engine.global_steps} (group {self.engine.groups[group].name}): {reason}"
        if self.policy == "stop":
            raise TrainingError(f"{line}; {_last_good(self.engine)}")
        self.lines.append(line)
        self._go_back = self.policy == "rollback"
        self._count_skip()
        return True

    def _loss_is_not_finite(self) -> bool | torch.Tensor:
        """Whether this rank's loss is no number: asked with the gradient norm, so that the host waits for the device
        once a step."""
        losses = self.engine.notes.loss
        return False if losses is None else torch.isfinite(losses).logical_not()

    def _reason(self, norm: float, earlier: deque[float]) -> str | None:
        if self.engine.optimizer.answers[_LOSS_NOT_FINITE]:
            return "the loss is not finite"
        if not math.isfinite(norm):
            return f"the gradient norm is {norm}"
        if self.max_norm_ratio and len(earlier) >= _NORMS_NEEDED:
            usual = statistics.median(earlier)
            if norm > self.max_norm_ratio * usual > 0:
                return f"the gradient norm is {norm:.3g}, {norm / usual:.0f} times this group's usual {usual:.3g}"
        return None

    def _saw_overflow(self) -> None:
        """The loss scale's own skip: nothing wrong, unless it never ends."""
        self.lines.append(
            f"step {self.engine.global_steps}: overflow at loss scale {self.engine.optimizer.scaler.scale:g}"
        )
        self._count_skip()

    def _count_skip(self) -> None:
        self._in_a_row += 1
        if self._in_a_row >= self.max_in_a_row:
            raise TrainingError(
                f"{self._in_a_row} steps in a row were left out; {self.lines[-1]}; {_last_good(self.engine)}"
            )


class _GuardedScaler:
    """The loss scaler, asked as ever whether to leave a step out, with one more reason to do so."""

    def __init__(self, scaler: LossScaler, refuses: Callable[[float], bool], saw_overflow: Callable[[], None]) -> None:
        self._scaler = scaler
        self._refuses = refuses
        self._saw_overflow = saw_overflow
        self._overflow = False  # the scale's own reason: only that one halves it

    def overflowed(self, grad_norm: float) -> bool:
        self._overflow = self._scaler.overflowed(grad_norm)
        if self._overflow:
            self._saw_overflow()
            return True
        return self._refuses(grad_norm)

    def update(self, overflow: bool) -> None:
        if self._overflow or not overflow:
            self._scaler.update(overflow)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._scaler, name)


class HangWatchdog:
    """Ends this process if :meth:`beat` is not called for ``timeout_s``; between ``__enter__`` and
    ``__exit__``.

    Set the timeout above the longest thing between two beats (an evaluation batch, a save).
    """

    def __init__(self, engine: HiFTEngine, timeout_s: float) -> None:
        self._engine = engine
        self.timeout_s = timeout_s
        self._last = time.monotonic()
        self._ended = threading.Event()
        self._main = threading.get_ident()
        self._thread = threading.Thread(target=self._watch, name="hang watchdog", daemon=True)

    def __enter__(self) -> HangWatchdog:
        self.beat()
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._ended.set()

    def beat(self) -> None:
        """Note that something has been done."""
        self._last = time.monotonic()

    def _watch(self) -> None:
        while not self._ended.wait(max(0.05, self._last + self.timeout_s - time.monotonic())):
            if time.monotonic() - self._last >= self.timeout_s:
                self._end()

    def _end(self) -> None:
        engine = self._engine
        where = _innermost_line(self._main)
        rank = dist.get_rank() if dist.is_initialized() else 0
        sys.stderr.write(
            f"rank {rank}: nothing has happened for {self.timeout_s:.0f} s in step {engine.global_steps} "
            f"(group {engine.groups[engine.schedule.active].name}), at {where}: it hangs, or waits for a "
            f"rank that does; {_last_good(engine)}\n"
        )
        faulthandler.dump_traceback(all_threads=True)
        sys.stderr.flush()
        os._exit(HANG_EXIT_CODE)


class WatchdogCallback(TrainerCallback):
    """Both watchdogs in a Trainer.

    Args:
        get_engine: called when training begins.
        policy, max_norm_ratio: of the :class:`DivergenceGuard`.
        hang_timeout_s: 0: no :class:`HangWatchdog`.
    """

    def __init__(
        self,
        get_engine: Callable[[], HiFTEngine],
        policy: Policy = "stop",
        max_norm_ratio: float = 1000.0,
        hang_timeout_s: float = 1800.0,
    ) -> None:
        self._get_engine = get_engine
        self._options = (policy, max_norm_ratio)
        self._hang_timeout_s = hang_timeout_s
        self.guard: DivergenceGuard | None = None
        self._hang: HangWatchdog | None = None

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        self._end()
        engine = self._get_engine()
        self.guard = DivergenceGuard(engine, *self._options)
        if self._hang_timeout_s:
            self._hang = HangWatchdog(engine, self._hang_timeout_s).__enter__()

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self._beat()
        self.guard.after_step()

    def _beat(self, *args: Any, **kwargs: Any) -> None:
        if self._hang is not None:
            self._hang.beat()

    on_step_begin = on_substep_end = on_prediction_step = on_evaluate = on_save = on_log = on_epoch_begin = _beat

    def on_train_end(self, *args: Any, **kwargs: Any) -> None:
        self._end()

    def _end(self) -> None:
        if self._hang is not None:
            self._hang.__exit__()
            self._hang = None


class NotesProgress(TrainerCallback):
    """Notes step and layer group before each step where a parent process wants to know, which is to say what a rank was
    doing when it was killed."""

    def __init__(self, get_engine: Callable[[], HiFTEngine]) -> None:
        path = os.environ.get(PROGRESS_FILE)
        self._notes = ProgressNotes(path) if path and os.path.exists(path) else None
        self._get_engine = get_engine

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self._notes is None:
            return
        engine = self._get_engine()
        schedule = getattr(engine, "schedule", None)
        group = "" if schedule is None else f" (group {engine.groups[schedule.active].name})"
        self._notes.write(args.process_index, f"in step {state.global_step}{group}")

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self._notes is not None:
            self._notes.write(args.process_index, f"after the last step, {state.global_step}")


def lost_rank_error(error: BaseException, engine: HiFTEngine) -> TrainingError | None:
    """The one line for an error that says that another rank is gone (its process died, its node went away, it
    hung until the collective's timeout); ``None`` for any other error."""
    text = str(error)
    lost = isinstance(error, dist.DistNetworkError | dist.DistStoreError) or any(word in text for word in _LOST_WORDS)
    if not isinstance(error, RuntimeError) or not lost:
        return None
    return TrainingError(
        f"another rank is gone or hangs, noticed in step {engine.global_steps} (group "
        f"{engine.groups[engine.schedule.active].name}): {text.splitlines()[0]}; {_last_good(engine)}"
    )


# gloo's and the store's; then NCCL's, of which an error of memory or of a call is none.
_LOST_WORDS = (
    "Connection closed by peer",
    "Connection reset by peer",
    "Timed out waiting",
    "Broken pipe",
    "ncclRemoteError",
    "NCCL communicator was aborted",
    "Watchdog caught collective operation timeout",
    "Some NCCL operations have failed or timed out",
)


def collective_timeout_s(hang_timeout_s: float) -> float:
    """The timeout of the process group: longer than the :class:`HangWatchdog` waits (0: no limit), which names step,
    group and checkpoint, where NCCL's own watchdog ends a process without a word of Python."""
    return 1.25 * hang_timeout_s + 600 if hang_timeout_s else 365 * 86400.0


def _last_good(engine: HiFTEngine) -> str:
    return (
        f"last good checkpoint: {engine.last_checkpoint}"
        if engine.last_checkpoint
        else "no checkpoint has been saved yet"
    )


def _innermost_line(thread: int) -> str:
    """file:line of our or the user's code in which the thread is; torch's own frames say less."""
    frame = sys._current_frames().get(thread)
    innermost = frame
    while frame is not None:
        name = frame.f_code.co_filename
        if f"{os.sep}torch{os.sep}" not in name and not name.endswith(("contextlib.py", "threading.py")):
            return f"{os.path.basename(name)}:{frame.f_lineno} ({frame.f_code.co_name})"
        frame = frame.f_back
    return "the end of the program" if innermost is None else f"{innermost.f_code.co_filename}:{innermost.f_lineno}"
