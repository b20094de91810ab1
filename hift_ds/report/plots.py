"""``loss.png``, ``groups.png`` and ``transfers.png``, drawn from a run folder's files alone, during the run or years
later."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from hift_ds.errors import DataError
from hift_ds.report.groups import GroupSummary, read_groups
from hift_ds.report.metrics import FILE_NAME, EvalRecord, Metrics, StepRecord, read_metrics
from hift_ds.report.transfers import has_transfers, transfers_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_INK, _FAINT, _GRID = "#1f2933", "#9aa5b1", "#e4e7eb"
_RAW, _SMOOTH, _EVAL, _SKIPPED, _BAR = "#a3bfe8", "#1f5fbf", "#d9480f", "#c92a2a", "#4c78a8"
_MAX_COLUMNS = 450  # of the raster: two pixels each on a common screen


def plot_run(run_dir: str | Path) -> list[Path]:
    """Draw the pictures of a run into its folder; returns their paths.

    Raises:
        DataError: the folder has no metrics.
    """
    run_dir = Path(run_dir)
    metrics = read_metrics(run_dir)
    if not metrics.steps:
        raise DataError(f"{str(run_dir / FILE_NAME)!r} holds no optimizer step; expected the folder of a run")
    paths = [run_dir / "loss.png"]
    _save(loss_figure(metrics), paths[0])
    if any("group" in record for record in metrics.steps):
        paths.append(run_dir / "groups.png")
        _save(groups_figure(metrics.steps, read_groups(run_dir)), paths[1])
    if has_transfers(metrics.steps):
        paths.append(run_dir / "transfers.png")
        _save(transfers_figure(metrics.steps), paths[-1])
    return paths


def loss_figure(metrics: Metrics) -> Figure:
    """Loss per step, raw and smoothed, with evaluations and cycles; below it the learning rate."""
    from matplotlib.figure import Figure

    records = [r for r in metrics.steps if r.get("loss") is not None]
    figure = Figure(figsize=(10, 5.6), layout="constrained")
    top, bottom = figure.subplots(2, 1, sharex=True, height_ratios=(4, 1))
    if records:
        _draw_loss(top, records, span=max(_cycle_length(metrics.steps), len(records) // 40))
    _draw_evaluations(top, metrics)
    skipped = [r["step"] for r in metrics.steps if r.get("skipped")]
    if skipped:
        marks = top.get_xaxis_transform()
        top.plot(skipped, [0.02] * len(skipped), "|", color=_SKIPPED, transform=marks, label="skipped (overflow)")
    _mark_cycles(top, metrics.steps)
    top.set_ylabel("loss")
    if top.get_legend_handles_labels()[0]:
        top.legend(frameon=False, loc="upper right", ncols=4)

    rates = [(r["step"], r["lr"]) for r in metrics.steps if r.get("lr") is not None]
    if rates:
        bottom.plot(*zip(*rates, strict=True), color=_INK, linewidth=1.2, drawstyle="steps-mid")
        bottom.set_ylim(0, max(rate for _, rate in rates) * 1.15 or 1)
        bottom.ticklabel_format(axis="y", style="sci", scilimits=(0, 0))
    bottom.set_ylabel("learning rate")
    bottom.set_xlabel("optimizer step")
    _whole_steps(bottom, [*metrics.evals, *metrics.steps])
    for axes in (top, bottom):
        _plain(axes)
    figure.align_ylabels([top, bottom])
    return figure


def groups_figure(steps: Sequence[StepRecord], groups: Sequence[GroupSummary] = ()) -> Figure:
    """Which group moved when, coloured by gradient norm; if measured, how far each one moved in the end."""
    from matplotlib.figure import Figure

    steps = [r for r in steps if "group" in r]
    rows = _rows(steps, groups)
    moved = [group.relative if group else None for _, group in rows]
    has_bars = any(value is not None for value in moved)
    height = min(max(2.2 + 0.17 * len(rows), 3.6), 11)
    figure = Figure(figsize=(12 if has_bars else 9.5, height), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True, width_ratios=(3, 1)) if has_bars else (figure.subplots(), None)

    _draw_raster(figure, left, steps, [index for index, _ in rows])
    _name_rows(left, rows, steps)
    if right is not None:
        _draw_bars(right, moved)
    return figure


def _draw_loss(axes: Axes, records: list[StepRecord], span: int) -> None:
    steps = np.array([r["step"] for r in records])
    loss = np.array([r["loss"] for r in records], dtype=float)
    few = len(steps) <= 60
    axes.plot(
        steps,
        loss,
        color=_RAW,
        linewidth=0.8 if len(steps) < 1500 else 0.4,
        marker="o" if few else None,
        markersize=3,
        label="loss",
    )
    smooth = smoothed(loss, span)
    if span > 1 and len(loss) > span:
        axes.plot(steps, smooth, color=_SMOOTH, linewidth=2, label=f"smoothed over {span} steps")
    # One spike must not flatten the whole curve.
    high = max(np.percentile(loss, 99.5), smooth.max())
    low = min(loss.min(), smooth.min())
    margin = 0.06 * (high - low) or 0.05
    axes.set_ylim(low - margin, high + 2.5 * margin)


def _draw_evaluations(axes: Axes, metrics: Metrics) -> None:
    points = [(r["step"], r["eval_loss"]) for r in metrics.evals if r.get("eval_loss") is not None]
    if not points:
        return
    style: dict[str, Any] = {"color": _EVAL, "marker": "D", "markersize": 5 if len(points) <= 60 else 3}
    axes.plot(*zip(*points, strict=True), linewidth=1.2, label="evaluation", zorder=3, clip_on=False, **style)
    values = [value for _, value in points]
    low, high = axes.get_ylim()
    if math.isfinite(max(values)):
        axes.set_ylim(min(low, min(values) - 0.03 * (high - low)), max(high, max(values) + 0.15 * (high - low)))


def smoothed(values: np.ndarray, span: int) -> np.ndarray:
    """Exponential mean over about ``span`` values, unbiased at the start. Shape and dtype (N,) float64."""
    decay = 1 - 2 / (span + 1)
    out = np.empty(len(values))
    total = weight = 0.0
    for i, value in enumerate(values):
        total, weight = decay * total + value, decay * weight + 1
        out[i] = total / weight
    return out


def _cycle_starts(steps: Sequence[StepRecord]) -> list[tuple[int, int]]:
    """(first step, cycle) of each cycle."""
    starts: dict[int, int] = {}
    for record in steps:
        if "cycle" in record:
            starts.setdefault(record["cycle"], record["step"])
    return [(step, cycle) for cycle, step in starts.items()]


def _cycle_length(steps: Sequence[StepRecord]) -> int:
    """Steps of a whole cycle, 1 if the records do not tell."""
    starts = sorted(step for step, _ in _cycle_starts(steps))
    if len(starts) < 2:
        return len(steps) if starts else 1
    return int(np.median(np.diff(starts)))


def _mark_cycles(axes: Axes, steps: Sequence[StepRecord]) -> None:
    """Faint lines where cycles begin while they can be told apart, and cycle numbers along the top."""
    starts = _cycle_starts(steps)
    if not starts:
        return
    if len(starts) <= 50:
        for step, _ in starts[1:]:
            axes.axvline(step - 0.5, color=_GRID, linewidth=1, zorder=0)
    stride = next(s * 10**e for e in range(9) for s in (1, 2, 5) if len(starts) <= 12 * s * 10**e)
    shown = [(step, cycle) for step, cycle in starts if cycle % stride == 0]
    above = axes.secondary_xaxis("top")
    above.set_xticks([step for step, _ in shown], [str(cycle) for _, cycle in shown])
    above.set_xlabel("cycle", color=_FAINT)
    above.tick_params(colors=_FAINT, length=3)
    above.spines["top"].set_visible(False)


def _rows(steps: Sequence[StepRecord], groups: Sequence[GroupSummary]) -> list[tuple[int, GroupSummary | None]]:
    """(group index, what is known of it), bottom of the model first."""
    known = {group.index: group for group in groups}
    indices = set(known) | {record["group"] for record in steps}
    return [(index, known.get(index)) for index in sorted(indices)]


def raster(steps: Sequence[StepRecord], rows: Sequence[int]) -> tuple[np.ndarray, int]:
    """Mean gradient norm of each group (row) in each bin of steps (column), NaN where it was not active.

    One column is one step while there are few; a whole cycle or several once there are many cycles, since
    columns of part of a cycle would make a pattern that is not there.

    Returns:
        The image, shape (rows, columns) float64, and the number of steps a column stands for.
    """
    first, last = steps[0]["step"], max(record["step"] for record in steps)
    num_steps = last - first + 1
    cycle = _cycle_length(steps)
    if num_steps <= _MAX_COLUMNS:
        width = 1
    elif num_steps >= 30 * cycle:
        width = cycle * math.ceil(num_steps / cycle / _MAX_COLUMNS)
    else:
        width = math.ceil(num_steps / _MAX_COLUMNS)
    total = np.zeros((len(rows), math.ceil(num_steps / width)))
    count = np.zeros_like(total)
    row_of = {index: row for row, index in enumerate(rows)}
    for record in steps:
        norm = record.get("grad_norm")
        cell = row_of[record["group"]], (record["step"] - first) // width
        count[cell] += 1
        total[cell] += norm if norm is not None else 0.0
    with np.errstate(invalid="ignore"):
        return np.where(count > 0, total / count, np.nan), width


def _draw_raster(figure: Figure, axes: Axes, steps: list[StepRecord], rows: list[int]) -> None:
    from matplotlib.colors import LogNorm

    image, width = raster(steps, rows)
    positive = image[np.isfinite(image) & (image > 0)]
    low, high = np.percentile(positive, (2, 98)) if positive.size else (1.0, 1.0)
    norm = LogNorm(max(low, 1e-12), max(high, low * 1.05, 1e-12))
    first = steps[0]["step"]
    shown = axes.imshow(
        np.where(image == 0, norm.vmin, image),
        norm=norm,
        cmap="viridis",
        aspect="auto",
        origin="lower",
        interpolation="nearest",
        extent=(first - 0.5, first - 0.5 + image.shape[1] * width, -0.5, len(rows) - 0.5),
    )
    axes.set_facecolor("#f5f7fa")
    axes.set_xlabel("optimizer step")
    axes.set_title("which group moved when" + (f" (a column is {width} steps)" if width > 1 else ""), fontsize=11)
    _whole_steps(axes, steps)
    bar = figure.colorbar(shown, ax=axes, pad=0.01, fraction=0.03, extend="both")
    ticks = np.geomspace(norm.vmin, norm.vmax, 5)
    bar.set_ticks(ticks, labels=[f"{tick:.2g}" for tick in ticks])
    bar.minorticks_off()
    bar.set_label("gradient norm")
    bar.outline.set_visible(False)
    for side in axes.spines.values():
        side.set_visible(False)
    if len(rows) <= 40:
        axes.set_yticks(np.arange(len(rows) + 1) - 0.5, minor=True)
        axes.grid(axis="y", which="minor", color="white", linewidth=1)
    axes.tick_params(which="minor", length=0)


def _name_rows(axes: Axes, rows: list[tuple[int, GroupSummary | None]], steps: list[StepRecord]) -> None:
    names = {record["group"]: record.get("group_name") or str(record["group"]) for record in steps}
    names |= {index: group.name for index, group in rows if group is not None}
    every = math.ceil(len(rows) / 45)
    shown = range(0, len(rows), every)
    labels = [names[rows[row][0]] + (" (always)" if rows[row][0] < 0 else "") for row in shown]
    axes.set_yticks(list(shown), [label if len(label) <= 28 else label[:27] + "…" for label in labels])
    axes.tick_params(axis="y", length=0, labelsize=9 if len(rows) <= 30 else 8)
    for row, (index, _) in enumerate(rows):
        if index < 0:
            axes.axhspan(row - 0.5, row + 0.5, color=_FAINT, alpha=0.5)


def _draw_bars(axes: Axes, moved: list[float | None]) -> None:
    percent = [100 * value if value is not None else 0.0 for value in moved]
    axes.barh(range(len(percent)), percent, height=0.72, color=_BAR)
    axes.set_xlim(0, max(percent) * 1.22 or 1)
    if len(percent) <= 45:
        for row, value in enumerate(percent):
            label = f" {value:.2g}" if value else (" 0" if moved[row] is not None else " ?")
            axes.text(value, row, label, va="center", fontsize=8, color=_INK if value else _SKIPPED)
    axes.set_xlabel("% of the group's weight norm")
    axes.set_title("how far it moved", fontsize=11)
    axes.tick_params(axis="y", which="both", length=0, labelleft=False)
    _plain(axes, grid="x")
    axes.spines["left"].set_visible(False)


def _plain(axes: Axes, grid: str = "y") -> None:
    axes.grid(axis=grid, color=_GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)


def _whole_steps(axes: Axes, records: Sequence[StepRecord | EvalRecord]) -> None:
    from matplotlib.ticker import MaxNLocator

    axes.xaxis.set_major_locator(MaxNLocator(nbins=10, integer=True))
    steps = [record["step"] for record in records]
    axes.set_xlim(min(steps) - 0.5, max(steps) + 0.5)


def _save(figure: Figure, path: Path) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    # Not pyplot: it would choose a backend for the whole process, and open a display where there is one.
    FigureCanvasAgg(figure)
    figure.savefig(path, dpi=150)
