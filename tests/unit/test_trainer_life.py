"""Whichever way ``train()`` ends, its caller finds everything as before; and another trainer goes on with the model."""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
import tempfile
import threading
from typing import Any

import accelerate
import deepspeed
import pytest
import torch
from accelerate.state import AcceleratorState
from safetensors.torch import load_file
from torch import nn
from transformers import Trainer, TrainerCallback, TrainingArguments, default_data_collator

import hift_ds
import model_zoo
from hift_ds import HiFTCallback, HiFTMixin, HiFTTrainer
from hift_ds.errors import ConfigError, HiFTError
from hift_ds.integrations import disk_room
from hift_ds.process_group import as_single_process
from tests.helpers.trainer import AUTO, arguments, ragged_dataset
from tests.numerics.test_engine_life import hooks_of

LAUNCH = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def surroundings(model: nn.Module) -> dict[str, Any]:
    gc.collect()
    return {
        "flags": {name: param.requires_grad for name, param in model.named_parameters()},
        "gradients": [name for name, param in model.named_parameters() if param.grad is not None],
        "hooks": hooks_of(model),
        "environment": dict(os.environ),
        "names": (deepspeed.initialize, deepspeed.DeepSpeedEngine, nn.functional.linear, nn.Linear.forward),
        "default dtype": torch.get_default_dtype(),
        "threads": {thread.name for thread in threading.enumerate() if not thread.name.startswith("pt_")},
        "config": AcceleratorState().deepspeed_plugin.deepspeed_config.get("hift"),
        "operators": vars(deepspeed.ops).get("__compatible_ops__"),
    }


class Interrupt(TrainerCallback):
    def __init__(self, error: BaseException | None) -> None:
        self.error = error

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 3 and self.error is not None:
            raise self.error


def interrupt_inside(model: nn.Module, where: str) -> Any:
    """Ctrl-C in the fourth step."""
    calls = []

    def stop(module, args, output):
        calls.append(0)
        if len(calls) == 4:
            if where == "forward":
                raise KeyboardInterrupt
            output.register_hook(lambda grad: (_ for _ in ()).throw(KeyboardInterrupt()))

    return (model.lm_head if where == "backward" else model.model.norm).register_forward_hook(stop)


@pytest.mark.parametrize("stage", [0, 3])
@pytest.mark.parametrize("way", ["return", "error", "Ctrl-C", "forward", "backward", "no engine"])
def test_as_before(tmp_path, way, stage):
    model = model_zoo.tiny.build("llama")
    model.model.layers[1].mlp.up_proj.weight.requires_grad_(False)
    error = {"error": RuntimeError("mine"), "Ctrl-C": KeyboardInterrupt()}.get(way)
    ds = {**AUTO, "zero_optimization": {"stage": stage}, "hift": {"state": {"io": "auto"}}}
    if way == "no engine":
        ds["hift"] = {"groups": [["nothing"]]}
    trainer = HiFTTrainer(
        model,
        arguments(tmp_path, ds, max_steps=7, neftune_noise_alpha=1.0 if way == "Ctrl-C" else None),
        train_dataset=ragged_dataset(12),
        callbacks=[Interrupt(error)],
    )
    handle = interrupt_inside(model, way) if way in ("forward", "backward") else None
    before = surroundings(model)
    try:
        trainer.train()
        ended = None
    except BaseException as raised:
        ended = raised
    expected = {"return": type(None), "error": RuntimeError, "no engine": HiFTError}
    assert isinstance(ended, expected.get(way, KeyboardInterrupt)), repr(ended)
    del ended
    after = surroundings(model)
    if stage == 3 and way != "no engine":  # the weights stay in shards, which hooks gather for evaluation
        after["hooks"] = before["hooks"]
        assert trainer.evaluate(ragged_dataset(3))["eval_loss"] > 0
        trainer.engine.destroy()
        after["hooks"] = hooks_of(model)
    for what, value in before.items():
        assert after[what] == value, what
    if way == "no engine":
        return
    optimizer = trainer.engine.optimizer
    assert not optimizer.store._host and not optimizer.states.always_store._memory
    with pytest.raises(HiFTError, match="training has ended"):
        trainer.engine.step()
    if handle is not None:
        handle.remove()
    if stage == 0:
        assert trainer.evaluate(ragged_dataset(3))["eval_loss"] > 0


def test_a_second_trainer_of_ours_or_a_plain_one_trains_every_weight(tmp_path):
    model = model_zoo.tiny.build("llama")
    data = ragged_dataset(12)
    HiFTTrainer(model, arguments(tmp_path, max_steps=3), train_dataset=data).train()
    second = HiFTTrainer(model, arguments(tmp_path, max_steps=5), train_dataset=data)
    second.train()
    assert len(second.engine.groups) == 5 and set(second.engine.coverage().values()) == {1}
    for plain_args in ({}, {"deepspeed": {k: v for k, v in AUTO.items() if k != "hift"}}):
        os.environ.pop("ACCELERATE_USE_DEEPSPEED")  # transformers leaves it behind
        args = TrainingArguments(
            str(tmp_path), max_steps=2, use_cpu=True, report_to=[], save_strategy="no", **plain_args
        )
        before = {name: value.clone() for name, value in model.state_dict().items()}
        with as_single_process():
            Trainer(model, args, train_dataset=data).train()
        assert all(not torch.equal(before[name], value) for name, value in model.state_dict().items())
        os.environ["ACCELERATE_USE_DEEPSPEED"] = "true"


def test_a_second_trainer_after_the_end_of_the_process_group(tmp_path):
    losses = []
    for num in range(2):
        args = arguments(tmp_path / str(num), max_steps=2)
        trainer = HiFTTrainer(model_zoo.tiny.build("llama"), args, train_dataset=ragged_dataset(8))
        trainer.train()
        losses.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
        trainer.accelerator.end_training()
        assert not torch.distributed.is_initialized()
    assert losses[0] == losses[1] and len(losses[0]) == 2


def test_libraries_unwrap_the_engine_while_it_trains(tmp_path):
    class Asks(HiFTTrainer):
        def training_step(self, model, *args, **kwargs):
            assert self.accelerator.unwrap_model(model) is accelerate.utils.extract_model_from_parallel(model)
            assert self.accelerator.unwrap_model(model) is self.model
            assert isinstance(model, deepspeed.DeepSpeedEngine) and issubclass(type(model), deepspeed.DeepSpeedEngine)
            assert deepspeed.DeepSpeedEngine is deepspeed.runtime.engine.DeepSpeedEngine
            return super().training_step(model, *args, **kwargs)

    Asks(model_zoo.tiny.build("llama"), arguments(tmp_path, max_steps=1), train_dataset=ragged_dataset(4)).train()


SHELLS = [
    {"SLURM_PROCID": "0"},
    {"SLURM_PROCID": "0", "SLURM_NTASKS": "8", "SLURM_JOB_ID": "7"},  # a batch script: srun was not called
    {"SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "1", "SLURM_STEP_ID": "0"},  # srun --pty bash
    {"OMPI_COMM_WORLD_RANK": "0", "OMPI_COMM_WORLD_SIZE": "1", "OMPI_COMM_WORLD_LOCAL_RANK": "0"},
    {"PMI_RANK": "0", "PMI_SIZE": "1"},
]


@pytest.mark.parametrize("shell", SHELLS)
def test_a_script_that_nobody_launched_is_one_rank_in_any_shell(monkeypatch, shell):
    for name in LAUNCH:
        monkeypatch.delenv(name, raising=False)
    for name, value in shell.items():
        monkeypatch.setenv(name, value)
    with as_single_process():
        assert [os.environ[name] for name in LAUNCH[:4]] == ["0", "0", "1", "127.0.0.1"]
    assert not set(LAUNCH) & set(os.environ)


@pytest.mark.parametrize(
    "shell",
    [
        {"SLURM_PROCID": "1", "SLURM_STEP_NUM_TASKS": "2"},
        {"SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "2"},
        {"SLURM_PROCID": "3"},
        {"OMPI_COMM_WORLD_RANK": "0", "OMPI_COMM_WORLD_SIZE": "2"},
    ],
)
def test_one_of_several_processes_is_not_taken_for_the_only_one(monkeypatch, shell):
    for name, value in shell.items():
        monkeypatch.setenv(name, value)
    for name in LAUNCH:
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(ConfigError, match="RANK, LOCAL_RANK, WORLD_SIZE"), as_single_process():
        pass


UNLAUNCHED = """
import json, os, sys
import torch
import hift_ds, trl
from pathlib import Path
from tests.helpers.engines import ds_config, make_engine, train_step
from tests.helpers.parity import ONE_GROUP
from tests.helpers.toy import Toy, make_batches
from tests.parity.test_trl import TRAINERS, folder_of, rows, tokenizer
from transformers import AutoModelForCausalLM

names = {"RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"}
folder = Path(sys.argv[1])
class HiFTDPOTrainer(hift_ds.HiFTMixin, trl.DPOTrainer): pass
model = AutoModelForCausalLM.from_pretrained(folder_of("dpo", folder / "model"), dtype="float32")
args = trl.DPOConfig(str(folder), deepspeed={"zero_optimization": {"stage": 0}, "hift": {}}, max_steps=2, use_cpu=True,
                     bf16=False, report_to=[], save_strategy="no", per_device_train_batch_size=2)
trainer = HiFTDPOTrainer(model=model, args=args, train_dataset=rows("dpo"), processing_class=tokenizer())
assert type(trainer.ref_model).__name__ == "DeepSpeedEngine", type(trainer.ref_model)
assert not names & set(os.environ)
trainer.train()
assert not names & set(os.environ)
engine = make_engine(Toy(), ds_config())  # and a loop of one's own
train_step(engine, make_batches(1))
engine.destroy()
assert not names & set(os.environ)
print("done", trainer.state.global_step)
"""


def test_a_trainer_with_a_reference_model_in_a_script_that_nobody_launched(tmp_path):
    """Nothing is compiled, nobody asks for mpi4py; the config leaves out what the arguments say."""
    env = {k: v for k, v in os.environ.items() if k not in LAUNCH and k != "ACCELERATE_USE_DEEPSPEED"}
    extensions = tmp_path / "extensions"
    done = subprocess.run(
        [sys.executable, "-c", UNLAUNCHED, str(tmp_path)],
        env={**env, "SLURM_PROCID": "0", "TORCH_EXTENSIONS_DIR": str(extensions)},
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.stdout.strip().endswith("done 2"), done.stderr[-3000:]
    assert not extensions.exists() or not list(extensions.rglob("*.so"))


def test_every_auto_that_is_left_is_named():
    config = {
        "train_micro_batch_size_per_gpu": "auto", "gradient_clipping": "auto",
        "zero_optimization": {"stage": 0, "reduce_bucket_size": "auto"},
        "optimizer": {"type": "AdamW", "params": {"lr": "auto", "betas": "auto"}},
        "hift": {"state": {"io": "auto"}},
    }  # fmt: skip
    named = '"train_micro_batch_size_per_gpu", "gradient_clipping", "zero_optimization.reduce_bucket_size", '
    with pytest.raises(ConfigError, match=named + '"optimizer.params.lr", "optimizer.params.betas"$'):
        hift_ds.initialize(model=nn.Linear(2, 2), config=config)


def test_what_a_config_lacks_is_named():
    with pytest.raises(ConfigError, match='"train_micro_batch_size_per_gpu": missing'):
        hift_ds.initialize(model=nn.Linear(2, 2), config={"hift": {}})
    with pytest.raises(ConfigError, match='"optimizer": missing'):
        hift_ds.initialize(model=nn.Linear(2, 2), config={"train_batch_size": 1, "hift": {}})


def test_accelerate_told_to_leave_deepspeed_out(tmp_path, monkeypatch):
    """``accelerate launch --cpu``."""
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    with pytest.raises(ConfigError, match="accelerate launch.*use_cpu=True"):
        HiFTTrainer(model_zoo.tiny.build("llama"), arguments(tmp_path), train_dataset=ragged_dataset(2)).train()


def test_a_callback_that_freezes_a_block_is_heard(tmp_path):
    class Freeze(TrainerCallback):
        kept: Any = None

        def on_step_end(self, args, state, control, model=None, **kwargs):
            if state.global_step == 5:
                for param in model.model.layers[1].parameters():
                    param.requires_grad = False
                self.kept = [param.clone() for param in model.model.layers[1].parameters()]

    model, freeze = model_zoo.tiny.build("llama"), Freeze()
    trainer = HiFTTrainer(
        model, arguments(tmp_path, max_steps=15, gradient_accumulation_steps=2), train_dataset=ragged_dataset(12),
        callbacks=[freeze],
    )  # fmt: skip
    trainer.train()
    assert all(map(torch.equal, freeze.kept, model.model.layers[1].parameters()))
    assert {trainer.engine.coverage()[f"model.layers.{i}.mlp.up_proj.weight"] for i in (0, 2)} == {3}
    assert not model.model.layers[1].mlp.up_proj.weight.requires_grad


def test_what_the_log_and_its_readers_get(tmp_path, caplog):
    caplog.set_level("INFO", logger="hift_ds")
    trainer = HiFTTrainer(
        model_zoo.tiny.build("llama"), arguments(tmp_path, max_steps=4, logging_steps=2),
        train_dataset=ragged_dataset(12),
    )  # fmt: skip
    trainer.train()
    logged = [entry for entry in trainer.state.log_history if "loss" in entry]
    for entry in logged:
        assert entry["step_time_s"] > 0 and entry["peak_memory_gib"] > 0 and entry["stalled_s"] >= 0
    assert [entry["group"] for entry in logged] == [1, 3]
    assert "one cycle over the 5 layer groups takes 5 steps and the run has 4" in caplog.text
    assert "27 of 30 trainable tensors updated in 4 steps" in caplog.text or "NEVER UPDATED" in caplog.text
    json.dumps(trainer.state.log_history)


@pytest.mark.parametrize("kind", ["HiFTTrainer", "mixin", "callback"])
def test_loggers_get_what_only_the_engine_knows(tmp_path, kind):
    """Those that stand before our callback too, as the Trainer's own do."""

    class Logger(TrainerCallback):
        def __init__(self):
            self.seen = []

        def on_log(self, args, state, control, logs=None, **kwargs):
            self.seen.append(dict(logs))

    logger = Logger()
    classes = {"HiFTTrainer": HiFTTrainer, "mixin": type("Mixed", (HiFTMixin, Trainer), {}), "callback": Trainer}
    classes[kind](
        model_zoo.tiny.build("llama"), arguments(tmp_path, max_steps=2), train_dataset=ragged_dataset(12),
        callbacks=[logger, *([HiFTCallback()] if kind == "callback" else [])],
    ).train()  # fmt: skip
    logged = [logs for logs in logger.seen if "loss" in logs]
    assert [logs["group"] for logs in logged] == [0, 1]
    for logs in logged:
        assert logs["step_time_s"] > 0 and logs["peak_memory_gib"] > 0 and {"stalled_s", "cycle"} <= logs.keys()


@pytest.mark.parametrize("config", [{"hift": {}}, {"hift": {}, "zero_optimization": None}, "file"])
def test_a_config_of_the_block_alone(tmp_path, config):
    """accelerate insists on "zero_optimization"; what else is missing is the arguments'."""
    if config == "file":
        (tmp_path / "ds.json").write_text('{"hift": {}}')
        config = str(tmp_path / "ds.json")
    args = arguments(tmp_path, config, max_steps=2, gradient_accumulation_steps=2, max_grad_norm=0.0)
    trainer = HiFTTrainer(model_zoo.tiny.build("llama"), args, train_dataset=ragged_dataset(12))
    trainer.train()
    assert trainer.engine.zero_optimization_stage() == 0 and trainer.engine.global_steps == 2
    twin = model_zoo.tiny.build("llama")
    args = arguments(tmp_path, {k: v for k, v in AUTO.items() if k != "gradient_clipping"}, max_steps=2,
                     gradient_accumulation_steps=2, max_grad_norm=0.0)  # fmt: skip
    HiFTTrainer(twin, args, train_dataset=ragged_dataset(12)).train()
    assert all(map(torch.equal, trainer.model.parameters(), twin.parameters()))


def test_a_config_without_a_block_still_needs_what_accelerate_asks_for(tmp_path):
    with pytest.raises(ValueError, match="ZeRO optimization config"):
        arguments(tmp_path, {"gradient_clipping": 1.0})


@pytest.mark.parametrize(("rate", "diverges"), [(1.0, True), (1e-4, False)])
def test_a_loss_that_explodes_and_stays_a_number_is_said_once(tmp_path, caplog, rate, diverges):
    trainer = HiFTTrainer(
        model_zoo.tiny.build("llama"),
        arguments(tmp_path, max_steps=14, learning_rate=rate, lr_scheduler_type="constant", max_grad_norm=0.0),
        train_dataset=ragged_dataset(28),
    )
    trainer.train()
    assert caplog.text.count("the run diverges; lower the learning rate") == diverges


# -- what only a checkpoint does -----------------------------------------------------------------------------


class Unsavable:
    """Stands for a tokenizer whose class refuses to be written."""

    def save_pretrained(self, folder, **kwargs):
        raise ValueError("no vocabulary\nfile")


class Steps(TrainerCallback):
    num = 0

    def on_step_begin(self, *args, **kwargs):
        self.num += 1


def saving_trainer(
    folder: Any, model: Any = None, processing: Any = None, form: str = "trainer", data: Any = None, **options: Any
) -> tuple[Trainer, Steps]:
    steps = Steps()
    options = {"save_strategy": "steps", "save_steps": 2, "max_steps": 6, **options}
    trainer = (Trainer if form == "callback" else HiFTTrainer)(
        model or model_zoo.tiny.build("llama"), arguments(folder, **options),
        train_dataset=ragged_dataset(12) if data is None else data, processing_class=processing,
        callbacks=[steps, *([HiFTCallback()] if form == "callback" else [])],
    )  # fmt: skip
    return trainer, steps


FORMS = pytest.mark.parametrize("form", ["trainer", "callback"])


@FORMS
def test_a_folder_that_cannot_be_made_or_a_tokenizer_that_cannot_be_saved_is_found_before_the_first_step(
    tmp_path, form
):
    (tmp_path / "file").write_text("")
    if form == "trainer":  # else the Trainer has made its folder before a callback hears of it
        with pytest.raises(ConfigError, match="^output_dir: .* cannot be made or written"):
            saving_trainer(tmp_path / "file" / "out", form=form)
    for given in ("processing_class", "collator"):
        trainer, steps = saving_trainer(
            tmp_path / "out", processing=Unsavable() if given == "processing_class" else None, form=form
        )
        if given == "collator":
            trainer.data_collator = type("Collator", (), {"__call__": staticmethod(default_data_collator)})()
            trainer.data_collator.tokenizer = Unsavable()
        with pytest.raises(ConfigError, match="^processing_class: a checkpoint could not hold it: no vocabulary file$"):
            trainer.train()
        assert steps.num == 0
    trainer, steps = saving_trainer(tmp_path / "out", processing=Unsavable(), save_strategy="no", form=form)
    trainer.train()
    assert steps.num == 6


@FORMS
def test_arguments_that_cannot_be_pickled_are_found_before_the_first_step(tmp_path, form):
    trainer, steps = saving_trainer(tmp_path, form=form)
    trainer.args.run_name = lambda: None
    with pytest.raises(ConfigError, match="^args: a checkpoint could not hold it: "):
        trainer.train()
    assert steps.num == 0


class WithMore(nn.Module):
    def __init__(self, kind: str) -> None:
        super().__init__()
        self.embed, self.head, self.kind = nn.Embedding(67, 8), nn.Linear(8, 67), kind
        if kind == "tied":
            self.head.weight = self.embed.weight
        if kind == "turned":
            self.register_buffer("table", torch.randn(8, 67).T)

    def get_extra_state(self) -> Any:
        return {"steps": 1} if self.kind == "more" else torch.zeros(1)

    def set_extra_state(self, state: Any) -> None: ...

    def forward(self, input_ids: Any, labels: Any, attention_mask: Any = None) -> Any:
        return {"loss": self.head(self.embed(input_ids)).square().mean()}


@FORMS
@pytest.mark.parametrize(
    ("kind", "line"),
    [
        ("more", r"_extra_state is a dict \(get_extra_state\) and no tensor: keep it in a buffer"),
        ("tied", "head.weight is embed.weight too, which transformers cannot write: use HiFTTrainer or HiFTMixin"),
        ("turned", "table is not contiguous, which transformers cannot write: use HiFTTrainer or HiFTMixin"),
    ],
)
def test_a_model_of_ones_own_that_a_checkpoint_could_not_hold(tmp_path, caplog, form, kind, line):
    trainer, steps = saving_trainer(tmp_path, WithMore(kind), form=form)
    if kind == "more" or form == "callback":
        with pytest.raises(ConfigError, match=f"^model: a checkpoint could not hold it: {line}"):
            trainer.train()
        assert steps.num == 0
        return
    trainer.train()
    assert steps.num == 6
    assert "WithMore has a state besides weights and buffers (get_extra_state)" in caplog.text


@FORMS
def test_ties_that_the_class_of_a_model_does_not_declare(tmp_path, form):
    model = model_zoo.tiny.build("llama")
    model.model.layers[1].mlp.up_proj.weight = model.model.layers[0].mlp.up_proj.weight
    trainer, steps = saving_trainer(tmp_path, model, form=form)
    with pytest.raises(ConfigError, match="^model: a checkpoint could not hold it: The weights .* shared tensors"):
        trainer.train()
    assert steps.num == 0


@FORMS
def test_a_generation_config_that_cannot_be_saved(tmp_path, form):
    """The mixin's own saving writes it as it is; transformers' would refuse at the first checkpoint."""
    model = model_zoo.tiny.build("llama")
    model.generation_config.temperature = 0.5  # without do_sample
    trainer, steps = saving_trainer(tmp_path / "out", model, form=form)
    if form == "callback":
        with pytest.raises(ConfigError, match="^model.generation_config: a checkpoint could not hold it: "):
            trainer.train()
        assert steps.num == 0
        return
    trainer.train()
    assert json.loads((tmp_path / "out" / "checkpoint-6" / "generation_config.json").read_text())["temperature"] == 0.5


@FORMS
def test_no_temporary_folder(tmp_path, monkeypatch, form):
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "file"))
    trainer, steps = saving_trainer(tmp_path / "out", form=form)
    with pytest.raises(ConfigError, match="^no temporary folder can be written .*TMPDIR"):
        trainer.train()
    assert steps.num == 0


@FORMS
def test_a_disk_that_will_not_hold_the_checkpoints_is_found_before_the_first_step(tmp_path, monkeypatch, form):
    """save_total_limit + 1 of them, each as large as those that are written; for a moment a plain Trainer's own copy of
    the weights besides."""
    trainer, _ = saving_trainer(tmp_path / "out", form=form)
    trainer.train()
    folder = tmp_path / "out" / "checkpoint-6"
    size = sum(
        tensor.nbytes for path in (folder / "global_step6").glob("*.safetensors") for tensor in load_file(path).values()
    )
    more = (folder / "model.safetensors").stat().st_size if form == "callback" else 0
    free = disk_room.shutil.disk_usage(tmp_path)
    for limit, room, fits in ((1, 1.9, False), (1, 2.1, True), (None, 2.9, False), (None, 3.1, True)):
        there = int(size * room) + more
        monkeypatch.setattr(disk_room.shutil, "disk_usage", lambda path, n=there: free._replace(free=n))
        trainer, steps = saving_trainer(tmp_path / f"{limit} {room}", save_total_limit=limit, form=form)
        if fits:
            trainer.train()
        else:
            with pytest.raises(HiFTError, match="output_dir: .* will need .* at a time"):
                trainer.train()
        assert steps.num == (6 if fits else 0)


HOLD = """
import pathlib, sys, time
from hift_ds.checkpoint.folder_lock import FolderLock
lock = FolderLock(pathlib.Path(sys.argv[1]))
print("held", flush=True)
time.sleep(600)
"""


@FORMS
def test_an_output_folder_has_one_writer(tmp_path, form):
    held = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    try:
        assert held.stdout.readline() == "held\n"
        trainer, steps = saving_trainer(tmp_path, form=form)
        with pytest.raises(ConfigError, match=f"^output_dir: .* is in use by another run .process {held.pid}"):
            trainer.train()
        assert steps.num == 0
    finally:
        held.kill()
        held.wait()

    class Tries(TrainerCallback):
        answers: list[int] = []  # noqa: RUF012

        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 3:
                other = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True,
                              stderr=subprocess.DEVNULL)  # fmt: skip
                self.answers.append(other.stdout.readline())
                other.kill()
                other.wait()

    trainer, steps = saving_trainer(tmp_path, form=form)
    trainer.add_callback(Tries())
    trainer.train()
    assert steps.num == 6 and Tries.answers == [""]
    other = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert other.stdout.readline() == "held\n"
    other.kill()
    other.wait()


# -- rows and positions ------------------------------------------------------------------------------------------


def row_of(length: int) -> dict[str, Any]:
    return {"input_ids": list(range(3, 3 + length)), "labels": list(range(3, 3 + length))}


@FORMS
@pytest.mark.parametrize("kind", ["list", "dataset", "shuffled dataset"])
@pytest.mark.parametrize("family", ["gpt2", "opt"])
def test_a_row_longer_than_the_table_of_positions_is_found_before_the_first_step(tmp_path, form, kind, family):
    import datasets

    model = model_zoo.tiny.build(family, max_position_embeddings=16)
    limit = model.config.max_position_embeddings
    rows = [row_of(5) for _ in range(30)]

    def data(long: int) -> Any:
        given = [*rows[:21], row_of(long), *rows[21:]]
        if kind == "list":
            return given
        given = datasets.Dataset.from_list(given)
        return given.select([*range(31)][::-1]) if kind == "shuffled dataset" else given

    options = {"form": form, "per_device_train_batch_size": 1, "max_steps": 2, "save_strategy": "no"}
    trainer, steps = saving_trainer(tmp_path, model, data=data(limit), **options)
    trainer.train()
    assert steps.num == 2
    trainer, steps = saving_trainer(tmp_path, model, data=data(limit + 1), **options)
    at = 9 if kind == "shuffled dataset" else 21
    with pytest.raises(ConfigError, match=f"^train_dataset: row {at} has {limit + 1} tokens, .* {limit} positions"):
        trainer.train()
    assert steps.num == 0


def test_what_a_collator_cuts_is_short_enough_and_rotary_positions_have_no_end(tmp_path):
    rows = [row_of(5), row_of(60), row_of(5)]
    for family, cut in (("gpt2", 8), ("llama", 10_000)):
        model = model_zoo.tiny.build(family, max_position_embeddings=32)
        trainer, steps = saving_trainer(
            tmp_path, model, data=rows, save_strategy="no", per_device_train_batch_size=1, max_steps=3
        )
        trainer.data_collator = lambda given, cut=cut: {
            key: torch.tensor([value[:cut]]) for key, value in given[0].items()
        }
        trainer.train()
        assert steps.num == 3


def test_rows_of_evaluation_too(tmp_path):
    model = model_zoo.tiny.build("gpt2", max_position_embeddings=32)
    trainer, steps = saving_trainer(tmp_path, model, save_strategy="no")
    trainer.args.eval_strategy, trainer.eval_dataset = "steps", {"held out": [row_of(5), row_of(33)]}
    with pytest.raises(ConfigError, match=r"^eval_dataset\['held out'\]: row 1 has 33 tokens"):
        trainer.train()
    assert steps.num == 0
