"""What really runs when: a forward watched by hooks, to hold what was derived without one against."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


def parameters_by_first_use(model: nn.Module, forward: Callable[[], object]) -> list[str]:
    """Names of the parameters in the order in which ``forward`` first enters the module that owns them."""
    names = {parameter: name for name, parameter in model.named_parameters()}
    order: dict[str, None] = {}

    def note(module: nn.Module, *_: object) -> None:
        for parameter in module._parameters.values():
            if parameter is not None:
                order.setdefault(names[parameter])

    handles = [module.register_forward_pre_hook(note) for module in model.modules()]
    try:
        with torch.no_grad():
            forward()
    finally:
        for handle in handles:
            handle.remove()
    return list(order)


@contextmanager
def watch_graph(model: nn.Module, module_names: list[str]) -> Iterator[dict[str, bool]]:
    """Within the block: which of the named modules returned a tensor that backward would go through."""
    has_graph: dict[str, bool] = {}

    def note(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: object, output: object) -> None:
            tensors = output if isinstance(output, tuple) else (output,)
            has_graph[name] = any(isinstance(tensor, Tensor) and tensor.requires_grad for tensor in tensors)

        return hook

    handles = [model.get_submodule(name).register_forward_hook(note(name)) for name in module_names]
    try:
        yield has_graph
    finally:
        for handle in handles:
            handle.remove()
