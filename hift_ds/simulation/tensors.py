"""Fake tensors, several times faster than PyTorch's mode alone: an operation is worked out once for each set of shapes.

PyTorch's own cache describes every argument in seventeen fields and leaves out operators that are not built in. Here
the arguments are what decides sizes (shape, strides, dtype, device) and the results are kept as recipes. An operation
that this does not cover takes PyTorch's way.
"""

from __future__ import annotations

import functools
from collections.abc import Hashable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, in_kernel_invocation_manager

_DEVICE = torch.ops.prim.device.default
_SCALAR = torch.ops.aten._local_scalar_dense.default
_NONZERO = torch.ops.aten.nonzero.default
_TO_COPY = torch.ops.aten._to_copy.default
_PLAIN = (int, float, bool, str, type(None), torch.dtype, torch.device, torch.layout, torch.memory_format)
_UNPREDICTABLE = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape, torch.Tag.inplace_view}


@dataclass(frozen=True, slots=True)
class _Result:
    """How to make one result.

    Attributes:
        argument: the tensor argument whose storage it shares; ``None``: a new one.
        is_argument: it is that argument.
        offset: in bytes, from where the argument starts.
    """

    argument: int | None = None
    is_argument: bool = False
    offset: int = 0
    shape: tuple[int, ...] = ()
    stride: tuple[int, ...] = ()
    dtype: torch.dtype | None = None
    device: torch.device | None = None


_Nothing = type(None)  # stands for the result of operations that return None and only change their arguments


class _CannotTell(Exception):
    """The operation's results do not follow from the sizes of its arguments, or not simply."""


class FakeTensors(FakeTensorMode):
    """A mode under which tensors are fake. They have no values: numbers read from them are 1, and nothing is
    nonzero."""

    def __init__(self) -> None:
        super().__init__(allow_non_fake_inputs=True)
        self._recipes: dict[tuple[Hashable, ...], tuple[type, tuple[_Result | None, ...]] | None] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is _DEVICE and isinstance(args[0], FakeTensor):
            return args[0].device
        if func is _SCALAR:
            dtype = args[0].dtype
            return False if dtype == torch.bool else (1.0 if dtype.is_floating_point else 1)
        if func is _NONZERO:
            return args[0].new_empty((0, args[0].dim()), dtype=torch.int64)
        kwargs = kwargs or {}
        if func is _TO_COPY and _has_values(args[0]) and kwargs.get("device", args[0].device).type != "cpu":
            with self:
                return torch.empty(args[0].shape, dtype=kwargs.get("dtype") or args[0].dtype, device=kwargs["device"])
        if func.namespace == "profiler":  # no tensors in it
            return func(*args, **kwargs)
        tensors: list[FakeTensor] = []
        try:
            key = (
                func,
                torch.get_default_dtype(),
                *_describe(args, tensors),
                *_describe(kwargs.items(), tensors),
            )
        except _CannotTell:
            return super().__torch_dispatch__(func, types, args, kwargs)
        if key in self._recipes:
            recipe = self._recipes[key]
            if recipe is not None:
                return self._made(recipe, tensors)
            return super().__torch_dispatch__(func, types, args, kwargs)
        out = super().__torch_dispatch__(func, types, args, kwargs)
        try:
            self._recipes[key] = _recipe(func, out, tensors)
        except _CannotTell:
            self._recipes[key] = None
        return out

    def _made(self, recipe: tuple[type, tuple[_Result | None, ...]], tensors: list[FakeTensor]) -> object:
        kind, results = recipe
        if kind is _Nothing:
            return None
        made = [None if result is None else self._make(result, tensors) for result in results]
        return made[0] if kind is Tensor else kind(made)

    def _make(self, result: _Result, tensors: list[FakeTensor]) -> FakeTensor:
        if result.is_argument:
            assert result.argument is not None
            return tensors[result.argument]
        with in_kernel_invocation_manager(self):
            new = torch.empty_strided(result.shape, result.stride, dtype=result.dtype, device="meta")
            if result.argument is not None:
                shared = tensors[result.argument]
                offset = _byte_offset(shared) + result.offset
                assert offset % new.element_size() == 0
                new.set_(shared.untyped_storage(), offset // new.element_size(), result.shape, result.stride)
        return FakeTensor(self, new, result.device)


def _has_values(tensor: Tensor) -> bool:
    """A tensor of the host that PyTorch's mode would compute with, such as the list in ``x[:, [3]]``."""
    return not isinstance(tensor, FakeTensor) or tensor.constant is not None


def _describe(values: Iterable[object], tensors: list[FakeTensor]) -> Iterator[Hashable]:
    """What decides the sizes of an operation's results, hashable. The tensors among ``values`` go to ``tensors``."""
    for value in values:
        if isinstance(value, FakeTensor):
            if value.constant is not None or value.layout is not torch.strided or value.dtype.is_complex:
                raise _CannotTell
            tensors.append(value)
            yield value.shape, value.stride(), value.dtype, value.fake_device
        elif isinstance(value, list | tuple):
            yield tuple(_describe(value, tensors))
        elif isinstance(value, _PLAIN):
            yield type(value), value  # 1 and 1.0 and True are equal and lead to different dtypes
        else:
            raise _CannotTell


def _recipe(func: OpOverload, out: object, tensors: list[FakeTensor]) -> tuple[type, tuple[_Result | None, ...]]:
    """How ``out`` follows from ``tensors``."""
    if _UNPREDICTABLE & set(func.tags):
        raise _CannotTell
    if out is None:
        return _Nothing, ()
    if isinstance(out, list | tuple):
        return (list if isinstance(out, list) else tuple), tuple(
            None if one is None else _result(one, tensors) for one in out
        )
    return Tensor, (_result(out, tensors),)


def _result(out: object, tensors: list[FakeTensor]) -> _Result:
    if not isinstance(out, FakeTensor) or out.constant is not None or out.layout is not torch.strided:
        raise _CannotTell
    for index, tensor in enumerate(tensors):
        if out is tensor:
            return _Result(index, is_argument=True)
    as_it_is = functools.partial(
        _Result, shape=tuple(out.shape), stride=out.stride(), dtype=out.dtype, device=out.fake_device
    )
    for index, tensor in enumerate(tensors):
        if out.untyped_storage()._cdata == tensor.untyped_storage()._cdata:
            return as_it_is(argument=index, offset=_byte_offset(out) - _byte_offset(tensor))
    spans = sum((length - 1) * stride for length, stride in zip(out.shape, out.stride(), strict=True)) + 1
    num_bytes = spans * out.element_size() if out.numel() else 0
    if out.storage_offset() != 0 or out.untyped_storage().nbytes() != num_bytes:
        raise _CannotTell
    return as_it_is()


def _byte_offset(tensor: FakeTensor) -> int:
    return int(tensor.storage_offset()) * tensor.element_size()
