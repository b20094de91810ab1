"""Questions whose answer is a part of a text."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from hift_ds.data import scores
from hift_ds.data.prepare import PreparedData
from hift_ds.data.rows import code_stamp
from hift_ds.data.task_data import Preparation, TaskReport, lengths, right_padded
from hift_ds.data.task_rows import Example
from hift_ds.errors import ConfigError, DataError

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import EvalPrediction, PreTrainedTokenizerBase

STRIDE_SHARE = 3  # of a long context for questions, neighbouring pieces share the third part of max_length
N_BEST = 20  # starts and ends of answers that are combined
LONGEST_ANSWER = 30  # tokens


def question_data(how: Preparation, format: str) -> PreparedData:
    """Questions whose answer is a part of a context, which is cut into overlapping pieces where it is long.

    Raises:
        ConfigError: the tokenizer does not say where in the text a token is.
    """
    if not how.tokenizer.is_fast:
        raise ConfigError("model.tokenizer: task qa needs a fast tokenizer (a tokenizer.json)")
    train, evaluated, notes = how.examples(format)
    tokenize = TokenizeQuestions(right_padded(how), how.max_length, code_stamp())
    parts, reports = [], []
    for name, rows in (("train", train), ("eval", evaluated)):
        if rows is None:
            continue
        part = how.mapped(
            rows, tokenize, batched=True, batch_size=200, with_indices=True, remove_columns=rows.column_names
        )
        empty = sum(not json.loads(text)["texts"] for text in rows["example"])
        told = [f"{len(part):,} pieces of at most {how.max_length:,} tokens"]
        told += [f"{empty:,} questions without an answer"] if empty else []
        reports.append(TaskReport(name, len(rows), (*told, *(notes if name == "train" else ())), *lengths(part)))
        parts.append(part)
    score = None
    if evaluated is not None:
        score = AnswerScores([json.loads(text) for text in evaluated["example"]], parts[1])
        parts[1] = parts[1].remove_columns(["offsets", "example"])
    from transformers import DataCollatorWithPadding

    return PreparedData(
        parts[0].remove_columns(["offsets", "example"]), parts[1] if evaluated is not None else None,
        DataCollatorWithPadding(right_padded(how)), "none", tuple(reports), score=score,
    )  # fmt: skip


@dataclass(frozen=True)
class TokenizeQuestions:
    """Examples -> pieces with ``start_positions`` and ``end_positions`` of the first answer (the first token of a piece
    that does not hold all of it), ``offsets`` of the context's tokens and the number of their ``example``."""

    tokenizer: PreTrainedTokenizerBase
    max_length: int
    stamp: str

    def __call__(self, batch: dict[str, list[str]], indices: list[int]) -> dict[str, list[Any]]:
        out: dict[str, list[Any]] = {}
        for text, index in zip(batch["example"], indices, strict=True):
            example = json.loads(text)
            for row, offsets in context_pieces(
                self.tokenizer, example["question"], example["context"], self.max_length
            ):
                begin, end = _answer_tokens(offsets, example["context"], example["texts"][:1], example["starts"][:1])
                row |= {"start_positions": begin, "end_positions": end, "offsets": offsets, "example": index}
                for name, value in row.items():
                    out.setdefault(name, []).append(value)
        return out


def context_pieces(
    tokenizer: PreTrainedTokenizerBase, question: str, context: str, max_length: int
) -> list[tuple[dict[str, Any], list[list[int]]]]:
    """A question with each piece of its context that fits beside it.

    Returns:
        The tokenizer's columns of each piece, and where its tokens are in the context: (-1, -1) of the question's and
        of special tokens.

    Raises:
        DataError: the question alone is too long.
    """
    try:
        pieces = tokenizer(
            question.strip(), context, truncation="only_second", max_length=max_length,
            stride=max_length // STRIDE_SHARE, return_overflowing_tokens=True, return_offsets_mapping=True,
        )  # fmt: skip
    except Exception:  # the tokenizer's own words are about numbers that nobody here has given
        raise DataError(
            f"data.max_length: {max_length} leaves no room for a context beside the question "
            f"{question[:60]!r}; raise it"
        ) from None
    columns = [name for name in pieces if name not in ("offset_mapping", "overflow_to_sample_mapping")]
    return [
        (
            {name: pieces[name][number] for name in columns},
            [
                list(offset) if part == 1 else [-1, -1]
                for offset, part in zip(pieces["offset_mapping"][number], pieces.sequence_ids(number), strict=True)
            ],
        )
        for number in range(len(pieces["input_ids"]))
    ]


def _answer_tokens(offsets: list[list[int]], context: str, texts: list[str], starts: list[int]) -> tuple[int, int]:
    """First and last token of the answer; (0, 0) if this piece has not all of it."""
    if not texts:
        return 0, 0
    begin, end = starts[0], starts[0] + len(texts[0])
    places = [place for place, (low, _) in enumerate(offsets) if low >= 0]
    inside = [place for place in places if offsets[place][0] < end and offsets[place][1] > begin]
    if not inside:
        return 0, 0
    # White space, accents and what else a tokenizer leaves out may stand at the answer's ends. Where the piece has a
    # token before and behind them nothing of the answer is in another piece.
    first, last = offsets[inside[0]][0], offsets[inside[-1]][1]
    is_cut = (first > begin and inside[0] == places[0] and context[begin:first].strip()) or (
        last < end and inside[-1] == places[-1] and context[last:end].strip()
    )
    return (0, 0) if is_cut else (inside[0], inside[-1])


@dataclass(frozen=True)
class AnswerScores:
    """Logits of the starts and ends of answers in each piece -> the best answer to each question -> scores.

    Attributes:
        examples: question, context, texts, starts.
        pieces: their pieces, in the order of the predictions.
    """

    examples: list[Example]
    pieces: Dataset

    def __call__(self, prediction: EvalPrediction) -> dict[str, float]:
        found = best_answers(
            [example["context"] for example in self.examples], self.pieces["example"], self.pieces["offsets"],
            *prediction.predictions[:2],
        )  # fmt: skip
        may_be_empty = any(not example["texts"] for example in self.examples)
        given = ["" if may_be_empty and nothing > score else text for score, text, nothing in found]
        return scores.answer_scores(given, [example["texts"] for example in self.examples])


def best_answers(
    contexts: Sequence[str], indices: Iterable[int], offsets: Iterable[Any], starts: Any, ends: Any
) -> list[tuple[float, str, float]]:
    """The best answer to each context: its score, its text, and the score of "no answer".

    Args:
        indices: of each piece, the number of its context.
        offsets: of each piece, where its tokens are in the context; (-1, -1) of other tokens.
        starts: of each piece, its tokens' logits to begin an answer.
        ends: the same, to end one.
    """
    best: list[tuple[float, str]] = [(-np.inf, "")] * len(contexts)
    nothing = [np.inf] * len(contexts)
    for index, places, start, end in zip(indices, offsets, starts, ends, strict=True):
        nothing[index] = min(nothing[index], float(start[0] + end[0]))
        for score, low, high in _spans(np.asarray(start), np.asarray(end), places):
            if score > best[index][0]:
                best[index] = (score, contexts[index][low:high])
    return [(score, text, none) for (score, text), none in zip(best, nothing, strict=True)]


def _spans(start: np.ndarray, end: np.ndarray, offsets: list[list[int]]) -> list[tuple[float, int, int]]:
    """(score, first letter, end) of what may be an answer."""
    inside = np.array([low >= 0 for low, _ in offsets])
    places = np.flatnonzero(inside)
    firsts = places[np.argsort(-start[places], kind="stable")[:N_BEST]]
    lasts = places[np.argsort(-end[places], kind="stable")[:N_BEST]]
    return [
        (float(start[a] + end[b]), offsets[a][0], offsets[b][1])
        for a in firsts for b in lasts
        if a <= b < a + LONGEST_ANSWER
    ]  # fmt: skip
