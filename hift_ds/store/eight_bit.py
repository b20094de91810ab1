"""Eight bits a number: block-wise scales (arXiv 2110.02861) and levels that are spaced as floating point
spaces them.

A number is its block's largest magnitude times a level. Levels are the fp32 numbers up to 1 with few mantissa
bits, so a code is a range of bits of the fp32 number, rounded to nearest, and the error is the same share of
a number over 16 powers of two:

| numbers     | code                          | relative error | smallest level over the largest |
|-------------|-------------------------------|----------------|---------------------------------|
| signed      | sign, 7 bits with 3 mantissa  | at most 1/16   | 2^-15.9                         |
| nonnegative | 8 bits with 4 mantissa        | at most 1/32   | 2^-15.9                         |

Code 0 is 0. Encoding what was decoded gives the same codes and scales: the largest magnitude of a block has a
level of its own, 1. Libraries: docs/decisions.md says which were tried and why none is used.
"""

from __future__ import annotations

import torch
from torch import Tensor

BLOCK_NUMEL = 256  # elements that share a scale
SMALLEST_SCALE = 2.0**-60  # smaller blocks are kept as zeros: squared scales would lose precision in fp32

_SIGN = 128
_MANTISSA_BITS = {True: 3, False: 4}  # signed or not
_LARGEST = {True: 127, False: 255}


def num_blocks(numel: int) -> int:
    """The number of blocks, each with a scale of its own, of ``numel`` elements."""
    return -(-numel // BLOCK_NUMEL)


def encode(values: Tensor, codes: Tensor, scales: Tensor, *, signed: bool) -> None:
    """Round ``values`` to the nearest levels; nonnegative ones above 0 to the nearest level above 0.

    Args:
        values: fp32, flat.
        codes: uint8, as long; overwritten.
        scales: fp32, one per block; overwritten.
    """
    numel = values.numel()
    sizes = values.abs() if signed else values.clone()
    if numel % BLOCK_NUMEL:
        sizes = torch.nn.functional.pad(sizes, (0, -numel % BLOCK_NUMEL))
    sizes = sizes.view(-1, BLOCK_NUMEL)
    largest = sizes.amax(1)
    scales.copy_(torch.where(largest < SMALLEST_SCALE, 0, largest))
    sizes.div_(torch.where(scales > 0, scales, torch.inf).unsqueeze(1))
    shift, zero = _geometry(signed)
    rounded = sizes.view(torch.int32).add_(1 << (shift - 1)).bitwise_right_shift_(shift).sub_(zero)
    codes.copy_(rounded.view(-1)[:numel].clamp_(0, _LARGEST[signed]))
    if signed:
        codes.add_((values < 0).to(torch.uint8), alpha=_SIGN)
    else:
        codes.clamp_(min=1).mul_(values > 0)


def decode(codes: Tensor, scales: Tensor, values: Tensor, *, signed: bool) -> None:
    """Turn levels back into values; ``values`` (fp32, flat) is overwritten."""
    numel = codes.numel()
    shift, zero = _geometry(signed)
    bits = codes.to(torch.int32)
    if signed:
        bits.bitwise_and_(_SIGN - 1)
    is_zero = bits == 0
    sizes = bits.add_(zero).bitwise_left_shift_(shift).view(torch.float32).masked_fill_(is_zero, 0)
    if numel % BLOCK_NUMEL:
        sizes = torch.nn.functional.pad(sizes, (0, -numel % BLOCK_NUMEL))
    sizes = sizes.view(-1, BLOCK_NUMEL).mul_(scales.unsqueeze(1)).view(-1)[:numel]
    if signed:
        sizes.view(torch.int32).bitwise_or_(codes.bitwise_and(_SIGN).to(torch.int32).bitwise_left_shift_(24))
    values.copy_(sizes)


def _geometry(signed: bool) -> tuple[int, int]:
    """Bits of an fp32 number below a code, and what is subtracted from the bits above so that 1.0 is the last
    code."""
    shift = 23 - _MANTISSA_BITS[signed]
    one = int(torch.tensor(1.0).view(torch.int32)) >> shift
    return shift, one - _LARGEST[signed]
