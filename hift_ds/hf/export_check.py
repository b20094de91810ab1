"""Is an exported folder what was trained? Read again, and compared with where it came from."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from hift_ds.errors import CheckpointError
from hift_ds.hf.safetensors_folder import SafetensorsFolder, tensor_dtypes
from hift_ds.hf.weight_names import plan_names, to_saved, zero_init_set_aside

if TYPE_CHECKING:
    from transformers import PreTrainedModel

TOKENS = 16  # of the text whose logits are compared


def check_export(model: PreTrainedModel, weights: Callable[[], Iterable[tuple[str, Tensor]]], folder: Path) -> str:
    """Compare the tensors in the files, bit for bit, and what a program gets that loads them.

    The files are compared tensor by tensor; for the logits two copies of the model are in memory.

    Args:
        model: the structure, on meta.
        weights: begins to read (name in memory, tensor) of what was trained.
        folder: what was exported.

    Returns:
        What was compared, in a sentence.

    Raises:
        CheckpointError: something differs; names it.
    """
    dtypes = tensor_dtypes(folder)
    _compare_files(model, weights(), folder, dtypes)
    main = max(set(dtypes.values()), key=list(dtypes.values()).count)
    # With the last argument it returns a pair, which its declaration does not say.
    load = cast("Callable[..., tuple[PreTrainedModel, dict[str, Any]]]", type(model).from_pretrained)
    with zero_init_set_aside():  # after training with ZeRO-3 in this process
        loaded, found = load(folder, dtype=main, use_safetensors=True, local_files_only=True, output_loading_info=True)
    if absent := sorted(found["missing_keys"]) + sorted(found["unexpected_keys"]):
        raise CheckpointError(f"{folder}: transformers finds no place or no weight for {absent[0]}; export again")
    expected = _logits(_with_weights(model, weights(), loaded), loaded.config)
    difference = float((expected - _logits(loaded, loaded.config)).abs().max())
    # Weights of several dtypes are rounded on two ways; all others must agree to the last bit.
    allowed = 0.0 if len(set(dtypes.values())) == 1 else 0.02 * float(expected.abs().max())
    if not difference <= allowed:
        raise CheckpointError(
            f"{folder}: its logits differ from those of what was trained by {difference:g}; export again"
        )
    how = "are equal" if difference == 0 else f"differ by {difference:.2g} at most"
    tensors = f"{len(dtypes)} tensors equal those that were trained"
    return f"checked: {tensors}; loaded by transformers, the logits of {TOKENS} tokens {how}"


def _compare_files(
    model: PreTrainedModel, weights: Iterable[tuple[str, Tensor]], folder: Path, dtypes: dict[str, torch.dtype]
) -> None:
    files, unseen = SafetensorsFolder(folder), set(dtypes)
    for name, tensor in to_saved(model, weights, plan_names(model)):
        if name not in dtypes:
            raise CheckpointError(f"{folder}: {name} is not in the exported files; export again")
        written = files.tensor(name)
        if not torch.equal(written, tensor.to(dtypes[name])):
            raise CheckpointError(f"{folder}: {name} is not the tensor that was trained; export again")
        unseen.discard(name)
    if unseen:
        raise CheckpointError(f"{folder}: {min(unseen)} is in the exported files, but was not trained; export again")


def _with_weights(
    model: PreTrainedModel, weights: Iterable[tuple[str, Tensor]], like: PreTrainedModel
) -> PreTrainedModel:
    """A model on the host that got its weights by their names in memory, without any file format between.

    Args:
        like: whose dtypes it gets; frequencies of rotary embeddings are fp32 beside 16-bit weights.
    """
    with torch.random.fork_rng(devices=[]):
        made = type(model)(model.config)
    dtypes = {name: tensor.dtype for name, tensor in (*like.named_parameters(), *like.named_buffers())}
    for name, tensor in (*made.named_parameters(), *made.named_buffers()):
        tensor.data = tensor.data.to(dtypes.get(name, tensor.dtype))
    own = made.state_dict()
    for name, tensor in weights:
        if name in own:
            own[name].copy_(tensor)
    made.tie_weights()
    return made


@torch.no_grad()
def _logits(model: PreTrainedModel, config: object) -> Tensor:
    vocabulary = cast("Tensor", model.get_input_embeddings().weight).shape[0]
    ids = torch.arange(TOKENS).mul(7919).remainder(vocabulary)[None]
    inputs = {"input_ids": ids} | ({"decoder_input_ids": ids} if model.config.is_encoder_decoder else {})
    output = model.eval()(**inputs, use_cache=False) if model.can_generate() else model.eval()(**inputs)
    return (output["logits"] if "logits" in output else output[0]).float()
