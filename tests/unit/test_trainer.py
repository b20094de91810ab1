"""HiFTTrainer on one process: what the Hugging Face loop does around the engine, and what must not leak into
it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Trainer, TrainerCallback, TrainingArguments

import model_zoo
from hift_ds import HiFTCallback
from hift_ds.errors import ConfigError
from hift_ds.integrations.transformers import HiFTMixin, HiFTTrainer
from tests.helpers.trainer import AUTO, arguments, ragged_dataset

NUM_GROUPS = 5  # of the tiny llama: embedding, three blocks, norm and head


def make_trainer(
    tmp_path: Path,
    cls: type[Trainer] = HiFTTrainer,
    model: Any = None,
    ds: dict | None = None,
    **options: Any,
):
    model = model if model is not None else model_zoo.tiny.build("llama")
    dataset = ragged_dataset(24)
    trainer_options = {key: options.pop(key) for key in ("callbacks", "data_collator") if key in options}
    return cls(
        model=model,
        args=arguments(tmp_path, ds, **options),
        train_dataset=dataset,
        eval_dataset=dataset[:3],
        **trainer_options,
    )


def weights(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def train_logs(trainer: Trainer) -> list[dict[str, float]]:
    return [entry for entry in trainer.state.log_history if "loss" in entry]


def test_trains_every_group_and_logs_the_rate_that_was_used(tmp_path):
    trainer = make_trainer(
        tmp_path, max_steps=2 * NUM_GROUPS, learning_rate=1e-2, lr_scheduler_type="linear", warmup_steps=2
    )
    before = weights(trainer.model)
    trainer.train()
    assert set(trainer.engine.coverage().values()) == {2}
    assert all(not torch.equal(before[name], value) for name, value in weights(trainer.model).items())
    logs = train_logs(trainer)
    assert [entry["group"] for entry in logs] == 2 * list(range(NUM_GROUPS))
    assert [entry["cycle"] for entry in logs] == NUM_GROUPS * [0] + NUM_GROUPS * [1]
    # Linear decay over all 10 steps; the second cycle is held at its first value, the first (which holds the
    # warm-up) at its last.
    first, second = 1e-2 * (10 - 4) / 8, 1e-2 * (10 - 5) / 8
    assert [entry["learning_rate"] for entry in logs] == pytest.approx(NUM_GROUPS * [first] + NUM_GROUPS * [second])


@pytest.mark.parametrize("scheduler", ["trainer", "deepspeed"])
def test_optimizer_and_scheduler_of_the_json(tmp_path, scheduler):
    ds = {
        **AUTO,
        "optimizer": {
            "type": "AdamW",
            "params": {"lr": "auto", "weight_decay": "auto", "betas": "auto", "eps": "auto"},
        },
    }
    if scheduler == "deepspeed":
        params = {
            "total_num_steps": "auto",
            "warmup_num_steps": "auto",
            "warmup_min_lr": 0,
            "warmup_max_lr": "auto",
        }
        ds["scheduler"] = {"type": "WarmupDecayLR", "params": {**params, "warmup_type": "linear"}}
    trainer = make_trainer(tmp_path, ds=ds, max_steps=2 * NUM_GROUPS, learning_rate=1e-2, warmup_steps=2)
    trainer.train()
    rates = [entry["learning_rate"] for entry in train_logs(trainer)]
    assert len(set(rates[:NUM_GROUPS])) == len(set(rates[NUM_GROUPS:])) == 1 and 0 < rates[-1] < rates[0] < 1e-2
    assert trainer.engine.optimizer.param_groups[0]["betas"] == (0.9, 0.999)


def test_auto_in_the_hift_block_is_ours(tmp_path):
    """accelerate fills in every "auto" of a DeepSpeed config, and refuses those it does not know."""
    trainer = make_trainer(tmp_path, ds={**AUTO, "hift": {"state": {"io": "auto", "residency": "auto"}}}, max_steps=2)
    for _ in range(2):
        trainer.train()
        assert trainer.engine.hift.state.io == "auto" and trainer.engine.last_report.group == 1


def test_decay_and_no_decay_groups_are_kept(tmp_path):
    trainer = make_trainer(tmp_path, max_steps=NUM_GROUPS, learning_rate=0.1, weight_decay=0.5)
    trainer.train()
    decays = {group["weight_decay"]: len(group["params"]) for group in trainer.engine.optimizer.param_groups}
    norms = [name for name, _ in trainer.model.named_parameters() if "norm" in name]
    assert decays[0.0] == len(norms)


class _WatchGradients(TrainerCallback):
    """Notes, at each step, whether the embedding's output carries a gradient and whether backward reached
    it."""

    def __init__(self, model: torch.nn.Module) -> None:
        self.embedding_output_requires_grad: list[bool] = []
        self.lowest_block_ran_backward: list[bool] = []
        model.model.embed_tokens.register_forward_hook(self._after_embedding)
        model.model.layers[0].register_full_backward_hook(self._after_backward)

    def _after_embedding(self, module, inputs, output):
        if module.training:
            self.embedding_output_requires_grad.append(output.requires_grad)
            self.lowest_block_ran_backward.append(False)

    def _after_backward(self, module, grad_input, grad_output):
        self.lowest_block_ran_backward[-1] = True


def test_checkpointing_stops_at_the_active_group_and_changes_nothing(tmp_path):
    """transformers turns input gradients on with checkpointing: every layer would then be differentiated
    again."""
    results = {}
    for checkpointing in (False, True):
        model = model_zoo.tiny.build("llama")
        model.gradient_checkpointing_enable()  # leaves a hook behind that the Trainer's own enabling forgets
        watch = _WatchGradients(model)
        if not checkpointing:
            model.gradient_checkpointing_disable()
        trainer = make_trainer(tmp_path, model=model, max_steps=NUM_GROUPS, gradient_checkpointing=checkpointing)
        trainer.train()
        assert watch.embedding_output_requires_grad == [True, False, False, False, False]
        assert watch.lowest_block_ran_backward == [True, True, False, False, False]
        assert set(trainer.engine.coverage().values()) == {1}
        results[checkpointing] = weights(model)
    for name, value in results[False].items():
        assert torch.equal(value, results[True][name]), name


def test_reentrant_checkpointing_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="use_reentrant"):
        make_trainer(tmp_path, gradient_checkpointing=True, gradient_checkpointing_kwargs={"use_reentrant": True})


@pytest.mark.parametrize(
    ("ds", "message"),
    [
        ({}, r"deepspeed=\.\.\."),
        ({key: value for key, value in AUTO.items() if key != "hift"}, '"hift": {}'),
        ({**AUTO, "hift": {"groupsize": 2}}, "group_size"),
        ({**AUTO, "torch_autocast": {"enabled": True}, "bf16": {"enabled": True}}, "torch_autocast"),
        ({**AUTO, "bf16": {"enabled": True}}, "bf16.enabled=True vs hf bf16"),
        ({**AUTO, "train_micro_batch_size_per_gpu": 3}, "per_device_train_batch_size=8"),
    ],
)
def test_bad_configs_are_refused_before_the_trainer_touches_the_model(tmp_path, monkeypatch, ds, message):
    monkeypatch.delenv("ACCELERATE_USE_DEEPSPEED", raising=False)  # accelerate leaves it behind
    args = TrainingArguments(
        str(tmp_path), deepspeed=ds or None, use_cpu=True, bf16="torch_autocast" in ds, report_to=[]
    )
    with pytest.raises(ConfigError, match=message):
        HiFTTrainer(model=None, args=args)


def test_numbers_beside_the_models_inputs_are_not_rounded(tmp_path):
    """transformers rounds all numbers of a batch to the weights' dtype where DeepSpeed is configured."""
    reference, seen = torch.tensor(-321.0625), []

    class Asks(HiFTTrainer):
        def compute_loss(self, model, inputs, *args, **kwargs):
            seen.append(inputs.pop("ref_logps"))
            return super().compute_loss(model, inputs, *args, **kwargs)

    rows = [{**row, "ref_logps": reference} for row in ragged_dataset(4)]
    options = {"max_steps": 1, "bf16": True, "remove_unused_columns": False}
    Asks(model_zoo.tiny.build("llama"), arguments(tmp_path, **options), train_dataset=rows).train()
    assert torch.equal(seen[0], reference.expand(2))


def torch_has_a_gradient_of_mixed_types() -> bool:
    guess = torch.ones(1, dtype=torch.bfloat16, requires_grad=True)
    try:
        torch.nn.functional.mse_loss(guess, torch.ones(1)).backward()
    except RuntimeError:
        return False
    return True


@pytest.mark.parametrize("kind", ["regression", "multi_label_classification"])
def test_labels_that_are_numbers_are_not_rounded(tmp_path, kind):
    if kind == "regression" and not torch_has_a_gradient_of_mixed_types():
        pytest.skip("this torch's mean squared error of bf16 and fp32 has no gradient (docs/versions.md)")
    number = 321.0625 if kind == "regression" else 0.1
    model = model_zoo.tiny.build(
        "llama",
        "sequence_classification",
        num_labels=1 if kind == "regression" else 2,
        pad_token_id=0,
        problem_type=kind,
    )
    labels = torch.tensor(number if kind == "regression" else [number, 1.0])
    rows = [{"input_ids": row["input_ids"], "labels": labels} for row in ragged_dataset(6)]
    trainer = HiFTTrainer(model, arguments(tmp_path, max_steps=2, bf16=True), train_dataset=rows)
    trainer.train()
    assert torch.equal(torch.from_numpy(trainer.predict(rows[:2]).label_ids), labels.expand(2, *labels.shape))


def given(model: Any, *, scheduler: bool) -> tuple[Any, Any]:
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    return optimizer, torch.optim.lr_scheduler.ConstantLR(optimizer) if scheduler else None


@pytest.mark.parametrize("scheduler", [False, True])
@pytest.mark.parametrize("key", ["optimizer", "scheduler"])
def test_what_transformers_would_drop_of_optimizers_is_refused(tmp_path, key, scheduler):
    ds = {**AUTO, key: {"type": "SGD", "params": {"lr": 1e-2}} if key == "optimizer" else {"type": "WarmupLR"}}
    model = model_zoo.tiny.build("llama")

    def make(cls, callbacks):
        args = arguments(tmp_path, ds, learning_rate=1e-2)
        return cls(model, args, optimizers=given(model, scheduler=scheduler), callbacks=callbacks)

    if key == "scheduler" and not scheduler:
        make(HiFTTrainer, [])
        return
    for cls, callbacks in ((HiFTTrainer, []), (Trainer, [HiFTCallback()])):
        with pytest.raises(ConfigError, match=f'the DeepSpeed config has "{key}" too'):
            make(cls, callbacks)


@pytest.mark.parametrize("scheduler", [False, True])
def test_optimizers_that_only_the_mixin_can_keep(tmp_path, scheduler):
    model = model_zoo.tiny.build("llama")
    options = {"args": arguments(tmp_path), "optimizers": given(model, scheduler=scheduler)}
    with pytest.raises(ConfigError, match="transformers drops both"):
        Trainer(model, **options, callbacks=[HiFTCallback()])


def test_clipping_that_would_not_happen_is_said(tmp_path, caplog):
    ds = {key: value for key, value in AUTO.items() if key != "gradient_clipping"}
    make_trainer(tmp_path, ds=ds, max_grad_norm=0.0)
    make_trainer(tmp_path)
    assert "max_grad_norm" not in caplog.text
    make_trainer(tmp_path, ds=ds)
    assert "max_grad_norm=1.0 has no effect" in caplog.text


@pytest.mark.parametrize("form", ["mixin", "callback"])
def test_clipping_that_a_callback_changes_is_said_once(tmp_path, caplog, form):
    """The plain Trainer reads the argument in each step."""

    class ClipsMore(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            args.max_grad_norm = 0.1

    cls, more = (HiFTTrainer, []) if form == "mixin" else (Trainer, [HiFTCallback()])
    model = model_zoo.tiny.build("llama")
    args = arguments(tmp_path, max_steps=3)
    cls(model=model, args=args, train_dataset=ragged_dataset(6), callbacks=[*more, ClipsMore()]).train()
    assert caplog.text.count("max_grad_norm was changed from 1.0 to 0.1 in training, which has no effect") == 1


@pytest.mark.parametrize(
    ("given", "line"),
    [
        ({"learning_rate": "1e-3"}, "learning_rate: expected a number, got the text '1e-3'"),
        ({"max_steps": "3"}, "max_steps: expected a number, got the text '3'"),
        ({"max_steps": 3.0}, "max_steps: expected a whole number, got 3.0; write 3"),
        ({"max_grad_norm": None}, "max_grad_norm: expected a number, got None; 0 for no clipping"),
        ({"weight_decay": None}, "weight_decay: expected a number, got None; leave it out for 0.0"),
        ({"gradient_accumulation_steps": 0}, "gradient_accumulation_steps: expected at least 1, got 0"),
    ],
)
def test_numbers_of_the_arguments_that_are_none(tmp_path, given, line):
    """transformers fails with them in a step, or in accelerate."""
    with pytest.raises(ConfigError, match=f"^{line}"):
        make_trainer(tmp_path, **given)


def test_fewer_rows_than_a_batch_that_is_not_dropped(tmp_path):
    """The Trainer ends after no step, as if it had trained."""
    trainer = make_trainer(tmp_path, per_device_train_batch_size=25, dataloader_drop_last=True)
    with pytest.raises(ConfigError, match="^train_dataset: has no batch for every rank .25 rows a rank, "):
        trainer.train()


class Stream(torch.utils.data.IterableDataset):
    def __iter__(self):
        return iter(ragged_dataset(4))


@pytest.mark.parametrize("form", ["mixin", "callback"])
def test_a_stream_that_ends_before_its_first_step(tmp_path, form):
    """The Trainer would go through it for ever."""
    cls, callbacks = (HiFTTrainer, []) if form == "mixin" else (Trainer, [HiFTCallback()])
    args = arguments(tmp_path, gradient_accumulation_steps=3)
    trainer = cls(model_zoo.tiny.build("llama"), args, train_dataset=Stream(), callbacks=callbacks)
    with pytest.raises(ConfigError, match="^train_dataset: ends before the first optimizer step: .*_steps=3"):
        trainer.train()


def test_no_rows(tmp_path):
    trainer = HiFTTrainer(model_zoo.tiny.build("llama"), arguments(tmp_path), train_dataset=[])
    with pytest.raises(ConfigError, match="^train_dataset: has no rows"):
        trainer.train()


def test_a_dtype_of_evaluation_that_training_has_too_or_that_shards_cannot_have(tmp_path, caplog):
    make_trainer(tmp_path, bf16_full_eval=True)
    make_trainer(tmp_path, bf16=True, bf16_full_eval=True)
    assert "full_eval" not in caplog.text
    make_trainer(tmp_path, ds={**AUTO, "bf16": {"enabled": True}}, bf16_full_eval=True)
    assert '"bf16.enabled" is true in the DeepSpeed config, so that training is in bf16 too' in caplog.text
    with pytest.raises(ConfigError, match="disagree: ds bf16.enabled=False vs hf bf16.bf16_full_eval=True"):
        make_trainer(tmp_path, ds={**AUTO, "bf16": {"enabled": False}}, bf16_full_eval=True)
    in_shards = {**AUTO, "zero_optimization": {"stage": 3}, "fp16": {"enabled": "auto"}}
    with pytest.raises(ConfigError, match="^fp16_full_eval: with .zero_optimization.stage.: 3 "):
        make_trainer(tmp_path, ds=in_shards, bf16=True, fp16_full_eval=True)
    make_trainer(tmp_path, ds=in_shards, bf16=True, bf16_full_eval=True)


@pytest.mark.parametrize("form", ["mixin", "callback"])
def test_a_callback_that_would_change_gradients_is_told_that_it_cannot(tmp_path, caplog, form):
    class Doubles(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
            assert all(param.grad is None for param in model.parameters())

    cls, callbacks = (HiFTTrainer, []) if form == "mixin" else (Trainer, [HiFTCallback()])
    args = arguments(tmp_path, max_steps=1)
    cls(model_zoo.tiny.build("llama"), args, train_dataset=ragged_dataset(4), callbacks=[*callbacks, Doubles()]).train()
    assert caplog.text.count("Doubles.on_pre_optimizer_step is called after the engine's step") == 1


def test_ranks_that_transformers_does_not_count_are_an_error(tmp_path, monkeypatch):
    """Two processes on a machine without an accelerator, and no use_cpu: each would believe to be alone."""
    args = arguments(tmp_path)
    assert args.world_size == 1
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match="use_cpu=True"):
        HiFTTrainer(model=None, args=args)


def test_evaluates_before_between_and_after(tmp_path):
    trainer = make_trainer(tmp_path, max_steps=2 * NUM_GROUPS, eval_strategy="steps", eval_steps=3, learning_rate=1e-2)
    plain = make_trainer(tmp_path / "b", max_steps=2 * NUM_GROUPS, learning_rate=1e-2)
    first = trainer.evaluate()["eval_loss"]
    with torch.no_grad():
        rows = trainer.data_collator(trainer.eval_dataset)
        expected = trainer.model.eval()(**rows).loss.item()
    assert first == pytest.approx(expected, rel=1e-6)
    trainer.train()
    plain.train()
    evaluations = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
    assert len(evaluations) >= 3 and evaluations[-1] < first
    assert trainer.evaluate()["eval_loss"] == pytest.approx(evaluations[-1], rel=0.2)
    assert trainer.predict(trainer.eval_dataset).predictions.shape[0] == 3
    for (name, a), b in zip(weights(trainer.model).items(), weights(plain.model).values(), strict=True):
        assert torch.equal(a, b), f"evaluating in between changed {name}"


def test_train_again_and_flags_afterwards(tmp_path):
    model = model_zoo.tiny.build("llama")
    model.model.layers[1].mlp.up_proj.weight.requires_grad_(False)  # the user's own choice
    flags = {name: p.requires_grad for name, p in model.named_parameters()}
    trainer = make_trainer(tmp_path, model=model, max_steps=NUM_GROUPS)
    for _ in range(2):
        trainer.train()
        coverage = trainer.engine.coverage()
        assert set(coverage.values()) == {1} and "model.layers.1.mlp.up_proj.weight" not in coverage
    trainer.engine.destroy()
    assert flags == {name: p.requires_grad for name, p in model.named_parameters()}


def test_auto_find_batch_size(tmp_path):
    """An out-of-memory error in the middle of a cycle: a new engine, all flags back, no leftover gradient."""
    tried = []

    class Collator:
        def __init__(self):
            self.calls = 0

        def __call__(self, rows):
            self.calls += 1
            tried.append(len(rows))
            if len(rows) > 3 and self.calls == 3:
                raise RuntimeError("CUDA out of memory. Tried to allocate everything")
            return {key: torch.stack([row[key] for row in rows]) for key in rows[0]}

    trainer = make_trainer(
        tmp_path,
        max_steps=NUM_GROUPS,
        auto_find_batch_size=True,
        per_device_train_batch_size=4,
        data_collator=Collator(),
    )
    trainer.train()
    assert tried[0] == 4 and tried[-1] < 4 and trainer.engine.train_micro_batch_size_per_gpu() == tried[-1]
    assert set(trainer.engine.coverage().values()) == {1}
    assert all(p.grad is None for p in trainer.model.parameters())


def test_save_model_is_what_from_pretrained_loads(tmp_path):
    from transformers import AutoModelForCausalLM

    model = model_zoo.tiny.build("llama", tie_word_embeddings=True)
    # One group less: the tied head is in the embedding.
    trainer = make_trainer(tmp_path, model=model, max_steps=NUM_GROUPS - 1, bf16=True)
    trainer.train()
    trainer.save_model(str(tmp_path / "saved"))
    assert not list((tmp_path / "saved").glob("pytorch_model*"))
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "saved", use_safetensors=True, dtype="auto")
    assert again.dtype == torch.bfloat16
    for (name, a), b in zip(weights(model).items(), weights(again).values(), strict=True):
        assert torch.equal(a, b), name


def test_seq2seq_trainer_with_generation(tmp_path):
    from transformers import Seq2SeqTrainer, Seq2SeqTrainingArguments

    class HiFTSeq2SeqTrainer(HiFTMixin, Seq2SeqTrainer):
        pass

    model = model_zoo.tiny.build("t5")
    rows = [{k: v[0] for k, v in model_zoo.tiny.batch(model, rows=1, seed=seed).items()} for seed in range(6)]
    args = arguments(
        tmp_path, cls=Seq2SeqTrainingArguments, max_steps=9, predict_with_generate=True,
        generation_max_length=5, eval_strategy="steps", eval_steps=4,
    )  # fmt: skip
    trainer = HiFTSeq2SeqTrainer(model=model, args=args, train_dataset=rows, eval_dataset=rows[:3])
    trainer.train()
    assert min(trainer.engine.coverage().values()) >= 1
    assert trainer.predict(rows[:2]).predictions.shape[0] == 2


def test_trl_sft_trainer(tmp_path):
    trl = pytest.importorskip("trl")

    class HiFTSFTTrainer(HiFTMixin, trl.SFTTrainer):
        pass

    rows = [{key: row[key].tolist() for key in ("input_ids", "labels")} for row in ragged_dataset(12, padded=False)]
    from datasets import Dataset

    args = arguments(
        tmp_path, cls=trl.SFTConfig, max_steps=NUM_GROUPS + 1, gradient_checkpointing=True,
        gradient_accumulation_steps=2, max_length=None,
    )  # fmt: skip
    trainer = HiFTSFTTrainer(
        model=model_zoo.tiny.build("llama"),
        args=args,
        train_dataset=Dataset.from_list(rows),
        processing_class=tiny_tokenizer(),
    )
    trainer.train()
    assert set(trainer.engine.coverage().values()) == {1, 2}
    assert [entry["group"] for entry in train_logs(trainer)] == [*range(NUM_GROUPS), 0]
    assert "mean_token_accuracy" in train_logs(trainer)[0]  # SFTTrainer's own metrics survive


def tiny_tokenizer():
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    vocab = {"<pad>": 0, "<s>": 1, "</s>": 2, **{f"w{i}": i for i in range(3, 67)}}
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(WordLevel(vocab, unk_token="<pad>")),
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
    )


def test_config_by_path_and_fp16(tmp_path):
    path = tmp_path / "ds.json"
    path.write_text(json.dumps({**AUTO, "fp16": {"enabled": "auto", "initial_scale_power": 4}}))
    trainer = make_trainer(tmp_path, ds=str(path), max_steps=NUM_GROUPS, fp16=True)
    trainer.train()
    assert trainer.engine.last_report.loss_scale == 16.0 and trainer.model.dtype == torch.float16


def test_load_best_model_at_end(tmp_path):
    """A rate that ruins the model after the first evaluation: the weights at the end are those of the first
    checkpoint."""
    trainer = make_trainer(
        tmp_path, max_steps=12, learning_rate=1.0, optim="sgd", max_grad_norm=0.0,
        lr_scheduler_type="constant", eval_strategy="steps", save_strategy="steps",
        eval_steps=3, save_steps=3, load_best_model_at_end=True,
        metric_for_best_model="loss", save_total_limit=2,
    )  # fmt: skip
    trainer.train()
    losses = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
    best = losses.index(min(losses))
    assert best < 3 and trainer.state.best_global_step == 3 * (best + 1)
    assert trainer.evaluate()["eval_loss"] == pytest.approx(losses[best], rel=1e-6)
    assert trainer.engine.schedule.cursor.cycle == trainer.state.best_global_step // NUM_GROUPS
