"""The memory that a run may use: of the accelerator that is there, of one that somebody named, or of the host."""

from __future__ import annotations

from dataclasses import dataclass, replace

from hift_ds.dtypes import Dtype, torch_dtype
from hift_ds.forecast.fit import GIB, budget_gib, gib
from hift_ds.store.choose import device_bytes_free
from hift_ds.store.machine import host_bytes, processes_on_node
from hift_ds.store.speeds import ASSUMED_SPEEDS, Speeds, measure_flops, measure_link
from hift_ds.train.settings import Settings

_LINK_BYTES = 1 << 26


@dataclass(frozen=True)
class Card:
    """What a run is to fit.

    Attributes:
        words: where the figure comes from.
        usable_bytes: that may be allocated.
        speeds: measured or assumed.
        is_host: no accelerator: memory of the host.
        is_here: the run will be on this machine.
    """

    words: str
    usable_bytes: int
    speeds: Speeds = ASSUMED_SPEEDS
    is_host: bool = False
    is_here: bool = True


def card_here(settings: Settings, dtype: Dtype) -> Card:
    """The card that ``hift.fit`` names, else this rank's accelerator, else host memory."""
    import torch

    fit, ranks = settings.run.fit, settings.world_size
    if not torch.accelerator.is_available():
        if isinstance(fit, int | float):
            return card_of(fit, ranks)
        free = host_bytes().available // processes_on_node()
        each = " for each process" if processes_on_node() > 1 else ""
        return Card(f"no accelerator, {gib(free)} of host memory free{each}", free, is_host=True)
    accelerator = torch.accelerator.current_accelerator()
    assert accelerator is not None
    device = torch.device(accelerator.type, torch.accelerator.current_device_index())
    free = device_bytes_free(device)  # before anything is measured there
    speeds = Speeds(measure_flops(device, torch_dtype(dtype)), measure_link(device, _LINK_BYTES, True).into)
    if isinstance(fit, int | float):
        return replace(card_of(fit, ranks), speeds=speeds)
    usable = budget_gib(free / GIB, ranks)
    return Card(f"{gib(free)} free on the device, {usable:.1f} usable", int(usable * GIB), speeds)


def card_of(card: float, ranks: int) -> Card:
    """A card of ``card`` GiB, somewhere."""
    usable = budget_gib(card, ranks)
    return Card(f"a card of {card:g} GiB, {usable:.1f} usable", int(usable * GIB), is_here=False)
