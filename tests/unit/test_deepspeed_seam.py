"""Every undocumented DeepSpeed name that engine/deepspeed_seam.py leans on, so that a new DeepSpeed release fails
here, by name, and not in the middle of a training run."""

import ast
import inspect
import re
from pathlib import Path

import deepspeed
import pytest
import torch
from deepspeed.runtime.engine import DeepSpeedEngine
from deepspeed.utils import groups

import hift_ds.engine.deepspeed_seam as seam
from hift_ds.process_group import ensure_process_group, forget_ended_groups, nothing_compiled
from tests.helpers.engines import ds_config, make_engine
from tests.helpers.toy import Toy

VERSION = deepspeed.__version__
SOURCE = Path(seam.__file__).read_text()


METHODS = {  # from the file, since decorators hide what they wrap
    node.name: node
    for cls in ast.parse(Path(inspect.getfile(DeepSpeedEngine)).read_text()).body
    if isinstance(cls, ast.ClassDef) and cls.name == "DeepSpeedEngine"
    for node in reversed(cls.body)  # a property's getter stands before its setter
    if isinstance(node, ast.FunctionDef)
}


@pytest.mark.parametrize(
    "method,parameters",
    [
        ("_do_sanity_check", ["self"]),
        ("_configure_distributed_model", ["self", "model"]),
        ("_configure_optimizer", ["self", "client_optimizer", "model_parameters"]),
        ("allreduce_gradients", ["self", "bucket_size"]),
        ("clip_fp32_gradients", ["self"]),
        ("_backward_epilogue", ["self"]),
        ("_assert_valid_mixed_precision_config", ["self"]),
    ],
)
def test_overridden_or_called_methods_keep_their_signature(method, parameters):
    assert method in METHODS, f"DeepSpeed {VERSION} has no {method}"
    found = [argument.arg for argument in METHODS[method].args.args]
    assert found == parameters, f"DeepSpeed {VERSION}: {method}{found}"


@pytest.mark.parametrize(
    "method,text",
    [
        ("__init__", "self._configure_distributed_model(model)"),
        ("__init__", "self._configure_optimizer(optimizer, model_parameters)"),
        ("_backward_epilogue", "self.allreduce_gradients()"),
        ("_take_model_step", "self.optimizer.step()"),
        ("_take_model_step", "self.optimizer.overflow"),
        ("_take_model_step", "torch_autocast_z0_gradscaler"),
        ("_take_model_step", "self.clip_fp32_gradients()"),
        ("_take_model_step", "self._step_applied"),
        ("_configure_distributed_model", "self.seq_data_parallel_group"),
        ("_configure_distributed_model", "self.has_moe_layers"),
        ("communication_data_type", "self._config.communication_data_type"),
        ("_configure_checkpointing", "self.optimizer.dp_process_group"),
        ("backward", "self._backward_epilogue()"),
    ],
)
def test_the_engine_still_calls_what_we_override(method, text):
    assert text in ast.unparse(METHODS[method]), f"DeepSpeed {VERSION}: {method} no longer has {text!r}"


def test_initialize_looks_the_engine_class_up_as_a_module_global():
    assert re.search(r"engine = DeepSpeedEngine\(", inspect.getsource(deepspeed.initialize)), VERSION
    stock = deepspeed.DeepSpeedEngine
    with pytest.raises(KeyError), seam.engine_class(seam.SeamEngine):
        assert deepspeed.DeepSpeedEngine is seam.SeamEngine
        raise KeyError
    assert deepspeed.DeepSpeedEngine is stock


def test_the_throughput_timer_would_synchronize_and_does_not():
    from deepspeed.runtime.config import DeepSpeedConfig

    assert DeepSpeedConfig({"train_batch_size": 1}).timers_config.synchronized, "left out, it is on"
    timed = ast.unparse(METHODS["__init__"])
    assert timed.index("self._do_sanity_check()") < timed.index("ThroughputTimer(self._config.timers_config")
    for told, synchronized in (({}, False), ({"throughput": {"synchronized": True}}, True)):
        engine = make_engine(Toy(), ds_config(timers=told))
        assert engine.tput_timer.config.synchronized is synchronized
        engine.destroy()


@pytest.mark.parametrize(
    ("compiled", "hift", "warns"),
    [("whole", {}, True), ("wrapped", {}, True), ("later", {}, True), ("blocks", {}, False),
     ("whole", {"update": "in_backward", "group_size": "all"}, False)],
)  # fmt: skip
def test_compiling_the_whole_model_is_warned_of(compiled, hift, warns, caplog):
    """Nothing is compiled here before a forward."""
    model = Toy()
    if compiled == "whole":
        model.compile()
    elif compiled == "blocks":
        for child in model.children():
            child.compile()
    engine = make_engine(torch.compile(model) if compiled == "wrapped" else model, ds_config(hift=hift))
    if compiled == "later":
        engine.compile(backend="eager")
    found = [message for message in caplog.messages if "compile the blocks" in message]
    assert len(found) == warns
    engine.destroy()


def test_nothing_is_compiled_for_cpu_ranks():
    from deepspeed.comm.torch import build_shm_op

    before = vars(deepspeed.ops).get("__compatible_ops__")
    with nothing_compiled():
        assert build_shm_op() is None, f"DeepSpeed {VERSION} compiles its CPU operator all the same"
    assert vars(deepspeed.ops).get("__compatible_ops__") is before


def test_every_group_that_deepspeed_keeps_is_forgotten_with_its_job():
    """And those that are alive, which the caller may have made since, stay."""
    from deepspeed.runtime.sequence_parallel import parallel_state_sp

    def group() -> torch.distributed.ProcessGroup:
        return torch.distributed.new_group([0])

    def kept(module) -> set[str]:
        """Names under which ``module`` keeps groups, from its own text."""
        return set(re.findall(r"^(_[A-Z_]+_GROUP) = ", inspect.getsource(module), re.M))

    ensure_process_group()
    names = [(module, name) for module in (groups, parallel_state_sp) for name in sorted(kept(module))]
    assert (groups, "_WORLD_GROUP") in names and (parallel_state_sp, "_SEQUENCE_PARALLEL_GROUP") in names, VERSION
    found = {(module, name): getattr(module, name) for module, name in names}
    was = {where: dict(value) if isinstance(value, dict) else value for where, value in found.items()}
    assert isinstance(was[groups, "_EXPERT_PARALLEL_GROUP"], dict), VERSION
    try:
        for module, name in names:
            old = group()
            setattr(module, name, {"old": old} if isinstance(was[module, name], dict) else old)
        groups._EXPERT_PARALLEL_GROUP_RANKS["old"] = [0]
        groups.mpu, groups.mesh_device = parallel_state_sp, object()
        forget_ended_groups()
        assert groups.mpu is parallel_state_sp and all(getattr(module, name) for module, name in names)
        torch.distributed.destroy_process_group()
        ensure_process_group()
        groups._EXPERT_PARALLEL_GROUP["new"] = group()
        groups._DATA_PARALLEL_GROUP = group()
        forget_ended_groups()
        left = {name for module, name in names if getattr(module, name)}
        assert left == {"_EXPERT_PARALLEL_GROUP", "_DATA_PARALLEL_GROUP"}
        assert list(groups._EXPERT_PARALLEL_GROUP) == ["new"]
        assert not groups._EXPERT_PARALLEL_GROUP_RANKS and groups.mpu is groups.mesh_device is None
    finally:
        for (module, name), value in was.items():
            setattr(module, name, value)
        torch.distributed.destroy_process_group()


def test_our_initialize_has_stocks_parameters():
    import hift_ds

    ours, stock = (list(inspect.signature(f).parameters) for f in (hift_ds.initialize, deepspeed.initialize))
    assert ours == stock, f"DeepSpeed {VERSION}"


def test_no_other_file_uses_underscored_engine_names():
    package = Path(seam.__file__).parents[1]
    private = {n for n in dir(DeepSpeedEngine) if n.startswith("_") and not n.startswith("__")}
    nn_module = set(dir(__import__("torch").nn.Module))
    for path in package.rglob("*.py"):
        if path.name in ("deepspeed_seam.py", "deepspeed_zero3_seam.py"):
            continue
        used = set(re.findall(r"(?:self|engine|super\(\))\.(_[a-z]\w*)\(", path.read_text())) & (private - nn_module)
        defined = set(re.findall(r"def (_[a-z]\w*)\(", path.read_text()))
        assert not used - defined, f"{path.name} uses {used - defined}"


def test_defaults_of_others_that_docs_and_messages_state_as_facts(tmp_path):
    """Each was another one once, or may become one."""
    from deepspeed.runtime.config import DeepSpeedConfig
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
    from transformers import TrainingArguments

    config = DeepSpeedConfig({"train_micro_batch_size_per_gpu": 1})
    assert config.gradient_clipping == 1.0  # docs/trainer.md; ours is 0
    assert config.gradient_accumulation_steps == 1 and config.zero_optimization_stage == 0
    zero = DeepSpeedZeroConfig(stage=3)
    assert zero.max_reuse_distance == 10**9 and zero.prefetch_bucket_size == 5 * 10**7  # docs/zero3.md
    assert zero.param_persistence_threshold == 10**5 and not zero.gather_16bit_weights_on_model_save
    args = TrainingArguments(str(tmp_path), report_to=[])
    assert args.max_grad_norm == 1.0 and args.average_tokens_across_devices and args.logging_nan_inf_filter
