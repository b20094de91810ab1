"""``report.html``: one page about a run that needs nothing beside it, with its pictures in it."""

from __future__ import annotations

import base64
import json
import shlex
from pathlib import Path
from typing import Any

import yaml

from hift_ds.checkpoint.files import replace_text
from hift_ds.report.model_card import settings_table, versions_line
from hift_ds.report.plots import figures, percent_text, png
from hift_ds.report.run_summary import RunSummary, read_run

FILE_NAME = "report.html"
MAX_EVALUATIONS = 30  # rows of the table; the picture has all

_PICTURES = {  # name of the file: title, what is seen
    "loss": (
        "Loss",
        "Of training, raw and smoothed over a cycle, since groups differ; of the held-out rows. Below, the learning "
        "rate that updates used, one value a cycle.",
    ),
    "groups": (
        "Which layers moved when, and how far",
        "A coloured cell is a step of that group. On the right, the length of what was added to the weights, in "
        "percent of the length of the weights.",
    ),
    "memory": (
        "Memory",
        "Highest allocation in the steps of each group, and what was forecast as the most. Without an accelerator it "
        "is the memory of the process, which has no forecast and holds all weights and states whichever group trains.",
    ),
    "transfers": (
        "What steps waited for",
        "Copying optimizer states while the model computes costs nothing; the rest is waited for, and so is what else "
        "made the computation stand still.",
    ),
}


def write_report(run_dir: str | Path) -> Path:
    """Write the page of a run, finished or not, into its folder.

    Raises:
        DataError: the folder has no metrics.
    """
    path = Path(run_dir) / FILE_NAME
    replace_text(path, report_page(read_run(run_dir)))
    return path


def report_page(run: RunSummary) -> str:
    """The page as HTML. Nothing in it is loaded from anywhere."""
    from jinja2 import Environment

    template = (Path(__file__).parent / "page.html").read_text(encoding="utf-8")
    never = run.coverage.get("never_updated", [])
    missed = f"{len(never)} trainable tensors were never updated, such as {never[0]}." if never else ""
    pictures = []
    for name, figure in figures(run).items():
        title, caption = _PICTURES[name]
        pictures.append({"title": title, "caption": caption, "data": base64.b64encode(png(figure)).decode("ascii")})
    return Environment(autoescape=True).from_string(template).render(
        run=run, subtitle=_subtitle(run), facts=_facts(run), warning=missed, pictures=pictures,
        evaluations=run.evaluations[-MAX_EVALUATIONS:], best_step=run.results.get("best_step"), groups=_groups(run),
        settings=settings_table(run),
        run_file=yaml.safe_dump(dict(run.settings), sort_keys=False, allow_unicode=True) if run.settings else "",
        deepspeed=json.dumps(run.deepspeed, indent=1) if run.deepspeed else "",
        versions=versions_line(run) or "recorded when the run has ended",
        next=_next_lines(run) if run.results else "",
    )  # fmt: skip


def next_commands(run_dir: Path, task: str, holds_out: bool) -> list[str]:
    """What to type when a run has ended.

    Args:
        holds_out: the run has rows to evaluate on.
    """
    folder, talks = shlex.quote(str(run_dir)), task in ("sft", "text", "dpo", "kto")
    return [
        *([f"hift-ds chat {folder}"] if talks else []),
        *([f"hift-ds eval {folder}"] if holds_out else []),
        *([] if talks else [f"hift-ds predict {folder} --data FILE -o OUT.jsonl"]),
    ]


def _next_lines(run: RunSummary) -> str:
    data = run.settings.get("data", {})
    holds_out = data.get("eval") is not None or bool(data.get("val_size"))
    commands = next_commands(run.folder, run.settings.get("task", "sft"), holds_out)
    return "\n".join([*commands, f"hift-ds export {shlex.quote(str(run.folder))} OUT --check"])


def _subtitle(run: RunSummary) -> str:
    method = "full fine-tuning" if run.hift is None else "HiFT"
    state = "finished" if run.results else "not finished"
    return f"{run.base_model} on {'; '.join(run.data) or 'unknown data'}, {method}; {state} at step {run.steps:,}"


def _facts(run: RunSummary) -> list[dict[str, Any]]:
    """The numbers that somebody looks for first."""
    results, out = run.results, []

    def say(label: str, value: str, bad: bool = False) -> None:
        out.append({"label": label, "value": value, "bad": bad})

    if "eval_loss" in results:
        before = results.get("eval_loss_before")
        grew = before is not None and results["eval_loss"] > before
        arrow = "" if before is None else f"{before:.3f} → "
        say("held-out loss", f"{arrow}{results['eval_loss']:.3f}", grew)
    elif run.evaluations:
        say(f"held-out loss at step {run.evaluations[-1][0]:,}", f"{run.evaluations[-1][1]:.3f}")
    say("optimizer steps", f"{run.steps:,}")
    if "cycles" in results:
        say("whole cycles", f"{results['cycles']:,}", results["cycles"] < 1)
    if updates := run.coverage.get("updates"):
        never = len(run.coverage["never_updated"])
        say("of the trainable tensors were updated", f"{1 - never / len(updates):.0%}", never > 0)
    peaks = [group.peak for group in run.memory if group.peak is not None]
    if peaks:
        what = "memory of the process" if any(group.of_process for group in run.memory) else "peak memory"
        say(f"{what}, first rank", f"{max(peaks):.2f} GiB")
    if run.waited is not None:
        say("of the time steps waited", f"{run.waited:.1%}", run.waited > 0.1)
    if run.tokens_per_s is not None:
        say("tokens a second, all ranks", f"{run.tokens_per_s:,.0f}")
    return out


def _groups(run: RunSummary) -> list[dict[str, Any]]:
    updates = run.coverage.get("updates", {})
    memory = {group.name: group for group in run.memory}
    rows = []
    for group in reversed(run.groups):
        counts = [updates[name] for name in group.params if name in updates]
        known = memory.get(group.name)
        rows.append({
            "name": group.name,
            "numel": f"{group.numel:,}",
            "updates": _range(counts),
            "bad": bool(counts) and min(counts) == 0,
            "moved": "" if group.relative is None else percent_text(100 * group.relative),
            "peak": "" if known is None or known.peak is None else f"{known.peak:.2f}",
            "forecast": "" if known is None or known.forecast is None else f"{known.forecast:.2f}",
        })  # fmt: skip
    return rows


def _range(counts: list[int]) -> str:
    if not counts or min(counts) == max(counts):
        return str(counts[0]) if counts else ""
    return f"{min(counts)} to {max(counts)}"
