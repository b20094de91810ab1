"""Rows of one file of data: JSON lines and lists, CSV, parquet, arrow, and documents as they are.

JSON and CSV files are read here, line by line: the readers of ``datasets`` turn texts that look like dates or
numbers into dates or numbers, and do not say which line is broken. Parquet and arrow files are read by pyarrow,
without a copy in the cache.

A table has one set of fields for all rows: where rows differ (the arguments of different functions), Arrow
fills what a row does not have with null. Those nulls are taken out again; a null that a line of JSON says
itself stays.
"""

from __future__ import annotations

import csv
import json
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from hift_ds.data.formats import FORMATS
from hift_ds.errors import DataError, keys_once

if TYPE_CHECKING:
    import pyarrow as pa
    from datasets.features.features import FeatureType

LINE_FORMATS = (".jsonl", ".ndjson", ".json", ".csv", ".tsv")
COLUMN_FORMATS = (".parquet", ".arrow")
DOCUMENT_FORMATS = (".txt", ".md")
_ROWS_AT_ONCE = 1000
_LARGEST_DOCUMENT = 64 * 2**20  # bytes; its tokens are made in memory at once
Documents = Literal["file", "paragraph", "line"]
"""What is one text in a file of plain text."""


def rows_of_file(file: Path, key: str, documents: Documents = "file") -> Iterator[tuple[Any, str]]:
    """The rows of a file, each with its place in words. A row of JSON may be any value; others have named columns.

    Args:
        key: of the run file, for messages.
        documents: what is one text in a .txt or .md file: all of it, what stands between blank lines, or a
            line.

    Raises:
        DataError: it is of an unknown kind, or broken; names the line.
    """
    suffix = file.suffix.lower()
    if suffix in COLUMN_FORMATS:
        yield from _table_rows(file, key)
        return
    if suffix not in LINE_FORMATS + DOCUMENT_FORMATS:
        expected = ", ".join(LINE_FORMATS + COLUMN_FORMATS + DOCUMENT_FORMATS)
        raise DataError(f"{key}: {str(file)!r}: unknown kind of file {suffix!r}; expected one of {expected}")
    try:
        if suffix in DOCUMENT_FORMATS:
            yield from _documents(file, key, documents)
        elif suffix in (".csv", ".tsv"):
            yield from _csv_rows(file, "," if suffix == ".csv" else "\t")
        else:
            yield from _json_rows(file)
    except UnicodeDecodeError as error:
        raise DataError(f"{file}: not UTF-8 text: byte {error.start}: {error.reason}") from None


def holds_text_alone(origin: str) -> bool:
    """Whether the row from ``origin`` is of a file that has no types: its numbers and lists are texts."""
    return origin.rpartition(", line ")[0].lower().endswith((".csv", ".tsv"))


def _documents(file: Path, key: str, documents: Documents) -> Iterator[tuple[dict[str, str], str]]:
    if documents == "file":
        if file.stat().st_size > _LARGEST_DOCUMENT:
            raise DataError(
                f"{key}: {str(file)!r} is one document of {file.stat().st_size / 2**20:,.0f} MiB; write it as "
                "several files, or say documents: paragraph, or line"
            )
        text = file.read_text(encoding="utf-8-sig")
        if text.strip():
            yield {"text": text}, str(file)
        return
    begin = 1
    lines: list[str] = []
    with file.open(encoding="utf-8-sig") as opened:
        for number, line in enumerate(opened, start=1):
            if documents == "line":
                if line.strip():
                    yield {"text": line.rstrip("\r\n")}, f"{file}, line {number}"
            elif line.strip():
                begin = begin if lines else number
                lines.append(line)
            elif lines:
                yield {"text": "".join(lines).rstrip("\r\n")}, f"{file}, line {begin}"
                lines = []
    if lines:
        yield {"text": "".join(lines).rstrip("\r\n")}, f"{file}, line {begin}"


def _table_rows(file: Path, key: str) -> Iterator[tuple[dict[str, Any], str]]:
    """The rows of a parquet or arrow file, a part at a time; decoded as ``datasets`` decodes its own files."""
    from datasets import Dataset

    count = 0
    tables = _tables(file)
    while True:
        try:
            table = next(tables, None)
            if table is None:
                return
            if _has_maps(table.schema):  # which ``datasets`` has no type for
                for row in table.to_pylist(maps_as_pydicts="strict"):
                    count += 1
                    yield without_nulls(row), f"{file}, row {count}"
                continue
            dataset = Dataset(table)
        except Exception as error:  # pyarrow's errors have no common base
            reason = " ".join(str(error).split())
            raise DataError(f"{key}: cannot read {str(file)!r} as {file.suffix[1:]}: {reason[:200]}") from error
        for row in dataset:
            count += 1
            yield without_filling(row, dataset.features), f"{file}, row {count}"


def _tables(file: Path) -> Iterator[pa.Table]:
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


def without_filling(value: Any, feature: FeatureType | None) -> Any:
    """``value`` without the nulls that Arrow puts in place of absent fields.

    Args:
        feature: what ``datasets`` knows of its type. A ``Json`` value was stored as text and has no such
            nulls.
    """
    from datasets import LargeList, List

    if isinstance(feature, dict) and isinstance(value, dict):
        return {name: without_filling(part, feature.get(name)) for name, part in value.items() if part is not None}
    if isinstance(feature, (List, LargeList)) and isinstance(value, list):
        return [without_filling(part, feature.feature) for part in value]
    return value


def _has_maps(fields: pa.Schema | pa.DataType) -> bool:
    """Whether a field of a schema, or of a type that has fields, is a map or holds one."""
    import pyarrow as pa

    count = len(fields) if isinstance(fields, pa.Schema) else fields.num_fields
    kinds = [fields.field(index).type for index in range(count)]
    return any(pa.types.is_map(kind) or _has_maps(kind) for kind in kinds)


def without_nulls(value: Any) -> Any:
    """``value`` without any null, of a table whose types are not known."""
    if isinstance(value, dict):
        return {name: without_nulls(part) for name, part in value.items() if part is not None}
    return [without_nulls(part) for part in value] if isinstance(value, list) else value


def _json_rows(file: Path) -> Iterator[tuple[Any, str]]:
    """One object a line; or one list of objects, alone or as the only list of an object that spans lines. The
    first characters decide, not the file's name."""
    with file.open(encoding="utf-8-sig") as lines:
        if _first_character(file) == "[":
            try:
                rows = json.load(lines, object_pairs_hook=_object)
            except ValueError as error:
                raise DataError(f"{file}, line {getattr(error, 'lineno', 1)}: not valid JSON: {error}") from None
            yield from _numbered(rows, file)
            return
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            origin = f"{file}, line {number}"
            try:
                row = json.loads(line, object_pairs_hook=_object)
            except ValueError as error:
                rows = _only_list(file) if line.strip() == "{" or number == 1 else None
                if rows is not None:
                    yield from _numbered(rows, file)
                    return
                raise DataError(f"{origin}: not valid JSON: {error}; expected one object on each line") from None
            yield row, origin


_object = partial(keys_once, words="an object has the key {!r} twice")


def _numbered(rows: list[Any], file: Path) -> Iterator[tuple[Any, str]]:
    yield from ((row, f"{file}, row {number}") for number, row in enumerate(rows, start=1))


def _only_list(file: Path) -> list[Any] | None:
    """The rows of a file that is one object: the one list of objects in it (``{"data": [...]}``), or it is a row.
    None if it is no such file.

    Raises:
        DataError: several lists of objects are in it.
    """
    try:
        content = json.loads(file.read_text(encoding="utf-8-sig"), object_pairs_hook=_object)
    except ValueError:
        return None
    if not isinstance(content, dict):
        return None
    if any(content.keys() >= set(required) for required, _ in FORMATS.values()):
        return [content]
    lists = {
        name: value
        for name, value in content.items()
        if isinstance(value, list) and value and all(isinstance(row, dict) for row in value)
    }
    if len(lists) > 1:
        raise DataError(
            f"{file}: one object with several lists of rows ({', '.join(lists)}); write each into a file of its own"
        )
    return next(iter(lists.values()), [content])


def _first_character(file: Path) -> str:
    with file.open(encoding="utf-8-sig") as text:
        while character := text.read(1):
            if not character.isspace():
                return character
    return ""


def _csv_rows(file: Path, delimiter: str) -> Iterator[tuple[dict[str, str], str]]:
    # Documents are longer than the 128 KiB that csv expects.
    csv.field_size_limit(min(sys.maxsize, 2**31 - 1))
    with file.open(encoding="utf-8-sig", newline="") as lines:
        reader = csv.DictReader(lines, delimiter=delimiter, strict=True)
        try:
            names = reader.fieldnames or []
            if twice := next((name for name in names if names.count(name) > 1), None):
                raise DataError(f"{file}, line 1: two columns are called {twice!r}; rename one")
            for row in reader:
                origin = f"{file}, line {reader.line_num}"
                if None in row or None in row.values():
                    raise DataError(f"{origin}: expected {len(reader.fieldnames or [])} fields as in the first line")
                yield row, origin
        except csv.Error as error:
            raise DataError(f"{file}, line {reader.line_num}: not valid CSV: {error}") from None
