"""What a row of training data means: the formats people have, turned into one of three kinds of sample.

| format            | columns                                                   | becomes        |
|-------------------|-----------------------------------------------------------|----------------|
| messages          | messages: [{role, content}], or tools beside it           | Conversation   |
| sharegpt          | conversations: [{from, value}]; system, tools             | Conversation   |
| alpaca            | instruction, output; input, system, history               | Conversation   |
| prompt_completion | prompt, completion: texts                                 | Completion     |
|                   | prompt, completion: lists of messages                     | Conversation   |
| text              | text                                                      | Text           |
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from hift_ds.errors import ConfigError, DataError

Message = dict[str, Any]


@dataclass(frozen=True)
class Conversation:
    """Rendered by the chat template; assistant messages from ``first_answer`` on are what is learned."""

    messages: list[Message]
    tools: list[dict[str, Any]] | None = None
    first_answer: int = 0


@dataclass(frozen=True)
class Completion:
    """A text and how it goes on, taken as they are, without a chat template."""

    prompt: str
    completion: str


@dataclass(frozen=True)
class Text:
    """Plain language modelling."""

    text: str


Sample = Conversation | Completion | Text
Row = Mapping[str, Any]

_ROLES = {
    "human": "user",
    "user": "user",
    "prompter": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "chatgpt": "assistant",
    "bot": "assistant",
    "model": "assistant",
    "system": "system",
    "developer": "developer",
    "tool": "tool",
    "observation": "tool",
    "function_response": "tool",
}


def to_sample(row: Row, format: str, origin: str) -> Sample:
    """The sample in a row.

    Args:
        row: column name -> value.
        format: a key of ``FORMATS``.
        origin: where the row comes from ("train.jsonl, line 3"), for messages.

    Raises:
        DataError: a column is missing, or holds something else than the format says.
    """
    required, build = FORMATS[format]
    for column in required:
        if row.get(column) is None:
            found = ", ".join(name for name, value in row.items() if value is not None) or "none"
            raise DataError(
                f"{origin}: no {column!r}, which format {format} needs; found columns: {found}; "
                "set data.format, or rename with data.columns"
            )
    try:
        return build(row)
    except _Malformed as error:
        raise DataError(f"{origin}: {error}") from None


def detect_format(columns: set[str], origin: str) -> str:
    """The first format of ``FORMATS`` whose required columns are all there.

    Raises:
        DataError: there is none.
    """
    for format, (required, _) in FORMATS.items():
        if columns.issuperset(required):
            return format
    expected = "; ".join(f"{name} ({', '.join(required)})" for name, (required, _) in FORMATS.items())
    raise DataError(
        f"{origin}: no known format has the columns {', '.join(sorted(columns)) or 'none'}; "
        f"expected {expected}; rename with data.columns"
    )


def rename(row: Row, columns: Mapping[str, str]) -> dict[str, Any]:
    """``row`` with our column names; ``columns`` maps our name to the name in the data."""
    if not columns:
        return dict(row)
    renamed = {ours: row.get(theirs) for ours, theirs in columns.items()}
    return renamed | {name: value for name, value in row.items() if name not in {*columns.values(), *renamed}}


def check_format(format: str | None) -> None:
    """Raises ConfigError unless ``format`` is None or known."""
    if format is not None and format not in FORMATS:
        raise ConfigError(f"data.format: expected one of {', '.join(FORMATS)}, got {format!r}")


class _Malformed(Exception):
    pass


def _from_messages(row: Row) -> Sample:
    return Conversation(_messages(row["messages"], "messages"), _tools(row))


def _from_sharegpt(row: Row) -> Sample:
    system = [{"role": "system", "content": row["system"]}] if row.get("system") else []
    return Conversation(system + _messages(row["conversations"], "conversations"), _tools(row))


def _from_prompt_completion(row: Row) -> Sample:
    prompt, completion = row["prompt"], row["completion"]
    if isinstance(prompt, str) and isinstance(completion, str):
        return Completion(prompt, completion)
    if isinstance(prompt, list) and isinstance(completion, list):
        asked = _messages(prompt, "prompt")
        return Conversation(asked + _messages(completion, "completion"), _tools(row), first_answer=len(asked))
    raise _Malformed(
        "prompt and completion: expected two texts or two lists of messages, "
        f"got {type(prompt).__name__} and {type(completion).__name__}"
    )


def _from_alpaca(row: Row) -> Sample:
    instruction, more = _text(row, "instruction"), _text(row, "input")
    messages = [{"role": "system", "content": row["system"]}] if row.get("system") else []
    for turn in row.get("history") or []:
        if not (isinstance(turn, list) and len(turn) == 2 and all(isinstance(part, str) for part in turn)):
            raise _Malformed(f"history: expected pairs of [question, answer], got {_short(turn)}")
        messages += [{"role": "user", "content": turn[0]}, {"role": "assistant", "content": turn[1]}]
    messages.append({"role": "user", "content": f"{instruction}\n{more}" if more else instruction})
    messages.append({"role": "assistant", "content": _text(row, "output")})
    return Conversation(messages)


def _from_text(row: Row) -> Sample:
    return Text(_text(row, "text"))


FORMATS: dict[str, tuple[tuple[str, ...], Callable[[Row], Sample]]] = {
    "messages": (("messages",), _from_messages),
    "sharegpt": (("conversations",), _from_sharegpt),
    "prompt_completion": (("prompt", "completion"), _from_prompt_completion),
    "alpaca": (("instruction", "output"), _from_alpaca),
    "text": (("text",), _from_text),
}
"""Name -> (required columns, row -> sample), in the order in which they are looked for."""


def _text(row: Row, column: str) -> str:
    value = row.get(column)
    if value is None:
        return ""
    if not isinstance(value, str):
        raise _Malformed(f"{column}: expected text, got {_short(value)}")
    return value


def _messages(value: Any, column: str) -> list[Message]:
    """Messages with ``role`` and ``content``, whichever of the two spellings they came in."""
    if not isinstance(value, list) or not value:
        raise _Malformed(f"{column}: expected a list of messages, got {_short(value)}")
    messages = []
    for entry in value:
        if not isinstance(entry, dict):
            raise _Malformed(f"{column}: expected messages with role and content, got {_short(entry)}")
        # Arrow gives every message every key that any message has; the absent ones are None.
        entry = {key: part for key, part in entry.items() if part is not None}
        role = entry.pop("role", None) or entry.pop("from", None)
        if role not in _ROLES:
            raise _Malformed(f"{column}: unknown role {role!r}; expected one of {', '.join(_ROLES)}")
        content = entry.pop("content", entry.pop("value", ""))
        messages.append({"role": _ROLES[role], "content": _content(content, column), **entry})
    return messages


def _content(content: Any, column: str) -> str:
    if isinstance(content, str):
        return content
    if isinstance(content, list) and all(
        isinstance(part, dict) and part.get("type") == "text" for part in content
    ):
        return "".join(part.get("text") or "" for part in content)
    raise _Malformed(
        f"{column}: expected content to be text, got {_short(content)}; images and audio cannot be trained on"
    )


def _tools(row: Row) -> list[dict[str, Any]] | None:
    tools = row.get("tools")
    if isinstance(tools, str):
        try:
            tools = json.loads(tools) if tools.strip() else None
        except ValueError:
            raise _Malformed(f"tools: not valid JSON: {_short(tools)}") from None
    return tools or None


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
