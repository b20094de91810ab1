"""The rows of sources, in one shape, each knowing where it came from; and mixtures of them.

Every row becomes ``{"row": its columns as JSON, "format": ..., "origin": "train.jsonl, line 3"}``, so that
sources of any kind can be mixed, split and shuffled before they are tokenised. Which rows a source has is found in
:mod:`hift_ds.data.sources`.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hift_ds.data import llama_factory
from hift_ds.data.config import DataConfig
from hift_ds.data.formats import detect_format, guess_columns, present, rename, with_open_answer
from hift_ds.data.sources import Source, files_of, raw_rows, resolve
from hift_ds.data.task_rows import TASK_FORMATS, guess_task_columns
from hift_ds.errors import ConfigError, DataError, HiFTError

if TYPE_CHECKING:
    from datasets import Dataset, Features


def iterate_rows(source: Source, *, answered: bool = True) -> Iterator[dict[str, str]]:
    """The rows of one source, in order, as described at the top of this file.

    Args:
        answered: they must have answers; else questions alone are rows too.

    Raises:
        DataError: as :func:`load_rows`, when the bad row is reached.
    """
    source = resolve(source)
    format, columns = source.format, source.columns
    count = 0
    for count, (row, origin) in enumerate(raw_rows(source), start=1):
        if not isinstance(row, Mapping):
            raise DataError(f"{origin}: expected an object with named columns, got {type(row).__name__}")
        if source.tags is not None:
            row = source.tags.apply(row)
        if count == 1:
            _check_columns(row, source, origin)
            columns = columns or _guess(row, format)
        whole = rename(row, columns)
        whole = whole if answered else with_open_answer(present(whole))
        row = present(whole)
        format = format or detect_format(set(row), origin, set(whole))
        try:
            text = json.dumps(row, ensure_ascii=False, default=_as_json)
            text.encode()
        except UnicodeEncodeError:  # half of a surrogate pair, which JSON can write and UTF-8 cannot
            text = json.dumps(row, default=_as_json)
        yield {"row": text, "format": format, "origin": origin}
        if count == source.max_samples:
            return
    if count == 0:
        raise DataError(f"{source.key}: no rows in {source.path!r}")


def _as_json(value: Any) -> Any:
    """A value of a table that JSON has no form for. Old writers of parquet store texts as bytes without saying so."""
    if not isinstance(value, bytes):
        return str(value)
    try:
        return value.decode("utf-8")
    except UnicodeDecodeError:
        return {"bytes": len(value)}  # no text, whatever column it is in


def _check_columns(row: Mapping[str, Any], source: Source, origin: str) -> None:
    for ours, theirs in source.columns.items():
        if theirs not in row:
            raise DataError(
                f"{origin}: data.columns.{ours}: no column {theirs!r}; found columns: {', '.join(row) or 'none'}"
            )


def _guess(row: Mapping[str, Any], format: str | None) -> dict[str, str]:
    if format is None:
        return guess_columns(row)
    return guess_task_columns(row, format) if format in TASK_FORMATS else {}


def guessed(source: Source) -> str | None:
    """How the columns of a source are read, if that is a guess; in words. Reads one row."""
    source = resolve(source)
    row: Any = next(iter(raw_rows(source)), (None, ""))[0]
    if source.tags is not None and (named := [name for name in source.tags.not_read if name in row]):
        return f"{source.path}: {', '.join(named)} not read, since {llama_factory.FILE} does not name it as a column"
    if source.columns or source.tags is not None or not isinstance(row, Mapping):
        return None
    columns = _guess(row, source.format)
    if not columns:
        return None
    theirs, ours = ", ".join(columns.values()), ", ".join(columns)
    return f"{source.path}: columns {theirs} read as {ours} (a guess; set data.columns to say otherwise)"


def load_rows(sources: list[Source]) -> Dataset:
    """All rows of the sources, one after the other; on disk (the cache of ``datasets``), not in memory.

    Returns:
        Columns ``row``, ``format``, ``origin``, all texts.

    Raises:
        DataError: a source is missing, empty or malformed; names the file and line.
    """
    from datasets import Dataset, concatenate_datasets
    from datasets.exceptions import DatasetGenerationError

    features = row_features()
    parts = []
    for source in sources:
        kwargs = {
            "source": source,
            "stamp": f"{_stamp(source)} {code_stamp()}",
        }  # the stamp makes the cache notice edits
        with cache_in_use():
            try:
                part = Dataset.from_generator(generate_rows, gen_kwargs=kwargs, features=features)
            except DatasetGenerationError as error:
                if isinstance(error.__cause__, (HiFTError, OSError)):
                    raise error.__cause__ from None
                raise
        parts.append(part)
    return concatenate_datasets(parts) if len(parts) > 1 else parts[0]


def row_features() -> Features:
    """``datasets``' description of a row."""
    from datasets import Features, Value

    return Features({"row": Value("string"), "format": Value("string"), "origin": Value("string")})


def generate_rows(source: Source, stamp: str) -> Iterator[dict[str, str]]:
    """The rows of one source, for a cache whose key changes with ``stamp``."""
    del stamp  # only there for the cache's key
    yield from iterate_rows(source)


def _stamp(source: Source) -> list[tuple[str, int, int]]:
    return [(str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in files_of(source)]


def code_stamp() -> str:
    """A checksum of this folder's code: cached rows and tokens of other code must not be used."""
    digest = hashlib.sha256()
    for file in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(file.read_bytes())
    return digest.hexdigest()[:16]


def load_mixture(sources: list[Source]) -> Dataset:
    """The rows that :func:`load_rows` gives, with a column ``source``: the index of the source that a row is of."""
    from datasets import concatenate_datasets

    parts = [load_rows([source]) for source in sources]
    return concatenate_datasets([part.add_column("source", [index] * len(part)) for index, part in enumerate(parts)])


def mix(rows: Dataset, weights: list[float], seed: int) -> Dataset:
    """Rows in proportion to ``weights``: the source with the most rows for its weight is there once, the others
    are repeated, whole and then a part drawn with ``seed``.

    Args:
        rows: from :func:`load_mixture`, or some of them.
        weights: of each source by its index; above 0.
    """
    import numpy as np

    source = np.asarray(rows.with_format("numpy")["source"][:])
    members = [np.flatnonzero(source == index) for index in range(len(weights))]
    most = max(len(indices) / weight for indices, weight in zip(members, weights, strict=True))
    generator = np.random.default_rng(seed)
    chosen = []
    for indices, weight in zip(members, weights, strict=True):
        if len(indices):
            times, more = divmod(max(round(weight * most), 1), len(indices))
            chosen += [indices] * times + [np.sort(generator.permutation(indices)[:more])]
    return rows.select(np.concatenate(chosen))


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
        train_rows, eval_rows = hold_out(train_rows, config.val_size, config.seed)
    if weighted:  # after the split: no held-out row is trained on
        train_rows = mix(train_rows, [1.0 if weight is None else weight for weight in weights], config.seed)
    return train_rows, eval_rows


def hold_out(rows: Dataset, val_size: float, seed: int) -> tuple[Dataset, Dataset]:
    """Rows to train on and rows held out, drawn by ``seed``.

    Args:
        val_size: a share of the rows below 1, else their number.

    Raises:
        DataError: nothing would be left.
    """
    size = int(val_size) if val_size >= 1 else max(1, round(val_size * len(rows)))
    if size >= len(rows):
        raise DataError(f"data.val_size: {val_size:g} holds out {size} rows, but data.train has only {len(rows)}")
    parts = rows.train_test_split(test_size=size, seed=seed, shuffle=True)
    return parts["train"], parts["test"]


@contextmanager
def cache_in_use() -> Iterator[None]:
    """Inside this block the cache of ``datasets`` is written to; an error says which folder that is.

    Raises:
        ConfigError: the folder cannot be made or written, or the disk is full.
    """
    import datasets

    folder = Path(datasets.config.HF_DATASETS_CACHE)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
        yield
    except OSError as error:
        reason = error.strerror or " ".join(str(error).split())
        raise ConfigError(
            f"the cache of prepared data, {str(folder)!r}, cannot be written: {reason[:200]}; set the "
            "environment variable HF_DATASETS_CACHE to a folder that can"
        ) from error
