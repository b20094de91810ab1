"""The fp32 weights behind ones that were rounded to 16 bits when they were loaded, for the masters."""

from __future__ import annotations

from torch import Tensor, nn

from hift_ds.hf.safetensors_folder import SafetensorsFolder

_ATTRIBUTE = "hift_exact_values"  # of a model


class ExactValues:
    """fp32 weights as a folder has them, read when asked for.

    Args:
        sources: name in memory -> tensor in the folder, for the weights that were rounded.
    """

    def __init__(self, folder: SafetensorsFolder, sources: dict[str, str]) -> None:
        self._folder = folder
        self._sources = sources

    def __call__(self, name: str, start: int, numel: int) -> Tensor | None:
        """Elements [start, start + numel) of a weight, flat; ``None`` if it was not rounded."""
        if name not in self._sources:
            return None
        return self._folder.tensor(self._sources[name]).reshape(-1)[start : start + numel]


def remember_exact_values(model: nn.Module, values: ExactValues) -> None:
    """Leave ``values`` with ``model``, for the engine that will be made of it."""
    model.__dict__[_ATTRIBUTE] = values


def exact_values(model: nn.Module) -> ExactValues | None:
    """The values that :func:`remember_exact_values` has left with ``model``, if any."""
    return model.__dict__.get(_ATTRIBUTE)
