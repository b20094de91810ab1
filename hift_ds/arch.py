"""Where the embeddings, the blocks and the head of a model live, found by structure and not by name.

The repeated blocks of a model sit in containers (``nn.ModuleList``, ``nn.Sequential``, ``nn.ModuleDict``): the
outermost containers of composite modules that hold a fair share of the parameters are its *stacks*. What runs before
the first stack embeds; what runs after the last is the head; what runs between two stacks goes with the block below
it. "Runs" is read from the source of each ``forward`` (:mod:`hift_ds.forward_order`), registration order where
that is silent. No forward is run and no parameter is read, so partitioned and meta weights are as good as real ones.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby

from torch import nn

from hift_ds.errors import GroupingError
from hift_ds.forward_order import Use, forward_uses

MIN_SHARE_OF_LARGEST_STACK = 0.01  # below it a container is a detail (a head of two layers), not a stack of blocks


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


def find_arch(model: nn.Module) -> ArchSpec:
    """Finds embeddings, blocks and head of ``model`` by its structure.

    A model without any stack is cut at its top-level children, one unit each.
    """
    stacks = _find_stacks(model)
    items = list(_walk(model, "", stacks, [])) if stacks else _without_stacks(model)
    return _assemble(items)


def check_arch(model: nn.Module, arch: ArchSpec) -> None:
    """Raises GroupingError if a name in ``arch`` is neither a module nor a parameter of ``model``, or comes twice."""
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


# ------------------------------------------------------------------------------------------------------------------
# Stacks: which containers hold the blocks


@dataclass(frozen=True)
class _Stack:
    children: tuple[str, ...]  # of the module that owns it, in registration order; zipped ones are several
    blocks: tuple[tuple[str, ...], ...]  # full names


def _numel(module: nn.Module) -> int:
    """Parameters of ``module``, shared ones once; ``ds_numel`` is the full size of one that ZeRO-3 has cut up."""
    return sum(getattr(p, "ds_numel", None) or p.numel() for p in module.parameters())


def _is_composite(module: nn.Module) -> bool:
    return any(True for child in module.children() for _ in child.parameters())


def _contains(module: nn.Module, kind: type[nn.Module]) -> bool:
    return any(isinstance(inner, kind) for inner in module.modules())


def _join(prefix: str, name: str) -> str:
    return f"{prefix}.{name}" if prefix else name


def _longest_run(container: nn.Module) -> list[str]:
    """The longest run of consecutive composite children of one class, by parameters."""
    runs = [list(run) for _, run in groupby(container.named_children(), key=lambda item: type(item[1]))]
    runs = [run for run in runs if all(_is_composite(child) for _, child in run)]
    best = max(runs, key=lambda run: sum(_numel(child) for _, child in run), default=[])
    return [name for name, _ in best]


def _items_of(container: nn.Module, leaves: bool) -> list[str]:
    """The children of ``container`` that are blocks; empty if it does not look like a stack."""
    children = [(name, child) for name, child in container.named_children() if any(True for _ in child.parameters())]
    fits = all(not isinstance(child, nn.Embedding) and (leaves or _is_composite(child)) for _, child in children)
    if isinstance(container, nn.ModuleList):
        return [name for name, _ in children] if fits else []
    if isinstance(container, nn.ModuleDict):
        alike = len({type(child) for _, child in children}) == 1 and len(children) > 1
        return [name for name, _ in children] if fits and alike else []
    if isinstance(container, nn.Sequential):
        run = _longest_run(container)
        return run if len(run) > 1 else []
    return []


def _blocks_of(container: nn.Module, name: str, items: list[str]) -> Iterator[tuple[str, ...]]:
    """One block an item; lists of like items within the list (stages) are opened up."""
    for item in items:
        inner = container._modules[item]
        full = _join(name, item)
        kinds = {type(child) for child in inner.children()}
        if isinstance(inner, nn.ModuleList) and len(kinds) == 1 and all(map(_is_composite, inner.children())):
            yield from ((_join(full, child),) for child, _ in inner.named_children())
        else:
            yield (full,)


def _find_stacks(model: nn.Module) -> dict[str, list[_Stack]]:
    """Stacks by the name of the module that owns the container."""
    for leaves in (False, True):  # containers of bare layers count only where there is nothing better
        found = list(_containers(model, "", leaves))
        if found:
            break
    sizes = {name: sum(_numel(container._modules[item]) for item in items) for name, container, items in found}
    largest = max(sizes.values(), default=0)
    stacks: dict[str, list[_Stack]] = {}
    for name, container, items in found:
        if sizes[name] >= MIN_SHARE_OF_LARGEST_STACK * largest:
            owner, _, child = name.rpartition(".")
            stacks.setdefault(owner, []).append(_Stack((child,), tuple(_blocks_of(container, name, items))))
    return {owner: _zip_lists(model.get_submodule(owner), owner, found) for owner, found in stacks.items()}


def _containers(module: nn.Module, name: str, leaves: bool) -> Iterator[tuple[str, nn.Module, list[str]]]:
    """The outermost containers that look like stacks; lists nested in a block (experts) are never reached."""
    items = _items_of(module, leaves)
    if items:
        yield name, module, items
        return
    for child_name, child in module.named_children():
        yield from _containers(child, _join(name, child_name), leaves)


def _zip_lists(owner: nn.Module, owner_name: str, stacks: list[_Stack]) -> list[_Stack]:
    """Joins lists that one loop of the owner's forward indexes together, such as XLM's attentions, norms and ffns."""
    lists = {name: child for name, child in owner.named_children() if isinstance(child, nn.ModuleList)}
    loops = {name: _loops_of(forward_uses(owner), name) for name in lists} if len(lists) > 1 else {}
    done: set[str] = set()
    joined: list[_Stack] = []
    for stack in stacks:
        child = stack.children[0]
        if child in done:
            continue
        partners = [
            name for name in loops
            if name == child or (len(lists[name]) == len(stack.blocks) and loops[name] & loops.get(child, frozenset()))
        ]  # fmt: skip
        if len(partners) < 2:
            joined.append(stack)
            continue
        done.update(partners)
        rows = (tuple(_join(owner_name, f"{name}.{row}") for name in partners) for row in range(len(stack.blocks)))
        joined.append(_Stack(tuple(partners), tuple(rows)))
    return joined


# ------------------------------------------------------------------------------------------------------------------
# Order: what runs before, between and after them


@dataclass(frozen=True)
class _Item:
    """One entry of the model in execution order: a block of a stack, or a piece outside the stacks."""

    names: tuple[str, ...]
    is_block: bool
    embeds: bool = False
    in_loop: bool = False  # runs among the blocks of the stack that follows: goes with its first block


def _uses_of(uses: list[Use], child: str) -> list[tuple[int, Use]]:
    return [(at, use) for at, use in enumerate(uses) if use.path == child or use.path.startswith(child + ".")]


def _loops_of(uses: list[Use], child: str) -> frozenset[int]:
    return frozenset().union(*(use.loops for _, use in _uses_of(uses, child)))


def _position(uses: list[Use], child: str, stack_loops: frozenset[int]) -> tuple[int | None, bool]:
    """Where forward first calls ``child``, and whether it does so only inside the loops over the blocks."""
    mine = _uses_of(uses, child)
    mine = [(at, use) for at, use in mine if use.called and use.path == child] or mine
    outside = [(at, use) for at, use in mine if not use.loops & stack_loops]
    if outside:
        return outside[0][0], False
    return (mine[0][0], True) if mine else (None, False)


def _entries(module: nn.Module) -> list[str]:
    """What ``module`` registers that holds parameters: its own parameters, then its children."""
    own = [name for name, parameter in module._parameters.items() if parameter is not None]
    return own + [name for name, child in module.named_children() if any(True for _ in child.parameters())]


def _in_order(module: nn.Module, uses: list[Use], stacks: list[_Stack]) -> list[tuple[str, bool]]:
    """Entries of ``module`` in execution order, each with whether it runs inside the loop over a stack.

    Those that do come right before the stack. An entry that forward does not name follows the one registered
    before it.
    """
    first_of = {child: stack.children[0] for stack in stacks for child in stack.children}
    stack_loops = frozenset().union(*(_loops_of(uses, child) for child in first_of))
    keyed: list[tuple[tuple[int, int], str, bool]] = []
    last = -1
    for index, name in enumerate(_entries(module)):
        if name in first_of:
            looped = [at for at, use in _uses_of(uses, name) if use.loops]  # the last: earlier ones prepare the blocks
            at, in_loop = (looped[-1] if looped else _position(uses, name, frozenset())[0]), False
        else:
            at, in_loop = _position(uses, name, stack_loops)
        if at is None and isinstance(module._modules.get(name), nn.Embedding):
            at = -1
        last = last if at is None else at
        keyed.append(((last, index), name, in_loop))
    order = [(name, in_loop) for _, name, in_loop in sorted(keyed)]
    among = [entry for entry in order if entry[1]]
    apart = [entry for entry in order if not entry[1]]
    first_stack = next((index for index, (name, _) in enumerate(apart) if name in first_of), len(apart))
    return apart[:first_stack] + among + apart[first_stack:]


def _walk(module: nn.Module, name: str, stacks: dict[str, list[_Stack]], inherited: list[Use]) -> Iterator[_Item]:
    """The items of ``module`` in execution order."""
    uses = forward_uses(module)
    if not any(_uses_of(uses, entry) for entry in _entries(module)):
        uses = inherited  # a plain container: the module around it says how its children are used
    own = stacks.get(name, [])
    by_child = {child: stack for stack in own for child in stack.children}
    emitted: set[str] = set()
    for entry, in_loop in _in_order(module, uses, own):
        full, child = _join(name, entry), module._modules.get(entry)
        if entry in by_child:
            if entry in emitted:
                continue
            emitted.update(by_child[entry].children)
            yield from _stack_items(child, full, by_child[entry])
        elif child is not None and any(owner == full or owner.startswith(full + ".") for owner in stacks):
            inner = [Use(use.path[len(entry) + 1 :], use.called, use.loops) for _, use in _uses_of(uses, entry)]
            yield from _walk(child, full, stacks, [use for use in inner if use.path])
        else:
            yield _Item((full,), is_block=False, embeds=child is not None and _contains(child, nn.Embedding),
                        in_loop=in_loop)  # fmt: skip


def _stack_items(container: nn.Module, name: str, stack: _Stack) -> Iterator[_Item]:
    """The blocks, and around them what else an ``nn.Sequential`` holds before and after its run of blocks."""
    if len(stack.children) > 1:
        yield from (_Item(names, is_block=True) for names in stack.blocks)
        return
    blocks = {names[0]: names for names in stack.blocks}
    for child_name, child in container.named_children():
        full = _join(name, child_name)
        inner = [block for block in blocks if block == full or block.startswith(full + ".")]
        if inner:
            yield from (_Item(blocks[block], is_block=True) for block in inner)
        elif any(True for _ in child.parameters()):
            yield _Item((full,), is_block=False, embeds=_contains(child, nn.Embedding))


def _without_stacks(model: nn.Module) -> list[_Item]:
    """Top-level children as blocks, below whatever only wraps; the last one counts as head, embeddings as such."""
    module, name = model, ""
    while len(_entries(module)) == 1 and _entries(module)[0] in module._modules:
        name = _join(name, _entries(module)[0])
        module = module._modules[_entries(module)[0]]
    order = [entry for entry, _ in _in_order(module, forward_uses(module), [])]
    items = []
    for entry in order:
        child = module._modules.get(entry)
        embeds = child is not None and _contains(child, nn.Embedding)
        is_head = entry == order[-1] and len(order) > 1
        items.append(_Item((_join(name, entry),), is_block=not embeds and not is_head, embeds=embeds))
    return items


def _assemble(items: list[_Item]) -> ArchSpec:
    """Sorts items in execution order into embeddings, blocks and head."""
    at_blocks = [index for index, item in enumerate(items) if item.is_block]
    first, last = (at_blocks[0], at_blocks[-1]) if at_blocks else (len(items), len(items))
    embed: list[str] = []
    blocks: list[list[str]] = []
    head: list[str] = []
    waiting: list[str] = []  # run inside a loop over blocks that are still to come
    in_embedding = True
    for index, item in enumerate(items):
        if item.is_block:
            blocks.append([*item.names, *waiting])
            waiting, in_embedding = [], False
        elif item.in_loop:
            waiting.extend(item.names)
        elif index < first:
            embed.extend(item.names)
        elif index > last:
            head.extend(item.names)
        else:  # between two stacks: from an embedding on it is the input of the stack above
            in_embedding = in_embedding or item.embeds
            (embed if in_embedding else blocks[-1]).extend(item.names)
    return ArchSpec(tuple(embed), tuple(map(tuple, blocks)), tuple(head))
