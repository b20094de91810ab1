"""Parameter names in memory <-> tensor names in a Hugging Face checkpoint.

transformers 5 does not keep every weight in the form in which checkpoints have it: Mixtral's experts, many
files' worth of ``block_sparse_moe.experts.3.w1.weight``, are one fused ``mlp.experts.gate_up_proj`` in
memory. Other programs (vLLM, llama.cpp's converter, older transformers) know only the checkpoint's names, so
whatever is written has to be turned back. transformers owns that knowledge (``core_model_loading``); this
module asks it, once and on meta tensors, *which* weights must be at hand together, so that loading and
exporting can go on one such set at a time and never need the whole model in host memory.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from hift_ds.errors import CheckpointError

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

# "model.layers.3." of "model.layers.3.mlp.experts.down_proj": no conversion of transformers crosses a block.
_BLOCK_PREFIX = re.compile(r"^(?:[^.]+\.)*?\d+\.")


@dataclass(frozen=True)
class NamePlan:
    """How a model's weights are named in a checkpoint.

    Attributes:
        canonical: name in memory -> the names under which that tensor is saved, in memory's naming. Empty for
            a tied alias that transformers restores by itself, and for weights it never saves.
        renamed: name in memory -> name in the checkpoint, for weights that are saved as they are.
        sets: names in memory that have to be converted together.
        saved: name in the checkpoint -> shape.
        outputs: first name of a set -> the names in the checkpoint that it becomes.
    """

    canonical: dict[str, tuple[str, ...]]
    renamed: dict[str, str]
    sets: tuple[tuple[str, ...], ...]
    saved: dict[str, torch.Size]
    outputs: dict[str, tuple[str, ...]] = field(default_factory=dict)

    def saved_names(self, name: str) -> tuple[str, ...]:
        """Names in the checkpoint of what the parameter ``name`` becomes.

        The outputs of a conversion that needs several parameters are all given to the first of them.
        """
        out: list[str] = []
        for target in self.canonical.get(name, ()):
            out += [self.renamed[target]] if target in self.renamed else self.outputs.get(target, ())
        return tuple(out)


@contextmanager
def zero_init_set_aside() -> Iterator[None]:
    """Inside this block transformers does not enter ``deepspeed.zero.Init`` when it builds a model, as it does under a
    Trainer's ZeRO-3 config, also for one inside another: on one rank alone that would never end."""
    # Without it there is no such config.
    integration: Any = sys.modules.get("transformers.integrations.deepspeed")
    if integration is None:
        yield
        return
    reference = integration._hf_deepspeed_config_weak_ref
    integration.unset_hf_deepspeed_config()
    try:
        yield
    finally:
        integration._hf_deepspeed_config_weak_ref = reference


def skeleton(config: PreTrainedConfig, like: PreTrainedModel | None = None) -> PreTrainedModel:
    """The model of ``config`` on the meta device: names, shapes, ties and conversions, no memory.

    Args:
        config: as read from the checkpoint; its ``architectures`` names the class.
        like: take the class from this model and the conversions it was loaded with. Needed when the
            parameters of the live model are partitioned (ZeRO-3), hence have no shape of their own.

    Raises:
        CheckpointError: the config names no class that transformers has.
    """
    import transformers

    model_class: type[PreTrainedModel]
    if like is not None:
        model_class = type(like)
    else:
        names = config.architectures or []
        named = getattr(transformers, names[0], None) if names else None
        if named is None:
            raise CheckpointError(
                f"config: architectures is {names}, expected the name of a transformers model class "
                "such as ['LlamaForCausalLM']"
            )
        model_class = named
    with zero_init_set_aside(), torch.device("meta"):
        model = model_class(deepcopy(config))
    model.tie_weights()  # the constructor does it from transformers 5.1 on
    if like is not None and hasattr(like, "_weight_conversions"):
        model._weight_conversions = like._weight_conversions
    return model


def plan_names(model: PreTrainedModel) -> NamePlan:
    """Work out, without touching data, how ``model``'s weights are named in a checkpoint.

    Args:
        model: on any device, meta included. Parameters must have their full shapes.
    """
    canonical = _canonical_names(model)
    meta = {
        name: torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")
        for name, tensor in model.state_dict(keep_vars=True).items()
        if name in {target for targets in canonical.values() for target in targets}
    }
    outputs = _revert(model, meta)
    unchanged = {id(tensor): saved for saved, tensor in outputs.items()}
    renamed = {name: unchanged[id(tensor)] for name, tensor in meta.items() if id(tensor) in unchanged}
    converted = {name: tensor for name, tensor in meta.items() if name not in renamed}
    expected = {k: v.shape for k, v in outputs.items() if k not in set(renamed.values())}
    sets = _conversion_sets(model, converted, expected)
    return NamePlan(
        canonical=canonical,
        renamed=renamed,
        sets=tuple(sets),
        saved={name: tensor.shape for name, tensor in outputs.items()},
        outputs={names[0]: saved for names, saved in sets.items()},
    )


def to_saved(
    model: PreTrainedModel, tensors: Iterable[tuple[str, torch.Tensor]], plan: NamePlan | None = None
) -> Iterator[tuple[str, torch.Tensor]]:
    """Turn (name in memory, tensor) into (name in the checkpoint, tensor), holding back one conversion set at
    most.

    Args:
        tensors: every weight of ``model`` once, in any order and under any of its tied names. A tensor must
            keep its values until the sets it belongs to are complete.

    Raises:
        CheckpointError: a name the model does not have, or (at the end) weights that never came.
    """
    plan = plan or plan_names(model)
    set_of = {name: names for names in plan.sets for name in names}
    waiting: dict[tuple[str, ...], dict[str, torch.Tensor]] = {}
    missing = set(plan.renamed) | set(set_of)
    for name, tensor in tensors:
        if name not in plan.canonical:
            raise CheckpointError(f"weight {name!r}: {type(model).__name__} has no parameter of that name")
        for target in plan.canonical[name]:
            if target not in missing:
                continue  # a tied weight that already came under another of its names
            missing.remove(target)
            if target in plan.renamed:
                yield plan.renamed[target], tensor
                continue
            names = set_of[target]
            waiting.setdefault(names, {})[target] = tensor
            if len(waiting[names]) == len(names):
                yield from _revert(model, waiting.pop(names)).items()
    if missing:
        raise CheckpointError(
            f"{len(missing)} weights of {type(model).__name__} were not given, the first is {min(missing)!r}"
        )


class ConversionSet:
    """Checkpoint tensors that become one set of in-memory weights; see :func:`plan_load`."""

    def __init__(self, first_name: str, sources: list[str], patterns: list[str], converter: Any | None) -> None:
        self.first_name = first_name
        self.sources = sources
        self._patterns = patterns
        self._converter = converter

    @property
    def is_plain(self) -> bool:
        """True if it is one tensor of the checkpoint, as it is."""
        return self._converter is None

    def convert(self, model: PreTrainedModel, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Make the weights, by name in memory, of ``tensors``: the :attr:`sources`, by name in the checkpoint."""
        if self._converter is None:
            return {self.first_name: tensors[self.sources[0]]}
        converter = deepcopy(self._converter)
        for source, pattern in zip(self.sources, self._patterns, strict=True):
            converter.add_tensor(self.first_name, source, pattern, tensors[source])
        out = converter.convert(self.first_name, model=model, config=model.config)
        out = out[0] if isinstance(out, tuple) else out  # transformers 5.0 gives (weights, errors)
        return {name: value[0] if isinstance(value, list) else value for name, value in out.items()}


def plan_load(model: PreTrainedModel, checkpoint_names: Iterable[str]) -> list[ConversionSet]:
    """Which checkpoint tensors make which weights of ``model``, from names alone.

    The sets come in the natural order of the checkpoint's names. Tensors the model has no place for come as
    sets whose ``first_name`` is not among the model's names.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import (
        WeightConverter,
        WeightRenaming,
        dot_natural_key,
        rename_source_key,
    )

    transforms = get_model_conversion_mapping(model)
    renamings = [t for t in transforms if isinstance(t, WeightRenaming)]
    converters = [t for t in transforms if isinstance(t, WeightConverter)]
    by_pattern = {pattern: c for c in converters for pattern in c.source_patterns}
    here = model.state_dict(keep_vars=True)
    sets: dict[str, ConversionSet] = {}
    for source in sorted(checkpoint_names, key=dot_natural_key):
        target, pattern = rename_source_key(source, renamings, converters, model.base_model_prefix, here)
        if target not in here and source in here:
            target, pattern = source, None
        converter = by_pattern[pattern] if pattern is not None else None
        conversion = sets.setdefault(target, ConversionSet(target, [], [], converter))
        conversion.sources.append(source)
        conversion._patterns.append(pattern or source)
    return list(sets.values())


def _canonical_names(model: PreTrainedModel) -> dict[str, tuple[str, ...]]:
    """Every name in memory -> the names it is saved under (see :class:`NamePlan`)."""
    shared: dict[int, list[str]] = {}
    tensors = model.state_dict(keep_vars=True)
    for name, tensor in tensors.items():
        shared.setdefault(id(tensor), []).append(name)
    declared = set(getattr(model, "all_tied_weights_keys", None) or ())
    ignored = [re.compile(pattern) for pattern in getattr(model, "_keys_to_ignore_on_save", None) or ()]

    canonical: dict[str, tuple[str, ...]] = {}
    for names in shared.values():
        # What transformers ties by itself when loading is saved once. A tie it does not know about would be
        # lost on reload, so each of those names is written.
        kept = [name for name in names if name not in declared] or names[:1]
        kept = [name for name in kept if not any(pattern.search(name) for pattern in ignored)]
        canonical |= {name: tuple(kept) for name in names}
    return canonical


def _conversion_sets(
    model: PreTrainedModel, converted: dict[str, torch.Tensor], expected: dict[str, torch.Size]
) -> dict[tuple[str, ...], tuple[str, ...]]:
    """Cut ``converted`` into the smallest sets that convert on their own: one weight, one block, or
    everything.

    A set converts on its own when it gives, name by name, the shapes that the whole model gives.
    """

    def outputs_of(names: Iterable[str]) -> tuple[str, ...] | None:
        try:
            out = _revert(model, {name: converted[name] for name in names})
        except (RuntimeError, ValueError, KeyError, IndexError):
            return None
        return tuple(out) if all(expected.get(k) == v.shape for k, v in out.items()) else None

    blocks: dict[str, list[str]] = {}
    for name in converted:
        match = _BLOCK_PREFIX.match(name)
        blocks.setdefault(match.group(0) if match else "", []).append(name)

    sets: dict[tuple[str, ...], tuple[str, ...]] = {}
    for names in blocks.values():
        alone = {(name,): outputs_of([name]) for name in names}
        together = outputs_of(names)
        if all(alone.values()):
            sets |= {one: saved for one, saved in alone.items() if saved}
        elif together:
            sets[tuple(names)] = together
    if sorted(saved for outputs in sets.values() for saved in outputs) == sorted(expected):
        return sets
    return {tuple(converted): tuple(expected)}


def _revert(model: PreTrainedModel, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    from transformers.core_model_loading import revert_weight_conversion

    return revert_weight_conversion(model, dict(tensors))
