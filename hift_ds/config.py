"""The ``"hift"`` block of a DeepSpeed JSON: declared once, closed, checked where it is declared.

``fp16``, ``bf16``, ``torch_autocast``, ``gradient_clipping``, ``gradient_accumulation_steps``, ``optimizer``,
``scheduler`` and ``zero_optimization`` beside it keep their DeepSpeed meaning.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from copy import deepcopy
from pathlib import Path
from typing import Any, Literal

import hjson
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from hift_ds.dtypes import Dtype
from hift_ds.errors import ConfigError, keys_once, unknown_key

BLOCK = "hift"


CODECS = ("fp32", "split_master", "bf16_moments", "int8_moments")


class StateConfig(BaseModel):
    """Where masters and optimizer states live, in which form, where the update runs. See docs/states.md."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    residency: Literal["host", "device", "disk", "auto"] = "host"
    """``host``: off the accelerator, fetched for the update. ``device``: never moved; the fast baseline.
    ``disk``: in files under ``path``. ``auto``: the first of device, host and disk that has the room; the log
    says why."""
    path: str | None = None
    """Folder for ``disk``, on a local disk; every process makes its own in it and removes it at the end."""
    io: Literal["auto", "direct", "buffered"] = "auto"
    """``disk``: past the page cache (``direct``) or through it; ``auto`` measures."""
    step_on: Literal["device", "host", "split"] = "device"
    """``device``: states come up, the accelerator updates. ``host``: gradients go down, weights come up. ``split``:
    some embeddings, blocks, heads (or slices) here and some there, side by side."""
    host_share: float | None = Field(default=None, ge=0, le=1)
    """With ``split``: of the parameters, how many the host updates. ``null``: the share that is fastest, by measured
    speeds; a checkpoint keeps it."""
    prefetch: bool = True
    """Move states while the model computes: needs ``slots`` times the largest group's states on the update
    device all the time. ``false``: they are there for the update only, and every move is waited for."""
    slots: int | None = Field(default=None, ge=1)
    """Groups (with ``slice_numel``: slices) that have room on the update device: with 2, one leaves while the next
    arrives; slices are fetched ahead as far as there are slots, and the others are waited for. ``null``: 1, and
    with the Trainer on an accelerator more as soon as the forecast says how much memory is left."""
    codec: tuple[str, ...] = ()
    """Compact forms, one or several of ``split_master`` (lossless), ``bf16_moments`` or ``int8_moments``; none,
    or ``fp32``: everything as it is. A string may name several: ``"split_master+int8_moments"``."""
    pin_memory: bool = True
    """Page-locked host buffers: needed for copies that overlap with compute. Nothing without an accelerator."""
    slice_numel: int | None = Field(default=None, ge=1)
    """Update at most this many elements at once, so that a large group's master and states need not be on the device
    together. ``null``: the whole group."""

    @field_validator("codec", mode="before")
    @classmethod
    def _several(cls, value: Any) -> Any:
        names = value.replace("+", ",").split(",") if isinstance(value, str) else value
        if not isinstance(names, list | tuple) or not all(isinstance(name, str) for name in names):
            raise ValueError(f"state.codec: a name or names expected ({', '.join(CODECS)}), got {value!r}")
        for name in names:
            if name not in CODECS:
                raise ValueError(str(unknown_key(name, CODECS, "state.codec")))
        if {"bf16_moments", "int8_moments"} <= set(names):
            raise ValueError("state.codec: bf16_moments and int8_moments are two forms of the same; give one")
        return tuple(dict.fromkeys(name for name in names if name != "fp32"))

    @model_validator(mode="after")
    def _agree(self) -> StateConfig:
        if self.residency == "disk" and not self.path:
            raise ValueError('state.path: residency "disk" needs a folder for its files, none given')
        if self.step_on == "split" and self.residency not in ("host", "device"):
            raise ValueError(
                f'state.step_on: "split" needs residency "host" or "device", got "{self.residency}"; states that the '
                "host updates rest in its memory"
            )
        if self.host_share is not None and self.step_on != "split":
            raise ValueError(f'state.host_share: {self.host_share} has no effect without step_on: "split"; remove it')
        if self.path and self.residency not in ("disk", "auto"):
            given = f'state.path: {self.path!r} has no effect with residency "{self.residency}"'
            raise ValueError(f'{given}; use "disk" or "auto"')
        return self

    @property
    def first_slots(self) -> int:
        """The number of slots that a run starts with; 0 without prefetch."""
        return (self.slots or 1) if self.prefetch else 0


class ActivationsConfig(BaseModel):
    """Less memory for activations, at the same loss and gradients. See docs/memory.md."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    checkpointing: bool = False
    """Recompute blocks in backward instead of keeping their activations; only those at and above the active group,
    since below it nothing is kept anyway."""
    blocks_kept: int = Field(default=0, ge=0)
    """With ``checkpointing``: keep the activations of so many blocks all the same, the topmost ones. A group with no
    more blocks than that at and above it recomputes nothing."""
    chunked_loss: bool = False
    """Logits and their loss a few hundred tokens at a time, so that the whole fp32 logits never exist."""
    offload: bool = False
    """Keep what backward needs in host memory (TRL's offloading). No effect without an accelerator."""

    @model_validator(mode="after")
    def _agree(self) -> ActivationsConfig:
        if self.blocks_kept and not self.checkpointing:
            raise ValueError(f"activations.blocks_kept: {self.blocks_kept} has no effect without checkpointing: true")
        return self


class CheckpointConfig(BaseModel):
    """How checkpoints are saved. See docs/checkpoints.md."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    asynchronous: bool = False
    """Training goes on while a snapshot is written: two groups' states and weights in host memory at most."""
    on_error: Literal["raise", "continue"] = "raise"
    """``continue``: a checkpoint that cannot be written (a full disk) is reported, and training goes on."""


class HiFTConfig(BaseModel):
    """All keys of the block, with their defaults."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    group_size: int | Literal["all", "auto"] = 1
    """m: consecutive layers trained together; k = ceil(n / m) groups, the last one ragged. ``all``: one group, full
    fine-tuning. ``auto``, with ``update: in_backward``: as many as the link to their states hides."""
    tokens_per_step: int | None = Field(default=None, ge=1)
    """For ``group_size: auto``: input tokens of an optimizer step on one rank, all micro-batches together. ``null``:
    those of the first forward, times the micro-batches of a step."""
    update: Literal["after_backward", "in_backward"] = "after_backward"
    """``in_backward``: each embedding, block and head of the active group is updated as soon as its gradients are
    complete, while backward goes on below. See docs/update_in_backward.md."""
    clipping: Literal["exact", "speculative", "last_visit", "per_part"] = "exact"
    """With ``update: in_backward``, what ``gradient_clipping`` compares: the norm of the group (``exact``), which is
    known when backward has ended, so that updates begin then; the same norm, with updates in backward as if nothing
    were clipped, taken back and made again where it says otherwise (``speculative``: the same bits, and a second copy
    of the group's states meanwhile); the norm of the group at its last visit; or the norm of each embedding, block and
    head by itself."""
    order: Literal["bottom2up", "top2down", "random"] = "bottom2up"
    reshuffle: bool = False
    """With ``order: random``: a new order for every cycle."""
    seed: int = 0
    """The seed of random orders and of stochastic rounding."""
    steps_per_group: int = Field(default=1, ge=1)
    """Optimizer steps one group gets in a turn (BAdam's K)."""
    groups: list[list[str]] | None = None
    """Instead of groups by structure: bottom to top, lists of regular expressions searched in parameter names."""
    always_active: list[str] = []
    """Regular expressions of parameters trained in every turn (LISA's embedding and head)."""
    lr_update: Literal["cycle", "step", "reference"] = "cycle"
    master_weights: bool = True
    """Keep an fp32 master of every bf16/fp16 weight, on the device for the active group only."""
    stochastic_rounding: bool = False
    """Without masters: round the updated weight to bf16 stochastically, so that small updates are not lost."""
    state: StateConfig = StateConfig()
    activations: ActivationsConfig = ActivationsConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()

    @field_validator("group_size", mode="before")
    @classmethod
    def _count_or_all(cls, value: Any) -> Any:
        number = int(value) if isinstance(value, str) and value.isdigit() else value
        words = number in ("all", "auto")
        if not words and (isinstance(number, bool) or not isinstance(number, int) or number < 1):
            expected = 'a whole number of at least 1, "all" or "auto"'
            raise ValueError(f"hift.group_size: expected {expected}, got {value!r}")
        return number

    @model_validator(mode="after")
    def _agree(self) -> HiFTConfig:
        if self.clipping != "exact" and self.update != "in_backward":
            raise ValueError(
                f'clipping: "{self.clipping}" needs update: "in_backward"; after backward the exact norm is known'
            )
        if self.group_size == "auto" and self.update != "in_backward":
            raise ValueError(
                'group_size: "auto" needs update: "in_backward"; after backward memory limits the size of a group: '
                "give a number"
            )
        if self.tokens_per_step is not None and self.group_size != "auto":
            raise ValueError(
                f'tokens_per_step: {self.tokens_per_step} has no effect without group_size: "auto"; remove it'
            )
        if self.reshuffle and self.order != "random":
            raise ValueError(f"reshuffle: true needs order: random, got order: {self.order}")
        if self.stochastic_rounding and self.master_weights:
            raise ValueError(
                "stochastic_rounding: true needs master_weights: false (an fp32 master rounds nothing away)"
            )
        if self.groups is not None and self.group_size != 1:
            raise ValueError(
                f"groups and group_size: {self.group_size} both given; explicit groups have no size: remove one"
            )
        return self

    @property
    def first_group_size(self) -> int | str:
        """The group size that a run starts with: one layer where the size is still to be found."""
        return 1 if self.group_size == "auto" else self.group_size


class ParsedBlock(dict[str, Any]):
    """The block of a config as it was written, with what it was parsed to: on its way through DeepSpeed and accelerate
    whoever looks into the config finds JSON, and :func:`parse_block` the values. What is changed on the way is parsed
    anew. A deep copy is the same; pickled it is a plain dict, which needs no module of ours.

    Args:
        content: what a dict is made of.
        hift: the values; ``None``: not known.
    """

    def __init__(self, content: Any, hift: HiFTConfig | None = None) -> None:
        super().__init__(content)
        self._parsed = deepcopy(dict(self)), hift

    @property
    def hift(self) -> HiFTConfig | None:
        """The values, unless the content is not theirs any more."""
        written, hift = self._parsed
        return hift if self == written else None

    def __deepcopy__(self, memo: dict[int, Any]) -> ParsedBlock:
        return ParsedBlock(deepcopy(dict(self), memo), self.hift)

    def __reduce__(self) -> tuple[type[dict[str, Any]], tuple[dict[str, Any]]]:
        return dict, (dict(self),)


def parsed(block: Any) -> ParsedBlock:
    """The block together with its values.

    Raises:
        ConfigError: as :func:`parse_block`.
    """
    hift = parse_block(block)
    return ParsedBlock(block if isinstance(block, Mapping) else hift.model_dump(mode="json"), hift)


def parse_block(block: Any) -> HiFTConfig:
    """The validated block.

    Raises:
        ConfigError: one line that names the key, what was given and what was expected.
    """
    if isinstance(block, HiFTConfig):
        return block
    if isinstance(block, ParsedBlock) and block.hift is not None:
        return block.hift
    if not isinstance(block, Mapping):
        raise ConfigError(f'"{BLOCK}": expected an object with keys such as "group_size", got {block!r}')
    try:
        return HiFTConfig(**block)
    except ValidationError as error:
        raise _one_line(error) from None


def _one_line(error: ValidationError) -> ConfigError:
    first = error.errors()[0]
    path = [BLOCK, *(str(part) for part in first["loc"])]
    if first["type"] == "extra_forbidden":
        blocks: dict[str, type[BaseModel]] = {
            "state": StateConfig, "activations": ActivationsConfig, "checkpoint": CheckpointConfig,
        }  # fmt: skip
        model = blocks.get(".".join(path[1:-1]), HiFTConfig)
        return unknown_key(path[-1], model.model_fields, '"' + ".".join(path[:-1]) + '"')
    message = first["msg"].removeprefix("Value error, ")
    if first["type"] == "value_error":
        return ConfigError(f'"{BLOCK}": {message}')
    return ConfigError(f'"{".".join(path)}": {message[0].lower() + message[1:]}; got {first["input"]!r}')


def check_against_deepspeed(hift: HiFTConfig, ds: Mapping[str, Any]) -> None:
    """Refuse DeepSpeed settings that contradict the block, or that HiFT cannot honour, by name.

    Raises:
        ConfigError: the first contradiction found.
    """
    zero = ds.get("zero_optimization") or {}
    if _enabled(ds, "hybrid_engine"):
        raise ConfigError(
            '"hybrid_engine.enabled": the hybrid engine is not supported with a "hift" block; remove one of them'
        )
    if ds.get("pipeline") and "stages" in ds["pipeline"]:
        raise ConfigError(
            '"pipeline.stages": pipeline parallelism is not supported with a "hift" block; remove one of them'
        )
    if zero.get("offload_optimizer") and _device(zero["offload_optimizer"]) != "none":
        raise ConfigError(
            '"zero_optimization.offload_optimizer": the "hift" block decides where state lives; remove it and use '
            '"hift": {"state": {"residency": "host", "step_on": "host"}}'
        )
    _check_weights(zero)
    if zero.get("stage", 0) == 3 and hift.activations.offload:
        raise ConfigError(
            '"hift.activations.offload": true is not supported with "zero_optimization.stage": 3, which keeps '
            "references to weights in its place; remove it and use checkpointing"
        )
    if ds.get("managed_gradient_accumulation") is False:
        raise ConfigError('"managed_gradient_accumulation": false is not supported with a "hift" block; remove it')
    if (ds.get("tensor_parallel") or {}).get("autotp_size", 0) > 1:
        raise ConfigError(
            '"tensor_parallel.autotp_size": tensor parallelism is not supported with a "hift" block; remove it'
        )
    for key in ("amp", "zenflow", "compression_training"):
        if _enabled(ds, key) or (key == "compression_training" and ds.get(key)):
            raise ConfigError(f'"{key}": not supported with a "hift" block; remove one of them')
    if ds.get("sparse_gradients"):
        raise ConfigError('"sparse_gradients": true is not supported with a "hift" block; remove it')
    _check_precision(hift, ds)


def sum_dtype(ds: Mapping[str, Any]) -> Dtype:
    """The dtype in which gradients of several micro-batches are summed, where we sum them: DeepSpeed's
    ``"data_types": {"grad_accum_dtype": ...}``, or fp32.

    Raises:
        ConfigError: it is neither fp32 nor bf16.
    """
    name: Any = (ds.get("data_types") or {}).get("grad_accum_dtype") or "fp32"
    if name not in ("fp32", "bf16"):
        raise ConfigError(f'"data_types.grad_accum_dtype": expected fp32 or bf16, got {name!r}')
    return name


def refuse_auto(ds: Mapping[str, Any]) -> None:
    """Name what is left of the ``"auto"`` values that the Trainer and accelerate fill in. DeepSpeed would stop at some
    with an error of its own, and take its default for others.

    Raises:
        ConfigError: there is one outside of the ``"hift"`` block.
    """

    def found(block: Mapping[str, Any], prefix: str) -> Iterator[str]:
        for key, value in block.items():
            if isinstance(value, Mapping) and prefix + key != BLOCK:
                yield from found(value, f"{prefix}{key}.")
            elif value == "auto":
                yield f'"{prefix}{key}"'

    if names := list(found(ds, "")):
        raise ConfigError(
            f'"auto" is filled in by the Trainer, and hift_ds.initialize needs a value (or remove the key): '
            f"{', '.join(names)}"
        )


def _check_weights(zero: Mapping[str, Any]) -> None:
    """Settings of partitioned weights."""
    if zero.get("offload_param") and _device(zero["offload_param"]) != "none" and zero.get("stage", 0) != 3:
        raise ConfigError('"zero_optimization.offload_param": needs "stage": 3; set it, or remove offload_param')
    device = _device(zero.get("offload_param"))
    if device not in ("none", "cpu", "nvme"):
        raise ConfigError(f'"zero_optimization.offload_param.device": expected cpu, nvme or none, got {device!r}')
    if device == "nvme" and not zero["offload_param"].get("nvme_path"):
        raise ConfigError(
            '"zero_optimization.offload_param.nvme_path": "device": "nvme" needs a folder for the weights, none given'
        )
    for key in ("zero_quantized_weights", "zero_quantized_nontrainable_weights", "zero_quantized_gradients"):
        if zero.get(key):
            raise ConfigError(f'"zero_optimization.{key}": true is not supported with a "hift" block; remove it')
    for key in ("zero_hpz_partition_size", "mics_shard_size"):
        if (zero.get(key) or 0) > 1:  # their second copies of the weights would go stale
            raise ConfigError(f'"zero_optimization.{key}": {zero[key]} is not supported with a "hift" block; remove it')


def _check_precision(hift: HiFTConfig, ds: Mapping[str, Any]) -> None:
    bf16, fp16, autocast = _enabled(ds, "bf16"), _enabled(ds, "fp16"), _enabled(ds, "torch_autocast")
    if bf16 and fp16:
        raise ConfigError('"bf16.enabled" and "fp16.enabled" are both true; choose one')
    if autocast and (bf16 or fp16):
        name = "bf16" if bf16 else "fp16"
        raise ConfigError(
            f'"torch_autocast.enabled" keeps fp32 weights, "{name}.enabled" casts them; choose one of the two'
        )
    if "split_master" in hift.state.codec and (fp16 or not hift.master_weights):
        given = '"fp16.enabled": true' if fp16 else '"hift.master_weights": false'
        raise ConfigError(
            f'"hift.state.codec": split_master needs bf16 weights with fp32 masters; remove it, or {given}'
        )
    if hift.update == "in_backward" and fp16 and ds["fp16"].get("loss_scale", 0) != 1:
        raise ConfigError(
            '"hift.update": in_backward is not supported with the loss scale of fp16, since an overflow could not be '
            'taken back; use bf16, or "update": "after_backward"'
        )
    if not hift.master_weights and fp16:
        raise ConfigError('"hift.master_weights": false with fp16 loses small updates; use bf16 or keep masters')
    if hift.stochastic_rounding and not bf16:
        raise ConfigError('"hift.stochastic_rounding": true rounds to bf16 weights; set "bf16": {"enabled": true}')


def _enabled(ds: Mapping[str, Any], key: str) -> bool:
    block = ds.get(key)
    return bool(isinstance(block, Mapping) and block.get("enabled") is True)


def _device(offload: Any) -> str:
    return str(offload.get("device", "cpu")) if isinstance(offload, Mapping) else "none"


def read_json_file(file: Path) -> Any:
    """The contents of a DeepSpeed JSON, which may have what DeepSpeed reads too: comments, and commas at ends of
    lists; and a byte-order mark, as some editors put it.

    Raises:
        ConfigError: it is no JSON, or has a key twice.
    """
    try:
        return hjson.loads(file.read_text(encoding="utf-8"), object_pairs_hook=keys_once)  # which skips the mark
    except ValueError as error:
        raise ConfigError(f"{file}: not valid JSON: {error}") from None
