"""From steps of a model with few blocks to the same steps of the whole model.

At any one place of a step (see :class:`~hift_ds.forecast.setting.GroupStep`) memory is linear in the number of blocks
and, for a group of one block, in the number of blocks above it. So two sizes are enough, place by place and category
by category; the highest place is looked for afterwards. Predictions are checked against a step that was not used.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from hift_ds.forecast.setting import BETWEEN, Bytes, GroupStep, Result

Flat = dict[str, float]  # everything about a step that is linear, by name


@dataclass(frozen=True)
class BlockModel:
    """Steps of one model in two sizes.

    Attributes:
        small, large: results for two numbers of blocks, all with the same switches, batch and length. The groups are
            the embedding, one a block and the head; of each size the embedding, the lowest block and the head have
            been stepped, and for other blocks those that :func:`nodes` names.
    """

    small: Result
    large: Result

    def step(self, num_blocks: int, index: int) -> GroupStep:
        """The step of group ``index`` in a model with ``num_blocks`` blocks."""
        from_end = index - num_blocks - 2 if index == num_blocks + 1 else index
        if from_end in (-1, 0, 1):  # there in every size, with all blocks above it, or none
            small, large = _at(self.small, from_end), _at(self.large, from_end)
            flat = _line(self.small.num_blocks, _flat(small), self.large.num_blocks, _flat(large), num_blocks)
            return _unflat(flat, large, index)
        return self._block(num_blocks, num_blocks - index)

    def weight_bytes(self, num_blocks: int) -> int:
        return self._of_result(num_blocks, self.small.weight_bytes, self.large.weight_bytes)

    def numel(self, num_blocks: int) -> int:
        return self._of_result(num_blocks, self.small.numel, self.large.numel)

    def error(self) -> float:
        """The relative error in predicting the small model's lowest block from the other steps."""
        measured = _at(self.small, 1)
        predicted = self._block(self.small.num_blocks, self.small.num_blocks - 1)
        return abs(predicted.peak_bytes / measured.peak_bytes - 1)

    def _block(self, num_blocks: int, above: int) -> GroupStep:
        """A block with ``above`` blocks above it."""
        small, large = _by_blocks_above(self.small), _by_blocks_above(self.large)
        flat = _interpolate({n: _flat(step) for n, step in large.items()}, above)
        shared = max(small.keys() & large.keys())
        per_block = _scale(
            _minus(_flat(large[shared]), _flat(small[shared])),
            1 / (self.large.num_blocks - self.small.num_blocks),
        )
        flat = _plus(flat, _scale(per_block, num_blocks - self.large.num_blocks))
        return _unflat(flat, large[min(large, key=lambda n: abs(n - above))], num_blocks - above)

    def _of_result(self, num_blocks: int, small: int, large: int) -> int:
        return round(
            _line(self.small.num_blocks, {"": small}, self.large.num_blocks, {"": large}, num_blocks)[""]
        )


def _at(result: Result, index: int) -> GroupStep:
    return next(step for step in result.steps if step.index == index % result.num_groups)


def _by_blocks_above(result: Result) -> dict[int, GroupStep]:
    """The steps of groups of one block, by the number of blocks above them. Not the lowest two: the forward below a
    group holds a tensor less where there are fewer than two blocks (one input is the embedding's output)."""
    above = {result.num_blocks - step.index: step for step in result.steps}
    return {n: step for n, step in above.items() if 0 <= n < result.num_blocks - 2}


def through(points: Sequence[tuple[float, GroupStep]], x: float) -> GroupStep:
    """The step at ``x`` on the line through two steps at different batches or lengths, or the parabola through three."""
    flat: Flat = {}
    for i, (xi, step) in enumerate(points):
        weight = 1.0
        for j, (xj, _) in enumerate(points):
            weight *= (x - xj) / (xi - xj) if i != j else 1.0
        flat = _plus(flat, _scale(_flat(step), weight))
    return _unflat(flat, points[-1][1], points[0][1].index)


def between(below: GroupStep, above: GroupStep, index: int) -> GroupStep:
    """The step of a group between two others, on a line."""
    flat = _line(below.index, _flat(below), above.index, _flat(above), index)
    return _unflat(flat, below, index)


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
        index,
        name,
        like.numel,
        places,
        flops,
        round(flat["state_bytes"]),
        max(round(flat["offloaded_bytes"]), 0),
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
        settled: blocks above a group from which on all lines are straight.
    """
    wanted = {0, 1, blocks_kept, blocks_kept + 1, settled, settled + 1, num_blocks - 1}
    above = {n for n in wanted if 0 <= n < num_blocks}
    return [0, *sorted(num_blocks - n for n in above), num_blocks + 1]
