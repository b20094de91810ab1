"""HiFTTrainer with one group of all weights against the plain transformers Trainer."""

from __future__ import annotations

import copy
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate.utils.memory import release_memory
from transformers import SchedulerType, Trainer, TrainingArguments, integrations
from transformers.hyperparameter_search import ALL_HYPERPARAMETER_SEARCH_BACKENDS, HPSearchBackend
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

import model_zoo
from hift_ds import HiFTTrainer
from tests.helpers.parity import ONE_GROUP, compare, run, same, weights_of
from tests.helpers.trainer import QUIET, ragged_dataset


def llama(**options: Any) -> Any:
    return model_zoo.tiny.build("llama", **options)


def dropout() -> Any:
    model = model_zoo.tiny.build("gpt2")
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.1
    return model


def without(key: str) -> dict[str, Any]:
    return {k: v for k, v in ONE_GROUP.items() if k != key}


def number_predicted() -> Any:
    return model_zoo.tiny.build("bert", "sequence_classification", num_labels=1, problem_type="regression")


def numbered(rows: list[Any]) -> list[Any]:
    """With a label without a dimension."""
    return [{**row, "labels": torch.tensor(3.3 * (i % 5))} for i, row in enumerate(rows)]


UNEVEN = {"gradient_accumulation_steps": 3, "max_steps": 5}  # 9 micro-batches an epoch; 16 rows: 8
CASES: dict[str, tuple[Any, dict[str, Any]]] = {
    "accumulation": (llama, {**UNEVEN, "data": ragged_dataset(16)}),
    "means of micro-batches": (
        llama, {**UNEVEN, "average_tokens_across_devices": False, "data": ragged_dataset(16)},
    ),
    "clipping": (llama, {"max_grad_norm": 0.05, **UNEVEN}),
    "clipping 0": (llama, {"max_grad_norm": 0.0, "optim": "sgd"}),
    "clipping absent": (
        llama, {"optim": "sgd", "ds": without("gradient_clipping"), "only_plain": {"max_grad_norm": 0.0}},
    ),
    "a number to predict": (number_predicted, {**UNEVEN, "data": numbered(ragged_dataset(16))}),
    "label smoothing": (llama, {"label_smoothing_factor": 0.1, "gradient_accumulation_steps": 2}),
    "NEFTune and dropout": (dropout, {"neftune_noise_alpha": 5.0}),
    "decay, warm-up, evaluation": (
        dropout,
        {"weight_decay": 0.1, "warmup_steps": 2, "eval_strategy": "steps", "eval_steps": 2,
         "trainer": {"eval_dataset": ragged_dataset(5, seed=9)}, "eval_on_start": True},
    ),
    "length groups": (llama, {"train_sampling_strategy": "group_by_length", "num_train_epochs": 1, "max_steps": -1}),
}  # fmt: skip
SLOW = {
    "checkpointing": (llama, {"gradient_checkpointing": True}),
    "Adafactor": (llama, {"optim": "adafactor", "learning_rate": 1e-3}),
    "Adagrad": (llama, {"optim": "adagrad"}),
    "RMSprop": (llama, {"optim": "rmsprop", "learning_rate": 1e-3}),
    "tied": (lambda: llama(tie_word_embeddings=True), {}),
    "incomplete batches dropped": (llama, {"dataloader_drop_last": True, **UNEVEN, "data": ragged_dataset(17)}),
    "batches by sum": (
        llama, {**UNEVEN, "average_tokens_across_devices": False, "label_smoothing_factor": 0.2},
    ),
}  # fmt: skip
ALL = [*CASES, *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW)]


@pytest.mark.parametrize("name", ALL)
def test_option(tmp_path, name):
    make_model, options = copy.deepcopy({**CASES, **SLOW}[name])
    compare(tmp_path, Trainer, make_model, **options)


class WithOptimizers(Trainer):
    """Given an optimizer with options of its own, and its scheduler."""

    def __init__(self, model: Any, **options: Any) -> None:
        matrices, others = ([p for p in model.parameters() if (p.ndim > 1) is flag] for flag in (True, False))
        groups = [{"params": matrices, "weight_decay": 0.2}, {"params": others, "lr": 3e-2}]
        optimizer = torch.optim.SGD(groups, lr=0.1, momentum=0.9)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, [lambda s: 1 / (1 + s), lambda s: 0.5**s])
        super().__init__(model=model, optimizers=(optimizer, scheduler), **options)


class WithAnOptimizer(Trainer):
    def __init__(self, model: Any, **options: Any) -> None:
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        super().__init__(model=model, optimizers=(optimizer, None), **options)


@pytest.mark.parametrize("cls", [WithOptimizers, WithAnOptimizer])
def test_optimizers_that_were_given(tmp_path, cls):
    """transformers drops both where DeepSpeed is configured."""
    ours, _ = compare(tmp_path, cls, llama, max_steps=5)
    given = ours.trainer.lr_scheduler
    ours.trainer.train()  # again: fresh states, and a scheduler of the caller's goes on as with a plain Trainer
    assert (ours.trainer.lr_scheduler is given) is (cls is WithOptimizers)
    assert ours.trainer.engine.optimizer.optimizer.__class__ is torch.optim.SGD
    now = weights_of(ours.trainer.model)
    assert not any(torch.equal(now[name], value) for name, value in ours.weights.items())


class MakesItsOptimizer(Trainer):
    """In its constructor, as trainers that show or change its groups do."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.create_optimizer_and_scheduler(num_training_steps=9)
        self.optimizer.param_groups[0]["weight_decay"] = 0.3


def test_an_optimizer_made_in_the_constructor(tmp_path):
    compare(tmp_path, MakesItsOptimizer, llama)


class WithItsOwnStep(Trainer):
    """Written for the plain loop, where ``accelerator.backward`` adds the micro-batches up."""

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> Any:
        model.train()
        loss = model(**self._prepare_inputs(inputs)).loss / self.current_gradient_accumulation_steps
        self.accelerator.backward(loss)
        return loss.detach()


def test_a_training_step_of_the_trainers_own(tmp_path):
    compare(tmp_path, WithItsOwnStep, llama, **UNEVEN, optim="sgd", max_grad_norm=0.0)


SCHEDULES: dict[str, dict[str, Any]] = {
    "cosine_with_min_lr": {"min_lr_rate": 0.1},
    "cosine_warmup_with_min_lr": {"min_lr_rate": 0.1},
    "warmup_stable_decay": {"num_decay_steps": 2},
    "reduce_lr_on_plateau": {"patience": 0},
    "greedy": {},
}


@pytest.mark.parametrize(
    "schedule",
    [
        pytest.param(s.value, marks=[] if s.value in ("polynomial", "cosine_with_min_lr") else pytest.mark.slow)
        for s in SchedulerType
    ],
)
def test_schedule(tmp_path, schedule):
    options: dict[str, Any] = {"max_steps": 5, "warmup_steps": 0 if schedule == "greedy" else 2}
    if schedule in ("reduce_lr_on_plateau", "greedy"):
        options |= {"eval_strategy": "steps", "eval_steps": 1, "metric_for_best_model": "loss"}
        options["trainer"] = {"eval_dataset": ragged_dataset(4, seed=9)}
    if schedule in SCHEDULES:
        options["lr_scheduler_kwargs"] = SCHEDULES[schedule]
    ours, _ = compare(tmp_path, Trainer, llama, lr_scheduler_type=schedule, **options)
    rates = [entry["learning_rate"] for entry in ours.logs if "learning_rate" in entry]
    assert len(rates) == 5


@pytest.mark.parametrize("asked", ["bf16", "fp16"])
def test_evaluation_alone_in_16_bits(tmp_path, asked):
    """The DeepSpeed config's "auto" is of training, which is in fp32; before and after it the evaluation is in 16 bits,
    with the plain Trainer's numbers. Unlike there the weights are afterwards what they were."""
    held_out = ragged_dataset(5, seed=9)
    ds = {**ONE_GROUP, "fp16": {"enabled": "auto"}}
    options = {f"{asked}_full_eval": True, "trainer": {"eval_dataset": held_out}, "eval_strategy": "steps"}
    ours, plain = compare(tmp_path, Trainer, llama, ds=ds, eval_steps=2, **options)
    assert {value.dtype for value in ours.weights.values()} == {torch.float32}
    assert ours.trainer.args.hf_deepspeed_config.dtype() == torch.float32  # of pixels and the like
    seen = set()
    ours.trainer.model.lm_head.register_forward_hook(lambda module, args, output: seen.add(output.dtype))
    expected, after = plain.trainer.evaluate(), ours.trainer.evaluate()
    assert after["eval_loss"] == pytest.approx(expected["eval_loss"], abs=2e-6)
    assert seen == {torch.bfloat16 if asked == "bf16" else torch.float16}
    assert {param.dtype for param in plain.trainer.model.parameters()} == seen
    same(replace(ours, weights=weights_of(ours.trainer.model)), ours, atol=0)
    assert not [n for n, buffer in ours.trainer.model.named_buffers() if buffer.dtype in seen]

    before = run(tmp_path, EvaluatesBefore, llama, hift=True, ds=ds, **options, eval_steps=2)
    same(replace(before, drawn=ours.drawn), ours, atol=0)  # an evaluation more draws a seed more


class EvaluatesBefore(Trainer):
    def train(self, *args: Any, **kwargs: Any) -> Any:
        self.evaluate()
        self.state.log_history.clear()
        return super().train(*args, **kwargs)


def test_best_model(tmp_path):
    """A rate that ruins the model: both end with the weights, and the generators, of the same checkpoint."""
    ours, plain = compare(
        tmp_path, Trainer, llama, max_steps=6, learning_rate=1.0, optim="sgd", max_grad_norm=0.0,
        lr_scheduler_type="constant", eval_strategy="steps", save_strategy="steps", eval_steps=2, save_steps=2,
        load_best_model_at_end=True, metric_for_best_model="loss", trainer={"eval_dataset": ragged_dataset(3)},
    )  # fmt: skip
    assert ours.trainer.state.best_global_step == plain.trainer.state.best_global_step < 6


def test_hyperparameter_search(tmp_path, monkeypatch):
    """Each trial has another model, reads the DeepSpeed config again, and has a folder of its own for checkpoints."""

    class TwoRates:
        def ensure_available(self) -> None: ...

        def run(self, trainer: Any, n_trials: int, direction: str, **kwargs: Any) -> list[Any]:
            found = []
            for number, rate in enumerate((1e-2, 3e-2)):
                trainer.train(trial=SimpleNamespace(number=number, params={"learning_rate": rate}))
                found.append((trainer.evaluate()["eval_loss"], weights_of(trainer.model)))
                trainer.model_wrapped, trainer.model = release_memory(trainer.model_wrapped, trainer.model)
                trainer.accelerator.clear()
            return found

    monkeypatch.setattr(integrations, "hp_params", lambda trial: trial.params)  # which knows trials of Optuna's
    monkeypatch.setitem(ALL_HYPERPARAMETER_SEARCH_BACKENDS, HPSearchBackend.OPTUNA, TwoRates)
    data = {"train_dataset": ragged_dataset(8), "eval_dataset": ragged_dataset(4, seed=9)}
    options = {**QUIET, "max_steps": 3, "save_strategy": "steps", "save_steps": 1, "save_total_limit": 1}
    found = {}
    for cls, ds in ((Trainer, None), (HiFTTrainer, ONE_GROUP)):
        monkeypatch.delenv("ACCELERATE_USE_DEEPSPEED", raising=False)
        unset_hf_deepspeed_config()
        args = TrainingArguments(str(tmp_path / cls.__name__), deepspeed=copy.deepcopy(ds), **options)
        trainer = cls(model_init=lambda: llama(), args=args, **data)
        found[cls] = trainer.hyperparameter_search(hp_space=lambda trial: trial.params, backend="optuna", n_trials=2)
        saved = sorted(str(folder.relative_to(args.output_dir)) for folder in tmp_path.glob(f"{cls.__name__}/*/*"))
        assert saved == ["run-0/checkpoint-3", "run-1/checkpoint-3"]
    for (ours, weights), (theirs, expected) in zip(found[HiFTTrainer], found[Trainer], strict=True):
        assert ours == pytest.approx(theirs, abs=2e-6)
        for name, value in expected.items():
            torch.testing.assert_close(weights[name], value, atol=2e-6, rtol=0, msg=name)


@pytest.mark.parametrize(
    ("make_model", "options"),
    [
        (dropout, {"train_sampling_strategy": "group_by_length"}),
        pytest.param(llama, {"gradient_accumulation_steps": 2}, marks=pytest.mark.slow),
        pytest.param(dropout, {"dataloader_num_workers": 1}, marks=pytest.mark.slow),
    ],
)
def test_going_on_in_the_middle_of_an_epoch(tmp_path, make_model, options):
    """Every row once, and the numbers of the run that was not interrupted, in both loops."""
    options = {
        "max_steps": 7,
        "save_strategy": "steps",
        "save_steps": 4,
        "data": ragged_dataset(18),
        **options,
    }
    pair = []
    for hift in (True, False):
        whole = run(tmp_path / "whole", Trainer, make_model, hift=hift, **options)
        run(tmp_path, Trainer, make_model, hift=hift, stop_at=4, **options)
        again = run(tmp_path, Trainer, make_model, hift=hift, resume=4, **options)
        assert [e["loss"] for e in again.logs[-3:]] == pytest.approx([e["loss"] for e in whole.logs[-3:]])
        for name, value in whole.weights.items():
            torch.testing.assert_close(again.weights[name], value, atol=1e-6, rtol=0, msg=name)
        pair.append(again)
    same(*pair)
