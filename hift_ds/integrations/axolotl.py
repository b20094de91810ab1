"""A plug-in for Axolotl's own slot:

    plugins: [hift_ds.integrations.axolotl.HiFTPlugin]
    deepspeed: bf16_host.json      # with a "hift" block

Without a block the plug-in does nothing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from axolotl.integrations.base import BasePlugin

from hift_ds.integrations.callback import AnnouncedCallback

if TYPE_CHECKING:
    from transformers import TrainerCallback


class HiFTPlugin(BasePlugin):
    """Gives Axolotl's trainer our callback."""

    def add_callbacks_pre_trainer(self, cfg: object, model: object) -> list[TrainerCallback]:
        """The callbacks that the trainer is made with."""
        return [AnnouncedCallback()]
