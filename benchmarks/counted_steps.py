"""Any way of training on the simulation's fake device: the bytes that a GPU would allocate, where there is no GPU, no
memory and no time for the model. How, and how near it comes to torch's allocator: docs/memory.md."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

from benchmarks import forked_steps as forked


def on_fake_device(shape: str, dtype: Any, device: str) -> Any:
    """The model of one of ``forked_steps.SHAPES`` as :func:`forked_steps.build` makes it, its weights on ``device``."""
    from torch._subclasses.fake_tensor import unset_fake_temporarily

    from hift_ds.hf.model_structure import build_on_meta
    from hift_ds.simulation.step import make_real

    with unset_fake_temporarily():
        model = build_on_meta(forked.shape_config(shape))
    make_real(model, dtype, device)
    return model.train()


class CountedSteps:
    """A way of training that takes its steps on the fake device; what it has allocated there is logged.

    DeepSpeed's accelerator is the fake one from here on: for a process of its own.

    Args:
        make: builds it, in the name of the device.
        rows, length: of a batch.
        count: steps, enough that every part of the model has had its turn.
    """

    def __init__(self, make: Callable[[str], forked.Steps], rows: int, length: int, count: int) -> None:
        import torch.distributed as dist

        from hift_ds.simulation.accelerator import join_fake_ranks, use_fake_accelerator
        from hift_ds.simulation.device import fake_device
        from hift_ds.simulation.tracker import MemoryTracker, Watch

        self.rows, self.length, self.count = rows, length, count
        self._inside = contextlib.ExitStack()
        self.device = self._inside.enter_context(fake_device())
        if not dist.is_initialized():
            join_fake_ranks(1)
            use_fake_accelerator()
        self.tracker = MemoryTracker(self.device)
        self._inside.enter_context(Watch(self.tracker))
        self.way = make(self.device)

    def step(self, batch: dict[str, Any]) -> None:
        """One step; only the batch's shape matters."""
        import torch

        ids = torch.zeros(batch["input_ids"].shape, dtype=torch.long, device=self.device)
        self.way.step({"input_ids": ids, "labels": ids.clone()})

    def peak_bytes(self) -> int:
        """Take all steps.

        Returns:
            The most bytes that were allocated at once, the building of the model and its optimizer included.

        Raises:
            RuntimeError: DeepSpeed's engine skipped a step, whose states are missing then.
        """
        import torch

        from hift_ds.simulation.tracker import Timeline

        for _ in range(self.count):
            self.step({"input_ids": torch.empty(self.rows, self.length)})
        if skipped := getattr(getattr(self.way, "engine", None), "skipped_steps", 0):
            raise RuntimeError(f"{skipped} of {self.count} steps were skipped")
        return Timeline(self.tracker).peak(0, len(self.tracker.events)).num_bytes

    def close(self) -> None:
        """Real tensors again."""
        self._inside.close()
