"""Walking torch's autograd graph, before a backward, to see what it will bring."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor
from torch.autograd.graph import Node

from hift_ds.errors import HiFTError


def nodes_below(loss: Tensor) -> Iterator[Node]:
    """The nodes of the graph that backward from ``loss`` passes, each once, in no order."""
    seen: set[Node] = set()
    left = [loss.grad_fn]
    while left:
        node = left.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        yield node
        left.extend(function for function, _ in node.next_functions)


def is_recomputed_reentrantly(node: Node) -> bool:
    """Whether the graph under ``node`` is built and run within backward (``use_reentrant=True``), so that it is not
    seen before, and a weight's gradient may come in several parts."""
    return type(node).__name__ == "CheckpointFunctionBackward"


def weights_below(loss: Tensor) -> set[Tensor]:
    """The leaves that backward from ``loss`` will bring gradients to.

    Raises:
        HiFTError: some of the graph is built within backward (reentrant checkpointing).
    """
    found: set[Tensor] = set()
    for node in nodes_below(loss):
        if is_recomputed_reentrantly(node):
            raise HiFTError(
                '"hift.update": in_backward cannot follow a block that is recomputed with use_reentrant=True; pass '
                'use_reentrant=False, or set "hift": {"activations": {"checkpointing": true}} instead'
            )
        if hasattr(node, "variable"):
            found.add(node.variable)
    return found
