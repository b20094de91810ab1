"""What a row means for tasks other than language modelling: preferences, labels, tags, questions about a text, pairs.

| format | columns | becomes |
|---|---|---|
| preference | chosen, rejected; prompt; or instruction, input | prompt, chosen, rejected: texts, or lists of messages |
| rated | prompt, completion, label; or preference rows | prompt, completion, label (true: wanted) |
| labelled | text, label; text_pair | text, text_pair, label |
| tagged | tokens, tags | one tag for each word |
| question | question, context, answers: {text, answer_start} | as in SQuAD |
| pair | source, target | two texts |

Beside lists of messages preferences may have system, tools and chat_template_kwargs.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from typing import Any

from hift_ds.data.formats import (
    Message,
    Row,
    build_sample,
    messages_of,
    present,
    refuse_media,
    system_of,
    template_options_of,
    text_of,
    tools_of,
)
from hift_ds.data.text_columns import Malformed, from_json, perhaps_list, perhaps_messages, short

Example = dict[str, Any]


def to_example(row: Row, format: str, origin: str) -> Example:
    """The example in a row.

    Args:
        row: column name -> value.
        format: a key of ``TASK_FORMATS``.
        origin: where the row comes from, for messages.

    Returns:
        The columns that the table above names; absent ones are left out.

    Raises:
        DataError: a column is missing, or holds something else than the format says.
    """
    return build_sample(row, format, TASK_FORMATS[format], origin)


def guess_task_columns(row: Row, format: str) -> dict[str, str]:
    """Our names -> the names in the data, for a row that lacks our columns but has others that are known to mean the
    same; empty if there are none."""
    row = present(row)
    guess: dict[str, str] = {}
    for ours, spellings in _SPELLINGS[format]:
        if all(name in row or name in guess for name in ours):
            continue
        found = next((names for names in spellings if all(name in row for name in names)), None)
        if found is not None:
            guess |= dict(zip(ours, found, strict=True))
    return guess


# Of each format: our columns, and what data sets call them, all of a tuple together; the first that is there counts.
_SPELLINGS: dict[str, tuple[tuple[tuple[str, ...], tuple[tuple[str, ...], ...]], ...]] = {
    "preference": (),
    "rated": (),
    "labelled": (
        (
            ("text", "text_pair"),
            (
                ("premise", "hypothesis"), ("sentence1", "sentence2"), ("question1", "question2"),
                ("question", "sentence"), ("question", "passage"),
            ),
        ),
        (("text",), (("sentence",), ("content",), ("review",), ("title",))),
        (("label",), (("labels",), ("class",), ("category",), ("answer",))),
    ),
    "tagged": (
        (("tokens",), (("words",),)),
        (("tags",), (("ner_tags",), ("pos_tags",), ("chunk_tags",), ("labels",))),
    ),
    "question": (),
    "pair": (
        (
            ("source", "target"),
            (
                ("document", "summary"), ("article", "highlights"), ("dialogue", "summary"), ("text", "summary"),
                ("meaning_representation", "human_reference"), ("input", "output"), ("inputs", "targets"),
                ("question", "answer"), ("prompt", "completion"),
            ),
        ),
    ),
}  # fmt: skip


def _preference(row: Row) -> Example:
    refuse_media(row)
    prompt = _prompt_beside(row)
    if prompt is not None:
        chosen, rejected = (_answer(row[name], name) for name in ("chosen", "rejected"))
        return _with_options(row, _answered({"prompt": prompt, "chosen": chosen, "rejected": rejected}))
    names = ("chosen", "rejected") if _repeats_prompt(row) else ("prompt", "chosen", "rejected")
    return _with_options(row, _with_system(row, _answered(_alike(row, names))))


def _answered(example: Example) -> Example:
    """The example, where what is to be learned are texts or messages that end with an assistant's.

    Raises:
        Malformed: they end with another's.
    """
    for name in ("chosen", "rejected", "completion"):
        messages = example.get(name)
        if isinstance(messages, list) and messages[-1]["role"] != "assistant":
            raise Malformed(
                f"{name}: expected messages that end with an assistant's answer, got one of {messages[-1]['role']} last"
            )
    return example


def _prompt_beside(row: Row) -> list[Message] | None:
    """LLaMA-Factory's: an instruction or a conversation, which the chat template renders; None: no such row, as where
    whole conversations are chosen and rejected."""
    if _has_question(row.get("chosen")):
        return None
    if "instruction" in row:
        asked = "\n".join(part for part in (text_of(row, "instruction"), text_of(row, "input")) if part)
        question = [{"role": "user", "content": asked}]
        return [*system_of(row, question), *question]
    column = next((name for name in ("conversations", "messages") if name in row), None)
    if column is None:
        return None
    talk = _talk(row[column], column)
    return [*system_of(row, talk), *talk]


def _has_question(value: Any) -> bool:
    """Whether an answer of preference data is a conversation that begins with its question."""
    value = perhaps_messages(value, "chosen")
    return isinstance(value, list) and len(value) > 1 and messages_of(value, "chosen")[0]["role"] != "assistant"


def _repeats_prompt(row: Row) -> bool:
    """Whether the text ``prompt`` is a message of the chosen conversation too, as in UltraFeedback."""
    prompt, chosen = row.get("prompt"), perhaps_messages(row.get("chosen"), "chosen")
    if not isinstance(prompt, str) or not _has_question(chosen):
        return False
    return prompt.strip() in [message["content"].strip() for message in messages_of(chosen, "chosen")]


def _with_system(row: Row, example: Example) -> Example:
    """The example with the row's own system prompt before its messages."""
    if not text_of(row, "system"):
        return example
    if any(isinstance(value, str) for value in example.values()):
        raise Malformed("system: texts are taken as they are, and it would be left out; write it into prompt")
    before = [name for name in ("prompt",) if name in example] or ["chosen", "rejected"]
    return {**example, **{name: [*system_of(row, example[name]), *example[name]] for name in before}}


def _with_options(row: Row, example: Example) -> Example:
    """The example with what the chat template is given besides its messages."""
    tools, options = tools_of(row), template_options_of(row)
    if not tools and not options:
        return example
    if any(isinstance(value, str) for value in example.values()):
        raise Malformed("tools and chat_template_kwargs are for messages; texts are taken as they are: remove them")
    return (
        example
        | ({"tools": json.dumps(tools)} if tools else {})
        | ({"chat_template_kwargs": dict(options)} if options else {})
    )


def _rated(row: Row) -> Example:
    refuse_media(row)
    prompt = _prompt_beside(row)
    needed = ["prompt"] if prompt is None else []
    if "chosen" in row or "rejected" in row:
        needed += ["chosen", "rejected"]
    else:
        needed += ["label", *(["completion"] if prompt is None else ["output"] if "instruction" in row else [])]
    if missing := next((name for name in needed if name not in row), None):
        raise Malformed(f"no {missing!r}, which format rated needs; found columns: {', '.join(row) or 'none'}")
    if "chosen" in row:
        return _preference(row)
    label = row["label"]
    if isinstance(label, str) and label.strip().lower() in ("true", "false", "0", "1"):
        label = label.strip().lower() in ("true", "1")
    if isinstance(label, str) or label not in (0, 1):
        raise Malformed(f"label: expected true (a wanted answer) or false, got {short(label)}")
    if prompt is None:
        example = _with_options(row, _with_system(row, _answered(_alike(row, ("prompt", "completion")))))
        return {**example, "label": bool(label)}
    if "instruction" in row:
        completion = _answered({"completion": _answer(row["output"], "output")})["completion"]
    else:
        prompt, completion = prompt[:-1], prompt[-1:]
        if not prompt or completion[0]["role"] != "assistant":
            raise Malformed("expected a conversation that ends with an assistant's answer, which label is about")
    return {**_with_options(row, {"prompt": prompt, "completion": completion}), "label": bool(label)}


def _alike(row: Row, columns: tuple[str, ...]) -> Example:
    """Columns that are all texts or all lists of messages."""
    row = {name: perhaps_messages(row[name], name) for name in columns if name in row}
    if all(isinstance(value, str) for value in row.values()):
        return row
    if all(isinstance(value, list) for value in row.values()):
        return {name: _talk(value, name) for name, value in row.items()}
    kinds = ", ".join(f"{name}: {type(value).__name__}" for name, value in row.items())
    raise Malformed(f"expected texts in all columns or lists of messages in all, got {kinds}")


def _answer(value: Any, column: str) -> list[Message]:
    if isinstance(value, str):
        return [{"role": "assistant", "content": value}]
    return _talk(value if isinstance(value, list) else [value], column)


def _talk(value: Any, column: str) -> list[Message]:
    messages = messages_of(value, column)
    for message in messages:
        if further := [key for key in message if key not in ("role", "content")]:
            raise Malformed(f"{column}: {further[0]}: messages of preference data have role and content only")
    return messages


def _labelled(row: Row) -> Example:
    label = perhaps_list(row["label"], "label")
    if isinstance(label, str) and not label.strip():
        raise Malformed("label: expected a name or a number, got an empty text")
    parts = label if isinstance(label, list) else [label]
    if not all(isinstance(part, str | int | float) for part in parts):
        raise Malformed(f"label: expected a name, a number or a list of these, got {short(label)}")
    if any(isinstance(part, float) and math.isinf(part) for part in parts):
        raise Malformed(f"label: expected a number that is not infinite, got {short(label)}")
    if isinstance(label, list):
        label = [as_class(part) for part in parts]
        if any(isinstance(part, float) for part in label):
            raise Malformed(
                f"label: a list with a fraction, {short(label)}, cannot be learned; expected the classes that apply, "
                "or a 0 or 1 for each class"
            )
    else:
        label = as_class(label)
    return {"text": text_of(row, "text"), "text_pair": text_of(row, "text_pair"), "label": json.dumps(label)}


def as_class(label: Any) -> Any:
    """A label as it was meant: a column of whole numbers becomes one of floats in pandas once a field is empty."""
    return int(label) if isinstance(label, float) and label.is_integer() else label


def _tagged(row: Row) -> Example:
    tokens, tags = (listed(row[name], name) for name in ("tokens", "tags"))
    if len(tokens) != len(tags) or not tokens:
        raise Malformed(f"tokens and tags: expected one tag for each word, got {len(tokens)} and {len(tags)}")
    if not all(isinstance(token, str) for token in tokens):
        raise Malformed(f"tokens: expected words, got {short(tokens)}")
    if not all(isinstance(tag, str | int) for tag in tags):
        raise Malformed(f"tags: expected names or numbers, got {short(tags)}")
    return {"tokens": tokens, "tags": [json.dumps(tag) for tag in tags]}


def listed(value: Any, column: str) -> list[Any]:
    """The list in a column; of a text that is none, its words.

    Raises:
        Malformed: it is something else.
    """
    value = perhaps_list(value, column)
    if isinstance(value, str):
        value = value.split()
    if not isinstance(value, list):
        raise Malformed(f"{column}: expected a list, got {short(value)}")
    return value


def _question(row: Row) -> Example:
    answers, context = row["answers"], text_of(row, "context")
    if isinstance(answers, str):
        try:
            answers = from_json(answers)
        except ValueError:
            raise Malformed(f"answers: not valid JSON: {short(answers)}") from None
    if isinstance(answers, list):
        answers = {key: [answer.get(key) for answer in answers] for key in ("text", "answer_start")}
    texts, starts = ((answers.get(key) if isinstance(answers, Mapping) else None) for key in ("text", "answer_start"))
    if not isinstance(texts, list) or not isinstance(starts, list) or len(texts) != len(starts):
        raise Malformed(f"answers: expected {{text: [...], answer_start: [...]}}, got {short(answers)}")
    answers = [(text, start) for text, start in zip(texts, starts, strict=True) if text != ""]  # "": it has none
    for text, start in answers:
        if not isinstance(text, str) or not isinstance(start, int):
            raise Malformed(
                f"answers: expected texts and the numbers of their first letters, got {short([text, start])}"
            )
        if context[start : start + len(text)] != text:
            raise Malformed(f"answers: {short(text)} is not at letter {start} of the context")
    return {
        "question": text_of(row, "question"),
        "context": context,
        "texts": [text for text, _ in answers],
        "starts": [start for _, start in answers],
    }


def _pair(row: Row) -> Example:
    return {"source": text_of(row, "source"), "target": text_of(row, "target")}


TASK_FORMATS: dict[str, tuple[tuple[str, ...], Callable[[Row], Example]]] = {
    "preference": (("chosen", "rejected"), _preference),
    "rated": ((), _rated),  # which asks for more itself
    "labelled": (("text", "label"), _labelled),
    "tagged": (("tokens", "tags"), _tagged),
    "question": (("question", "context", "answers"), _question),
    "pair": (("source", "target"), _pair),
}
"""Name -> (required columns, row -> example)."""
