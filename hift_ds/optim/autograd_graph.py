"""Walking torch's autograd graph, before a backward, to see what it will bring."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor
from torch.autograd.graph import Node


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
