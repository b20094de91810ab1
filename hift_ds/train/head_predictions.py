"""What a model with a task's head says of the rows of a file: labels, tags, answers in a text, rewards, texts."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import TYPE_CHECKING, Any

import torch

from hift_ds.data.formats import Row, text_of
from hift_ds.data.question_data import best_answers, context_pieces
from hift_ds.data.rows import iterate_rows
from hift_ds.data.sources import Source
from hift_ds.data.task_data import set_prefix_space
from hift_ds.data.task_rows import listed, to_example
from hift_ds.data.text_columns import Malformed
from hift_ds.errors import DataError
from hift_ds.train.predict import answer_prompts
from hift_ds.train.tasks import TASKS

if TYPE_CHECKING:
    from transformers import BatchEncoding, PreTrainedModel, PreTrainedTokenizerBase
    from transformers.utils import ModelOutput


@torch.no_grad()
def predict_with_head(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    source: Source,
    task: str,
    *,
    max_length: int,
    batch_size: int = 8,
    **generation: Any,
) -> Iterator[dict[str, Any]]:
    """Each row of ``source`` in order, with what the model says of it under ``prediction``. Labels in the rows are not
    looked at.

    Args:
        task: a key of ``ANSWERS``.
        max_length: tokens that a row is cut to; contexts of questions are cut into pieces.
        generation: options of ``generate``, for texts.

    Raises:
        DataError: a row is malformed.
    """
    tokenizer.padding_side, tokenizer.truncation_side = "right", "right"
    if task == "token_classification":
        set_prefix_space(tokenizer)
    say, fixed = ANSWERS[task], (model, tokenizer, max_length, generation)
    rows = iterate_rows(replace(source, format=TASKS[task].format))
    while batch := list(islice(rows, batch_size)):
        rows_of_batch = [(json.loads(row["row"]), row["origin"]) for row in batch]
        for (row, _), said in zip(rows_of_batch, say(Batch(rows_of_batch, *fixed)), strict=True):
            yield {**row, **said}


@dataclass(frozen=True)
class Batch:
    """Rows, each with where it is from, and what they are asked with."""

    rows: list[tuple[Row, str]]
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    max_length: int
    generation: dict[str, Any]

    def encode(self, *texts: Any, **options: Any) -> BatchEncoding:
        """A row's tokens, cut to ``max_length``."""
        return self.tokenizer(*texts, truncation=True, max_length=self.max_length, **options)

    def outputs(self, encoded: Sequence[Mapping[str, Any]]) -> ModelOutput:
        """What the model says of them, padded to one batch."""
        names = self.tokenizer.model_input_names
        columns = [{name: list(one[name]) for name in one if name in names} for one in encoded]
        return self.model(**self.tokenizer.pad(columns, return_tensors="pt").to(self.model.device))


def _needed(row: Row, column: str, origin: str, read: Callable[[Row, str], Any] = text_of) -> Any:
    try:
        value = read(row, column)
    except Malformed as error:
        raise DataError(f"{origin}: {error}") from None
    if value is None or value == "":
        raise DataError(f"{origin}: no {column!r}; found columns: {', '.join(row) or 'none'}")
    return value


def _words(row: Row, column: str) -> list[Any] | None:
    return listed(row[column], column) if column in row else None


def _labels(asked: Batch) -> list[dict[str, Any]]:
    texts = [(_needed(row, "text", origin), row.get("text_pair")) for row, origin in asked.rows]
    encoded = [asked.encode(text, pair) if pair else asked.encode(text) for text, pair in texts]
    logits, config = asked.outputs(encoded).logits.float(), asked.model.config
    names = config.id2label
    if logits.shape[1] == 1 or config.problem_type == "regression":
        return [{"prediction": round(float(value), 6)} for value in logits[:, 0]]
    if config.problem_type == "multi_label_classification":
        return [{"prediction": [names[int(n)] for n in torch.nonzero(row > 0)[:, 0]]} for row in logits]
    shares = logits.softmax(-1).max(-1)
    return [
        {"prediction": names[int(number)], "probability": round(float(share), 4)}
        for share, number in zip(shares.values, shares.indices, strict=True)
    ]


def _tags(asked: Batch) -> list[dict[str, Any]]:
    words = [_needed(row, "tokens", origin, _words) for row, origin in asked.rows]
    encoded = [asked.encode(spelled, is_split_into_words=True) for spelled in words]
    chosen = asked.outputs(encoded).logits.argmax(-1).tolist()
    said = []
    for one, numbers, spelled in zip(encoded, chosen, words, strict=True):
        tags: list[str | None] = [None] * len(spelled)  # of words that were cut off
        for place, word in reversed(list(enumerate(one.word_ids()))):  # a word's first token counts
            if word is not None:
                tags[word] = asked.model.config.id2label[numbers[place]]
        said.append({"prediction": tags})
    return said


def _answers(asked: Batch) -> list[dict[str, Any]]:
    said = []
    for row, origin in asked.rows:
        question, context = _needed(row, "question", origin), _needed(row, "context", origin)
        pieces = context_pieces(asked.tokenizer, question, context, asked.max_length)
        found = asked.outputs([columns for columns, _ in pieces])
        [(score, text, nothing)] = best_answers(
            [context], [0] * len(pieces), [offsets for _, offsets in pieces], found.start_logits.float().cpu().numpy(),
            found.end_logits.float().cpu().numpy(),
        )  # fmt: skip
        said.append({"prediction": text, "no_answer": bool(nothing > score)})
    return said


def _rewards(asked: Batch) -> list[dict[str, Any]]:
    encoded, tokenizer = [], asked.tokenizer
    for row, origin in asked.rows:
        example = to_example(row, "preference", origin)
        for name in ("chosen", "rejected"):
            whole = example.get("prompt", example[name][:0]) + example[name]
            if isinstance(whole, str):
                end = tokenizer.eos_token or ""
                ids = tokenizer(whole if whole.endswith(end) else whole + end)
            else:
                tools = json.loads(example["tools"]) if "tools" in example else None
                options = example.get("chat_template_kwargs", {})
                ids = tokenizer.apply_chat_template(whole, tools=tools, tokenize=True, return_dict=True, **options)
            if len(ids["input_ids"]) > asked.max_length:
                raise DataError(f"{origin}: {name}: longer than data.max_length {asked.max_length}")
            encoded.append(ids)
    values = asked.outputs(encoded).logits.float()[:, 0].tolist()
    pairs = zip(values[::2], values[1::2], strict=True)
    return [{"prediction": {"chosen": round(a, 6), "rejected": round(b, 6)}} for a, b in pairs]


def _texts(asked: Batch) -> list[dict[str, Any]]:
    prompts = [asked.encode(_needed(row, "source", origin))["input_ids"] for row, origin in asked.rows]
    return [{"prediction": text} for text in answer_prompts(asked.model, asked.tokenizer, prompts, asked.generation)]


ANSWERS: dict[str, Callable[[Batch], list[dict[str, Any]]]] = {
    "classification": _labels, "token_classification": _tags, "qa": _answers, "reward": _rewards, "seq2seq": _texts,
}  # fmt: skip
