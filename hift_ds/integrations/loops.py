"""Loops of one's own over frameworks that call ``deepspeed.initialize`` by themselves."""

from __future__ import annotations

import contextlib
from collections import UserDict
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from hift_ds.config import BLOCK, parsed
from hift_ds.engine.engine import HiFTEngine
from hift_ds.engine.initialize import hift_engines
from hift_ds.errors import ConfigError

if TYPE_CHECKING:
    from accelerate import DeepSpeedPlugin


@contextlib.contextmanager
def accelerate(block: Mapping[str, Any] | None = None) -> Iterator[list[HiFTEngine]]:
    """Inside this block accelerate (Lightning, or whatever calls ``deepspeed.initialize``) builds HiFT engines.

        with hift_ds.accelerate({"group_size": 2}):
            model, optimizer, data = accelerator.prepare(model, optimizer, data)

    Only ``prepare`` has to be inside. Models without an optimizer get DeepSpeed's own engine. The loop calls
    ``model.destroy()`` when it is done.

    Args:
        block: the ``"hift"`` block. By default the one in the DeepSpeed config that accelerate has.

    Yields:
        The HiFT engines built so far, in order.

    Raises:
        ConfigError: a bad block, or none here and none in accelerate's config.
    """
    plugin = _plugin()
    config = plugin.deepspeed_config if plugin is not None else {}
    if block is None and plugin is None:
        raise ConfigError(
            "hift_ds.accelerate: there is no Accelerator with a DeepSpeed config: make it before, with "
            "deepspeed_plugin= and without cpu=True, or give the block here"
        )
    if block is None and BLOCK not in config:
        raise ConfigError(
            f'hift_ds.accelerate: no "{BLOCK}" block: give it here, or put it in the DeepSpeed config of accelerate'
        )
    read = parsed(config[BLOCK] if block is None else block)
    engines: list[HiFTEngine] = []
    with kept_from_accelerate(config, read), hift_engines(None if block is None else read, engines.append):
        yield engines


@contextlib.contextmanager
def kept_from_accelerate(config: dict[str, Any], block: dict[str, Any] | None = None) -> Iterator[None]:
    """Inside this block accelerate finds the ``"hift"`` block of ``config`` (a DeepSpeed config), or ``block`` in its
    place, in a form that it leaves alone: it would fill in every "auto" in the dicts of a config."""
    own: Any = config.get(BLOCK)
    if BLOCK not in config or (block is None and isinstance(own, UserDict)):  # by another trainer with this config
        yield
        return
    hidden: UserDict[str, Any] = UserDict()
    hidden.data = own if block is None else block
    config[BLOCK] = hidden
    try:
        yield
    finally:
        config[BLOCK] = own


def _plugin() -> DeepSpeedPlugin | None:
    """accelerate's DeepSpeed settings, if there is an Accelerator that has some."""
    from accelerate.state import AcceleratorState

    return AcceleratorState._shared_state.get("deepspeed_plugins") and AcceleratorState().deepspeed_plugin
