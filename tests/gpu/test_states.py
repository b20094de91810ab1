"""On an accelerator: side streams, page-locked memory and the disk behind them change no bit."""

from __future__ import annotations

import pytest
import torch

from hift_ds.store.movers import StreamMover
from hift_ds.store.page_locked import SLAB_BYTES
from tests.helpers.engines import ds_config, make_engine, train_step
from tests.helpers.toy import Toy, make_batches

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.accelerator.is_available(), reason="needs an accelerator"),
]
BF16 = {"bf16": {"enabled": True}}


def trajectory(state, **config):
    model = Toy()
    engine = make_engine(model, ds_config(hift={"state": state}, **BF16, **config))
    weights, reports = [], []
    try:
        for batch in make_batches(17):
            train_step(engine, [tuple(part.to(engine.device) for part in batch)])
            reports.append(engine.last_report)
            weights.append([p.detach().cpu() for p in model.parameters()])
        if state.get("prefetch", True) and state["residency"] == "host" and state.get("step_on") != "host":
            assert isinstance(engine.optimizer.store.mover, StreamMover)
    finally:
        engine.destroy()
    return weights, reports


@pytest.mark.parametrize("codec", ["fp32", "split_master", "bf16_moments", "split_master+int8_moments"])
def test_no_bit_depends_on_where_states_rest(codec, tmp_path):
    expected, _ = trajectory({"residency": "device", "codec": codec})
    for residency in ("host", "disk"):
        for prefetch, slots in ((False, 1), (True, 1), (True, 2)):
            state = {"residency": residency, "prefetch": prefetch, "slots": slots, "codec": codec}
            if residency == "disk":
                state["path"] = str(tmp_path)
            weights, reports = trajectory(state)
            assert all(
                torch.equal(x, y) for a, b in zip(weights, expected, strict=True) for x, y in zip(a, b, strict=True)
            ), state
            assert sum(report.transfer_s for report in reports) > 0


def test_a_step_on_the_host_follows_one_on_the_device():
    """Other kernels, so not bit for bit."""
    expected, _ = trajectory({"residency": "host"})
    weights, reports = trajectory({"residency": "host", "step_on": "host"})
    apart = max((x.float() - y.float()).abs().max() for x, y in zip(weights[-1], expected[-1], strict=True))
    assert apart < 2e-2 and all(report.state_bytes_in > 0 for report in reports)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="asks CUDA's allocator")
def test_page_locked_memory_goes_back_to_the_system():
    """Torch would keep it, and the next engine find no room beside it."""
    torch.cuda.init()

    def page_locked():
        return torch.cuda.host_memory_stats()["allocated_bytes.current"]

    before = page_locked()
    for _ in range(2):
        engine = make_engine(Toy(), ds_config(hift={"state": {"residency": "host"}}, **BF16))
        for batch in make_batches(3):
            train_step(engine, [tuple(part.to(engine.device) for part in batch)])
        assert page_locked() - before >= SLAB_BYTES
        engine.destroy()
        assert page_locked() - before < SLAB_BYTES
