"""The random generators of one process as JSON: Python's, numpy's, torch's on host and accelerator."""

from __future__ import annotations

import base64
import random
from typing import Any

import numpy
import torch
from torch import Tensor

from hift_ds.checkpoint.json_state import decode, encode


def random_state(device: torch.device) -> dict[str, Any]:
    """The state of every global generator that drawing on ``device`` or the host uses."""
    name, keys, *rest = numpy.random.get_state(legacy=True)
    state: dict[str, Any] = {
        "python": encode(random.getstate()),
        "numpy": [name, numpy.asarray(keys).tolist(), *rest],
        "torch": _to_text(torch.get_rng_state()),
    }
    if device.type != "cpu":
        state["device"] = _to_text(torch.get_device_module(device).get_rng_state(device))
    return state


def set_random_state(state: dict[str, Any], device: torch.device) -> None:
    """Set the generators to what :func:`random_state` gave. A checkpoint of another kind of machine leaves the device's
    generator as it is."""
    random.setstate(decode(state["python"]))
    name, keys, *rest = state["numpy"]
    numpy.random.set_state((name, numpy.array(keys, dtype=numpy.uint32), *rest))
    torch.set_rng_state(_from_text(state["torch"]))
    if device.type != "cpu" and "device" in state:
        torch.get_device_module(device).set_rng_state(_from_text(state["device"]), device)


def _to_text(state: Tensor) -> str:
    return base64.b64encode(state.cpu().numpy().tobytes()).decode()


def _from_text(text: str) -> Tensor:
    return torch.frombuffer(bytearray(base64.b64decode(text)), dtype=torch.uint8)
