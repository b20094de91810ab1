"""Attention with the allocations of FlashAttention-2 and none of its arithmetic.

On a GPU torch's ``scaled_dot_product_attention`` runs FlashAttention-2 (arXiv 2307.08691): it never holds the scores,
saves q, k, v, the output and one log-sum-exp a row, and its backward adds an fp32 accumulator for dq. On the fake
device the same call would take the path that holds the scores, so :func:`scaled_dot_product_attention` stands in for
it. Only sizes are right: its values are not.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

Shape = Sequence[int]

QUERY_BLOCK = 128  # rows of the backward's fp32 buffers are rounded up to it

_library = torch.library.Library("hift_ds", "DEF")
_library.define("flash_forward(Tensor query, Tensor key, Tensor value) -> (Tensor, Tensor)")
_library.define(
    "flash_backward(Tensor grad, Tensor query, Tensor key, Tensor value) -> (Tensor, Tensor, Tensor, Tensor, Tensor)"
)


@torch.library.impl(_library, "flash_forward", "Meta")
def _forward_sizes(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """query (B, H, S, D), key and value (B, G, T, D) -> output (B, S, H, D), lse (B, H, S)."""
    batch, heads, length, _ = query.shape
    out = query.new_empty(batch, length, heads, value.shape[-1])
    return out, query.new_empty(batch, heads, length, dtype=torch.float32)


@torch.library.impl(_library, "flash_backward", "Meta")
def _backward_sizes(grad: Tensor, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, ...]:
    """Gradients of query, key and value (one a query head) in (B, S, H, D); delta and the dq accumulator in fp32."""
    batch, heads, length, width = query.shape
    rows = -(-length // QUERY_BLOCK) * QUERY_BLOCK
    return (
        query.new_empty(batch, length, heads, width),
        key.new_empty(batch, key.shape[2], heads, width),
        value.new_empty(batch, key.shape[2], heads, value.shape[-1]),
        query.new_empty(batch, heads, rows, dtype=torch.float32),
        query.new_empty(batch, rows, heads, width, dtype=torch.float32),
    )


class _FlashAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None) -> Tensor:
        out, lse = torch.ops.hift_ds.flash_forward(query, key, value)
        ctx.save_for_backward(query, key, value, out, lse, bias)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        query, key, value, _, _, bias = ctx.saved_tensors
        grads = torch.ops.hift_ds.flash_backward(grad.contiguous(), query, key, value)[:3]
        if key.shape[1] != query.shape[1]:  # grouped heads: one gradient a query head, summed afterwards
            grads = grads[0], *(_sum_groups(grad, key.shape[1]) for grad in grads[1:])
        grad_bias = torch.empty_like(bias) if ctx.needs_input_grad[3] else None
        return *(grad.transpose(1, 2) for grad in grads), grad_bias


def _sum_groups(grad: Tensor, num_groups: int) -> Tensor:
    batch, length, heads, width = grad.shape
    return grad.view(batch, length, num_groups, heads // num_groups, width).sum(3)


def scaled_dot_product_attention(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, *_: object, **__: object
) -> Tensor:
    """torch's function, with its signature: (B, H, S, D) in and out. A mask is turned into a bias of the query's dtype
    and saved, as the memory-efficient kernel does, which torch takes when there is one."""
    if torch.is_autocast_enabled(query.device.type):
        dtype = torch.get_autocast_dtype(query.device.type)
        query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    bias = attn_mask if attn_mask is None or attn_mask.is_floating_point() else attn_mask.to(query.dtype)
    return _FlashAttention.apply(query, key, value, bias).transpose(1, 2)


def register_flops() -> None:
    """Count the operations of an attention as torch counts those of its own: two products forward, five backward (the
    scores are recomputed), full squares."""
    from torch.utils.flop_counter import flop_registry, register_flop_formula

    if torch.ops.hift_ds.flash_forward in flop_registry:
        return

    @register_flop_formula(torch.ops.hift_ds.flash_forward)
    def _forward_flops(query: Shape, key: Shape, value: Shape, *_: object, **__: object) -> int:
        batch, heads, length, width = query
        return 4 * batch * heads * length * key[2] * width

    @register_flop_formula(torch.ops.hift_ds.flash_backward)
    def _backward_flops(grad: Shape, query: Shape, key: Shape, value: Shape, *_: object, **__: object) -> int:
        batch, heads, length, width = query
        return 10 * batch * heads * length * key[2] * width


def register_unpadded_masks() -> None:
    """Give batches without padding the attention masks of transformers: none where the kernel is told "causal", a real
    one for a window shorter than the sequence, and for a batch that brings a mask of its own. (transformers takes fake
    tensors for a trace and would always build one.)"""
    from transformers import AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    def mask(*args: Any, local_size: int | None = None, **kwargs: Any) -> Tensor | None:
        options: dict[str, Any] = {**kwargs, "local_size": local_size}
        if kwargs.get("attention_mask") is not None:  # whether it masks anything is not to be read
            options |= {"allow_is_causal_skip": False, "allow_is_bidirectional_skip": False}
            return sdpa_mask(*args, **options)
        kv_length = kwargs["kv_length"] if "kv_length" in kwargs else args[2]
        if local_size is None or kv_length < local_size:
            return None
        return sdpa_mask(*args, **options)

    AttentionMaskInterface.register("sdpa", mask)
