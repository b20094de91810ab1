"""Where the embeddings, the blocks and the head of a model live, found by structure and not by name.

The repeated blocks of a model sit in containers (``nn.ModuleList``, ``nn.Sequential``, ``nn.ModuleDict``):
the outermost containers of composite modules that hold a fair share of the parameters are its *stacks*. What
runs before the first stack embeds; what runs after the last is the head; what runs between two stacks goes
with the block below it. "Runs" is read from the source of each ``forward`` (:mod:`hift_ds.layers.forward_order`), or
is the order of registration where that is silent. No forward is run and no parameter is read: weights that
ZeRO-3 has cut up, or that are on ``meta``, are as good as real ones.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby
from math import prod

from torch import Tensor, nn

from hift_ds.errors import GroupingError
from hift_ds.layers.forward_order import Use, forward_uses

MIN_SHARE_OF_LARGEST_STACK = 0.01  # below it a container is a detail, such as a head of two layers
MIN_SHARE_OF_BARE_STACK = 0.5
FIRST = -2  # below every position in the source of a forward


@dataclass(frozen=True)
class ArchSpec:
    """Where the parts of a model live. Names are those of ``named_modules()`` or ``named_parameters()``.

    Attributes:
        embed: what runs below the first block.
        blocks: bottom to top, the modules of each block; a stray module (an encoder's final norm) goes with
            the block it runs after.
        head: what runs above the last block. Whatever is in none of the three counts as head too.
    """

    embed: tuple[str, ...]
    blocks: tuple[tuple[str, ...], ...]
    head: tuple[str, ...] = ()

    @property
    def num_units(self) -> int:
        """Embeddings, each block, and the head."""
        return len(self.blocks) + 2

    def owners(self) -> dict[str, int]:
        """Each name of this spec with its unit: 0 embeddings, 1..n blocks, n+1 head."""
        found = dict.fromkeys(self.embed, 0)
        for unit, names in enumerate(self.blocks, start=1):
            found.update(dict.fromkeys(names, unit))
        return found | dict.fromkeys(self.head, self.num_units - 1)

    def unit_of(self, model: nn.Module) -> dict[str, int]:
        """Each parameter name of ``model.named_parameters()`` with its unit. A tied parameter belongs to the lowest
        unit that uses it; what no name of this spec covers belongs to the head."""
        owners = self.owners()

        def owner(name: str) -> int:
            parts = name.split(".")
            prefixes = (".".join(parts[:length]) for length in range(len(parts), 0, -1))
            return next((owners[prefix] for prefix in prefixes if prefix in owners), self.num_units - 1)

        lowest: dict[nn.Parameter, int] = {}
        for name, parameter in model.named_parameters(remove_duplicate=False):
            lowest[parameter] = min(owner(name), lowest.get(parameter, self.num_units))
        return {name: lowest[parameter] for name, parameter in model.named_parameters()}


def find_arch(model: nn.Module) -> ArchSpec:
    """Finds embeddings, blocks and head of ``model`` by its structure.

    A model without any stack is cut at its top-level children, one unit each.
    """
    stacks = _find_stacks(model)
    return _assemble(list(_walk(model, "", stacks, []))) if stacks else _without_stacks(model)


def whole_shape(parameter: Tensor) -> tuple[int, ...]:
    """The shape of the whole tensor, also where ZeRO-3 keeps shards (and notes the shape as ``ds_shape``)."""
    return tuple(getattr(parameter, "ds_shape", parameter.shape))


def check_arch(model: nn.Module, arch: ArchSpec) -> None:
    """Sees that each name in ``arch`` is a module or a parameter of ``model``, and comes once.

    Raises:
        GroupingError: naming the one that is not.
    """
    known = {name for name, _ in model.named_modules()}
    known |= {name for name, _ in model.named_parameters(remove_duplicate=False)}
    names = [*arch.embed, *(name for block in arch.blocks for name in block), *arch.head]
    for name in names:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise GroupingError(f"arch: {type(model).__name__} has no module or parameter {name!r}{hint}")
        if names.count(name) > 1:
            raise GroupingError(f"arch: {name!r} is given twice; every name belongs to one unit")


# ----------------------------------------------------------------------------------------------------------
# Stacks: which containers hold the blocks


@dataclass(frozen=True)
class _Stack:
    containers: tuple[str, ...]  # several if they hold parts of the same blocks
    blocks: tuple[tuple[str, ...], ...]


def _numel(module: nn.Module) -> int:
    return sum(prod(whole_shape(parameter)) for parameter in module.parameters())


def _has_parameters(module: nn.Module) -> bool:
    return any(True for _ in module.parameters())


def _is_composite(module: nn.Module) -> bool:
    return any(_has_parameters(child) for child in module.children())


def _embeds(module: nn.Module | None) -> bool:
    return module is not None and any(isinstance(inner, nn.Embedding) for inner in module.modules())


def _join(prefix: str, name: str) -> str:
    return f"{prefix}.{name}" if prefix else name


def _is_within(name: str, outer: str) -> bool:
    return name == outer or name.startswith(outer + ".")


def _longest_run(container: nn.Module) -> list[str]:
    """The largest run of consecutive composite children of one class."""
    runs = [list(run) for _, run in groupby(container.named_children(), key=lambda item: type(item[1]))]
    runs = [run for run in runs if all(_is_composite(child) for _, child in run)]
    best = max(runs, key=lambda run: sum(_numel(child) for _, child in run), default=[])
    return [name for name, _ in best]


def _items_of(container: nn.Module, bare: bool) -> list[str]:
    """The children of ``container`` that are blocks; none if it does not look like a stack."""
    if isinstance(container, nn.Sequential):
        run = _longest_run(container)
        return run if len(run) > 1 else []
    if not isinstance(container, (nn.ModuleList, nn.ModuleDict)):
        return []
    children = {name: child for name, child in container.named_children() if _has_parameters(child)}
    is_bag = len(children) < 2 or len({type(child) for child in children.values()}) > 1
    if isinstance(container, nn.ModuleDict) and is_bag:  # of named parts, not a numbered stack
        return []
    if any(isinstance(child, nn.Embedding) for child in children.values()):
        return []
    return list(children) if bare or all(map(_is_composite, children.values())) else []


def _containers(module: nn.Module, name: str, bare: bool) -> Iterator[tuple[str, nn.Module, list[str]]]:
    """The outermost containers that look like stacks; lists nested in a block (experts) are never reached."""
    items = _items_of(module, bare)
    if items:
        yield name, module, items
        return
    for child_name, child in module.named_children():
        yield from _containers(child, _join(name, child_name), bare)


def _blocks_of(container: nn.Module, name: str, items: list[str]) -> Iterator[tuple[str, ...]]:
    """One block an item; lists of like items within the list (stages) are opened up."""
    for item in items:
        inner, full = container.get_submodule(item), _join(name, item)
        stage = list(inner) if isinstance(inner, nn.ModuleList) else []
        if len({type(child) for child in stage}) == 1 and all(_is_composite(child) for child in stage):
            yield from ((_join(full, child),) for child, _ in inner.named_children())
        else:
            yield (full,)


def _find_stacks(model: nn.Module) -> dict[str, _Stack]:
    """Stacks by the names of their containers."""
    found = list(_containers(model, "", bare=False))
    if found:
        smallest = MIN_SHARE_OF_LARGEST_STACK * max(_numel(container) for _, container, _ in found)
    else:  # lists of bare layers, if they are the bulk of the model
        found = list(_containers(model, "", bare=True))
        smallest = MIN_SHARE_OF_BARE_STACK * _numel(model)
    stacks = {
        name: _Stack((name,), tuple(_blocks_of(container, name, items)))
        for name, container, items in found
        if _numel(container) >= smallest
    }
    for owner in dict.fromkeys(name.rpartition(".")[0] for name in stacks if name):
        stacks |= _zipped(model.get_submodule(owner), owner, stacks)
    return stacks


def _zipped(owner: nn.Module, owner_name: str, stacks: dict[str, _Stack]) -> dict[str, _Stack]:
    """Joins lists that one loop of the owner's forward walks together: XLM's attentions, norms and ffns."""
    lists = {name: child for name, child in owner.named_children() if isinstance(child, nn.ModuleList)}
    if len(lists) < 2:
        return {}
    uses = forward_uses(owner)
    loops = {name: _loops_of(uses, name) for name in lists}
    joined: dict[str, _Stack] = {}
    for name, container in lists.items():
        full = _join(owner_name, name)
        if full not in stacks or full in joined:
            continue
        mates = [
            mate for mate in lists
            if mate == name or (len(lists[mate]) == len(container) and loops[mate] & loops[name])
        ]  # fmt: skip
        if len(mates) > 1:
            names = tuple(_join(owner_name, mate) for mate in mates)
            rows = tuple(tuple(f"{mate}.{row}" for mate in names) for row in range(len(container)))
            joined |= dict.fromkeys(names, _Stack(names, rows))
    return joined


# ----------------------------------------------------------------------------------------------------------
# Order: what runs before, between and after them


@dataclass(frozen=True)
class _Item:
    """One entry of the model in execution order: a block of a stack, or a piece outside the stacks."""

    names: tuple[str, ...]
    is_block: bool = False
    embeds: bool = False
    in_loop: bool = False  # runs among the blocks of the stack that follows: goes with its first block


def _uses_of(uses: list[Use], child: str) -> list[tuple[int, Use]]:
    return [(at, use) for at, use in enumerate(uses) if _is_within(use.path, child)]


def _loops_of(uses: list[Use], child: str) -> frozenset[int]:
    return frozenset().union(*(use.loops for _, use in _uses_of(uses, child)))


def _uses_below(uses: list[Use], child: str) -> list[Use]:
    """What ``uses`` say of the children of ``child``, from its point of view."""
    inner = [use for use in uses if use.path.startswith(child + ".")]
    return [Use(use.path[len(child) + 1 :], use.called, use.loops) for use in inner]


def _entries(module: nn.Module) -> list[str]:
    """What ``module`` registers that holds parameters: its own parameters, then its children."""
    own = [name for name, parameter in module._parameters.items() if parameter is not None]
    return own + [name for name, child in module.named_children() if _has_parameters(child)]


def _place_of_stack(uses: list[Use], entry: str) -> int | None:
    """Where forward loops over a stack, the last time (earlier loops prepare it), or else calls it."""
    looped = [at for at, use in _uses_of(uses, entry) if use.loops]
    return looped[-1] if looped else _place(uses, entry, frozenset())[0]


def _place(uses: list[Use], entry: str, stack_loops: frozenset[int]) -> tuple[int | None, bool]:
    """Where forward first calls ``entry``, and whether it does so only inside the loops over the blocks."""
    mine = _uses_of(uses, entry)
    mine = [(at, use) for at, use in mine if use.called and use.path == entry] or mine
    outside = [at for at, use in mine if not use.loops & stack_loops]
    if outside:
        return outside[0], False
    return (mine[0][0], True) if mine else (None, False)


def _in_order(module: nn.Module, uses: list[Use], stacked: list[str]) -> list[tuple[str, bool]]:
    """Entries of ``module`` in execution order, each with whether it runs inside the loop over a stack.

    Those that do come right before the stacks. What forward does not name comes first if it is an embedding,
    else right after the entry registered before it. ``stacked`` are the entries that are stacks.
    """
    stack_loops = frozenset().union(*(_loops_of(uses, entry) for entry in stacked))
    placed: list[tuple[int, int, str]] = []
    among: list[str] = []
    last = FIRST + 1
    for index, entry in enumerate(_entries(module)):
        if entry in stacked:
            at, in_loop = _place_of_stack(uses, entry), False
        else:
            at, in_loop = _place(uses, entry, stack_loops)
        if in_loop:
            among.append(entry)
            continue
        if at is None and isinstance(module._modules.get(entry), nn.Embedding):
            placed.append((FIRST, index, entry))
            continue
        last = last if at is None else at
        placed.append((last, index, entry))
    order = [entry for _, _, entry in sorted(placed)]
    first_stack = next((index for index, entry in enumerate(order) if entry in stacked), len(order))
    return [
        *((entry, False) for entry in order[:first_stack]),
        *((entry, True) for entry in among),
        *((entry, False) for entry in order[first_stack:]),
    ]


def _walk(module: nn.Module, name: str, stacks: dict[str, _Stack], inherited: list[Use]) -> Iterator[_Item]:
    """The items of ``module`` in execution order; ``inherited``: how the module around uses its children."""
    if name in stacks:
        yield from _stack_items(module, name, stacks[name])
        return
    entries = _entries(module)
    uses = forward_uses(module)
    if not any(_uses_of(uses, entry) for entry in entries):
        uses = inherited  # a plain container: only the module around it knows the order
    stacked = [entry for entry in entries if _join(name, entry) in stacks]
    done: set[str] = set()
    for entry, in_loop in _in_order(module, uses, stacked):
        full, child = _join(name, entry), module._modules.get(entry)
        if full in done:  # zipped with a container that came before
            continue
        if child is not None and any(_is_within(container, full) for container in stacks):
            done.update(stacks[full].containers if entry in stacked else ())
            yield from _walk(child, full, stacks, _uses_below(uses, entry))
        else:
            yield _Item((full,), embeds=_embeds(child), in_loop=in_loop)


def _stack_items(container: nn.Module, name: str, stack: _Stack) -> Iterator[_Item]:
    """The blocks, and around them whatever else a sequence holds before and after its run of blocks."""
    if len(stack.containers) > 1:
        yield from (_Item(names, is_block=True) for names in stack.blocks)
        return
    for child_name, child in container.named_children():
        full = _join(name, child_name)
        inner = [names for names in stack.blocks if _is_within(names[0], full)]
        if inner:
            yield from (_Item(names, is_block=True) for names in inner)
        elif _has_parameters(child):
            yield _Item((full,), embeds=_embeds(child))


def _without_stacks(model: nn.Module) -> ArchSpec:
    """Top-level children, below whatever only wraps: embeddings, the last one as head, others as blocks."""
    module, name = model, ""
    while len(entries := _entries(module)) == 1 and entries[0] in module._modules:
        module, name = module.get_submodule(entries[0]), _join(name, entries[0])
    if not _is_composite(module):  # a single layer
        return ArchSpec((), (tuple(_join(name, entry) for entry in entries),))
    order = [entry for entry, _ in _in_order(module, forward_uses(module), [])]
    embed = [entry for entry in order if _embeds(module._modules.get(entry))]
    blocks = [entry for entry in order[:-1] if entry not in embed]
    head = [entry for entry in order[-1:] if entry not in embed]
    full = {entry: _join(name, entry) for entry in order}
    return ArchSpec(
        tuple(full[entry] for entry in embed),
        tuple((full[entry],) for entry in blocks),
        tuple(full[entry] for entry in head),
    )


def _assemble(items: list[_Item]) -> ArchSpec:
    """Sorts items in execution order into embeddings, blocks and head."""
    last_block = max(index for index, item in enumerate(items) if item.is_block)
    embed: list[str] = []
    blocks: list[list[str]] = []
    head: list[str] = []
    waiting: list[str] = []  # run inside the loop over blocks that are still to come
    embedding = True
    for index, item in enumerate(items):
        if item.is_block:
            blocks.append([*item.names, *waiting])
            waiting, embedding = [], False
        elif item.in_loop:
            waiting.extend(item.names)
        elif index > last_block:
            head.extend(item.names)
        else:  # below the first block, or between stacks: from an embedding on, input of the next
            embedding = embedding or item.embeds
            (embed if embedding else blocks[-1]).extend(item.names)
    return ArchSpec(tuple(embed), tuple(map(tuple, blocks)), tuple(head))
