"""Training data as users have it -> rows of one shape, each knowing where it came from.

Every row becomes ``{"row": its columns as JSON, "format": ..., "origin": "train.jsonl, line 3"}``, so that
sources of any kind can be mixed, split and shuffled before they are tokenised. JSON and CSV files are read
here, line by line: the readers of ``datasets`` turn texts that look like dates or numbers into dates or
numbers, and do not say which line is broken. Parquet and arrow files are read by pyarrow, without a copy in
the cache; saved datasets and the Hub by ``datasets``.

A table has one set of fields for all rows: where rows differ (the arguments of different functions), Arrow
fills what a row does not have with null. Those nulls are taken out again; a null that a line of JSON says
itself stays.
"""

from __future__ import annotations

import csv
import hashlib
import json
import re
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hift_ds.data.formats import check_format, detect_format, present, rename
from hift_ds.errors import ConfigError, DataError, unknown_key
from hift_ds.shipped import BUNDLED, find

if TYPE_CHECKING:
    from datasets import Dataset

HUB = "hub:"
_LINE_FORMATS = (".jsonl", ".ndjson", ".json", ".csv", ".tsv")
_COLUMN_FORMATS = (".parquet", ".arrow")
_ROWS_AT_ONCE = 1000
_SPLIT_WORDS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev", "eval"),
    "test": ("test", "testing"),
}


@dataclass(frozen=True)
class Source:
    """One entry of ``data.train`` or ``data.eval``.

    Attributes:
        key: of the run file, for messages.
        path: a local file or folder (that of ``bundled:NAME`` is in the package), or ``hub:owner/name``.
        split: of a folder or Hub data set.
        subset: of a Hub data set (its "config").
        format: a name of ``formats.FORMATS``; None: found from the columns.
        columns: our column name -> the name in the data.
        max_samples: rows to take from the beginning; None: all.
    """

    key: str
    path: str
    split: str = "train"
    subset: str | None = None
    format: str | None = None
    columns: Mapping[str, str] = field(default_factory=dict)
    max_samples: int | None = None


def parse_sources(value: Any, key: str, **defaults: Any) -> list[Source]:
    """The sources of a run file's entry: a path, an object with a path and more, or a list of these.

    Args:
        defaults: fields of :class:`Source` for entries that do not say otherwise.

    Raises:
        ConfigError: something else, or an unknown key or format.
    """
    if isinstance(value, list):
        sources = [source for entry in value for source in parse_sources(entry, key, **defaults)]
        if not sources:
            raise ConfigError(
                f"{key}: expected at least one file, folder or {HUB}owner/name, got an empty list"
            )
        return sources
    entry = {"path": value} if isinstance(value, str) else value
    if not isinstance(entry, Mapping) or not isinstance(entry.get("path"), str) or not entry["path"]:
        raise ConfigError(f"{key}: expected a path, an object with a path, or a list of these, got {value!r}")
    known = {"path": str, "split": str, "subset": str, "format": str, "columns": Mapping, "max_samples": int}
    for name, given in entry.items():
        if name not in known:
            raise unknown_key(str(name), known, key)
        if not isinstance(given, known[name]):
            raise ConfigError(f"{key}.{name}: expected {known[name].__name__.lower()}, got {given!r}")
    source = Source(key=key, **(defaults | dict(entry)))
    if source.path.startswith(BUNDLED):
        source = replace(source, path=str(find(source.path, "data")))
    check_format(source.format)
    return [source]


def check_source(source: Source) -> None:
    """Raises DataError if a local source is not there. Reads nothing."""
    local = Path(source.path).expanduser()
    if not source.path.startswith(HUB) and not local.exists():
        hint = (
            "" if local.is_absolute() else f"; a data set of the Hugging Face Hub is written {HUB}owner/name"
        )
        raise DataError(f"{source.key}: no such file or folder: {source.path!r}{hint}")


def load_rows(sources: list[Source]) -> Dataset:
    """All rows of the sources, one after the other; on disk (the cache of ``datasets``), not in memory.

    Returns:
        Columns ``row``, ``format``, ``origin``, all texts.

    Raises:
        DataError: a source is missing, empty or malformed; names the file and line.
    """
    from datasets import Dataset, Features, Value, concatenate_datasets
    from datasets.exceptions import DatasetGenerationError

    features = Features({"row": Value("string"), "format": Value("string"), "origin": Value("string")})
    parts = []
    for source in sources:
        kwargs = {
            "source": source,
            "stamp": f"{_stamp(source)} {code_stamp()}",
        }  # the stamp makes the cache notice edits
        with cache_in_use():
            try:
                part = Dataset.from_generator(_generate, gen_kwargs=kwargs, features=features)
            except DatasetGenerationError as error:
                if isinstance(error.__cause__, (DataError, OSError)):
                    raise error.__cause__ from None
                raise
        parts.append(part)
    return concatenate_datasets(parts) if len(parts) > 1 else parts[0]


@contextmanager
def cache_in_use() -> Iterator[None]:
    """For what writes to the cache of ``datasets``: says which folder that is, if it cannot be written.

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


def iterate_rows(source: Source) -> Iterator[dict[str, str]]:
    """The rows of one source, in order, as described at the top of this file.

    Raises:
        DataError: as :func:`load_rows`, when the bad row is reached.
    """
    format = source.format
    count = 0
    for count, (row, origin) in enumerate(_raw_rows(source), start=1):
        if not isinstance(row, Mapping):
            raise DataError(f"{origin}: expected an object with named columns, got {type(row).__name__}")
        if count == 1:
            _check_columns(row, source, origin)
        row = present(rename(row, source.columns))
        format = format or detect_format(set(row), origin)
        # surrogates: a lone half of a pair, which JSON can write and UTF-8 cannot
        text = json.dumps(row, ensure_ascii=False, default=str).encode("utf-8", "replace").decode("utf-8")
        yield {"row": text, "format": format, "origin": origin}
        if count == source.max_samples:
            return
    if count == 0:
        raise DataError(f"{source.key}: no rows in {source.path!r}")


def _check_columns(row: Mapping[str, Any], source: Source, origin: str) -> None:
    for ours, theirs in source.columns.items():
        if theirs not in row:
            raise DataError(
                f"{origin}: data.columns.{ours}: no column {theirs!r}; found columns: "
                f"{', '.join(row) or 'none'}"
            )


def code_stamp() -> str:
    """Changes when this folder's code does: cached rows and tokens of other code must not be used."""
    digest = hashlib.sha256()
    for file in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(file.read_bytes())
    return digest.hexdigest()[:16]


def _generate(source: Source, stamp: str) -> Iterator[dict[str, str]]:
    del stamp  # only there for the cache's key
    yield from iterate_rows(source)


def _stamp(source: Source) -> list[tuple[str, int, int]]:
    if source.path.startswith(HUB):
        return []
    files = [Path(source.path).expanduser()]
    files = sorted(files[0].rglob("*")) if files[0].is_dir() else files
    return [(str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in files if file.is_file()]


def _raw_rows(source: Source) -> Iterator[tuple[Any, str]]:
    if source.path.startswith(HUB):
        yield from _dataset_rows(_from_hub(source), source.path)
        return
    check_source(source)
    try:
        yield from _local_rows(source)
    except OSError as error:
        name = error.filename or source.path
        raise DataError(f"{source.key}: cannot read {str(name)!r}: {error.strerror or error}") from error


def _local_rows(source: Source) -> Iterator[tuple[Any, str]]:
    path = Path(source.path).expanduser()
    if path.is_dir() and (path / "state.json").is_file() and (path / "dataset_info.json").is_file():
        from datasets import load_from_disk

        yield from _dataset_rows(load_from_disk(str(path)), source.path)
        return
    for file in _files_of_split(path, source) if path.is_dir() else [path]:
        yield from _file_rows(file, source)


def _files_of_split(folder: Path, source: Source) -> list[Path]:
    """The folder's data files; where names say train, test or validation, only those of ``source.split``."""
    suffixes = (*_LINE_FORMATS, *_COLUMN_FORMATS)
    files = sorted(file for file in folder.iterdir() if file.suffix.lower() in suffixes)
    if not files:
        raise DataError(
            f"{source.key}: no data in folder {source.path!r}; expected files {', '.join(suffixes)}"
        )
    splits = {file: _split_in_name(file.name) for file in files}
    if any(splits.values()):
        wanted = [
            file for file, split in splits.items() if split == (_split_in_name(source.split) or source.split)
        ]
        if not wanted:
            raise DataError(
                f"{source.key}: no file of split {source.split!r} in {source.path!r}; "
                f"found {', '.join(file.name for file in files)}; set split or name one file"
            )
        return wanted
    return files


def _split_in_name(name: str) -> str | None:
    words = set(re.split(r"[^a-z]+", name.lower()))
    return next((split for split, spellings in _SPLIT_WORDS.items() if words.intersection(spellings)), None)


def _file_rows(file: Path, source: Source) -> Iterator[tuple[Any, str]]:
    suffix = file.suffix.lower()
    if suffix in _COLUMN_FORMATS:
        yield from _table_rows(file, source)
        return
    if suffix not in _LINE_FORMATS:
        expected = ", ".join((*_LINE_FORMATS, *_COLUMN_FORMATS))
        raise DataError(
            f"{source.key}: {str(file)!r}: unknown kind of file {suffix!r}; expected one of {expected}"
        )
    try:
        if suffix in (".csv", ".tsv"):
            yield from _csv_rows(file, "," if suffix == ".csv" else "\t")
        else:
            yield from _json_rows(file)
    except UnicodeDecodeError as error:
        raise DataError(f"{file}: not UTF-8 text: byte {error.start}: {error.reason}") from None


def _table_rows(file: Path, source: Source) -> Iterator[tuple[Any, str]]:
    """Of a parquet or arrow file, a part at a time; decoded as ``datasets`` decodes its own files."""
    from datasets import Dataset

    count = 0
    tables = _tables(file)
    while True:
        try:
            dataset = next((Dataset(table) for table in tables), None)
        except Exception as error:  # pyarrow's errors have no common base
            reason = " ".join(str(error).split())
            raise DataError(
                f"{source.key}: cannot read {str(file)!r} as {file.suffix[1:]}: {reason[:200]}"
            ) from error
        if dataset is None:
            return
        for row in dataset:
            count += 1
            yield _without_filling(row, dataset.features), f"{file}, row {count}"


def _tables(file: Path) -> Iterator[Any]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    if file.suffix.lower() == ".parquet":
        with pq.ParquetFile(file) as parquet:
            for batch in parquet.iter_batches(batch_size=_ROWS_AT_ONCE):
                yield pa.Table.from_batches([batch], schema=parquet.schema_arrow)
        return
    with pa.memory_map(str(file)) as mapped:
        try:
            reader = pa.ipc.open_stream(mapped)  # as datasets writes them
        except pa.ArrowInvalid:
            reader = pa.ipc.open_file(mapped)  # as pyarrow.feather and pandas do
            for index in range(reader.num_record_batches):
                yield pa.Table.from_batches([reader.get_batch(index)])
            return
        for batch in reader:
            yield pa.Table.from_batches([batch])


def _without_filling(value: Any, feature: Any) -> Any:
    """``value`` without the nulls that Arrow puts in place of absent fields.

    Args:
        feature: what ``datasets`` knows of its type. A ``Json`` value was stored as text and has no such
            nulls.
    """
    from datasets import LargeList, List

    if isinstance(feature, dict) and isinstance(value, dict):
        return {
            name: _without_filling(part, feature.get(name))
            for name, part in value.items()
            if part is not None
        }
    if isinstance(feature, (List, LargeList)) and isinstance(value, list):
        return [_without_filling(part, feature.feature) for part in value]
    return value


def _json_rows(file: Path) -> Iterator[tuple[Any, str]]:
    """One object a line, or one list of objects; the first character decides, not the file's name."""
    with file.open(encoding="utf-8-sig") as lines:
        if _first_character(file) == "[":
            try:
                rows = json.load(lines)
            except ValueError as error:
                raise DataError(
                    f"{file}, line {getattr(error, 'lineno', 1)}: not valid JSON: {error}"
                ) from None
            yield from ((row, f"{file}, row {number}") for number, row in enumerate(rows, start=1))
            return
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            origin = f"{file}, line {number}"
            try:
                row = json.loads(line)
            except ValueError as error:
                raise DataError(
                    f"{origin}: not valid JSON: {error}; expected one object on each line"
                ) from None
            yield row, origin


def _first_character(file: Path) -> str:
    with file.open(encoding="utf-8-sig") as text:
        while character := text.read(1):
            if not character.isspace():
                return character
    return ""


def _csv_rows(file: Path, delimiter: str) -> Iterator[tuple[Any, str]]:
    # Documents are longer than the 128 KiB that csv expects.
    csv.field_size_limit(min(sys.maxsize, 2**31 - 1))
    with file.open(encoding="utf-8-sig", newline="") as lines:
        reader = csv.DictReader(lines, delimiter=delimiter, strict=True)
        try:
            for row in reader:
                origin = f"{file}, line {reader.line_num}"
                if None in row or None in row.values():
                    raise DataError(
                        f"{origin}: expected {len(reader.fieldnames or [])} fields as in the first line"
                    )
                yield row, origin
        except csv.Error as error:
            raise DataError(f"{file}, line {reader.line_num}: not valid CSV: {error}") from None


def _dataset_rows(dataset: Any, name: str) -> Iterator[tuple[Any, str]]:
    if isinstance(dataset, dict):
        raise DataError(
            f"{name}: has splits {', '.join(dataset)}; set split, or give the path of one of them"
        )
    for number, row in enumerate(dataset, start=1):
        yield _without_filling(row, dataset.features), f"{name}, row {number}"


def _from_hub(source: Source) -> Any:
    from datasets import load_dataset

    name = source.path.removeprefix(HUB)
    try:
        return load_dataset(name, source.subset, split=source.split)
    except Exception as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise DataError(
            f"{source.key}: cannot load {source.path!r} (split {source.split!r}): {reason[:300]}"
        ) from error
