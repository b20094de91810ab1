"""``transfers.png``: what moving optimizer states (and gradients, with updates in backward) took, and how much of it
the steps waited for."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from hift_ds.report.metrics import StepRecord

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_HIDDEN, _STALLED, _STEP, _IN, _OUT = "#a3bfe8", "#d9480f", "#1f2933", "#1f5fbf", "#6b8e23"
_UNDONE = "#8f2d56"
# By the record's key: name, colour and dashes of a line.
_LINES = {
    "state_bytes_in": ("states in", _IN, "-"),
    "state_bytes_out": ("states out", _OUT, (0, (4, 3))),
    "grad_bytes_out": ("gradients to the host", "#e08e0b", "-"),
    "grad_bytes_in": ("gradients back", "#7a5195", (0, (4, 3))),
}
_MAX_BARS = 200


WORTH_A_PICTURE = 0.01  # of the steps' time that they waited; below it one number says all


def are_worth_a_picture(steps: Sequence[StepRecord]) -> bool:
    """Something moved, and steps waited for it; or updates were made twice."""
    if any(record.get("undone") for record in steps):
        return True
    moved = any(record.get(key) for key in _LINES for record in steps)
    stalled, total = (float(np.nansum(column(steps, key))) for key in ("stalled_s", "step_time_s"))
    return moved and total > 0 and stalled / total > WORTH_A_PICTURE


def transfers_figure(steps: Sequence[StepRecord]) -> Figure:
    """Seconds of transfer per step, hidden and waited for, under the step's own time, and what second updates took
    (``clipping: speculative``); below, the bytes that moved: states, and gradients if any went to host memory.

    Long runs are drawn as means over equal stretches of steps.
    """
    from matplotlib.figure import Figure

    keys = ("transfer_s", "stalled_s", "step_time_s", "undone_s", *_LINES)
    at, width = stretch_means(column(steps, "step"))
    means = {key: stretch_means(column(steps, key))[0] for key in keys}
    figure = Figure(figsize=(10, 5.6), layout="constrained")
    top, bottom = figure.subplots(2, 1, sharex=True, height_ratios=(3, 2))
    _draw_seconds(top, at, means, width)
    _draw_bytes(bottom, at, means)
    top.set_title(summary(steps), loc="left", fontsize=10)
    bottom.set_xlabel("optimizer step" if width == 1 else f"optimizer step (means of {width})")
    return figure


def summary(steps: Sequence[StepRecord]) -> str:
    """One sentence, over all steps."""
    total = {key: float(np.nansum(column(steps, key))) for key in ("transfer_s", "stalled_s", "step_time_s")}
    if not total["transfer_s"]:
        return "no state transfers"
    hidden = max(total["transfer_s"] - total["stalled_s"], 0.0) / total["transfer_s"]
    text = f"{total['transfer_s']:,.1f} s of state transfers, {hidden:.0%} of them hidden"
    if total["step_time_s"]:
        text += f"; steps waited {total['stalled_s'] / total['step_time_s']:.1%} of their time"
    tried, undone = (sum(bool(record.get(key)) for record in steps) for key in ("tried", "undone"))
    if tried:
        text += f"; {undone} of {tried} updates on trial made again ({np.nansum(column(steps, 'undone_s')):.3g} s)"
    return text


def column(steps: Sequence[StepRecord], key: str) -> np.ndarray:
    """One value a step; NaN where a record lacks it."""
    return np.array([np.nan if (value := record.get(key)) is None else value for record in steps], dtype=float)


def stretch_means(values: np.ndarray) -> tuple[np.ndarray, int]:
    """Means over stretches of equal length, so that at most ``_MAX_BARS`` are left; and that length."""
    width = -(-len(values) // _MAX_BARS)
    starts = range(0, len(values), width)
    parts = [values[start : start + width] for start in starts]
    return np.array([np.nanmean(part) if np.isfinite(part).any() else np.nan for part in parts]), width


def _draw_seconds(axes: Axes, at: np.ndarray, means: dict[str, np.ndarray], width: int) -> None:
    stalled = np.nan_to_num(means["stalled_s"])
    hidden = np.maximum(np.nan_to_num(means["transfer_s"]) - stalled, 0)
    axes.bar(at, hidden, width * 0.9, bottom=stalled, color=_HIDDEN, label="transfer, hidden behind computing")
    axes.bar(at, stalled, width * 0.9, color=_STALLED, label="waited for")
    if np.isfinite(means["step_time_s"]).any():
        axes.plot(at, means["step_time_s"], color=_STEP, linewidth=1, label="the whole step")
    undone = np.nan_to_num(means["undone_s"])
    if undone.any():
        axes.bar(at, undone, width * 0.5, bottom=stalled + hidden, color=_UNDONE, label="updates made again, clipped")
    axes.set_ylabel("seconds a step")
    _finish(axes)


def _draw_bytes(axes: Axes, at: np.ndarray, means: dict[str, np.ndarray]) -> None:
    for key, (label, colour, dashes) in _LINES.items():
        if key.startswith("state") or np.nan_to_num(means[key]).any():
            axes.plot(at, means[key] / 2**20, color=colour, linewidth=1.2, linestyle=dashes, label=label)
    axes.set_ylabel("MiB a step")
    _finish(axes)


def _finish(axes: Axes) -> None:
    axes.set_ylim(0, 1.2 * axes.get_ylim()[1])  # room for the legend
    axes.legend(frameon=False, loc="upper right", ncols=4)
    axes.spines[["top", "right"]].set_visible(False)
