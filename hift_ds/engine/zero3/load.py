"""A Hugging Face folder straight into ZeRO-3's shards, for models that fit no single device or host.

No weight is ever whole in a rank's memory, but for those that transformers makes of several tensors (the experts of a
block): one rank makes them, one at a time, and sends them to the others.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from hift_ds.collectives import shard_bounds
from hift_ds.engine.zero3.exact_values import ExactValues, remember_exact_values
from hift_ds.engine.zero3.shards import (
    accelerator_device,
    allocate_shards,
    is_partitioned,
    shard_of,
)
from hift_ds.errors import ConfigError
from hift_ds.hf.safetensors_folder import SafetensorsFolder, check_weights, head_of, note_filled, stream_weights
from hift_ds.hf.weight_names import plan_load, zero_init_set_aside
from hift_ds.layers.arch import whole_shape
from hift_ds.process_group import (
    as_single_process,
    broadcast_from_first_rank,
    ensure_process_group,
    world_rank_and_size,
)

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def load_partitioned(
    folder: str | Path,
    config: dict[str, Any],
    *,
    dtype: torch.dtype | None = None,
    model_class: Any = None,
    trust_remote_code: bool = False,
    **from_config: Any,
) -> PreTrainedModel:
    """``from_pretrained`` for ``hift_ds.initialize`` with ``"zero_optimization": {"stage": 3}``.

    The shards are where ``offload_param`` wants them: on the accelerator, in host memory, or in a file. Every rank
    calls this, and reads of the files the pages that hold its own shards. When weights are rounded to 16 bits, the
    engine reads the fp32 masters from the folder as well, so that no bit is lost.

    Args:
        folder: with safetensors, one file or several with an index; the same on all ranks.
        config: DeepSpeed's, the one that ``initialize`` gets; batch sizes may not be ``"auto"``.
        dtype: of the weights; by default what ``bf16`` and ``fp16`` in ``config`` say, else fp32.
        model_class: ``AutoModelForCausalLM`` by default.
        from_config: passed on, for example ``attn_implementation``.

    Raises:
        CheckpointError: damaged files, and missing, unknown or misshapen weights.
        ConfigError: ``config`` does not partition weights.
    """
    if (config.get("zero_optimization") or {}).get("stage") != 3:
        raise ConfigError('load_partitioned: "zero_optimization.stage" must be 3; with 0, 1 or 2 use from_pretrained')
    return _load(folder, config, dtype, model_class, trust_remote_code, from_config)


def load_partitioned_with_head(
    folder: str | Path,
    config: dict[str, Any],
    *,
    model_class: Any,
    dtype: torch.dtype | None = None,
    trust_remote_code: bool = False,
    model_options: Mapping[str, Any] | None = None,
    **from_config: Any,
) -> tuple[PreTrainedModel, list[str], list[str]]:
    """Load as :func:`load_partitioned` does, for a task whose head the folder may lack: that one begins as
    ``from_pretrained`` would draw it from the global generators, whole on every rank for a moment.

    Args:
        model_class: an ``Auto...`` class of transformers.
        model_options: entries of the model's config, such as ``num_labels``.

    Returns:
        The model, the names of its new weights, the names of tensors of the folder that it does not use.

    Raises:
        CheckpointError: damaged files, or a weight below the head that is missing, unexpected or misshapen.
    """
    new: dict[str, Tensor] = {}
    unused: list[str] = []
    model = _load(folder, config, dtype, model_class, trust_remote_code, from_config, model_options, new, unused)
    return model, list(new), unused


def _load(
    folder: str | Path,
    config: dict[str, Any],
    dtype: torch.dtype | None,
    model_class: Any,
    trust_remote_code: bool,
    from_config: dict[str, Any],
    model_options: Mapping[str, Any] | None = None,
    new: dict[str, Tensor] | None = None,
    unused: list[str] | None = None,
) -> PreTrainedModel:
    """
    Args:
        new: a head may be; gets the weights of it that the folder lacks.
        unused: gets the tensors of the folder that have no place.
    """
    check_weights(folder)
    ensure_process_group()
    model = _hollow_model(
        folder, dtype or _dtype_of(config), model_class, trust_remote_code, from_config, model_options or {}
    )
    if new is not None and unused is not None:
        names, others = head_of(model, folder)
        unused += others
        new |= _on_host(model, names)
    _initialize(model, new or {})
    with as_single_process():  # DeepSpeed reads LOCAL_RANK
        allocate_shards(model, config)
    for module in model.modules():
        for name, buffer in module._buffers.items():
            module._buffers[name] = None if buffer is None else buffer.to(accelerator_device())
    _fill(model, folder, new or {}, unused or ())
    return model.eval()


def _dtype_of(config: dict[str, Any]) -> torch.dtype:
    for key, dtype in (("bf16", torch.bfloat16), ("fp16", torch.float16)):
        if (config.get(key) or {}).get("enabled") is True:
            return dtype
    return torch.float32


def _hollow_model(
    folder: str | Path,
    dtype: torch.dtype,
    model_class: Any,
    trust_remote_code: bool,
    options: dict[str, Any],
    model_options: Mapping[str, Any],
) -> PreTrainedModel:
    """Parameters on the meta device, buffers not yet with their values."""
    from accelerate import init_empty_weights
    from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig
    from transformers.initialization import no_init_weights

    auto: Any = model_class or AutoModelForCausalLM
    read = getattr(auto, "config_class", None) or AutoConfig
    model_config = read.from_pretrained(
        str(folder), trust_remote_code=trust_remote_code, local_files_only=True, **model_options
    )
    with zero_init_set_aside(), no_init_weights(), init_empty_weights(include_buffers=False):
        if hasattr(auto, "from_config"):
            model = auto.from_config(model_config, dtype=dtype, trust_remote_code=trust_remote_code, **options)
        else:
            model = auto._from_config(model_config, dtype=dtype, **options)
    model.tie_weights()  # after the block, in which every registered parameter becomes one of its own
    if model.can_generate() and (Path(folder) / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(str(folder))
    return model


def _on_host(model: PreTrainedModel, names: Collection[str]) -> dict[str, Tensor]:
    """Weights ``names`` of ``model``, which were on the meta device, with memory of their own."""
    made: dict[str, Tensor] = {}
    for name in names:
        path, _, last = name.rpartition(".")
        module = model.get_submodule(path)
        memory = torch.empty_like(module.get_parameter(last), device="cpu")
        made[name] = module._parameters[last] = torch.nn.Parameter(memory)
    return made


def _initialize(model: PreTrainedModel, new: Mapping[str, Tensor]) -> None:
    """Buffers, and the weights ``new``, by transformers' own rules."""
    drawn = {id(weight) for weight in new.values()}
    for param in model.parameters():
        setattr(param, "_is_hf_initialized", id(param) not in drawn)  # noqa: B010 (transformers' own mark)
    model.initialize_weights()


@torch.no_grad()
def _fill(model: PreTrainedModel, folder: str | Path, new: Mapping[str, Tensor], unused: Collection[str]) -> None:
    rank, _ = world_rank_and_size()
    files, targets = SafetensorsFolder(folder), model.state_dict(keep_vars=True)
    plain = _plain_sources(model, files)
    filled: dict[int, str] = {}
    for name, tensor in new.items():
        mine, here = _part_of_this_rank(targets[name], tensor)
        here.copy_(mine)
    for name, tensor in stream_weights(model, folder, convert=rank == 0, new=new, unused=unused):
        target = targets[name]
        if name not in plain:
            tensor = _from_first_rank(tensor, target.dtype)
        mine, here = _part_of_this_rank(target, tensor)
        note_filled(filled, target, name, folder, here, mine)
        here.copy_(mine)
    plain = {name: source for name, source in plain.items() if name not in new}
    remember_rounded_weights(model, files, plain, targets)


def _plain_sources(model: PreTrainedModel, files: SafetensorsFolder) -> dict[str, str]:
    """Name in memory -> name in the folder, of each weight that is saved as it is."""
    return {of.first_name: of.sources[0] for of in plan_load(model, files.headers) if of.is_plain}


def _part_of_this_rank(target: Tensor, whole: Tensor) -> tuple[Tensor, Tensor]:
    """(values, the place they belong): a shard, or all of a buffer."""
    if not is_partitioned(target):
        return whole, target
    rank, world_size = world_rank_and_size()
    start, end = shard_bounds(whole.numel(), world_size, rank)
    return whole.reshape(-1)[start:end], shard_of(target)


def _from_first_rank(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """``tensor`` of rank 0, on the accelerator; elsewhere only its shape is looked at."""
    device = accelerator_device()
    sent = torch.empty(tensor.shape, dtype=dtype, device=device) if tensor.is_meta else tensor.to(device, dtype)
    sent = sent.contiguous()
    broadcast_from_first_rank(sent)
    return sent


def remember_rounded_weights(
    model: PreTrainedModel,
    files: SafetensorsFolder,
    plain: dict[str, str] | None = None,
    targets: dict[str, Tensor] | None = None,
) -> None:
    """Let the masters of ``model``, which was loaded from the folder ``files``, have the bits of fp32 tensors that
    loading
    rounded to 16: all of them, or the few of a folder that is in bf16 otherwise."""
    if plain is None:
        plain = _plain_sources(model, files)
    targets = targets or model.state_dict(keep_vars=True)
    parameter_names = {id(param): name for name, param in model.named_parameters()}
    rounded = {
        parameter_names[id(targets[name])]: source
        for name, source in plain.items()
        if name in targets
        and id(targets[name]) in parameter_names
        and files.headers[source].dtype == torch.float32
        and targets[name].dtype != torch.float32
        and files.headers[source].shape == whole_shape(targets[name])  # else it has got more rows
    }
    if rounded:
        remember_exact_values(model, ExactValues(files, rounded))
