"""The line at the start of a run: how much is kept where, and what a step moves over which link."""

from __future__ import annotations

from dataclasses import dataclass

from hift_ds.store.speeds import Link


@dataclass(frozen=True)
class StateArithmetic:
    """What one process keeps and moves: bytes counted, the link measured."""

    place: str  # where states rest, in words
    total_bytes: int  # kept by this process
    step_bytes: float  # moved each way in a step, averaged over a cycle
    link: Link | None  # None if nothing moves
    slots: int  # that states arrive in; 0 without prefetch
    late_bytes: float = 0.0  # of step_bytes, slices without a slot: they move during the update and not before

    @property
    def transfer_s(self) -> float:
        """Seconds that a step's copies take. Two slots let both directions run at once."""
        if self.link is None:
            return 0.0
        one_way = (self.step_bytes / self.link.into, self.step_bytes / self.link.out)
        return max(one_way) if self.slots > 1 else sum(one_way)

    @property
    def waited_s(self) -> float:
        """Seconds of ``transfer_s`` that no computing can hide: the step waits for them, however long it computes."""
        if not self.slots:
            return self.transfer_s
        return self.transfer_s * self.late_bytes / self.step_bytes if self.late_bytes else 0.0

    def line(self) -> str:
        """The figures as a sentence for the log."""
        kept = f"optimizer states: {_bytes(self.total_bytes)} {self.place}"
        if self.link is None:
            return f"{kept}; none is copied in a step"
        when = "while the model computes"
        if not self.slots:
            when = "for which the step waits (prefetch: false)"
        elif self.late_bytes:
            when = f"for {_seconds(self.waited_s)} of which the step waits (slices without a slot), the rest {when}"
        return (
            f"{kept}; each step copies {_bytes(self.step_bytes)} in ({_bytes(self.link.into)}/s) and out "
            f"({_bytes(self.link.out)}/s), {_seconds(self.transfer_s)} {when}"
        )


def _seconds(number: float) -> str:
    return f"{number:.3g} s" if number >= 0.001 else "under 1 ms"


def _bytes(number: float) -> str:
    for unit, size in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if number >= size:
            return f"{number / size:.3g} {unit}"
    return f"{number:.0f} bytes"
