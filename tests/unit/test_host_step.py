"""Gradients down and weights up for a step on the host: right although copies run as late as they may."""

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from hift_ds.optim import host_step
from hift_ds.optim.host_step import HostStep, HostUpdates
from hift_ds.optim.piecewise import PieceUpdate, PiecewiseOptimizer
from hift_ds.store.base import Traffic
from tests.helpers import fake_streams

CPU = torch.device("cpu")


@pytest.mark.parametrize("streams", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_every_part_arrives(dtype, streams, monkeypatch):
    if streams:
        fake_streams.use_fake_streams(monkeypatch)
        monkeypatch.setattr(host_step, "streams_of", lambda device: fake_streams.FakeStreams())
    traffic = Traffic()
    carrier = HostStep(traffic, CPU)
    weights = [torch.zeros(numel, dtype=dtype) for numel in (5, 700, 3, 1000, 64, 1000)]
    grads = [torch.randn(weight.numel(), dtype=dtype) for weight in weights]
    for weight, grad in zip(weights, grads, strict=True):
        down = carrier.gradient(grad)
        assert down.dtype == torch.float32 and torch.equal(down, grad.float())
        carrier.send_weight(weight, down * 3, None)
    carrier.finish()
    for weight, grad in zip(weights, grads, strict=True):
        assert torch.equal(weight, (grad.float() * 3).to(dtype))
    taken = traffic.take()
    assert taken.bytes_in == taken.bytes_out == sum(w.numel() for w in weights) * dtype.itemsize
    carrier.close()
    assert not any(buffer.numel() for buffer in (*carrier._for_gradients, *carrier._for_weights))


def test_a_gradient_comes_down_while_the_host_updates_with_the_one_before(monkeypatch):
    fake_streams.use_fake_streams(monkeypatch)
    monkeypatch.setattr(host_step, "streams_of", lambda device: fake_streams.FakeStreams())
    carrier = HostStep(Traffic(), CPU)
    grads = [torch.full((4,), float(value)) for value in range(1, 6)]
    carrier.expect(grads[0])
    for at, grad in enumerate(grads):
        if at + 1 < len(grads):
            carrier.expect(grads[at + 1])
        assert torch.equal(carrier.gradient(grad).mul_(2), grad * 2)
    carrier.close()


def test_weights_travel_while_the_host_goes_on(monkeypatch):
    fake_streams.use_fake_streams(monkeypatch)
    monkeypatch.setattr(host_step, "streams_of", lambda device: fake_streams.FakeStreams())
    carrier = HostStep(Traffic(), CPU)
    weights = [torch.zeros(4) for _ in range(3)]
    for value, weight in enumerate(weights, start=1):
        carrier.send_weight(weight, torch.full((4,), float(value)), None)
    assert [weight[0].item() for weight in weights] == [1, 0, 0]  # the first made room for the third
    carrier.finish()
    assert [weight[0].item() for weight in weights] == [1, 2, 3]
    carrier.close()


def test_host_and_device_step_at_the_same_time():
    """Each with its own weights, although both are the user's optimizer."""
    both = threading.Barrier(2, timeout=30)

    def meet(*_):
        both.wait()

    base = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.0)
    # Each has put its weights where step() looks for them; and neither has taken them away yet.
    base.register_step_pre_hook(meet)
    base.register_step_post_hook(meet)
    updates = HostUpdates(base, CPU, on_thread=False)
    pieces = [PieceUpdate(torch.zeros(3), torch.full((3,), grad), 0, None) for grad in (1.0, 2.0)]
    with ThreadPoolExecutor(2) as pool:
        sides = zip((PiecewiseOptimizer(base), updates.piecewise), pieces, strict=True)
        for done in [pool.submit(side.step, [piece], [0.5], {}) for side, piece in sides]:
            done.result()
    assert [piece.target.tolist() for piece in pieces] == [[-0.5] * 3, [-1.0] * 3]
    updates.close()
