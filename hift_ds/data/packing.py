"""Several short samples in one row, none of which sees another.

The packing and the batches are TRL's: best-fit rows of at most ``max_length`` tokens, and batches without
padding whose ``position_ids`` start at 0 with every sample. transformers derives from these a block-diagonal
attention mask, for the models that build their mask with its current functions.
:func:`packed_samples_are_isolated` finds out.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, cast

from hift_ds.errors import ConfigError

if TYPE_CHECKING:
    from datasets import Dataset
    from torch import nn
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

IGNORED = -100
"""The label that no loss counts."""


def pack(dataset: Dataset, max_length: int) -> Dataset:
    """Rows of at most ``max_length`` tokens, made of whole samples.

    Args:
        dataset: ``input_ids`` and ``labels``, no row longer than ``max_length``. Neighbours end up together,
            so shuffle it first.

    Returns:
        The same columns and ``seq_lengths``, the lengths of the samples in each row.
    """
    try:
        from trl import pack_dataset
    except ImportError as error:
        raise ConfigError(f"data.packing: true needs the package trl: pip install trl ({error})") from None
    return pack_dataset(dataset, seq_length=max_length, strategy="bfd", map_kwargs={"desc": "Packing"})


def collator(tokenizer: PreTrainedTokenizerBase, *, packing: bool) -> Any:
    """What makes a batch of rows: padded on the right, or with ``packing`` laid end to end in one row.

    Padding has label -100 and is masked from attention. In packed batches the first label of every sample is
    -100, since the token before it belongs to another sample.
    """
    if not packing:
        from transformers import DataCollatorForSeq2Seq

        tokenizer = copy.deepcopy(tokenizer)
        tokenizer.padding_side = "right"  # positions are counted from the first column
        return DataCollatorForSeq2Seq(tokenizer, label_pad_token_id=IGNORED)
    return _packed_collator(tokenizer.pad_token_id)


def packed_samples_are_isolated(model: PreTrainedModel, run: Callable[..., Any] | None = None) -> bool:
    """Whether the samples of a packed row have no influence on each other in this model.

    Runs two short samples in one row, as the collator makes it, changes the first, and compares the second's
    logits; and with those of the second sample in a row of its own, without position ids: RoBERTa counts from
    another number than the 0 with which packed samples begin.

    Args:
        model: a causal language model with its weights, on any device. Its training flag is restored. It runs
            with ``use_cache`` off, as in training: with a cache transformers makes no block-diagonal mask.
        run: calls it, where it cannot be called itself: the engine of a model in shards.
    """
    import torch

    if "position_ids" not in inspect.signature(model.forward).parameters:
        return False
    run = run or model
    embeddings = cast("nn.Embedding", model.get_input_embeddings())
    weight = embeddings.weight
    first, second = torch.arange(12).reshape(2, 6) % embeddings.num_embeddings
    batch_of = _packed_collator(pad_token_id=0)
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            before, after = (
                run(
                    **_to(
                        weight.device,
                        batch_of([{"input_ids": other.tolist()}, {"input_ids": second.tolist()}]),
                    )
                )
                .logits[0]
                .detach()
                for other in (first, first.flip(0))
            )
            alone = run(input_ids=second[None].to(weight.device), use_cache=False).logits[0]
    finally:
        model.train(training)
    # Compared with how far the first sample's own logits moved. Not with zero: a mixture of experts rounds
    # the second sample differently when the first one sends its tokens elsewhere.
    moved = (before - after).abs().float()
    tolerance = 1e-4 if weight.dtype == torch.float32 else 2e-2
    apart = torch.maximum(moved[6:], (before[6:] - alone).abs().float())
    return bool(apart.max() <= tolerance * moved[:6].max())


def _packed_collator(pad_token_id: int) -> Any:
    from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

    return DataCollatorForLanguageModeling(pad_token_id=pad_token_id, padding_free=True)


def _to(device: Any, batch: dict[str, Any]) -> dict[str, Any]:
    moved = {key: value.to(device) if hasattr(value, "to") else value for key, value in batch.items()}
    return {**moved, "use_cache": False}
