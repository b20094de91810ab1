"""What one row becomes: token ids and labels, cut to length; and what became of many, counted.

A whole data set is made so in :mod:`hift_ds.data.prepare`, what is read in training in :mod:`hift_ds.data.stream`.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from typing import Any

from hift_ds.data.encoding import Encoded, Encoder
from hift_ds.data.formats import to_sample
from hift_ds.data.packing import IGNORED
from hift_ds.data.rendering import Refused
from hift_ds.data.rows import guessed, iterate_rows
from hift_ds.data.sources import Source
from hift_ds.data.text_columns import from_json, has_halves
from hift_ds.errors import DataError

MOST_REFUSED = 0.1
"""Rows that may be passed over because the chat template refuses them; with more than this share of them it is the
template that is wrong, not the rows."""
READ_HALVES = "half of a surrogate pair is read as U+FFFD"
_HALF_IN_TEXT_OF_JSON = re.compile(r"\\\\ud[89a-f]", re.IGNORECASE)


@dataclass(frozen=True)
class DataReport:
    """What became of one dataset's rows. ``tokens`` and ``learned_tokens`` count what is trained on per
    epoch."""

    name: str
    num_rows: int
    num_samples: int
    num_packed_rows: int | None
    num_truncated: int
    cut_tokens: int
    num_dropped: int
    tokens: int
    learned_tokens: int
    longest_tokens: int
    max_length: int
    remarks: tuple[tuple[str, int], ...] = ()
    """What looks like a mistake in rows (an empty answer, tools that the template does not print), and in how
    many samples."""

    notes: tuple[str, ...] = ()
    """What was guessed of the sources, and whether these are all rows."""

    num_refused: int = 0
    """Rows passed over: the chat template refuses them, or they have no answer."""

    first_refusal: str = ""

    def __str__(self) -> str:
        parts = [
            f"{self.name}: {self.num_samples:,} samples of {self.num_rows:,} rows",
            f"{self.tokens:,} tokens, {self.learned_tokens / max(self.tokens, 1):.0%} of them learned",
            f"longest {self.longest_tokens:,}",
        ]
        if self.num_packed_rows is not None:
            filled = self.tokens / (self.num_packed_rows * self.max_length)
            parts.append(f"packed into {self.num_packed_rows:,} rows, {filled:.0%} full")
        if self.num_truncated:
            parts.append(
                f"{self.num_truncated:,} cut to data.max_length {self.max_length:,} ({self.cut_tokens:,} tokens lost)"
            )
        if self.num_dropped:
            parts.append(f"{self.num_dropped:,} dropped: nothing to learn within {self.max_length:,} tokens")
        if self.num_refused:
            parts.append(f"{self.num_refused:,} rows passed over (the first: {self.first_refusal})")
        parts += self.notes
        parts += [f"in {count:,} samples {remark}" for remark, count in self.remarks]
        return "; ".join(parts)


@dataclass(frozen=True)
class Tokenize:
    """Rows as ``load_rows`` makes them -> columns of samples; a function for ``Dataset.map(batched=True)``.

    Attributes:
        stamp: of the code, part of the cache's key.
    """

    encoder: Encoder
    max_length: int
    truncation: str
    stamp: str = ""

    def __call__(self, batch: dict[str, list[str]]) -> dict[str, list[Any]]:
        out: dict[str, list[Any]] = {
            name: [] for name in ("input_ids", "labels", "cut", "learned", "remarks", "refused")
        }
        for row, format, origin in zip(batch["row"], batch["format"], batch["origin"], strict=True):
            columns, halves = without_halves(row)
            sample = to_sample(columns, format, origin)
            try:
                found = self.encoder(sample, origin)
            except Refused as refusal:
                _append(out, Encoded([], []), [], [], 0, str(refusal))
                continue
            for encoded in found:
                said = halves or halves_in_columns(row, partial(self._text_of, encoded.ids))
                encoded = replace(encoded, remarks=(*encoded.remarks, *said))
                for ids, learned, cut in self._fit(encoded):
                    _append(out, encoded, ids, learned, cut)
        return out

    def _text_of(self, ids: list[int]) -> str:
        return str(self.encoder.tokenizer.decode(ids))

    def _fit(self, encoded: Encoded) -> Iterator[tuple[list[int], list[bool], int]]:
        """Pieces of at most ``max_length`` tokens, and how many tokens each has lost."""
        ids, learned, limit = encoded.ids, encoded.learned, self.max_length
        excess = max(len(ids) - limit, 0)
        if not excess:
            yield ids, learned, 0
        elif encoded.splittable:
            # Each piece begins with the last token of the one before it. What begins a sample is not
            # predicted: so every token of the text is, once, but the first.
            for begin in range(0, len(ids) - 1, limit - 1):
                yield ids[begin : begin + limit], learned[begin : begin + limit], 0
        elif self.truncation == "drop":
            yield [], [], len(ids)
        elif self.truncation == "keep_end":
            yield ids[excess:], learned[excess:], excess
        else:
            yield ids[:limit], learned[:limit], excess


def _append(
    out: dict[str, list[Any]], encoded: Encoded, ids: list[int], learned: list[bool], cut: int, refusal: str = ""
) -> None:
    """A piece of ``encoded``, as one more row of columns."""
    count = sum(learned[1:])  # the first token is never predicted, so it alone is nothing to learn
    labels = [token if flag else IGNORED for token, flag in zip(ids, learned, strict=True)]
    out["input_ids"].append(ids if count else [])
    out["labels"].append(labels if count else [])
    out["cut"].append(cut)
    out["learned"].append(count)
    out["remarks"].append(list(encoded.remarks))
    out["refused"].append(refusal)


def without_halves(row: str) -> tuple[Any, tuple[str, ...]]:
    """The columns of a row; where one has half of a surrogate pair, which JSON can write and no tokenizer takes, with
    U+FFFD in its place and a remark."""
    return from_json(row), (READ_HALVES,) if has_halves(row) else ()


def halves_in_columns(row: str, made: Callable[[], str]) -> tuple[str, ...]:
    """The remark of :func:`without_halves` where such a half stands in a column, or an argument of a call, that is a
    text of JSON itself.

    Args:
        made: gives what was made of the row, in which such columns are read.
    """
    return (READ_HALVES,) if _HALF_IN_TEXT_OF_JSON.search(row) and "\ufffd" in made() else ()


def count_source(source: Source, tokenize: Tokenize, num_rows: int | None = None) -> DataReport:
    """What becomes of the first ``num_rows`` rows of a source (None: of all), without the cache.

    Raises:
        DataError: the source is missing, or one of the rows is malformed.
    """
    report = count_rows(islice(iterate_rows(source), num_rows), tokenize)
    first = [f"the first {report.num_rows:,} rows"] if report.num_rows == num_rows else []
    return replace(
        report,
        name=source.path if source.name is None else f"{source.path}: {source.name}",
        notes=tuple(note for note in (*first, guessed(source)) if note),
    )


def count_rows(rows: Iterable[dict[str, str]], tokenize: Tokenize) -> DataReport:
    """What becomes of rows, without the cache.

    Raises:
        DataError: one of them is malformed.
    """
    lengths: list[int] = []
    learned: list[int] = []
    cut: list[int] = []
    remarks = Counter[str]()
    refused: list[str] = []
    num_rows = 0
    for row in rows:
        num_rows += 1
        out = tokenize({name: [value] for name, value in row.items()})
        lengths += map(len, out["input_ids"])
        learned += out["learned"]
        cut += out["cut"]
        refused += filter(None, out["refused"])
        remarks.update(remark for sample in out["remarks"] for remark in sample)
    return DataReport(
        name="",
        num_rows=num_rows,
        num_samples=sum(count > 0 for count in learned),
        num_packed_rows=None,
        num_truncated=sum(lost > 0 and count > 0 for lost, count in zip(cut, learned, strict=True)),
        cut_tokens=sum(lost for lost, count in zip(cut, learned, strict=True) if count),
        num_dropped=sum(count == 0 for count in learned) - len(refused),
        tokens=sum(lengths),
        learned_tokens=sum(learned),
        longest_tokens=max(lengths, default=0),
        max_length=tokenize.max_length,
        remarks=tuple(remarks.items()),
        num_refused=len(refused),
        first_refusal=refused[0] if refused else "",
    )


def check_refusals(name: str, num_refused: int, first: str, num_rows: int) -> None:
    """Raises DataError if more rows are refused than can be passed over."""
    if num_refused == 1 and num_rows == 1:
        raise DataError(first)
    if num_refused > MOST_REFUSED * num_rows:
        raise DataError(f"{first}; data.{name}: so with {num_refused:,} of {num_rows:,} rows; see data.template")


def check_vocabulary(largest_id: int, vocab_size: int) -> None:
    """Raises DataError if a token has no row in the model's embedding."""
    if largest_id >= vocab_size:
        raise DataError(
            f"model.tokenizer: makes token id {largest_id}, but the model has only {vocab_size} embeddings; "
            "it belongs to another model"
        )


def nothing_to_learn(name: str, num_samples: int, num_cut: int, tokenize: Tokenize) -> DataError:
    """The error for data of which no token is learned: ``num_cut`` of the samples were too long, or answers are
    empty."""
    if num_cut:
        return DataError(
            f"data.max_length: {tokenize.max_length} leaves nothing to learn in any of {num_samples} "
            f"{name} samples: "
            "the prompts alone are as long; raise it, or set data.train_on_prompt: true"
        )
    return DataError(
        f"data.{name}: nothing to learn in any of {num_samples} samples: the answers are empty, or marked as not to be "
        "learned"
    )
