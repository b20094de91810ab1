"""What the engine knows of its own memory: measured peaks, and the forecast beside them."""

from __future__ import annotations

import functools
import logging
import tempfile
from typing import Any

from torch import Tensor

from hift_ds.engine.deepspeed_seam import device_bytes
from hift_ds.forecast.advice import Adviser
from hift_ds.forecast.background import BackgroundForecast
from hift_ds.forecast.setting import Setting
from hift_ds.store.parked import ParkedStateStore

logger = logging.getLogger(__name__)

CONTEXT_BYTES = int(
    0.6 * 2**30
)  # of the driver and its libraries, and what the allocator holds more than is asked for
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


class MemoryReports:
    """The part of :class:`HiFTEngine` that forecasts.

    Attributes:
        last_shape: (sequences, tokens) of the last forward on this rank, if its inputs were token ids.
        adviser: answers when there is no memory left. A loop that builds another engine for a smaller batch hands
            it on, so that the forecast is made once.
    """

    last_shape: tuple[int, int] | None = None
    _slots_settled = False
    _forecast: BackgroundForecast | None = None
    _folder: tempfile.TemporaryDirectory | None = None  # the model's config, for the process that forecasts

    @functools.cached_property
    def adviser(self) -> Adviser:
        return Adviser()

    def note_shape(self, inputs: list[Any]) -> None:
        """Remember how large this batch of token ids is, for the forecast that an out-of-memory error asks for."""
        for value in inputs:
            if isinstance(value, Tensor) and value.dim() == 2 and not value.is_floating_point():
                self.last_shape = (value.shape[0], value.shape[1])
                return

    def start_forecast(self, batch: int, length: int) -> None:
        """From here on, ``last_report.forecast_bytes`` says what the step's peak was expected to be, once that is known
        (a process of low priority works it out). Only transformers models have a config to work from; for others
        nothing happens.

        Args:
            batch, length: of the largest micro-batch on one rank.
        """
        if not hasattr(self.module, "config") or self._forecast is not None:
            return
        self._folder = tempfile.TemporaryDirectory()
        self._forecast = BackgroundForecast(self.memory_setting(self._folder.name, batch, length))

    def forecast_bytes(self, group: int) -> int | None:
        """The expected peak while ``group`` trains, if it is known."""
        return None if self._forecast is None else self._forecast.peak_bytes(group)

    def use_spare_memory(self) -> None:
        """Once the forecast is there, more slots for states in half of the memory that it leaves, as far as they help;
        only where ``"state.slots"`` is left to us, and on an accelerator. Called after each step."""
        state, store = self.hift.state, self.optimizer.store
        if self._slots_settled or not isinstance(store, ParkedStateStore):
            return
        if state.slots is not None or not state.prefetch or store.device.type == "cpu":
            self._slots_settled = True
            return
        peaks = [self.forecast_bytes(group.index) for group in self.groups]
        if None in peaks:
            return
        self._slots_settled = True
        spare = (device_bytes() - CONTEXT_BYTES) / (1 + FRAGMENTATION) - max(peaks)
        most_chunks = max(len(self.optimizer.groups[group.index].chunks) for group in self.groups)
        if store.grow(max(int(spare / 2), 0), useful=2 * most_chunks):
            logger.info("states: %d slots in the memory that the forecast leaves", store.num_slots)

    def stop_forecast(self) -> None:
        if self._forecast is not None:
            self._forecast.close()
            self._forecast = None
        if self._folder is not None:
            self._folder.cleanup()
            self._folder = None

    def device_bytes(self) -> int:
        """Memory of this rank's device."""
        return device_bytes()

    def memory_setting(self, folder: str, batch: int, length: int) -> Setting:
        """What this engine does, for the simulation. The model's config goes to ``folder``."""
        self.module.config.save_pretrained(folder)
        block = self.hift.model_dump(mode="json")
        if self.savings.recomputes:
            block["activations"]["checkpointing"] = True
        config: dict[str, Any] = {key: self.config[key] for key in CONFIG_KEYS if key in self.config}
        if "optimizer" not in config:
            cls = type(self.optimizer.optimizer)
            config["optimizer"] = {"type": f"{cls.__module__}.{cls.__qualname__}", "params": {"lr": 1e-5}}
        dtype = next(param.dtype for param in self.module.parameters())
        return Setting(
            folder, {**config, "hift": block}, str(dtype).removeprefix("torch."), batch, length,
            world_size=self.world_size, micro_batches=min(self.gradient_accumulation_steps(), 2),
        )  # fmt: skip
