"""Proof that a run trained what it was meant to train: how often each parameter was updated."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hift_ds.checkpoint.files import replace_text

if TYPE_CHECKING:
    from transformers import TrainerState, TrainingArguments

    from hift_ds.layers.grouping import LayerGroup

FILE_NAME = "coverage.json"


@dataclass(frozen=True)
class Coverage:
    """How often each trainable parameter was updated. ``updates``: steps that changed it, by name; ``group_of`` may be
    empty; ``trials``: with clipping by speculation, how many steps updated before their norm was known, and how many
    did so again."""

    updates: dict[str, int]
    num_steps: int
    group_of: dict[str, str]
    trials: Mapping[str, Any] | None = None

    @property
    def never_updated(self) -> list[str]:
        """The names of the trainable parameters that no step has updated."""
        return [name for name, count in self.updates.items() if count == 0]

    def summary(self) -> str:
        """One line: how much was updated, and how evenly."""
        done = len(self.updates) - len(self.never_updated)
        line = f"{done} of {len(self.updates)} trainable tensors updated in {self.num_steps} steps"
        counts = [count for count in self.updates.values() if count]
        if counts:
            low, high = min(counts), max(counts)
            each = "each once" if high == 1 else f"each {low} times"
            line += f", {each}" if low == high else f", {low} to {high} times each"
        if self.trials is not None:
            made, undone, seconds = (self.trials[key] for key in ("num_made", "num_undone", "undone_s"))
            line += f"; {made} steps updated before their norm was known, {undone} of them again ({seconds:.3g} s)"
        return line

    def warning(self, max_names: int = 8, written: bool = True) -> str | None:
        """A message that cannot be overlooked if a parameter was never updated, else None. ``written``: there is a
        ``coverage.json`` that names them all."""
        missed = self.never_updated
        if not missed:
            return None
        groups = list(dict.fromkeys(self.group_of[name] for name in missed if name in self.group_of))
        lines = [
            f"{len(missed)} OF {len(self.updates)} TRAINABLE TENSORS WERE NEVER UPDATED.",
            f"The run made {self.num_steps} optimizer steps; a cycle over all groups was not completed, "
            "or every step of these groups overflowed.",
            "Train longer (max_steps), raise group_size, or freeze what is not to be trained.",
        ]
        if groups:
            lines.append(f"Groups: {', '.join(groups[:max_names])}{_more(groups, max_names)}")
        lines += [f"  {name}" for name in missed[:max_names]]
        if len(missed) > max_names:
            lines.append(f"  ...{_more(missed, max_names)}" + (f" (all of them: {FILE_NAME})" if written else ""))
        return "\n".join(lines)


def kept_step(args: TrainingArguments, state: TrainerState) -> int:
    """The step whose weights a Trainer has when its training has ended: the last, or with ``load_best_model_at_end``
    the best one's, from whose checkpoint the counts of :meth:`HiFTEngine.coverage` are then too."""
    best = args.load_best_model_at_end and state.best_model_checkpoint is not None
    return state.best_global_step if best and state.best_global_step else state.global_step


def make_coverage(
    updates: Mapping[str, int],
    num_steps: int,
    groups: Iterable[LayerGroup] = (),
    trials: Mapping[str, Any] | None = None,
) -> Coverage:
    """``updates``: what ``HiFTEngine.coverage()`` returns; ``trials``: the optimizer's counts, if it made any."""
    group_of = {name: group.name for group in groups for name in group.param_names}
    return Coverage(dict(updates), num_steps, group_of, trials)


def write_coverage(run_dir: str | Path, coverage: Coverage) -> Path:
    """Write ``coverage.json``: num_steps, num_parameters, never_updated, and updates by parameter name."""
    path = Path(run_dir) / FILE_NAME
    path.parent.mkdir(parents=True, exist_ok=True)
    content = {
        "num_steps": coverage.num_steps,
        "num_parameters": len(coverage.updates),
        "never_updated": coverage.never_updated,
        "updates": coverage.updates,
        **({} if coverage.trials is None else {"trials": dict(coverage.trials)}),
    }
    replace_text(path, json.dumps(content, indent=1) + "\n")
    return path


def _more(items: list[str], shown: int) -> str:
    return f" and {len(items) - shown} more" if len(items) > shown else ""
