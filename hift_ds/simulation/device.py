"""A device that has sizes and no memory: PyTorch's spare backend, renamed, under fake tensors.

The real engine runs its real step on it, and a :class:`~hift_ds.simulation.tracker.MemoryTracker` counts what that
allocates. Registering a backend changes the whole process (``torch.accelerator`` reports it), so this belongs in a
process of its own: :mod:`hift_ds.forecast.setting`.

What is replaced while :func:`fake_device` is active, because fake tensors cannot do it:

* ``Module._apply`` (``.to()``, ``.cuda()``): swaps tensors in place, which fake ones refuse;
* ``torch.tensor`` on the device: builds its data below the dispatcher;
* reading values: there are none (:mod:`hift_ds.simulation.tensors`);
* ``torch.Generator`` on the device: is one on the CPU;
* ``Tensor.data_ptr``: zero for all; here the address of the storage, so that views are told from copies;
* ``Tensor.record_stream``: no streams, and nothing to be freed early;
* ``scaled_dot_product_attention``: the CPU's way would hold the scores (:mod:`hift_ds.simulation.attention`).
"""

from __future__ import annotations

import contextlib
import types
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import backend_registration

from hift_ds.errors import ConfigError
from hift_ds.forecast.setting import torch_has_fake_devices

NAME = "fakegpu"
Device = str | int | torch.device | None
_registered: list[object] = []  # what must outlive registration: torch keeps no reference


def register() -> None:
    """Make ``torch.device(NAME)`` known to this process. Once; there is no way back.

    Raises:
        ConfigError: this torch has no such interface.
    """
    if _registered:
        return
    if not torch_has_fake_devices():
        raise ConfigError(f"torch {torch.__version__} has no fake devices; counting memory needs torch 2.8 or later")
    module = _DeviceModule()
    backend_registration._setup_privateuseone_for_python_backend(NAME, backend_module=module)
    from hift_ds.simulation import autocast as fake_autocast

    _registered.extend([module, _in_place_kernels(), *fake_autocast.register(NAME)])


def _in_place_kernels() -> torch.library.Library:
    """Fused optimizer kernels that torch has no sizes for: they change what they are given and make nothing."""
    library = torch.library.Library("aten", "IMPL", "Meta")
    for name in ("_fused_sgd_", "_fused_adagrad_"):
        packet = getattr(torch.ops.aten, name, None)
        for overload in packet.overloads() if packet is not None else ():
            op = getattr(packet, overload)
            if not torch._C._dispatch_has_kernel_for_dispatch_key(op.name(), "Meta"):
                library.impl(op.name().removeprefix("aten::"), lambda *args, **kwargs: None)
    return library


@contextlib.contextmanager
def fake_device(on_host: bool = False) -> Iterator[str]:
    """Inside, tensors are fake, and the device whose name it gives can be allocated on.

    Args:
        on_host: take the CPU for it, if this torch has no fake devices.
    """
    from hift_ds.simulation import attention as flash_attention
    from hift_ds.simulation.tensors import FakeTensors

    if not on_host:
        register()
    flash_attention.register_flops()
    flash_attention.register_unpadded_masks()
    replaced = [
        (nn.Module, "_apply", _apply),
        (torch, "tensor", _tensor_maker(torch.tensor)),
        (torch, "Generator", _Generator),
        (torch.Tensor, "data_ptr", _address),
        (torch.Tensor, "record_stream", lambda self, stream: None),
        (torch.UntypedStorage, "data_ptr", lambda self: self._cdata),
        (nn.functional, "scaled_dot_product_attention", flash_attention.scaled_dot_product_attention),
    ]
    saved = [(owner, name, owner.__dict__.get(name)) for owner, name, _ in replaced]
    lifted = torch._C._only_lift_cpu_tensors()
    with FakeTensors(), torch.autograd.set_multithreading_enabled(False):  # the next line is for one thread
        # Lists as indices: made on the host, then moved by the dispatcher.
        torch._C._set_only_lift_cpu_tensors(True)
        for owner, name, function in replaced:
            setattr(owner, name, function)
        try:
            yield "cpu" if on_host else NAME
        finally:
            torch._C._set_only_lift_cpu_tensors(lifted)
            for owner, name, function in saved:
                if function is None:
                    delattr(owner, name)  # inherited before
                else:
                    setattr(owner, name, function)


class _Generator(torch.Generator):
    """Randomness has no size."""

    def __new__(cls, device: str | torch.device = "cpu") -> _Generator:
        # torch declares no ``__new__``.
        return super().__new__(cls, device="cpu" if torch.device(device).type == NAME else device)  # type: ignore[call-arg]


def _address(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata + tensor.storage_offset() * tensor.element_size()


def _apply(module: nn.Module, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
    """``Module._apply`` that keeps every tensor which ``fn`` does not change."""
    for inner in module.modules() if recurse else [module]:
        places: list[dict[str, Any]] = [inner._parameters, inner._buffers]
        for tensors in places:
            for key, old in tensors.items():
                if old is None:
                    continue
                with torch.no_grad():
                    new = fn(old)
                if new.dtype != old.dtype or new.device != old.device:
                    tensors[key] = nn.Parameter(new, old.requires_grad) if tensors is inner._parameters else new
    return module


def _tensor_maker(real: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def tensor(
        data: object, *, dtype: torch.dtype | None = None, device: Device = None, requires_grad: bool = False,
        **other: object,
    ) -> Tensor:  # fmt: skip
        from torch._subclasses.fake_tensor import unset_fake_temporarily

        if device is None or torch.device(device).type != NAME:
            return real(data, dtype=dtype, device=device, requires_grad=requires_grad, **other)
        with unset_fake_temporarily():
            on_host = real(data, dtype=dtype, device="cpu")
        return torch.empty(on_host.shape, dtype=on_host.dtype, device=device, requires_grad=requires_grad)

    return tensor


class Stream:
    """A stream whose work is in order because there is only one."""

    def __init__(self, *args: object, **kwargs: object) -> None: ...

    def wait_stream(self, stream: Stream) -> None: ...

    def wait_event(self, event: Event) -> None: ...

    def record_event(self, event: Event | None = None) -> Event:
        return event or Event()

    def synchronize(self) -> None: ...

    def query(self) -> bool:
        return True

    def __enter__(self) -> Stream:
        return self

    def __exit__(self, *error: object) -> None: ...


class Event:
    """A mark that the device has always passed."""

    def __init__(self, *args: object, **kwargs: object) -> None: ...

    def record(self, stream: Stream | None = None) -> None: ...

    def wait(self, stream: Stream | None = None) -> None: ...

    def synchronize(self) -> None: ...

    def query(self) -> bool:
        return True

    def elapsed_time(self, end: Event) -> float:
        return 0.0


_Stream = Stream  # in the class below the name is taken


class _DeviceModule(types.ModuleType):
    """``torch.fakegpu``."""

    Stream = Stream
    Event = Event

    def __init__(self) -> None:
        super().__init__(f"torch.{NAME}")
        self._stream = Stream()

    def is_initialized(self) -> bool:
        return True

    def is_available(self) -> bool:
        return True

    def device_count(self) -> int:
        return 1

    def current_device(self) -> int:
        return 0

    def set_device(self, device: Device) -> None: ...

    def synchronize(self, device: Device = None) -> None: ...

    def empty_cache(self) -> None: ...

    def current_stream(self, device: Device = None) -> _Stream:
        return self._stream

    default_stream = current_stream

    def stream(self, stream: _Stream) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()

    def device(self, device: Device) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.float16, torch.bfloat16]

    def get_rng_state(self, device: Device = None) -> Tensor:
        return torch.empty(16, dtype=torch.uint8)

    def set_rng_state(self, state: Tensor, device: Device = None) -> None: ...

    def manual_seed(self, seed: int) -> None: ...

    manual_seed_all = manual_seed

    def initial_seed(self) -> int:
        return 0

    def _is_in_bad_fork(self) -> bool:
        return False

    def memory_allocated(self, device: Device = None) -> int:
        return 0

    max_memory_allocated = memory_reserved = max_memory_reserved = memory_allocated
