"""Cutting, dropping, counting, splitting, packing, batching."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch

import model_zoo
from hift_ds.data.config import DataConfig
from hift_ds.data.packing import packed_samples_are_isolated
from hift_ds.data.prepare import PreparedData, prepare_data
from hift_ds.engine.engine import HiFTEngine
from hift_ds.errors import ConfigError, DataError
from hift_ds.train.finetune import finetune
from hift_ds.train.run_config import load_run_config
from tests.helpers.tiny_tokenizers import byte_level
from tests.unit.test_launch import write_run

IGNORED = -100


@pytest.fixture(autouse=True)
def private_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path_factory.mktemp("datasets")))
    datasets.disable_progress_bars()


def prepare(
    folder: Path, rows: list[dict[str, Any]], max_length: int = 64, tokenizer: Any = None, **options: Any
) -> PreparedData:
    file = folder / "rows.jsonl"
    content = "\n".join(json.dumps(row) for row in rows)
    if not file.exists() or file.read_text(encoding="utf-8") != content:
        file.write_text(content, encoding="utf-8")
    config = DataConfig(train=str(file), **options)
    return prepare_data(config, tokenizer or byte_level(), max_length)


def completions(count: int) -> list[dict[str, str]]:
    """Prompts and answers of many lengths, no two rows the same."""
    return [{"prompt": f"{i:02d}" + "p" * (7 * i % 11), "completion": "c" * (5 * i % 13)} for i in range(count)]


def learned(row: dict[str, list[int]]) -> list[int]:
    return [label for label in row["labels"] if label != IGNORED]


def test_labels_are_the_answers_ids(tmp_path):
    prepared = prepare(tmp_path, [{"prompt": "ab", "completion": "cd"}])
    tokenizer = byte_level()
    assert prepared.train.column_names == ["input_ids", "labels"]
    assert tokenizer.decode(prepared.train[0]["input_ids"]) == "abcd<|im_end|>"
    assert prepared.train[0]["labels"] == [IGNORED, IGNORED, *tokenizer("cd<|im_end|>").input_ids]


def test_long_samples_are_cut_counted_and_dropped_when_no_answer_is_left(tmp_path):
    rows = [
        {"prompt": "p" * 5, "completion": "c" * 4},  # 10 tokens with the end token: fits
        {"prompt": "p" * 5, "completion": "c" * 20},  # 26: cut by 16
        {"prompt": "p" * 10, "completion": "c"},  # the prompt alone fills it: dropped
        {"prompt": "p" * 9, "completion": "c"},  # one answer token is left
    ]
    prepared = prepare(tmp_path, rows, max_length=10)
    [report] = prepared.reports
    assert [len(row["input_ids"]) for row in prepared.train] == [10, 10, 10]
    assert [len(learned(row)) for row in prepared.train] == [5, 5, 1]
    assert (report.num_rows, report.num_samples, report.num_dropped) == (4, 3, 1)
    assert (report.num_truncated, report.cut_tokens) == (2, 17)
    assert (report.tokens, report.learned_tokens, report.longest_tokens) == (30, 11, 10)
    text = str(report)
    assert "2 cut to data.max_length 10 (17 tokens lost)" in text and "1 dropped: nothing to learn within 10" in text


def test_other_truncations(tmp_path):
    rows = [{"prompt": "abcdef", "completion": "ghij"}, {"prompt": "a", "completion": "b"}]
    tokenizer = byte_level()
    kept = prepare(tmp_path, rows, max_length=6, truncation="keep_end").train
    assert tokenizer.decode(kept[0]["input_ids"]) == "fghij<|im_end|>" and len(learned(kept[0])) == 5
    dropped = prepare(tmp_path, rows, max_length=6, truncation="drop")
    assert len(dropped.train) == 1 and dropped.reports[0].num_dropped == 1


def test_plain_text_is_cut_into_samples_and_every_token_is_predicted(tmp_path):
    """A piece begins with the last token of the one before: what begins a sample is not predicted."""
    prepared = prepare(tmp_path, [{"text": "abcdefghij"}], max_length=4)
    pieces = [byte_level().decode(row["input_ids"]) for row in prepared.train]
    assert pieces == ["abcd", "defg", "ghij", "j<|im_end|>"]
    assert all(row["labels"] == row["input_ids"] for row in prepared.train)
    assert prepared.reports[0].num_truncated == 0


@pytest.mark.parametrize(
    ("rows", "options", "message"),
    [
        (
            completions(5),
            {"max_length": 2},
            "data.max_length: 2 leaves nothing to learn in any of 5 train samples.*train_on_prompt",
        ),
        ([{"text": ""}], {}, "data.train: nothing to learn in any of 1 samples"),
        (completions(5), {"val_size": 5}, "data.val_size: 5 holds out 5 rows, but data.train has only 5"),
    ],
)
def test_nothing_to_learn(tmp_path, rows, options, message):
    with pytest.raises(DataError, match=message):
        prepare(tmp_path, rows, **options)


def test_a_tokenizer_of_another_model_is_found_by_its_ids(tmp_path):
    file = tmp_path / "a.jsonl"
    file.write_text('{"text": "abc"}')
    with pytest.raises(DataError, match="model.tokenizer: makes token id .* but the model has only 50 embeddings"):
        prepare_data(DataConfig(train=str(file)), byte_level(), 64, vocab_size=50)


def test_the_held_out_split_follows_the_seed_and_leaks_nothing(tmp_path):
    def rows_of(dataset):
        return [tuple(row["input_ids"]) for row in dataset]

    first = prepare(tmp_path, completions(40), val_size=0.25, seed=1)
    again = prepare(tmp_path, completions(40), val_size=0.25, seed=1)
    other = prepare(tmp_path, completions(40), val_size=10, seed=2)
    assert rows_of(first.eval) == rows_of(again.eval) and rows_of(first.train) == rows_of(again.train)
    assert set(rows_of(first.eval)) != set(rows_of(other.eval))
    assert len(first.eval) == len(other.eval) == 10 and len(first.train) == 30
    assert not set(rows_of(first.eval)) & set(rows_of(first.train))


def test_eval_data_of_its_own(tmp_path):
    held_out = tmp_path / "held_out.jsonl"
    held_out.write_text('{"text": "xyz"}')
    prepared = prepare(tmp_path, completions(3), eval=str(held_out), packing=True)
    assert byte_level().decode(prepared.eval[0]["input_ids"]) == "xyz<|im_end|>"
    assert [report.name for report in prepared.reports] == ["train", "eval"]
    assert prepared.eval.column_names == ["input_ids", "labels"]  # evaluation is not packed


def test_counts_are_the_same_when_tokens_come_from_the_cache(tmp_path, monkeypatch):
    rows = completions(20)
    first = prepare(tmp_path, rows, max_length=8, num_workers=2)

    def forbidden(*args):
        raise AssertionError("tokenised again")

    monkeypatch.setattr("hift_ds.data.row_tokens.Tokenize.__call__", forbidden)
    again = prepare(tmp_path, rows, max_length=8, num_workers=2)
    assert again.reports == first.reports and again.train[:] == first.train[:]


def test_batches_are_padded_on_the_right_and_padding_is_neither_seen_nor_learned(tmp_path):
    tokenizer = byte_level()
    tokenizer.padding_side = "left"  # as LLaMA's tokenizer has it, for generation
    prepared = prepare(
        tmp_path,
        [{"prompt": "a", "completion": "b"}, {"prompt": "abc", "completion": "d"}],
        tokenizer=tokenizer,
    )
    batch = prepared.collator([prepared.train[0], prepared.train[1]])
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]]
    assert batch["labels"][0].tolist()[3:] == [IGNORED, IGNORED]
    assert batch["input_ids"].dtype == batch["labels"].dtype == torch.int64
    assert tokenizer.padding_side == "left"


def test_packing_keeps_every_sample_whole_and_the_seed_decides_the_neighbours(tmp_path):
    rows = completions(30)
    plain = prepare(tmp_path, rows, max_length=32)
    packed = prepare(tmp_path, rows, max_length=32, packing=True)
    other = prepare(tmp_path, rows, max_length=32, packing=True, seed=7)

    def samples(dataset):
        for row in dataset:
            begin = 0
            for length in row["seq_lengths"]:
                yield (
                    tuple(row["input_ids"][begin : begin + length]),
                    tuple(row["labels"][begin : begin + length]),
                )
                begin += length
            assert begin == len(row["input_ids"]) <= 32

    assert len(packed.train) < len(plain.train) / 1.5
    expected = sorted((tuple(row["input_ids"]), tuple(row["labels"])) for row in plain.train)
    assert sorted(samples(packed.train)) == expected == sorted(samples(other.train))
    assert packed.train[:] != other.train[:]
    assert packed.reports[0].num_packed_rows == len(packed.train)
    assert packed.train[:] == prepare(tmp_path, rows, max_length=32, packing=True).train[:]


def test_packed_samples_give_the_loss_and_gradients_they_give_alone(tmp_path):
    rows = completions(8)
    torch.manual_seed(0)
    model = model_zoo.tiny.build("llama", vocab_size=300, use_cache=False)  # as the Trainer sets it
    plain = prepare(tmp_path, rows, max_length=48)
    packed = prepare(tmp_path, rows, max_length=48, packing=True)
    assert len(packed.train) > 1

    def loss_and_gradient(prepared):
        batch = prepared.collator([prepared.train[i] for i in range(len(prepared.train))])
        model.zero_grad()
        loss = model(**batch).loss
        loss.backward()
        return loss.item(), torch.cat([p.grad.flatten() for p in model.parameters()])

    alone, together = loss_and_gradient(plain), loss_and_gradient(packed)
    assert together[0] == pytest.approx(alone[0], rel=1e-5)
    torch.testing.assert_close(together[1], alone[1], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("family", "isolated"),
    [("llama", True), ("gpt2", True), ("mixtral", True), ("opt", False), ("bloom", False)],
)
def test_models_that_let_packed_samples_see_each_other_are_found(family, isolated):
    torch.manual_seed(0)
    model = model_zoo.tiny.build(family)
    model.train()
    assert packed_samples_are_isolated(model) is isolated
    assert model.training


def test_packing_is_refused_where_it_gives_other_positions():
    """RoBERTa counts them from pad_token_id + 1: a packed sample, which begins at 0, would be another one."""
    from transformers import RobertaConfig, RobertaForCausalLM

    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    torch.manual_seed(0)
    config = RobertaConfig(**sizes, vocab_size=60, is_decoder=True, max_position_embeddings=40)
    assert packed_samples_are_isolated(RobertaForCausalLM(config)) is False


@pytest.mark.parametrize("family", ["llama", "opt"])
def test_packing_of_a_model_in_shards(family, tmp_path, monkeypatch):
    """The engine gathers its weights, and tells it before the first step."""
    model_zoo.tiny.build(family, vocab_size=280, max_position_embeddings=256).save_pretrained(tmp_path / "model")
    byte_level().save_pretrained(tmp_path / "model")
    (tmp_path / "data.jsonl").write_text("\n".join(json.dumps({"text": "ab" * (3 + i % 5)}) for i in range(30)))
    changes = {"data__packing": True, "train__max_steps": 3, "deepspeed": {"zero_optimization": {"stage": 3}}}
    run = load_run_config(write_run(tmp_path, tmp_path / "run", **changes))
    if family == "llama":
        assert finetune(run)["steps"] == 3
        return
    monkeypatch.setattr(HiFTEngine, "step", lambda engine: pytest.fail("a step"))
    with pytest.raises(ConfigError, match="^data.packing: true, but in OPTForCausalLM .* see each other"):
        finetune(run)


def test_a_weighted_mixture_repeats_rows_but_no_held_out_one(tmp_path):
    def rows(name: str, count: int) -> str:
        (tmp_path / f"{name}.jsonl").write_text(
            "\n".join(json.dumps({"text": f"{name}{index:02d}"}) for index in range(count))
        )
        return str(tmp_path / f"{name}.jsonl")

    train = [{"path": rows("a", 20), "weight": 1}, {"path": rows("b", 8), "weight": 2.0}]
    prepared = prepare_data(DataConfig(train=train, val_size=7, template="alpaca"), byte_level(), 64)
    texts = [byte_level().decode(row["input_ids"])[:3] for row in prepared.train]
    held_out = {byte_level().decode(row["input_ids"])[:3] for row in prepared.eval}
    counts = [sum(text.startswith(name) for text in texts) for name in "ab"]
    assert counts[1] == 2 * counts[0] == 2 * (20 - sum(text.startswith("a") for text in held_out))
    assert len(held_out) == 7 and not held_out & set(texts) and len(held_out | set(texts)) == 28
    again = prepare_data(DataConfig(train=train, val_size=7, template="alpaca"), byte_level(), 64)
    assert again.train[:] == prepared.train[:]
    with pytest.raises(ValueError, match="eval: weight has no meaning"):
        DataConfig(train=train, eval=train)


def test_a_guess_of_the_columns_is_said(tmp_path):
    prepared = prepare(tmp_path, [{"question": "2+2?", "answer": "4"}], max_length=400)
    assert "columns question, answer read as instruction, output (a guess" in str(prepared.reports[0])
    whole = byte_level().decode(prepared.train[0]["input_ids"])
    assert "user\n2+2?<|im_end|>\n<|im_start|>assistant\n4<|im_end|>" in whole
