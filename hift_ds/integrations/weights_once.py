"""The weights of a Trainer's checkpoint, once on disk.

``checkpoint-N`` has them for ``from_pretrained``, and the engine's folder inside it has them for going on. Where both
would be the same tensors under the same names, the engine's file gets a second name (a hard link) and the Trainer
writes none.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from transformers import PreTrainedModel, Trainer

from hift_ds.checkpoint.files import ALIGNMENT, second_name
from hift_ds.checkpoint.manifest import latest_tag
from hift_ds.checkpoint.write_plan import saved_tensors
from hift_ds.checkpoint.writer import WEIGHTS_FILE
from hift_ds.hf.weight_names import plan_names
from hift_ds.layers.arch import whole_shape


def has_the_form_of_a_checkpoint(model: Any) -> bool:
    """Whether ``save_pretrained`` would write the tensors that the engine writes, under the same names and unchanged.

    Not so for models that transformers renames or converts (Mixtral's experts), for adapters, and for tensors of odd
    sizes, between which the engine's file has fillers that ``from_pretrained`` would wonder about.
    """
    if not isinstance(model, PreTrainedModel) or getattr(model, "_hf_peft_config_loaded", False):
        return False
    plan, tensors = plan_names(model), saved_tensors(model)
    return (
        not plan.sets
        and set(plan.saved) == set(tensors)
        and all(name == saved for name, saved in plan.renamed.items())
        and all(math.prod(whole_shape(one)) * one.element_size() % ALIGNMENT == 0 for one in tensors.values())
    )


def name_beside(checkpoint: Path) -> None:
    """Give the weights of the engine's checkpoint a second name, in its parent folder, where ``from_pretrained`` looks
    for them. For a caller who knows that they :func:`have the form <has_the_form_of_a_checkpoint>` that it reads."""
    second_name(checkpoint / WEIGHTS_FILE, checkpoint.parent / WEIGHTS_FILE)


def keep_once(checkpoint: Path) -> bool:
    """Give the engine's file of weights the name of the one that a Trainer has written beside it, if both hold the same
    tensors; for a Trainer whose saving is not ours. By one process, when both are written.

    Args:
        checkpoint: a ``checkpoint-N``.

    Returns:
        Whether the two are the same now. Not where the Trainer writes several files or other tensors, nor while an
        asynchronous save is under way.
    """
    tag, theirs = latest_tag(checkpoint), checkpoint / WEIGHTS_FILE
    if tag is None or not (ours := checkpoint / tag / WEIGHTS_FILE).is_file() or not theirs.is_file():
        return False
    if not theirs.samefile(ours) and not _same_tensors(ours, theirs):
        return False
    if not theirs.samefile(ours):
        second_name(ours, theirs)
    return True


def _same_tensors(a: Path, b: Path) -> bool:
    """Names, dtypes, shapes and bits; one tensor of each in memory at a time."""
    with safe_open(a, "pt") as left, safe_open(b, "pt") as right:
        names = sorted(left.keys())
        return names == sorted(right.keys()) and all(
            _same_bits(left.get_tensor(name), right.get_tensor(name)) for name in names
        )


def _same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether contiguous tensors have the same bits, a NaN's included."""
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    return torch.equal(a.reshape(-1).view(torch.uint8), b.reshape(-1).view(torch.uint8))


class WeightsOnce:
    """Mixin before a Trainer class."""

    _engine_has_weights = False

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        engine = self.engine
        shared = (
            _internal_call
            and engine is not None
            and not self.args.save_only_model  # else the engine writes nothing
            and getattr(super()._save, "__func__", None) is Trainer._save  # a trainer that writes more, writes all
            and has_the_form_of_a_checkpoint(self.model)
        )
        if engine is not None:
            engine.checkpointer.on_whole = name_beside if shared else None
        self._engine_has_weights = shared
        try:
            super().save_model(output_dir, _internal_call)
        finally:
            self._engine_has_weights = False

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        if self._engine_has_weights:
            state_dict = {}
        elif not has_save_pretrained(self.model):
            state_dict = _separate(self.model.state_dict() if state_dict is None else state_dict)
        super()._save(output_dir, state_dict=state_dict)


def has_save_pretrained(model: Any) -> bool:
    """Whether the Trainer leaves the writing of weights to the model's class; else it writes its ``state_dict``."""
    model = getattr(model, "_orig_mod", model)  # of torch.compile
    return isinstance(model, PreTrainedModel) or bool(getattr(model, "peft_config", None))


def _separate(state: Mapping[str, Any]) -> dict[str, Any]:
    """The same tensors as safetensors takes them: contiguous, and each with memory of its own. Tied weights have all
    their names, which ``load_state_dict`` asks for."""
    seen: set[int] = set()
    found = {}
    for name, value in state.items():
        if isinstance(value, torch.Tensor) and value.numel():
            memory = value.untyped_storage().data_ptr()
            value = value.clone() if memory in seen else value
            seen.add(memory)
        found[name] = value.contiguous() if isinstance(value, torch.Tensor) else value
    return found
