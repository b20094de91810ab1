"""What one rank writes of a training state, tensor by tensor, in the order in which training will change it.

Only the active group changes in a step, so a snapshot that is always ahead of the schedule stays one of a
single moment even while training goes on. Memory: one tensor when it is written at once, one group when it is
copied first.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping

from torch import Tensor, nn

from hift_ds.checkpoint.files import TensorSpec
from hift_ds.checkpoint.state_files import spec_of
from hift_ds.layers.arch import whole_shape
from hift_ds.layers.grouping import ALWAYS
from hift_ds.optim.group_optimizer import GroupOptimizer
from hift_ds.optim.group_shard import GroupShard
from hift_ds.optim.state_layout import StateTensor

WEIGHTS, STATES = "weights", "states"  # the two files of tensors


def saved_tensors(module: nn.Module) -> dict[str, Tensor]:
    """Every parameter (tied ones once) and every persistent buffer by name: the live tensors, not copies."""
    tensors: dict[str, Tensor] = dict(module.named_parameters())
    seen = {id(tensor) for tensor in tensors.values()}
    for prefix, submodule in module.named_modules():
        for name, buffer in submodule._buffers.items():
            if buffer is None or name in submodule._non_persistent_buffers_set or id(buffer) in seen:
                continue
            seen.add(id(buffer))
            tensors[f"{prefix}.{name}" if prefix else name] = buffer
    return tensors


class WritePlan:
    """One rank's part of one checkpoint.

    Args:
        tensors: weights and buffers to save, by name (:func:`saved_tensors`).
        writes_weights: this rank writes the weights; the others only take part in bringing them together.
        whole: gives the whole of a parameter that may be partitioned; a collective then.
    """

    def __init__(
        self,
        optimizer: GroupOptimizer,
        tensors: Mapping[str, Tensor],
        writes_weights: bool,
        whole: Callable[[Tensor], Tensor],
    ) -> None:
        self._optimizer = optimizer
        self._whole = whole
        self._states: dict[int, list[StateTensor]] = {}  # by chunk id
        self.writes_weights = writes_weights
        self.groups = self._groups_by_next_turn()
        trained = [member.name for group in self.groups for member in group.members]
        self._fixed = {name: tensor for name, tensor in tensors.items() if name not in set(trained)}
        ordered = {**self._fixed, **{name: tensors[name] for name in trained}}
        for group in self.groups:
            for chunk in group.chunks:
                self._states[chunk.id] = optimizer.states.tensors_of(group, chunk)
        self.specs = {
            WEIGHTS: [TensorSpec(n, t.dtype, whole_shape(t)) for n, t in ordered.items() if writes_weights],
            STATES: [
                spec_of(tensor) for group in self.groups for chunk in group.chunks for tensor in self._states[chunk.id]
            ],
        }  # fmt: skip

    @property
    def num_bytes(self) -> int:
        """Bytes that this rank will write, headers not counted."""
        return sum(spec.num_bytes for specs in self.specs.values() for spec in specs)

    def frozen(self) -> Iterator[tuple[str, Tensor]]:
        """(file, whole tensor) of the parameters that are in no group: live tensors."""
        return self._weights(tensor for tensor in self._fixed.values() if isinstance(tensor, nn.Parameter))

    def buffers(self) -> Iterator[tuple[str, Tensor]]:
        """(file, tensor) of the buffers: live tensors. They come after the frozen parameters."""
        return self._weights(tensor for tensor in self._fixed.values() if not isinstance(tensor, nn.Parameter))

    def of_group(self, group: GroupShard) -> Iterator[tuple[str, Tensor]]:
        """(file, tensor) of a group: its weights, whole, and this rank's states, flat or of their own shape. Views of
        live tensors."""
        yield from self._weights(member.param for member in group.members)
        states = self._optimizer.states
        states.store_of(group).synchronize()
        for chunk in group.chunks:
            if tensors := self._states[chunk.id]:
                for tensor in states.read(group, chunk, tensors):
                    yield STATES, tensor

    def _weights(self, tensors: Iterable[Tensor]) -> Iterator[tuple[str, Tensor]]:
        for tensor in tensors:
            whole = self._whole(tensor)
            if self.writes_weights:
                yield WEIGHTS, whole

    def _groups_by_next_turn(self) -> list[GroupShard]:
        """Always-active first, then as the schedule will visit them."""
        groups, schedule = self._optimizer.groups, self._optimizer.schedule
        order = [ALWAYS, schedule.active, *schedule.upcoming(2 * schedule.num_groups)]
        return [groups[index] for index in dict.fromkeys(order) if index in groups]
