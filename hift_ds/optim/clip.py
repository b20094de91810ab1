"""The global gradient norm of the active group over all ranks, and clipping by it."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.utils import get_total_norm

from hift_ds.collectives import Ranks, join_norms_and_flags

_PASS_NUMEL = 1 << 16


def agree_on_norm(
    ranks: Ranks,
    grads: Sequence[Tensor | None],
    present: Sequence[Sequence[bool]],
    device: torch.device,
    asked: Sequence[bool | Tensor] = (),
) -> tuple[Tensor, float, list[list[bool]], list[bool]]:
    """Agree on the norm of the whole gradient and on what backward has reached, in one small all-reduce. The host waits
    for the device here, and nowhere else in a step.

    Every rank gets the same numbers, so all skip or clip alike. A parameter that no rank reached is skipped by the
    update, as ``torch.optim`` skips a missing gradient.

    Args:
        grads: this rank's disjoint shards, of any float dtype.
        present: by group and parameter, whether this rank's backward reached it.
        device: where ranks talk to each other.
        asked: what else every rank is asked; 0-dim tensors where only the device knows.

    Returns:
        The 2-norm, 0-dim, fp32; its value; in the form of ``present``, which parameters any rank reached; and for each
        of ``asked`` whether any rank says yes.
    """
    have = [grad for grad in grads if grad is not None]
    norm = _norm(have).to(device) if have else torch.zeros((), dtype=torch.float32, device=device)
    together = [*(flag for flags in present for flag in flags), *asked]
    norm, value, reached = join_norms_and_flags(ranks, norm, together)
    ends = list(itertools.accumulate(map(len, present)))
    return (
        norm,
        float(norm) if value is None else value,
        [reached[end - len(flags) : end] for flags, end in zip(present, ends, strict=True)],
        reached[len(reached) - len(asked) :],
    )


def _norm(grads: Sequence[Tensor]) -> Tensor:
    """The norm of norms, as ``torch.nn.utils.clip_grad_norm_`` takes it, but always in fp32."""
    if all(grad.dtype == torch.float32 for grad in grads):
        return get_total_norm(grads)
    return torch.linalg.vector_norm(torch.stack([fp32_norm(grad) for grad in grads]))


def fp32_norm(grad: Tensor, in_fp32: Tensor | None = None) -> Tensor:
    """The 2-norm (0-dim, fp32) of a gradient of any float dtype, summed up in fp32.

    Args:
        in_fp32: the same values in fp32 and in the same order, flat, if they are there: same bits, half the time.

    torch's kernel for 16-bit tensors on a CPU adds one element after the other: seven times slower than fp32's, and
    2e-4 of ten million elements are lost. In passes that fit a cache, each made fp32 first, neither happens.
    """
    if grad.device.type != "cpu" or grad.dtype == torch.float32 or grad.numel() <= _PASS_NUMEL:
        return torch.linalg.vector_norm(grad, dtype=torch.float32)
    scratch = torch.empty(_PASS_NUMEL, dtype=torch.float32)
    passes = (grad.flatten() if in_fp32 is None else in_fp32).split(_PASS_NUMEL)
    made = passes if in_fp32 is not None else (scratch[: len(part)].copy_(part) for part in passes)
    norms = [torch.linalg.vector_norm(part) for part in made]
    return torch.linalg.vector_norm(torch.stack(norms))


def grad_factor(norm: Tensor, max_norm: float, loss_scale: float) -> Tensor | None:
    """The factor (0-dim, of the norm's dtype and device) by which gradients under ``loss_scale`` are multiplied so that
    their joint norm is at most ``max_norm``.

    ``norm`` is already free of the scale. ``None`` if nothing needs multiplying. torch's formula for the clipping.
    """
    factor = torch.clamp(max_norm / (norm + 1e-6), max=1.0) if max_norm > 0 else None
    if loss_scale != 1.0:
        factor = (torch.ones_like(norm) if factor is None else factor) / loss_scale
    return factor
