"""Names of dtypes: ours in run files and commands ("bf16"), torch's ("bfloat16"), those of safetensors files ("BF16").

Loads no library until a function needs one.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    import torch

Dtype = Literal["fp32", "bf16", "fp16"]

# What weights may be trained and exported in.
TORCH_NAMES: dict[Dtype, str] = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}

_CODES = {  # of safetensors files, with torch's names
    "F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16",
    "F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2",
    "I64": "int64", "I32": "int32", "I16": "int16", "I8": "int8", "U8": "uint8", "BOOL": "bool",
    "U64": "uint64", "U32": "uint32", "U16": "uint16", "C64": "complex64",
}  # fmt: skip
CODES = tuple(_CODES)
_CODE_OF = {name: code for code, name in _CODES.items()}


def torch_name(dtype: Any) -> str:
    """The name that torch gives a dtype, without "torch.": of a ``torch.dtype`` or of a config's text."""
    return str(dtype).removeprefix("torch.")


def short_name(dtype: Any) -> Dtype | None:
    """Our name of a dtype, given as a ``torch.dtype`` or by torch's name; ``None`` where weights are not trained in
    it."""
    name = torch_name(dtype)
    return next((ours for ours, theirs in TORCH_NAMES.items() if theirs == name), None)


def torch_dtype(name: Dtype) -> torch.dtype:
    """The ``torch.dtype`` of one of our names."""
    import torch

    return getattr(torch, TORCH_NAMES[name])


def from_safetensors(code: str) -> torch.dtype | None:
    """The ``torch.dtype`` of the code in a safetensors header; ``None`` for one that we do not read."""
    import torch

    return getattr(torch, _CODES[code]) if code in _CODES else None


def safetensors_code(dtype: torch.dtype) -> str:
    """The code that a safetensors header has for ``dtype``.

    Raises:
        KeyError: the format has none.
    """
    return _CODE_OF[torch_name(dtype)]
