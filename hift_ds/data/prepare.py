"""From sources to the token datasets that a trainer takes.

rows (sources) -> samples (formats) -> token ids and labels (encoding) -> cut to length -> packed (packing)

Every stage is stored in the cache of ``datasets`` (``HF_DATASETS_CACHE``), keyed by the files, the settings
and this code: of several processes let one come here first, and the others read what it made.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import TYPE_CHECKING, Any

from hift_ds.data import packing
from hift_ds.data.chat_templates import set_chat_template
from hift_ds.data.config import DataConfig
from hift_ds.data.encoding import Encoded, Encoder
from hift_ds.data.formats import to_sample
from hift_ds.data.packing import IGNORED
from hift_ds.data.rendering import Refused
from hift_ds.data.sources import (
    Source,
    cache_in_use,
    code_stamp,
    guessed,
    iterate_rows,
    load_mixture,
    load_rows,
    mix,
)
from hift_ds.errors import DataError

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

MOST_REFUSED = 0.1
"""Rows that may be passed over because the chat template refuses them; with more than this share of them it is the
template that is wrong, not the rows."""


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
class PreparedData:
    """Datasets with what the task's trainer takes (language models: ``input_ids`` and ``labels``, when packed
    ``seq_lengths``), and what batches them; None: the trainer's own."""

    train: Any
    """A ``Dataset``, or a :class:`~hift_ds.data.stream.Stream`."""
    eval: Dataset | None
    collator: Any
    template: str
    reports: tuple[Any, ...]
    score: Any = None
    """What makes scores of the predictions of ``eval``; a Trainer's ``compute_metrics``."""
    model_options: Mapping[str, Any] = field(default_factory=dict)
    """Entries of the model's config that the data decide: its labels."""

    @property
    def is_streamed(self) -> bool:
        """``train`` has no length; its report is of the first rows."""
        return not hasattr(self.train, "__len__")

    @property
    def num_rows(self) -> int | None:
        """Of ``train`` as its trainer takes them; None where they are streamed."""
        return None if self.is_streamed else len(self.train)

    @property
    def tokens_per_row(self) -> float:
        """On average; where they are streamed, of the first ones."""
        report = self.reports[0]
        if not self.is_streamed:
            return float(report.tokens / len(self.train))
        return float(report.max_length if self.train.pack else report.tokens / report.num_samples)


def prepare_data(
    config: DataConfig,
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    vocab_size: int | None = None,
) -> PreparedData:
    """Read, tokenise, mask, cut and pack.

    Args:
        config: the run file's ``data`` section.
        tokenizer: from :func:`~hift_ds.data.tokenizers.load_tokenizer`; given the run's chat template here.
        max_length: tokens of the longest sample that training may see.
        vocab_size: rows of the model's embedding, to find a tokenizer of another model.

    Raises:
        DataError: data is missing, empty, malformed, or has nothing to learn.
        ConfigError: no such chat template.
    """
    template = set_chat_template(tokenizer, config.template)
    sources = config.train_sources()
    train_rows, eval_rows = load_splits(config, sources, config.eval_sources())
    tokenize = Tokenize(
        Encoder(tokenizer, config.train_on_prompt, config.mask_history),
        max_length,
        config.truncation,
        code_stamp(),
    )
    evaluated = None
    with cache_in_use():
        train, train_report = _prepare_one("train", train_rows, tokenize, config, vocab_size)
        reports = [replace(train_report, notes=tuple(filter(None, map(guessed, sources))))]
        if eval_rows is not None:
            evaluated, report = _prepare_one("eval", eval_rows, tokenize, config, vocab_size)
            reports.append(report)
    collator = packing.collator(tokenizer, packing=config.packing)
    return PreparedData(train, evaluated, collator, template, tuple(reports))


def prepare_eval(
    config: DataConfig,
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    vocab_size: int | None = None,
) -> tuple[Dataset, DataReport]:
    """The held-out part of :func:`prepare_data` alone, of the same rows: those of ``eval``, or ``val_size`` of
    ``train``.

    Raises:
        DataError: as :func:`prepare_data`, or nothing is held out.
        ConfigError: no such chat template.
    """
    set_chat_template(tokenizer, config.template)
    if config.eval is not None:
        rows = load_rows(config.eval_sources())
    elif config.val_size:
        rows = _hold_out(load_rows(config.train_sources()), config.val_size, config.seed)[1]
    else:
        raise DataError("nothing is held out: data.eval and data.val_size are both empty; name a file to evaluate on")
    encoder = Encoder(tokenizer, config.train_on_prompt, config.mask_history)
    tokenize = Tokenize(encoder, max_length, config.truncation, code_stamp())
    with cache_in_use():
        return _prepare_one("eval", rows, tokenize, config, vocab_size)


def load_splits(config: DataConfig, sources: list[Source], held_out: list[Source]) -> tuple[Dataset, Dataset | None]:
    """Rows to train on and to evaluate on, as :func:`load_rows` makes them: mixed by weight, ``val_size`` held out.

    Args:
        sources: of ``data.train``.
        held_out: of ``data.eval``; empty if there are none.

    Raises:
        DataError: as :func:`load_rows`; or ``val_size`` leaves nothing.
    """
    weights = [source.weight for source in sources]
    weighted = any(weight is not None for weight in weights)
    train_rows = load_mixture(sources) if weighted else load_rows(sources)
    eval_rows = load_rows(held_out) if held_out else None
    if config.val_size:
        train_rows, eval_rows = _hold_out(train_rows, config.val_size, config.seed)
    if weighted:  # after the split: no held-out row is trained on
        train_rows = mix(train_rows, [1.0 if weight is None else weight for weight in weights], config.seed)
    return train_rows, eval_rows


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
            columns, halves = _without_halves(row)
            sample = to_sample(columns, format, origin)
            try:
                found = self.encoder(sample, origin)
            except Refused as refusal:
                _append(out, Encoded([], []), [], [], 0, str(refusal))
                continue
            for encoded in found:
                encoded = replace(encoded, remarks=(*encoded.remarks, *halves))
                for ids, learned, cut in self._fit(encoded):
                    _append(out, encoded, ids, learned, cut)
        return out

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


_HALF = re.compile("[\ud800-\udfff]")  # pairs are one character once json has read them
_HALF_IN_JSON = re.compile(r"\\ud[89a-f]", re.IGNORECASE)


def _without_halves(row: str) -> tuple[Any, tuple[str, ...]]:
    """The columns of a row; where one has half of a surrogate pair, which JSON can write and no tokenizer takes, with
    U+FFFD in its place and a remark."""
    if not _HALF_IN_JSON.search(row):
        return json.loads(row), ()
    text = json.dumps(json.loads(row), ensure_ascii=False)
    whole = _HALF.sub("\ufffd", text)
    return json.loads(whole), ("half of a surrogate pair is read as U+FFFD",) if whole != text else ()


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


def _hold_out(rows: Dataset, val_size: float, seed: int) -> tuple[Dataset, Dataset]:
    size = int(val_size) if val_size >= 1 else max(1, round(val_size * len(rows)))
    if size >= len(rows):
        raise DataError(f"data.val_size: {val_size:g} holds out {size} rows, but data.train has only {len(rows)}")
    parts = rows.train_test_split(test_size=size, seed=seed, shuffle=True)
    return parts["train"], parts["test"]


def _prepare_one(
    name: str, rows: Dataset, tokenize: Tokenize, config: DataConfig, vocab_size: int | None
) -> tuple[Dataset, DataReport]:
    import numpy as np
    from datasets import Features, List, Value

    samples = rows.map(
        tokenize,
        batched=True,
        batch_size=200,
        num_proc=config.num_workers if config.num_workers > 1 else None,
        remove_columns=rows.column_names,
        features=Features(
            {
                "input_ids": List(Value("int32")),
                "labels": List(Value("int32")),
                "cut": Value("int32"),
                "learned": Value("int32"),
                "remarks": List(Value("string")),
                "refused": Value("string"),
            }
        ),
        desc=f"Tokenising {name} data",
    )
    cut = np.asarray(samples.with_format("numpy")["cut"][:])
    learned = np.asarray(samples.with_format("numpy")["learned"][:])
    kept = learned > 0
    refusals = [refusal for refusal in samples["refused"][:] if refusal]
    first_refusal = refusals[0] if refusals else ""
    check_refusals(name, len(refusals), first_refusal, len(rows))
    if not kept.any():
        raise nothing_to_learn(name, len(kept), int((cut > 0).sum()), tokenize)
    lengths, largest_id = _lengths_and_largest_id(samples)
    if vocab_size is not None:
        check_vocabulary(largest_id, vocab_size)
    if not kept.all():
        samples = samples.select(np.flatnonzero(kept))
    dataset = samples.select_columns(["input_ids", "labels"])
    packed = config.packing and name == "train"
    if packed:
        dataset = packing.pack(dataset.shuffle(seed=config.seed) if config.shuffle else dataset, tokenize.max_length)
    report = DataReport(
        name=name,
        num_rows=len(rows),
        num_samples=int(kept.sum()),
        num_packed_rows=len(dataset) if packed else None,
        num_truncated=int(((cut > 0) & kept).sum()),
        cut_tokens=int(cut[kept].sum()),
        num_dropped=int((~kept).sum()) - len(refusals),
        tokens=int(lengths.sum()),
        learned_tokens=int(learned.sum()),
        longest_tokens=int(lengths.max()),
        max_length=tokenize.max_length,
        remarks=_remarks(samples),
        num_refused=len(refusals),
        first_refusal=first_refusal,
    )
    return dataset, report


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


def _remarks(samples: Dataset) -> tuple[tuple[str, int], ...]:
    import pyarrow.compute as pc

    counts = pc.value_counts(pc.list_flatten(samples.data.column("remarks")))
    return tuple((entry["values"].as_py(), entry["counts"].as_py()) for entry in counts)


def _lengths_and_largest_id(samples: Dataset) -> tuple[Any, int]:
    import numpy as np
    import pyarrow.compute as pc

    chunks = samples.data.column("input_ids").chunks
    lengths = np.concatenate([pc.list_value_length(chunk).to_numpy(zero_copy_only=False) for chunk in chunks])
    return lengths, max(pc.max(pc.list_flatten(chunk)).as_py() or 0 for chunk in chunks)


def nothing_to_learn(name: str, num_samples: int, num_cut: int, tokenize: Tokenize) -> DataError:
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
