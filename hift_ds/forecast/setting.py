"""The question of a forecast, and how it is put: a :class:`Setting` is stepped by the real engine on a device that has
no memory, and a :class:`Result` says what was alive when.

A fake device changes the whole process that has one, so the answer comes from a process of its own
(:mod:`hift_ds.forecast.simulator`).
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn
    from transformers import PretrainedConfig

Bytes = dict[str, int]  # by category
# The blocks between the named ones. Memory is linear from one to the next, so that they are never the maximum, and they
# are left out where steps are interpolated.
BETWEEN = "blocks between"
SWITCHES = ("slice_numel", "checkpointing", "chunked_loss", "offload")  # exact ways to hold less in a step
# cuBLAS takes one from the allocator for each thread that computes on a stream (forward's and backward's), of 32 MiB on
# cards since Hopper and 8 before: assumed, not counted.
WORKSPACE_BYTES = 2 << 25
SLICE_NUMEL = 1 << 24  # what "sliced update" means unless a number is given


@dataclass(frozen=True)
class Setting:
    """What to run.

    Attributes:
        model: what :func:`hift_ds.hf.model_structure.read_config` takes: folder, size of the zoo, hub name.
        engine_config: the DeepSpeed config with its ``"hift"`` block. Batch keys are replaced.
        weight_dtype: in which the model is loaded, ``"float32"``, ``"bfloat16"`` or ``"float16"``.
        batch: sequences in a micro-batch on one rank.
        length: tokens in a sequence.
        num_blocks: build only so many blocks of each stack, for tests of many models; ``None`` for the whole model.
        groups: indices of the layer groups to train; negative ones count from the top; ``None`` for all.
        world_size: data-parallel ranks; rank 0 is counted.
        micro_batches: accumulated before an update.
        updates: with ``False`` gradients are dropped instead of used: forward and backward alone are reported.
        second_update: update each group again: the first time makes its states, later ones find them.
        padded: batches have padding, where there are several sequences: attention gets a mask, for which grouped heads
            are repeated.
        eager_attention: hold the scores, as without a fused kernel.
        on_host: count on fake host tensors, for a torch without fake devices; states at rest are then told apart.
        trust_remote_code: run the code that the checkpoint brings along.
        visits: step each group so often and report the last time. ZeRO-3 needs 3: it notes in the first what it
            prefetches from the second on, and holds that over to the next.
    """

    model: str
    engine_config: dict[str, Any]
    weight_dtype: str = "bfloat16"
    batch: int = 1
    length: int = 512
    num_blocks: int | None = None
    groups: tuple[int, ...] | None = None
    world_size: int = 1
    micro_batches: int = 1
    updates: bool = True
    second_update: bool = True
    padded: bool = False
    eager_attention: bool = False
    on_host: bool = False
    trust_remote_code: bool = False
    visits: int = 1


def with_switch(setting: Setting, switch: str, on: bool) -> Setting:
    """The setting with one of ``SWITCHES`` on or off."""
    if switch == "slice_numel":
        return with_hift(setting, "state", {"slice_numel": SLICE_NUMEL if on else None})
    changed: dict[str, Any] = {switch: on}
    if switch == "checkpointing" and not on:
        changed["blocks_kept"] = 0
    return with_hift(setting, "activations", changed)


def is_on(setting: Setting, switch: str) -> bool:
    """True if the setting has that one of ``SWITCHES`` on."""
    block = setting.engine_config["hift"]
    where = "state" if switch == "slice_numel" else "activations"
    return bool((block.get(where) or {}).get(switch))


def with_hift(setting: Setting, section: str, changes: dict[str, Any]) -> Setting:
    """The setting with ``changes`` in one section of its ``"hift"`` block."""
    block = setting.engine_config["hift"]
    block = {**block, section: {**(block.get(section) or {}), **changes}}
    return replace(setting, engine_config={**setting.engine_config, "hift": block})


@dataclass
class GroupStep:
    """The step of one layer group, on rank 0.

    Attributes:
        places: what was alive at the peak of each stretch of the step, bytes on the device by category. A place is
            "phase:where", such as "backward:active block".
        flops: of matrix products, by phase.
        state_bytes: master and optimizer states of the group, at rest.
        offloaded_bytes: host memory that the step took for a while, in the powers of two that are page-locked for it.
        numel_gathered: elements of partitioned weights that forward and backward gathered (ZeRO-3).
    """

    index: int
    name: str
    numel: int
    places: dict[str, Bytes]
    flops: dict[str, int]
    state_bytes: int
    offloaded_bytes: int
    numel_gathered: int = 0

    @property
    def phases(self) -> dict[str, int]:
        """The peak of "forward", "backward" and "update"."""
        peaks: dict[str, int] = {}
        for place, categories in self.places.items():
            phase = place.partition(":")[0]
            peaks[phase] = max(peaks.get(phase, 0), sum(categories.values()))
        return peaks

    @property
    def peak_place(self) -> str:
        """Where the highest peak is."""
        return max(self.places, key=lambda place: sum(self.places[place].values()))

    @property
    def categories(self) -> Bytes:
        """What was alive at the highest peak."""
        return self.places[self.peak_place]

    @property
    def peak_bytes(self) -> int:
        """Bytes allocated at the highest peak."""
        return sum(self.categories.values())


@dataclass
class Result:
    """What a :class:`Setting` led to.

    Attributes:
        weight_bytes: parameters and buffers on the device.
        numel: parameters of the model, tied ones once.
        steps: of the groups that the setting names.
    """

    weight_bytes: int
    numel: int
    steps: list[GroupStep] = field(default_factory=list)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Result:
        """The result that a worker has sent as JSON."""
        return cls(**{**data, "steps": [GroupStep(**step) for step in data["steps"]]})


def torch_has_fake_devices() -> bool:
    """Whether this torch lets Python be a backend, as 2.8 and later do."""
    import torch
    from torch.utils import backend_registration

    in_python = hasattr(backend_registration, "_setup_privateuseone_for_python_backend")
    return in_python and hasattr(torch._C, "_acc")  # what it needs in C++


def deepspeed_config(setting: Setting) -> dict[str, Any]:
    """The DeepSpeed config with the setting's batch, and the optimizer's kernel that is the default on a GPU: on a
    device that it does not know torch would take one that copies."""
    block = setting.engine_config["optimizer"]
    params = dict(block.get("params") or {})
    plain = block["type"].lower() in ("adam", "adamw", "sgd")
    if plain and not params.keys() & {"fused", "foreach", "differentiable"}:
        params["fused"] = True
    return {
        **{k: v for k, v in setting.engine_config.items() if k != "train_batch_size"},
        "train_micro_batch_size_per_gpu": setting.batch,
        "gradient_accumulation_steps": setting.micro_batches,
        "optimizer": {**block, "params": params},
    }


def model_config(setting: Setting) -> PretrainedConfig:
    """The config of the setting's model, with the attention that the setting wants."""
    from hift_ds.hf.model_structure import read_config

    config = read_config(setting.model, trust_remote_code=setting.trust_remote_code)
    if setting.eager_attention:
        config._attn_implementation = "eager"
    return config


def make_batch(
    model: nn.Module, batch: int, length: int, device: str | torch.device, padded: bool = False
) -> dict[str, Tensor]:
    """Tokens and the labels that the model's head wants, int64, all zero, (batch, length); one label a sequence, of
    shape (batch,), for heads that classify or answer. With ``padded`` and several sequences the last token of the first
    is padding."""
    import torch

    if padded and batch > 1:
        mask = torch.ones(batch, length, dtype=torch.long, device=device)
        mask[0, -1] = 0
        return {**make_batch(model, batch, length, device), "attention_mask": mask}
    tokens = torch.zeros(batch, length, dtype=torch.long, device=device)
    one_each = torch.zeros(batch, dtype=torch.long, device=device)
    kind = type(model).__name__
    if kind.endswith("ForSequenceClassification"):
        return {"input_ids": tokens, "labels": one_each}
    if kind.endswith("ForQuestionAnswering"):
        return {"input_ids": tokens, "start_positions": one_each, "end_positions": one_each}
    return {"input_ids": tokens, "labels": tokens}
