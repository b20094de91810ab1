"""``save_checkpoint`` and ``load_checkpoint``: DeepSpeed's calls and folder habits, our own files.

docs/checkpoints.md describes the format and the promises. Reading order: ``engine/saving.py`` and
``engine/loading.py`` (who does what, and that all ranks agree), ``checkpoint/write_plan.py`` (what is written),
``checkpoint/state_files.py`` (states by parameter name), ``checkpoint/shared_folder.py`` and
``checkpoint/manifest.py`` (whole or not there).
"""

from __future__ import annotations

from typing import Any

from hift_ds.engine.loading import Loading
from hift_ds.engine.saving import Saving


class Checkpointing(Saving, Loading):
    """What the engine inherits to save and resume; before DeepSpeed's engine, whose calls it wraps."""

    def step(self, lr_kwargs: dict[str, Any] | None = None) -> None:
        self._copy_before_step()
        super().step(lr_kwargs)
