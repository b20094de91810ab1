"""``HiFTCallback`` does what ``HiFTMixin`` does, bit for bit, in trainers that know nothing of it."""

from __future__ import annotations

import contextlib
import copy
import json
import os
import runpy
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import deepspeed
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)
from transformers.integrations.deepspeed import unset_hf_deepspeed_config
from transformers.trainer import DEFAULT_CALLBACKS

import hift_ds
import model_zoo
from hift_ds import HiFTCallback, HiFTMixin
from hift_ds.checkpoint.trainer_folder import broken_seal
from hift_ds.errors import CheckpointError, ConfigError, OutOfMemory
from hift_ds.forecast import advice as out_of_memory
from hift_ds.integrations import disk_room
from hift_ds.integrations.callback import AnnouncedCallback
from hift_ds.integrations.disk_room import bytes_on_disk
from hift_ds.integrations.weights_once import keep_once
from hift_ds.ranks import free_port, launch_variables
from tests.helpers.out_of_memory import NoAdvice, full
from tests.helpers.parity import ONE_GROUP
from tests.helpers.trainer import AUTO, arguments, ragged_dataset
from tests.numerics.test_engine_life import hooks_of
from tests.parity.test_trl import TRAINERS, folder_of, rows, tokenizer

trl = pytest.importorskip("trl")
from trl.models import prepare_deepspeed  # noqa: E402

NUMEL = model_zoo.tiny.build("llama").num_parameters()
GROUPS = {**AUTO, "hift": {"state": {"io": "auto"}}}


def trained(folder: Path, cls: type, model: Any, form: str, args_cls: type = TrainingArguments, **options: Any) -> Any:
    given = options.pop("trainer")
    args = arguments(folder / form, options.pop("ds", GROUPS), cls=args_cls, **options)
    if form == "mixin":
        made = type("Mixed", (HiFTMixin, cls), {})(model=model, args=args, **given)
    else:
        made = cls(model=model, args=args, **given, callbacks=[HiFTCallback()])
    made.train()
    made.save_model(str(folder / form / "saved"))
    return made


def logs_of(trainer: Trainer) -> list[dict[str, float]]:
    kept = ("loss", "grad_norm", "learning_rate", "group", "cycle", "eval_loss")
    return [{k: e[k] for k in kept if k in e} for e in trainer.state.log_history if "train_loss" not in e]


def engine_of(trainer: Trainer) -> Any:
    return trainer.callback_handler.pop_callback(HiFTCallback).engine


def llama_options(**options: Any) -> dict[str, Any]:
    return {
        "max_steps": 7, "learning_rate": 1e-2, "warmup_steps": 2, "gradient_accumulation_steps": 2,
        "eval_strategy": "steps", "eval_steps": 3, "save_strategy": "steps", "save_steps": 5,
        "trainer": {"train_dataset": ragged_dataset(12), "eval_dataset": ragged_dataset(3)}, **options,
    }  # fmt: skip


@pytest.mark.parametrize("options", [{}, {"bf16": True}, {"ds": {**GROUPS, "zero_optimization": {"stage": 3}}}])
def test_bit_equal_to_the_mixin(tmp_path, options):
    results = {}
    stock = deepspeed.initialize
    for form in ("mixin", "callback"):
        model = model_zoo.tiny.build("llama", seed=1)
        results[form] = trained(tmp_path, Trainer, model, form, **llama_options(**copy.deepcopy(options)))
        assert deepspeed.initialize is stock and not {"RANK", "MASTER_PORT"} & set(os.environ)
        assert all(p.requires_grad for p in model.parameters())
        checkpoint = tmp_path / form / "checkpoint-5"
        assert (checkpoint / "trainer_files.json").exists(), "not sealed"
        assert (checkpoint / "model.safetensors").samefile(checkpoint / "global_step5" / "model.safetensors")
        assert broken_seal(checkpoint, weights=True) is None
        assert sum(weight.numel() for weight in load_file(checkpoint / "model.safetensors").values()) == NUMEL
        if "ds" not in options:
            assert AutoModelForCausalLM.from_pretrained(checkpoint).num_parameters() == NUMEL
    assert logs_of(results["mixin"]) == logs_of(results["callback"])
    saved = [load_file(tmp_path / form / "saved" / "model.safetensors") for form in results]
    assert saved[0].keys() == saved[1].keys()
    assert all(torch.equal(saved[0][name], value) for name, value in saved[1].items())
    engine = engine_of(results["callback"])
    assert engine.has_ended and set(engine.coverage().values()) == {1, 2}
    assert results["callback"].args.deepspeed_plugin.deepspeed_config["hift"] == {"state": {"io": "auto"}}
    assert results["callback"].evaluate()["eval_loss"] > 0
    if "ds" not in options:
        assert not hooks_of(results["callback"].model)


def test_only_the_same_tensors_become_one_file(tmp_path):
    ours, theirs = tmp_path / "tag" / "model.safetensors", tmp_path / "model.safetensors"
    ours.parent.mkdir()
    assert not keep_once(tmp_path)  # nothing there
    (tmp_path / "latest").write_text("tag")
    weight = torch.tensor([1.0, float("nan")])
    save_file({"a": weight}, ours)
    for other in ({"a": weight + 1}, {"b": weight}, {"a": weight.double()}, {"a": weight, "b": weight.clone()}):
        save_file(other, theirs)
        assert not keep_once(tmp_path) and load_file(theirs).keys() == other.keys()
    save_file({"a": weight.clone()}, theirs)
    assert keep_once(tmp_path) and theirs.samefile(ours) and keep_once(tmp_path)


def bytes_a_parameter(checkpoint: Path, model: Any) -> float:
    """Of the tensors, on disk."""
    tensors = {path.stat().st_ino: path.stat().st_size for path in checkpoint.rglob("*.safetensors")}
    assert bytes_on_disk(checkpoint) < sum(tensors.values()) + 64_000, "something else is large"
    return sum(tensors.values()) / sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize(
    "form, bf16, asynchronous",
    [("mixin", True, False), ("mixin", False, True), ("callback", True, True), ("callback", False, False)],
)
def test_a_checkpoint_takes_12_to_14_bytes_a_parameter(tmp_path, form, bf16, asynchronous):
    """Weights once, masters and two moments of AdamW: whichever way HiFT comes to be below the Trainer."""
    model = model_zoo.tiny.build("llama", seed=1, hidden_size=64, intermediate_size=128)
    ds = {**AUTO, "hift": {"checkpoint": {"asynchronous": asynchronous}}}
    options = llama_options(eval_strategy="no", bf16=bf16, ds=ds, save_total_limit=1)
    trained(tmp_path, Trainer, model, form, **options)
    checkpoints = sorted((tmp_path / form).glob("checkpoint-*"))
    assert [path.name for path in checkpoints] == ["checkpoint-7"]
    assert bytes_a_parameter(checkpoints[0], model) == pytest.approx(14 if bf16 else 12, abs=0.2)
    assert broken_seal(checkpoints[0], weights=True) is None
    assert "model.safetensors" in (checkpoints[0] / "trainer_files.json").read_text() or form == "mixin"


@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_an_asynchronous_checkpoint_is_one_while_training_goes_on(tmp_path, family):
    """Its thread gives the file its second name, and seals what the Trainer could not seal yet: Mixtral's own form."""
    seen = {}

    class Look(TrainerCallback):
        def on_save(self, args, state, control, **kwargs):  # after ours
            checkpoint = tmp_path / "callback" / f"checkpoint-{state.global_step}"
            early = json.loads((checkpoint / "trainer_files.json").read_text())  # of what nothing will replace
            seen[state.global_step] = (checkpoint / "latest").exists(), "model.safetensors" in early

        def on_step_end(self, args, state, control, **kwargs):
            checkpoint = tmp_path / "callback" / "checkpoint-1"
            if state.global_step == 6 and checkpoint.exists():
                ours = checkpoint / "global_step1" / "model.safetensors"
                engine.engine.checkpointer._background._thread.join(30)  # all groups have had their turn
                seen["same"] = ours.samefile(checkpoint / "model.safetensors")

    engine = HiFTCallback()
    args = arguments(
        tmp_path / "callback", {**AUTO, "hift": {"checkpoint": {"asynchronous": True}}}, max_steps=6,
        save_strategy="steps", save_steps=1,
    )  # fmt: skip
    trainer = Trainer(
        model_zoo.tiny.build(family), args, train_dataset=ragged_dataset(12), callbacks=[engine, Look(), SavesOnce()]
    )
    trainer.train()
    assert seen == {1: (False, False), "same": family == "llama"}
    checkpoint = tmp_path / "callback" / "checkpoint-1"
    assert broken_seal(checkpoint, weights=True) is None
    sealed = json.loads((checkpoint / "trainer_files.json").read_text())
    assert {"model.safetensors", "trainer_state.json", "config.json"} <= sealed.keys()
    assert AutoModelForCausalLM.from_pretrained(checkpoint).num_parameters() > 0


class SavesOnce(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        control.should_save = state.global_step == 1


def test_it_goes_on_from_a_checkpoint(tmp_path):
    options = llama_options(
        eval_strategy="no", train_sampling_strategy="group_by_length", gradient_accumulation_steps=1,
        trainer={"train_dataset": ragged_dataset(18)},
    )  # fmt: skip
    whole = trained(tmp_path, Trainer, model_zoo.tiny.build("llama", seed=1), "callback", **copy.copy(options))
    again = Trainer(
        model=model_zoo.tiny.build("llama", seed=2), **options.pop("trainer"), callbacks=[HiFTCallback()],
        args=arguments(tmp_path / "callback", GROUPS, **options),
    )  # fmt: skip
    again.train(resume_from_checkpoint=str(tmp_path / "callback" / "checkpoint-5"))
    for name, value in whole.model.state_dict().items():
        torch.testing.assert_close(again.model.state_dict()[name], value, rtol=0, atol=0, msg=name)
    with pytest.raises(ConfigError, match="serves one train"):
        again.train()


@pytest.mark.parametrize("kind", ["dpo", "grpo", "rloo", "online_dpo"])
def test_with_a_reference_model(tmp_path, kind):
    """Which gets DeepSpeed's own engine, and so does a reward model; but for DPO they generate between the steps."""
    unset_hf_deepspeed_config()  # of an earlier test's arguments, which would have the models made in shards
    saved, results = folder_of(kind, tmp_path / "model"), []
    online = {"online_dpo": ("OnlineDPO", {"max_new_tokens": 4, "max_length": 16, "max_steps": 3}, {})}
    name, options, given = (TRAINERS | online)[kind]
    module = trl
    if kind in online:
        from trl.experimental import online_dpo as module
    rewards = folder_of("reward", tmp_path / "reward")
    tokenizer().save_pretrained(rewards)
    for form in ("mixin", "callback"):
        model = AutoModelForCausalLM.from_pretrained(saved, dtype="float32")
        if kind in ("rloo", "online_dpo"):
            reward = AutoModelForSequenceClassification.from_pretrained(rewards, num_labels=1)
            given = {"reward_funcs": reward, "reward_processing_classes": tokenizer()}
        results.append(
            trained(
                tmp_path, getattr(module, f"{name}Trainer"), model, form, getattr(module, f"{name}Config"), bf16=False,
                trainer={"train_dataset": rows(kind), "processing_class": tokenizer(), **given},
                **{"max_steps": 6, "learning_rate": 1e-2, **options},
            )
        )  # fmt: skip
        assert type(results[-1].ref_model) is deepspeed.DeepSpeedEngine
        if kind in ("rloo", "online_dpo"):
            assert type(results[-1].reward_funcs[0]) is deepspeed.DeepSpeedEngine
            assert torch.equal(reward.score.weight, load_file(f"{rewards}/model.safetensors")["score.weight"])
    assert logs_of(results[0]) == logs_of(results[1])
    for (name, a), b in zip(results[0].model.state_dict().items(), results[1].model.state_dict().values(), strict=True):
        assert torch.equal(a, b), name


class ActorAndCritic(nn.Module):
    """A policy and the model of its values, trained together: what PPO's trainers optimize."""

    def __init__(self, policy: Any, value: Any) -> None:
        super().__init__()
        self.policy, self.value, self.config = policy, value, policy.config

    def forward(self, input_ids: Any, attention_mask: Any, labels: Any = None) -> Any:
        inputs = {"input_ids": input_ids, "attention_mask": attention_mask}
        hidden = self.value.model(**inputs).last_hidden_state
        return self.policy(**inputs).logits, self.value.score(hidden).squeeze(-1)


class ActorCriticTrainer(Trainer):
    """The losses of PPO's first pass, with advantages from a reward model and a reference model."""

    def __init__(self, *args: Any, ref_model: Any, reward_model: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.ref_model, self.reward_model = (prepare_deepspeed(m, self.accelerator) for m in (ref_model, reward_model))

    def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **options: Any) -> Any:
        labels = inputs.pop("labels")[:, 1:]
        learned = labels != -100

        def of_labels(logits: torch.Tensor) -> torch.Tensor:
            return logits[:, :-1].log_softmax(-1).gather(-1, labels.clamp(min=0).unsqueeze(-1)).squeeze(-1)

        with torch.no_grad():
            reference, reward = of_labels(self.ref_model(**inputs).logits), self.reward_model(**inputs).logits
        logits, values = model(**inputs)
        now, values = of_labels(logits), values[:, :-1]
        returns = reward - 0.1 * (now.detach() - reference)
        ratio = (now - now.detach()).exp()
        loss = -ratio * (returns - values.detach()) + 0.5 * (returns - values) ** 2
        return (loss * learned).sum() / learned.sum()


def test_a_value_model_is_trained_and_reward_and_reference_are_not(tmp_path):
    results, groups = [], []
    for form in ("mixin", "callback"):

        def build(kind, seed):
            options = {"num_labels": 1, "pad_token_id": 0} if kind == "sequence_classification" else {}
            return model_zoo.tiny.build("llama", kind, seed=seed, **options)

        model = ActorAndCritic(build("causal_lm", 1), build("sequence_classification", 2))
        fixed = {"ref_model": build("causal_lm", 1), "reward_model": build("sequence_classification", 3)}
        before = copy.deepcopy([model.state_dict(), *(each.state_dict() for each in fixed.values())])
        trainer = trained(
            tmp_path, ActorCriticTrainer, model, form, max_steps=22, learning_rate=1e-2, gradient_accumulation_steps=2,
            trainer={"train_dataset": ragged_dataset(12), **fixed},
        )  # fmt: skip
        assert type(trainer.ref_model) is type(trainer.reward_model) is deepspeed.DeepSpeedEngine
        after = [model.state_dict(), *(each.state_dict() for each in fixed.values())]
        moved = [[not torch.equal(a[name], b[name]) for name in a] for a, b in zip(before, after, strict=True)]
        assert all(moved[0]) and not any(moved[1] + moved[2])
        engine = trainer.engine if form == "mixin" else engine_of(trainer)
        groups.append([group.name for group in engine.groups])
        assert set(engine.coverage().values()) <= {2, 3}, "policy and value model had not all their turns"
        results.append(trainer)
    assert groups[0] == groups[1] and logs_of(results[0]) == logs_of(results[1])
    for (name, a), b in zip(results[0].model.state_dict().items(), results[1].model.state_dict().values(), strict=True):
        assert torch.equal(a, b), name


class BuildsItsOwnEngine(Trainer):
    """As TRL's PPOTrainer did: prepares in its constructor, and tells no callback that it is there."""

    def __init__(self, model: Any, args: Any, callbacks: Any, **options: Any) -> None:
        super().__init__(model, args, **options)
        for callback in callbacks:
            self.add_callback(callback)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        self.model, self.optimizer = self.accelerator.prepare(model, optimizer)

    def train(self) -> None:
        self.callback_handler.on_train_begin(self.args, self.state, self.control)


def test_a_trainer_that_says_nothing_in_time_is_not_trained_without_hift(tmp_path, monkeypatch):
    """Full fine-tuning in silence would be the end of it."""
    for name, value in launch_variables(rank=0, world_size=1, port=free_port()).items():
        monkeypatch.setenv(name, value)  # DeepSpeed's own engine wants them
    data = {"train_dataset": ragged_dataset(4)}
    later = Trainer(model_zoo.tiny.build("llama"), arguments(tmp_path), **data)
    later.add_callback(HiFTCallback())
    with pytest.raises(ConfigError, match="give it to the constructor"):
        later.train()
    for callback in (HiFTCallback(), AnnouncedCallback()):
        config = {**AUTO, "train_micro_batch_size_per_gpu": 2, "gradient_accumulation_steps": 1}
        trainer = BuildsItsOwnEngine(model_zoo.tiny.build("llama"), arguments(tmp_path, config), [callback], **data)
        with pytest.raises(ConfigError, match="hift_ds.accelerate"):
            trainer.train()
    with pytest.raises(ConfigError, match="HiFTOwn: it has its engine built in its own constructor"):
        type("HiFTOwn", (HiFTMixin, BuildsItsOwnEngine), {})(
            model_zoo.tiny.build("llama"), arguments(tmp_path, config), [], **data
        )


def test_what_events_keep(tmp_path, caplog, monkeypatch):
    """Coverage and what a run too short for its groups means, metrics, the answer to a full device."""
    options = llama_options(max_steps=3, eval_strategy="no", save_strategy="no")
    with caplog.at_level("INFO", "hift_ds"):
        trainer = trained(tmp_path, Trainer, model_zoo.tiny.build("llama"), "callback", **copy.deepcopy(options))
    assert "3 steps" in caplog.text and "11 OF 30 TRAINABLE TENSORS WERE NEVER UPDATED" in caplog.text
    lines = [entry for entry in trainer.state.log_history if "loss" in entry]
    for step, entry in enumerate(lines):
        assert entry["group"] == step and entry["cycle"] == 0 and entry["learning_rate"] > 0
        assert entry["step_time_s"] > 0 and entry["stalled_s"] >= 0 and entry["peak_memory_gib"] > 0
    assert len(lines) == 3

    monkeypatch.setattr(out_of_memory, "Advice", Forecast)
    model = model_zoo.tiny.build("llama")
    model.register_forward_pre_hook(full)
    args = arguments(tmp_path, GROUPS)
    with pytest.raises(OutOfMemory, match="(?s)in forward at 2 x 12 tokens while group 0 .*forecast 9 GiB") as caught:
        Trainer(model, args, train_dataset=ragged_dataset(4), callbacks=[HiFTCallback()]).train()
    assert isinstance(caught.value, RuntimeError) and caught.value.args[0].startswith("CUDA out of memory")


class Forecast(NoAdvice):
    def text(self, batch, length, budget_bytes):
        return "forecast 9 GiB"


def test_a_disk_without_room_is_found_before_the_first_step(tmp_path, monkeypatch):
    options = llama_options(eval_strategy="no")
    given = options.pop("trainer")
    args = arguments(tmp_path, GROUPS, **options)
    free = disk_room.shutil.disk_usage(tmp_path)
    each = 12 * NUMEL
    trainers = [Trainer(model_zoo.tiny.build("llama"), args, **given, callbacks=[HiFTCallback()])]
    monkeypatch.setattr(disk_room.shutil, "disk_usage", lambda path: free._replace(free=2 * each + 3 * NUMEL))
    with pytest.raises(CheckpointError, match="will need 2 checkpoints of .* while one is written"):
        trainers[0].train()
    assert not list(tmp_path.glob("checkpoint-*"))
    monkeypatch.setattr(disk_room.shutil, "disk_usage", lambda path: free._replace(free=2 * each + 5 * NUMEL))
    args = arguments(tmp_path, GROUPS, **options)
    Trainer(model_zoo.tiny.build("llama"), args, **given, callbacks=[HiFTCallback()]).train()
    assert len(list(tmp_path.glob("checkpoint-*"))) == 2


def test_without_a_block_it_is_an_error_or_nothing(tmp_path):
    plain = {k: v for k, v in AUTO.items() if k != "hift"}
    with pytest.raises(ConfigError, match='"hift": {}'):
        Trainer(model_zoo.tiny.build("llama"), arguments(tmp_path, plain), callbacks=[HiFTCallback()])
    callback = HiFTCallback(optional=True)
    os.environ.pop("ACCELERATE_USE_DEEPSPEED", None)
    args = TrainingArguments(str(tmp_path), max_steps=1, use_cpu=True, report_to=[], save_strategy="no")
    trainer = Trainer(model_zoo.tiny.build("llama"), args, train_dataset=ragged_dataset(4), callbacks=[callback])
    trainer.train()
    assert callback.engine is None and "group" not in trainer.state.log_history[0]


def test_a_loop_over_accelerate(tmp_path):
    from accelerate import Accelerator, DeepSpeedPlugin
    from accelerate.state import AcceleratorState
    from torch.utils.data import DataLoader

    config = {
        **AUTO,
        "train_micro_batch_size_per_gpu": 2,
        "gradient_clipping": 1.0,
        "hift": {"state": {"io": "auto"}},
    }
    AcceleratorState._reset_state(True)
    accelerator = Accelerator(deepspeed_plugin=DeepSpeedPlugin(hf_ds_config=config))
    model = model_zoo.tiny.build("llama")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    stock = deepspeed.initialize
    with hift_ds.accelerate() as engines:
        engine, optimizer, data = accelerator.prepare(model, optimizer, DataLoader(ragged_dataset(10), batch_size=2))
    assert engines == [engine] and deepspeed.initialize is stock
    for batch in data:
        accelerator.backward(engine(**batch).loss)
        optimizer.step()
        optimizer.zero_grad()
    assert set(engine.coverage().values()) == {1}
    assert accelerator.unwrap_model(engine) is model
    engine.destroy()
    with pytest.raises(ConfigError, match="group_sise"), hift_ds.accelerate({"group_sise": 2}):
        pass


def test_a_loop_over_accelerate_with_one_group_is_the_plain_loop():
    from accelerate import Accelerator, DeepSpeedPlugin
    from accelerate.state import AcceleratorState
    from torch.utils.data import DataLoader

    weights = []
    for config in (None, {**ONE_GROUP, "train_micro_batch_size_per_gpu": 2, "gradient_clipping": 0.5}):
        os.environ.pop("ACCELERATE_USE_DEEPSPEED", None)
        AcceleratorState._reset_state(True)
        plugin = DeepSpeedPlugin(hf_ds_config=copy.deepcopy(config)) if config else None
        accelerator = Accelerator(deepspeed_plugin=plugin, cpu=plugin is None)
        model = model_zoo.tiny.build("llama", seed=1)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        parts = (model, optimizer, DataLoader(ragged_dataset(10), batch_size=2))
        with hift_ds.accelerate() if config else contextlib.nullcontext():
            prepared, optimizer, data = accelerator.prepare(*parts)
        for batch in data:
            accelerator.backward(prepared(**batch).loss)
            if config is None:
                accelerator.clip_grad_norm_(model.parameters(), 0.5)
            optimizer.step()
            optimizer.zero_grad()
        weights.append({name: value.detach().clone() for name, value in model.state_dict().items()})
    prepared.destroy()
    AcceleratorState._reset_state(True)
    for name, value in weights[0].items():
        torch.testing.assert_close(weights[1][name], value, atol=2e-6, rtol=0, msg=name)


PROGRAM = """
import sys
from transformers import Trainer, TrainingArguments
import model_zoo
from tests.helpers.parity import ONE_GROUP
from tests.helpers.trainer import ragged_dataset
args = TrainingArguments(sys.argv[1], deepspeed=sys.argv[2], max_steps=5, use_cpu=True, report_to=[],
                         save_strategy="no", logging_steps=1)
trainer = Trainer(model_zoo.tiny.build("llama"), args, train_dataset=ragged_dataset(12))
trainer.train()
print("groups", [entry["group"] for entry in trainer.state.log_history if "group" in entry])
"""


@pytest.mark.parametrize("block", [{}, None, {"group_sise": 1}])
def test_launch_with_another_program(tmp_path, block):
    (tmp_path / "program.py").write_text(PROGRAM)
    config = {"zero_optimization": {"stage": 0}, "train_micro_batch_size_per_gpu": "auto"}
    if block is not None:
        config["hift"] = block
    (tmp_path / "ds.json").write_text(json.dumps(config))
    command = [
        sys.executable,
        "-m",
        "hift_ds.launch_with",
        str(tmp_path / "program.py"),
        str(tmp_path / "out"),
    ]
    variables = {
        "RANK": "0",
        "LOCAL_RANK": "0",
        "WORLD_SIZE": "1",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "28911",
    }
    env = {**os.environ, "TORCH_EXTENSIONS_DIR": str(tmp_path), **(variables if block is None else {})}
    if block is None:  # the program is what it is; plain DeepSpeed would compile something for a CPU
        (tmp_path / "program.py").write_text("print('groups', [])")
    done = subprocess.run([*command, str(tmp_path / "ds.json")], env=env, capture_output=True, text=True)
    if block == {}:
        assert done.returncode == 0, done.stderr[-2000:]
        assert "HiFT is on, 5 layer groups" in done.stderr and "groups [0, 1, 2, 3, 4]" in done.stdout
    elif block is None:
        assert "HiFT was never on" in done.stderr and "groups []" in done.stdout and done.returncode == 0
    else:
        assert done.returncode == 2 and "group_size" in done.stderr and "Traceback" not in done.stderr


def test_plug_ins_in_the_slots_of_other_programs(monkeypatch):
    """Their modules stand here for what they define; tests/hosts runs the real ones."""
    base = types.ModuleType("axolotl.integrations.base")
    base.BasePlugin = type("BasePlugin", (), {})
    mapping = types.ModuleType("swift.callbacks.mapping")
    mapping.callbacks_map = {}
    modules = {"axolotl": None, "axolotl.integrations": None, "axolotl.integrations.base": base, "swift": None,
               "swift.callbacks": None, "swift.callbacks.mapping": mapping}  # fmt: skip
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module or types.ModuleType(name))
    sys.modules.pop("hift_ds.integrations.axolotl", None)
    from hift_ds.integrations.axolotl import HiFTPlugin

    (callback,) = HiFTPlugin().add_callbacks_pre_trainer({}, nn.Linear(1, 1))
    assert isinstance(callback, HiFTCallback) and callback.optional
    # ms-swift runs the file by its path.
    runpy.run_path(str(Path(hift_ds.__file__).parent / "integrations" / "ms_swift.py"))
    assert isinstance(mapping.callbacks_map["hift"](None, None), HiFTCallback)


def test_nothing_is_left_in_transformers():
    from hift_ds.launch_with import main

    before = list(DEFAULT_CALLBACKS)
    assert main([]) == 2 and main(["--help"]) == 0
    with pytest.raises(ImportError):
        main(["no.such.module"])
    assert before == DEFAULT_CALLBACKS
