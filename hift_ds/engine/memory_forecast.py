"""The forecast of an engine's memory: beside its steps, and when there is none left."""

from __future__ import annotations

import functools
import logging
import tempfile
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from hift_ds.engine.deepspeed_seam import SeamEngine, device_bytes
from hift_ds.forecast.background import BackgroundForecast
from hift_ds.forecast.setting import WORKSPACE_BYTES, Setting
from hift_ds.store.parked import ParkedStateStore

logger = logging.getLogger(__name__)

# Of the driver and its libraries, and what the allocator holds more than is asked for.
CONTEXT_BYTES = int(0.6 * 2**30)
FRAGMENTATION = 0.05
_SLOTS = tuple(f"slots for states: bit {bit} is 0" for bit in range(7))  # what the first rank tells the others
# Keys of the DeepSpeed config that decide what is allocated.
CONFIG_KEYS = (
    "optimizer",
    "bf16",
    "fp16",
    "torch_autocast",
    "gradient_clipping",
    "zero_optimization",
    "communication_data_type",
)


class MemoryForecast:
    """What one engine's steps are expected to need, worked out in a process of low priority.

    Attributes:
        last_shape: (sequences, tokens) of the last forward on this rank, if its inputs were token ids.
        last_had_mask: it brought an attention mask.
    """

    def __init__(self, engine: SeamEngine) -> None:
        self._engine = engine
        self.last_shape: tuple[int, int] | None = None
        self.last_had_mask = False
        self._forecast: BackgroundForecast | None = None
        # The model's config, for the process that forecasts.
        self._folder: tempfile.TemporaryDirectory[str] | None = None
        self._slots_settled = False
        self._num_slots = 0  # that the first rank wants; 0: not known yet
        self._measured: dict[int, int] = {}  # highest peak by group

    def note_shape(self, inputs: Sequence[object], has_mask: bool = False) -> None:
        """Remember how large this batch of token ids is, for the forecast that an out-of-memory error asks for."""
        self.last_had_mask = has_mask
        for value in inputs:
            if isinstance(value, Tensor) and value.dim() == 2 and not value.is_floating_point():
                self.last_shape = (value.shape[0], value.shape[1])
                return

    def start(self, batch: int, length: int, padded: bool = False) -> None:
        """Work out what a step's peak is expected to be, which :meth:`peak_bytes` says once it is known (a process of
        low priority works it out). Only transformers models have a config to work from; for others nothing happens.

        Args:
            batch, length: of the largest micro-batch on one rank.
            padded: its sequences may differ in length.
        """
        if not hasattr(self._engine.module, "config") or self._forecast is not None:
            return
        self._folder = tempfile.TemporaryDirectory()
        self._forecast = BackgroundForecast(self.setting(self._folder.name, batch, length, padded))

    def peak_bytes(self, group: int) -> int | None:
        """The expected peak of a step of ``group``, if it is known."""
        peak = None if self._forecast is None else self._forecast.peak_bytes(group)
        return None if peak is None else peak + WORKSPACE_BYTES

    def use_spare(self) -> None:
        """Keep more slots for states in half of the memory that steps leave, as far as they help: what the forecast
        leaves, or without one what a whole cycle has left. Only where ``"state.slots"`` is left to us, and on an
        accelerator. The first rank decides, and its word comes to all with the norm of a step. Called after each
        step."""
        if self._slots_settled:
            return
        engine = self._engine
        state, store, optimizer = engine.hift.state, engine.optimizer.store, engine.optimizer
        ours = state.slots is None and state.prefetch and store.device.type != "cpu"
        if not isinstance(store, ParkedStateStore) or not ours:
            self._slots_settled = True
            return
        for bit, name in enumerate(_SLOTS):
            optimizer.questions.setdefault(name, functools.partial(self._says, bit))
        answers = optimizer.answers or {}
        agreed = sum(1 << bit for bit, name in enumerate(_SLOTS) if not answers.get(name, True))
        if agreed:
            self._settle(store, agreed)
        elif engine.global_rank == 0 and not self._num_slots and (peak := self._highest_peak()) is not None:
            spare = (device_bytes() - CONTEXT_BYTES) / (1 + FRAGMENTATION) - peak
            most_chunks = max(len(optimizer.groups[group.index].chunks) for group in engine.partition.groups)
            wanted = store.slots_within(max(int(spare / 2), 0), useful=2 * most_chunks)
            self._num_slots = min(wanted, (1 << len(_SLOTS)) - 1)

    def _says(self, bit: int) -> bool:
        """Whether that bit of the number is 0, as the first rank knows; while there is no number, it is."""
        return self._engine.global_rank == 0 and not self._num_slots >> bit & 1

    def _settle(self, store: ParkedStateStore, num_slots: int) -> None:
        self._slots_settled = True
        for name in _SLOTS:
            self._engine.optimizer.questions.pop(name, None)
        if num_slots > store.num_slots:
            store.num_slots = num_slots
            logger.info(
                "optimizer states: %d slots on the device, in memory that steps leave free (hift.state.slots)",
                num_slots,
            )

    def _highest_peak(self) -> int | None:
        """The highest peak of all groups' steps, in bytes; ``None`` while it is not known."""
        engine = self._engine
        if (report := engine.last_report) is not None and report.cycle > 0:  # in the first, states are made
            self._measured[report.group] = max(report.peak_bytes, self._measured.get(report.group, 0))
        groups = [group.index for group in engine.partition.groups]
        forecasts = [self.peak_bytes(group) for group in groups]
        measured = [self._measured.get(group, 0) for group in groups]
        known = [peak for peak in forecasts if peak is not None]
        if len(known) == len(groups):
            return max(known + measured)
        return max(measured) if all(measured) else None

    def stop(self) -> None:
        """End the process; nothing is expected any more."""
        if self._forecast is not None:
            self._forecast.close()
            self._forecast = None
        if self._folder is not None:
            self._folder.cleanup()
            self._folder = None

    def device_bytes(self) -> int:
        """Memory of this rank's device."""
        return device_bytes()

    def setting(self, folder: str, batch: int, length: int, padded: bool | None = None) -> Setting:
        """Describe what this engine does, for the simulation. The model's config goes to ``folder``.

        Args:
            padded: ``None``: as the last forward's batch.
        """
        engine = self._engine
        engine.module.config.save_pretrained(folder)
        block = engine.hift.model_dump(mode="json")
        block |= {"group_size": engine.hift.first_group_size, "tokens_per_step": None}
        if engine.savings.recomputes:
            block["activations"]["checkpointing"] = True
        config: dict[str, Any] = {key: engine.config[key] for key in CONFIG_KEYS if key in engine.config}
        if "optimizer" not in config:
            cls = type(engine.optimizer.optimizer)
            config["optimizer"] = {"type": f"{cls.__module__}.{cls.__qualname__}", "params": {"lr": 1e-5}}
        dtype = next(param.dtype for param in engine.module.parameters())
        return Setting(
            folder, {**config, "hift": block}, str(dtype).removeprefix("torch."), batch, length,
            world_size=engine.world_size, micro_batches=min(engine.gradient_accumulation_steps(), 2),
            padded=self.last_had_mask if padded is None else padded,
        )  # fmt: skip
