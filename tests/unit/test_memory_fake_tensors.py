"""Recipes of operations give what PyTorch's own fake tensors give: sizes, strides, and who shares whose memory."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from hift_ds.simulation.tensors import FakeTensors


def tensors(offset: int = 0):
    whole = torch.empty(9, 4, 6)
    return (
        whole[offset : offset + 2],
        torch.empty(6, 8, dtype=torch.bfloat16),
        torch.empty(4, dtype=torch.int64),
    )


OPERATIONS = {
    "new": lambda a, b, i: a + 1,
    "float scalar on integers": lambda a, b, i: i * 1.0,
    "integer scalar on integers": lambda a, b, i: i * 1,
    "bool scalar on integers": lambda a, b, i: i * True,
    "views": lambda a, b, i: [a.transpose(0, 1), a[1:, 2], a.view(-1), a.expand(5, 2, 4, 6), b.t()],
    "a view or a copy": lambda a, b, i: [a.reshape(8, 6), a.transpose(0, 1).reshape(8, 6)],
    "unsafe view": lambda a, b, i: a @ b.float(),
    "in place": lambda a, b, i: a.mul_(2),
    "out": lambda a, b, i: torch.mm(b.t(), b, out=torch.empty(8, 8, dtype=torch.bfloat16)),
    "several results": lambda a, b, i: [*torch.split(a, 1), *torch.var_mean(a, 0), *a.unbind(1)],
    "bytes": lambda a, b, i: [b.view(torch.int16), a[1].view(torch.uint8)],
    "casts": lambda a, b, i: [b.float(), a.to(torch.bfloat16), b.to(torch.bfloat16)],
    "like": lambda a, b, i: [torch.empty_like(a.transpose(1, 2)), a.new_zeros(3), torch.arange(5)],
    "loss": lambda a, b, i: torch.nn.functional.cross_entropy(a[0], i),
}


def describe(results, inputs):
    results = results if isinstance(results, list) else [results]
    sharing = [[r.untyped_storage()._cdata == x.untyped_storage()._cdata for x in inputs] for r in results]
    return [
        (
            tuple(r.shape),
            r.stride(),
            r.dtype,
            r.device,
            r.storage_offset(),
            r.untyped_storage().nbytes(),
            shared,
        )
        for r, shared in zip(results, sharing, strict=True)
    ]


@pytest.mark.parametrize("name", OPERATIONS)
def test_an_operation_seen_before_gives_the_same_as_pytorch(name):
    found = {}
    for mode in (FakeTensorMode(allow_non_fake_inputs=True), FakeTensors()):
        with mode:
            for time in ("first", "second", "elsewhere in memory"):
                inputs = tensors(3 if time == "elsewhere in memory" else 0)
                found[type(mode), time] = describe(OPERATIONS[name](*inputs), inputs)
    for time in ("first", "second", "elsewhere in memory"):
        assert found[FakeTensors, time] == found[FakeTensorMode, time]


def test_recipes_are_used():
    with FakeTensors() as mode:
        torch.empty(3) + 1
        recipes = dict(mode._recipes)
        torch.empty(3) + 1
        assert mode._recipes == recipes and all(recipes.values())
        torch.empty(4) + 1
        assert len(mode._recipes) == 2 * len(recipes)


def test_values_that_nobody_has():
    with FakeTensors():
        assert torch.empty(()).item() == 1.0
        assert torch.empty((), dtype=torch.int64).item() == 1
        assert bool(torch.empty((), dtype=torch.bool)) is False
        assert torch.empty(4, 5).nonzero().shape == (0, 2)
        assert torch.empty(7)[torch.empty(7, dtype=torch.bool)].shape == (0,)


def test_values_from_the_host_go_to_the_device_without_being_computed_with():
    """The device has no kernels. In a process of its own, since it changes the process."""
    code = """
import torch
from hift_ds.simulation.device import fake_device
with fake_device() as device:
    x = torch.empty(3, 4, 5, device=device)
    assert x[:, [2]].shape == (3, 1, 5) and x[..., torch.tensor([0, 1])].shape == (3, 4, 2)
    copy = torch.tensor([1.0, 2.0]).to(device, torch.bfloat16)
    assert copy.device.type == device and copy.dtype == torch.bfloat16
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
