"""Lines through steps: everything about a step that is linear in the batch, the length or the group's place, at once.

At any one place of a step (see :class:`~hift_ds.forecast.setting.GroupStep`) memory is linear in these, category by
category; the highest place is looked for afterwards.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from hift_ds.forecast.setting import BETWEEN, Bytes, GroupStep

Flat = dict[str, float]  # everything about a step that is linear, by name


def through(points: Sequence[tuple[float, GroupStep]], x: float) -> GroupStep:
    """The step at ``x`` on the line through two steps at different batches or lengths, or the parabola through
    three."""
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


def _keys(*flats: Mapping[str, float]) -> Iterable[str]:
    return dict.fromkeys(key for flat in flats for key in flat)


def _plus(a: Mapping[str, float], b: Mapping[str, float]) -> Flat:
    return {key: a.get(key, 0) + b.get(key, 0) for key in _keys(a, b)}


def _minus(a: Mapping[str, float], b: Mapping[str, float]) -> Flat:
    return {key: a.get(key, 0) - b.get(key, 0) for key in _keys(a, b)}


def _scale(a: Mapping[str, float], factor: float) -> Flat:
    return {key: value * factor for key, value in a.items()}
