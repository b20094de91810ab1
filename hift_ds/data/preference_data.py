"""Preferences: texts or messages, which TRL's trainers tokenise themselves."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from hift_ds.data.chat_templates import set_chat_template
from hift_ds.data.encoding import without_affixes
from hift_ds.data.prepare import PreparedData
from hift_ds.data.task_data import Preparation, TaskReport
from hift_ds.data.task_rows import Example
from hift_ds.errors import DataError

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase


def preference_data(how: Preparation, format: str) -> PreparedData:
    """Data as TRL's DPO, KTO and reward trainers take them: texts as they are, or messages for the chat template.

    Raises:
        DataError: some rows are texts and others messages.
    """
    template = set_chat_template(how.tokenizer, how.config.template)
    train, evaluated, notes = how.examples(format)
    if format == "rated" and how.config.shuffle:  # its trainer takes rows in their order
        train = train.shuffle(seed=how.config.seed)
    parts = [_as_columns(part, how.tokenizer) for part in (train, evaluated) if part is not None]
    reports = []
    for name, part in zip(("train", "eval"), parts, strict=False):
        told = []
        if "label" in part.column_names:
            told.append(f"{sum(part['label']):,} wanted answers, {len(part) - sum(part['label']):,} unwanted")
        form = "texts, without a chat template" if isinstance(part[0][part.column_names[0]], str) else "messages"
        reports.append(
            TaskReport(
                name,
                len(part),
                (form, *told, *(notes if name == "train" else ())),
                len(part),
                _estimated_tokens(part, how.tokenizer),
                how.max_length,
            )
        )
    return PreparedData(parts[0], parts[1] if evaluated is not None else None, None, template, tuple(reports))


def _as_columns(rows: Dataset, tokenizer: PreTrainedTokenizerBase) -> Dataset:
    from datasets import Dataset

    first: dict[str, tuple[type, str]] = {}
    columns: dict[str, list[Any]] = {}
    tools: list[str | None] = []
    kinds: dict[tuple[str, ...], str] = {}
    for text, origin in zip(rows["example"], rows["origin"], strict=True):
        example: Example = json.loads(text)
        tools.append(example.pop("tools", None))
        options = example.get("chat_template_kwargs", {})  # a column of objects: Arrow would fill what some lack
        kinds.setdefault((*sorted(example), *(f"chat_template_kwargs.{name}" for name in sorted(options))), origin)
        if len(kinds) > 1:
            (ours, one), (theirs, other) = kinds.items()
            raise DataError(
                f"{other}: has {', '.join(theirs)}, but {one} has {', '.join(ours)}; train on one kind of row"
            )
        for name, value in example.items():
            kind, where = first.setdefault(name, (type(value), origin))
            if kind is not type(value):
                raise DataError(
                    f"{origin}: {name} is a {_form(type(value))}, but in {where} it is a {_form(kind)}; train on one "
                    "kind"
                )
            if isinstance(value, str) and (name == "prompt" or "prompt" not in example):
                value = without_affixes(tokenizer, value)  # TRL has the tokenizer put them there
            columns.setdefault(name, []).append(value)
    return Dataset.from_dict(columns | ({"tools": tools} if any(tools) else {}))


def _form(kind: type) -> str:
    return "text" if kind is str else "list of messages" if kind is list else kind.__name__


def _estimated_tokens(rows: Dataset, tokenizer: PreTrainedTokenizerBase) -> int:
    """Tokens by the first 100 rows, without what a chat template adds."""
    first = rows.select(range(min(100, len(rows))))
    texts = [json.dumps(value, ensure_ascii=False) for name in first.column_names for value in first[name]]
    return sum(map(len, tokenizer(texts, add_special_tokens=False)["input_ids"])) * len(rows) // len(first)
