"""What only an accelerator can show. Run with ``make test-gpu``; skipped where there is none."""

import copy

import pytest
import torch

from hift_ds.reference import ReferenceHiFT
from tests.helpers.engines import (
    config_with_slots,
    ds_config,
    largest_difference,
    layers_of,
    make_engine,
    train_step,
)
from tests.helpers.toy import Toy, loss_of, make_batches

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an accelerator"),
]
DEVICE = "cuda"


def on_device(batch):
    return tuple(part.to(DEVICE) for part in batch)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("state", [{"residency": "device"}, {}, {"pin_memory": False}, {"slice_numel": 17}])
def test_engine_equals_the_reference_on_the_accelerator(dtype, state):
    model = Toy().to(DEVICE)
    twin = copy.deepcopy(model)
    more = {} if dtype == "fp32" else {"bf16": {"enabled": True}}
    if dtype == "bf16":
        model, twin = model.bfloat16(), twin.bfloat16()
    engine = make_engine(model, ds_config(clip=0.05, hift={"state": state}, **more))
    reference = ReferenceHiFT(
        twin,
        [group.param_names for group in engine.groups],
        lambda named: torch.optim.AdamW([p for _, p in named], lr=1e-2, fused=True),
        max_grad_norm=0.05,
    )
    for batch in map(on_device, make_batches(15)):
        train_step(engine, [batch])
        reference.step([batch], loss_of)
        assert largest_difference(model, twin) <= (1e-6 if dtype == "fp32" else 1e-2)
    engine.destroy()


def test_update_on_the_host_agrees_with_the_device():
    weights = []
    for step_on in ("device", "host"):
        model = Toy().to(DEVICE)
        engine = make_engine(model, ds_config(hift={"state": {"step_on": step_on}}))
        for batch in map(on_device, make_batches(15)):
            train_step(engine, [batch])
        weights.append(copy.deepcopy(model))
        engine.destroy()
    assert largest_difference(*weights) < 1e-5


@pytest.mark.parametrize("slots", [0, 1, 2])
def test_states_are_off_the_accelerator_between_steps(slots):
    """All but those of the groups in slots: a 12M-parameter layer in four, 384 MiB of AdamW states, 96 of each."""
    model, batch = layers_of(3464)
    model.to(DEVICE)
    engine = make_engine(model, config_with_slots(4, slots))
    before = torch.cuda.memory_allocated()
    for _ in range(4):
        train_step(engine, [tuple(part.to(DEVICE) for part in batch)])
    group_bytes = 3464 * 3464 * 4
    between = torch.cuda.memory_allocated() - before
    # Beside the slots cuBLAS's workspaces, of two threads.
    assert 2 * slots * group_bytes <= between < 2 * slots * group_bytes + (80 << 20), between
    report = engine.last_report
    assert report.state_bytes_out == 2 * group_bytes and report.peak_bytes > 4 * group_bytes
    engine.destroy()
