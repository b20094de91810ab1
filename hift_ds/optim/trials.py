"""Counts of speculative updates: made before the norm that would clip them was known (``clipping: speculative``)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass
class Trials:
    """Updates that were made before their norm was known, since the run began.

    Attributes:
        num_made: steps that updated so.
        num_undone: of which this many were taken back and made again.
        undone_s: seconds that the second updates took.
        last_made, last_undone: whether the last step did either.
    """

    num_made: int = 0
    num_undone: int = 0
    undone_s: float = 0.0
    last_made: bool = False
    last_undone: bool = False
    last_undone_s: float = 0.0

    def begin(self, is_made: bool) -> None:
        """Note that a step begins."""
        self.num_made += is_made
        self.last_made, self.last_undone, self.last_undone_s = is_made, False, 0.0

    def undo(self, seconds: float) -> None:
        """Note that this step's update was taken back and made again."""
        self.num_undone += 1
        self.undone_s += seconds
        self.last_undone, self.last_undone_s = True, seconds

    def state_dict(self) -> dict[str, Any]:
        """The counts."""
        return {"num_made": self.num_made, "num_undone": self.num_undone, "undone_s": self.undone_s}
