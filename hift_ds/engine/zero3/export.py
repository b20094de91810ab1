"""A Hugging Face folder from weights in ZeRO-3's shards: gathered one by one, written a file at a time.

Each rank holds one whole weight on its accelerator at a time, rank 0 also one file's worth (``max_shard_size``) on the
host.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from hift_ds.checkpoint.write_plan import saved_tensors
from hift_ds.engine.zero3.shards import is_partitioned, whole_of
from hift_ds.errors import CheckpointError
from hift_ds.hf.export import export_model, parse_size
from hift_ds.hf.weight_names import skeleton
from hift_ds.process_group import world_rank_and_size
from hift_ds.ranks import on_all_ranks

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def export_partitioned(model: PreTrainedModel, out_dir: str | Path, **options: Any) -> list[Path]:
    """:func:`~hift_ds.hf.export.export_model` for a model whose weights are partitioned. All ranks call this.

    Args:
        options: those of ``export_model``, except ``tensors``.

    Returns:
        The weight files, in order; an empty list on other ranks than the first.

    Raises:
        CheckpointError: as ``export_model``, on every rank.
        ConfigError: ``max_shard_size`` cannot be read.
    """

    parse_size(options.get("max_shard_size", "5GB"))  # before anything is gathered

    def write() -> list[Path]:
        weights = whole_weights(model)
        try:
            if world_rank_and_size()[0] == 0:
                return export_model(skeleton(model.config, like=model), out_dir, tensors=weights, **options)
            return []
        finally:
            for _ in weights:  # take part in what is left to gather, also when rank 0 could not write
                pass

    return on_all_ranks(write, CheckpointError)


@torch.no_grad()
def whole_weights(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """(name, whole tensor in host memory) of every parameter, tied ones once, and of every persistent buffer; the
    tensor is empty on other ranks than the first. A collective: every rank must exhaust it."""
    first = world_rank_and_size()[0] == 0
    for name, tensor in saved_tensors(model).items():
        whole = whole_of(tensor) if is_partitioned(tensor) else tensor.detach()
        yield name, whole.to("cpu", copy=True) if first else whole.new_empty(0)
        del whole


def under_all_names(model: nn.Module, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """``weights``, which have tied tensors once, with all the names that they have in ``model.state_dict()``."""
    name_of = {id(tensor): name for name, tensor in saved_tensors(model).items()}
    tied = {name: name_of.get(id(tensor)) for name, tensor in model.state_dict(keep_vars=True).items()}
    return weights | {name: weights[first] for name, first in tied.items() if first in weights}
