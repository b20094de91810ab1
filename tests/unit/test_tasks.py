"""Every task of the run file: its rows, its scores, and a run of each from file to export; two of them against the
plain trainer."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
import yaml
from safetensors.torch import load_file
from transformers import AutoTokenizer, set_seed

import model_zoo
from hift_ds import HiFTTrainer
from hift_ds.cli.main import main
from hift_ds.data import scores
from hift_ds.errors import ConfigError, DataError
from hift_ds.train.finetune import finetune
from hift_ds.train.group_size import ModelSizes, head_in_every_step
from hift_ds.train.head_predictions import ANSWERS
from hift_ds.train.run_config import load_run_config
from hift_ds.train.settings import resolve
from hift_ds.train.tasks import TASKS
from tests.helpers.tiny_tokenizers import byte_level
from tests.unit.test_launch import own_cache  # noqa: F401  (a fixture)

ONE_GROUP = {"groups": [["."]], "lr_update": "step"}


def words(seed: int, length: int) -> str:
    return " ".join("abcdefgh"[(seed * 7 + 3 * i) % 8] * 2 for i in range(length))


def talk(question: str, answer: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def qa_row(i: int) -> dict[str, Any]:
    context = f"{words(i, 4)} xx {words(i + 1, 2)}"
    return {
        "question": "where?",
        "context": context,
        "answers": {"text": ["xx"], "answer_start": [context.index("xx")]},
    }


# kind -> (task, family, row number -> row)
KINDS: dict[str, tuple[str, str, Any]] = {
    "text": ("text", "llama", lambda i: {"text": words(i, 12)}),
    "dpo": ("dpo", "llama", lambda i: {
        "prompt": words(i, 3) + " ", "chosen": "yes " + words(i, 2), "rejected": "no " + words(i, 2)}),
    "dpo_messages": ("dpo", "llama", lambda i: {
        "chosen": talk(words(i, 3), "good " + words(i, 2)), "rejected": talk(words(i, 3), "bad")}),
    "kto": ("kto", "llama", lambda i: {
        "prompt": words(i, 3) + " ", "completion": ("yes " if i % 3 else "no ") + words(i, 2), "label": i % 3 > 0}),
    "reward": ("reward", "llama", lambda i: {
        "prompt": words(i, 2) + " ", "chosen": "yes " + words(i, 2), "rejected": "no " + words(i, 2)}),
    "classification": ("classification", "roberta", lambda i: {
        "sentence": ("good " if i % 2 else "bad ") + words(i, 3), "label": ["negative", "positive"][i % 2]}),
    "classification_decoder": ("classification", "gpt2", lambda i: {
        "text": "abc"[i % 3] * 9, "label": i % 3}),
    "several_labels": ("classification", "bert", lambda i: {
        "text": words(i, 3), "labels": ["a", "b", "c"][: 1 + i % 3]}),
    "a_number": ("classification", "bert", lambda i: {"text": words(i, 1 + i % 5), "label": i % 5 / 2}),
    "token_classification": ("token_classification", "bert", lambda i: {
        "tokens": words(i, 5).split(), "ner_tags": [["O", "B-X", "I-X"][ord(w[0]) % 3] for w in words(i, 5).split()]}),
    "qa": ("qa", "bert", qa_row),
    "seq2seq": ("seq2seq", "t5", lambda i: {"document": words(i, 4), "summary": words(i, 1)}),
}  # fmt: skip


@pytest.fixture(autouse=True)
def no_pictures(monkeypatch):
    """Half of such a short run; they are drawn in other tests."""
    monkeypatch.setattr("hift_ds.report.callback.plot_run", lambda folder: [])
    monkeypatch.setattr("hift_ds.train.after_training.plot_run", lambda folder: [])


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> Path:
    """Pretrained models, none of them with the head of a task."""
    root = tmp_path_factory.mktemp("models")
    lengths = {"roberta": 258, "t5": None, "gpt2": None}
    for family in {family for _, family, _ in KINDS.values()}:
        length = lengths.get(family, 256)
        options = {"max_position_embeddings": length} if length else {"n_positions": 256} if family == "gpt2" else {}
        model_zoo.tiny.build(family, vocab_size=280, **options).save_pretrained(root / family)
        byte_level().save_pretrained(root / family)
    return root


def write(folders: Path, folder: Path, kind: str, **changes: Any) -> Path:
    task, family, row = KINDS[kind]
    data = folder / f"{kind}.jsonl"
    data.write_text("\n".join(json.dumps(row(i)) for i in range(26)))
    run: dict[str, Any] = {
        "task": task,
        "model": {"path": str(folders / family)},
        "data": {"train": str(data), "val_size": 6, "max_length": 96},
        "train": {
            "output_dir": str(folder / "run"), "max_steps": 6, "micro_batch_size": 2, "learning_rate": 5e-3,
            "eval_steps": 6, "save_steps": 3,
        },
    }  # fmt: skip
    for key, value in changes.items():
        section, _, name = key.partition("__")
        run.setdefault(section, {})
        if name:
            run[section][name] = value
        else:
            run[section] = value
    file = folder / "run.yaml"
    file.write_text(yaml.safe_dump(run))
    return file


# -- runs ------------------------------------------------------------------------------------------------------


SLOW = ("dpo_messages", "classification_decoder", "several_labels", "a_number")


@pytest.mark.parametrize("kind", [pytest.param(k, marks=[pytest.mark.slow] if k in SLOW else []) for k in KINDS])
def test_a_run_trains_evaluates_exports_and_is_asked(folders, tmp_path, kind, capsys):
    task = TASKS[KINDS[kind][0]]
    if task.uses_trl:
        pytest.importorskip("trl")
    rate = {"train__learning_rate": 1e-2} if task.has_own_head else {}  # to see it learn in six steps
    results = finetune(load_run_config(write(folders, tmp_path, kind, **rate)))
    assert results["steps"] == 6 and results["never_updated"] == 0
    assert results["eval_loss"] < results["eval_loss_before"]
    assert any(f"eval_{name}" in results and f"eval_{name}_before" in results for name in task.metrics)
    model = task.model_class().from_pretrained(tmp_path / "run" / "model")
    before = task.model_class().from_pretrained(folders / KINDS[kind][1])
    moved = {n for n, v in model.state_dict().items() if not torch.equal(v, before.state_dict().get(n, v - 1))}
    assert {name for name, _ in model.named_parameters()} <= moved
    card = (tmp_path / "run" / "model" / "README.md").read_text()
    assert f"{task.auto_class}.from_pretrained" in card and "train_samples" not in card
    if kind == "classification":
        assert model.config.id2label == {0: "negative", 1: "positive"}
    if kind == "several_labels":
        assert model.config.problem_type == "multi_label_classification" and model.config.num_labels == 3
    capsys.readouterr()
    if not task.is_language_modelling:
        assert main(["eval", str(tmp_path / "run"), "--json", *(["--batch-size", "2"] if kind == "kto" else [])]) == 0
        found = json.loads(capsys.readouterr().out)
        for name in ("loss", *task.metrics):
            if f"eval_{name}" in results:
                assert found[name] == pytest.approx(results[f"eval_{name}"], abs=2e-5), name
    if KINDS[kind][0] in ANSWERS:
        predictions_are_what_evaluation_counts(kind, tmp_path, capsys)


def predictions_are_what_evaluation_counts(kind: str, tmp_path: Path, capsys: Any) -> None:
    """``hift-ds predict`` a row at a time against the trainer's scores of the same rows."""
    task, data = KINDS[kind][0], str(tmp_path / f"{kind}.jsonl")
    out = tmp_path / "answers.jsonl"
    assert main(["predict", str(tmp_path / "run"), "--data", data, "-o", str(out), "--batch-size", "3",
                 *(["--max-new-tokens", "95"] if task == "seq2seq" else [])]) == 0  # fmt: skip
    capsys.readouterr()
    # Whole batches: TRL's scores are means over batches.
    assert main(["eval", str(tmp_path / "run"), "--data", data, "--json", "--batch-size", "13"]) == 0
    counted = json.loads(capsys.readouterr().out)
    rows, answers = rows_of(kind), [json.loads(line) for line in out.read_text().splitlines()]
    assert counted["rows"] == len(answers) == len(rows)
    said = [row["prediction"] for row in answers]
    if task == "reward":
        found = {"accuracy": np.mean([one["chosen"] > one["rejected"] for one in said]),
                 "margin": np.mean([one["chosen"] - one["rejected"] for one in said])}  # fmt: skip
    elif task == "qa":
        found = scores.answer_scores(said, [row["answers"]["text"] for row in rows])
    elif task == "seq2seq":
        found = scores.text_scores(said, [row["summary"] for row in rows])
    elif task == "token_classification":
        found = scores.tag_scores(said, [row["ner_tags"] for row in rows])
    elif kind == "a_number":
        found = scores.regression_scores(np.array(said), np.array([row["label"] for row in rows]))
    elif kind == "several_labels":
        sets = [[[name in one for name in "abc"] for one in many] for many in (said, [row["labels"] for row in rows])]
        found = scores.multi_label_scores(*map(np.array, sets))
    else:
        found = {"accuracy": np.mean([one == str(row["label"]) for one, row in zip(said, rows, strict=True)])}
    for name, value in found.items():
        assert counted.get(name, value) == pytest.approx(value, abs=1e-4), name
    assert found.keys() & counted.keys()


def test_other_labels_and_missing_columns_are_one_line(folders, tmp_path, capsys):
    finetune(load_run_config(write(folders, tmp_path, "classification")))
    other = tmp_path / "other.jsonl"
    other.write_text(
        json.dumps({"sentence": "good", "label": "maybe"}) + "\n" + json.dumps({"sentence": "", "label": "x"})
    )
    for verb, message in (
        (["eval"], "knows the labels negative, positive; the data have maybe, x"),
        (["predict", "-o", str(tmp_path / "out.jsonl")], "other.jsonl, line 2: no 'text'; found columns: text, label"),
        (["chat"], "holds RobertaForSequenceClassification, which does not write text"),
    ):
        capsys.readouterr()
        assert (
            main([verb[0], str(tmp_path / "run"), *verb[1:], *(["--data", str(other)] if verb != ["chat"] else [])])
            == 2
        )
        assert message in capsys.readouterr().err


def test_an_interrupted_run_with_a_new_head_ends_like_one_that_was_not(folders, tmp_path):
    whole = finetune(load_run_config(write(folders, tmp_path, "classification")))
    expected = (tmp_path / "run" / "model" / "model.safetensors").read_bytes()
    for name in ("all_results.json", "checkpoint-6"):
        (tmp_path / "run" / name).rename(tmp_path / name)
    again = finetune(load_run_config(tmp_path / "run.yaml"))
    assert again["eval_loss"] == whole["eval_loss"] and again["steps"] == 6
    assert (tmp_path / "run" / "model" / "model.safetensors").read_bytes() == expected


@pytest.mark.parametrize("kind", ["classification", "classification_decoder", "token_classification", "qa", "reward"])
def test_the_head_that_is_always_active_is_what_transformers_makes_anew(folders, tmp_path, kind):
    run = load_run_config(write(folders, tmp_path, kind))
    task, source = TASKS[run.task], run.model.path
    _, info = task.model_class().from_pretrained(source, output_loading_info=True)
    model = ModelSizes.read(source, False, task.auto_class)
    keys, (line,) = head_in_every_step(resolve(run, 1), model)
    names = [name for name, _ in model.model.named_parameters()]
    chosen = [n for n in names if any(re.search(pattern, n) for pattern in keys["hift.always_active"])]
    assert set(chosen) == set(info["missing_keys"]) and chosen and all(name in line for name in chosen)
    for given in ({"always_active": []}, {"groups": [["."]]}, {"group_size": "all"}):
        said = load_run_config(write(folders, tmp_path, kind, hift=given))
        assert head_in_every_step(resolve(said, 1), model) == ({}, ())


@pytest.mark.parametrize("given", [None, []])
def test_a_new_head_learns_in_every_step_unless_it_is_given_turns(folders, tmp_path, given):
    """And a run that began without it, as earlier versions did, goes on without it."""
    hift = {"group_size": 1} | ({} if given is None else {"always_active": given})
    file = write(folders, tmp_path, "classification", hift=hift)
    finetune(load_run_config(file))
    coverage = json.loads((tmp_path / "run" / "coverage.json").read_text())["updates"]
    head = {name for name in coverage if name.startswith("classifier.")}
    assert head and all((coverage[name] == 6) is (given is None and name in head) for name in coverage), coverage
    if given is None:
        return
    settings = tmp_path / "run" / "checkpoint-3" / "settings.json"
    assert "hift.always_active" not in json.loads(settings.read_text())["fit"]["chosen"]
    write(folders, tmp_path, "classification", hift={"group_size": 1}, train__max_steps=9)
    finetune(load_run_config(file))
    again = json.loads((tmp_path / "run" / "coverage.json").read_text())
    counts = again["updates"].values()
    assert again["num_steps"] == 9 and max(counts) < 6 and max(counts) - min(counts) == 1, again["updates"]  # in turns


def plain(folder: Path, cls: Any, args_cls: Any, model: Any, rows: Any, tokenizer: Any, **options: Any) -> Any:
    os.environ.pop("ACCELERATE_USE_DEEPSPEED", None)
    args = args_cls(
        str(folder / "plain"), max_steps=6, per_device_train_batch_size=2, learning_rate=5e-3, save_strategy="no",
        lr_scheduler_type="cosine", logging_steps=1, report_to=[], use_cpu=True, seed=42, data_seed=42,
        disable_tqdm=True, bf16=False, **options,
    )  # fmt: skip
    trainer = cls(model=model, args=args, train_dataset=rows, processing_class=tokenizer)
    trainer.train()
    return trainer


def rows_of(kind: str) -> list[dict[str, Any]]:
    return [KINDS[kind][2](i) for i in range(26)]


def same_weights(ours: Path, model: Any) -> None:
    theirs = type(model).from_pretrained(ours).state_dict()
    for name, value in model.state_dict().items():
        torch.testing.assert_close(theirs[name], value, atol=2e-6, rtol=0, msg=lambda m, name=name: f"{name}: {m}")


def plain_classifier(
    folders: Path, tmp_path: Path, cls: Any = transformers.Trainer, takes_counts: bool | None = None, **arguments: Any
) -> transformers.Trainer:
    """The rows of the classification task by transformers alone.

    Args:
        takes_counts: the model's ``accepts_loss_kwargs``; None: not set.
    """
    from datasets import Dataset

    tokenizer = AutoTokenizer.from_pretrained(folders / "roberta")
    rows = Dataset.from_list([
        {**tokenizer(row["sentence"]), "labels": int(row["label"] == "positive")} for row in rows_of("classification")
    ])  # fmt: skip
    set_seed(42)
    model = transformers.AutoModelForSequenceClassification.from_pretrained(folders / "roberta", num_labels=2)
    if takes_counts is not None:
        model.accepts_loss_kwargs = takes_counts
    return plain(tmp_path, cls, transformers.TrainingArguments, model, rows, tokenizer, **arguments)


def test_classification_is_the_plain_trainers(folders, tmp_path):
    finetune(load_run_config(write(folders, tmp_path, "classification", hift=ONE_GROUP, data__val_size=0,
                                   train__eval_steps=None)))  # fmt: skip
    same_weights(tmp_path / "run" / "model", plain_classifier(folders, tmp_path).model)


@pytest.mark.parametrize("kind", ["classification", "qa", "seq2seq"])
def test_accumulated_rows_are_one_batch(folders, tmp_path, kind):
    """The models' losses are means of a pass, which transformers takes for parts of a sum."""
    options = {"hift": ONE_GROUP, "data__val_size": 0, "train__eval_steps": None, "train__optimizer": "SGD",
               "data__shuffle": False}  # fmt: skip
    weights = []
    for micro, passes in ((4, 1), (1, 4)):
        folder = tmp_path / str(passes)
        folder.mkdir()
        finetune(load_run_config(write(folders, folder, kind, train__micro_batch_size=micro,
                                       train__gradient_accumulation_steps=passes, **options)))  # fmt: skip
        weights.append(load_file(folder / "run" / "model" / "model.safetensors"))
    for name, value in weights[0].items():
        torch.testing.assert_close(weights[1][name], value, atol=1e-6, rtol=0, msg=lambda m, n=name: f"{n}: {m}")


def test_a_trainer_counts_the_loss_of_a_head_for_every_pass_unless_told(folders, tmp_path):
    """As docs/trainer.md says: transformers' and ours alike, and what to do about it."""

    def first_loss(**options: Any) -> float:
        trainer = plain_classifier(folders, tmp_path, gradient_accumulation_steps=4, **options)
        return trainer.state.log_history[0]["loss"]

    ours = {"cls": HiFTTrainer, "deepspeed": {"hift": {}}}
    mean = first_loss(takes_counts=False, **ours)
    assert first_loss(**ours) == pytest.approx(4 * mean) and first_loss() == pytest.approx(4 * mean)


def test_dpo_is_trls(folders, tmp_path):
    from datasets import Dataset

    trl = pytest.importorskip("trl")
    finetune(load_run_config(write(folders, tmp_path, "dpo", hift=ONE_GROUP, data__val_size=0, train__eval_steps=None)))
    model = transformers.AutoModelForCausalLM.from_pretrained(folders / "llama")
    tokenizer = AutoTokenizer.from_pretrained(folders / "llama")
    rows = Dataset.from_list(rows_of("dpo"))
    trained = plain(tmp_path, trl.DPOTrainer, trl.DPOConfig, model, rows, tokenizer, max_length=96,
                    gradient_checkpointing=False).model  # fmt: skip
    same_weights(tmp_path / "run" / "model", trained)


@pytest.mark.parametrize(
    ("kind", "changes", "error", "message"),
    [
        (
            "dpo",
            {"data__packing": True},
            ConfigError,
            "data.packing: True is for task sft and text; the task here is dpo",
        ),
        ("qa", {"data__format": "text"}, ConfigError, "data.format: text is for task sft"),
        ("dpo", {"data__labels": ["a"]}, ConfigError, "data.labels: is for tasks with labels"),
        ("dpo", {"data__truncation": "drop"}, ConfigError, "data.truncation: drop, but task dpo keeps the start"),
        ("kto", {"train__micro_batch_size": 1}, ConfigError, "task: kto: .*batch size must be > 1"),
        ("dpo", {"data__max_length": 8}, DataError, "nothing of 20 rows fits data.max_length 8"),
        ("dpo", {"task": "classification"}, DataError, "no 'text', which format labelled needs; found columns: prompt"),
        ("qa", {"task": "seq2seq"}, ConfigError, "model_type 'bert' .* has no Seq2SeqLM model in transformers"),
        (
            "classification",
            {"data__labels": ["negative", "neutral"]},
            DataError,
            "label 'positive' is none of negative",
        ),
        ("classification", {"task": "sft"}, ConfigError, "expected a causal language model"),
        ("classification", {"task": "rank"}, ConfigError, "task: expected one of sft, text, dpo"),
    ],
)
def test_what_does_not_go_together_is_one_line(folders, tmp_path, kind, changes, error, message):
    with pytest.raises(error, match=message):
        finetune(load_run_config(write(folders, tmp_path, kind, **changes)))


def test_preference_data_without_the_task_names_it(folders, tmp_path):
    with pytest.raises(DataError, match="preference data; set task: dpo, kto or reward"):
        finetune(load_run_config(write(folders, tmp_path, "dpo_messages", task="sft")))


# -- more of the trainer ----------------------------------------------------------------------------------------


def test_arguments_of_the_tasks_own_class_are_passed_on(folders, tmp_path):
    """Label smoothing, by the loss of the plain trainer; beta, by the loss being another."""
    smoothing = {"label_smoothing_factor": 0.4}
    file = write(folders, tmp_path, "classification", hift=ONE_GROUP, data__val_size=0, train__eval_steps=None,
                 train__arguments=smoothing)  # fmt: skip
    results = finetune(load_run_config(file))
    same = plain_classifier(folders, tmp_path, **smoothing)
    assert results["train_loss"] == pytest.approx(same.state.log_history[-1]["train_loss"], rel=1e-5)
    same_weights(tmp_path / "run" / "model", same.model)


@pytest.mark.parametrize(
    ("kind", "arguments", "message"),
    [
        ("text", {"neftune_noise_alfa": 5}, "unknown key 'neftune_noise_alfa'; did you mean 'neftune_noise_alpha'"),
        ("text", {"learning_rate": 1}, "train.arguments.learning_rate: the run file has a key .*: train.learning_rate"),
        ("text", {"fsdp": "full_shard"}, "train.arguments.fsdp: cannot be set here: DeepSpeed partitions here"),
        ("text", {"neftune_noise_alpha": "much"}, "train.arguments.neftune_noise_alpha: expected number.*, got 'much'"),
        ("text", {"beta": 0.1}, "unknown key 'beta'"),
        ("dpo", {"bta": 0.1}, "unknown key 'bta'; did you mean 'beta'"),
        ("text", {"use_liger_kernel": True}, "needs the package liger-kernel"),
        ("qa", {"label_smoothing_factor": 0.1}, "label_smoothing_factor: has no effect on the loss of task qa"),
        ("dpo", {"label_smoothing_factor": 0.1}, "on the loss of task dpo; remove it; its own is label_smoothing"),
        ("several_labels", {"label_smoothing_factor": 0.1}, "the labels are for multi_label_classification; remove it"),
        ("a_number", {"label_smoothing_factor": 0.1}, "the labels are for regression; remove it"),
    ],
)
def test_arguments_are_checked_by_that_class(folders, tmp_path, kind, arguments, message):
    with pytest.raises(ConfigError, match=message):
        finetune(load_run_config(write(folders, tmp_path, kind, train__arguments=arguments)))


def test_a_run_that_gets_no_better_stops_early_and_keeps_its_best(folders, tmp_path, capsys):
    """The rate is 0: no evaluation is better than the first. Its count survives an interruption."""
    changes = {
        "train__learning_rate": 0.0, "train__max_steps": 40, "train__eval_steps": 2, "train__save_steps": 2,
        "train__early_stopping": {"patience": 3}, "train__load_best_model_at_end": True,
        "train__best_metric": "accuracy", "train__save_total_limit": None,
    }  # fmt: skip
    file = write(folders, tmp_path, "classification", **changes)
    results = finetune(load_run_config(file))
    assert results["steps"] == 8 and results["best_step"] == 2
    assert (
        "stopped early at step 8: eval_accuracy has not become better by 0 in 3 evaluations" in capsys.readouterr().out
    )
    assert finetune(load_run_config(file)) == json.loads((tmp_path / "run" / "all_results.json").read_text())
    for step in (6, 8):  # as if it had been killed after step 4
        (tmp_path / "run" / f"checkpoint-{step}").rename(tmp_path / f"checkpoint-{step}")
    (tmp_path / "run" / "all_results.json").unlink()
    assert finetune(load_run_config(file))["steps"] == 8
    (tmp_path / "run" / "all_results.json").unlink()
    assert finetune(load_run_config(file, ["train.early_stopping.patience=4"]))["steps"] == 10


def test_settings_of_a_version_without_these_keys_are_no_difference():
    from hift_ds.train.resumed_settings import compare

    now = load_run_config("smollm2_135m").model_dump(mode="json")
    then = json.loads(json.dumps(now))
    for key in ("task", "model", "train"):
        then.pop(key) if key == "task" else None
    for key in ("best_metric", "early_stopping", "arguments"):
        then["train"].pop(key)
    then["data"].pop("shuffle")
    found = compare({"run": then}, {"run": now})
    assert (found.refused, found.kept, found.changed) == ((), (), ())


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        (
            "classification",
            ["text: bad aa", 'label: "negative"', '26 rows; labels "negative" 13, "positive" 13', "a guess"],
        ),
        ("dpo_messages", ['chosen: [{"role": "user"', "26 rows"]),
        ("text", ["26 samples of 26 rows"]),
    ],
)
def test_preview_shows_what_the_task_reads(folders, tmp_path, capsys, kind, expected):
    from hift_ds.cli.main import main

    assert main(["preview", str(write(folders, tmp_path, kind))]) == 0
    printed = capsys.readouterr().out
    for text in expected:
        assert text in printed, printed


def test_without_shuffling_rows_are_trained_on_as_they_stand(folders, tmp_path, monkeypatch):
    from hift_ds.train.trainer import _DecayMatricesOnly

    seen: list[list[int]] = []
    monkeypatch.setattr(
        _DecayMatricesOnly, "training_step",
        lambda self, model, inputs, *rest: (
            seen.append(inputs["labels"].tolist()), super(_DecayMatricesOnly, self).training_step(model, inputs, *rest)
        )[1],
        raising=False,
    )  # fmt: skip
    for shuffle in (False, True):
        changes = {"data__shuffle": shuffle, "data__val_size": 0, "train__eval_steps": None}
        file = write(folders, tmp_path, "classification", **changes, train__output_dir=str(tmp_path / str(shuffle)))
        finetune(load_run_config(file))
    assert seen[:6] == [[0, 1]] * 6 and seen[6:] != [[0, 1]] * 6


@pytest.mark.parametrize("tied", [False, True])
def test_added_tokens_get_rows_that_are_trained_and_exported(folders, tmp_path, tied):
    model = model_zoo.tiny.build("llama", vocab_size=259, max_position_embeddings=256, tie_word_embeddings=tied)
    model.save_pretrained(tmp_path / "model")
    byte_level().save_pretrained(tmp_path / "model")
    rows = [{"text": f"<think>{words(i, 4)}</think> {words(i, 4)}"} for i in range(26)]
    changes = {"model__path": str(tmp_path / "model"), "model__added_tokens": ["<think>", "</think>"],
               "model__added_special_tokens": ["<|tool|>"]}  # fmt: skip
    file = write(folders, tmp_path, "text", **changes)
    (tmp_path / "text.jsonl").write_text("\n".join(map(json.dumps, rows)))
    finetune(load_run_config(file))
    out = tmp_path / "run" / "model"
    tokenizer = AutoTokenizer.from_pretrained(out)
    assert tokenizer("<think>a</think><|tool|>")["input_ids"] == [259, *byte_level()("a")["input_ids"], 260, 261]
    assert tokenizer.decode([259, 261], skip_special_tokens=True) == "<think>"
    exported = transformers.AutoModelForCausalLM.from_pretrained(out)
    assert exported.config.vocab_size == 262
    before, after = (m.get_input_embeddings().weight for m in (model, exported))
    head = exported.get_output_embeddings().weight
    assert after.shape[0] == head.shape[0] == 262 and (after is head) == tied
    assert not torch.equal(after[:259], before) and len({tuple(row.tolist()) for row in after[259:]}) == 3
    groups = json.loads((tmp_path / "run" / "groups.json").read_text())
    assert all(group["moved"] for group in groups)
    again = finetune(load_run_config(file, ["train.max_steps=8"]))  # goes on from its checkpoint
    assert again["steps"] == 8
    from hift_ds.errors import CheckpointError

    with pytest.raises(CheckpointError, match="model.added_tokens .*the embeddings have other rows"):
        finetune(load_run_config(file, ["train.max_steps=10", "model.added_tokens=[<other>]"]))
    with pytest.raises(ConfigError, match="model.added_tokens: the reference of task dpo"):
        load_run_config(file, ["task=dpo"])


def test_a_head_of_other_classes_is_replaced_and_the_rest_keeps_its_bits(folders, tmp_path):
    """bf16 training of fp32 weights: the first masters are the fp32 weights. The rate is 0, so that they stay."""
    three = model_zoo.tiny.build(
        "roberta", "sequence_classification", num_labels=3, vocab_size=280, max_position_embeddings=258
    )
    three.save_pretrained(tmp_path / "three")
    byte_level().save_pretrained(tmp_path / "three")
    changes = {"model__path": str(tmp_path / "three"), "deepspeed": "bf16_host", "train__learning_rate": 0.0}
    finetune(load_run_config(write(folders, tmp_path, "classification", **changes)))
    model = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "run" / "model")
    assert model.config.num_labels == 2 and model.dtype == torch.float32
    for name, value in three.state_dict().items():
        if "out_proj" not in name:
            assert torch.equal(model.state_dict()[name], value), name
