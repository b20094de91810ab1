"""DeepSpeed on the fake device of :mod:`hift_ds.simulation.device`: its accelerator and its communication."""

from __future__ import annotations

from contextlib import AbstractContextManager

import torch
from deepspeed.accelerator import set_accelerator
from deepspeed.accelerator.cpu_accelerator import CPU_Accelerator
from deepspeed.runtime.zero import partitioned_param_coordinator

from hift_ds.engine.zero3.same_on_ranks import SameOnRanks
from hift_ds.simulation import device as fake_device

BACKEND = "hift_fake"


class FakeAccelerator(CPU_Accelerator):
    """Answers as a GPU would: asynchronous, with streams and page-locked memory of its own."""

    def __init__(self) -> None:
        super().__init__()
        self._name = fake_device.NAME
        self._communication_backend_name = BACKEND
        self._module = getattr(torch, fake_device.NAME)

    def device_name(self, device_index: int | None = None) -> str:
        return fake_device.NAME if device_index is None else f"{fake_device.NAME}:{device_index}"

    def device(self, device_index: int | None = None) -> AbstractContextManager[None]:
        return self._module.device(device_index)

    def current_device(self) -> int:
        return 0

    def current_device_name(self) -> str:
        return self.device_name(0)

    def device_count(self) -> int:
        return 1

    def is_synchronized_device(self) -> bool:
        return False

    def use_host_timers(self) -> bool:
        return True

    def Stream(self, *args: object, **kwargs: object) -> fake_device.Stream:  # noqa: N802  (DeepSpeed's name)
        return fake_device.Stream()

    def Event(self, *args: object, **kwargs: object) -> fake_device.Event:  # noqa: N802
        return fake_device.Event()

    def stream(self, stream: fake_device.Stream) -> AbstractContextManager[None]:
        return self._module.stream(stream)

    def current_stream(self, device_index: int | None = None) -> fake_device.Stream:
        return self._module.current_stream()

    default_stream = current_stream

    def max_memory_allocated(self, device_index: int | None = None) -> int:
        return 0

    memory_allocated = memory_reserved = max_memory_reserved = max_memory_allocated

    def total_memory(self, device_index: int | None = None) -> int:
        return 1 << 40

    available_memory = total_memory

    def is_fp16_supported(self) -> bool:
        return True

    def create_op_builder(self, class_name: str) -> None:
        """No C++ operator: DeepSpeed would compile its shared-memory collectives, which move nothing here, for a
        minute."""

    def on_accelerator(self, tensor: torch.Tensor) -> bool:
        return tensor.device.type == fake_device.NAME


def use_fake_accelerator() -> None:
    """Have DeepSpeed run on the fake device from here on."""
    set_accelerator(FakeAccelerator())


def join_fake_ranks(world_size: int) -> None:
    """Make this process rank 0 of ``world_size``; collectives allocate what they are given and move nothing."""
    import torch.distributed as dist
    from torch._C._distributed_c10d import FakeProcessGroup
    from torch.testing._internal.distributed.fake_pg import FakeStore

    devices = ["cpu"] + [fake_device.NAME] * hasattr(torch, fake_device.NAME)
    dist.Backend.register_backend(
        BACKEND,
        # torch declares it without options.
        lambda common, options: FakeProcessGroup._create_internal(  # type: ignore[call-arg]
            common.group_rank, common.group_size, options
        ),
        extended_api=True,
        devices=devices,
    )
    dist.init_process_group(BACKEND, store=FakeStore(), rank=0, world_size=world_size)
    # ZeRO-3 compares what the ranks are about to gather: there is one rank, and fake numbers compare as nothing.
    partitioned_param_coordinator.assert_ints_same_as_other_ranks = lambda ints: None
    SameOnRanks.can_ask = False
