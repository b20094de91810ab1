"""What a model with a task's head says of the rows of a file: labels, tags, answers in a text, rewards, texts."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import islice
from typing import Any

import torch

from hift_ds.data.formats import Malformed, Row, text_of
from hift_ds.data.question_data import STRIDE_SHARE, best_answers
from hift_ds.data.sources import Source, iterate_rows
from hift_ds.data.task_data import set_prefix_space
from hift_ds.data.task_rows import listed, to_example
from hift_ds.errors import DataError
from hift_ds.train.predict import answer_prompts
from hift_ds.train.tasks import TASKS


@torch.no_grad()
def predict_with_head(
    model: Any, tokenizer: Any, source: Source, task: str, *, max_length: int, batch_size: int = 8, **generation: Any
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
    say = ANSWERS[task]
    rows = iterate_rows(replace(source, format=TASKS[task].format))
    while batch := list(islice(rows, batch_size)):
        whole = [json.loads(row["row"]) for row in batch]
        origins = [row["origin"] for row in batch]
        for row, said in zip(whole, say(model, tokenizer, whole, origins, max_length, generation), strict=True):
            yield {**row, **said}


def _logits(model: Any, tokenizer: Any, encoded: Sequence[Any]) -> Any:
    columns = [{name: list(one[name]) for name in one if name in tokenizer.model_input_names} for one in encoded]
    return model(**tokenizer.pad(columns, return_tensors="pt").to(model.device))


def _needed(row: Row, column: str, origin: str) -> str:
    try:
        text = text_of(row, column)
    except Malformed as error:
        raise DataError(f"{origin}: {error}") from None
    if not text:
        raise DataError(f"{origin}: no {column!r}; found columns: {', '.join(row) or 'none'}")
    return text


def _labels(
    model: Any, tokenizer: Any, rows: list[Row], origins: list[str], max_length: int, generation: Any
) -> list[dict[str, Any]]:
    encoded = []
    for row, origin in zip(rows, origins, strict=True):
        text, pair = _needed(row, "text", origin), row.get("text_pair")
        encoded.append(tokenizer(*((text, pair) if pair else (text,)), truncation=True, max_length=max_length))
    logits = _logits(model, tokenizer, encoded).logits.float()
    names = model.config.id2label
    if logits.shape[1] == 1 or model.config.problem_type == "regression":
        return [{"prediction": round(float(value), 6)} for value in logits[:, 0]]
    if model.config.problem_type == "multi_label_classification":
        return [{"prediction": [names[int(n)] for n in torch.nonzero(row > 0)[:, 0]]} for row in logits]
    shares = logits.softmax(-1).max(-1)
    return [
        {"prediction": names[int(number)], "probability": round(float(share), 4)}
        for share, number in zip(shares.values, shares.indices, strict=True)
    ]


def _tags(
    model: Any, tokenizer: Any, rows: list[Row], origins: list[str], max_length: int, generation: Any
) -> list[dict[str, Any]]:
    encoded, words = [], []
    for row, origin in zip(rows, origins, strict=True):
        if "tokens" not in row:
            raise DataError(f"{origin}: no 'tokens'; found columns: {', '.join(row) or 'none'}")
        try:
            words.append(listed(row["tokens"], "tokens"))
        except Malformed as error:
            raise DataError(f"{origin}: {error}") from None
        encoded.append(tokenizer(words[-1], is_split_into_words=True, truncation=True, max_length=max_length))
    chosen = _logits(model, tokenizer, encoded).logits.argmax(-1).tolist()
    said = []
    for one, numbers, spelled in zip(encoded, chosen, words, strict=True):
        tags: list[str | None] = [None] * len(spelled)  # of words that were cut off
        for place, word in reversed(list(enumerate(one.word_ids()))):  # a word's first token counts
            if word is not None:
                tags[word] = model.config.id2label[numbers[place]]
        said.append({"prediction": tags})
    return said


def _answers(
    model: Any, tokenizer: Any, rows: list[Row], origins: list[str], max_length: int, generation: Any
) -> list[dict[str, Any]]:
    said = []
    for row, origin in zip(rows, origins, strict=True):
        question, context = _needed(row, "question", origin), _needed(row, "context", origin)
        pieces = tokenizer(
            question.strip(), context, truncation="only_second", max_length=max_length,
            stride=max_length // STRIDE_SHARE, return_overflowing_tokens=True, return_offsets_mapping=True,
        )  # fmt: skip
        count = len(pieces["input_ids"])
        found = _logits(model, tokenizer, [{name: pieces[name][number] for name in pieces} for number in range(count)])
        offsets = [
            [
                list(at) if part == 1 else [-1, -1]
                for at, part in zip(pieces["offset_mapping"][n], pieces.sequence_ids(n), strict=True)
            ]
            for n in range(count)
        ]
        [(score, text, nothing)] = best_answers(
            [context], [0] * count, offsets, found.start_logits.float().cpu().numpy(),
            found.end_logits.float().cpu().numpy(),
        )  # fmt: skip
        said.append({"prediction": text, "no_answer": bool(nothing > score)})
    return said


def _rewards(
    model: Any, tokenizer: Any, rows: list[Row], origins: list[str], max_length: int, generation: Any
) -> list[dict[str, Any]]:
    encoded = []
    for row, origin in zip(rows, origins, strict=True):
        example = to_example(row, "preference", origin)
        for name in ("chosen", "rejected"):
            whole = example.get("prompt", example[name][:0]) + example[name]
            if isinstance(whole, str):
                end = tokenizer.eos_token or ""
                ids = tokenizer(whole if whole.endswith(end) else whole + end)
            else:
                ids = tokenizer.apply_chat_template(whole, tokenize=True, return_dict=True)
            if len(ids["input_ids"]) > max_length:
                raise DataError(f"{origin}: {name}: longer than data.max_length {max_length}")
            encoded.append(ids)
    values = _logits(model, tokenizer, encoded).logits.float()[:, 0].tolist()
    pairs = zip(values[::2], values[1::2], strict=True)
    return [{"prediction": {"chosen": round(a, 6), "rejected": round(b, 6)}} for a, b in pairs]


def _texts(
    model: Any, tokenizer: Any, rows: list[Row], origins: list[str], max_length: int, generation: Any
) -> list[dict[str, Any]]:
    prompts = [
        tokenizer(_needed(row, "source", origin), truncation=True, max_length=max_length)["input_ids"]
        for row, origin in zip(rows, origins, strict=True)
    ]
    return [{"prediction": text} for text in answer_prompts(model, tokenizer, prompts, generation)]


Answers = Callable[[Any, Any, list[Row], list[str], int, Any], list[dict[str, Any]]]
ANSWERS: dict[str, Answers] = {
    "classification": _labels, "token_classification": _tags, "qa": _answers, "reward": _rewards, "seq2seq": _texts,
}  # fmt: skip
