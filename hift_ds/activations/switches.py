"""The switches of ``"hift": {"activations": ...}`` put to work on a model, and kept in step with the active group.

Each leaves loss and gradients as they are, within rounding. What holds without a switch: below the active group no
graph is built and nothing is kept; transformers' key-value cache, which would keep every layer's keys and values of
a training forward for nobody, is off.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from hift_ds.activations import chunked_loss
from hift_ds.activations.offload import build_offload
from hift_ds.activations.recompute import BlockRecompute, take_over_from_transformers
from hift_ds.config import ActivationsConfig
from hift_ds.hf.model_structure import configs_with_cache
from hift_ds.layers.arch import ArchSpec, find_arch


class ActivationSavings:
    """The switches of ``"activations"`` at work on ``model`` until ``close``.

    Args:
        model: on its device, weights in place.
        config: the switches.
        groups: for each layer group by index, the names of its parameters; index -1 for those always active.

    Attributes:
        losses_only: outside of training too, nobody will look at the logits: defer them. For evaluation that reads
            losses only.
    """

    def __init__(self, model: nn.Module, config: ActivationsConfig, groups: Mapping[int, Sequence[str]]) -> None:
        self.config = config
        self.losses_only = False
        self._model = model
        self._lowest = lowest_blocks(model, find_arch(model), groups)
        self._recompute = self._build_recompute(config)
        self._head = chunked_loss.defer_logits(model, self._defers) if config.chunked_loss else None
        self._offload = build_offload(model, self._recompute is not None) if config.offload else None
        self._cache_hook = model.register_forward_pre_hook(_without_cache, with_kwargs=True)

    def _build_recompute(self, config: ActivationsConfig) -> BlockRecompute | None:
        asked_for = take_over_from_transformers(self._model)  # by gradient_checkpointing_enable()
        if not (config.checkpointing or asked_for):
            return None
        return BlockRecompute(self._model, find_arch(self._model).blocks, config.blocks_kept)

    def regroup(self, groups: dict[int, Sequence[str]]) -> None:
        """Go by the groups into which the model is cut from now on."""
        self._lowest = lowest_blocks(self._model, find_arch(self._model), groups)

    @property
    def recomputes(self) -> bool:
        """Blocks are recomputed in backward, by the switch or because the model was told to."""
        return self._recompute is not None

    def lowest_block(self, index: int) -> int:
        """The lowest block that gradients of group ``index`` pass; the number of blocks for the head alone."""
        return self._lowest[index]

    @contextlib.contextmanager
    def during_forward(self, active: Iterable[int]) -> Iterator[None]:
        """A context for a forward while the groups with indices ``active`` train."""
        if self._recompute is not None:
            self._recompute.from_block(min(self._lowest[index] for index in active))
        offload = self._offload if torch.is_grad_enabled() and self._model.training else None
        with contextlib.nullcontext() if offload is None else offload.during_forward():
            yield

    def close(self) -> None:
        """Leave the model as it was."""
        self._cache_hook.remove()
        if self._recompute is not None:
            self._recompute.off()
        if self._head is not None:
            chunked_loss.restore(self._head)
        if self._offload is not None:
            self._offload.close()

    def _defers(self) -> bool:
        return (self._model.training and torch.is_grad_enabled()) or self.losses_only


def lowest_blocks(model: nn.Module, arch: ArchSpec, groups: Mapping[int, Sequence[str]]) -> dict[int, int]:
    """The lowest block that each group's gradients pass: 0 for the first block or anything below it, the number of
    blocks for the head alone. A tied weight counts where it is used lowest."""
    unit_of = arch.unit_of(model)
    return {index: max(min(unit_of[name] for name in names) - 1, 0) for index, names in groups.items()}


def _without_cache(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    config = getattr(module, "config", None)
    wanted = config is not None and any(part.use_cache for part in configs_with_cache(config))
    if not (wanted and module.training and torch.is_grad_enabled()):
        return None
    if "use_cache" in kwargs or kwargs.get("past_key_values") is not None:
        return None
    if "use_cache" not in inspect.signature(module.forward).parameters:
        return None
    return args, {**kwargs, "use_cache": False}
