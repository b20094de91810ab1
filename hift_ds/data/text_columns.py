"""Lists and objects in columns of text: a table without types (CSV) has them as JSON."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

_HALF = re.compile("[\ud800-\udfff]")  # pairs are one character once json has read them
_HALF_IN_JSON = re.compile(r"\\ud[89a-f]", re.IGNORECASE)
_A_LIST = re.compile(r"\s*\[\s*(['\"\[\d-].*)?\]\s*", re.DOTALL)  # and not [OTHER], a name
_PYTHONS_MESSAGES = re.compile(r"\s*\[\{'(role|content|from|value)'")


class Malformed(Exception):
    """What is wrong with a row; whoever knows where it comes from makes a DataError of it."""


def from_json(text: str) -> Any:
    """What a text of JSON says; U+FFFD for half of a surrogate pair, which JSON can write and no tokenizer takes.

    Raises:
        ValueError: it is no JSON.
    """
    value = json.loads(text)
    if not _HALF_IN_JSON.search(text):
        return value
    return json.loads(_HALF.sub("\ufffd", json.dumps(value, ensure_ascii=False)))


def has_halves(text: str) -> bool:
    """Whether a text of JSON has half of a surrogate pair."""
    return bool(_HALF_IN_JSON.search(text) and _HALF.search(json.dumps(json.loads(text), ensure_ascii=False)))


def parsed(value: object, column: str) -> Any:
    """What a text of JSON says, for columns that hold lists or objects: CSV and flat tables write them so.

    Raises:
        Malformed: a text that is no JSON.
    """
    if not isinstance(value, str):
        return value
    try:
        return from_json(value) if value.strip() else None
    except ValueError:
        raise Malformed(f"{column}: not valid JSON: {short(value)}") from None


def perhaps_list(value: Any, column: str) -> Any:
    """A list where ``value`` is the text of one; else ``value``.

    Raises:
        Malformed: it is a list as Python prints it, whose parts would be taken for names and words.
    """
    if not isinstance(value, str) or not _A_LIST.fullmatch(value):
        return value
    return parsed(value, column)


def perhaps_messages(value: Any, column: str) -> Any:
    """A list of messages where ``value`` is the text of one; else ``value``, which may be any text.

    Raises:
        Malformed: it is such a list as Python prints it.
    """
    if not isinstance(value, str) or not value.lstrip().startswith("[{"):
        return value
    if _PYTHONS_MESSAGES.match(value):
        raise Malformed(f"{column}: a list of messages as Python prints it; write it as JSON")
    try:
        found = from_json(value)
    except ValueError:
        return value
    are_messages = all(isinstance(one, Mapping) and ("role" in one or "from" in one) for one in found)
    return found if are_messages else value


def short(value: object) -> str:
    """The beginning of a value, for a message: no more than 60 letters of it."""
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
