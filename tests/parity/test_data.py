"""Token ids and labels of every format against what the tokenizer's own chat template and TRL make of a row.

The reference is short on purpose: the whole conversation through ``apply_chat_template``, and for each answer
the prompt that the model will have (the messages before it with the generation prompt) and the conversation up
to it. Rows are the awkward ones that people have, read from files as they have them.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import datasets
import pytest

from hift_ds.data.config import DataConfig
from hift_ds.data.encoding import Encoder
from hift_ds.data.formats import Completion, Conversation, Text
from hift_ds.data.prepare import prepare_data
from hift_ds.data.row_tokens import DataReport
from hift_ds.errors import ConfigError, DataError
from tests.helpers.tiny_tokenizers import CHATML, byte_level

IGNORED = -100
USER, ANSWER = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}
SYSTEM = {"role": "system", "content": "Be brief"}
UNICODE = "naïve 🙂👩‍👩‍👧 你好\u200b\ne\u0301 "

PLAIN = "{% for m in messages %}{{ m.role + ': ' + m.content + '\n' }}{% endfor %}"
LLAMA3_LIKE = (  # BOS, headers, texts trimmed
    "{{ bos_token }}{% for m in messages %}{{ '<|h|>' + m.role + '\n\n' + m.content | trim + '<|e|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|h|>assistant\n\n' }}{% endif %}"
)
MISTRAL_LIKE = (  # a system prompt inside the first question; only answers are closed
    "{% if messages[0].role == 'system' %}{% set s = messages[0].content + '\n\n' %}{% set ms = messages[1:] %}"
    "{% else %}{% set s = '' %}{% set ms = messages %}{% endif %}{{ bos_token }}{% for m in ms %}"
    "{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('roles must alternate') }}{% endif %}"
    "{% if m.role == 'user' %}{{ '[INST] ' + (s if loop.first else '') + m.content + ' [/INST]' }}"
    "{% else %}{{ ' ' + m.content + eos_token }}{% endif %}{% endfor %}"
)
QWEN_LIKE = (  # tools in the system prompt, calls as objects, in tokens of the vocabulary's additions
    "{% if tools %}{{ '<|im_start|>system\n' }}{% for t in tools %}{{ t | tojson + '\n' }}{% endfor %}"
    "{{ '<|im_end|>\n' }}{% endif %}"
    "{% for m in messages %}{% if m.role == 'tool' %}"
    "{{ '<|im_start|>user\n<tool_response>' + m.content + '</tool_response><|im_end|>\n' }}"
    "{% else %}{{ '<|im_start|>' + m.role + '\n' + (m.content or '') }}"
    '{% for c in m.tool_calls or [] %}{{ \'<tool_call>{"name": "\' + c.function.name + \'", "arguments": \' }}'
    "{{ c.function.arguments | tojson }}{{ '}</tool_call>' }}{% endfor %}{{ '<|im_end|>\n' }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
DEEPSEEK_LIKE = (  # calls only where content is null, their arguments as text
    "{% for m in messages %}"
    "{% if m.role == 'assistant' and (m.content is undefined or m.content is none) %}{{ '<|a|>' }}"
    "{% for c in m.tool_calls %}{{ c.function.name + '\n' + c.function.arguments }}{% endfor %}{{ eos_token }}"
    "{% else %}{{ '<|' + m.role[0] + '|>' + m.content + (eos_token if m.role == 'assistant' else '') }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|a|>' }}{% endif %}"
)
TOOL_TOKENS = ("<tool_call>", "</tool_call>")


@pytest.fixture(autouse=True)
def private_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path_factory.mktemp("datasets")))
    datasets.disable_progress_bars()


def tokenizer_of(template: str | None, bos: bool = False, **options: Any) -> Any:
    special = ("<|h|>", "<|e|>", "<|a|>", "<|u|>", "<|s|>", "<|t|>", "<|user|>", "<|assistant|>")
    tokenizer = byte_level(template, bos=bos, special=special)
    tokenizer.add_tokens(["</answer>", *TOOL_TOKENS])  # as programs add them: not special
    return tokenizer


def prepared(file: Path, tokenizer: Any, max_length: int = 4000, **options: Any) -> list[tuple[list, list]]:
    """(ids, labels) of each sample."""
    data = prepare_data(DataConfig(train=str(file), **options), tokenizer, max_length).train
    return [(row["input_ids"], row["labels"]) for row in data]


def lines(folder: Path, *rows: Any) -> Path:
    file = folder / "rows.jsonl"
    file.write_text("\n".join(json.dumps(row) for row in rows), encoding="utf-8")
    return file


def own_rendering(
    tokenizer: Any, messages: list[dict[str, Any]], learned: Sequence[int], tools: Any = None
) -> tuple[list[int], list[int]]:
    """The reference. White space behind the token that ends an answer is not learned."""

    def ids_of(part: list[dict[str, Any]], prompt: bool = False) -> list[int]:
        return tokenizer.apply_chat_template(part, tools=tools, add_generation_prompt=prompt)["input_ids"]

    ids = ids_of(messages)
    labels = [IGNORED] * len(ids)
    for index in learned:
        begin, end = len(ids_of(messages[:index], prompt=True)), len(ids_of(messages[: index + 1]))
        while tokenizer.decode([ids[end - 1]]).isspace():
            end -= 1
        labels[begin:end] = ids[begin:end]
    return ids, labels


# -- conversations -------------------------------------------------------------------------------------------

TWO_TURNS = [USER, ANSWER, {"role": "user", "content": UNICODE}, {"role": "assistant", "content": UNICODE}]
CONVERSATIONS = {
    "two turns": TWO_TURNS,
    "system": [SYSTEM, *TWO_TURNS],
    "two systems": [SYSTEM, USER, {"role": "system", "content": "Now in French"}, ANSWER],
    "empty question": [{"role": "user", "content": ""}, ANSWER],
    "empty answer": [USER, {"role": "assistant", "content": ""}, USER, ANSWER],
    "two answers in a row": [USER, ANSWER, {"role": "assistant", "content": "And?"}],
    "question at the end": [*TWO_TURNS, USER],
    "markers inside a text": [{"role": "user", "content": "a <|im_end|> b"}, ANSWER],
    "answer of markers": [USER, {"role": "assistant", "content": "4</answer>"}],
    "answer that ends with its end token": [USER, {"role": "assistant", "content": "4<|im_end|>"}],
}


@pytest.mark.parametrize("template", ["CHATML", "LLAMA3_LIKE", "QWEN_LIKE"])
@pytest.mark.parametrize("bos", [False, True])
def test_conversations_are_the_tokenizers_own_rendering(template, bos, tmp_path):
    tokenizer = tokenizer_of(globals()[template], bos=bos)
    expected, messages, sharegpt, pairs, last = [], [], [], [], []
    for conversation in CONVERSATIONS.values():
        answers = [index for index, message in enumerate(conversation) if message["role"] == "assistant"]
        expected.append(own_rendering(tokenizer, conversation, answers))
        messages.append({"messages": conversation})
        sharegpt.append({"conversations": [{"from": m["role"], "value": m["content"]} for m in conversation]})
        if answers[-1] == len(conversation) - 1:
            pairs.append({"prompt": conversation[:-1], "completion": conversation[-1:]})
            last.append(own_rendering(tokenizer, conversation, answers[-1:]))
    assert prepared(lines(tmp_path, *messages), tokenizer) == expected
    assert prepared(lines(tmp_path, *messages), tokenizer, mask_history=True)[: len(last)] != expected
    datasets.Dataset.from_list(sharegpt).to_parquet(tmp_path / "rows.parquet")
    assert prepared(tmp_path / "rows.parquet", tokenizer) == expected
    assert prepared(lines(tmp_path, *pairs), tokenizer) == last


@pytest.mark.parametrize("row", [{"messages": [USER, ANSWER]}, {"prompt": [USER], "completion": [ANSWER]},
                                 {"conversations": [USER, ANSWER]}])  # fmt: skip
def test_a_system_prompt_in_a_column_of_its_own(row, tmp_path):
    tokenizer = tokenizer_of(CHATML)
    rows = [{**row, "system": "Be brief"}, {**row, "system": None}]
    assert prepared(lines(tmp_path, *rows), tokenizer) == [
        own_rendering(tokenizer, [SYSTEM, USER, ANSWER], [2]), own_rendering(tokenizer, [USER, ANSWER], [1])
    ]  # fmt: skip


@pytest.mark.parametrize(
    "row",
    [
        {"messages": [SYSTEM, USER, ANSWER]},
        {"prompt": [SYSTEM, USER], "completion": [ANSWER]},
        {"conversations": [SYSTEM, USER, ANSWER]},
    ],
)
def test_a_system_prompt_in_a_column_and_in_the_messages(row, tmp_path):
    """The same one is one; of two that differ nobody knows which is meant."""
    tokenizer = tokenizer_of(CHATML)
    file = lines(tmp_path, {**row, "system": "Be brief\n"})
    assert prepared(file, tokenizer) == [own_rendering(tokenizer, [SYSTEM, USER, ANSWER], [2])]
    with pytest.raises(DataError, match="line 1: system: the messages begin with another system prompt, 'Be brief'"):
        prepared(lines(tmp_path, {**row, "system": "Be nice"}), tokenizer)


def test_a_template_that_takes_the_system_prompt_into_the_first_question(tmp_path):
    tokenizer = tokenizer_of(MISTRAL_LIKE, bos=True)
    for messages in (TWO_TURNS, [SYSTEM, *TWO_TURNS]):
        answers = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
        file = lines(tmp_path, {"messages": messages})
        assert prepared(file, tokenizer) == [own_rendering(tokenizer, messages, answers)]
    with pytest.raises(DataError, match="line 1: the chat template refuses .* of assistant.*must alternate"):
        prepared(lines(tmp_path, {"messages": [ANSWER, *TWO_TURNS]}), tokenizer)


def test_alpaca_rows_with_and_without_what_is_optional(tmp_path):
    tokenizer = tokenizer_of(CHATML)
    nothing = float("nan")  # as pandas leaves empty fields
    rows = [
        {"instruction": "Hi", "output": "Hello"},
        {"instruction": "Hi", "input": nothing, "output": "Hello", "system": nothing, "history": nothing},
        {
            "instruction": "Hi",
            "input": "",
            "output": "Hello",
            "system": "",
            "history": None,
            "tools": nothing,
        },
        {
            "instruction": "Sum",
            "input": "2+2",
            "output": "4",
            "system": "Be brief",
            "history": [["Hi", "Hello"]],
        },
        {"instruction": "", "input": "2+2", "output": "4"},
    ]
    found = prepared(lines(tmp_path, *rows), tokenizer)
    assert found[0] == found[1] == found[2] == own_rendering(tokenizer, [USER, ANSWER], [1])
    four = {"role": "assistant", "content": "4"}
    long = [SYSTEM, USER, ANSWER, {"role": "user", "content": "Sum\n2+2"}, four]
    assert found[3] == own_rendering(tokenizer, long, [2, 4])
    assert found[4] == own_rendering(tokenizer, [{"role": "user", "content": "2+2"}, four], [1])


def test_columns_that_pandas_left_empty(tmp_path):
    """A column without any value is one of floats in a parquet file that pandas wrote; in CSV it is empty."""
    pandas = pytest.importorskip("pandas")
    frame = pandas.DataFrame(
        {
            "conversations": [[{"from": "user", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]],
            "system": [float("nan")], "tools": [float("nan")], "chat_template_kwargs": [float("nan")],
        }
    )  # fmt: skip
    frame.to_parquet(tmp_path / "rows.parquet")
    tokenizer = tokenizer_of(CHATML)
    expected = [own_rendering(tokenizer, [USER, ANSWER], [1])]
    assert prepared(tmp_path / "rows.parquet", tokenizer) == expected
    frame = pandas.DataFrame({"instruction": ["Hi"], "input": [None], "output": ["Hello"], "history": [None]})
    frame.to_csv(tmp_path / "rows.csv")
    assert prepared(tmp_path / "rows.csv", tokenizer) == expected
    frame.assign(history='[["Hi", "Hello"]]').to_csv(tmp_path / "more.csv")
    assert prepared(tmp_path / "more.csv", tokenizer) == [
        own_rendering(tokenizer, [USER, ANSWER, USER, ANSWER], [1, 3])
    ]
    broken = lines(tmp_path, {"instruction": "Hi", "output": float("nan")})
    with pytest.raises(DataError, match="line 1: no 'output', which format alpaca needs"):
        prepared(broken, tokenizer, format="alpaca")


@pytest.mark.parametrize("first", [[ANSWER], [SYSTEM, ANSWER], [{"role": "assistant", "content": " Hello  \n"}]])
def test_what_precedes_the_first_answer_is_context_where_the_assistant_begins(first, tmp_path):
    """The template's own system prompt and the role header, neither of which the model will write."""
    messages = [*first, *TWO_TURNS]
    for template in (CHATML, LLAMA3_LIKE, PLAIN):
        tokenizer = tokenizer_of(template, bos=template == LLAMA3_LIKE)
        [(ids, labels)] = prepared(lines(tmp_path, {"messages": messages}), tokenizer)
        assert ids[: len(ids) - (template == PLAIN)] == tokenizer.apply_chat_template(messages)["input_ids"]
        end = {CHATML: "<|im_end|>", LLAMA3_LIKE: "<|e|>", PLAIN: "\n"}[template]
        header = {CHATML: "", LLAMA3_LIKE: "", PLAIN: "assistant: "}[template]
        text = first[-1]["content"].strip() if template == LLAMA3_LIKE else first[-1]["content"]
        learned = next(stretch for stretch in stretches(tokenizer, labels))
        assert learned.removeprefix(header) == text + end
        assert labels.count(IGNORED) > len(header)


def stretches(tokenizer: Any, labels: list[int]) -> list[str]:
    """The texts of neighbouring labels."""
    found: list[list[int]] = [[]]
    for label in labels:
        if label != IGNORED:
            found[-1].append(label)
        elif found[-1]:
            found.append([])
    return [tokenizer.decode(part) for part in found if part]


def test_a_header_without_a_generation_prompt_before_the_first_answer():
    """DeepSeek-R1's prompt opens the thoughts; a conversation shown later does not."""
    template = CHATML.replace("'<|im_start|>assistant\n'", "'<|im_start|>assistant\n<think>\n'")
    [encoded] = Encoder(tokenizer_of(template))(Conversation([ANSWER]), "x")
    learned = [token for token, flag in zip(encoded.ids, encoded.learned, strict=True) if flag]
    assert tokenizer_of(template).decode(learned) == "Hello<|im_end|>"


# -- which messages are learned ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flag", "yes", "no"),
    [("weight", 1, 0), ("weight", 1.0, 0.0), ("train", True, False), ("training", True, False),
     ("loss", True, False)],
)  # fmt: skip
def test_messages_that_the_data_say_not_to_learn(flag, yes, no, tmp_path):
    """OpenAI's and Mistral's weight, Axolotl's train and training, ms-swift's loss."""
    tokenizer = tokenizer_of(CHATML)
    bad = {"role": "assistant", "content": "bad"}
    messages = [USER, {**bad, flag: no}, USER, {**ANSWER, flag: yes}, USER, {**bad, flag: no}]
    plain = [{key: value for key, value in message.items() if key != flag} for message in messages]
    expected = [own_rendering(tokenizer, plain, [3])]
    assert prepared(lines(tmp_path, {"messages": messages}), tokenizer) == expected
    turns = [{"from": m["role"], "value": m["content"], flag: m.get(flag)} for m in messages]
    datasets.Dataset.from_list([{"conversations": turns}]).to_parquet(tmp_path / "rows.parquet")
    assert prepared(tmp_path / "rows.parquet", tokenizer) == expected
    row = {"prompt": messages[:1], "completion": messages[1:]}
    assert prepared(lines(tmp_path, row), tokenizer) == expected
    # the last answer is not to be learned, so with mask_history nothing of the first row is
    rows = [{"messages": messages}, {"messages": messages[:4]}]
    assert prepared(lines(tmp_path, *rows), tokenizer, mask_history=True) == [own_rendering(tokenizer, plain[:4], [3])]


def test_a_masked_answer_stays_masked_when_prompts_are_learned_and_when_a_template_drops_thoughts(tmp_path):
    tokenizer = tokenizer_of(CHATML)
    messages = [USER, {"role": "assistant", "content": "bad", "weight": 0}, USER, ANSWER]
    [(ids, labels)] = prepared(lines(tmp_path, {"messages": messages}), tokenizer, train_on_prompt=True)
    masked = [token for token, label in zip(ids, labels, strict=True) if label == IGNORED]
    assert tokenizer.decode(masked) == "bad<|im_end|>\n"
    drops = CHATML.replace("message['content']", "(message['content'].split('</think>')[-1] if not loop.last "
                           "else message['content'])", 1)  # fmt: skip
    tokenizer = tokenizer_of(drops)
    thoughts = [USER, {"role": "assistant", "content": "<think>a</think>bad", "train": False}, USER,
                {"role": "assistant", "content": "<think>b</think>good"}]  # fmt: skip
    [(_, labels)] = prepared(lines(tmp_path, {"messages": thoughts}), tokenizer)
    assert stretches(tokenizer, labels) == ["<think>b</think>good<|im_end|>"]
    [(ids, labels)] = prepared(lines(tmp_path, {"messages": thoughts}), tokenizer, train_on_prompt=True)
    masked = [token for token, label in zip(ids, labels, strict=True) if label == IGNORED]
    assert tokenizer.decode(masked) == "bad<|im_end|>"


@pytest.mark.parametrize(
    ("message", "reason"),
    [
        ({"weight": 0.5}, "messages: weight: expected 0 or 1, false or true .* got 0.5"),
        ({"train": "no"}, "messages: train: expected 0 or 1, false or true .* got 'no'"),
        (
            {"train_detail": [{"begin_offset": 0, "end_offset": 1, "train": False}]},
            "cannot be masked; use train",
        ),
        (
            {"content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b", "train": False}]},
            "cannot be masked",
        ),
        ({"content": [{"type": "text", "text": "a", "weight": 0}]}, "cannot be masked"),
    ],
)
def test_what_a_flag_cannot_say(message, reason, tmp_path):
    with pytest.raises(DataError, match=f"line 1: .*{reason}"):
        prepared(lines(tmp_path, {"messages": [USER, {**ANSWER, **message}]}), tokenizer_of(CHATML))


# -- tools ---------------------------------------------------------------------------------------------------


def call(name: str, arguments: Any, **message: Any) -> dict[str, Any]:
    calls = [{"type": "function", "function": {"name": name, "arguments": arguments}}]
    return {"role": "assistant", "content": None, **message, "tool_calls": calls}


def tool(name: str, **properties: Any) -> dict[str, Any]:
    parameters = {"type": "object", "properties": properties}
    return {"type": "function", "function": {"name": name, "parameters": parameters}}


CALLED = [
    {
        "messages": [USER, call("weather", {"city": "Oslo", "days": 3}), {"role": "tool", "content": "rain"}, ANSWER],
        "tools": [tool("weather", city={"type": "string"}, days={"type": "integer"})],
    },
    {
        "messages": [USER, call("search", {"query": "\"a\" é"}, content="Let me see.")],
        "tools": [tool("search", query={"type": "string", "enum": ["a", "b"]})],
    },
]  # fmt: skip


def called(row: dict[str, Any], tokenizer: Any) -> tuple[list[int], list[int]]:
    answers = [index for index, message in enumerate(row["messages"]) if message["role"] == "assistant"]
    return own_rendering(tokenizer, row["messages"], answers, row["tools"])


def test_calls_of_different_functions_survive_a_table(tmp_path):
    """Arrow gives every call every argument of any call; the row's own null stays where a row can say it."""
    tokenizer = tokenizer_of(QWEN_LIKE)
    expected = [called(row, tokenizer) for row in CALLED]
    assert prepared(lines(tmp_path, *CALLED), tokenizer) == expected
    table = datasets.Dataset.from_list(CALLED)
    assert table[0]["messages"][1]["tool_calls"][0]["function"]["arguments"]["query"] is None  # what is mended
    table.to_parquet(tmp_path / "rows.parquet")
    assert prepared(tmp_path / "rows.parquet", tokenizer) == expected
    table.save_to_disk(tmp_path / "saved")
    assert prepared(tmp_path / "saved", tokenizer) == expected
    [file] = (tmp_path / "saved").glob("*.arrow")
    assert prepared(file, tokenizer) == expected
    own_null = {**CALLED[0], "messages": [USER, call("weather", {"city": "Oslo", "days": None})]}
    expected = [called(own_null, tokenizer)]
    assert "null" in tokenizer.decode(expected[0][0])
    assert prepared(lines(tmp_path, own_null), tokenizer) == expected
    if hasattr(datasets, "Json"):  # stored as text, so its nulls are the row's own
        table = datasets.Dataset.from_list([own_null], on_mixed_types="use_json")
        assert "Json" in str(table.features)
        table.to_parquet(tmp_path / "json.parquet")
        assert prepared(tmp_path / "json.parquet", tokenizer) == expected


@pytest.mark.parametrize("compact", [False, True])
def test_arguments_as_the_text_of_an_object(compact, tmp_path):
    """OpenAI's form. A template that takes objects would quote the text once more; one that takes texts gets it."""
    separators = (",", ":") if compact else None
    said = json.dumps({"city": "Oslo", "n": [1, 2]}, separators=separators)
    as_text = {"messages": [USER, call("weather", said)], "tools": [tool("weather")]}
    as_object = {"messages": [USER, call("weather", json.loads(said))], "tools": [tool("weather")]}
    tokenizer = tokenizer_of(QWEN_LIKE)
    assert prepared(lines(tmp_path, as_text), tokenizer) == [called(as_object, tokenizer)]
    twice = {**as_text, "messages": [USER, call("weather", json.dumps(said))]}
    assert prepared(lines(tmp_path, twice), tokenizer) == [called(as_object, tokenizer)]
    either = QWEN_LIKE.replace(
        "c.function.arguments | tojson",
        "c.function.arguments if c.function.arguments is string else c.function.arguments | tojson",
    )
    tokenizer = tokenizer_of(either)
    assert prepared(lines(tmp_path, as_text), tokenizer) == [called(as_text, tokenizer)]  # letter for letter
    tokenizer = tokenizer_of(DEEPSEEK_LIKE)
    expected = [called(as_text, tokenizer)]
    assert "Oslo" in tokenizer.decode([label for label in expected[0][1] if label != IGNORED])
    assert prepared(lines(tmp_path, as_text), tokenizer) == expected
    if not compact:
        assert prepared(lines(tmp_path, as_object), tokenizer) == expected
    empty = {"messages": [USER, call("now", "")], "tools": []}
    none = {"messages": [USER, call("now", {})], "tools": []}
    tokenizer = tokenizer_of(QWEN_LIKE)
    assert prepared(lines(tmp_path, empty), tokenizer) == [called(none, tokenizer)]


def test_other_spellings_of_a_call(tmp_path):
    tokenizer = tokenizer_of(QWEN_LIKE)
    row = {"messages": [USER, call("weather", {"city": "Oslo"})], "tools": [tool("weather")]}
    expected = [called(row, tokenizer)]
    function = {"name": "weather", "arguments": json.dumps({"city": "Oslo"})}
    first_form = {"role": "assistant", "content": None, "function_call": function}
    texts = {"role": "assistant", "tool_calls": json.dumps(row["messages"][1]["tool_calls"])}
    factory = {
        "from": "function_call",
        "value": json.dumps({"name": "weather", "arguments": {"city": "Oslo"}}),
    }
    for message in (first_form, texts, factory):
        file = lines(tmp_path, {"messages": [USER, message], "tools": json.dumps(row["tools"])})
        assert prepared(file, tokenizer) == expected
    whole = {"messages": json.dumps(row["messages"]), "tools": [json.dumps(row["tools"][0])]}
    assert prepared(lines(tmp_path, whole), tokenizer) == expected


@pytest.mark.parametrize(
    ("names", "arguments", "reason"),
    [
        (("weather", "weather"), ({"city": "Oslo"}, {"city": "Rome"}), "a call of 'weather'"),
        (("get_weather", "weather"), ({"city": "Oslo"}, {"city": "Oslo"}), "the call of 'weather'"),
    ],
)
def test_every_one_of_several_calls_is_printed(names, arguments, reason, tmp_path):
    """A template that prints the first call alone: the second has the same name, or one that is a part of it."""
    calls = [
        {"type": "function", "function": {"name": n, "arguments": a}} for n, a in zip(names, arguments, strict=True)
    ]
    row = {"messages": [USER, {"role": "assistant", "content": None, "tool_calls": calls}], "tools": [tool("weather")]}
    tokenizer = tokenizer_of(QWEN_LIKE)
    assert prepared(lines(tmp_path, row), tokenizer) == [called(row, tokenizer)]
    first_alone = QWEN_LIKE.replace("m.tool_calls or []", "(m.tool_calls or [])[:1]")
    with pytest.raises(DataError, match=f"line 1: the chat template leaves out {reason}; set data.template"):
        prepared(lines(tmp_path, row), tokenizer_of(first_alone))


@pytest.mark.parametrize("lost", ["Oslo", 3, "New York", "2020-01-01"])
def test_the_values_of_arguments_are_printed(lost, tmp_path):
    """However deep they stand."""
    row = {"messages": [USER, call("weather", {"where": [{"city": lost}], "fine": None})], "tools": []}
    tokenizer = tokenizer_of(QWEN_LIKE)
    assert prepared(lines(tmp_path, row), tokenizer) == [called(row, tokenizer)]
    keys = QWEN_LIKE.replace("c.function.arguments | tojson", "'where city fine'")
    with pytest.raises(DataError, match=f"line 1: the chat template leaves out '{lost}' among the arguments of 'we"):
        prepared(lines(tmp_path, row), tokenizer_of(keys))


def test_objects_whose_fields_are_all_absent_are_no_calls_and_no_tools(tmp_path):
    """A table whose writer gives every row every struct; a row of JSON with an empty object."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    tokenizer = tokenizer_of(QWEN_LIKE)
    expected = [own_rendering(tokenizer, [USER, ANSWER], [1])]
    for beside in ({"tools": {}}, {"tools": [{}]}, {"tools": [None]}, {"tools": "{}"}):
        assert prepared(lines(tmp_path, {"messages": [USER, ANSWER], **beside}), tokenizer) == expected
    for key in ("function_call", "tool_calls"):
        assert prepared(lines(tmp_path, {"messages": [USER, {**ANSWER, key: {}}]}), tokenizer) == expected
    texts = [(name, pa.string()) for name in ("name", "arguments")]
    turn = pa.struct([("role", pa.string()), ("content", pa.string()), ("function_call", pa.struct(texts))])
    nothing = {"function_call": {"name": None, "arguments": None}}
    turns = pa.array([[{**USER, **nothing}, {**ANSWER, **nothing}]], type=pa.list_(turn))
    pq.write_table(pa.table({"messages": turns}), tmp_path / "a.parquet")
    assert prepared(tmp_path / "a.parquet", tokenizer) == expected
    row = {"conversations": [{"from": "human", "value": "Hi"}, {"from": "function_call", "value": "{}"}]}
    with pytest.raises(DataError, match="line 1: conversations: function_call: expected a call with name and"):
        prepared(lines(tmp_path, row), tokenizer)


LOST = r"the chat template leaves out the call of 'weather'; set data.template"


@pytest.mark.parametrize(
    ("message", "reason"),
    [
        (call("weather", {"city": "Oslo"}), LOST),
        (call("weather", {"city": "Oslo"}, content="Let me see."), LOST),
        (call("weather", '{"city": "Oslo"}'), LOST),
        ({"role": "assistant", "content": None, "function_call": {"name": "weather", "arguments": "{}"}}, LOST),
        ({"role": "assistant", "content": "", "reasoning_content": "I think so"}, "leaves out its 'reasoning_content'"),
    ],
)  # fmt: skip
def test_what_a_template_leaves_out_of_an_answer_is_not_learned_as_silence(message, reason, tmp_path):
    tools = [tool("weather")]
    file = lines(tmp_path, {"messages": [USER, message], "tools": tools})
    for template in (CHATML, LLAMA3_LIKE, PLAIN):
        with pytest.raises(DataError, match=f"rows.jsonl, line 1: .*{reason}"):
            prepared(file, tokenizer_of(template))
    # A name that only the list of tools shows is not the call's.
    with pytest.raises(DataError, match=f"line 1: .*{reason}"):
        prepared(file, tokenizer_of("{% for t in tools or [] %}{{ t | tojson }}{% endfor %}" + CHATML))


def test_a_call_whose_arguments_cannot_be_an_object_or_are_left_out(tmp_path):
    broken = {"messages": [USER, call("weather", "{city: Oslo")], "tools": []}
    with pytest.raises(DataError, match="quotes the arguments of 'weather' as a text"):
        prepared(lines(tmp_path, broken), tokenizer_of(QWEN_LIKE))
    names = QWEN_LIKE.replace("c.function.arguments | tojson", "'null'")
    row = {"messages": [USER, call("weather", {"city": "Oslo"})], "tools": []}
    with pytest.raises(DataError, match="leaves out the argument 'city' of 'weather'"):
        prepared(lines(tmp_path, row), tokenizer_of(names))


def test_what_is_left_out_of_the_context_is_said(tmp_path):
    file = lines(
        tmp_path,
        {"messages": [USER, ANSWER], "tools": [tool("weather")]},
        {"messages": [USER, {**ANSWER, "reasoning_content": "I think so"}]},
        {"messages": [SYSTEM, USER, ANSWER]},
        {"messages": [USER, {"role": "assistant", "content": ""}]},
        {"messages": [USER, call("weather", {"city": "Oslo"}, weight=0), USER, ANSWER]},
    )
    users_only = CHATML.replace(
        "{% for message in messages %}", "{% for message in messages if message.role != 'system' %}"
    )
    report: DataReport = prepare_data(DataConfig(train=str(file)), tokenizer_of(users_only), 400).reports[0]
    assert dict(report.remarks) == {
        "the chat template does not print the tools": 1,
        "the chat template leaves out 'reasoning_content' of answers": 1,
        "the chat template leaves out messages of role 'system'": 1,
        "an answer is empty": 1,
        "the chat template leaves out tool calls": 1,
    }
    assert "in 1 samples the chat template does not print the tools" in str(report)


def test_options_of_the_template_that_a_row_says(tmp_path):
    template = CHATML.replace("'<|im_end|>'", "('!' if loud else '') + '<|im_end|>'", 1)
    tokenizer = tokenizer_of(
        template.replace(
            "message['content'] + '<|im_end|>'", "message['content'] + ('!' if loud else '') + '<|im_end|>'"
        )
    )
    rows = [{"messages": [USER, ANSWER], "chat_template_kwargs": {"loud": loud}} for loud in (True, False)]
    first, second = prepared(lines(tmp_path, *rows), tokenizer)
    assert first[0] == tokenizer.apply_chat_template([USER, ANSWER], loud=True)["input_ids"] != second[0]


# -- the end of an answer ------------------------------------------------------------------------------------


@pytest.mark.parametrize("answer", ["4", "4</answer>", "</answer>", "4 </answer>\n", "4<|h|>", "</answer>4"])
def test_an_answer_left_open_gets_an_end_token_whatever_it_ends_with(answer):
    messages = [USER, {"role": "assistant", "content": answer}]
    generation = "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
    for template in (PLAIN + generation, PLAIN.replace("+ '\n'", "") + generation):
        tokenizer = tokenizer_of(template)
        for options in ({}, {"train_on_prompt": True}):
            [encoded] = Encoder(tokenizer, **options)(Conversation(messages), "x")
            rendered = tokenizer.apply_chat_template(messages)["input_ids"]
            assert encoded.ids == [*rendered, tokenizer.eos_token_id]
            begin = (
                0 if options else len(tokenizer.apply_chat_template([USER], add_generation_prompt=True)["input_ids"])
            )
            assert encoded.learned == [index >= begin for index in range(len(encoded.ids))]


@pytest.mark.parametrize("answer", ["4", "4</answer>", "</answer>"])
def test_an_answer_that_only_the_next_role_ends(answer):
    template = (
        "{% for m in messages %}{{ '<|' + m.role + '|>' + m.content }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
    )
    tokenizer = tokenizer_of(template)
    said = {"role": "assistant", "content": answer}
    [encoded] = Encoder(tokenizer)(Conversation([USER, said, USER, said]), "x")
    labels = [token if flag else IGNORED for token, flag in zip(encoded.ids, encoded.learned, strict=True)]
    assert stretches(tokenizer, labels) == [answer + "<|user|>", answer + "<|im_end|>"]


def test_a_call_that_the_template_leaves_open_gets_an_end_token():
    template = QWEN_LIKE.replace("<|im_end|>\n", "\n")
    tokenizer = tokenizer_of(template)
    [encoded] = Encoder(tokenizer)(Conversation(CALLED[1]["messages"]), "x")
    assert tokenizer.decode(encoded.ids).endswith("</tool_call>\n<|im_end|>") and encoded.learned[-1]
    tokenizer = tokenizer_of(QWEN_LIKE)
    [encoded] = Encoder(tokenizer)(Conversation(CALLED[1]["messages"]), "x")
    assert tokenizer.decode(encoded.ids).endswith("</tool_call><|im_end|>\n")


# -- texts taken as they are ---------------------------------------------------------------------------------


@pytest.mark.parametrize("bos", [False, True])
@pytest.mark.parametrize("said", ["", "<|endoftext|>"])
@pytest.mark.parametrize("end", ["", "<|im_end|>", "<|im_end|>\n"])
def test_texts_rendered_in_advance_have_one_begin_and_one_end(bos, said, end, tmp_path):
    """BOS is there if the tokenizer or the text puts it, and once if both do; the same for the end token, behind which
    templates write white space."""
    tokenizer = tokenizer_of(PLAIN, bos=bos)
    begin = [tokenizer.bos_token_id] if bos or said else []
    rest = tokenizer(UNICODE, add_special_tokens=False).input_ids
    answer = tokenizer("4", add_special_tokens=False).input_ids
    close = [tokenizer.eos_token_id]
    text = lines(tmp_path, {"text": said + UNICODE + end})
    ids = [*begin, *rest, *close]
    assert prepared(text, tokenizer) == [(ids, ids)]
    pair = lines(tmp_path, {"prompt": said + UNICODE, "completion": "4" + end})
    assert prepared(pair, tokenizer) == [
        ([*begin, *rest, *answer, *close], [IGNORED] * len(begin + rest) + [*answer, *close])
    ]
    chat = tokenizer_of("{{ bos_token }}{% for m in messages %}{{ m.content }}{% endfor %}", bos=bos)
    row = {
        "prompt": [{"role": "user", "content": said + UNICODE}],
        "completion": [{"role": "assistant", "content": "4" + end.strip()}],
    }
    expected = ([0, *rest, *answer, *close], [IGNORED] * (1 + len(rest)) + [*answer, *close])
    assert prepared(lines(tmp_path, row), chat) == [expected]


def test_a_tokenizer_that_puts_tokens_around_every_text():
    """Two in front (ChatGLM's), one behind (T5's): neither is doubled, nor put between prompt and completion."""
    from tokenizers import processors

    tokenizer = tokenizer_of(None)
    begin, end = tokenizer.convert_tokens_to_ids(["<|h|>", "<|u|>"]), tokenizer.eos_token_id
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<|h|> <|u|> $A <|im_end|>",
        special_tokens=[("<|h|>", begin[0]), ("<|u|>", begin[1]), ("<|im_end|>", end)],
    )
    assert tokenizer("a").input_ids[:2] == begin
    ab = tokenizer("ab", add_special_tokens=False).input_ids
    encoder = Encoder(tokenizer)
    for text in ("ab", "<|u|>ab", "<|h|><|u|>ab", "<|h|><|u|>ab<|im_end|>", "ab<|im_end|>\n"):
        assert encoder(Text(text), "x")[0].ids == [*begin, *ab, end]
    [encoded] = encoder(Completion("a", "b"), "x")
    assert encoded.ids == [*begin, *ab, end] and encoded.learned == [False, False, False, True, True]


def test_prompts_and_completions_as_trl_has_them(tmp_path):
    """TRL's own functions: the end token as text, the completion from where the two differ."""
    from trl.data_utils import common_prefix_length

    tokenizer = tokenizer_of(PLAIN, bos=True)
    pairs = [
        ("2+2=", "4"),
        ("", "Once"),
        (UNICODE, UNICODE),
        ("a ", " b"),
        ("<|h|>", "</answer>"),
        ("Q\n\n", "\nA"),
    ]
    rows = [{"prompt": prompt, "completion": completion} for prompt, completion in pairs]
    expected = []
    for prompt, completion in pairs:
        ids = tokenizer(prompt + completion + tokenizer.eos_token)["input_ids"]
        begin = common_prefix_length(tokenizer(prompt)["input_ids"], ids)
        expected.append((ids, [IGNORED] * begin + ids[begin:]))
    assert prepared(lines(tmp_path, *rows), tokenizer) == expected


# -- length --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bos", [False, True])
@pytest.mark.parametrize("length", range(1, 17))
def test_of_a_text_of_any_length_every_token_but_the_first_is_predicted_once(length, bos, tmp_path):
    """Exactly n x max_length tokens, one fewer, one more: the end token is always learned."""
    limit = 4
    tokenizer = tokenizer_of(None, bos=bos)
    text = "abcdefghijklmnopq"[:length]
    ids = [
        *([0] if bos else []),
        *tokenizer(text, add_special_tokens=False).input_ids,
        tokenizer.eos_token_id,
    ]
    assert len(ids) == length + 1 + bos
    found = prepared(lines(tmp_path, {"text": text}), tokenizer, max_length=limit, template="alpaca")
    predicted = [label for piece, labels in found for label in labels[1:]]
    assert predicted == ids[1:]
    seen = {}
    for piece, labels in found:
        assert 2 <= len(piece) <= limit
        assert all(label in (token, IGNORED) for token, label in zip(piece, labels, strict=True))
        for before, token in zip(piece, piece[1:], strict=False):
            seen[len(seen)] = (before, token)
    assert list(seen.values()) == list(zip(ids, ids[1:], strict=False))  # each behind its own predecessor


@pytest.mark.parametrize("excess", [-1, 0, 1])
def test_conversations_and_completions_at_the_limit(excess, tmp_path):
    tokenizer = tokenizer_of(CHATML)
    for row, whole in (
        ({"messages": [USER, ANSWER]}, own_rendering(tokenizer, [USER, ANSWER], [1])),
        ({"prompt": "ab", "completion": "cd"}, None),
    ):
        if whole is None:
            ids = tokenizer("abcd<|im_end|>").input_ids
            whole = ids, [IGNORED, IGNORED, *ids[2:]]
        limit = len(whole[0]) - excess
        file = lines(tmp_path, row)
        assert prepared(file, tokenizer, limit) == [(whole[0][:limit], whole[1][:limit])]
        if excess == 1:
            assert prepared(file, tokenizer, limit, truncation="keep_end") == [(whole[0][1:], whole[1][1:])]
            with pytest.raises(DataError, match="data.max_length"):
                prepared(file, tokenizer, limit, truncation="drop")
        else:
            assert prepared(file, tokenizer, limit, truncation="drop") == [whole]


# -- files ---------------------------------------------------------------------------------------------------


def test_paths_with_the_characters_of_patterns(tmp_path):
    rows = [{"text": f"row {number}"} for number in range(1100)]  # more than are read at once
    tokenizer = tokenizer_of(None)
    for name in ("a[1]", "b*{c,d}?"):
        folder = tmp_path / name
        folder.mkdir()
        table = datasets.Dataset.from_list(rows)
        table.to_parquet(folder / "x[0-9].parquet")
        found = prepared(folder / "x[0-9].parquet", tokenizer, template="alpaca")
        assert [tokenizer.decode(ids) for ids, _ in found] == [row["text"] + "<|im_end|>" for row in rows]
        assert prepared(folder, tokenizer, template="alpaca") == found
    table.data.table.to_pandas().to_feather(tmp_path / "y[1].arrow")
    assert prepared(tmp_path / "y[1].arrow", tokenizer, template="alpaca") == found


def test_a_byte_order_mark_is_no_part_of_the_data(tmp_path):
    tokenizer = tokenizer_of(CHATML)
    expected = [own_rendering(tokenizer, [USER, ANSWER], [1])]
    for name, content in (
        ("a.jsonl", json.dumps({"messages": [USER, ANSWER]})),
        ("a.json", json.dumps([{"messages": [USER, ANSWER]}], indent=1)),
        ("a.csv", "instruction,output\r\nHi,Hello\r\n"),
    ):
        (tmp_path / name).write_text(content, encoding="utf-8-sig")
        assert prepared(tmp_path / name, tokenizer) == expected


def test_a_cache_that_cannot_be_written_is_named_with_its_variable(tmp_path, monkeypatch):
    """A file stands where the folder should be: also root cannot write there."""
    (tmp_path / "file").write_text("")
    cache = tmp_path / "file" / "cache"
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(cache))
    with pytest.raises(ConfigError, match=f"{cache}.* cannot be written.*HF_DATASETS_CACHE") as caught:
        prepared(lines(tmp_path, {"text": "a"}), tokenizer_of(CHATML))
    assert "\n" not in str(caught.value)


def test_a_hub_cache_that_cannot_be_written_is_named_with_its_variable(tmp_path, monkeypatch):
    from hift_ds.hf.model_folder import resolve_model

    def refuse(*args: Any, **kwargs: Any) -> None:
        raise PermissionError(13, "Permission denied", "/cache/hub")

    monkeypatch.setattr("huggingface_hub.snapshot_download", refuse)
    monkeypatch.setattr("datasets.load_dataset", refuse)
    with pytest.raises(ConfigError, match="model.path: .*/cache/hub.*HF_HOME"):
        resolve_model("hub:owner/name")
    with pytest.raises(ConfigError, match="data.train: .*/cache/hub.*HF_HOME and HF_DATASETS_CACHE"):
        prepared(Path("hub:owner/name"), tokenizer_of(CHATML))


def test_a_source_that_cannot_be_read_is_not_taken_for_the_cache(tmp_path):
    (tmp_path / "a.jsonl").mkdir()
    (tmp_path / "a.jsonl" / "b.jsonl").symlink_to("b.jsonl")  # to itself
    with pytest.raises(DataError, match=r"data.train: .*b.jsonl"):
        prepared(tmp_path / "a.jsonl", tokenizer_of(CHATML))


# -- published templates -------------------------------------------------------------------------------------

MARKS = (
    "<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|python_tag|>", "<｜User｜>",
    "<｜Assistant｜>", "<｜end▁of▁sentence｜>", "<|start|>", "<|end|>", "<|message|>", "<|channel|>", "<|return|>",
    "<|call|>", "<start_of_turn>", "<end_of_turn>", "<|turn>", "<turn|>", "<|tool_response>", "<|user|>",
    "<|assistant|>", "<|system|>", "<|observation|>", "<|START_OF_TURN_TOKEN|>", "<|END_OF_TURN_TOKEN|>",
    "<|eot|>", "<|eom|>", "<end_of_utterance>",
)  # fmt: skip


def published() -> list[Path]:
    """TRL's copies of the chat templates of published models."""
    import trl

    return sorted((Path(trl.__file__).parent / "chat_templates").glob("*.jinja"))


@functools.cache
def as_published(file: Path) -> Any:
    tokenizer = byte_level(file.read_text(encoding="utf-8"), special=MARKS)
    tokenizer.add_tokens(["<think>", "</think>", *TOOL_TOKENS])
    return tokenizer


def accepted(file: Path, row: dict[str, Any]) -> bool:
    """Whether the template renders a conversation, and all of its texts and calls."""
    tokenizer = as_published(file)
    try:
        for tools in (
            row.get("tools"),
            None,
        ):  # last without the list of tools, whose names are not the calls'
            text = tokenizer.apply_chat_template(row["messages"], tools=tools, tokenize=False)
    except Exception:
        return False
    said = [word for message in row["messages"] for word in (message["content"] or "").split()]
    said += [c["function"]["name"] for message in row["messages"] for c in message.get("tool_calls", ())]
    return all(word in text for word in said)


def described(row: dict[str, Any]) -> dict[str, Any]:
    """With the descriptions that some templates insist on."""
    tools = [{**t, "function": {**t["function"], "description": "of it"}} for t in row.get("tools", ())]
    return {**row, "tools": tools} if tools else row


PUBLISHED_ROWS = {
    "two turns": {"messages": TWO_TURNS},
    "system": {"messages": [SYSTEM, *TWO_TURNS]},
    "assistant first": {"messages": [ANSWER, *TWO_TURNS]},
    "a call and its answer": described(CALLED[0]),
    "text and a call": described(CALLED[1]),
}


@pytest.mark.parametrize(("name", "enough"), zip(PUBLISHED_ROWS, (60, 50, 30, 20, 20), strict=True))
def test_published_templates(name, enough):
    """Each answer is learned from where it departs from the prompt that the model will have through the token that
    ends it, in the rendering that the tokenizer's own template gives for the conversation up to it."""
    row = PUBLISHED_ROWS[name]
    messages, tools = row["messages"], row.get("tools")
    answers = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
    tried = 0
    for file in filter(lambda file: accepted(file, row), published()):
        tokenizer = as_published(file)

        def ids_of(part: Any, prompt: bool = False, tokenizer: Any = tokenizer) -> list[int]:
            return tokenizer.apply_chat_template(part, tools=tools, add_generation_prompt=prompt)["input_ids"]

        found = Encoder(tokenizer)(Conversation(messages, tools), "x")
        labels = [
            [token if flag else IGNORED for token, flag in zip(sample.ids, sample.learned, strict=True)]
            for sample in found
        ]
        learned = [stretch for sample in labels for stretch in stretches(tokenizer, sample)]
        whole = len(found) == 1
        if whole:
            assert found[0].ids[: len(ids_of(messages))] == ids_of(messages), file.name
        assert len(learned) == len(answers) or found[0].remarks, file.name
        for index, text in zip(answers[-len(learned) :], learned, strict=True):
            answer = messages[index]
            assert (answer["content"] or "").strip() in text, (file.name, text)
            for said in answer.get("tool_calls", ()):
                assert said["function"]["name"] in text, (file.name, text)
            assert "Be brief" not in text and "system" not in text, (file.name, text)
            if index:
                prompt, through = ids_of(messages[:index], prompt=True), ids_of(messages[: index + 1])
                begin = next(i for i, (a, b) in enumerate(zip(prompt + [-1], through + [-2], strict=False)) if a != b)
                rest = tokenizer.decode(through[begin:]).rstrip()
                assert text.startswith(rest) or rest.startswith(text), (file.name, text, rest)
        tried += 1
    assert tried >= enough, tried


NAMED = ("alpaca", "chatml", "gemma", "llama3", "mistral", "qwen", "vicuna", "zephyr")


@pytest.mark.parametrize("name", NAMED)
@pytest.mark.parametrize("bos", [False, True])
def test_templates_by_name_for_base_models(name, bos, tmp_path):
    """Every answer is learned through a token that then is the end token, behind the prompt that the template gives."""
    tokenizer = byte_level(None, bos=bos, special=MARKS)
    tokenizer.eos_token = "<|end|>"  # of documents, as base models have it
    for messages in (TWO_TURNS, [SYSTEM, *TWO_TURNS]):
        file = lines(tmp_path, {"messages": messages})
        [(ids, labels)] = prepared(file, tokenizer, template=name)
        asked = len(messages) - 1
        whole = tokenizer.apply_chat_template(messages)["input_ids"]
        prompt = tokenizer.apply_chat_template(messages[:asked], add_generation_prompt=True)["input_ids"]
        assert ids[: len(whole)] == whole and ids[: len(prompt)] == prompt
        assert ids.count(tokenizer.bos_token_id) == bos == (ids[0] == tokenizer.bos_token_id)
        texts = stretches(tokenizer, labels)
        assert [text.removesuffix(tokenizer.eos_token).strip() for text in texts] == [
            "Hello",
            UNICODE.strip(),
        ]
        assert all(text.endswith(tokenizer.eos_token) for text in texts)
        assert "Be brief" in tokenizer.decode(ids) or messages is TWO_TURNS
    if name in ("alpaca", "gemma", "mistral", "vicuna"):
        with pytest.raises(DataError, match="line 1: .*no role tool"):
            prepared(lines(tmp_path, {"messages": [USER, {"role": "tool", "content": "x"}, ANSWER]}), tokenizer)


@pytest.mark.parametrize("name", ["llama3", "gemma"])
def test_a_template_by_name_writes_what_the_published_one_does(name):
    from hift_ds.data.chat_templates import set_chat_template

    [file] = [file for file in published() if file.name == f"{name}.jinja"]
    theirs = as_published(file).apply_chat_template(TWO_TURNS, tokenize=False)
    tokenizer = byte_level(None, bos=True, special=MARKS)
    end = {"llama3": "<|eot_id|>", "gemma": "<end_of_turn>"}[name]
    assert set_chat_template(tokenizer, name) == f"{name} ({end} is the end token now)"
    assert tokenizer.apply_chat_template(TWO_TURNS, tokenize=False) == theirs


# -- rows that are passed over -------------------------------------------------------------------------------


def test_rows_that_the_template_refuses_are_passed_over_and_said_up_to_a_tenth(tmp_path):
    """Gemma's and Mistral's templates insist on alternating roles; of ShareGPT files some rows never do."""
    tokenizer = tokenizer_of(MISTRAL_LIKE, bos=True)
    good, bad = {"messages": TWO_TURNS}, [{"messages": [ANSWER, *TWO_TURNS]}, {"messages": [USER, USER, ANSWER]}]
    silent = {"messages": [USER]}
    file = lines(tmp_path, *[good] * 20, *bad, *[good] * 10, silent)
    prepared_data = prepare_data(DataConfig(train=str(file)), tokenizer, 4000)
    expected = own_rendering(tokenizer, TWO_TURNS, [1, 3])
    assert [(row["input_ids"], row["labels"]) for row in prepared_data.train] == [expected] * 30
    [report] = prepared_data.reports
    assert (report.num_rows, report.num_samples, report.num_refused, report.num_dropped) == (33, 30, 3, 0)
    assert f"3 rows passed over (the first: {file}, line 21: the chat template refuses messages of assistant" in str(
        report
    )
    with pytest.raises(
        DataError, match=r"line 2: .*must alternate; data.train: so with 2 of 3 rows; see data.template"
    ):
        prepared(lines(tmp_path, good, *bad), tokenizer)


def test_a_template_without_an_end_is_stopped(tmp_path, monkeypatch):
    """The sandbox limits a range, but not loops in loops."""
    monkeypatch.setattr("hift_ds.data.rendering.RENDER_TIMEOUT_S", 0.3)
    loops = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
    with pytest.raises(ConfigError, match=r"data.template: the chat template does not come to an end within 0.3 s"):
        prepared(lines(tmp_path, {"messages": [USER, ANSWER]}), tokenizer_of(loops + CHATML))
    tokenizer = tokenizer_of("{% for i in range(100001) %}{% endfor %}" + CHATML)
    with pytest.raises(DataError, match="the chat template refuses .*[Rr]ange"):
        prepared(lines(tmp_path, {"messages": [USER, ANSWER]}), tokenizer)
    assert prepared(lines(tmp_path, {"messages": [USER, ANSWER]}), tokenizer_of(CHATML))  # the timer is off again


@pytest.mark.parametrize("template", ["CHATML", "LLAMA3_LIKE"])
def test_a_question_that_the_data_say_to_learn(template, tmp_path):
    """Axolotl's train: true on a message of another role: its text and its end, as of an answer. A weight of 1 says
    nothing of messages that are no answers."""
    tokenizer = tokenizer_of(globals()[template])
    end = {"CHATML": "<|im_end|>", "LLAMA3_LIKE": "<|e|>"}[template]
    for flag, learned in (("train", ["Hi", "Hello"]), ("training", ["Hi", "Hello"]), ("weight", ["Hello"])):
        row = {"messages": [SYSTEM, {**USER, flag: True}, ANSWER, {**USER, "train": False}, {**ANSWER, "train": False}]}
        [(ids, labels)] = prepared(lines(tmp_path, row), tokenizer)
        assert stretches(tokenizer, labels) == [text + end for text in learned]
        assert ids == tokenizer.apply_chat_template([SYSTEM, USER, ANSWER, USER, ANSWER])["input_ids"]
    [(_, labels)] = prepared(lines(tmp_path, row | {"messages": [{**USER, "train": True}, ANSWER]}), tokenizer,
                             mask_history=True)  # fmt: skip
    assert stretches(tokenizer, labels) == ["Hello" + end]


# -- tables and files of other writers -----------------------------------------------------------------------


def test_maps_bytes_and_views_in_parquet(tmp_path):
    """Spark writes maps; old writers write texts as bytes without saying so."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    tokenizer = tokenizer_of(CHATML)
    expected = [own_rendering(tokenizer, [USER, ANSWER], [1])]
    pair = {"instruction": pa.array(["Hi"]), "output": pa.array(["Hello"])}
    maps = pa.map_(pa.string(), pa.string())
    turns = [[("role", "user"), ("content", "Hi")], [("role", "assistant"), ("content", "Hello"), ("name", None)]]
    said = pa.array([{"role": "user", "content": "Hi", "meta": [("a", "b")]},
                     {"role": "assistant", "content": "Hello", "meta": None}],
                    type=pa.struct([("role", pa.string()), ("content", pa.string()), ("meta", maps)]))  # fmt: skip
    tables = {
        "messages of maps": {"messages": pa.array([turns], type=pa.list_(maps))},
        "a map in each message": {"messages": pa.ListArray.from_arrays([0, 2], said)},
        "a map beside": {**pair, "meta": pa.array([[("a", "b")]], type=maps)},
        "bytes": {name: column.cast(pa.binary()) for name, column in pair.items()},
        "views": {name: column.cast(pa.string_view()) for name, column in pair.items()},
        "categories": {name: column.dictionary_encode() for name, column in pair.items()},
        "bytes beside": {**pair, "thumbnail": pa.array([b"\xff\xd8"])},
        "a picture that no row has": {**pair, "image": pa.array([None], type=pa.binary())},
    }
    for number, (name, columns) in enumerate(tables.items()):
        pq.write_table(pa.table(columns), tmp_path / f"{number}.parquet")
        assert prepared(tmp_path / f"{number}.parquet", tokenizer) == expected, name
    pq.write_table(pa.table({**pair, "output": pa.array([b"\xff\xd8"])}), tmp_path / "x.parquet")
    with pytest.raises(DataError, match="row 1: output: expected text, got {'bytes': 2}"):
        prepared(tmp_path / "x.parquet", tokenizer)


def test_half_of_a_surrogate_pair_is_replaced_and_said(tmp_path):
    tokenizer = tokenizer_of(CHATML)
    (tmp_path / "rows.jsonl").write_text(
        '{"instruction": "\\ud83d\\ude42", "output": "a\\ud83d"}\n{"instruction": "Hi", "output": "Hello"}\n'
    )
    data = prepare_data(DataConfig(train=str(tmp_path / "rows.jsonl")), tokenizer, 4000)
    asked, answer = {"role": "user", "content": "🙂"}, {"role": "assistant", "content": "a\ufffd"}
    found = [(row["input_ids"], row["labels"]) for row in data.train]
    expected = [own_rendering(tokenizer, [asked, answer], [1]), own_rendering(tokenizer, [USER, ANSWER], [1])]
    assert found == expected
    assert "in 1 samples half of a surrogate pair is read as U+FFFD" in str(data.reports[0])


def test_half_of_a_surrogate_pair_in_a_text_of_json(tmp_path):
    """In arguments as OpenAI writes them, in a list of tools, and in messages in a column of CSV; the text of an answer
    stays as it is."""
    tokenizer = tokenizer_of(QWEN_LIKE)
    half, whole = r'{"city": "O\ud83d"}', {"city": "O\ufffd"}
    tools = [tool("weather", city={"description": "\ud83d"})]
    file = lines(tmp_path, {"messages": [USER, call("weather", half)], "tools": json.dumps(tools)})
    data = prepare_data(DataConfig(train=str(file)), tokenizer, 4000)
    row = {
        "messages": [USER, call("weather", whole)],
        "tools": [tool("weather", city={"description": "\ufffd"})],
    }
    assert [(row["input_ids"], row["labels"]) for row in data.train] == [called(row, tokenizer)]
    assert "in 1 samples half of a surrogate pair is read as U+FFFD" in str(data.reports[0])
    cell = json.dumps([USER, {**ANSWER, "content": "a\ud83d"}]).replace('"', '""')
    (tmp_path / "a.csv").write_text(f'messages\n"{cell}"\n')
    expected = [own_rendering(tokenizer, [USER, {**ANSWER, "content": "a\ufffd"}], [1])]
    assert prepared(tmp_path / "a.csv", tokenizer) == expected
    answer = {**ANSWER, "content": half}
    assert prepared(lines(tmp_path, {"messages": [USER, answer]}), tokenizer) == [
        own_rendering(tokenizer, [USER, answer], [1])
    ]


def test_two_columns_of_one_name_are_an_error(tmp_path):
    (tmp_path / "a.csv").write_text("instruction,output,output\nHi,Hello,Other\n")
    with pytest.raises(DataError, match="line 1: two columns are called 'output'"):
        prepared(tmp_path / "a.csv", tokenizer_of(CHATML))
    row = '{"instruction": "Hi", "output": "Hello", "output": "Other"}'
    for name, content in (("a.jsonl", f"{row}\n{row}\n"), ("b.json", f"[{row}]")):
        (tmp_path / name).write_text(content)
        with pytest.raises(DataError, match="line 1: not valid JSON: an object has the key 'output' twice"):
            prepared(tmp_path / name, tokenizer_of(CHATML))


@pytest.mark.parametrize("column", ["image", "images", "videos", "audio"])
@pytest.mark.parametrize("row", [{"messages": [USER, ANSWER]}, {"instruction": "Hi", "output": "Hello"},
                                 {"prompt": "Hi", "completion": "Hello"}])  # fmt: skip
def test_rows_about_pictures_are_refused(column, row, tmp_path):
    """As TRL refuses them: "<image>" would be learned as a text. An empty column, which a table gives every row, says
    nothing; beside plain text it may be anything."""
    tokenizer = tokenizer_of(CHATML)
    expected = prepared(lines(tmp_path, row), tokenizer)
    for nothing in (None, [], "", float("nan"), {}):
        assert prepared(lines(tmp_path, {**row, column: nothing}), tokenizer) == expected
    for value in ("a.png", ["a.png"], {"path": "a.png"}):
        with pytest.raises(DataError, match=f"line 1: {column}: pictures, video and sound cannot be trained on"):
            prepared(lines(tmp_path, {**row, column: value}), tokenizer)
    assert prepared(lines(tmp_path, {"text": "Hi", column: ["a.png"]}), tokenizer)


def test_a_file_of_one_object(tmp_path):
    """One row over several lines, one list of rows in an object, and what cannot be told."""
    tokenizer = tokenizer_of(CHATML)
    expected = [own_rendering(tokenizer, [USER, ANSWER], [1])]
    row = {"messages": [USER, ANSWER]}
    for content in (row, {"version": 1, "data": [row], "tags": ["a"]}, {"instruction": "Hi", "output": "Hello"}):
        (tmp_path / "a.json").write_text(json.dumps(content, indent=1))
        assert prepared(tmp_path / "a.json", tokenizer) == expected
    (tmp_path / "a.json").write_text(json.dumps({"train": [row], "test": [row]}, indent=1))
    with pytest.raises(DataError, match=r"several lists of rows \(train, test\)"):
        prepared(tmp_path / "a.json", tokenizer)


def test_data_sets_that_were_saved_to_disk(tmp_path):
    """One of them, splits together, and files that are no longer what datasets wrote."""
    tokenizer = tokenizer_of(CHATML)
    expected = [own_rendering(tokenizer, [USER, ANSWER], [1])]
    saved = datasets.Dataset.from_list([{"messages": [USER, ANSWER]}])
    other = datasets.Dataset.from_list([{"messages": [USER, {**ANSWER, "content": "Other"}]}])
    datasets.DatasetDict({"validation": other, "train": saved}).save_to_disk(tmp_path / "splits")
    assert prepared(tmp_path / "splits", tokenizer) == expected
    data = prepare_data(
        DataConfig(train={"path": str(tmp_path / "splits"), "split": "val"}), tokenizer, 4000
    ).train  # fmt: skip
    assert "Other" in tokenizer.decode(data[0]["input_ids"])
    with pytest.raises(DataError, match="no split 'test' in .*; found train, validation; set split"):
        prepare_data(DataConfig(train={"path": str(tmp_path / "splits"), "split": "test"}), tokenizer, 4000)
    for file, content in (("data-00000-of-00001.arrow", "no arrow"), ("state.json", "{"), ("state.json", "[]")):
        folder = tmp_path / f"{file} {len(content)}"
        saved.save_to_disk(folder)
        (folder / file).write_text(content)
        with pytest.raises(DataError, match="data.train: cannot read the saved data set") as caught:
            prepared(folder, tokenizer)
        assert "\n" not in str(caught.value)


def test_files_that_macos_leaves_beside_others_are_no_data(tmp_path):
    lines(tmp_path, {"messages": [USER, ANSWER]})
    (tmp_path / "._rows.jsonl").write_bytes(b"\x00\x05\x16\x07")
    tokenizer = tokenizer_of(CHATML)
    assert prepared(tmp_path, tokenizer) == [own_rendering(tokenizer, [USER, ANSWER], [1])]


def test_roles_in_capitals_and_options_that_are_no_template_s(tmp_path):
    tokenizer = tokenizer_of(CHATML)
    row = {"conversations": [{"from": "Human", "value": "Hi"}, {"from": "GPT", "value": "Hello"}]}
    assert prepared(lines(tmp_path, row), tokenizer) == [own_rendering(tokenizer, [USER, ANSWER], [1])]
    row = {"messages": [USER, ANSWER], "chat_template_kwargs": {"continue_final_message": True}}
    with pytest.raises(DataError, match="chat_template_kwargs: 'continue_final_message' is no option"):
        prepared(lines(tmp_path, row), tokenizer)
