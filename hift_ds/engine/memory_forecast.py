"""The forecast of an engine's memory: beside its steps, and when there is none left."""

from __future__ import annotations

import logging
import tempfile
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

    def note_shape(self, inputs: list[Any], has_mask: bool = False) -> None:
        """Remember how large this batch of token ids is, for the forecast that an out-of-memory error asks for."""
        self.last_had_mask = has_mask
        for value in inputs:
            if isinstance(value, Tensor) and value.dim() == 2 and not value.is_floating_point():
                self.last_shape = (value.shape[0], value.shape[1])
                return

    def start(self, batch: int, length: int, padded: bool = False) -> None:
        """From here on :meth:`peak_bytes` says what a step's peak was expected to be, once that is known (a process of
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
        """Once the forecast is there, more slots for states in half of the memory that it leaves, as far as they help;
        only where ``"state.slots"`` is left to us, and on an accelerator. Called after each step."""
        engine = self._engine
        state, store = engine.hift.state, engine.optimizer.store
        if self._slots_settled or not isinstance(store, ParkedStateStore):
            return
        if state.slots is not None or not state.prefetch or store.device.type == "cpu":
            self._slots_settled = True
            return
        peaks = [self.peak_bytes(group.index) for group in engine.partition.groups]
        known = [peak for peak in peaks if peak is not None]
        if len(known) < len(peaks):
            return
        self._slots_settled = True
        spare = (device_bytes() - CONTEXT_BYTES) / (1 + FRAGMENTATION) - max(known)
        most_chunks = max(len(engine.optimizer.groups[group.index].chunks) for group in engine.partition.groups)
        if store.grow(max(int(spare / 2), 0), useful=2 * most_chunks):
            logger.info("states: %d slots in the memory that the forecast leaves", store.num_slots)

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
        """What this engine does, for the simulation. The model's config goes to ``folder``.

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
