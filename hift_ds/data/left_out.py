"""Whether a chat template has printed what a message says, and what it has left out."""

from __future__ import annotations

import re

from hift_ds.data import tool_calls
from hift_ds.data.formats import Conversation, Message
from hift_ds.errors import DataError


def check_answer(message: Message, printed: str, origin: str) -> None:
    """Refuse an answer of which the template printed nothing: it may shorten one (drop its thoughts), but one that
    drops all of it would teach silence.

    Args:
        printed: what the template printed in the answer's place.

    Raises:
        DataError: the content, or where there is none another text of the message, is not in ``printed``.
    """
    text = message["content"] or ""
    if not _is_printed(text, printed):
        raise DataError(
            f"{origin}: the chat template leaves out the answer that ends with {_last_word(text)!r}; it "
            "may expect content in parts, as those of vision models do; set data.template"
        )
    if not text.strip() and not message.get("tool_calls"):
        for key, value in _further_texts(message):
            if not _is_printed(value, printed):
                raise DataError(
                    f"{origin}: an answer without content, and the chat template leaves out its {key!r}; set "
                    "data.template to one that prints it"
                )


def remarks(sample: Conversation, whole: str) -> tuple[str, ...]:
    """What the rendered conversation ``whole`` leaves out that no answer depends on, or not all of it: sentences, each
    once."""
    found = []
    for tool in sample.tools or ():
        function = tool.get("function", tool)
        name = function.get("name") if isinstance(function, dict) else None
        if isinstance(name, str) and name not in whole:
            found.append("the chat template does not print the tools")
            break
    for message in sample.messages:
        if message["role"] == "assistant":
            if tool_calls.not_printed(message, whole) is not None:
                found.append("the chat template leaves out tool calls")
            if not (message["content"] or message.get("tool_calls") or _further_texts(message)):
                found.append("an answer is empty")
            lost = (key for key, value in _further_texts(message) if not _is_printed(value, whole))
            found += [f"the chat template leaves out {key!r} of answers" for key in lost]
        elif not _is_printed(message["content"], whole):
            found.append(f"the chat template leaves out messages of role {message['role']!r}")
    return tuple(dict.fromkeys(found))


def _further_texts(message: Message) -> list[tuple[str, str]]:
    """Texts of a message beside its content: ``reasoning_content``, ``thinking``, ``refusal``."""
    known = ("role", "content", "name", "tool_call_id", "id")
    return [(key, value) for key, value in message.items() if key not in known and isinstance(value, str)]


def _is_printed(text: str, rendered: str) -> bool:
    return _last_word(text) in rendered


def _last_word(text: str) -> str:
    """The last word, of no more than 40 letters; where no word is near the end, the last sign; "" of an empty text."""
    end = text.rstrip()[-200:]
    words = re.findall(r"\w+", end)
    return words[-1][-40:] if words else end[-1:]
