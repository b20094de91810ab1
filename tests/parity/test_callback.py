"""``HiFTCallback`` does what ``HiFTMixin`` does, bit for bit, in trainers that know nothing of it."""

from __future__ import annotations

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
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments
from transformers.trainer import DEFAULT_CALLBACKS

import hift_ds
import model_zoo
from hift_ds import HiFTCallback, HiFTMixin
from hift_ds.checkpoint.trainer_folder import broken_seal
from hift_ds.errors import ConfigError
from hift_ds.integrations.weights_once import keep_once
from tests.helpers.trainer import AUTO, arguments, ragged_dataset
from tests.numerics.test_engine_life import hooks_of
from tests.parity.test_trl import TRAINERS, folder_of, rows, tokenizer

trl = pytest.importorskip("trl")
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


@pytest.mark.parametrize("kind", ["dpo", "grpo"])
def test_with_a_reference_model(tmp_path, kind):
    """Which gets DeepSpeed's own engine; GRPO generates between the steps besides."""
    saved, results = folder_of(kind, tmp_path / "model"), []
    name, options, given = TRAINERS[kind]
    for form in ("mixin", "callback"):
        model = AutoModelForCausalLM.from_pretrained(saved, dtype="float32")
        results.append(
            trained(
                tmp_path, getattr(trl, f"{name}Trainer"), model, form, getattr(trl, f"{name}Config"), bf16=False,
                trainer={"train_dataset": rows(kind), "processing_class": tokenizer(), **given},
                **{"max_steps": 6, "learning_rate": 1e-2, **options},
            )
        )  # fmt: skip
        assert type(results[-1].ref_model) is deepspeed.DeepSpeedEngine
    assert logs_of(results[0]) == logs_of(results[1])
    for (name, a), b in zip(results[0].model.state_dict().items(), results[1].model.state_dict().values(), strict=True):
        assert torch.equal(a, b), name


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


PROGRAM = """
import sys
from transformers import Trainer, TrainingArguments
import model_zoo
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
