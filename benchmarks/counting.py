"""What the benchmarks of memory have in common: the settings that are counted, and the counting, on a fake device."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from hift_ds.forecast.setting import Result, Setting
from hift_ds.forecast.simulator import simulate
from hift_ds.forecast.steps import Request, Steps, WholeModel, read_structure

GIB = 1 << 30
FP32, MIXED_HI, AUTOCAST = "fp32", "mixed_hi", "autocast"  # MIXED_HI: bf16 weights, fp32 masters
ADAMW = ("AdamW", {"lr": 1e-5})
AT_ONCE = 4  # settings that one process counts, which imports what they need once, before they are written down
_BLOCKS: dict[str, dict[str, Any]] = {
    FP32: {},
    MIXED_HI: {"bf16": {"enabled": True}},
    AUTOCAST: {"torch_autocast": {"enabled": True, "dtype": "bfloat16"}},
}


def setting(
    model: str,
    precision: str,
    batch: int,
    length: int,
    hift: Mapping[str, Any],
    optimizer: tuple[str, Mapping[str, Any]] = ADAMW,
    deepspeed: Mapping[str, Any] | None = None,
    **more: Any,
) -> Setting:
    """A run to be counted.

    Args:
        model: a size of the zoo, or the folder of a config.
        precision: ``FP32``, ``MIXED_HI`` or ``AUTOCAST``.
        batch, length: sequences of a micro-batch, and the tokens of each.
        hift: the ``"hift"`` block.
        optimizer: its name and arguments.
        deepspeed: other blocks of the DeepSpeed config.
        more: other fields of :class:`Setting`.
    """
    name, params = optimizer
    config = {"optimizer": {"type": name, "params": dict(params)}, **_BLOCKS[precision], **(deepspeed or {})}
    dtype = "bfloat16" if precision == MIXED_HI else "float32"
    return Setting(model, {**config, "hift": dict(hift)}, dtype, batch, length, **more)


def count(
    settings: Sequence[Setting], num_processes: int = 1, ends_only: bool = True, rows: Path | None = None
) -> list[Steps]:
    """The steps of every group; with ``ends_only`` of those that can be the worst, the embedding, the lowest block and
    the head.

    Args:
        rows: a file of what was counted before by this very code, which is read and added to: so an interrupted count
            goes on.
    """
    structures = {
        model: read_structure(next(s for s in settings if s.model == model)) for model in {s.model for s in settings}
    }
    return [WholeModel(result) for result in results(
        [Request(s, structures[s.model], ends_only).to_simulate() for s in settings], num_processes, rows
    )]  # fmt: skip


def results(settings: Sequence[Setting], num_processes: int = 1, rows: Path | None = None) -> list[Result]:
    """What each setting leads to, each counted once; see :func:`count`."""
    known: dict[str, Result] = {}
    if rows is not None and rows.is_file():
        for line in rows.read_text(encoding="utf-8").splitlines():
            row = json.loads(line)
            known[row["setting"]] = Result.from_dict(row["result"])
    new = {key: setting for setting in settings if (key := _key(setting)) not in known}
    keys = list(new)
    at_once = AT_ONCE * num_processes if rows is not None else max(len(keys), 1)
    for start in range(0, len(keys), at_once):
        part = keys[start : start + at_once]
        for key, result in zip(part, simulate([new[key] for key in part], num_processes), strict=True):
            known[key] = result
            if rows is not None:
                with rows.open("a", encoding="utf-8") as lines:
                    lines.write(json.dumps({"setting": key, "result": asdict(result)}) + "\n")
    return [known[_key(setting)] for setting in settings]


def table(columns: Sequence[str], rows: Iterable[Sequence[str]], text: Collection[int]) -> str:
    """A table of a Markdown page.

    Args:
        text: the columns with text, by number; the others have figures and are set to the right.
    """
    rules = "".join("---|" if i in text else "--:|" for i in range(len(columns)))
    head, *lines = ("| " + " | ".join(row) + " |" for row in (columns, *rows))
    return "\n".join([head, f"|{rules}", *lines])


def _key(setting: Setting) -> str:
    return json.dumps(asdict(setting), sort_keys=True)
