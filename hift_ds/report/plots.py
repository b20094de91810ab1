"""``loss.png``, ``groups.png``, ``memory.png`` and ``transfers.png``, drawn from a run folder's files alone, during the
run or years later."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from hift_ds.report.groups import GroupSummary
from hift_ds.report.metrics import EvalRecord, Metrics, StepRecord
from hift_ds.report.run_summary import GroupMemory, RunSummary, read_run
from hift_ds.report.transfers import are_worth_a_picture, transfers_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_INK, _FAINT, _GRID = "#1f2933", "#9aa5b1", "#e4e7eb"
_RAW, _SMOOTH, _EVAL, _SKIPPED, _BAR = "#a3bfe8", "#1f5fbf", "#d9480f", "#c92a2a", "#4c78a8"
_MAX_CYCLE_LINES = 15
_MAX_COLUMNS = 450  # of the raster: two pixels each on a common screen


def plot_run(run_dir: str | Path) -> list[Path]:
    """Draw the pictures of a run into its folder; returns their paths.

    Raises:
        DataError: the folder has no metrics.
    """
    paths = []
    for name, figure in figures(read_run(run_dir)).items():
        paths.append(Path(run_dir) / f"{name}.png")
        _save(figure, paths[-1])
    return paths


def figures(run: RunSummary) -> dict[str, Figure]:
    """The pictures of a run that have something to show, by name, most important first."""
    steps = run.metrics.steps
    out = {"loss": loss_figure(run.metrics, run.name, best_step=run.results.get("best_step"))}
    if any("group" in record for record in steps):
        out["groups"] = groups_figure(steps, run.groups, run.name)
    if any(group.peak is not None for group in run.memory):
        out["memory"] = memory_figure(run.memory, run.name)
    if are_worth_a_picture(steps):
        out["transfers"] = transfers_figure(steps)
    return out


def png(figure: Figure) -> bytes:
    """A figure as the contents of a PNG file."""
    import io

    from matplotlib.backends.backend_agg import FigureCanvasAgg

    out = io.BytesIO()
    # Not pyplot: it would choose a backend for the whole process, and open a display where there is one.
    FigureCanvasAgg(figure)
    figure.savefig(out, dpi=150, format="png")
    return out.getvalue()


def loss_figure(metrics: Metrics, title: str = "", best_step: int | None = None) -> Figure:
    """Loss per step, raw and smoothed, with evaluations and cycles; below it the learning rate.

    Args:
        title: of the picture.
        best_step: of whose weights are kept, if they are not the last.
    """
    from matplotlib.figure import Figure

    records = [r for r in metrics.steps if r.get("loss") is not None]
    figure = Figure(figsize=(10, 5.8), layout="constrained")
    if title:
        figure.suptitle(title, x=0.01, ha="left", fontsize=12, color=_INK)
    top, bottom = figure.subplots(2, 1, sharex=True, height_ratios=(3.4, 1))
    if records:
        _draw_loss(top, records, span=max(_cycle_length(metrics.steps), len(records) // 40))
    _draw_evaluations(top, metrics, best_step)
    skipped = [r["step"] for r in metrics.steps if r.get("skipped")]
    if skipped:
        marks = top.get_xaxis_transform()
        top.plot(skipped, [0.02] * len(skipped), "|", color=_SKIPPED, transform=marks, label="skipped (overflow)")
    _mark_cycles(top, metrics.steps)
    top.set_ylabel("loss")
    if top.get_legend_handles_labels()[0]:
        top.legend(frameon=False, loc="upper right", ncols=4)
    _draw_rates(bottom, metrics.steps)
    bottom.set_xlabel("optimizer step")
    _whole_steps(bottom, [*metrics.evals, *metrics.steps])
    for axes in (top, bottom):
        _plain(axes)
    figure.align_ylabels([top, bottom])
    return figure


def memory_figure(groups: Sequence[GroupMemory], title: str = "") -> Figure:
    """Peak memory of the steps of each group, beside its forecast where there is one; bottom of the model first.
    Without an accelerator the bars are all but equal, and the picture says why."""
    from matplotlib.figure import Figure

    height = min(max(1.8 + 0.2 * len(groups), 3.0), 11)
    figure = Figure(figsize=(9.5, height), layout="constrained")
    axes = figure.subplots()
    of_process = any(group.of_process for group in groups)
    what = "memory of the process, no accelerator" if of_process else "peak memory while a group trains"
    axes.set_title(f"{title}: {what}" if title else what, loc="left", fontsize=11)
    axes.barh(range(len(groups)), [group.peak or 0.0 for group in groups], height=0.72, color=_BAR, label="measured")
    forecasts = [(row, group.forecast) for row, group in enumerate(groups) if group.forecast is not None]
    for number, (row, value) in enumerate(forecasts):
        label = "forecast: at most" if number == 0 else None
        axes.plot([value, value], [row - 0.42, row + 0.42], color=_EVAL, linewidth=2, label=label)
    every = math.ceil(len(groups) / 45)
    axes.set_yticks(range(0, len(groups), every), [_short(group.name) for group in groups[::every]])
    axes.tick_params(axis="y", length=0, labelsize=9 if len(groups) <= 30 else 8)
    where = "GiB, on the first rank"
    if of_process:  # all weights and states lie in it, whichever group trains
        where += "; all of the process as a step ends, alike for every group (a CPU counts no peaks)"
    axes.set_xlabel(where)
    axes.set_xlim(0, 1.02 * max([group.peak or 0.0 for group in groups] + [value for _, value in forecasts]) or 1)
    if forecasts:
        axes.legend(frameon=False, loc="lower left", bbox_to_anchor=(0.55, 1.0), ncols=2, borderaxespad=0.2)
    _plain(axes, grid="x")
    return figure


def groups_figure(steps: Sequence[StepRecord], groups: Sequence[GroupSummary] = (), title: str = "") -> Figure:
    """Which group moved when, coloured by gradient norm; if measured, how far each one moved in the end."""
    from matplotlib.figure import Figure

    steps = [r for r in steps if "group" in r]
    rows = _rows(steps, groups)
    moved = [group.relative if group else None for _, group in rows]
    has_bars = any(value is not None for value in moved)
    height = min(max(2.8 + 0.17 * len(rows), 4.2), 11)
    figure = Figure(figsize=(12 if has_bars else 9.5, height), layout="constrained")
    if title:
        figure.suptitle(title, x=0.01, ha="left", fontsize=12, color=_INK)
    left, right = figure.subplots(1, 2, sharey=True, width_ratios=(3, 1)) if has_bars else (figure.subplots(), None)

    _draw_raster(figure, left, steps, [index for index, _ in rows])
    _name_rows(left, rows, steps)
    if right is not None:
        turns = {record["group"] for record in steps}
        _draw_bars(right, moved, [index in turns for index, _ in rows])
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


def _draw_evaluations(axes: Axes, metrics: Metrics, best_step: int | None) -> None:
    points = [(r["step"], r["eval_loss"]) for r in metrics.evals if r.get("eval_loss") is not None]
    if not points:
        return
    style: dict[str, Any] = {"color": _EVAL, "marker": "D", "markersize": 5 if len(points) <= 60 else 3}
    axes.plot(*zip(*points, strict=True), linewidth=1.2, label="evaluation", zorder=3, clip_on=False, **style)
    if best_step is not None and (best := dict(points).get(best_step)) is not None:
        label = f"best: {best:.4g} at step {best_step}, kept"
        axes.plot([best_step], [best], "o", markersize=11, markerfacecolor="none", color=_INK, label=label, zorder=4)
    values = [value for _, value in points]
    low, high = axes.get_ylim()
    if math.isfinite(max(values)):
        axes.set_ylim(min(low, min(values) - 0.03 * (high - low)), max(high, max(values) + 0.15 * (high - low)))


def _draw_rates(axes: Axes, steps: Sequence[StepRecord]) -> None:
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    rates = [(r["step"], r["lr"]) for r in steps if r.get("lr") is not None]
    if rates:
        axes.plot(*zip(*rates, strict=True), color=_INK, linewidth=1.2, drawstyle="steps-mid")
        axes.set_ylim(0, max(rate for _, rate in rates) * 1.15 or 1)
    axes.yaxis.set_major_locator(MaxNLocator(nbins=3))
    # Each tick whole, not a factor of ten above the axis, where it runs into the picture above.
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}" if value else "0"))
    axes.set_ylabel("learning rate")


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
    """Faint lines where cycles begin while they do not hatch the picture, and cycle numbers along the top."""
    starts = _cycle_starts(steps)
    if not starts:
        return
    if len(starts) <= _MAX_CYCLE_LINES:
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
    least, most = max(low, 1e-12), max(high, low * 1.05, 1e-12)
    first = steps[0]["step"]
    shown = axes.imshow(
        np.where(image == 0, least, image),
        norm=LogNorm(least, most),
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
    bar = figure.colorbar(shown, ax=axes, location="bottom", pad=0.02, fraction=0.03, aspect=50, extend="both")
    ticks = round_ticks(least, most)
    bar.set_ticks(ticks, labels=[f"{tick:g}" for tick in ticks])
    bar.minorticks_off()
    bar.set_label("gradient norm of the group's step (blank: another group's turn)")
    bar.outline.set_visible(False)
    for side in axes.spines.values():
        side.set_visible(False)
    if len(rows) <= 40:
        axes.set_yticks(np.arange(len(rows) + 1) - 0.5, minor=True)
        axes.grid(axis="y", which="minor", color="white", linewidth=1)
    axes.tick_params(which="minor", length=0)


def round_ticks(low: float, high: float, most: int = 8) -> list[float]:
    """1, 2 and 5 times powers of ten between ``low`` and ``high``; all their multiples where these are fewer than
    three, powers of ten alone where they are too many; the ends where there are not two."""
    exponents = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)

    def ticks_of(factors: Iterable[int]) -> list[float]:
        return [f * 10.0**e for e in exponents for f in factors if low <= f * 10.0**e <= high]

    ticks = ticks_of((1, 2, 5))
    if len(ticks) < 3:
        ticks = ticks_of(range(1, 10))
    elif len(ticks) > most:
        ticks = ticks_of((1,))
    ticks = ticks[:: math.ceil(len(ticks) / most) or 1]
    return ticks if len(ticks) > 1 else [float(f"{low:.2g}"), float(f"{high:.2g}")]


def _short(name: str) -> str:
    return name if len(name) <= 28 else name[:27] + "…"


def _name_rows(axes: Axes, rows: list[tuple[int, GroupSummary | None]], steps: list[StepRecord]) -> None:
    names = {record["group"]: record.get("group_name") or str(record["group"]) for record in steps}
    names |= {index: group.name for index, group in rows if group is not None}
    every = math.ceil(len(rows) / 45)
    shown = range(0, len(rows), every)
    labels = [names[rows[row][0]] + (" (always)" if rows[row][0] < 0 else "") for row in shown]
    axes.set_yticks(list(shown), [_short(label) for label in labels])
    axes.tick_params(axis="y", length=0, labelsize=9 if len(rows) <= 30 else 8)
    for row, (index, _) in enumerate(rows):
        if index < 0:
            axes.axhspan(row - 0.5, row + 0.5, color=_FAINT, alpha=0.5)


def _draw_bars(axes: Axes, moved: list[float | None], had_turns: list[bool]) -> None:
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    percent = [100 * value if value is not None else 0.0 for value in moved]
    axes.barh(range(len(percent)), percent, height=0.72, color=_BAR)
    axes.set_xlim(0, max(percent) * 1.22 or 1)
    if len(percent) <= 45:
        for row, value in enumerate(percent):
            label = f" {percent_text(value)}" if value else (" 0" if moved[row] is not None else " ?")
            label = label if value or had_turns[row] else " never trained"
            axes.text(value, row, label, va="center", fontsize=8, color=_INK if value else _SKIPPED)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=3))  # the panel is narrow
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.set_xlabel("% of the group's weight norm")
    axes.set_title("how far it moved", fontsize=11)
    axes.tick_params(axis="y", which="both", length=0, labelleft=False)
    _plain(axes, grid="x")
    axes.spines["left"].set_visible(False)


def percent_text(value: float) -> str:
    """Two digits, and never an exponent for large ones: "0.031", "2.7", "180"."""
    return f"{float(f'{value:.2g}'):,.0f}" if value >= 100 else f"{value:.2g}"


def _plain(axes: Axes, grid: Literal["both", "x", "y"] = "y") -> None:
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
    path.write_bytes(png(figure))
