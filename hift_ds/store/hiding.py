"""How many layers a step can update in backward while nobody waits for the link, and which share of them the host
should update: the arithmetic behind ``"group_size": "auto"`` and ``"step_on": "split"``.

A step of one layer group computes forward through all layers, backward down to the group, and backward through the
group. The states of its topmost layers arrive meanwhile, as many as there is room for; those of each further layer can
come when one above has been updated, and should be there when backward has come down to it. Where updates begin when
backward has ended, or gradients are clipped by the step's exact norm, nothing hides what has no room then.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from hift_ds.config import StateConfig
from hift_ds.store.speeds import ASSUMED_SPEEDS, Link, Speeds, measure_flops, measure_link, measure_update

PATIENCE = 0.05  # of a step's computing may be spent waiting: then the link still counts as hidden
SAME = 0.01  # step times that differ by less count as one
NUM_SHARES = 20  # shares of the host that are compared: 0, 1/20, 2/20 ... 1
MOST_TOKENS = 1 << 26
ROUNDING = 1e-12  # of a step: what is less was not waited for
UNKNOWN_TOKENS = 1  # of a step: as if nothing hid the link
_ASSUMED_LINK = Link(ASSUMED_SPEEDS.link, ASSUMED_SPEEDS.link)


@dataclass(frozen=True)
class BackwardCosts:
    """What updates in backward cost on one rank.

    Attributes:
        state_bytes: that a parameter updated on the device moves, each way: 12 for AdamW with masters.
        room: parameters whose states have room on the device at once.
        flops_s: matrix products.
        link: bytes a second between the device and where states rest; ``None``: states do not move.
        host_link: between the device and host memory, for gradients and weights of what the host updates.
        weight_bytes: of a weight, and of its gradient: what a parameter updated on the host moves, each way.
        device_s, host_s: an update, seconds a parameter.
        both_ways: states leave and arrive at once (two slots).
        prefetch: states come before they are needed.
        ranks: that share each layer's update.
        share: of the parameters that the host updates.
        beside: the host updates its share beside backward; else backward waits for each update (``step_on: host``).
        parked_bytes: of a gradient that is in host memory until backward has ended, when updates begin, and comes back
            for its own; 0: they begin then, and gradients wait on the device; ``None``: they are made in backward.
    """

    state_bytes: float
    room: float
    flops_s: float = ASSUMED_SPEEDS.flops_s
    link: Link | None = _ASSUMED_LINK
    host_link: Link = _ASSUMED_LINK
    weight_bytes: int = 2
    device_s: float = ASSUMED_SPEEDS.device_s
    host_s: float = ASSUMED_SPEEDS.host_s
    both_ways: bool = True
    prefetch: bool = True
    ranks: int = 1
    share: float = 0.0
    beside: bool = True
    parked_bytes: int | None = None

    @classmethod
    def measured(
        cls, device: torch.device, dtype: torch.dtype, largest: int, state: StateConfig, *, state_bytes: float,
        room: float, link: Link | None, host_link: Link, ranks: int, parked_bytes: int | None, share: float = 0.0,
        beside: bool = True,
    ) -> BackwardCosts:  # fmt: skip
        """The costs on this machine: its products and updates are measured, in some tens of milliseconds.

        Args:
            device: where the model computes.
            dtype: of the weights.
            largest: parameters of the largest embedding, block or head.
        """
        host_s = measure_update(torch.device("cpu"), largest)
        return cls(
            state_bytes=state_bytes,
            room=room,
            flops_s=measure_flops(device, dtype),
            link=link,
            host_link=host_link,
            weight_bytes=dtype.itemsize,
            device_s=host_s if device.type == "cpu" else measure_update(device, largest),
            host_s=host_s,
            both_ways=state.first_slots > 1,
            prefetch=state.prefetch,
            ranks=ranks,
            share=share,
            beside=beside,
            parked_bytes=parked_bytes,
        )

    @classmethod
    def assumed(
        cls, weight_bytes: int, largest: int, state: StateConfig, *, masters: bool, ranks: int,
        parked_bytes: int | None, speeds: Speeds = ASSUMED_SPEEDS,
    ) -> BackwardCosts:  # fmt: skip
        """The costs of AdamW at given speeds, by default those of a machine that is not here.

        Args:
            weight_bytes: of a parameter.
            largest: parameters of the largest embedding, block or head (or of what else moves as one).
            masters: 16-bit weights have fp32 ones.
        """
        link = Link(speeds.link, speeds.link)
        return cls(
            state_bytes=bytes_at_rest(weight_bytes, 8, state, masters),
            room=room_for(largest, state, ranks),
            flops_s=speeds.flops_s,
            link=None if state.residency == "device" else link,
            host_link=link,
            device_s=speeds.device_s,
            host_s=speeds.host_s,
            both_ways=state.first_slots > 1,
            prefetch=state.prefetch,
            ranks=ranks,
            share=float(state.step_on == "host") if state.host_share is None else state.host_share,
            beside=state.step_on != "host",
            parked_bytes=parked_bytes,
        )

    def rates(self) -> str:
        """What was measured, in words."""
        link = self.link or self.host_link
        return (
            f"{self.state_bytes:.3g} bytes a parameter each way over {link.into / 1e9:.3g} GB/s in and "
            f"{link.out / 1e9:.3g} GB/s out, {self.host_s * 1e9:.3g} ns a parameter on the host"
        )

    def step(self, parts: Sequence[int], above: int, total: int, tokens: float) -> tuple[float, float]:
        """The seconds that a step computes, and that it waits on top of them.

        Args:
            parts: parameters of the group's embedding, blocks and head, top to bottom.
            above: parameters above the group.
            total: of the model.
            tokens: of the step, on this rank.
        """
        token_s = tokens / self.flops_s
        clock = computing = 2 * (total + above) * token_s  # forward; backward for the inputs of what is above
        link_free = host_free = 0.0
        updated: list[tuple[float, float]] = []  # parameters that had room, and when they had been updated
        is_late, parked = self.parked_bytes is not None, self.parked_bytes or 0
        if is_late:
            clock += 4 * sum(parts) * token_s
        gradients_back = clock
        for numel in parts:
            moved = numel / self.ranks * (1 - self.share)
            at_once = min(moved, self.room)
            start = max(link_free, vacant := self._vacant_at(updated, at_once))
            ready = clock + (0.0 if is_late else 4 * numel * token_s)  # this layer's gradients are complete
            if not self.prefetch:
                start, at_once = max(start, ready), moved
            if parked and vacant:  # gradients of the layers above have come before
                start = max(start, gradients_back)
            arrived = start + at_once * self._moving_s
            if parked:
                back_s = numel / self.ranks * parked / self.host_link.into
                gradients_back = max(gradients_back, arrived) + back_s
                ready = max(ready, gradients_back)
            link_free = max(arrived, ready) + (moved - at_once) * self._moving_s  # slices that had no room
            on_device = moved * self.device_s
            clock = max(ready, link_free if moved > at_once else arrived) + on_device
            computing += 4 * numel * token_s + on_device
            if moved <= at_once:
                link_free = arrived
            updated.append((at_once, clock))
            if self.share:
                mine = numel / self.ranks * self.share
                down = mine * self.weight_bytes / self.host_link.out
                up = mine * self.weight_bytes / self.host_link.into
                if not self.beside:
                    # The gradient comes down, the host updates, and only then is the next layer's backward launched;
                    # on several ranks it also waits for the new weights, which are sent on.
                    clock += down + mine * self.host_s + (up if self.ranks > 1 else 0.0)
                    host_free = clock + (up if self.ranks == 1 else 0.0)
                    continue
                host_free = max(host_free, ready + down) + mine * self.host_s + up
                link_free += max(down, up) if self.link is not None else 0.0
        waiting = max(clock, host_free) - computing
        return computing, waiting if waiting > ROUNDING * computing else 0.0

    def _vacant_at(self, updated: Sequence[tuple[float, float]], wanted: float) -> float:
        """When enough of what came before has been updated for ``wanted`` more parameters to have room."""
        held = wanted
        for numel, when in reversed(updated):
            held += numel
            if held > self.room:
                return when
        return 0.0

    @property
    def _moving_s(self) -> float:
        """The seconds in which one parameter's states come and go."""
        if self.link is None:
            return 0.0
        one_way = (self.state_bytes / self.link.into, self.state_bytes / self.link.out)
        return max(one_way) if self.both_ways else sum(one_way)

    def cycle(self, numels: Sequence[int], group_size: int, tokens: float) -> tuple[float, float]:
        """:meth:`step`, averaged over the groups of ``group_size`` layers.

        Args:
            numels: parameters of each embedding, block and head, bottom to top.
        """
        total, steps = sum(numels), []
        for start in range(0, len(numels), group_size):
            end = start + group_size
            steps.append(self.step(numels[start:end][::-1], sum(numels[end:]), total, tokens))
        return sum(step[0] for step in steps) / len(steps), sum(step[1] for step in steps) / len(steps)

    def hides(self, numels: Sequence[int], group_size: int, tokens: float) -> bool:
        """True if steps of ``group_size`` layers wait for next to nothing."""
        computing, waiting = self.cycle(numels, group_size, tokens)
        return waiting <= PATIENCE * computing


def bytes_at_rest(weight_bytes: int, moment_bytes: float, state: StateConfig, masters: bool) -> float:
    """Bytes of a parameter's states in the form in which they rest.

    Args:
        weight_bytes: of the parameter.
        moment_bytes: of its fp32 moments.
        masters: 16-bit weights have fp32 ones.
    """
    master = 4 if masters and weight_bytes < 4 else 0
    if master and "split_master" in state.codec:
        master -= 2
    share_kept = 0.5 if "bf16_moments" in state.codec else 0.254 if "int8_moments" in state.codec else 1.0
    return master + share_kept * moment_bytes


def room_for(largest: int, state: StateConfig, ranks: int) -> float:
    """Parameters whose states have room on the device at once: a slot holds one rank's shard of the largest embedding,
    block or head (of ``largest`` parameters), or a slice of it."""
    shard = largest / ranks
    return max(state.first_slots, 1) * min(shard, state.slice_numel or shard)


def costs_before_states(
    device: torch.device,
    dtype: torch.dtype,
    moment_bytes: int,
    state: StateConfig,
    largest: int,
    ranks: int,
    masters: bool,
    parked_bytes: int | None,
) -> BackwardCosts:
    """The costs by what can be measured before there are states.

    Args:
        device: where the model computes.
        dtype: of the weights.
        moment_bytes: of a parameter's fp32 moments.
        largest: parameters of the largest embedding, block or head.
        masters: 16-bit weights have fp32 ones.
        parked_bytes: see :class:`BackwardCosts`.
    """
    link = measure_link(device, 4 * largest, state.pin_memory)
    return BackwardCosts.measured(
        device,
        dtype,
        largest,
        state,
        state_bytes=bytes_at_rest(dtype.itemsize, moment_bytes, state, masters),
        room=room_for(largest, state, ranks),
        link=link if state.residency == "host" else None,
        host_link=link,
        ranks=ranks,
        parked_bytes=parked_bytes,
    )


@dataclass(frozen=True)
class HiddenLayers:
    """A choice, and the figures behind it.

    Attributes:
        group_size: layers a step.
        num_groups: that it makes.
        tokens: of a step on one rank, for which it was made.
        computing_s, waiting_s: of a step, averaged over the groups.
        all_from: tokens a step from which all layers are hidden; ``None``: no number of tokens does it.
        costs: what it was computed from; ``costs.share`` is the host's.
    """

    group_size: int
    num_groups: int
    tokens: float
    computing_s: float
    waiting_s: float
    all_from: int | None
    costs: BackwardCosts

    def line(self) -> str:
        """The choice in one sentence, with the figures."""
        costs = self.costs
        moves = "optimizer states stay where they are"
        if costs.link is not None:
            on_device, on_host = costs.state_bytes * (1 - costs.share), costs.weight_bytes * costs.share
            moves = (
                f"{2 * (on_device + on_host + (costs.parked_bytes or 0)):.3g} bytes a parameter over "
                f"{costs.link.into / 1e9:.3g} GB/s in and {costs.link.out / 1e9:.3g} GB/s out"
            )
        if costs.parked_bytes:
            moves += ", updates after backward (clipped exactly)"
        host = f", {costs.share:.0%} updated on the host" if costs.share else ""
        further = ""
        if self.num_groups > 1:
            further = "; no number of tokens hides all" if self.all_from is None else (
                f"; all layers from {self.all_from:,} tokens a step on"
            )  # fmt: skip
        size = "all layers" if self.num_groups == 1 else f"{self.group_size} layers"
        return (
            f"{size} a step ({self.num_groups} group{'s' if self.num_groups > 1 else ''}{host}) at {self.tokens:,.0f} "
            f"tokens: {moves}, {costs.flops_s / 1e12:.3g} TFLOP/s; a step computes for {self.computing_s:.3g} s and "
            f"waits {self.waiting_s:.3g} s for optimizer states{further}"
        )


def layers_hidden(
    costs: BackwardCosts, numels: Sequence[int], tokens: float, *, split: bool = False, largest: int | None = None
) -> HiddenLayers:
    """The most layers a step that the link hides at ``tokens`` tokens, one at least.

    Args:
        numels: parameters of each embedding, block and head, bottom to top.
        tokens: of a step on one rank, all micro-batches together.
        split: choose the host's share too, whatever ``costs`` says.
        largest: at most so many.
    """
    most = min(largest or len(numels), len(numels))
    chosen, chosen_costs = 1, costs
    for size in range(most, 0, -1):
        tried = replace(costs, share=fastest_share(costs, numels, size, tokens)) if split else costs
        if size == 1 or tried.hides(numels, size, tokens):
            chosen, chosen_costs = size, tried
            break
    computing, waiting = chosen_costs.cycle(numels, chosen, tokens)
    num_groups = -(-len(numels) // chosen)
    return HiddenLayers(chosen, num_groups, tokens, computing, waiting, tokens_that_hide(costs, numels), chosen_costs)


def fastest_share(costs: BackwardCosts, numels: Sequence[int], group_size: int, tokens: float) -> float:
    """The smallest share of the parameters updated on the host with which a step takes hardly longer than with any."""
    shares = [i / NUM_SHARES for i in range(NUM_SHARES + 1)]
    seconds = [sum(replace(costs, share=share).cycle(numels, group_size, tokens)) for share in shares]
    return next(share for share, s in zip(shares, seconds, strict=True) if s <= min(seconds) * (1 + SAME))


def tokens_that_hide(costs: BackwardCosts, numels: Sequence[int], group_size: int | None = None) -> int | None:
    """The fewest tokens a step, within 2 %, for which steps of ``group_size`` layers (``None``: all) wait for next to
    nothing; ``None``: no number of tokens does it."""
    size = group_size or len(numels)
    low, high = 1, 1
    while not costs.hides(numels, size, high):
        low, high = high, 2 * high
        if high > MOST_TOKENS:
            return None
    while high - low > max(low // 50, 1):
        middle = (low + high) // 2
        low, high = (low, middle) if costs.hides(numels, size, middle) else (middle, high)
    return high
