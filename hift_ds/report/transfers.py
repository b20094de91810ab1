"""``transfers.png``: what steps waited for, and what moving optimizer states (and gradients, with updates in backward)
took beside their computing."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from hift_ds.report.metrics import StepRecord, share_waited, waited_for, waits_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_HIDDEN, _STEP, _IN, _OUT = "#dbe4f0", "#1f2933", "#1f5fbf", "#6b8e23"
_UNDONE = "#8f2d56"
# By the record's key: name, colour and dashes of a line.
_LINES = {
    "state_bytes_in": ("optimizer states in", _IN, "-"),
    "state_bytes_out": ("optimizer states out", _OUT, (0, (4, 3))),
    "grad_bytes_out": ("gradients to the host", "#e08e0b", "-"),
    "grad_bytes_in": ("gradients back", "#7a5195", (0, (4, 3))),
}
_WAITS = ("#d9480f", "#f2a93b", "#8d5a97", "#3b8ea5", "#7a8794")  # the last one: all causes that have no own
_MAX_BARS = 200


WORTH_A_PICTURE = 0.01  # of the steps' time that they waited; below it one number says all


def are_worth_a_picture(steps: Sequence[StepRecord]) -> bool:
    """True if steps stood still for something, or updates were made twice."""
    if any(record.get("undone") for record in steps):
        return True
    waited, _ = share_waited(steps)
    return waited is not None and waited > WORTH_A_PICTURE


def transfers_figure(steps: Sequence[StepRecord]) -> Figure:
    """Seconds per step that it waited, by cause, transfers that were hidden, and what second updates took
    (``clipping: speculative``), under the step's own time; below, the bytes that moved: states, and gradients if any
    went to host memory.

    Long runs are drawn as means over equal stretches of steps.
    """
    from matplotlib.figure import Figure

    at, width = stretch_means(column(steps, "step"))
    keys = ("step_time_s", "undone_s", *_LINES)
    means = {key: stretch_means(column(steps, key))[0] for key in keys}
    means["hidden"] = stretch_means(hidden_seconds(steps))[0]
    moves = any(np.nansum(means[key]) for key in _LINES)
    figure = Figure(figsize=(11, 5.6 if moves else 3.8), layout="constrained")
    rows = figure.subplots(2 if moves else 1, 1, sharex=True, height_ratios=(3, 2) if moves else (1,), squeeze=False)
    top, bottom = rows[0, 0], rows[-1, 0]
    _draw_seconds(top, at, waits_to_draw(steps), means, width)
    if moves:
        _draw_bytes(bottom, at, means)
    top.set_title(summary(steps), loc="left", fontsize=10, wrap=True)
    bottom.set_xlabel("optimizer step" if width == 1 else f"optimizer step (means of {width})")
    return figure


def summary(steps: Sequence[StepRecord]) -> str:
    """What steps moved and waited for in one sentence, over all steps."""
    moved = float(np.nansum(column(steps, "transfer_s")))
    parts = []
    if moved:
        parts.append(
            f"{moved:,.1f} s of copying optimizer states, {np.nansum(hidden_seconds(steps)) / moved:.0%} of it while "
            "the model computed"
        )
    waited, shares = share_waited(steps)
    if waited is not None:
        worst = [f"{share:.1%} for {waited_for(cause)}" for cause, share in list(shares.items())[:2] if share >= 0.001]
        more = f": {', '.join(worst)}" if worst else ""
        parts.append(f"steps waited {waited:.1%} of their time{more}")
    tried, undone = (sum(bool(record.get(key)) for record in steps) for key in ("tried", "undone"))
    if tried:
        again = np.nansum(column(steps, "undone_s"))
        parts.append(f"{undone} of {tried} updates on trial made again ({again:.3g} s)")
    return "; ".join(parts) or "no optimizer states were copied"


def hidden_seconds(steps: Sequence[StepRecord]) -> np.ndarray:
    """The seconds of each step's transfers that nobody waited for."""
    return np.maximum(column(steps, "transfer_s") - np.nan_to_num(column(steps, "stalled_s")), 0)


def waits_to_draw(steps: Sequence[StepRecord]) -> dict[str, np.ndarray]:
    """The mean seconds of each stretch, by cause in words, the largest first. Causes that are too many for colours, and
    those of less than a hundredth of all, are one."""
    totals = share_waited(steps)[1] or dict.fromkeys((c for record in steps for c in waits_of(record)), 1.0)
    named = [cause for cause, share in totals.items() if share >= 0.01 * sum(totals.values())][: len(_WAITS) - 1]
    columns = {waited_for(cause): np.array([waits_of(r).get(cause, 0.0) for r in steps]) for cause in named}
    if set(totals) - set(named):
        rest = [sum(s for cause, s in waits_of(r).items() if cause not in named) for r in steps]
        columns["other things"] = np.array(rest, dtype=float)
    return {name: stretch_means(values)[0] for name, values in columns.items()}


def column(steps: Sequence[StepRecord], key: str) -> np.ndarray:
    """One value of each step; NaN where a record lacks it."""
    return np.array([np.nan if (value := record.get(key)) is None else value for record in steps], dtype=float)


def stretch_means(values: np.ndarray) -> tuple[np.ndarray, int]:
    """Means over stretches of equal length, so that at most ``_MAX_BARS`` are left; and that length."""
    width = -(-len(values) // _MAX_BARS)
    starts = range(0, len(values), width)
    parts = [values[start : start + width] for start in starts]
    return np.array([np.nanmean(part) if np.isfinite(part).any() else np.nan for part in parts]), width


def _draw_seconds(
    axes: Axes, at: np.ndarray, waits: dict[str, np.ndarray], means: dict[str, np.ndarray], width: int
) -> None:
    floor = np.zeros(len(at))
    for (name, seconds), colour in zip(waits.items(), _WAITS, strict=False):
        colour = _WAITS[-1] if name == "other things" else colour
        axes.bar(at, seconds, width * 0.9, bottom=floor, color=colour, label=f"waited for {name}")
        floor = floor + seconds
    hidden, undone = np.nan_to_num(means["hidden"]), np.nan_to_num(means["undone_s"])
    if hidden.any():
        axes.bar(at, hidden, width * 0.9, bottom=floor, color=_HIDDEN, label="copying while the model computed")
    if undone.any():
        axes.bar(at, undone, width * 0.5, bottom=floor + hidden, color=_UNDONE, label="updates made again, clipped")
    if np.isfinite(means["step_time_s"]).any():
        axes.plot(at, means["step_time_s"], color=_STEP, linewidth=1, label="the whole step")
    axes.set_ylabel("seconds a step")
    _finish(axes)


def _draw_bytes(axes: Axes, at: np.ndarray, means: dict[str, np.ndarray]) -> None:
    for key, (label, colour, dashes) in _LINES.items():
        if key.startswith("state") or np.nan_to_num(means[key]).any():
            axes.plot(at, means[key] / 2**20, color=colour, linewidth=1.2, linestyle=dashes, label=label)
    axes.set_ylabel("MiB a step")
    _finish(axes)


def _finish(axes: Axes) -> None:
    axes.set_ylim(bottom=0)
    if axes.get_legend_handles_labels()[1]:  # beside the bars, which would be small with so many lines above them
        axes.legend(frameon=False, loc="upper left", bbox_to_anchor=(1, 1), fontsize=9)
    axes.spines[["top", "right"]].set_visible(False)
