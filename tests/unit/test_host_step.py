"""Gradients down and weights up for a step on the host: right although copies run as late as they may."""

import pytest
import torch

from hift_ds.optim import host_step
from hift_ds.optim.host_step import HostStep
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
