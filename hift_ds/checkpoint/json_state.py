"""Small Python values as strict JSON and back, exactly: what optimizers and callers keep beside tensors.

JSON alone loses tuples, non-string keys, infinities and the dtype of a 0-dim tensor ("step"), so those are
written as one-entry objects whose key starts with ``$``. Nothing here can run code when it is read.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor


def encode(value: Any) -> Any:
    """``value`` as something that ``json.dumps(..., allow_nan=False)`` takes.

    Raises:
        TypeError: a type that has no exact JSON form (an array, a tensor with elements, an object).
    """
    if value is None or type(value) in (bool, int, str):
        return value
    if type(value) is float:
        return value if math.isfinite(value) else {"$float": repr(value)}
    if type(value) is list:
        return [encode(item) for item in value]
    if type(value) is tuple:
        return {"$tuple": [encode(item) for item in value]}
    if type(value) is Counter:
        return {"$counter": [[encode(k), n] for k, n in value.items()]}
    if isinstance(value, dict):
        if all(type(key) is str and not key.startswith("$") for key in value):
            return {key: encode(item) for key, item in value.items()}
        return {"$items": [[encode(key), encode(item)] for key, item in value.items()]}
    if isinstance(value, Tensor) and value.dim() == 0:
        return {"$tensor": encode(value.item()), "dtype": str(value.dtype).removeprefix("torch.")}
    raise TypeError(f"{type(value).__name__} has no exact JSON form")


def decode(value: Any) -> Any:
    """Give back what :func:`encode` was given. 0-dim tensors come back on the host."""
    if isinstance(value, list):
        return [decode(item) for item in value]
    if not isinstance(value, dict):
        return value
    if "$float" in value:
        return float(value["$float"])
    if "$tuple" in value:
        return tuple(decode(item) for item in value["$tuple"])
    if "$counter" in value:
        return Counter({decode(key): count for key, count in value["$counter"]})
    if "$items" in value:
        return {decode(key): decode(item) for key, item in value["$items"]}
    if "$tensor" in value:
        return torch.tensor(decode(value["$tensor"]), dtype=getattr(torch, value["dtype"]))
    return {key: decode(item) for key, item in value.items()}


def split_encodable(values: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """(encoded, the rest): by top-level key, what has an exact JSON form and what has not."""
    encoded: dict[str, Any] = {}
    rest: dict[str, Any] = {}
    for key, value in values.items():
        try:
            encoded[key] = encode(value)
        except TypeError:
            rest[key] = value
    return encoded, rest
