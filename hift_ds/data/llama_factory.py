"""LLaMA-Factory's ``dataset_info.json``: where a data set is, and how its columns and messages are spelled."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hift_ds.errors import DataError

FILE = "dataset_info.json"


@dataclass(frozen=True)
class Tags:
    """Keys and roles of the messages of a data set.

    Attributes:
        column: that has the messages.
        role: key of a message's role.
        content: key of its text.
        roles: role in the data -> role here.
    """

    column: str
    role: str
    content: str
    roles: tuple[tuple[str, str], ...]

    def apply(self, row: Mapping[str, Any]) -> dict[str, Any]:
        """The row with its messages spelled as formats expects them; anything else is left as it is."""
        messages = row.get(self.column)
        if not isinstance(messages, list):
            return dict(row)
        return {**row, self.column: [self._message(message) for message in messages]}

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
    if entry.get("ranking"):
        raise DataError(f"{key}.name: {name!r} is preference data (ranking), which is not for supervised training")
    return entry


def source_fields(entry: Mapping[str, Any], file: Path, source: Any) -> dict[str, Any]:
    """The fields of a :class:`~hift_ds.data.sources.Source` that an entry of the file sets.

    Args:
        source: what the run file says itself wins.

    Raises:
        DataError: the data are neither a file beside it nor on the Hub, or of an unknown form.
    """
    local = file.parent / entry["file_name"] if entry.get("file_name") else None
    if local is not None and (local.exists() or not entry.get("hf_hub_url")):
        path = str(local)
    elif entry.get("hf_hub_url"):
        path = f"hub:{entry['hf_hub_url']}"
    else:
        raise DataError(f"{source.key}: {str(file)!r}: {source.name!r} has neither file_name nor hf_hub_url")
    fields: dict[str, Any] = {"path": path, "subset": source.subset or entry.get("subset")}
    fields["split"] = entry.get("split", source.split) if source.split == "train" else source.split
    fields["max_samples"] = source.max_samples or entry.get("num_samples")
    if source.format is not None or source.columns:
        return fields
    return fields | _form(entry, f"{source.key}: {str(file)!r}: {source.name!r}")


def _form(entry: Mapping[str, Any], where: str) -> dict[str, Any]:
    columns = entry.get("columns") or {}
    formatting = entry.get("formatting", "alpaca")
    if formatting == "alpaca":
        if "prompt" in columns and "response" not in columns:  # for continued pretraining
            return {"format": "text", "columns": {"text": columns["prompt"]}}
        names = {"instruction": "prompt", "input": "query", "output": "response", "system": "system"}
        names |= {"history": "history", "tools": "tools"}
        renamed = {ours: columns[theirs] for ours, theirs in names.items() if theirs in columns}
        return {"format": "alpaca", "columns": {k: v for k, v in renamed.items() if k != v}}
    if formatting in ("sharegpt", "openai"):
        tags, openai = entry.get("tags") or {}, formatting == "openai"
        column = columns.get("messages", "messages" if openai else "conversations")
        roles = {
            tags.get("user_tag", "user" if openai else "human"): "user",
            tags.get("assistant_tag", "assistant" if openai else "gpt"): "assistant",
            tags.get("observation_tag", "tool" if openai else "observation"): "tool",
            tags.get("function_tag", "function_call"): "function_call",
            tags.get("system_tag", "system"): "system",
        }
        spelled = Tags(
            column,
            tags.get("role_tag", "role" if openai else "from"),
            tags.get("content_tag", "content" if openai else "value"),
            tuple(roles.items()),
        )
        renamed = {"conversations": column} | {name: columns[name] for name in ("system", "tools") if name in columns}
        return {
            "format": "sharegpt",
            "columns": {ours: theirs for ours, theirs in renamed.items() if ours != theirs},
            "tags": spelled,
        }
    raise DataError(f"{where}: formatting {formatting!r} is not known; expected alpaca, sharegpt or openai")
