"""From a model to its layer groups: every trainable parameter in exactly one, bottom to top.

A model has ``n`` units (embeddings, each block, final norm with the head); ``group_size`` = m makes
``k = ceil(n / m)`` groups of m neighbouring units, the top one ragged, the same in every cycle (HiFT,
arXiv 2401.15207, algorithm 1). What the user froze is in no group; a unit frozen as a whole does not count.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

from torch import nn

from hift_ds.errors import GroupingError
from hift_ds.layers.arch import ArchSpec, check_arch, find_arch, whole_shape
from hift_ds.schedule import GroupSchedule

ALWAYS = -1  # index of the group that is trained in every turn
ALWAYS_NAME = "always"
MAX_PIECES_IN_NAME = 3
MAX_PATTERN_IN_NAME = 40


@dataclass(frozen=True)
class LayerGroup:
    """Parts of the model that are trained together.

    Attributes:
        index: position bottom to top, from 0; -1 for the group that is always active.
        name: short and unique, such as ``"embed"``, ``"layers.3"``, ``"layers.4-7"``, ``"norm+lm_head"``.
        param_names: the trainable parameters, with the names and in the order of ``named_parameters()``, tied
            ones once.
        numel: elements in them, of the whole tensors where ZeRO-3 keeps shards.
        parts: the same names, bottom to top, by the embedding, block or head that they belong to: (its index in the
            model, the names).
    """

    index: int
    name: str
    param_names: tuple[str, ...]
    numel: int
    parts: tuple[tuple[int, tuple[str, ...]], ...] = ()


@dataclass(frozen=True)
class Partition:
    """All trainable parameters of a model, cut up.

    Attributes:
        groups: bottom to top.
        always: parameters trained in every turn; in no other group.
        matrices: names of the two-dimensional weights inside blocks, no embedding among them: what Muon
            orthogonalises.
    """

    groups: tuple[LayerGroup, ...]
    always: LayerGroup | None
    matrices: frozenset[str]


@dataclass(frozen=True)
class _Unit:
    name: str
    params: tuple[str, ...]
    stack: str = ""  # of a block: the name of its stack, "" for embeddings and head
    row: int = 0  # of a block: its index in the stack


def partition_model(
    model: nn.Module,
    *,
    group_size: int | str = 1,
    patterns: Sequence[Sequence[str]] | None = None,
    always_active: Sequence[str] = (),
    arch: ArchSpec | None = None,
) -> Partition:
    """Cuts the trainable parameters of ``model`` into layer groups. Nothing in the model is changed.

    Args:
        model: any module; weights may be real, on ``meta``, or cut up by ZeRO-3.
        group_size: units a group, or ``"all"``.
        patterns: in place of units, the groups bottom to top, each a list of regular expressions searched in
            parameter names; ``group_size`` then counts for nothing.
        always_active: regular expressions of the parameters to train in every turn.
        arch: where the parts of the model live, if its structure does not tell.

    Raises:
        GroupingError: nothing is trainable or left to rotate; ``group_size`` is below 1; a pattern is no
            regular expression or matches nothing; no group matches a parameter, or two do.
    """
    if group_size == "all":
        group_size = sum(1 for _ in model.parameters())  # never fewer than there are units
    if isinstance(group_size, bool) or not isinstance(group_size, int) or group_size < 1:
        raise GroupingError(f"group_size: expected a whole number of at least 1, got {group_size!r}")
    if arch is not None:
        check_arch(model, arch)
    arch = arch or find_arch(model)
    trainable = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    if not trainable:
        raise GroupingError(f"{type(model).__name__}: no parameter is trainable, all have requires_grad=False")

    always = _matched_by_any(model, trainable, always_active)
    rotating = [name for name in trainable if name not in always]
    if not rotating:
        raise GroupingError("always_active: matches every trainable parameter; no group is left to rotate")

    units = _units(model, arch, rotating)
    if patterns is None:
        named = [(_name_of(run), _params_of(run, rotating)) for run in _neighbours(units, group_size)]
    else:
        named = _by_patterns(model, rotating, always, patterns)
    names = _unique([name for name, _ in named])
    members = [params for _, params in named]
    unit_of = arch.unit_of(model)
    return Partition(
        groups=tuple(_group(i, names[i], members[i], trainable, unit_of) for i in range(len(named))),
        always=_group(ALWAYS, ALWAYS_NAME, always, trainable, unit_of) if always else None,
        matrices=_matrices(model, arch, trainable),
    )


def describe(partition: Partition, *, order: str = "bottom2up", seed: int = 0) -> list[dict[str, Any]]:
    """The groups in the order in which a first cycle updates them, as plain data.

    Args:
        partition: what :func:`partition_model` returns.
        order: ``"bottom2up"``, ``"top2down"`` or ``"random"``.
        seed: of the random order.

    Returns:
        ``{"name": str, "numel": int, "params": list of names}`` for each group; the always-active one,
        if there is one, comes last.
    """
    schedule = GroupSchedule(len(partition.groups), order=order, seed=seed)
    groups = [partition.groups[index] for index in schedule.order_of_cycle]
    if partition.always is not None:
        groups.append(partition.always)
    return [{"name": group.name, "numel": group.numel, "params": list(group.param_names)} for group in groups]


# ----------------------------------------------------------------------------------------------------------
# Units


def _units(model: nn.Module, arch: ArchSpec, wanted: list[str]) -> list[_Unit]:
    """The units that hold any of the ``wanted`` parameters, bottom to top."""
    unit_of = arch.unit_of(model)
    members: dict[int, list[str]] = {}
    for name in wanted:
        members.setdefault(unit_of[name], []).append(name)
    stack_names = _short_stack_names(arch)
    units = []
    for index in sorted(members):
        params = tuple(members[index])
        if index == 0:
            units.append(_Unit("embed", params))
        elif index == arch.num_units - 1:
            units.append(_Unit(_name_of_head(arch, params), params))
        else:
            units.append(_block_unit(arch.blocks[index - 1][0], stack_names, params))
    return units


def _block_unit(block: str, stack_names: Mapping[str, str], params: tuple[str, ...]) -> _Unit:
    stack, _, row = block.rpartition(".")
    if not row.isdigit():  # in no list: a top-level child of a model without repeated blocks
        return _Unit(block, params)
    return _Unit(f"{stack_names[stack]}.{row}", params, stack=stack_names[stack], row=int(row))


def _short_stack_names(arch: ArchSpec) -> dict[str, str]:
    """The name of each stack, cut to its last parts: as many as tell all stacks apart."""
    stacks = list(dict.fromkeys(block[0].rpartition(".")[0] for block in arch.blocks))
    parts = {stack: stack.split(".") if stack else ["block"] for stack in stacks}
    short = parts
    for length in range(max(map(len, parts.values()), default=0), 0, -1):
        shorter = {stack: whole[-length:] for stack, whole in parts.items()}
        if len(set(map(tuple, shorter.values()))) < len(stacks):
            break
        if not any(kept[0].isdigit() for kept in shorter.values()):
            short = shorter
    return {stack: ".".join(kept) for stack, kept in short.items()}


def _name_of_head(arch: ArchSpec, params: tuple[str, ...]) -> str:
    """What the head is made of, such as ``"norm+lm_head"``; plain ``"head"`` where that would be long."""
    pieces = [piece for piece in arch.head if any(name == piece or name.startswith(piece + ".") for name in params)]
    last_parts = [piece.rpartition(".")[2] for piece in pieces]
    return "+".join(last_parts) if 0 < len(pieces) <= MAX_PIECES_IN_NAME else "head"


def _neighbours(units: list[_Unit], size: int) -> list[list[_Unit]]:
    """``units`` in runs of ``size`` that stand beside each other, the last one ragged."""
    return [units[start : start + size] for start in range(0, len(units), size)]


def _name_of(run: list[_Unit]) -> str:
    first, last = run[0], run[-1]
    if len(run) == 1:
        return first.name
    if first.stack and first.stack == last.stack:
        return f"{first.name}-{last.row}"
    return f"{first.name}..{last.name}"


def _params_of(run: list[_Unit], order: list[str]) -> list[str]:
    members = {name for unit in run for name in unit.params}
    return [name for name in order if name in members]


def _unique(names: list[str]) -> list[str]:
    """``names`` with a number added to those that come more than once."""
    counts, seen = Counter(names), Counter[str]()
    result = []
    for name in names:
        seen[name] += 1
        result.append(f"{name}#{seen[name]}" if counts[name] > 1 else name)
    return result


def _group(
    index: int,
    name: str,
    params: Iterable[str],
    trainable: Mapping[str, nn.Parameter],
    unit_of: Mapping[str, int],
) -> LayerGroup:
    params = tuple(params)
    parts: dict[int, list[str]] = {}
    for param in params:
        parts.setdefault(unit_of[param], []).append(param)
    numel = sum(prod(whole_shape(trainable[param])) for param in params)
    return LayerGroup(index, name, params, numel, tuple((unit, tuple(parts[unit])) for unit in sorted(parts)))


def _matrices(model: nn.Module, arch: ArchSpec, trainable: Mapping[str, nn.Parameter]) -> frozenset[str]:
    unit_of = arch.unit_of(model)
    tables = {module.weight for module in model.modules() if isinstance(module, nn.Embedding)}
    in_blocks = range(1, arch.num_units - 1)
    return frozenset(
        name
        for name, parameter in trainable.items()
        if unit_of[name] in in_blocks and len(whole_shape(parameter)) == 2 and parameter not in tables
    )


# ----------------------------------------------------------------------------------------------------------
# Patterns


def _compiled(pattern: str, key: str) -> re.Pattern[str]:
    try:
        return re.compile(pattern)
    except (re.error, TypeError) as error:
        raise GroupingError(f"{key}: {pattern!r} is not a regular expression: {error}") from None


def _matches(model: nn.Module, names: Iterable[str], pattern: str, key: str, taken: Iterable[str] = ()) -> list[str]:
    """The ``names`` in which ``pattern`` is found; if in none, an error that says what it may have meant."""
    compiled = _compiled(pattern, key)
    found = [name for name in names if compiled.search(name)]
    if found:
        return found
    first_name = {parameter: name for name, parameter in model.named_parameters()}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if not compiled.search(name):
            continue
        if name in taken:
            reason = f"{name!r} is already always_active"
        elif not parameter.requires_grad:
            reason = f"{name!r} is frozen (requires_grad=False)"
        else:
            reason = f"{name!r} is tied to {first_name[parameter]!r}, the name it is trained under"
        raise GroupingError(f"{key}: {pattern!r} matches no parameter that could rotate: {reason}")
    raise GroupingError(f"{key}: {pattern!r} matches no parameter name, such as {next(iter(first_name.values()))!r}")


def _matched_by_any(model: nn.Module, trainable: Iterable[str], patterns: Sequence[str]) -> list[str]:
    if isinstance(patterns, str):
        raise GroupingError(f"always_active: expected a list of regular expressions, got {patterns!r}")
    trainable = list(trainable)
    found = {name for pattern in patterns for name in _matches(model, trainable, pattern, "always_active")}
    return [name for name in trainable if name in found]


def _by_patterns(
    model: nn.Module, rotating: list[str], always: list[str], patterns: Sequence[Sequence[str]]
) -> list[tuple[str, list[str]]]:
    """Name and parameters of each group that ``patterns`` make."""
    if isinstance(patterns, str) or not patterns:
        raise GroupingError(f"groups: expected a list of lists of regular expressions, got {patterns!r}")
    group_of: dict[str, int] = {}
    for index, group in enumerate(patterns):
        if isinstance(group, str) or not group:
            raise GroupingError(f"groups[{index}]: expected a list of regular expressions, got {group!r}")
        for pattern in group:
            for name in _matches(model, rotating, pattern, f"groups[{index}]", taken=always):
                other = group_of.setdefault(name, index)
                if other != index:
                    raise GroupingError(f"groups: {name!r} is matched by groups[{other}] and by groups[{index}]")
    for name in rotating:
        if name not in group_of:
            raise GroupingError(f"groups: {name!r} is trainable and matched by no group; add a pattern or freeze it")
    return [
        (_name_of_patterns(group), [name for name in rotating if group_of[name] == index])
        for index, group in enumerate(patterns)
    ]


def _name_of_patterns(group: Sequence[str]) -> str:
    """A group the user wrote is best known by what they wrote."""
    written = "|".join(group)
    return written if len(written) <= MAX_PATTERN_IN_NAME else written[: MAX_PATTERN_IN_NAME - 3] + "..."
