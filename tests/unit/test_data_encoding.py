"""Which tokens are learned, for templates that behave and templates that do not."""

from __future__ import annotations

from typing import Any

import pytest

from hift_ds.data.chat_templates import set_chat_template
from hift_ds.data.encoding import Encoder
from hift_ds.data.formats import Completion, Conversation, Text
from hift_ds.errors import ConfigError, DataError
from tests.helpers.tiny_tokenizers import LLAMA_LIKE, byte_level, sentencepiece_folder

TWO_TURNS = [
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": " Hello\n  you "},
    {"role": "user", "content": "Bye"},
    {"role": "assistant", "content": "Ciao"},
]
# Thoughts of all but the last answer are dropped, so no answer's text is a prefix of the whole.
QWEN3_LIKE = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}"
    "{% if m.role == 'assistant' %}"
    "{{ m.content if loop.last else m.content.split('</think>')[-1] }}{% else %}{{ m.content }}{% endif %}"
    "{{ '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
GLM_LIKE = (  # nothing ends a message but the next one
    "{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)
PLAIN = "{% for m in messages %}{{ m.role + ': ' + m.content + '\n' }}{% endfor %}"
PARTS = "{% for m in messages %}{% for p in m.content %}{{ p.text }}{% endfor %}{{ eos_token }}{% endfor %}"
NO_SYSTEM = (
    "{% if messages[0].role == 'system' %}{{ raise_exception('no system role') }}{% endif %}{{ messages[0].content }}"
)


def encode(tokenizer: Any, sample: Any, **options: bool) -> list[tuple[str, list[str]]]:
    """(whole text, learned stretches) of each training sample."""
    out = []
    for encoded in Encoder(tokenizer, **options)(sample, "a.jsonl, line 1"):
        stretches: list[list[int]] = []
        before = False
        for token, learned in zip(encoded.ids, encoded.learned, strict=True):
            if learned and not before:
                stretches.append([])
            if learned:
                stretches[-1].append(token)
            before = learned
        out.append((tokenizer.decode(encoded.ids), [tokenizer.decode(ids) for ids in stretches]))
    return out


def test_every_answer_of_a_chatml_conversation_and_nothing_else():
    tokenizer = byte_level()
    [(whole, learned)] = encode(tokenizer, Conversation(TWO_TURNS))
    assert whole == tokenizer.apply_chat_template(TWO_TURNS, tokenize=False)
    assert learned == [" Hello\n  you <|im_end|>", "Ciao<|im_end|>"]


def test_the_ids_are_those_of_apply_chat_template():
    tokenizer = byte_level(bos=True)  # a template writes BOS itself: none may be added in front of it
    [encoded] = Encoder(tokenizer)(Conversation(TWO_TURNS), "x")
    assert encoded.ids == tokenizer.apply_chat_template(TWO_TURNS)["input_ids"]


def test_history_and_prompts():
    tokenizer = byte_level()
    assert encode(tokenizer, Conversation(TWO_TURNS), mask_history=True)[0][1] == ["Ciao<|im_end|>"]
    assert encode(tokenizer, Conversation(TWO_TURNS, first_answer=2))[0][1] == ["Ciao<|im_end|>"]
    [(whole, learned)] = encode(tokenizer, Conversation(TWO_TURNS), train_on_prompt=True)
    assert learned == [whole]


def test_a_question_at_the_end_is_context():
    [(whole, learned)] = encode(byte_level(), Conversation([*TWO_TURNS, {"role": "user", "content": "Still there?"}]))
    assert whole.endswith("Still there?<|im_end|>\n") and learned == [
        " Hello\n  you <|im_end|>",
        "Ciao<|im_end|>",
    ]


def test_a_template_that_drops_thoughts_gives_each_answer_the_prompt_it_will_have():
    tokenizer = byte_level(QWEN3_LIKE)
    messages = [dict(m) for m in TWO_TURNS]
    messages[1]["content"], messages[3]["content"] = "<think>a</think>One", "<think>b</think>Two"
    first, second = encode(tokenizer, Conversation(messages))
    assert first[1] == ["<think>a</think>One<|im_end|>"]
    assert second[1] == ["<think>b</think>Two<|im_end|>"]
    prompt = tokenizer.apply_chat_template(messages[:3], tokenize=False, add_generation_prompt=True)
    assert second[0].startswith(prompt) and "<think>a" not in second[0]


def test_where_nothing_ends_an_answer_the_next_role_does_and_the_end_token():
    tokenizer = byte_level(GLM_LIKE, special=("<|user|>", "<|assistant|>"))
    [(_, learned)] = encode(tokenizer, Conversation(TWO_TURNS))
    assert learned == [" Hello\n  you <|user|>", "Ciao<|im_end|>"]


def test_a_template_of_plain_words_gets_an_end_token():
    [(whole, learned)] = encode(byte_level(PLAIN), Conversation(TWO_TURNS[:2]))
    assert whole == "user: Hi\nassistant:  Hello\n  you \n<|im_end|>"
    assert learned[-1].endswith(" Hello\n  you \n<|im_end|>")


def test_a_token_that_straddles_prompt_and_answer_is_learned():
    """With merges, '\\n' of the prompt and the answer's first '\\n' become one token."""
    from tokenizers import models, pre_tokenizers

    tokenizer = byte_level()
    vocabulary = tokenizer.get_vocab()
    newline = "Ċ"
    tokenizer.backend_tokenizer.model = models.BPE(
        vocab={**vocabulary, newline * 2: len(vocabulary)}, merges=[(newline, newline)]
    )
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    answer = {"role": "assistant", "content": "\nHello"}
    [(_, learned)] = encode(tokenizer, Conversation([TWO_TURNS[0], answer]))
    assert learned == ["\n\nHello<|im_end|>"]
    [(_, learned)] = encode(tokenizer, Completion("Hi\n", "\nHello"))
    assert learned == ["\n\nHello<|im_end|>"]


@pytest.mark.parametrize(
    ("template", "messages", "message"),
    [
        (
            NO_SYSTEM,
            [{"role": "system", "content": "S"}, *TWO_TURNS],
            "refuses messages of system, .*no system role",
        ),
        (PARTS, TWO_TURNS, "leaves out the answer that ends with 'you'; it may expect content in parts"),
        (PLAIN, TWO_TURNS[:1], "no assistant message to learn from; roles are user"),
    ],
)
def test_what_a_template_cannot_do_is_an_error_of_the_row(template, messages, message):
    with pytest.raises(DataError, match=f"^a.jsonl, line 1: .*{message}"):
        encode(byte_level(template), Conversation(messages))


def test_a_completion_is_learned_to_its_end_token_without_a_template():
    for bos in (False, True):
        tokenizer = byte_level(bos=bos)
        [(whole, learned)] = encode(tokenizer, Completion("2+2=", "4"))
        assert whole == ("<|endoftext|>" if bos else "") + "2+2=4<|im_end|>"
        assert learned == ["4<|im_end|>"]
        assert encode(tokenizer, Completion("2+2=", "4<|im_end|>"))[0][1] == ["4<|im_end|>"]  # not twice


def test_plain_text_is_learned_whole():
    assert encode(byte_level(), Text("Once upon")) == [("Once upon<|im_end|>", ["Once upon<|im_end|>"])]


@pytest.mark.parametrize("text", ["", " \n"])  # WikiText has a third of them
def test_a_blank_text_is_nothing_to_learn(text):
    """With a BOS its end token would be learned: to end at once."""
    assert encode(byte_level(bos=True), Text(text)) == [("", [])]


def test_the_fallback_template_on_a_llama_tokenizer(tmp_path):
    from hift_ds.data.tokenizers import load_tokenizer

    tokenizer = load_tokenizer(sentencepiece_folder(tmp_path, **LLAMA_LIKE))
    assert set_chat_template(tokenizer) == "alpaca"
    messages = [{"role": "system", "content": "Be nice"}, *TWO_TURNS]
    [encoded] = Encoder(tokenizer)(Conversation(messages), "x")
    assert encoded.ids[0] == tokenizer.bos_token_id and tokenizer.bos_token_id not in encoded.ids[1:]
    [(whole, learned)] = encode(tokenizer, Conversation(messages))
    assert "### Instruction:\nHi\n\n### Response:\n Hello" in whole
    assert [part.strip() for part in learned] == ["Hello\n  you </s>", "Ciao</s>"]
    # generation continues exactly what was trained
    prompt = tokenizer.apply_chat_template(messages[:-1], add_generation_prompt=True)["input_ids"]
    assert (
        encoded.ids[: len(prompt)] == prompt and encoded.learned[len(prompt)] and not encoded.learned[len(prompt) - 1]
    )


def test_templates_by_name_and_file(tmp_path):
    tokenizer = byte_level()
    assert set_chat_template(tokenizer, "auto") == "the tokenizer's own"
    assert set_chat_template(tokenizer, "chatml") == "chatml"
    assert encode(tokenizer, Conversation(TWO_TURNS))[0][1][1] == "Ciao<|im_end|>"
    file = tmp_path / "mine.jinja"
    file.write_text("{{ messages[0].content }}", encoding="utf-8-sig")  # a byte-order mark is no text
    assert set_chat_template(tokenizer, str(file)) == str(file)
    assert tokenizer.apply_chat_template(TWO_TURNS, tokenize=False) == "Hi"
    with pytest.raises(ConfigError, match="data.template: 'chatlm' is neither auto, alpaca, chatml"):
        set_chat_template(tokenizer, "chatlm")


def test_chatml_needs_its_tokens(tmp_path):
    from hift_ds.data.tokenizers import load_tokenizer

    tokenizer = load_tokenizer(sentencepiece_folder(tmp_path, **LLAMA_LIKE))
    with pytest.raises(ConfigError, match=r"chatml needs the tokens <\|im_start\|>, <\|im_end\|>"):
        set_chat_template(tokenizer, "chatml")
