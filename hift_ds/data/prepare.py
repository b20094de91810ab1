"""From sources to the token datasets that a trainer takes.

sources (sources) -> rows (rows) -> samples (formats) -> token ids and labels (encoding) -> cut to
length (row_tokens) -> packed (packing)

Every stage is stored in the cache of ``datasets`` (``HF_DATASETS_CACHE``), keyed by the files, the settings
and this code: of several processes let one come here first, and the others read what it made.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import TYPE_CHECKING, Any

from hift_ds.data import packing, stream
from hift_ds.data.chat_templates import set_chat_template
from hift_ds.data.config import DataConfig
from hift_ds.data.encoding import Encoder
from hift_ds.data.row_tokens import (
    DataReport,
    Tokenize,
    check_refusals,
    check_vocabulary,
    count_rows,
    nothing_to_learn,
)
from hift_ds.data.rows import cache_in_use, code_stamp, guessed, hold_out, load_rows, load_splits
from hift_ds.errors import DataError

if TYPE_CHECKING:
    import numpy as np
    from datasets import Dataset
    from torch import Tensor
    from transformers import EvalPrediction, PreTrainedTokenizerBase

    from hift_ds.data.task_data import TaskReport


@dataclass(frozen=True)
class PreparedData:
    """Datasets with what the task's trainer takes (language models: ``input_ids`` and ``labels``, when packed
    ``seq_lengths``), and what batches them; None: the trainer's own."""

    train: Dataset | stream.Stream
    eval: Dataset | None
    collator: Callable[[list[dict[str, Any]]], Mapping[str, Tensor]] | None
    template: str
    reports: tuple[DataReport | TaskReport, ...]
    score: Callable[[EvalPrediction], dict[str, float]] | None = None
    """What makes scores of the predictions of ``eval``; a Trainer's ``compute_metrics``."""
    model_options: Mapping[str, Any] = field(default_factory=dict)
    """Entries of the model's config that the data decide: its labels."""

    @property
    def is_streamed(self) -> bool:
        """True if ``train`` has no length; its report is of the first rows."""
        return isinstance(self.train, stream.Stream)

    @property
    def num_rows(self) -> int | None:
        """The rows of ``train`` as its trainer takes them; None where they are streamed."""
        return None if isinstance(self.train, stream.Stream) else len(self.train)

    @property
    def tokens_per_row(self) -> float:
        """The mean length of a row; where they are streamed, of the first ones."""
        report = self.reports[0]
        if not isinstance(self.train, stream.Stream):
            return float(report.tokens / len(self.train))
        return float(self.train.tokenize.max_length if self.train.pack else report.tokens / report.num_samples)


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


def prepare_stream(
    config: DataConfig,
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    vocab_size: int | None = None,
    rank: int = 0,
    world_size: int = 1,
) -> PreparedData:
    """Prepare data as :func:`prepare_data` does, with ``train`` a :class:`~hift_ds.data.stream.Stream`; ``data.eval``
    is prepared as a whole. What is counted are the first rows.

    Raises:
        DataError: data is missing, or one of the first rows is malformed, or there is nothing to learn in them.
        ConfigError: no such chat template.
    """
    template = set_chat_template(tokenizer, config.template)
    sources = config.train_sources()
    tokenize = Tokenize(Encoder(tokenizer, config.train_on_prompt, config.mask_history), max_length, config.truncation)
    train = stream.Stream(
        sources, tokenize, config.shuffle_buffer if config.shuffle else 0, config.seed, config.packing, vocab_size,
        rank, world_size,
    )  # fmt: skip
    report = count_rows(islice(train.one_pass(0, 0), stream.COUNTED_ROWS), tokenize)
    check_refusals("train", report.num_refused, report.first_refusal, report.num_rows)
    if not report.num_samples:
        raise nothing_to_learn("train", report.num_dropped, report.num_dropped, tokenize)
    is_all = report.num_rows < stream.COUNTED_ROWS
    name = "train, streamed" if is_all else f"train, streamed; of its first {report.num_rows:,} rows"
    reports = [replace(report, name=name, notes=tuple(filter(None, map(guessed, sources))))]
    evaluated = None
    if config.eval is not None:
        evaluated, held_out = prepare_eval(config, tokenizer, max_length, vocab_size)
        reports.append(held_out)
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
        rows = hold_out(load_rows(config.train_sources()), config.val_size, config.seed)[1]
    else:
        raise DataError("nothing is held out: data.eval and data.val_size are both empty; name a file to evaluate on")
    encoder = Encoder(tokenizer, config.train_on_prompt, config.mask_history)
    tokenize = Tokenize(encoder, max_length, config.truncation, code_stamp())
    with cache_in_use():
        return _prepare_one("eval", rows, tokenize, config, vocab_size)


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


def _remarks(samples: Dataset) -> tuple[tuple[str, int], ...]:
    import pyarrow.compute as pc

    counts = pc.value_counts(pc.list_flatten(samples.data.column("remarks")))
    return tuple((entry["values"].as_py(), entry["counts"].as_py()) for entry in counts)


def _lengths_and_largest_id(samples: Dataset) -> tuple[np.ndarray, int]:
    import numpy as np
    import pyarrow.compute as pc

    chunks = samples.data.column("input_ids").chunks
    lengths = np.concatenate([pc.list_value_length(chunk).to_numpy(zero_copy_only=False) for chunk in chunks])
    return lengths, max(pc.max(pc.list_flatten(chunk)).as_py() or 0 for chunk in chunks)
