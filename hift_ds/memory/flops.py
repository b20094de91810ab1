"""Counting the floating-point operations of matrix products, by torch's own formulas (``torch.utils.flop_counter``)."""

from __future__ import annotations

from collections import Counter
from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry


class FlopCounter(TorchDispatchMode):
    """Sums up by ``phase``, which the caller sets."""

    def __init__(self) -> None:
        super().__init__()
        self.phase = ""
        self.by_phase: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        formula = flop_registry.get(func._overloadpacket)
        if formula is not None:
            self.by_phase[self.phase] += formula(*args, **kwargs, out_val=out)
        return out

    def take(self) -> dict[str, int]:
        """The counts since the last call."""
        taken, self.by_phase = dict(self.by_phase), Counter()
        return taken
