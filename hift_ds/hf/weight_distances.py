"""How far each weight has moved from one safetensors folder to another: what a run has changed."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from hift_ds.errors import CheckpointError
from hift_ds.hf.safetensors_folder import SafetensorsFolder
from hift_ds.hf.weight_names import plan_load

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def weight_distances(
    before_dir: str | Path,
    after_dir: str | Path,
    *,
    model: PreTrainedModel | None = None,
    chunk_numel: int = 1 << 24,
) -> dict[str, tuple[float, float]]:
    """How far each weight moved: ``{name: (L2 norm of after - before, L2 norm of before)}``, floating point
    only.

    What only one folder has is left out: old checkpoints hold buffers and copies of tied weights that an
    export does not.

    Args:
        model: compare its parameters, by their names in memory, whatever the two checkpoints call them
            (published GPT-2 and Mixtral name weights otherwise than memory does); on any device, meta
            included, not partitioned. Of embeddings with more rows than before the old rows are compared, and a head of
            another shape is left out. Without it tensors are compared under the names in the files.
        chunk_numel: values compared at once, in fp32 (norms are summed in fp64); bounds the memory.

    Raises:
        CheckpointError: a folder is damaged; or, without ``model``, a weight has another shape in the other one.
    """
    before, after = SafetensorsFolder(before_dir), SafetensorsFolder(after_dir)
    embeddings = set() if model is None else _embedding_names(model)
    if model is None:
        names = [name for name in before.headers if name in after.headers]
        pairs: Iterator[tuple[str, torch.Tensor, torch.Tensor]] = (
            (name, before.tensor(name), after.tensor(name)) for name in names
        )
    else:
        pairs = _pairs_of_weights(model, before, after)
    out: dict[str, tuple[float, float]] = {}
    for name, old, new in pairs:
        if not old.is_floating_point():
            continue
        if old.shape != new.shape and model is not None:
            if name not in embeddings or old.shape[1:] != new.shape[1:] or len(old) > len(new):
                continue
            new = new[: len(old)]
        if old.shape != new.shape:
            raise CheckpointError(f"{name!r}: shape {tuple(old.shape)} before, {tuple(new.shape)} after")
        moved = norm = 0.0
        chunks = zip(old.reshape(-1).split(chunk_numel), new.reshape(-1).split(chunk_numel), strict=True)
        for a, b in chunks:
            a, b = a.float(), b.float()
            moved += (b - a).double().square().sum().item()
            norm += a.double().square().sum().item()
        out[name] = (math.sqrt(moved), math.sqrt(norm))
    return out


def _embedding_names(model: PreTrainedModel) -> set[str]:
    """All names of the weights that have a row for each token."""
    modules = (model.get_input_embeddings(), model.get_output_embeddings())
    weights = {id(module.weight) for module in modules if module is not None}
    return {name for name, tensor in model.state_dict(keep_vars=True).items() if id(tensor) in weights}


def _pairs_of_weights(
    model: PreTrainedModel, before: SafetensorsFolder, after: SafetensorsFolder
) -> Iterator[tuple[str, torch.Tensor, torch.Tensor]]:
    """(name in memory, tensor in one folder, tensor in the other), one conversion set at a time."""
    tensors = model.state_dict(keep_vars=True)
    # A tied weight may be saved under another of its names in the other folder.
    theirs = {id(tensors[c.first_name]): c for c in plan_load(model, before.headers) if c.first_name in tensors}
    for conversion in plan_load(model, after.headers):
        partner = theirs.get(id(tensors.get(conversion.first_name)))
        if partner is None:
            continue
        olds = partner.convert(model, {name: before.tensor(name) for name in partner.sources})
        news = conversion.convert(model, {name: after.tensor(name) for name in conversion.sources})
        if conversion.first_name not in olds:
            olds = {conversion.first_name: olds[partner.first_name]}
        yield from ((name, olds[name], new) for name, new in news.items() if name in olds)
