"""Compact forms of masters and moments: how a flat fp32 tensor is kept while its layer group is parked.

| name         | keeps                                                           | bytes a parameter        |
|--------------|-----------------------------------------------------------------|--------------------------|
| fp32         | everything as it is                                             | 12 with AdamW and master |
| split_master | the low 16 bits of the master; the bf16 weight has the others   | -2, lossless             |
| bf16_moments | moments in bf16, the second with stochastic rounding            | -4                       |
| int8_moments | moments in 8 bits and one fp32 scale per 256 (arXiv 2110.02861) | -6                       |

``split_master`` combines with either of the others. Encoding a decoded value gives the same bits again, so a
checkpoint of decoded values resumes exactly.
"""

from __future__ import annotations

import sys
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from hift_ds.store import eight_bit
from hift_ds.store.base import MASTER, Weights

SPLIT_MASTER, BF16_MOMENTS, INT8_MOMENTS = "split_master", "bf16_moments", "int8_moments"

# Running means of gradients, and of their squares (or magnitudes: never negative). All else is kept as it is.
FIRST_MOMENTS = frozenset(["exp_avg", "momentum_buffer", "grad_avg"])
SECOND_MOMENTS = frozenset(["exp_avg_sq", "max_exp_avg_sq", "square_avg", "acc_delta", "sum", "exp_inf"])

# Elements encoded at once, which bounds the temporary memory: on a CPU what fits its cache, on an accelerator
# what keeps it busy. Multiples of a block.
PASS_NUMEL = {"cpu": 1 << 17}
PASS_NUMEL_ELSEWHERE = 1 << 24


def passes(tensor: Tensor) -> Iterator[tuple[int, int]]:
    """(start, end) of each pass over a flat tensor."""
    step = PASS_NUMEL.get(tensor.device.type, PASS_NUMEL_ELSEWHERE)
    for start in range(0, tensor.numel(), step):
        yield start, min(start + step, tensor.numel())


@dataclass(frozen=True)
class Part:
    """One flat tensor of a compact form."""

    name: str
    dtype: torch.dtype
    numel: int


class Codec(ABC):
    """One key of one chunk, in and out of its compact form. Zero bytes are zeros (of a master: its weight)."""

    in_place = False  # the form is the tensor itself: decoding gives a view, and encoding does nothing

    @abstractmethod
    def parts(self, numel: int) -> tuple[Part, ...]:
        """What is kept of ``numel`` elements."""

    @abstractmethod
    def encode(self, values: Tensor, parts: Mapping[str, Tensor], seed: int) -> None:
        """Write ``values`` (flat) into ``parts``, on one device. ``seed``: of stochastic rounding."""

    @abstractmethod
    def decode(self, parts: Mapping[str, Tensor]) -> Tensor:
        """The values, flat, on the parts' device."""

    def aside(self) -> Tensor | None:
        """What belongs to the compact form and is not in its parts, as it is now."""
        return None

    def set_aside(self, kept: Tensor | None) -> None:  # noqa: B027
        """The inverse of :meth:`aside`."""


class Exact(Codec):
    """The values as they are, in any dtype."""

    in_place = True

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype

    def parts(self, numel: int) -> tuple[Part, ...]:
        return (Part("values", self.dtype, numel),)

    def encode(self, values: Tensor, parts: Mapping[str, Tensor], seed: int) -> None:
        parts["values"].copy_(values)

    def decode(self, parts: Mapping[str, Tensor]) -> Tensor:
        return parts["values"]


class SplitMaster(Codec):
    """An fp32 master without its high half, which the bf16 weight has. Lossless.

    A weight is its master rounded to nearest even. With the master's bits as integers, high half H and low
    half L, the weight's bits are H if L < 0x8000 and H + 1 if L > 0x8000: so the master is the weight's bits
    as its high half, plus L with its top bit as a sign. At the tie L == 0x8000 the weight's bits are
    whichever of H and H + 1 is even, so the weight does not tell: the ties that were rounded down are kept as
    a list of positions. One element in 2^17 of trained masters is on it; up to one in 16 of masters that came
    from fp16, until their first update.

    On an accelerator the list has a fixed length and stays there, with -1 where there is none: a length that follows
    the values would have the host wait for them, pass after pass. Its room is for one element in 2^12. Should a pass
    ever find more, its ties become 0x7FFF, which is half a unit of fp32 away.
    """

    TIE = -(1 << 15)  # 0x8000 as int16
    ROOM_SHIFT, LEAST_ROOM = 12, 64

    def __init__(self, weights: Weights) -> None:
        assert sys.byteorder == "little"
        self.weights = weights
        self._ties_down: Tensor | None = None  # positions, int32 or int64

    def parts(self, numel: int) -> tuple[Part, ...]:
        return (Part("low", torch.int16, numel),)

    def aside(self) -> Tensor | None:
        return self._ties_down  # replaced by each encoding, never changed

    def set_aside(self, kept: Tensor | None) -> None:
        self._ties_down = kept

    def encode(self, values: Tensor, parts: Mapping[str, Tensor], seed: int) -> None:
        bits = values.contiguous().view(torch.int32)
        dtype = torch.int32 if values.numel() < 1 << 31 else torch.int64
        find = self._of_fixed_length if self._fixes_length(values) else self._of_their_number
        found = []
        for start, end in passes(values):
            low = parts["low"][start:end].copy_(bits[start:end])  # an int32's low half
            down = (bits[start:end] & (1 << 16) == 0).logical_and_(low == self.TIE)
            found.append(find(down, low, start, dtype))
        self._ties_down = torch.cat(found) if found else None

    def _fixes_length(self, values: Tensor) -> bool:
        """Not for masters of which many are ties: those that came from fp16 and have not been updated since."""
        before = self._ties_down
        return values.device.type != "cpu" and (
            before is None or before.device == values.device or before.numel() <= values.numel() >> self.ROOM_SHIFT
        )

    @staticmethod
    def _of_their_number(down: Tensor, low: Tensor, start: int, dtype: torch.dtype) -> Tensor:
        return down.nonzero().view(-1).to(dtype).add_(start).cpu()  # the host waits here

    def _of_fixed_length(self, down: Tensor, low: Tensor, start: int, dtype: torch.dtype) -> Tensor:
        room = max(down.numel() >> self.ROOM_SHIFT, self.LEAST_ROOM)
        found = down.nonzero_static(size=room + 1, fill_value=-1).view(-1)
        too_many = found[-1] >= 0
        low.add_(down.logical_and_(too_many), alpha=-1)
        here = found[:-1]
        return torch.where((here < 0) | too_many, -1, here + start).to(dtype)

    def decode(self, parts: Mapping[str, Tensor]) -> Tensor:
        low = parts["low"]
        values = torch.empty(low.numel(), dtype=torch.float32, device=low.device)
        bits, offset = values.view(torch.int32), 0
        for weight in self.weights():
            high, here = weight.view(torch.int16), slice(offset, offset + weight.numel())
            for start, end in passes(low[here]):  # where the values are made: the weight may be on the host
                # 16 bits travel, not 32; and towards the host a copy must end before it is read.
                arrived = high[start:end].to(bits.device, non_blocking=bits.device.type != "cpu")
                part = bits[here][start:end].copy_(arrived)
                part.bitwise_left_shift_(16).add_(low[here][start:end].int())
            offset += weight.numel()
        assert offset == low.numel(), (offset, low.numel())
        if self._ties_down is not None and self._ties_down.numel():
            ties = self._ties_down.to(bits.device)
            bits.index_add_(0, ties.clamp(min=0), (ties >= 0).int() << 16)
        return values


class Bfloat16Moment(Codec):
    """A moment in half the bytes. A second moment moves by a thousandth a step, less than half a bf16 step: rounded to
    nearest it would stand still, so it is rounded stochastically (arXiv 2010.06192)."""

    def __init__(self, stochastic: bool) -> None:
        self.stochastic = stochastic

    def parts(self, numel: int) -> tuple[Part, ...]:
        return (Part("values", torch.bfloat16, numel),)

    def encode(self, values: Tensor, parts: Mapping[str, Tensor], seed: int) -> None:
        kept = parts["values"]
        if not self.stochastic:
            kept.copy_(values)
            return
        generator = torch.Generator(device=values.device)
        generator.manual_seed(seed)
        for start, end in passes(values):
            kept[start:end].copy_(stochastic_bf16(values[start:end], generator))

    def decode(self, parts: Mapping[str, Tensor]) -> Tensor:
        return parts["values"].float()


def stochastic_bf16(values: Tensor, generator: torch.Generator) -> Tensor:
    """fp32 rounded to a neighbouring bf16 at random, with ``values`` as its mean; bf16 values stay.

    As :func:`hift_ds.precision.round_to_bf16_stochastic`, with a quarter of its random numbers: one 64-bit
    draw serves four elements, which is what counts on a CPU.
    """
    num_draws = -(-values.numel() // 4)
    draws = torch.empty(num_draws, dtype=torch.int64, device=values.device)
    draws.random_(-(1 << 63), None, generator=generator)
    noise = draws.view(torch.int16)[: values.numel()].int().bitwise_and_(0xFFFF)
    rounded = noise.add_(values.view(torch.int32)).bitwise_and_(-65536).view(torch.float32)
    return torch.where(torch.isfinite(values), rounded, values).to(torch.bfloat16)


class Int8Moment(Codec):
    """A moment in 8 bits times the largest magnitude of 256 neighbours (:mod:`hift_ds.store.eight_bit`).

    A second moment is kept as its square root, which is what the update divides by: the square would leave
    the range of 8 bits where gradients differ by 10^3, become 0, and blow the update up.
    """

    def __init__(self, nonnegative: bool) -> None:
        self.nonnegative = nonnegative

    def parts(self, numel: int) -> tuple[Part, ...]:
        return (Part("codes", torch.uint8, numel), Part("scales", torch.float32, eight_bit.num_blocks(numel)))

    def encode(self, values: Tensor, parts: Mapping[str, Tensor], seed: int) -> None:
        for codes, scales, start in self._passes(parts):
            piece = values[start : start + codes.numel()]
            eight_bit.encode(piece.sqrt() if self.nonnegative else piece, codes, scales, signed=not self.nonnegative)

    def decode(self, parts: Mapping[str, Tensor]) -> Tensor:
        values = torch.empty(parts["codes"].numel(), dtype=torch.float32, device=parts["codes"].device)
        for codes, scales, start in self._passes(parts):
            piece = values[start : start + codes.numel()]
            eight_bit.decode(codes, scales, piece, signed=not self.nonnegative)
            if self.nonnegative:
                piece.square_()
        return values

    @staticmethod
    def _passes(parts: Mapping[str, Tensor]) -> Iterator[tuple[Tensor, Tensor, int]]:
        for start, end in passes(parts["codes"]):
            first, last = start // eight_bit.BLOCK_NUMEL, eight_bit.num_blocks(end)
            yield parts["codes"][start:end], parts["scales"][first:last], start


def codec_for(names: Collection[str], key: str, dtype: torch.dtype, weights: Weights | None) -> Codec:
    """How ``key`` is kept under the codecs ``names``."""
    base = key.partition(":")[0]
    if dtype == torch.float32:
        if base == MASTER and SPLIT_MASTER in names and weights is not None:
            return SplitMaster(weights)
        if base in FIRST_MOMENTS | SECOND_MOMENTS:
            if INT8_MOMENTS in names:
                return Int8Moment(nonnegative=base in SECOND_MOMENTS)
            if BF16_MOMENTS in names:
                return Bfloat16Moment(stochastic=base in SECOND_MOMENTS)
    return Exact(dtype)
