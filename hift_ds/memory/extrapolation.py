"""From steps of a model with few blocks to the same steps of the whole model.

At any one place of a step (see :class:`~hift_ds.memory.simulation.GroupStep`) memory is linear in the number of blocks
and, for a group of one block, in the number of blocks above it. So two sizes are enough, place by place and category
by category; the highest place is looked for afterwards. Predictions are checked against a step that was not used.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from hift_ds.memory.simulation import BETWEEN, Bytes, GroupStep, Result

EMBED, HEAD = "embed", "head"
Flat = dict[str, float]  # everything about a step that is linear, by name


@dataclass(frozen=True)
class BlockModel:
    """Steps of one model in two sizes.

    Attributes:
        small, large: results for ``num_blocks`` blocks, all with the same switches, batch and length. The groups are
            the embedding, one a block and the head.
    """

    small: Result
    large: Result

    def step(self, num_blocks: int, index: int) -> GroupStep:
        """The step of group ``index`` in a model with ``num_blocks`` blocks."""
        where = _place_of(index, num_blocks)
        if isinstance(where, str):
            flat = _line(
                self.small.num_blocks, _flat(self._ends(self.small, where)),
                self.large.num_blocks, _flat(self._ends(self.large, where)), num_blocks,
            )  # fmt: skip
            return _unflat(flat, self._ends(self.large, where), index)
        flat = self._block(num_blocks, where)
        return _unflat(flat, self._nearest(where), index)

    def weight_bytes(self, num_blocks: int) -> int:
        return self._of_result(num_blocks, self.small.weight_bytes, self.large.weight_bytes)

    def numel(self, num_blocks: int) -> int:
        return self._of_result(num_blocks, self.small.numel, self.large.numel)

    def error(self) -> float:
        """The largest relative error in predicting the small model's lowest block from the other steps."""
        above = self.small.num_blocks - 1
        measured = next(s for s in self.small.steps if _above(s.index, self.small.num_blocks) == above)
        predicted = _unflat(self._block(self.small.num_blocks, above), measured, measured.index)
        return abs(predicted.peak_bytes / measured.peak_bytes - 1)

    # -- groups of one block ------------------------------------------------------------------------------------

    def _block(self, num_blocks: int, above: int) -> Flat:
        """A block with ``above`` blocks above it."""
        at_large = {_above(s.index, self.large.num_blocks): _flat(s) for s in self.large.steps}
        at_large = {n: flat for n, flat in at_large.items() if n is not None}
        flat = _interpolate(at_large, above)
        if num_blocks == self.large.num_blocks:
            return flat
        shared = max(
            n for s in self.small.steps
            if (n := _above(s.index, self.small.num_blocks)) in at_large and n != self.small.num_blocks - 1
        )  # fmt: skip
        small = next(_flat(s) for s in self.small.steps if _above(s.index, self.small.num_blocks) == shared)
        per_block = _scale(_minus(at_large[shared], small), 1 / (self.large.num_blocks - self.small.num_blocks))
        return _plus(flat, _scale(per_block, num_blocks - self.large.num_blocks))

    def _nearest(self, above: int) -> GroupStep:
        blocks = [s for s in self.large.steps if _above(s.index, self.large.num_blocks) is not None]
        return min(blocks, key=lambda s: abs(_above(s.index, self.large.num_blocks) - above))

    def _ends(self, result: Result, where: str) -> GroupStep:
        index = 0 if where == EMBED else result.num_groups - 1
        return next(step for step in result.steps if step.index == index)

    def _of_result(self, num_blocks: int, small: int, large: int) -> int:
        return round(_line(self.small.num_blocks, {"": small}, self.large.num_blocks, {"": large}, num_blocks)[""])


def _place_of(index: int, num_blocks: int) -> int | str:
    """``EMBED``, ``HEAD``, or how many blocks are above the group's."""
    if index == 0:
        return EMBED
    return HEAD if index == num_blocks + 1 else num_blocks - index


def _above(index: int, num_blocks: int) -> int | None:
    where = _place_of(index, num_blocks)
    return where if isinstance(where, int) else None


def scale_batch(at_one: GroupStep, at_two: GroupStep, one: int, two: int, wanted: float) -> GroupStep:
    """The step at ``wanted`` sequences (or tokens), from steps at ``one`` and ``two``."""
    return _unflat(_line(one, _flat(at_one), two, _flat(at_two), wanted), at_two, at_one.index)


# -- arithmetic on everything at once ---------------------------------------------------------------------------


def _flat(step: GroupStep) -> Flat:
    places = {place: sums for place, sums in step.places.items() if not place.endswith(BETWEEN)}
    flat: Flat = {f"place|{place}|{c}": n for place, sums in places.items() for c, n in sums.items()}
    flat |= {f"flops|{phase}": n for phase, n in step.flops.items()}
    return flat | {"state_bytes": step.state_bytes, "offloaded_bytes": step.offloaded_bytes}


def _unflat(flat: Mapping[str, float], like: GroupStep, index: int) -> GroupStep:
    places: dict[str, Bytes] = {}
    flops: dict[str, int] = {}
    for key, value in flat.items():
        kind, _, rest = key.partition("|")
        if kind == "place":
            place, _, category = rest.rpartition("|")
            places.setdefault(place, {})[category] = max(round(value), 0)
        elif kind == "flops":
            flops[rest] = round(value)
    name = like.name if like.index == index else _renumbered(like.name, index)
    return GroupStep(
        index, name, like.numel, places, flops, round(flat["state_bytes"]), max(round(flat["offloaded_bytes"]), 0)
    )


def _renumbered(name: str, index: int) -> str:
    stem, dot, row = name.rpartition(".")
    return f"{stem}.{index - 1}" if dot and row.isdigit() else name


def _line(x0: float, y0: Flat, x1: float, y1: Flat, x: float) -> Flat:
    return _plus(y0, _scale(_minus(y1, y0), (x - x0) / (x1 - x0)))


def _interpolate(values: Mapping[int, Flat], x: int) -> Flat:
    """Piecewise linear through ``values``, the outer pieces extended."""
    if x in values:
        return dict(values[x])
    known = sorted(values)
    right = next((i for i in range(1, len(known)) if known[i] >= x), len(known) - 1)
    x0, x1 = known[right - 1], known[right]
    return _line(x0, values[x0], x1, values[x1], x)


def _keys(*flats: Mapping[str, float]) -> Iterable[str]:
    return dict.fromkeys(key for flat in flats for key in flat)


def _plus(a: Mapping[str, float], b: Mapping[str, float]) -> Flat:
    return {key: a.get(key, 0) + b.get(key, 0) for key in _keys(a, b)}


def _minus(a: Mapping[str, float], b: Mapping[str, float]) -> Flat:
    return {key: a.get(key, 0) - b.get(key, 0) for key in _keys(a, b)}


def _scale(a: Mapping[str, float], factor: float) -> Flat:
    return {key: value * factor for key, value in a.items()}


def nodes(num_blocks: int, blocks_kept: int, settled: int) -> Sequence[int]:
    """Group indices to step in a model of ``num_blocks`` blocks: the embedding, the head, and blocks between which
    everything is linear.

    Args:
        blocks_kept: of the checkpointing; there a line bends.
        settled: blocks above a group from which on offloading holds as much as it ever does.
    """
    wanted = {0, 1, 2, blocks_kept, blocks_kept + 1, blocks_kept + 2, settled, settled + 1, num_blocks - 1}
    above = {n for n in wanted if 0 <= n < num_blocks}
    return [0, *sorted(num_blocks - n for n in above), num_blocks + 1]
