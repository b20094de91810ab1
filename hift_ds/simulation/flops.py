"""Counting the floating-point operations of matrix products, by torch's own formulas (``torch.utils.flop_counter``)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from torch._ops import OpOverload
from torch.utils.flop_counter import flop_registry


class FlopCounter:
    """Sums up floating-point operations by ``phase``, which the caller sets; nothing while that is ``None``."""

    def __init__(self) -> None:
        self.phase: str | None = None
        self._by_phase: Counter[str] = Counter()

    def count(self, func: OpOverload, args: Sequence[Any], kwargs: Mapping[str, Any], out: object) -> None:
        """Count one operation, as a dispatch mode sees it."""
        if self.phase is not None and (formula := flop_registry.get(func._overloadpacket)) is not None:
            self._by_phase[self.phase] += formula(*args, **kwargs, out_val=out)

    def take(self) -> dict[str, int]:
        """The counts since the last call."""
        taken, self._by_phase = dict(self._by_phase), Counter()
        return taken
