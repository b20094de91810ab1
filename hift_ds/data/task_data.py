"""What the preparation of every task but language modelling shares.

rows (sources) -> examples (task_rows) -> what the trainer's collator takes: ``preference_data``, ``labelled_data``,
``question_data``, ``pair_data``.
"""

from __future__ import annotations

import copy
import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from hift_ds.data.config import DataConfig
from hift_ds.data.row_tokens import halves_in_columns, without_halves
from hift_ds.data.rows import cache_in_use, code_stamp, guessed, load_splits
from hift_ds.data.task_rows import to_example
from hift_ds.errors import DataError

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import EvalPrediction, PreTrainedTokenizerBase


@dataclass(frozen=True)
class TaskReport:
    """What became of one dataset's rows, in words. ``tokens``: in an epoch; of preferences an estimate, with
    ``data.max_length`` for the longest."""

    name: str
    num_rows: int
    parts: tuple[str, ...]
    num_samples: int
    tokens: int
    longest_tokens: int

    def __str__(self) -> str:
        return "; ".join([f"{self.name}: {self.num_rows:,} rows", *self.parts])


@dataclass(frozen=True)
class Preparation:
    """What the preparation of every task is given.

    Attributes:
        config: the run file's ``data`` section.
        tokenizer: of the run.
        max_length: tokens of the longest sample.
        model_config: contents of the model folder's config.json.
    """

    config: DataConfig
    tokenizer: PreTrainedTokenizerBase = field(repr=False)
    max_length: int
    model_config: Mapping[str, Any] = field(repr=False)

    def examples(self, format: str) -> tuple[Dataset, Dataset | None, list[str]]:
        """Rows of training and evaluation with the columns ``example`` (JSON) and ``origin``; and what was guessed."""
        sources = [replace(source, format=format) for source in self.config.train_sources()]
        held_out = [replace(source, format=format) for source in self.config.eval_sources()]
        train, evaluated = load_splits(self.config, sources, held_out)
        parse = Parse(format, code_stamp())
        with cache_in_use():
            parts = [part.map(parse, remove_columns=part.column_names, desc="Reading rows")
                     for part in (train, evaluated) if part is not None]  # fmt: skip
        notes = [note for source in sources if (note := guessed(source))]
        remarks = Counter(remark for part in parts for each in part["remarks"] for remark in each)
        notes += [f"in {count:,} rows {remark}" for remark, count in remarks.items()]
        parts = [part.remove_columns("remarks") for part in parts]
        return parts[0], parts[1] if evaluated is not None else None, notes

    def mapped(self, rows: Dataset, function: Callable[..., Any], **options: Any) -> Dataset:
        """``rows`` through a function that the cache of ``datasets`` knows by its contents."""
        workers = self.config.num_workers
        with cache_in_use():
            return rows.map(function, num_proc=workers if workers > 1 else None, desc="Tokenising", **options)


@dataclass(frozen=True)
class Parse:
    """A row -> its example as JSON; a function for ``Dataset.map``."""

    format: str
    stamp: str

    def __call__(self, row: dict[str, str]) -> dict[str, Any]:
        columns, remarks = without_halves(row["row"])
        example = to_example(columns, row["format"], row["origin"])
        text = json.dumps(example, ensure_ascii=False)
        remarks = remarks or halves_in_columns(row["row"], lambda: text)
        if "chosen" in example and example["chosen"] == example["rejected"]:
            remarks += ("chosen and rejected are the same",)
        return {"example": text, "origin": row["origin"], "remarks": list(remarks)}


def right_padded(how: Preparation, prefix_space: bool = False) -> PreTrainedTokenizerBase:
    """A copy that pads on the right, and cuts where ``data.truncation`` says.

    Args:
        prefix_space: for words one by one.
    """
    tokenizer = copy.deepcopy(how.tokenizer)
    tokenizer.padding_side = "right"
    tokenizer.truncation_side = "left" if how.config.truncation == "keep_end" else "right"
    if prefix_space:
        set_prefix_space(tokenizer)
    return tokenizer


def set_prefix_space(tokenizer: PreTrainedTokenizerBase) -> None:
    """Have a byte-level tokenizer, which tells a word by the space before it, put one before a word that is given
    alone."""
    if getattr(tokenizer, "add_prefix_space", None) is False:
        tokenizer.add_prefix_space = True
        if getattr(tokenizer.backend_tokenizer.pre_tokenizer, "add_prefix_space", None) is False:
            tokenizer.backend_tokenizer.pre_tokenizer.add_prefix_space = True


def arrays_of(prediction: EvalPrediction) -> tuple[np.ndarray, np.ndarray]:
    """A prediction's first output and its labels: a model may give and be asked for several."""
    outputs, labels = prediction.predictions, prediction.label_ids
    return (
        outputs[0] if isinstance(outputs, tuple) else outputs,
        labels[0] if isinstance(labels, tuple) else labels,
    )


def lengths(rows: Dataset) -> tuple[int, int, int]:
    """The number of rows, their tokens, and those of the longest."""
    each = [len(ids) for ids in rows["input_ids"]]
    return len(each), sum(each), max(each)


def tokenised(
    how: Preparation,
    parts: Sequence[Dataset | None],
    tokenize: Callable[[Any], Any],
    notes: Sequence[str],
    describe: Callable[[Dataset], Sequence[str]] = lambda rows: (),
) -> tuple[list[Dataset | None], tuple[TaskReport, ...]]:
    """What ``tokenize`` makes of the examples for training and evaluation, without those that it drops; and what became
    of them.

    Args:
        describe: what else is to be said of tokenised rows, before any is dropped.
    """
    kept: list[Dataset | None] = []
    reports = []
    for name, rows in zip(("train", "eval"), parts, strict=True):
        if rows is None:
            kept.append(None)
            continue
        whole = how.mapped(rows, tokenize, remove_columns=rows.column_names)
        described = describe(whole)
        part, told = _without_dropped(whole, name, how)
        kept.append(part)
        told += [*described, *(notes if name == "train" else ())]
        reports.append(TaskReport(name, len(rows), tuple(told), *lengths(part)))
    return kept, tuple(reports)


def _without_dropped(rows: Dataset, name: str, how: Preparation) -> tuple[Dataset, list[str]]:
    """The rows that stay, and what is to be said of the others."""
    cut, dropped = np.asarray(rows["cut"]), np.asarray(rows["dropped"])
    told = [f"longest {lengths(rows)[2]:,} tokens"]
    if (shorter := int(((cut > 0) & ~dropped).sum())) > 0:
        told.append(f"{shorter:,} cut to data.max_length {how.max_length:,} ({int(cut[~dropped].sum()):,} tokens lost)")
    if dropped.any():
        told.append(f"{int(dropped.sum()):,} dropped: longer than {how.max_length:,} tokens")
        rows = rows.select(np.flatnonzero(~dropped))
    if not len(rows):
        raise DataError(f"data.{name}: all rows are longer than data.max_length {how.max_length}; raise it")
    return rows.remove_columns(["cut", "dropped"]), told
