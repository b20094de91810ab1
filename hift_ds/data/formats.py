"""What a row of training data means: the formats people have, turned into one of three kinds of sample.

| format            | columns                                                   | becomes        |
|-------------------|-----------------------------------------------------------|----------------|
| messages          | messages: [{role, content}]; system, tools                | Conversation   |
| sharegpt          | conversations: [{from, value}]; system, tools             | Conversation   |
| alpaca            | instruction, output; input, system, history               | Conversation   |
| prompt_completion | prompt, completion: texts                                 | Completion     |
|                   | prompt, completion: lists of messages                     | Conversation   |
| text              | text                                                      | Text           |
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Set
from dataclasses import dataclass
from typing import Any

from hift_ds.data.text_columns import Malformed, parsed, perhaps_messages, short
from hift_ds.errors import ConfigError, DataError

Message = dict[str, Any]


@dataclass(frozen=True)
class Conversation:
    """Messages that the chat template renders, of which the assistant's are learned.

    Attributes:
        messages: each with ``role``, ``content`` (text) and whatever else the template may read.
        tools: the functions that the model may call, as JSON schemas.
        first_answer: index of the first message that may be learned.
        masked: indices of messages that the data say not to learn (``weight: 0``, ``train: false``).
        asked: indices of messages that are no answers and that the data say to learn (Axolotl's ``train: true``).
        template_options: what the chat template is given besides (TRL's column ``chat_template_kwargs``).
    """

    messages: list[Message]
    tools: list[dict[str, Any]] | None = None
    first_answer: int = 0
    masked: frozenset[int] = frozenset()
    asked: frozenset[int] = frozenset()
    template_options: Mapping[str, Any] | None = None


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
    "function": "tool",
    "function_call": "assistant",
}
_LEARNED_FLAGS = ("weight", "train", "training", "loss")
"""Keys of a message that say whether to learn it: OpenAI's and Mistral's, Axolotl's two, ms-swift's."""
_ALSO_LEARNED_FLAGS = ("train", "training")
"""Those of them that, where true, have the message of another role learned too."""
_PARTIAL_FLAGS = ("train_detail", "training_detail")


def to_sample(row: Row, format: str, origin: str) -> Sample:
    """The sample in a row.

    Args:
        row: column name -> value.
        format: a key of ``FORMATS``.
        origin: where the row comes from ("train.jsonl, line 3"), for messages.

    Raises:
        DataError: a column is missing, or holds something else than the format says.
    """
    return build_sample(row, format, FORMATS[format], origin)


def build_sample(row: Row, format: str, how: tuple[tuple[str, ...], Callable[[Row], Any]], origin: str) -> Any:
    """What ``how`` (required columns, row -> sample) makes of a row.

    Raises:
        DataError: a column is missing, or holds something else than the format says; begins with ``origin``.
    """
    required, build = how
    row = present(row)
    for column in required:
        if column not in row:
            found = ", ".join(row) or "none"
            other = "set data.format, or rename" if format in FORMATS else "rename"
            raise DataError(
                f"{origin}: no {column!r}, which format {format} needs; found columns: {found}; {other} with "
                "data.columns"
            )
    try:
        return build(row)
    except Malformed as error:
        raise DataError(f"{origin}: {error}") from None


def present(row: Row) -> dict[str, Any]:
    """The columns that have a value: neither null nor NaN, which is how pandas writes an empty field."""
    return {name: value for name, value in row.items() if not _is_absent(value)}


def _is_absent(value: object) -> bool:
    return value is None or (isinstance(value, float) and math.isnan(value))


def detect_format(columns: set[str], origin: str, empty_too: Set[str] = frozenset()) -> str:
    """The first format of ``FORMATS`` whose required columns are all there.

    Args:
        columns: those in which the row has a value.
        empty_too: all of the row's.

    Raises:
        DataError: there is none.
    """
    for found in (columns, empty_too):
        for format, (required, _) in FORMATS.items():
            if found >= set(required):
                return format
    if {"chosen", "rejected"} <= columns:
        raise DataError(
            f"{origin}: chosen and rejected are preference data; set task: dpo, kto or reward (docs/tasks.md)"
        )
    expected = "; ".join(f"{name} ({', '.join(required)})" for name, (required, _) in FORMATS.items())
    raise DataError(
        f"{origin}: no known format has the columns {', '.join(sorted(columns)) or 'none'}; "
        f"expected {expected}; rename with data.columns"
    )


# Question and answer as data sets name them, with what stands beside the question in some.
_PAIRS = (
    ("instruction", "response"), ("question", "answer"), ("query", "response"), ("query", "answer"),
    ("problem", "solution"), ("input", "output"), ("inputs", "targets"), ("prompt", "response"),
    ("prompt", "answer"), ("question", "response"), ("user", "assistant"), ("human", "assistant"),
)  # fmt: skip
_BESIDE = ("context", "input")


def guess_columns(row: Row) -> dict[str, str]:
    """Our names -> the names in the data, where no format has a row's columns but one pair of them reads like
    question and answer; empty if there is no such pair, or more than one."""
    names = {name.lower(): name for name, value in present(row).items() if isinstance(value, str)}
    if {"chosen", "rejected"} <= set(names) or any(names.keys() >= set(r) for r, _ in FORMATS.values()):
        return {}
    if any(name in row for name in ("messages", "conversations", "chosen", "rejected")):
        return {}
    pairs = [pair for pair in _PAIRS if set(pair) <= set(names)]
    if len(pairs) != 1:
        return {}
    [(question, answer)] = pairs
    guess = {"instruction": names[question], "output": names[answer]}
    beside = next((name for name in _BESIDE if name in names and name != question), None)
    return guess | ({"input": names[beside]} if beside is not None else {})


def rename(row: Row, columns: Mapping[str, str]) -> dict[str, Any]:
    """``row`` with our column names; ``columns`` maps our name to the name in the data."""
    if not columns:
        return dict(row)
    renamed = {ours: row.get(theirs) for ours, theirs in columns.items()}
    return renamed | {name: value for name, value in row.items() if name not in {*columns.values(), *renamed}}


def with_open_answer(row: Row) -> dict[str, Any]:
    """A row to be answered: where it holds a question alone, the empty answer that its format wants."""
    row = dict(row)
    if isinstance(row.get("prompt"), str):
        row.setdefault("completion", "")
    elif "prompt" in row and "completion" not in row:
        row["messages"] = row.pop("prompt")
    if "instruction" in row:
        row.setdefault("output", "")
    return row


def check_format(format: str | None) -> None:
    """Raises ConfigError unless ``format`` is None or known."""
    if format is not None and format not in FORMATS:
        raise ConfigError(f"data.format: expected one of {', '.join(FORMATS)}, got {format!r}")


class NoContent(str):
    """The content of a message that has none: an empty text, told from one that the data say is empty."""


def _from_messages(row: Row) -> Sample:
    return _conversation(row, _behind_system(row, _messages(row["messages"], "messages")))


def _from_sharegpt(row: Row) -> Sample:
    return _conversation(row, _behind_system(row, _messages(row["conversations"], "conversations")))


def _from_prompt_completion(row: Row) -> Sample:
    prompt, completion = (perhaps_messages(row[name], name) for name in ("prompt", "completion"))
    if isinstance(prompt, str) and isinstance(completion, str):
        refuse_media(row)
        return Completion(prompt, completion)
    if isinstance(prompt, list) and isinstance(completion, list):
        asked = _behind_system(row, _messages(prompt, "prompt"))
        return _conversation(row, asked + _messages(completion, "completion"), first_answer=len(asked))
    raise Malformed(
        "prompt and completion: expected two texts or two lists of messages, "
        f"got {type(prompt).__name__} and {type(completion).__name__}"
    )


def _from_alpaca(row: Row) -> Sample:
    turns: list[_Turn] = []
    history = parsed(row.get("history"), "history") or []
    if not isinstance(history, list):
        raise Malformed(f"history: expected a list of [question, answer], got {short(history)}")
    for turn in history:
        if not (isinstance(turn, list) and len(turn) == 2 and all(isinstance(part, str) for part in turn)):
            raise Malformed(f"history: expected pairs of [question, answer], got {short(turn)}")
        turns += _question_and_answer(*turn)
    asked = "\n".join(part for part in (text_of(row, "instruction"), text_of(row, "input")) if part)
    turns += _question_and_answer(asked, text_of(row, "output"))
    return _conversation(row, _behind_system(row, turns))


def _from_text(row: Row) -> Sample:
    return Text(text_of(row, "text"))


FORMATS: dict[str, tuple[tuple[str, ...], Callable[[Row], Sample]]] = {
    "messages": (("messages",), _from_messages),
    "sharegpt": (("conversations",), _from_sharegpt),
    "prompt_completion": (("prompt", "completion"), _from_prompt_completion),
    "alpaca": (("instruction", "output"), _from_alpaca),
    "text": (("text",), _from_text),
}
"""Name -> (required columns, row -> sample), in the order in which they are looked for."""


def text_of(row: Row, column: str) -> str:
    """The text in a column, "" if it is absent.

    Raises:
        Malformed: it is something else.
    """
    value = row.get(column)
    if value is None:
        return ""
    if not isinstance(value, str):
        raise Malformed(f"{column}: expected text, got {short(value)}")
    return value


_NOT_THE_TEMPLATES = frozenset(
    ("tools", "tokenize", "add_generation_prompt", "continue_final_message", "padding", "truncation",
     "max_length", "return_tensors", "return_dict", "return_assistant_tokens_mask", "chat_template", "conversation",
     "tokenizer_kwargs")
)  # fmt: skip
"""Arguments of ``apply_chat_template`` that say what becomes of the rendering."""

_MEDIA = ("image", "images", "video", "videos", "audio", "audios")
"""Columns of TRL's, LLaMA-Factory's, ms-swift's and LLaVA's data."""

_Turn = tuple[Message, bool | None]
"""A message, and whether the data say to learn it; None: they do not say, so that answers are learned."""


def _conversation(row: Row, turns: list[_Turn], first_answer: int = 0) -> Conversation:
    """The turns, and what lies beside them in the row."""
    refuse_media(row)
    return Conversation(
        messages=[message for message, _ in turns],
        tools=tools_of(row),
        first_answer=first_answer,
        masked=frozenset(index for index, (_, learned) in enumerate(turns) if learned is False),
        asked=frozenset(i for i, (message, learned) in enumerate(turns) if learned and message["role"] != "assistant"),
        template_options=template_options_of(row),
    )


def template_options_of(row: Row) -> Mapping[str, Any] | None:
    """What a row has for the chat template besides messages and tools.

    Raises:
        Malformed: it is no object, or has what is not the template's.
    """
    options = parsed(row.get("chat_template_kwargs"), "chat_template_kwargs") or None
    if options is not None and not isinstance(options, Mapping):
        raise Malformed(f"chat_template_kwargs: expected an object, got {short(options)}")
    if ours := _NOT_THE_TEMPLATES.intersection(options or ()):
        raise Malformed(f"chat_template_kwargs: {min(ours)!r} is no option of a chat template; remove it")
    return options


def system_of(row: Row, messages: list[Message]) -> list[Message]:
    """The system prompt that a row has in a column of its own, as a message before ``messages``; none if it has none,
    or if they begin with the same one.

    Raises:
        Malformed: they begin with another one.
    """
    system = text_of(row, "system")
    first = messages[0] if messages else {"role": "user"}
    if not system or (first["role"] == "system" and first["content"].strip() == system.strip()):
        return []
    if first["role"] == "system":
        raise Malformed(
            f"system: the messages begin with another system prompt, {short(first['content'])}; remove one of the two"
        )
    return [{"role": "system", "content": system}]


def _behind_system(row: Row, turns: list[_Turn]) -> list[_Turn]:
    return [(message, None) for message in system_of(row, [message for message, _ in turns])] + turns


def refuse_media(row: Row) -> None:
    """Raises Malformed if a row of questions and answers has pictures, video or sound, which its text is about."""
    if media := next((name for name in _MEDIA if row.get(name) not in (None, "", [], {})), None):
        raise Malformed(
            f"{media}: pictures, video and sound cannot be trained on, and the texts are about them; leave such rows "
            "out, or the column where the texts are not"
        )


def _question_and_answer(question: str, answer: str) -> list[_Turn]:
    return [({"role": "user", "content": question}, None), ({"role": "assistant", "content": answer}, None)]


def _messages(value: object, column: str) -> list[_Turn]:
    """Messages with ``role`` and ``content``, whichever of the two spellings they came in."""
    value = parsed(value, column)
    if not isinstance(value, list) or not value:
        raise Malformed(f"{column}: expected a list of messages, got {short(value)}")
    return [_turn(entry, column) for entry in value]


def messages_of(value: object, column: str) -> list[Message]:
    """The messages in a column, in the spelling of OpenAI.

    Raises:
        Malformed: it holds something else, or an answer that the task learns whole and the data say not to learn.
    """
    turns = _messages(value, column)
    if column in ("chosen", "rejected", "completion") and turns[-1][1] is False:
        raise Malformed(f"{column}: the answer is marked as not to be learned; leave the row out")
    return [message for message, _ in turns]


def _turn(entry: object, column: str) -> _Turn:
    if not isinstance(entry, Mapping):
        raise Malformed(f"{column}: expected messages with role and content, got {short(entry)}")
    # Arrow gives every message every key that any message has; the absent ones are None.
    entry = present(entry)
    said_role = entry.pop("role", None) or entry.pop("from", None)
    if isinstance(said_role, str):
        said_role = said_role.lower()  # "Human", "GPT"
    if said_role not in _ROLES:
        raise Malformed(f"{column}: unknown role {said_role!r}; expected one of {', '.join(_ROLES)}")
    content = entry.pop("content", entry.pop("value", NoContent()))
    learned = _is_learned(entry, column)
    calls = _calls(entry.pop("tool_calls", None), column)
    if "function_call" in entry:  # OpenAI's first form, of one call
        calls += _functions_called(entry.pop("function_call"), column)
    if said_role == "function_call":  # LLaMA-Factory's: the call stands where others have the text
        calls = _functions_called(content, column)
        if not calls:
            raise Malformed(f"{column}: function_call: expected a call with name and arguments, got {short(content)}")
        content = NoContent()
    message = {"role": _ROLES[said_role], "content": _content(content, column), **entry}
    if calls:
        message["tool_calls"] = calls
    return message, learned


def _is_learned(entry: dict[str, Any], column: str) -> bool | None:
    """Whether the data say to learn the message; takes the keys that say it out of ``entry``."""
    for key in _PARTIAL_FLAGS:
        if entry.pop(key, None):
            raise Malformed(f"{column}: {key}: parts of a message cannot be masked; use train: true or false")
    flags = {key: entry.pop(key) for key in _LEARNED_FLAGS if key in entry}
    for key, value in flags.items():
        if isinstance(value, str) or value not in (0, 1):
            raise Malformed(
                f"{column}: {key}: expected 0 or 1, false or true (learn the message or not), got {short(value)}"
            )
    if not all(flags.values()):
        return False
    return True if any(key in flags for key in _ALSO_LEARNED_FLAGS) else None


def _calls(value: object, column: str) -> list[dict[str, Any]]:
    """The tool calls of a message.

    What stands in ``arguments`` stays as it is: whether the template takes an object or its text is found
    out when it renders the message (see ``encoding``).
    """
    calls = [parsed(call, f"{column}: tool_calls") for call in _as_list(parsed(value, f"{column}: tool_calls"))]
    for call in calls:
        if not isinstance(call, dict):
            raise Malformed(f"{column}: tool_calls: expected a list of objects, got {short(call)}")
    return calls


def _functions_called(value: object, column: str) -> list[dict[str, Any]]:
    """Tool calls made of objects with ``name`` and ``arguments``."""
    return [{"type": "function", "function": function} for function in _calls(value, column)]


def _as_list(value: object) -> list[Any]:
    """A list, or one value in a list, without what is empty: where a table has an object whose fields are all absent,
    one without any field is left."""
    return [one for one in (value if isinstance(value, list) else [value]) if one is not None and one != {}]


def _content(content: object, column: str) -> str:
    if isinstance(content, str):
        return content
    if isinstance(content, list) and all(isinstance(part, dict) and part.get("type") == "text" for part in content):
        if any(
            part.get(flag, True) is not None and not part.get(flag, True) for part in content for flag in _LEARNED_FLAGS
        ):
            raise Malformed(f"{column}: parts of a message cannot be masked; use train: true or false of the message")
        return "".join(part.get("text") or "" for part in content)
    media = "; images and audio cannot be trained on" if isinstance(content, list) else ""
    raise Malformed(f"{column}: expected content to be text, got {short(content)}{media}")


def tools_of(row: Row) -> list[dict[str, Any]] | None:
    """The functions that a row's model may call; None if it has none.

    Raises:
        Malformed: they are no objects.
    """
    tools = [parsed(tool, "tools") for tool in _as_list(parsed(row.get("tools"), "tools"))]
    for tool in tools:
        if not isinstance(tool, Mapping):
            raise Malformed(f"tools: expected a list of objects, got {short(tool)}")
    return tools or None
