"""Training data as users have it: what an entry of ``data.train`` names, and the rows that are found there.

How one file is read stands in :mod:`hift_ds.data.files`; saved datasets and the Hub go through ``datasets``. What
becomes of the rows is in :mod:`hift_ds.data.rows`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias, get_args

from hift_ds.data import llama_factory
from hift_ds.data.files import (
    COLUMN_FORMATS,
    DOCUMENT_FORMATS,
    LINE_FORMATS,
    Documents,
    rows_of_file,
    without_filling,
    without_nulls,
)
from hift_ds.data.formats import check_format
from hift_ds.errors import ConfigError, DataError, unknown_key
from hift_ds.hf.model_folder import CANNOT_WRITE
from hift_ds.shipped import BUNDLED, find

if TYPE_CHECKING:
    from datasets import Dataset, DatasetDict, IterableDataset, IterableDatasetDict

    AnyDataset: TypeAlias = Dataset | DatasetDict | IterableDataset | IterableDatasetDict

HUB = "hub:"
_NOT_DATA = re.compile(r"(readme|license|licence|changelog|requirements|notice)\b", re.IGNORECASE)
_PACKED = (".gz", ".zst", ".bz2", ".xz", ".lz4", ".zip")
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
        weight: how often its rows are trained on, relative to the other sources' weights and numbers of rows;
            None: 1 if another source has one.
        documents: what is one text in a file of plain text: ``file``, ``paragraph`` or ``line``.
        name: of a data set in LLaMA-Factory's dataset_info.json.
        tags: how that file says that messages are spelled.
        folder: of a Hub data set, the one to read (its "data_dir").
        streaming: read a Hub data set as it comes, without storing it.
    """

    key: str
    path: str
    split: str = "train"
    subset: str | None = None
    format: str | None = None
    columns: Mapping[str, str] = field(default_factory=dict)
    max_samples: int | None = None
    weight: float | None = None
    documents: Documents = "file"
    name: str | None = None
    tags: llama_factory.Tags | None = None
    folder: str | None = None
    streaming: bool = False


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
            raise ConfigError(f"{key}: expected at least one file, folder or {HUB}owner/name, got an empty list")
        return sources
    entry = {"path": value} if isinstance(value, str) else value
    if not isinstance(entry, Mapping) or not isinstance(entry.get("path"), str) or not entry["path"]:
        raise ConfigError(f"{key}: expected a path, an object with a path, or a list of these, got {value!r}")
    for name, given in entry.items():
        if name not in _KEYS:
            raise unknown_key(str(name), _KEYS, key)
        kind, expected = _KEYS[name]
        if not isinstance(given, kind) or isinstance(given, bool):
            raise ConfigError(f"{key}.{name}: expected {expected}, got {given!r}")
    if entry.get("documents", "file") not in get_args(Documents):
        expected = ", ".join(get_args(Documents))
        raise ConfigError(f"{key}.documents: expected one of {expected}, got {entry['documents']!r}")
    if not 0 < float(entry.get("weight", 1)) < math.inf:
        raise ConfigError(f"{key}.weight: expected a number above 0, got {entry['weight']!r}")
    source = Source(key=key, **(defaults | dict(entry)))
    if source.path.startswith(BUNDLED):
        source = replace(source, path=str(find(source.path, "data")))
    check_format(source.format)
    return [source]


_KEYS: dict[str, tuple[Any, str]] = {
    "path": (str, "str"),
    "split": (str, "str"),
    "subset": (str, "str"),
    "format": (str, "str"),
    "columns": (Mapping, "mapping"),
    "max_samples": (int, "int"),
    "weight": ((int, float), "a number"),
    "documents": (str, "str"),
    "name": (str, "str"),
}


def check_source(source: Source) -> None:
    """Raises DataError if a local source is not there. Reads no data."""
    source = resolve(source)
    local = Path(source.path).expanduser()
    if not source.path.startswith(HUB) and not local.exists():
        hint = "" if local.is_absolute() else f"; a data set of the Hugging Face Hub is written {HUB}owner/name"
        raise DataError(f"{source.key}: no such file or folder: {source.path!r}{hint}")


def resolve(source: Source) -> Source:
    """The source itself, or what it stands for if it names a data set of LLaMA-Factory's dataset_info.json.

    Raises:
        DataError: that file has no such data set, or says something that is not supported.
    """
    path = Path(source.path).expanduser()
    info = None if source.path.startswith(HUB) else llama_factory.info_file(path)
    if info is None:
        if source.name is not None:
            raise ConfigError(
                f"{source.key}.name: {source.name!r} names a data set of a {llama_factory.FILE}, which "
                f"{source.path!r} is not and does not hold"
            )
        if source.documents != "file" and path.is_file() and path.suffix.lower() not in DOCUMENT_FORMATS:
            raise ConfigError(
                f"{source.key}.documents: {source.documents!r} is for {' and '.join(DOCUMENT_FORMATS)} files; "
                f"{source.path!r} has rows"
            )
        return source
    entry = llama_factory.read_entry(info, source.name, source.key)
    resolved = replace(source, name=None, **llama_factory.source_fields(entry, info, source))
    llama_factory.check_sum(entry, Path(resolved.path))
    return resolved


def files_of(source: Source) -> list[Path]:
    """The files on this machine that a source may be read from, in order; none of a data set on the Hub."""
    if source.path.startswith(HUB):
        return []
    path = Path(resolve(source).path).expanduser()
    files = sorted(path.rglob("*")) if path.is_dir() else [path]
    return [file for file in files if file.is_file()]


def raw_rows(source: Source) -> Iterator[tuple[Any, str]]:
    """The rows of a source as they are found there, each with its place in words.

    Args:
        source: from :func:`resolve`.

    Raises:
        DataError: it is missing, unreadable, broken, or has several splits; names the file and line.
        ConfigError: a data set of the Hub has no folder to be stored in.
    """
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
    if (path / "dataset_dict.json").is_file():
        path = _split_of_saved(path, source)
    if path.is_dir() and (path / "state.json").is_file() and (path / "dataset_info.json").is_file():
        yield from _dataset_rows(_saved(path, source.key), source.path)
        return
    for file in _files_of_split(path, source) if path.is_dir() else [path]:
        yield from rows_of_file(file, source.key, source.documents)


def _saved(path: Path, key: str) -> Dataset | DatasetDict:
    """A data set that ``save_to_disk`` wrote."""
    from datasets import load_from_disk

    try:
        return load_from_disk(str(path))
    except FileNotFoundError:
        raise
    except Exception as error:  # of json, pyarrow, or its own
        reason = " ".join(str(error).split()) or type(error).__name__
        raise DataError(f"{key}: cannot read the saved data set {str(path)!r}: {reason[:200]}") from error


def _split_of_saved(path: Path, source: Source) -> Path:
    """The folder of a split, where several were saved together."""
    found = sorted(file.parent.name for file in path.glob("*/state.json"))
    wanted = [name for name in found if name == source.split or _split_in_name(name) == _split_in_name(source.split)]
    exact = [name for name in wanted if name == source.split] or wanted
    if len(exact) != 1 or (exact[0] != source.split and _split_in_name(source.split) is None):
        raise DataError(
            f"{source.key}: no split {source.split!r} in {source.path!r}; found {', '.join(found) or 'none'}; set split"
        )
    return path / exact[0]


def _files_of_split(folder: Path, source: Source) -> list[Path]:
    """The folder's data files; where names say train, test or validation, only those of ``source.split``."""
    suffixes: tuple[str, ...] = LINE_FORMATS + COLUMN_FORMATS
    files = [file for file in folder.iterdir() if not file.name.startswith(".")]  # what macOS leaves beside files
    for packed in (file for file in sorted(files) if file.suffix.lower() in _PACKED and {*file.suffixes} & {*suffixes}):
        if _split_in_name(packed.name) in (None, _split_in_name(source.split)):
            raise DataError(
                f"{source.key}: {str(packed)!r} is compressed and would not be read; unpack it, or move it away"
            )
    files = sorted(file for file in files if file.suffix.lower() in suffixes)
    if not files:  # documents then; beside data they describe it
        files = sorted(file for file in folder.iterdir() if file.suffix.lower() in DOCUMENT_FORMATS)
        files = [file for file in files if not _NOT_DATA.match(file.name)]
    if not files:
        suffixes += DOCUMENT_FORMATS
        raise DataError(f"{source.key}: no data in folder {source.path!r}; expected files {', '.join(suffixes)}")
    splits = {file: _split_in_name(file.name) for file in files}
    if any(splits.values()):
        wanted = [file for file, split in splits.items() if split == (_split_in_name(source.split) or source.split)]
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


def _dataset_rows(dataset: AnyDataset, name: str) -> Iterator[tuple[dict[str, Any], str]]:
    if isinstance(dataset, dict):
        raise DataError(f"{name}: has splits {', '.join(dataset)}; set split, or give the path of one of them")
    for number, row in enumerate(dataset, start=1):
        whole = without_nulls(row) if dataset.features is None else without_filling(row, dataset.features)
        yield whole, f"{name}, row {number}"


def _from_hub(source: Source) -> AnyDataset:
    from datasets import load_dataset

    name = source.path.removeprefix(HUB)
    try:
        return load_dataset(name, source.subset, split=source.split, data_dir=source.folder, streaming=source.streaming)
    except Exception as error:
        if isinstance(error, OSError) and error.errno in CANNOT_WRITE:
            raise ConfigError(
                f"{source.key}: the cache for {source.path!r} cannot be written: {error}; set the environment "
                "variables HF_HOME and HF_DATASETS_CACHE to folders that can"
            ) from error
        reason = " ".join(str(error).split()) or type(error).__name__
        raise DataError(
            f"{source.key}: cannot load {source.path!r} (split {source.split!r}): {reason[:300]}"
        ) from error
