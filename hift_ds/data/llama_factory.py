"""LLaMA-Factory's ``dataset_info.json``: where a data set is, and how its columns and messages are spelled."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from hift_ds.errors import DataError

FILE = "dataset_info.json"


@dataclass(frozen=True)
class Tags:
    """How the rows of a data set are spelled.

    Attributes:
        columns: that have messages, or one message.
        role: key of a message's role.
        content: key of its text.
        roles: role in the data -> role here.
        not_read: columns that would mean something here, but that the file does not name.
    """

    columns: tuple[str, ...] = ()
    role: str = "from"
    content: str = "value"
    roles: tuple[tuple[str, str], ...] = ()
    not_read: tuple[str, ...] = ()

    def apply(self, row: Mapping[str, Any]) -> dict[str, Any]:
        """The row with its messages spelled as formats expects them; anything else is left as it is."""
        row = {name: value for name, value in row.items() if name not in self.not_read}
        for column in self.columns:
            value = row.get(column)
            if isinstance(value, list):
                row[column] = [self._message(message) for message in value]
            elif value is not None:
                row[column] = self._message(value)
        return row

    def _message(self, message: Any) -> Any:
        if not isinstance(message, Mapping):
            return message
        rest = {key: value for key, value in message.items() if key not in (self.role, self.content)}
        role: Any = message.get(self.role)
        said = {"from": dict(self.roles).get(role, role), "value": message.get(self.content)}
        return {**rest, **said}


def info_file(path: Path) -> Path | None:
    """The dataset_info.json that ``path`` is, or that makes it a folder of LLaMA-Factory's; None if neither.

    A folder by ``Dataset.save_to_disk`` has a file of that name too, and state.json beside it.
    """
    file = path / FILE if path.is_dir() else path
    return file if file.name == FILE and file.is_file() and not (file.parent / "state.json").is_file() else None


def read_entry(file: Path, name: str | None, key: str) -> dict[str, Any]:
    """What the file says of one data set.

    Raises:
        DataError: it is no JSON, or has no such data set.
    """
    try:
        content = json.loads(file.read_text(encoding="utf-8-sig"))
    except ValueError as error:
        raise DataError(f"{file}: not valid JSON: {error}") from None
    names = ", ".join(content) if isinstance(content, dict) else "none"
    if name is None:
        raise DataError(f"{key}: {str(file)!r} lists data sets; say which with name: one of {names}")
    entry = content.get(name) if isinstance(content, dict) else None
    if not isinstance(entry, dict):
        raise DataError(f"{key}.name: no data set {name!r} in {str(file)!r}; it has {names}")
    return entry


def source_fields(entry: Mapping[str, Any], file: Path, source: Any) -> dict[str, Any]:
    """The fields of a :class:`~hift_ds.data.sources.Source` that an entry of the file sets.

    Args:
        source: what the run file says itself wins. Its format is the task's where that has one.

    Raises:
        DataError: the data are neither a file beside it nor on the Hub, of an unknown form, or for another task.
    """
    where = f"{source.key}: {str(file)!r}: {source.name!r}"
    fields: dict[str, Any] = {"path": _path(entry, file, where), "subset": source.subset or entry.get("subset")}
    fields["folder"] = entry.get("folder")
    fields["split"] = entry.get("split", source.split) if source.split == "train" else source.split
    fields["max_samples"] = source.max_samples or entry.get("num_samples")
    given = entry.get("columns") or {}
    if media := next((name for name in ("images", "videos", "audios") if name in given), None):
        raise DataError(f"{where} has {media}, which are not read here; take a data set of texts")
    if source.columns or source.format not in (None, "text", *_KINDS):
        return fields
    kind = "preference" if entry.get("ranking") else "rated" if "kto_tag" in given else "supervised"
    wanted = source.format if source.format in _KINDS else "supervised"
    if kind != wanted and (kind, wanted) != ("preference", "rated"):  # of which TRL's KTO makes two rows
        raise DataError(f"{where} is {_KINDS[kind]}; this run wants {_KINDS[wanted]}")
    return fields | _form(entry, kind, source.format, where)


_KINDS = {
    "supervised": "data of questions and answers or texts, for tasks sft and text",
    "preference": "preference data (ranking: true), for tasks dpo, kto and reward",
    "rated": "of answers with a mark (kto_tag), for task kto",
}


def check_sum(entry: Mapping[str, Any], path: Path) -> None:
    """Raises DataError if ``file_sha1`` is of another file."""
    wanted = entry.get("file_sha1")
    if not wanted or not path.is_file():
        return
    stat = path.stat()
    found = _sha1(str(path), stat.st_size, stat.st_mtime_ns)
    if found != str(wanted).lower():
        raise DataError(
            f"{path}: SHA-1 is {found}, but {FILE} says file_sha1 {wanted}: another version of the file; correct "
            "or remove that entry"
        )


@lru_cache(maxsize=64)
def _sha1(path: str, size: int, mtime_ns: int) -> str:
    with open(path, "rb") as file:
        digest = hashlib.sha1()
        while part := file.read(1 << 20):
            digest.update(part)
        return digest.hexdigest()


def _path(entry: Mapping[str, Any], file: Path, where: str) -> str:
    local = file.parent / entry["file_name"] if entry.get("file_name") else None
    if local is not None and (local.exists() or not entry.get("hf_hub_url")):
        return str(local)
    if entry.get("hf_hub_url"):
        return f"hub:{entry['hf_hub_url']}"
    if entry.get("script_url"):
        raise DataError(f"{where} is read by a script ({entry['script_url']}), which is not run; give its files")
    if elsewhere := next((name for name in ("ms_hub_url", "om_hub_url", "cloud_file_name") if entry.get(name)), None):
        raise DataError(f"{where} has only {elsewhere}, which is not read; download it and give the files")
    raise DataError(f"{where} has neither file_name nor hf_hub_url")


def _form(entry: Mapping[str, Any], kind: str, format: str | None, where: str) -> dict[str, Any]:
    formatting = entry.get("formatting", "alpaca")
    if formatting == "alpaca":
        return _alpaca(entry, kind, format)
    if formatting in ("sharegpt", "openai"):
        return _talk(entry, kind, format, openai=formatting == "openai")
    raise DataError(f"{where}: formatting {formatting!r} is not known; expected alpaca, sharegpt or openai")


_ALPACA = {"instruction": "prompt", "input": "query", "output": "response", "system": "system", "history": "history",
           "tools": "tools"}  # fmt: skip
_MARKS = {"chosen": "chosen", "rejected": "rejected", "label": "kto_tag"}


def _alpaca(entry: Mapping[str, Any], kind: str, format: str | None) -> dict[str, Any]:
    named = entry.get("columns") or {"prompt": "instruction", "query": "input", "response": "output"}
    if kind == "supervised" and "prompt" in named and "response" not in named:  # for continued pretraining
        return {"format": "text", "columns": _renamed({"text": named["prompt"]})}
    if format == "text":
        return {}
    known = _ALPACA | (_MARKS if kind != "supervised" else {})
    if kind == "preference":
        named = {"chosen": "chosen", "rejected": "rejected", **named}
    columns = {ours: named[theirs] for ours, theirs in known.items() if theirs in named}
    not_read = tuple(name for name in _ALPACA if name not in columns and name not in columns.values())
    return {
        "format": "alpaca" if kind == "supervised" else format,
        "columns": _renamed(columns),
        "tags": Tags(not_read=not_read),
    }


def _talk(entry: Mapping[str, Any], kind: str, format: str | None, openai: bool) -> dict[str, Any]:
    named, tags = entry.get("columns") or {}, entry.get("tags") or {}
    if format == "text":
        return {}
    column = named.get("messages", "messages" if openai else "conversations")
    roles = {
        tags.get("user_tag", "user" if openai else "human"): "user",
        tags.get("assistant_tag", "assistant" if openai else "gpt"): "assistant",
        tags.get("observation_tag", "tool" if openai else "observation"): "tool",
        tags.get("function_tag", "function_call"): "function_call",
        tags.get("system_tag", "system"): "system",
    }
    columns = {"conversations": column} | {name: named[name] for name in ("system", "tools") if name in named}
    marks = () if kind == "supervised" else ("chosen", "rejected") if kind == "preference" else ("label",)
    columns |= {ours: named.get(_MARKS[ours], ours) for ours in marks}
    spelled = Tags(
        (column, *(columns[name] for name in marks if name != "label")),
        tags.get("role_tag", "role" if openai else "from"),
        tags.get("content_tag", "content" if openai else "value"),
        tuple(roles.items()),
        tuple(name for name in ("system", "tools") if name not in columns and name not in columns.values()),
    )
    return {
        "format": "sharegpt" if kind == "supervised" else format, "columns": _renamed(columns), "tags": spelled,
    }  # fmt: skip


def _renamed(columns: Mapping[str, str]) -> dict[str, str]:
    return {ours: theirs for ours, theirs in columns.items() if ours != theirs}
