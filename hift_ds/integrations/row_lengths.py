"""Rows that are longer than a model's table of positions, found before the first step: the lookup would fail when such
a row's turn comes, hours later or in the first evaluation."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import nn

from hift_ds.checkpoint.random_state import random_state, set_random_state
from hift_ds.errors import ConfigError
from hift_ds.hf.model_folder import max_sequence_length

_SPECIAL_ROWS = 8  # at most, which a table has besides those of the positions (OPT's two, RoBERTa's two)


def check_rows(name: str, dataset: Any, collate: Callable[[list[Any]], Any], model: Any) -> None:
    """See that the longest rows of a data set, made into a batch as in training, fit the table of positions.

    Only what is cheap to know is looked at: the columns of ids of a ``datasets.Dataset``, or a list of dicts.

    Args:
        name: of the data set, for the message.

    Raises:
        ConfigError: one does not.
    """
    limit = learned_positions(model)
    if limit is None:
        return
    for index in _longest_rows(dataset):
        with _generators_kept():
            try:
                batch = collate([dataset[index]])
            except Exception:  # training will say so, if that row is ever met
                return
        length = _positions_used(batch, bool(getattr(model.config, "is_encoder_decoder", False)))
        if length > limit:
            raise ConfigError(
                f"{name}: row {index} has {length:,} tokens, and the model's table has {limit:,} positions: cut rows "
                f"to {limit:,} tokens, or leave longer ones out"
            )


def learned_positions(model: Any) -> int | None:
    """Tokens that the table of positions has rows for; ``None`` without one (rotary positions are computed)."""
    config = getattr(model, "config", None)
    limit = max_sequence_length(config.to_dict()) if config is not None and hasattr(config, "to_dict") else None
    if limit is None:
        return None
    tables = (
        module
        for path, module in model.named_modules()
        if isinstance(module, nn.Embedding) and ("pos" in path.rpartition(".")[2] or path.endswith("wpe"))
    )
    return limit if any(limit <= table.num_embeddings <= limit + _SPECIAL_ROWS for table in tables) else None


def _longest_rows(dataset: Any) -> list[int]:
    """Those among which the longest is, whichever columns of ids a collator puts together."""
    lengths = _lengths(dataset)
    sums = [*lengths, *(a + b for a, b in itertools.combinations(lengths, 2))]
    return sorted({int(one.argmax()) for one in sums})


def _lengths(dataset: Any) -> list[np.ndarray]:
    """The length of each column of ids in each row; empty where the rows would have to be made for it."""
    if isinstance(dataset, list | tuple):
        if not dataset or not isinstance(dataset[0], Mapping):
            return []
        # A label may be a tensor without a dimension, whose ``len`` is an error.
        names = [
            n for n, v in dataset[0].items() if _has_ids(n) and hasattr(v, "__len__") and getattr(v, "ndim", 1) > 0
        ]
        return [np.array([len(row[name]) if name in row else 0 for row in dataset]) for name in names]
    if not hasattr(dataset, "with_format") or not getattr(dataset, "column_names", None) or not len(dataset):
        return []
    return _lengths_of_columns(dataset)


def _lengths_of_columns(dataset: Any) -> list[np.ndarray]:
    import pyarrow as pa
    import pyarrow.compute as pc

    found: dict[str, list[np.ndarray]] = {}
    names = [name for name in dataset.column_names if _has_ids(name)]
    rows = dataset.with_format("arrow", columns=names) if names else dataset
    for table in rows.iter(batch_size=1000) if names else ():
        for name in names:
            if pa.types.is_list(table.schema.field(name).type) or pa.types.is_large_list(table.schema.field(name).type):
                lengths = pc.fill_null(pc.list_value_length(table[name]), 0)
                found.setdefault(name, []).append(lengths.to_numpy())
    return [np.concatenate(parts) for parts in found.values()]


def _has_ids(name: Any) -> bool:
    return isinstance(name, str) and (name == "labels" or (name.endswith("_ids") and name != "position_ids"))


def _positions_used(batch: Any, two_sides: bool) -> int:
    def width(name: str) -> int:
        value = batch.get(name) if hasattr(batch, "get") else None
        return value.shape[1] if isinstance(value, torch.Tensor) and value.ndim == 2 else 0

    given = batch.get("position_ids") if hasattr(batch, "get") else None
    if isinstance(given, torch.Tensor) and given.numel():  # packed rows begin anew
        return int(given.max()) + 1
    sides = ("input_ids", "decoder_input_ids", *(("labels",) if two_sides else ()))
    return max(map(width, sides))


@contextlib.contextmanager
def _generators_kept() -> Iterator[None]:
    """A collator may draw (masked tokens)."""
    on_host = torch.device("cpu")
    before = random_state(on_host)
    try:
        yield
    finally:
        set_random_state(before, on_host)
