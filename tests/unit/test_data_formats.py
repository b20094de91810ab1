import json

import pytest

from hift_ds.data.formats import Completion, Conversation, Text, detect_format, rename, to_sample
from hift_ds.errors import DataError

USER = {"role": "user", "content": "Hi"}
ANSWER = {"role": "assistant", "content": "Hello"}


@pytest.mark.parametrize(
    ("row", "format", "expected"),
    [
        ({"messages": [USER, ANSWER]}, "messages", Conversation([USER, ANSWER])),
        (
            {
                "conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}],
                "system": "Be brief",
            },
            "sharegpt",
            Conversation([{"role": "system", "content": "Be brief"}, USER, ANSWER]),
        ),
        ({"prompt": "Hi ", "completion": "Hello"}, "prompt_completion", Completion("Hi ", "Hello")),
        (
            {"prompt": [USER], "completion": [ANSWER]},
            "prompt_completion",
            Conversation([USER, ANSWER], first_answer=1),
        ),
        ({"instruction": "Hi", "input": "", "output": "Hello"}, "alpaca", Conversation([USER, ANSWER])),
        (
            {
                "instruction": "Hi",
                "input": "there",
                "output": "Hello",
                "system": "S",
                "history": [["a", "b"]],
            },
            "alpaca",
            Conversation(
                [
                    {"role": "system", "content": "S"},
                    {"role": "user", "content": "a"},
                    {"role": "assistant", "content": "b"},
                    {"role": "user", "content": "Hi\nthere"},
                    ANSWER,
                ]
            ),
        ),
        ({"text": "Once"}, "text", Text("Once")),
    ],
)
def test_each_format_is_detected_and_read(row, format, expected):
    assert detect_format(set(row), "x") == format
    assert to_sample(row, format, "x") == expected


def test_messages_in_columns_of_text():
    """As CSV has them; another list of objects is an answer like any text."""
    row = {"prompt": json.dumps([USER]), "completion": json.dumps([ANSWER])}
    assert to_sample(row, "prompt_completion", "here") == Conversation([USER, ANSWER], first_answer=1)
    for text in ('[{"name": "f"}]', "[{not json", "[1]"):
        assert to_sample({"prompt": "a", "completion": text}, "prompt_completion", "here") == Completion("a", text)
    with pytest.raises(DataError, match="here: prompt: a list of messages as Python prints it; write it as JSON"):
        to_sample({"prompt": str([USER]), "completion": str([ANSWER])}, "prompt_completion", "here")


def test_tools_and_the_empty_keys_that_arrow_adds():
    call = {"role": "assistant", "content": None, "tool_calls": [{"type": "function"}]}
    row = {"messages": [{**USER, "tool_calls": None, "name": None}, call], "tools": '[{"name": "f"}]'}
    sample = to_sample(row, "messages", "x")
    assert sample.messages == [
        USER,
        {"role": "assistant", "content": "", "tool_calls": [{"type": "function"}]},
    ]
    assert sample.tools == [{"name": "f"}]


def test_content_in_text_parts_is_joined():
    parts = [{"type": "text", "text": "He"}, {"type": "text", "text": "llo"}]
    sample = to_sample({"messages": [USER, {"role": "assistant", "content": parts}]}, "messages", "x")
    assert sample.messages[1] == ANSWER


@pytest.mark.parametrize(
    ("row", "format", "message"),
    [
        (
            {"prompt": "Hi"},
            "prompt_completion",
            "no 'completion', which format prompt_completion needs; found columns: prompt",
        ),
        (
            {"prompt": "Hi", "completion": [ANSWER]},
            "prompt_completion",
            "two texts or two lists of messages, got str and list",
        ),
        ({"messages": []}, "messages", "expected a list of messages, got \\[\\]"),
        ({"messages": ["Hi"]}, "messages", "expected messages with role and content, got 'Hi'"),
        (
            {"messages": [{"role": "robot", "content": "x"}]},
            "messages",
            "unknown role 'robot'; expected one of human",
        ),
        ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, "messages", "images and audio"),
        ({"text": 5}, "text", "text: expected text, got 5"),
        ({"instruction": "a", "output": ["b"]}, "alpaca", "output: expected text"),
        (
            {"instruction": "a", "output": "b", "history": ["c"]},
            "alpaca",
            "pairs of \\[question, answer\\], got 'c'",
        ),
        ({"messages": [USER], "tools": "{"}, "messages", "tools: not valid JSON"),
    ],
)
def test_what_a_format_does_not_allow_is_named_with_its_row(row, format, message):
    with pytest.raises(DataError, match=f"^a.jsonl, line 7: .*{message}") as caught:
        to_sample(row, format, "a.jsonl, line 7")
    assert "\n" not in str(caught.value)


def test_unknown_columns_name_the_known_formats():
    with pytest.raises(
        DataError,
        match="the columns answer, question; expected messages .messages.; .*rename with data.columns",
    ):
        detect_format({"question", "answer"}, "a.jsonl, line 1")


def test_renamed_columns_hide_the_names_they_replace():
    row = {"question": "q", "answer": "a", "prompt": "not this one", "id": 3}
    assert rename(row, {"prompt": "question", "completion": "answer"}) == {
        "prompt": "q",
        "completion": "a",
        "id": 3,
    }
