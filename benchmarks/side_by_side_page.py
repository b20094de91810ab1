"""The page of `side_by_side.py`, and the peaks that README and docs quote, from its lines alone."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

from benchmarks.forked_steps import GIB
from benchmarks.side_by_side_rows import (
    FP32,
    FULL,
    GOAL,
    MIXED,
    OURS,
    PEERS,
    ROWS,
    STAGES,
    Lines,
    Row,
    layers,
    limit_of,
    numels,
)


def page(lines_of: dict[str, Lines], authors: Sequence[dict[str, Any]]) -> str:
    """In Markdown, from the lines alone."""
    out = [
        "# Step time and memory, side by side", "",
        "Made by `benchmarks/side_by_side.py`, which says how, from `side_by_side.jsonl`. `of limit`: seconds against "
        "a bare loop with the same layers and arithmetic, everything resident, taking turns with it: the median over "
        "turns (least, most). `of full`: against full fine-tuning with torch's fused AdamW. Peak: resident memory of "
        "the process above what it held before the model was there, the whole model trained; on a CPU states on the "
        "device and in host memory are the same memory. Counted: bytes allocated on a GPU, not measured on one "
        "([how](../../docs/memory.md)).",
    ]  # fmt: skip
    for shape, lines in lines_of.items():
        if any(line["shape"] == shape and line["quick"] == lines.quick for line in lines.found):
            out += ["", *_shape_page(shape, lines, [x for x in authors if x["shape"] == shape])]
    return "\n".join(out) + "\n"


def _shape_page(shape: str, lines: Lines, authors: Sequence[dict[str, Any]]) -> list[str]:
    some = [x for x in lines.found if x["shape"] == shape and x["quick"] == lines.quick]
    timed = [x for x in some if x["stage"] == "steps"] or some
    place, loads = timed[0]["where"], [x["where"]["load"] for x in timed]
    versions = ", ".join(f"{name} {v}" for name, v in {
        k: v for x in some for k, v in x["where"]["versions"].items()}.items())  # fmt: skip
    numel = numels(shape)[0] / 1e6
    out = [
        f"## {numel:,.0f}M parameters, {some[0]['batch']} tokens a step", "",
        f"LLaMA's layout (`{shape}`), random weights; {place['cores']} cores ({place['machine']}), {place['threads']} "
        f"thread, load {min(loads):.1f} to {max(loads):.1f}, {max(x['date'] for x in some)}; {versions}.", "",
        "| way of training | s a step | of limit | of full | CPU s of limit | peak GiB | counted GiB |",
        "|---|---|---|---|---|---|---|",
    ]  # fmt: skip
    for row in ROWS.values():
        found = {stage: lines.get(stage, row.name) for stage in STAGES[:3]}
        if any(found.values()):
            out.append(_line_of(row, found))
    for one in authors:
        cells = (f"{one.get('seconds', float('nan')):.3f}", "-", f"{one.get('of_full', float('nan')):.2f}", "-",
                 f"{one.get('peak_gib', float('nan')):.2f}", "-")  # fmt: skip
        out.append(f"| {one['row']} | {' | '.join(cells)} |")
    left_out = {line["row"]: line["left_out"] for line in some if "left_out" in line}
    out += ["", *(f"- {name}: left out: `{why}`" for name, why in left_out.items())]
    alone = [line["row"] for line in some if line["stage"] == "steps" and line.get("company") == 1]
    if alone:
        out.append(f"- One after the other, without turns, since they do not fit together: {', '.join(alone)}.")
    return [*out, "", *goals(shape, lines, authors)]


def _line_of(row: Row, found: dict[str, dict[str, Any] | None]) -> str:
    steps, memory, counted = (found[stage] or {} for stage in STAGES[:3])
    first = ""
    if row.method == "galore" and "first_step_s" in steps:
        first = f" (every 200th: {steps['first_step_s']:.1f})"
    limit = _spread(steps.get("of_limit"))
    cells = [
        f"{statistics.median(steps['seconds']):.3f}{first}" if "seconds" in steps else "-",
        "limit" if row.name == limit_of(row) else limit, _spread(steps.get("of_full")),
        f"{steps['cpu_of_limit']:.2f}" if "cpu_of_limit" in steps else "-",
        f"{memory['peak_bytes'] / GIB:.2f}" if "peak_bytes" in memory else "-",
        f"{counted['peak_bytes'] / GIB:.2f}" if "peak_bytes" in counted else "-",
    ]  # fmt: skip
    return f"| {row.name} | {' | '.join(cells)} |"


def _spread(ratios: Sequence[float] | None) -> str:
    if not ratios:
        return "-"
    return f"{statistics.median(ratios):.3f} ({min(ratios):.2f}, {max(ratios):.2f})"


# Row, and what it is called beside the others; of those that train every weight with Adam the word says what is kept.
PEAKS = {
    FULL: "full fine-tuning, torch's AdamW",
    "DeepSpeed ZeRO-0": "full fine-tuning, DeepSpeed ZeRO-0",
    "GaLore, rank 128": "GaLore, rank 128 (projected moments)",
    "LISA (its rule: 2 blocks and both ends)": "LISA, two blocks and both ends (before it has drawn others)",
    "DeepSpeed ZeRO-Offload": "full fine-tuning, DeepSpeed ZeRO-Offload",
    "LOMO": "LOMO (no states, no masters)",
    "LoRA, rank 16": "LoRA, rank 16 (adapters only)",
    "BAdam, 1 layer": "BAdam, a layer a block (states of a block are dropped)",
    f"ours, 1 layer, {MIXED}, host, after backward": "ours, a layer a group",
    f"ours, 1 layer, {MIXED}, host, without prefetch": "ours, a layer a group, `prefetch: false`",
    f"ours, all layers, {MIXED}, host, in backward": "ours, every weight in every step, `update: in_backward`",
    "ours, all layers, least memory": "ours, every weight in every step, least memory (states on disk)",
}
PEAK_SHAPES = {"7b": "1 x 1024 tokens", "7b_recomputed": "8 x 512 tokens, blocks recomputed"}
BEGIN, END = "<!-- peaks: python benchmarks/side_by_side.py table -->", "<!-- end of peaks -->"


def peaks_at_7b(lines_of: dict[str, Lines]) -> str:
    """Peaks of the 7B shape, for README and docs/results.md."""
    out = [f"| LLaMA-2-7B, GiB on the accelerator | {' | '.join(PEAK_SHAPES.values())} |", "|---|---|---|"]
    for name, title in PEAKS.items():
        found = [lines_of[shape].get("counted", name) or {} for shape in PEAK_SHAPES]
        cells = [f"{line['peak_bytes'] / GIB:.1f}" if "peak_bytes" in line else "-" for line in found]
        out.append(f"| {title} | {' | '.join(cells)} |")
    return "\n".join(out)


def goals(shape: str, lines: Lines, authors: Sequence[dict[str, Any]]) -> list[str]:
    """Each goal, passed or failed, with what decides it."""
    timed = any(lines.get("steps", name) for name in ROWS)
    out = _time_goals(lines, authors) if timed else ["Steps of this shape were not timed."]
    for stage, how in (("memory", "resident memory"), ("counted", "counted, as a GPU allocates")):
        out += ["", f"Goal 3, the lowest peak of all that train every weight with Adam and keep fp32 masters ({how}):"]
        out.append(_lowest_peak(lines, stage))
    return out


def _time_goals(lines: Lines, authors: Sequence[dict[str, Any]]) -> list[str]:
    out = [f"Goal 1, at most {GOAL:.2f} of the limit in every mode:"]
    for row in OURS:
        steps = lines.get("steps", row.name) or {}
        ratio = _to_limit(lines, row)
        if ratio is not None:
            how = "" if steps.get("of_limit") else ", one after the other"
            out.append(f"- {'pass' if ratio <= GOAL else 'FAIL'}: {row.name}: {ratio:.3f}{how}")
    out += ["", "Goal 2, faster than each peer that trains by groups, with the same layers and batch:"]
    for row in (r for r in PEERS if r.peer):
        theirs, mine = (lines.get("steps", name) or {} for name in (row.name, row.against))
        if "seconds" in theirs and "seconds" in mine:
            ratio = _same_scale(mine) / _same_scale(theirs)
            out.append(f"- {'pass' if ratio < 1 else 'FAIL'}: {ratio:.3f} of {row.name}")
        else:
            out.append(f"- not measured: {row.name}")
    out += _authors_goal(lines, authors)
    return out


def _lowest_peak(lines: Lines, stage: str) -> str:
    peaks = {
        row.name: line["peak_bytes"] / GIB
        for row in ROWS.values()
        if row.states and row.ranks == 1 and "peak_bytes" in (line := lines.get(stage, row.name) or {})
    }
    mine, theirs = (
        {n: v for n, v in peaks.items() if (ROWS[n].method == "hift") is ours} for ours in (True, False)
    )  # fmt: skip
    if not (mine and theirs):
        return "- not measured"
    ours, other = min(mine, key=mine.__getitem__), min(theirs, key=theirs.__getitem__)
    word = "pass" if mine[ours] < theirs[other] else "FAIL"
    return f"- {word}: {ours}: {mine[ours]:.2f} GiB; of the others {other}: {theirs[other]:.2f} GiB"


def _to_limit(lines: Lines, row: Row) -> float | None:
    steps = lines.get("steps", row.name) or {}
    if steps.get("of_limit"):
        return statistics.median(steps["of_limit"])
    limit = lines.get("steps", limit_of(row)) or {}
    if row.group in (1, 4, "all") and "seconds" in steps and "seconds" in limit:
        return statistics.median(steps["seconds"]) / statistics.median(limit["seconds"])
    return None


def _same_scale(line: dict[str, Any]) -> float:
    """As a share of what took turns with it, if anything did: two rows may have been measured at different times."""
    for key in ("of_limit", "of_full", "seconds"):
        if line.get(key):
            return statistics.median(line[key])
    raise ValueError(f"{line['row']}: no seconds")


def _authors_goal(lines: Lines, authors: Sequence[dict[str, Any]]) -> list[str]:
    """Against the authors' program, which has an environment of its own, so that they take no turns; its precision on a
    CPU is fp32."""
    out = []
    for one in (x for x in authors if x["group_size"] != "all"):
        name = f"ours, {layers(one['group_size'])}, {FP32}, device, after backward"
        mine = (lines.get("steps", name) or {}).get("seconds")
        if mine:
            ratio = statistics.median(mine) / one["seconds"]
            verdict = "pass" if ratio < 1 else "FAIL"
            out.append(f"- {verdict}: {ratio:.3f} of authors' HiFT, {layers(one['group_size'])}, fp32, at another hour")
    return out or ["- not measured: authors' HiFT (`--authors`)"]
