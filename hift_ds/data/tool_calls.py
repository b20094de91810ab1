"""Tool calls in the form that a chat template takes, and whether it has printed them.

Data say the arguments of a call as an object, or, as OpenAI's API does, as the text of one. Templates take one
of the two, some both: one that takes objects quotes a text once more (``"{\\"city\\": ...}"``), one that takes
texts fails at an object. Data say an answer without text as null or "". Templates distinguish the two, or fail
at null. Only rendering tells, so the forms are tried in order, the data's own first.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from hift_ds.data.formats import Conversation, Message, NoContent
from hift_ds.data.text_columns import from_json

_PLAIN = re.compile(r"[A-Za-z0-9]([\w .,:/-]*\w)?", re.ASCII)
"""A text that every template writes letter for letter."""


def has_calls(sample: Conversation) -> bool:
    """Whether some message of the conversation calls a tool."""
    return any(message.get("tool_calls") for message in sample.messages)


def forms(sample: Conversation) -> Iterator[Conversation]:
    """The conversation as it is, and with its calls in the other forms that templates take."""
    tried: list[list[Message]] = []
    for as_said in (True, False):
        for convert in (_as_it_is, _as_object, _as_text):
            messages = [_with_calls(message, convert, as_said) for message in sample.messages]
            if not any(_same(messages, others) for others in tried):
                tried.append(messages)
                yield dataclasses.replace(sample, messages=messages)


def with_objects(sample: Conversation) -> Conversation | None:
    """The conversation with objects in place of texts of objects; None if it has no such texts."""
    messages = [_with_calls(message, _as_object, True) for message in sample.messages]
    given = [_with_calls(message, _as_it_is, True) for message in sample.messages]
    return None if _same(messages, given) else dataclasses.replace(sample, messages=messages)


def not_printed(message: Message, text: str, text_of_objects: str | None = None) -> str | None:
    """What is wrong with ``text``, where the template should have printed the calls of ``message``; None if
    nothing is.

    Args:
        text_of_objects: what it prints where arguments are objects and not their texts; None if it cannot.
    """
    functions = [_function(call) for call in message.get("tool_calls") or ()]
    names_called = [name for function in functions if isinstance(name := function.get("name"), str)]
    for function in functions:
        name, arguments = function.get("name"), function.get("arguments")
        if isinstance(name, str) and text.count(name) < sum(other.count(name) for other in names_called):
            return f"leaves out {'the' if names_called.count(name) == 1 else 'a'} call of {name!r}"
        if isinstance(arguments, str) and any(
            json.dumps(arguments, ensure_ascii=ascii) in text for ascii in (False, True)
        ):
            return f"quotes the arguments of {name!r} as a text, and they are not the text of an object"
        said = _as_object(arguments)
        if isinstance(arguments, str) and said is not arguments and text_of_objects is not None:
            written = [json.dumps(said, ensure_ascii=ascii) for ascii in (False, True)]
            written += [json.dumps(said, ensure_ascii=False, separators=(",", ":")), str(said)]
            written += [json.dumps(said, ensure_ascii=False, indent=spaces) for spaces in (2, 4)]
            if not any(form in text_of_objects for form in written):
                return f"has its own way to write the arguments of {name!r}, as an object"
        names = list(said) if isinstance(said, Mapping) else []
        plain = (key for key in names if key.isascii() and key.isidentifier())  # others may be escaped
        lost = next((key for key in plain if key not in text), None)
        if lost is not None:
            return f"leaves out the argument {lost!r} of {name!r}"
        lost = next((value for value in _plain_values(said) if value not in text), None)
        if lost is not None:
            return f"leaves out {lost!r} among the arguments of {name!r}"
        if isinstance(said, str) and said not in text:
            return f"leaves out the arguments of {name!r}"
    return None


def _plain_values(said: object) -> Iterator[str]:
    """Texts and whole numbers in the arguments of a call that look the same however a template writes them."""
    if isinstance(said, Mapping | list):
        for part in said.values() if isinstance(said, Mapping) else said:
            yield from _plain_values(part)
    elif isinstance(said, str) and _PLAIN.fullmatch(said.strip()):
        yield said.strip()
    elif isinstance(said, int) and not isinstance(said, bool):
        yield str(said)


def _with_calls(message: Message, convert: Callable[[object], object], as_said: bool) -> Message:
    """``message`` with the arguments of its calls converted; where it has no text, null or "" as the data say,
    or the other of the two."""
    if not message.get("tool_calls"):
        return message
    calls = []
    for call in message["tool_calls"]:
        function = _function(call)
        if "arguments" in function:
            function = {**function, "arguments": convert(function["arguments"])}
        calls.append({**call, "function": function} if "function" in call else function)
    is_null = isinstance(message["content"], NoContent) == as_said
    content = message["content"] or (None if is_null else "")
    return {**message, "content": content, "tool_calls": calls}


def _function(call: Mapping[str, Any]) -> Mapping[str, Any]:
    """The name and arguments of a call in OpenAI's form, or in the flat one."""
    inner = call.get("function")
    return inner if isinstance(inner, Mapping) else call


def _as_it_is(arguments: object) -> object:
    return arguments


def _as_object(arguments: object) -> object:
    """The object that a text says, also a text of a text; ``arguments`` itself if that is none."""
    said = arguments
    while isinstance(said, str):
        try:
            said = from_json(said) if said.strip() else {}
        except ValueError:
            return arguments
    return said if isinstance(said, dict) else arguments


def _as_text(arguments: object) -> object:
    return arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)


def _same(messages: list[Message], others: list[Message]) -> bool:
    return json.dumps(messages, default=str) == json.dumps(others, default=str)
