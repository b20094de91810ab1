"""What is told of each optimizer step: the engine's report, DeepSpeed's monitors, and a warning that comes at once."""

from __future__ import annotations

import logging
import math
import time
from collections import Counter
from dataclasses import dataclass

from torch import Tensor

from hift_ds.engine.deepspeed_seam import SeamEngine, peak_bytes
from hift_ds.schedule import Cursor
from hift_ds.step_report import CAUSES, StepReport

logger = logging.getLogger(__name__)


WORTH_A_LINE = 0.05  # of the time that a step computes


def _together(states: dict[str, float], others: dict[str, float]) -> dict[str, float]:
    """The seconds of both, by cause. A device that was synchronized stood still between two steps: that time is not
    counted twice."""
    waits = {**others, **states}
    if waits.get("synchronized") and "between_steps" in waits:
        waits["between_steps"] = max(waits["between_steps"] - waits["synchronized"], 0.0)
    return {cause: seconds for cause, seconds in waits.items() if seconds}


class SlowSteps:
    """Whether the steps of a cycle were slower than their forward, backward and update, and why."""

    def __init__(self) -> None:
        self._cycle: int | None = None
        self._waits: Counter[str] = Counter()
        self._seconds, self._steps = 0.0, 0
        self._said: set[str] = set()

    def add(self, report: StepReport, seconds: float) -> str | None:
        """One step that took ``seconds``. When a cycle has ended, but not the first, in which states are made: a line
        that says for what it waited, if that is worth one and was not said before."""
        line = None
        if report.cycle != self._cycle:
            line = self._line() if self._cycle else None
            self._cycle, self._waits = report.cycle, Counter()
            self._seconds, self._steps = 0.0, 0
        self._waits.update(report.waits)
        self._seconds, self._steps = self._seconds + seconds, self._steps + 1
        return line

    def _line(self) -> str | None:
        waited = self._waits.total()
        worst = max(self._waits, key=lambda cause: self._waits[cause], default="")
        if waited <= WORTH_A_LINE * max(self._seconds - waited, 0.0) or worst in self._said:
            return None
        self._said.add(worst)
        parts = ", ".join(
            f"{seconds / self._steps:.3g} s a step for {CAUSES[cause]}"
            for cause, seconds in self._waits.most_common()
            if seconds >= 0.1 * waited
        )
        return f"steps waited {waited / self._seconds:.1%} of their time in cycle {self._cycle}: {parts}"


@dataclass(frozen=True)
class StepBegan:
    """What an update changes and its report names: noted before it."""

    step: int
    cursor: Cursor
    group: int
    loss_scale: float


class StepNotes:
    """Tells what one engine's steps did.

    Attributes:
        loss: sum of the losses of this step's micro-batches so far, on this rank, 0-dim; ``None`` before the first.
    """

    def __init__(self, engine: SeamEngine) -> None:
        self._engine = engine
        self.loss: Tensor | None = None
        self._averages = True  # the losses of a step's micro-batches are averaged, not summed
        self._said_not_finite = False
        self._said_unreached: set[int] = set()  # groups
        self._slow = SlowSteps()
        self._ended_at: float | None = None

    def at_start(self) -> list[str]:
        """What states take and move, and which norm gradients are clipped by where that is a choice."""
        optimizer = self._engine.optimizer
        return [line for line in (optimizer.arithmetic().line(), optimizer.clipping_line) if line]

    def say_at_start(self) -> None:
        """Log :meth:`at_start`, whose link is measured, if anybody listens."""
        if self._engine.global_rank == 0 and logger.isEnabledFor(logging.INFO):
            for line in self.at_start():
                logger.info(line)

    def add_loss(self, loss: Tensor, averages: bool) -> Tensor:
        """Note the loss of a micro-batch, and return the sum so far.

        Args:
            loss: 0-dim, without a graph.
            averages: the losses of a step's micro-batches are averaged, not summed.
        """
        self.loss = loss if self.loss is None else self.loss + loss
        self._averages = averages
        return self.loss

    def before(self) -> StepBegan:
        """Note what the coming update changes. Called before it."""
        optimizer = self._engine.optimizer
        schedule = optimizer.schedule
        return StepBegan(self._engine.global_steps, schedule.cursor, schedule.active, optimizer.scaler.scale)

    def after(self, began: StepBegan, forecast_bytes: int | None, checkpoint_s: float) -> StepReport:
        """Report the update that ``began``, and count what was moved and sent since the last call. Called after it.

        Args:
            forecast_bytes: the peak that was expected of the step, if it is known.
            checkpoint_s: seconds that training has waited for checkpoints since the last step.
        """
        engine, optimizer = self._engine, self._engine.optimizer
        traffic, ranks = optimizer.store.traffic.take(), optimizer.parameters.ranks
        grad_numel_sent, ranks.grad_numel_sent = ranks.grad_numel_sent, 0
        grad_bytes_out, grad_bytes_in = optimizer.take_gradient_traffic()
        report = StepReport(
            step=began.step,
            cycle=began.cursor.cycle,
            position=began.cursor.position,
            group=began.group,
            group_name=engine.partition.groups[began.group].name,
            lr=optimizer.lr.latched[0],
            grad_norm=optimizer.grad_norm,
            loss_scale=began.loss_scale,
            skipped=optimizer.overflow,
            state_bytes_in=traffic.bytes_in,
            state_bytes_out=traffic.bytes_out,
            grad_numel_sent=grad_numel_sent,
            transfer_s=traffic.transfer_s,
            stalled_s=traffic.stalled_s,
            peak_bytes=peak_bytes(),
            grad_bytes_out=grad_bytes_out,
            grad_bytes_in=grad_bytes_in,
            tried=optimizer.trials.last_made,
            undone=optimizer.trials.last_undone,
            undone_s=optimizer.trials.last_undone_s,
            checkpoint_s=checkpoint_s,
            forecast_bytes=forecast_bytes,
            waits=_together(traffic.waits, optimizer.take_waits()),
        )
        self._warn_if_not_finite(report)
        self._warn_if_unreached(report)
        self._say_what_steps_wait_for(report)
        return report

    def _say_what_steps_wait_for(self, report: StepReport) -> None:
        """Once a cycle is over that waited for more than ``WORTH_A_LINE`` of its time; again for another cause."""
        now = time.perf_counter()
        started, self._ended_at = self._ended_at, now
        if started is None or self._engine.optimizer.waits.take_skipped():
            return
        line = self._slow.add(report, now - started - report.checkpoint_s)
        if line and self._engine.global_rank == 0:
            # Without an accelerator nothing runs beside the computation, and there is nothing to mend.
            logger.log(logging.INFO if self._engine.device.type == "cpu" else logging.WARNING, line)

    def write_loss(self) -> None:
        """End the step's loss, and write the first rank's to DeepSpeed's monitors (``"csv_monitor"`` and the others),
        which get the rate from DeepSpeed alone."""
        engine, loss, self.loss = self._engine, self.loss, None
        if loss is not None and engine.monitor.enabled and engine.global_rank == 0:
            parts = engine.gradient_accumulation_steps() if self._averages else 1
            engine.monitor.write_events([("Train/Samples/train_loss", loss.item() / parts, engine.global_samples)])

    def _warn_if_not_finite(self, report: StepReport) -> None:
        """Warn of a gradient norm that is no number at once: a Trainer's logs leave such losses out, and the group's
        weights are lost from here on."""
        finite = report.skipped or math.isfinite(report.grad_norm)
        if self._said_not_finite or finite or self._engine.global_rank:
            return
        self._said_not_finite = True
        logger.warning(
            "step %d (group %s): the gradient norm is %s and no loss scale skips the step: its weights are not numbers "
            "any more; lower the learning rate, clip gradients, or look at this step's rows",
            report.step + 1, report.group_name, report.grad_norm,
        )  # fmt: skip

    def _warn_if_unreached(self, report: StepReport) -> None:
        """Warn of a group to which backward has brought no gradient in its first turn, on no rank: a run's end would
        come too late to say that nothing of it was trained."""
        unreached = not report.skipped and not any(self._engine.optimizer.num_updates[report.group])
        if not unreached or report.group in self._said_unreached or self._engine.global_rank:
            return
        self._said_unreached.add(report.group)
        logger.warning(
            "step %d: no gradient has reached group %s: its layers take no part in the loss, or reentrant activation "
            "checkpointing cuts them off, which gives a layer none whose input needs none; set use_reentrant=False",
            report.step + 1, report.group_name,
        )  # fmt: skip
