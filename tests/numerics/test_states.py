"""Where states rest and how they move changes no bit of the weights; compact forms change what they are said to."""

import copy

import pytest
import torch

from hift_ds.errors import ConfigError
from tests.helpers.engines import ds_config, largest_difference, make_engine, train_step
from tests.helpers.toy import Toy, make_batches

BF16 = {"bf16": {"enabled": True}}


def trajectory(state, *, model=None, steps=17, between=None, hift=None, lr=1e-2, **config):
    """Weights after each step, and the engine's reports."""
    model = copy.deepcopy(model) if model is not None else Toy()
    engine = make_engine(model, ds_config(lr=lr, hift={"state": state, **(hift or {})}, **config))
    weights, reports = [], []
    try:
        for step, batch in enumerate(make_batches(steps)):
            train_step(engine, [batch])
            reports.append(engine.last_report)
            weights.append([p.detach().clone() for p in model.parameters()])
            if between:
                between(engine, step)
    finally:
        engine.destroy()
    return weights, reports


def same(a, b):
    return all(torch.equal(x, y) for xs, ys in zip(a, b, strict=True) for x, y in zip(xs, ys, strict=True))


@pytest.fixture(scope="module")
def resident():
    """What states that never move give, in fp32 and in bf16 with masters."""
    return {name: trajectory({"residency": "device"}, **more)[0] for name, more in {"fp32": {}, "bf16": BF16}.items()}


def ways(tmp_path):
    for residency in ("host", "disk"):
        for prefetch, slots in ((False, 1), (True, 1), (True, 2)):
            state = {"residency": residency, "prefetch": prefetch, "slots": slots}
            yield {**state, "path": str(tmp_path)} if residency == "disk" else state


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_no_bit_depends_on_where_states_rest(precision, resident, tmp_path):
    for state in ways(tmp_path):
        weights, _ = trajectory(state, **(BF16 if precision == "bf16" else {}))
        assert same(weights, resident[precision]), state
    assert not [p for p in tmp_path.iterdir() if p.name.startswith("hift-states")]
