"""What keeps the tests of the CPU off a GPU, and what the tests of the GPU expect of memory, where both can be had."""

import os
import sys

import pytest

from tests.conftest import asks_for_gpu_tests
from tests.helpers.engines import config_with_slots, layers_of, make_engine, train_step


def test_accelerators_are_hidden_unless_their_tests_are_asked_for():
    assert asks_for_gpu_tests(["-q", "-m", "gpu", "tests/gpu"])
    assert asks_for_gpu_tests(["-mgpu and not slow"])
    for arguments in ([], ["-m", "slow", "tests/gpu"], ["-m", "not gpu"], ["-q", "tests/gpu"]):
        assert not asks_for_gpu_tests(arguments), arguments
    if not asks_for_gpu_tests(sys.argv):
        assert os.environ["CUDA_VISIBLE_DEVICES"] == "" and os.environ["DS_ACCELERATOR"] == "cpu"


@pytest.mark.parametrize("slots", [0, 1, 2])
def test_bytes_on_the_update_device_between_steps(slots):
    """As in tests/gpu: with prefetch the slots stay, two tensors of the largest group each."""
    model, batch = layers_of(16)
    engine = make_engine(model, config_with_slots(4, slots))
    for _ in range(4):
        train_step(engine, [batch])
    held = sum(slot.memory.numel() for slot in engine.optimizer.store._slots)
    assert held == 2 * slots * 16 * 16 * 4
    assert engine.last_report.state_bytes_out == 2 * 16 * 16 * 4
    engine.destroy()


@pytest.mark.parametrize("given", [{}, {"PYTORCH_CUDA_ALLOC_CONF": "max_split_size_mb:128"}])
def test_hift_ds_train_asks_for_segments_that_grow(given, monkeypatch):
    """What the estimates assume of the allocator; a choice of the user's stands."""
    from hift_ds.train import worker

    for name in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"):
        monkeypatch.delenv(name, raising=False)
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):
        monkeypatch.setenv(name, "0" if name != "WORLD_SIZE" else "1")
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("os.environ", dict(os.environ))
    worker._join_job(None)
    assert os.environ.get("PYTORCH_ALLOC_CONF") == (None if given else "expandable_segments:True")
