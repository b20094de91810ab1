"""``"group_size": "auto"``: how many layers a step trains, from what the link to their states hides.

The engine is made with one layer a group. As soon as the tokens of a step are known (``"tokens_per_step"``, else the
first forward's), and before anything is trained, neighbouring groups are put together. With the update in backward
states lie embedding by embedding and block by block, so that nothing moves. A checkpoint keeps the choice, whatever
another machine would choose.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from hift_ds.engine import build
from hift_ds.engine.deepspeed_seam import SeamEngine
from hift_ds.engine.facts import facts_of
from hift_ds.errors import ConfigError
from hift_ds.layers.grouping import ALWAYS
from hift_ds.optim.group_shard import GroupShard
from hift_ds.ranks import gather
from hift_ds.store.encoded import EncodedStateStore
from hift_ds.store.hiding import BackwardCosts, HiddenLayers, layers_hidden
from hift_ds.store.machine import processes_on_node
from hift_ds.store.speeds import Link, measure_link
from hift_ds.store.split import SplitStateStore

logger = logging.getLogger(__name__)

_WITHIN = Link(1e12, 1e12)  # between a host and itself


class AutoGroups:
    """Finds one engine's group size. Every rank makes the same calls.

    Attributes:
        is_open: the size is to be found.
        chosen: the size that was found or loaded; ``None`` before, and without ``"auto"``.
        line: how that came about, in a sentence; empty before.
    """

    def __init__(self, engine: SeamEngine) -> None:
        self._engine = engine
        self.is_open = engine.hift.group_size == "auto"
        self.chosen: int | str | None = None
        self.line = ""

    def settle_by_config(self) -> None:
        """Choose, if the config says how many tokens a step has."""
        if self.is_open and self._engine.hift.tokens_per_step is not None:
            self._settle(self._engine.hift.tokens_per_step)

    def settle_by_inputs(self, inputs: tuple[Any, ...], named_inputs: Mapping[str, Any]) -> None:
        """Choose, if the size is open and a forward of training is about to begin: its arguments say how many tokens a
        step has.

        Raises:
            ConfigError: it does not.
        """
        if not (self.is_open and torch.is_grad_enabled()):
            return
        values = [*inputs, *named_inputs.values()]
        ids = next((v for v in values if isinstance(v, Tensor) and v.dim() == 2 and not v.is_floating_point()), None)
        of_all_ranks = gather(None if ids is None else ids.numel())
        found = [numel for numel in of_all_ranks if numel is not None]
        if len(found) < len(of_all_ranks):
            raise ConfigError(
                '"hift.group_size": auto: the first forward has no token ids of shape (rows, tokens) among its '
                'arguments; give "hift": {"tokens_per_step": N}, the input tokens of a step on one rank'
            )
        self._settle(min(found) * self._engine.gradient_accumulation_steps())

    def settle_by_checkpoint(self, saved: int | str | None) -> None:
        """Take over ``saved``, which the run has found whose checkpoint is about to be loaded.

        Args:
            saved: ``None`` if it has not been looking, or not found.
        """
        if saved is None or not (self.is_open or self.chosen is not None):
            return
        if saved != self.chosen:
            self.line = f"group size auto: {saved}, as the checkpoint has it"
            if self.chosen is not None:
                self._say()
            self._take(saved)

    def _settle(self, tokens: int) -> None:
        """Choose, on all ranks alike: what the slowest of them hides."""
        engine = self._engine
        layers = self._rotating()
        numels = [sum(member.whole_numel for member in layer.members) for layer in layers]
        costs, largest = measured_costs(engine), self._largest_with_room(layers)
        found: list[HiddenLayers] = gather(layers_hidden(costs, numels, tokens, largest=largest))
        choice = min(found, key=lambda hidden: hidden.group_size)
        self.line = f"group size auto: {choice.line()}"
        if min(gather(largest)) <= choice.group_size < len(layers):
            self.line += "; for the gradients of more layers host memory has no room"
        self._say()
        self._take("all" if choice.num_groups == 1 else choice.group_size)

    def _say(self) -> None:
        if self._engine.global_rank == 0:
            logger.info(self.line)

    def _largest_with_room(self, layers: list[GroupShard]) -> int:
        """Layers a step for whose gradients (and second copies of states) host memory has room; one at least."""
        engine, optimizer = self._engine, self._engine.optimizer
        states, micro_batches = optimizer.states, engine.gradient_accumulation_steps()
        kept = [optimizer.kept_on_host(layer, micro_batches) + states.held_bytes(layer) for layer in layers]
        at_rest = optimizer.store.host_bytes() - max(map(states.held_bytes, layers))
        room = engine.machine.host_bytes().total / processes_on_node() - at_rest
        sizes = range(len(layers), 1, -1)
        return next((m for m in sizes if max(sum(kept[i : i + m]) for i in range(0, len(kept), m)) <= room), 1)

    def _rotating(self) -> list[GroupShard]:
        """The groups that take turns, bottom to top; before the choice one layer each."""
        groups = self._engine.optimizer.groups
        return [groups[index] for index in sorted(groups) if index != ALWAYS]

    def _take(self, group_size: int | str) -> None:
        """Put groups together, ``group_size`` layers each, or all."""
        engine, optimizer = self._engine, self._engine.optimizer
        hift = engine.hift.model_copy(update={"group_size": group_size, "tokens_per_step": None})
        partition = build.cut_model(replace(facts_of(engine), hift=hift), engine.module)
        pieces = [part for group in self._rotating() for part in apart(group)]
        home = {name: group.index for group in partition.groups for name in group.param_names}
        shards = {
            group.index: optimizer.parameters.merged(
                group.index, group.name, [piece for piece in pieces if home[piece.members[0].name] == group.index]
            )
            for group in partition.groups
        }
        if ALWAYS in optimizer.groups:
            shards[ALWAYS] = optimizer.groups[ALWAYS]
        optimizer.regroup(shards)
        build.check_room(facts_of(engine), optimizer)
        engine.hift, engine.partition = hift, partition
        self.is_open, self.chosen = False, group_size
        if hasattr(engine, "savings"):
            engine.savings.regroup(optimizer.weight_names())


def apart(group: GroupShard) -> list[GroupShard]:
    """Its embedding, blocks and head as groups of their own, with their chunks counted as each counts them."""
    return [replace(part, parts=(replace(part, first=0),), first=0) for part in group.parts]


def measured_costs(engine: SeamEngine) -> BackwardCosts:
    """What updates in backward cost on this rank: bytes are counted, speeds measured in some tens of milliseconds."""
    optimizer, state, device = engine.optimizer, engine.hift.state, engine.device
    store = optimizer.store
    assert isinstance(store, EncodedStateStore | SplitStateStore)
    rotating = [group for index, group in optimizer.groups.items() if index != ALWAYS]
    numels = [sum(member.numel for member in group.members) for group in rotating]
    dtype = rotating[0].members[0].param.dtype
    state_bytes = store.total_bytes() / max(sum(numels), 1)
    largest_chunk = max(store.num_bytes(chunk.id) for group in rotating for chunk in group.chunks)
    largest = max(*numels, 1)
    on_host = state.step_on == "host" and device.type != "cpu"  # else the host is where all is computed
    return BackwardCosts.measured(
        device,
        dtype,
        largest,
        state,
        state_bytes=state_bytes,
        room=state.first_slots * largest_chunk / state_bytes if state.prefetch else 0.0,
        link=store.link,
        host_link=_WITHIN if device.type == "cpu" else measure_link(device, 4 * largest, state.pin_memory),
        ranks=optimizer.parameters.ranks.world_size,
        share=optimizer.states.split.share if optimizer.states.split else float(on_host),
        beside=not on_host,
        parked_bytes=facts_of(engine).parked_bytes(dtype),
    )
