"""Which layer group is active at which optimizer step. Pure Python, no torch.

HiFT (arXiv 2401.15207, Algorithm 1) takes one optimizer step per group and rotates. Two neighbours are the
same machine with other settings: BAdam's (arXiv 2404.02827) several steps per block is ``steps_per_group``,
LISA's (arXiv 2403.17919) random layers are ``order="random"`` with ``reshuffle``.

The schedule moves on *optimizer* steps only: never on micro-batches, never on a skipped step.
"""

from __future__ import annotations

import random
from dataclasses import asdict, dataclass
from typing import Any

FEW_TURNS = 4  # fewer cost what is learned (docs/group_size.md)
ORDERS = ("bottom2up", "top2down", "random")


@dataclass(frozen=True)
class Cursor:
    """Where a run stands in its schedule: all that resuming needs besides the settings."""

    cycle: int = 0  # completed cycles
    position: int = 0  # index into the order of this cycle
    step_in_turn: int = 0  # optimizer steps already taken in this turn


class GroupSchedule:
    """The rotation over ``num_groups`` layer groups.

    Args:
        num_groups: k, at least 1.
        order: ``bottom2up`` (embeddings first), ``top2down`` or ``random``.
        reshuffle: with ``random``, draw a new order for every cycle instead of one for the run.
        seed: of the random orders. An order is a function of (seed, cycle) alone, so all ranks agree and
            a resumed run needs no generator state.
        steps_per_group: optimizer steps in one turn.
    """

    def __init__(
        self,
        num_groups: int,
        order: str = "bottom2up",
        reshuffle: bool = False,
        seed: int = 0,
        steps_per_group: int = 1,
    ) -> None:
        assert num_groups >= 1 and steps_per_group >= 1 and order in ORDERS
        self.num_groups = num_groups
        self.order = order
        self.reshuffle = reshuffle
        self.seed = seed
        self.steps_per_group = steps_per_group
        self.cursor = Cursor()

    def move_to(self, group: int) -> None:
        """Make it the turn of ``group``, in the cycle under way."""
        self.cursor = Cursor(self.cursor.cycle, self.order_of_cycle.index(group), 0)

    def regroup(self, num_groups: int) -> None:
        """Rotate over ``num_groups`` groups from now on: go on from the first of this cycle's order."""
        assert num_groups >= 1
        self.num_groups, self.cursor = num_groups, Cursor(self.cursor.cycle)

    @property
    def steps_per_cycle(self) -> int:
        """Optimizer steps of one cycle."""
        return self.num_groups * self.steps_per_group

    def too_few_turns(self, num_steps: int) -> str | None:
        """What is wrong with a run of so many steps; ``None`` if nothing is. Turns of several steps are the user's
        plan."""
        if num_steps < self.steps_per_cycle:
            return (
                f"one cycle over the {self.num_groups} layer groups takes {self.steps_per_cycle} steps and the run has "
                f"{num_steps}: some groups will not be trained; raise max_steps or group_size"
            )
        turns = num_steps / self.num_groups
        if self.steps_per_group > 1 or self.num_groups == 1 or turns >= FEW_TURNS:
            return None
        return (
            f"each of the {self.num_groups} layer groups is trained in {turns:.1f} of {num_steps} steps, which is too "
            "few to learn as full fine-tuning does; raise group_size or max_steps (docs/group_size.md)"
        )

    @property
    def active(self) -> int:
        """Index (bottom to top) of the group that the next optimizer step trains."""
        return self.order_of_cycle[self.cursor.position]

    @property
    def order_of_cycle(self) -> list[int]:
        """The groups of this cycle, in the order of their turns."""
        return self.order_at(self.cursor.cycle)

    @property
    def starts_cycle(self) -> bool:
        """True when the next optimizer step is the first of a cycle."""
        return self.cursor.position == 0 and self.cursor.step_in_turn == 0

    def order_at(self, cycle: int) -> list[int]:
        """Group indices in the order in which ``cycle`` visits them."""
        order = list(range(self.num_groups))
        if self.order == "top2down":
            order.reverse()
        elif self.order == "random":
            draw = cycle if self.reshuffle else 0
            random.Random(f"hift:{self.seed}:{draw}").shuffle(order)
        return order

    def advance(self) -> None:
        """Note that one optimizer step was applied."""
        self.cursor = self._after(self.cursor)

    def upcoming(self, num_turns: int) -> list[int]:
        """The groups of the next ``num_turns`` turns after the current one, for prefetching."""
        cycle, position = self.cursor.cycle, self.cursor.position
        groups = []
        for _ in range(num_turns):
            position += 1
            if position == self.num_groups:
                cycle, position = cycle + 1, 0
            groups.append(self.order_at(cycle)[position])
        return groups

    def state_dict(self) -> dict[str, Any]:
        """The cursor, the current order, and the settings that it belongs to; JSON-able."""
        return {
            "cursor": asdict(self.cursor),
            "order_of_cycle": self.order_of_cycle,
            "num_groups": self.num_groups,
            "order": self.order,
            "reshuffle": self.reshuffle,
            "seed": self.seed,
            "steps_per_group": self.steps_per_group,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over the cursor. The caller has compared the settings (``differences``)."""
        self.cursor = Cursor(**state["cursor"])

    def differences(self, state: dict[str, Any]) -> list[str]:
        """Settings in which a saved schedule differs from this one, as ``key: saved -> now``."""
        keys = ["num_groups", "order", "steps_per_group"]
        if "random" in (state["order"], self.order):  # else nothing is drawn
            keys += ["reshuffle", "seed"]
        return [f"{k}: {state[k]} -> {getattr(self, k)}" for k in keys if state[k] != getattr(self, k)]

    def _after(self, cursor: Cursor) -> Cursor:
        step = cursor.step_in_turn + 1
        if step < self.steps_per_group:
            return Cursor(cursor.cycle, cursor.position, step)
        position = cursor.position + 1
        if position < self.num_groups:
            return Cursor(cursor.cycle, position, 0)
        return Cursor(cursor.cycle + 1, 0, 0)
