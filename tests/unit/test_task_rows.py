"""Rows of every task: their spellings, what becomes of them, and scores."""

from __future__ import annotations

import csv
import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from datasets import Dataset
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from hift_ds.data import scores
from hift_ds.data.config import DataConfig
from hift_ds.data.question_data import AnswerScores, TokenizeQuestions
from hift_ds.data.task_data import Preparation
from hift_ds.data.task_rows import guess_task_columns, to_example
from hift_ds.errors import DataError
from hift_ds.train.tasks import TASKS
from tests.helpers.tiny_tokenizers import byte_level
from tests.unit.test_launch import own_cache  # noqa: F401  (a fixture)
from tests.unit.test_tasks import talk

# -- rows ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("format", "row", "expected"),
    [
        ("preference", {"instruction": "a", "input": "b", "chosen": "c", "rejected": "d"},
         {"prompt": [{"role": "user", "content": "a\nb"}], "chosen": [{"role": "assistant", "content": "c"}],
          "rejected": [{"role": "assistant", "content": "d"}]}),
        ("preference", {"conversations": [{"from": "human", "value": "a"}], "chosen": {"from": "gpt", "value": "c"},
                        "rejected": {"from": "gpt", "value": "d"}},
         {"prompt": [{"role": "user", "content": "a"}], "chosen": [{"role": "assistant", "content": "c"}],
          "rejected": [{"role": "assistant", "content": "d"}]}),
        ("rated", {"prompt": "a", "completion": "b", "label": "False"},
         {"prompt": "a", "completion": "b", "label": False}),
        ("tagged", {"tokens": "a b", "tags": "[0, 1]"}, {"tokens": ["a", "b"], "tags": ["0", "1"]}),
        ("tagged", {"tokens": "12", "tags": "O"}, {"tokens": ["12"], "tags": ['"O"']}),
        ("tagged", {"tokens": "[ a ]", "tags": "O O O"}, {"tokens": ["[", "a", "]"], "tags": ['"O"'] * 3}),
        ("labelled", {"text": "a", "label": "[OTHER]"}, {"text": "a", "text_pair": "", "label": '"[OTHER]"'}),
        ("question", {"question": "q", "context": "a b", "answers": [{"text": "b", "answer_start": 2}]},
         {"question": "q", "context": "a b", "texts": ["b"], "starts": [2]}),
        # as many write that there is no answer
        ("question", {"question": "q", "context": "a b", "answers": {"text": [""], "answer_start": [-1]}},
         {"question": "q", "context": "a b", "texts": [], "starts": []}),
    ],
)  # fmt: skip
def test_spellings_of_rows(format, row, expected):
    assert to_example(row, format, "here") == expected


@pytest.mark.parametrize(
    ("format", "row", "message"),
    [
        ("preference", {"prompt": "a", "chosen": talk("a", "b"), "rejected": "c"}, "texts in all columns or lists"),
        ("preference", {"chosen": [{"role": "assistant", "content": "", "tool_calls": [{"function": {}}]}],
                        "rejected": talk("a", "b")}, "have role and content only"),
        ("preference", {"prompt": "a", "chosen": "b", "rejected": "c", "system": "d"}, "system: .* left out"),
        ("rated", {"prompt": "a", "completion": "b", "label": 1, "tools": [{"name": "f"}]}, "are for messages"),
        # as pandas writes lists into CSV
        ("labelled", {"text": "a", "label": "['a', 'b']"}, "label: not valid JSON"),
        ("tagged", {"tokens": "['a', 'b']", "tags": "['O', 'O']"}, "tokens: not valid JSON"),
        ("tagged", {"tokens": "a b", "tags": "[0 1]"}, "tags: not valid JSON"),
        ("preference", {"prompt": "a", "chosen": "[{'role': 'user', 'content': 'a'}]", "rejected": "c"}, "as Python"),
        ("rated", {"prompt": "a", "completion": "b", "label": "good"}, "expected true .* or false, got 'good'"),
        ("labelled", {"text": "a", "label": math.inf}, "a number that is not infinite, got inf"),
        ("preference", {"prompt": talk("a", "b")[:1], "chosen": talk("a", "b"), "rejected": talk("a", "b")[:1]},
         "rejected: .* an assistant's answer, got one of user last"),
        ("preference", {"prompt": talk("a", "b")[:1], "chosen": [{**talk("a", "b")[1], "weight": 0}],
                        "rejected": talk("a", "c")[1:]}, "chosen: the answer is marked as not to be learned"),
        ("rated", {"prompt": talk("a", "b")[:1], "completion": talk("a", "b")[:1], "label": 1}, "completion: .* user"),
        ("preference", {"chosen": talk("a", "b"), "rejected": talk("a", "c"), "images": ["a.png"]}, "images: pictures"),
        ("rated", {"prompt": "a", "completion": "b", "label": 1, "image": "a.png"}, "image: pictures"),
        ("preference", {"prompt": [{"role": "system", "content": "s"}, *talk("a", "b")[:1]], "system": "t",
                        "chosen": talk("a", "b")[1:], "rejected": talk("a", "c")[1:]}, "another system prompt, 's'"),
        ("tagged", {"tokens": ["a"], "tags": [1, 2]}, "one tag for each word, got 1 and 2"),
        ("question", {"question": "q", "context": "a b", "answers": {"text": ["c"], "answer_start": [2]}},
         "'c' is not at letter 2 of the context"),
        ("pair", {"source": "a"}, "no 'target', which format pair needs"),
    ],
)  # fmt: skip
def test_bad_rows_are_one_line(format, row, message):
    with pytest.raises(DataError, match=f"^here: .*{message}"):
        to_example(row, format, "here")


def test_columns_of_well_known_data_sets_are_guessed():
    assert guess_task_columns({"premise": "a", "hypothesis": "b", "label": 0}, "labelled") == {
        "text": "premise", "text_pair": "hypothesis"
    }  # fmt: skip
    assert guess_task_columns({"question": "a", "sentence": "b", "label": 0}, "labelled") == {
        "text": "question", "text_pair": "sentence"
    }  # fmt: skip
    assert guess_task_columns({"text": "a", "sentence": "b", "label": 0}, "labelled") == {}


def prepared(folder: Path, task: str, rows: list[Any], tokenizer: Any = None, **config: Any) -> Any:
    file = folder / f"{task}.jsonl"
    file.write_text("\n".join(json.dumps(row) for row in rows))
    how = Preparation(DataConfig(train=str(file), **config), tokenizer or byte_level(), 96, {})
    return TASKS[task].prepare(how)


def test_preferences_with_what_stands_beside_messages(tmp_path):
    """What TRL's trainers read: tools as text, options of the template; a system prompt is the first message."""
    tools, options = [{"type": "function", "function": {"name": "f"}}], {"enable_thinking": False}
    question, good, bad = talk("a", "b")[:1], talk("a", "b")[1:], talk("a", "c")[1:]
    system = {"role": "system", "content": "s"}
    beside = {"system": "s", "tools": tools, "chat_template_kwargs": options}
    rows = [{"prompt": question, "chosen": good, "rejected": bad, **beside}]
    rows += [{**rows[0], "system": None, "tools": None}]
    found = prepared(tmp_path, "dpo", rows).train
    whole = {"prompt": [system, *question], "chosen": good, "rejected": bad, "tools": json.dumps(tools),
             "chat_template_kwargs": options}  # fmt: skip
    assert list(found) == [whole, {**whole, "prompt": question, "tools": None}]
    assert prepared(tmp_path, "dpo", [{"instruction": "a", "chosen": "b", "rejected": "c", **beside}]).train[0] == whole
    implicit = {"chosen": question + good, "rejected": question + bad, **beside}
    found = prepared(tmp_path, "reward", [implicit]).train[0]
    assert found["chosen"] == [system, *question, *good] and found["rejected"] == [system, *question, *bad]
    rated = {"prompt": question, "completion": good, "label": True, **beside}
    kto = {"prompt": [system, *question], "completion": good, "label": True, "tools": json.dumps(tools),
           "chat_template_kwargs": options}  # fmt: skip
    assert prepared(tmp_path, "kto", [rated]).train[0] == kto
    with pytest.raises(DataError, match="line 2: has .*chat_template_kwargs.a, but .* line 1 has .*enable_thinking"):
        prepared(tmp_path, "dpo", [rows[0], {**rows[0], "chat_template_kwargs": {"a": 1}}])


def test_a_prompt_that_the_chosen_conversation_repeats(tmp_path):
    """UltraFeedback's columns, as TRL reads them: ``messages`` is the chosen conversation once more."""
    trl = pytest.importorskip("trl.data_utils")
    good, bad = talk("a ?", "b"), talk("a ?", "c")
    for beside in ({}, {"messages": good}, {"prompt": "a ?", "messages": good, "score_chosen": 8.0}, {"prompt": "a ?"}):
        found = prepared(tmp_path, "dpo", [{"chosen": good, "rejected": bad, **beside}]).train[0]
        assert trl.extract_prompt(found) == trl.maybe_extract_prompt({"chosen": good, "rejected": bad, **beside})
        assert "prompt" not in found
    [row] = prepared(tmp_path, "dpo", [{"conversations": good[:1], "chosen": good[1], "rejected": bad[1]}]).train
    assert row == {"prompt": good[:1], "chosen": good[1:], "rejected": bad[1:]}  # LLaMA-Factory's


def labelled(*labels: Any) -> list[dict[str, Any]]:
    return [{"text": "a", "label": label} for label in labels]


@pytest.mark.parametrize(
    ("labels", "config", "kind", "expected", "names"),
    [
        ([0.0, 2.0, 1.0], {}, "single_label_classification", [0, 2, 1], ["0", "1", "2"]),  # as pandas has them
        ([1.0, 0.0], {"labels": ["no", "yes"]}, "single_label_classification", [1, 0], ["no", "yes"]),
        ([0.5, 1.0, -2.0], {}, "regression", [0.5, 1.0, -2.0], None),
        ([-1.0, 0.5, 1.0], {}, "regression", [-1.0, 0.5, 1.0], None),
        ([["a"], ["c", "a"], []], {}, "multi_label_classification", [[1, 0], [1, 1], [0, 0]], ["a", "c"]),
        ([[0, 2], [1]], {}, "multi_label_classification", [[1, 0, 1], [0, 1, 0]], ["0", "1", "2"]),
        # a 0 or 1 for each class, as transformers' own examples have them
        ([[0, 1, 1], [0, 0, 0]], {}, "multi_label_classification", [[0, 1, 1], [0, 0, 0]], ["0", "1", "2"]),
        ([[1.0, 0.0], [0.0, 1.0]], {}, "multi_label_classification", [[1, 0], [0, 1]], ["0", "1"]),
        ([[True, False, True]] * 2, {"labels": ["x", "y", "z"]}, "multi_label_classification", [[1, 0, 1]] * 2,
         ["x", "y", "z"]),
    ],
)  # fmt: skip
def test_what_labels_are(tmp_path, labels, config, kind, expected, names):
    data = prepared(tmp_path, "classification", labelled(*labels), **config)
    assert data.model_options["problem_type"] == kind and list(data.train["labels"]) == expected
    assert list(data.model_options.get("id2label", {}).values()) == (names or [])


@pytest.mark.parametrize(
    ("labels", "config", "message"),
    [
        ([0, -1], {}, "line 2: label: -1 stands for rows whose label is not published"),
        ([-1.0, 1.0], {}, "line 1: label: -1 stands for rows whose label is not published"),
        ([0.5, 1.0], {"labels": ["no", "yes"]}, "data.labels: the labels are numbers with a fraction"),
        ([[0, 1, 1], [0, 1, 0]], {"labels": ["no", "yes"]}, "label 2 is none of no, yes"),
        ([[0, 1], [0, 1, 0]], {}, r"line 2: label \[0, 1, 0\] names a class twice; if it is a 0 or 1 for each class"),
        ([[0.25, 0.75], [0.5, 0.5]], {}, "line 1: label: a list with a fraction"),
    ],
)
def test_labels_that_cannot_be(tmp_path, labels, config, message):
    with pytest.raises(DataError, match=message):
        prepared(tmp_path, "classification", labelled(*labels), **config)


@pytest.mark.parametrize(
    ("texts", "labels", "config"),
    [
        (["0", "1", "1"], [0, 1, 1], {"labels": ["no", "yes"]}),
        (["1.0", "0.0"], [1, 0], {}),
        (["10", "9"], [10, 9], {}),
        (["0.5", "3", "-2.0"], [0.5, 3, -2], {}),
        (["1", "0"], ["1", "0"], {"labels": ["1", "0"]}),
        (["007", "1"], ["007", "1"], {}),
        (["True", "no"], ["True", "no"], {}),
        (['["a", "b"]', "[]"], [["a", "b"], []], {}),
        (["[0, 1]", "[1, 1]"], [[0, 1], [1, 1]], {}),
    ],
)
def test_labels_of_a_file_that_holds_text_alone_are_those_of_one_with_types(tmp_path, texts, labels, config):
    """Training and evaluation, each from CSV."""
    for name, column in (("a.csv", texts), ("b.csv", texts[::-1])):
        with (tmp_path / name).open("w", newline="") as file:
            csv.writer(file).writerows([("text", "label"), *((f"3.{i}", label) for i, label in enumerate(column))])
    how = Preparation(
        DataConfig(train=str(tmp_path / "a.csv"), eval=str(tmp_path / "b.csv"), **config), byte_level(), 96, {}
    )
    found, expected = (
        TASKS["classification"].prepare(how),
        prepared(tmp_path, "classification", labelled(*labels), **config),
    )
    assert found.model_options == expected.model_options
    assert list(found.train["labels"]) == list(found.eval["labels"])[::-1] == list(expected.train["labels"])
    head = {"architectures": ["BertForSequenceClassification"], "id2label": {"0": "no", "1": "yes"}}
    if texts == ["0", "1", "1"]:  # a model whose classes have names keeps them
        how = Preparation(DataConfig(train=str(tmp_path / "a.csv")), byte_level(), 96, head)
        assert list(TASKS["classification"].prepare(how).model_options["id2label"].values()) == ["no", "yes"]


def test_a_class_of_minus_one_in_a_file_that_holds_text_alone(tmp_path):
    (tmp_path / "a.csv").write_text("text,label\na,1\nb,-1\n")
    config = DataConfig(train=str(tmp_path / "a.csv"))
    with pytest.raises(DataError, match="a.csv, line 3: label: -1 stands for rows whose label is not published"):
        TASKS["classification"].prepare(Preparation(config, byte_level(), 96, {}))
    named = config.model_copy(update={"labels": ["-1", "1"]})
    assert list(TASKS["classification"].prepare(Preparation(named, byte_level(), 96, {})).train["labels"]) == [1, 0]


@pytest.mark.parametrize("length", range(1, 6))
def test_the_end_of_a_target_is_there_or_counted_as_cut(tmp_path, length):
    """Of a tokenizer that puts none there itself."""
    file = tmp_path / "rows.jsonl"
    file.write_text(json.dumps({"source": "a", "target": "bcdef"[:length]}))
    config = DataConfig(train=str(file), val_size=0)
    data = TASKS["seq2seq"].prepare(Preparation(config, byte_level(), 4, {}))
    ids = [*byte_level()("bcdef"[:length]).input_ids, 2]
    assert data.train[0]["labels"] == ids[:4]
    cut = f"1 cut to data.max_length 4 ({len(ids) - 4} tokens lost)"
    assert (cut in str(data.reports[0])) is (len(ids) > 4)
    if len(ids) > 4:
        drop = config.model_copy(update={"truncation": "drop"})
        with pytest.raises(DataError, match="all rows are longer than data.max_length 4"):
            TASKS["seq2seq"].prepare(Preparation(drop, byte_level(), 4, {}))


def test_pairs_without_a_difference_are_said(tmp_path):
    good = talk("a", "b")
    rows = [{"chosen": good, "rejected": good}, {"chosen": good, "rejected": talk("a", "c")}]
    assert "in 1 rows chosen and rejected are the same" in str(prepared(tmp_path, "dpo", rows).reports[0])


def test_no_answer_written_as_an_empty_text_competes_in_evaluation(tmp_path):
    """The scores are those of an empty list, SQuAD 2's own form."""
    rows = [
        {"question": "q", "context": "abc", "answers": answers}
        for answers in (
            {"text": [""], "answer_start": [-1]},
            {"text": [""], "answer_start": [0]},
            {"text": [], "answer_start": []},
        )
    ]
    for row in rows:
        file = tmp_path / "qa.jsonl"
        file.write_text(json.dumps(row))
        data = prepared(tmp_path, "qa", [row], eval=str(file))
        assert "1 questions without an answer" in str(data.reports[0])
        logits = np.zeros((1, len(data.eval[0]["input_ids"])))
        logits[0, 0] = 9  # "no answer"
        assert data.score(SimpleNamespace(predictions=(logits, logits)))["exact_match"] == 100


def test_texts_that_look_like_numbers_are_names_where_the_file_has_types(tmp_path):
    data = prepared(tmp_path, "classification", labelled("3.10", "3.9"))
    assert list(data.model_options["id2label"].values()) == ["3.10", "3.9"]


def test_words_whose_tag_is_not_to_be_learned(tmp_path):
    rows = [{"tokens": ["a", "b", "c"], "tags": [-100, 1, 0]}, {"tokens": ["a"], "tags": [2]}]
    data = prepared(tmp_path, "token_classification", rows)
    assert [[tag for tag in tags if tag != -100] for tags in data.train["labels"]] == [[1, 0], [2]]
    assert list(data.model_options["id2label"].values()) == ["0", "1", "2"]


def test_texts_that_were_rendered_in_advance(tmp_path):
    """One of each token that the tokenizer puts around every text."""
    tokenizer = byte_level(bos=True)
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<|endoftext|> $A <|im_end|>", pair="<|endoftext|> $A <|im_end|> $B <|im_end|>",
        special_tokens=[("<|endoftext|>", 0), ("<|im_end|>", 2)],
    )  # fmt: skip
    begin, end = "<|endoftext|>", "<|im_end|>"
    for task, bare, rendered in (
        ("dpo", {"prompt": "a", "chosen": "b", "rejected": "c"},
         {"prompt": begin + "a", "chosen": "b", "rejected": "c"}),
        ("reward", {"chosen": "ab", "rejected": "ac"}, {"chosen": begin + "ab", "rejected": begin + "ac"}),
        ("kto", {"prompt": "a", "completion": "b", "label": True},
         {"prompt": begin + "a", "completion": "b", "label": True}),
        ("classification", {"text": "a", "label": 0}, {"text": begin + "a" + end, "label": 0}),
        ("classification", {"text": "a", "text_pair": "b", "label": 0},
         {"text": begin + "a", "text_pair": "b" + end, "label": 0}),
        ("seq2seq", {"source": "a", "target": "b"}, {"source": begin + "a" + end, "target": "b" + end}),
    ):  # fmt: skip
        expected, found = (prepared(tmp_path, task, [row], tokenizer).train[0] for row in (bare, rendered))
        assert found == expected, task
        if "input_ids" in found:
            assert found["input_ids"].count(0) == 1


def test_half_of_a_surrogate_pair_in_any_task(tmp_path):
    rows = [{"source": "a\ud83d", "target": "b"}, {"source": "a\ufffd", "target": "b"}]
    data = prepared(tmp_path, "seq2seq", rows)
    assert data.train[0]["input_ids"] == data.train[1]["input_ids"]
    assert "in 1 rows half of a surrogate pair is read as U+FFFD" in str(data.reports[0])
    (tmp_path / "a.csv").write_text('tokens,tags\n"[""a\\ud83d""]","[""O""]"\n')  # in a column that is JSON itself
    how = Preparation(DataConfig(train=str(tmp_path / "a.csv")), byte_level(), 96, {})
    data = TASKS["token_classification"].prepare(how)
    assert byte_level().decode(data.train[0]["input_ids"]).strip() == "a\ufffd"
    assert "in 1 rows half of a surrogate pair is read as U+FFFD" in str(data.reports[0])


# -- scores: numbers that others have published ----------------------------------------------------------------


def test_classification_scores():
    """scikit-learn's example of a macro F1."""
    found = scores.classification_scores([0, 2, 1, 0, 0, 1], [0, 1, 2, 0, 1, 2])
    assert found["f1"] == pytest.approx(0.26666, abs=1e-4) and found["accuracy"] == pytest.approx(1 / 3)
    binary = scores.classification_scores([1, 1, 0, 1], [1, 1, 1, 0])  # scikit-learn: matthews_corrcoef -0.33...
    assert binary["matthews_correlation"] == pytest.approx(-1 / 3) and binary["f1"] == pytest.approx(2 / 3)
    assert scores.multi_label_scores([[1, 0], [1, 1]], [[1, 0], [0, 1]]) == {"accuracy": 0.5, "f1": pytest.approx(0.8)}
    assert scores.regression_scores([1, 2, 3], [2, 4, 7]) == {
        "mse": pytest.approx(7.0),
        "pearson": pytest.approx(0.99339927),
    }


def test_tag_scores():
    """seqeval's example."""
    right = [["O", "O", "O", "B-MISC", "I-MISC", "I-MISC", "O"], ["B-PER", "I-PER", "O"]]
    given = [["O", "O", "B-MISC", "I-MISC", "I-MISC", "I-MISC", "O"], ["B-PER", "I-PER", "O"]]
    assert scores.tag_scores(given, right) == {"accuracy": 0.8, "precision": 0.5, "recall": 0.5, "f1": 0.5}
    assert scores.entities(["B-A", "I-A", "B-A", "O", "I-B", "I-C"]) == [
        ("A", 0, 1),
        ("A", 2, 2),
        ("B", 4, 4),
        ("C", 5, 5),
    ]
    assert scores.tag_scores([["NN", "VB"]], [["NN", "NN"]]) == {"accuracy": 0.5}


def test_answer_scores():
    found = scores.answer_scores(["the Denver Broncos!", "", "in Rome"], [["Denver Broncos"], [], ["Paris", "Rome"]])
    assert found["exact_match"] == pytest.approx(200 / 3) and found["f1"] == pytest.approx(100 * (1 + 1 + 2 / 3) / 3)


def test_text_scores():
    """BLEU of the example of Papineni et al. (2002), candidate 1 with reference 1 alone: precisions 14/18 ... ."""
    assert scores.text_scores(["a b c d e"], ["a b c d e"]) == {
        "bleu": pytest.approx(100),
        "rouge_l": pytest.approx(100),
    }
    given, right = "the cat sat on the mat today", "the cat sat on a mat"
    found = scores.text_scores([given], [right])
    precisions = (5 / 7) * (3 / 6) * (2 / 5) * (1 / 4)
    assert found["bleu"] == pytest.approx(100 * precisions**0.25) and found["rouge_l"] == pytest.approx(1000 / 13)


@pytest.mark.parametrize("answer", ["xyz", " xyz", "xyz ", " xyz. ", "\u0301xyz", "\u200bxyz\u200b"])
def test_what_a_tokenizer_leaves_out_at_the_ends_of_an_answer(answer):
    """White space, accents, characters without width: BERT's tokens have none of them. It is an answer all the same."""
    vocabulary = {word: number for number, word in enumerate(["[UNK]", "ab", "xyz", "cd", "q", "?", "."])}
    backend = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    backend.normalizer = normalizers.BertNormalizer(strip_accents=True)
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="[UNK]", pad_token="[UNK]")
    context = f"ab ab{answer if answer[0] == ' ' else ' ' + answer} cd"
    row = json.dumps({"question": "q?", "context": context, "texts": [answer], "starts": [context.index(answer)]})
    for one in (tokenizer, byte_level()):
        out = TokenizeQuestions(one, 60, "")({"example": [row]}, [0])
        begin, end = out["start_positions"][0], out["end_positions"][0]
        found = context[out["offsets"][0][begin][0] : out["offsets"][0][end][1]]
        assert begin and (found == answer or found.strip(" \u0301\u200b") == answer.strip(" \u0301\u200b"))


def test_answers_are_found_in_the_pieces_of_a_long_context():
    """The piece with the answer is the third; the logits point at it."""
    context = "ab " * 30 + "xyz" + " cd" * 5
    start = context.index("xyz")
    row = json.dumps({"question": "q?", "context": context, "texts": ["xyz"], "starts": [start]})
    out = TokenizeQuestions(byte_level(), 60, "")({"example": [row]}, [0])
    holds = [index for index, begin in enumerate(out["start_positions"]) if begin > 0]
    assert len(out["input_ids"]) > 2 and holds
    for index in holds:
        begin, end = out["start_positions"][index], out["end_positions"][index]
        assert context[out["offsets"][index][begin][0] : out["offsets"][index][end][1]] == "xyz"
    shape = (len(out["input_ids"]), 60)
    starts, ends = np.zeros(shape), np.zeros(shape)
    starts[holds[-1], out["start_positions"][holds[-1]]] = ends[holds[-1], out["end_positions"][holds[-1]]] = 9
    pieces = Dataset.from_dict({"offsets": out["offsets"], "example": out["example"]})
    score = AnswerScores([json.loads(row)], pieces)
    assert score(SimpleNamespace(predictions=(starts, ends)))["exact_match"] == 100
    assert score(SimpleNamespace(predictions=(ends, starts)))["exact_match"] == 0
