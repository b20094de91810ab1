"""``hift_ds.initialize``: ``deepspeed.initialize`` for configs with a ``"hift"`` block."""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections import UserDict
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import deepspeed
from torch import nn

from hift_ds.config import BLOCK, check_against_deepspeed, parse_block, parsed, refuse_auto
from hift_ds.engine.deepspeed_seam import config_dict, engine_class, initialize_becomes
from hift_ds.engine.engine import HiFTEngine
from hift_ds.errors import ConfigError
from hift_ds.process_group import as_single_process, nothing_compiled


def initialize(
    args: Any = None,
    model: nn.Module | None = None,
    optimizer: Any = None,
    model_parameters: Any = None,
    training_data: Any = None,
    lr_scheduler: Any = None,
    distributed_port: int = 29500,
    mpu: Any = None,
    dist_init_required: bool | None = None,
    collate_fn: Any = None,
    config: Any = None,
    mesh_param: Any = None,
    config_params: Any = None,
) -> tuple[Any, Any, Any, Any]:
    """Build an engine as ``deepspeed.initialize`` does, whose signature and result this has.

    With a top-level ``"hift"`` block in the config the engine is a :class:`HiFTEngine`; without one the call goes to
    DeepSpeed unchanged. Either way a process that no launcher started is a job of one rank.

    Args:
        model: with the dtypes of its checkpoint; its weights are cast and placed as the config says.
        optimizer: over all weights that are to be trained, or a function of ``model_parameters`` that makes it;
            ``None`` for the config's ``"optimizer"``.
        model_parameters: parameters or param_group dicts, for the config's optimizer.
        lr_scheduler: of that optimizer; ``None`` for the config's ``"scheduler"``, if it has one.
        config: a dict, or the path of a JSON file; ``args.deepspeed_config`` where it is not given. The other arguments
            are as DeepSpeed documents them.

    Returns:
        (engine, optimizer, training dataloader or None, learning-rate scheduler or None).

    Raises:
        ConfigError: a bad block, or DeepSpeed settings that contradict it; before any process group is made.
        GroupingError: the model cannot be cut as asked.
    """
    arguments = {key: value for key, value in locals().items() if key not in ("config", "config_params")}
    stock = inspect.unwrap(deepspeed.initialize)  # inside hift_engines() it is ours
    config = config_dict(config, args, config_params)
    if BLOCK not in config:
        with as_single_process(), _file_was_read(args):
            return stock(**arguments, config=config)
    refuse_auto(config)
    if not ({"train_batch_size", "train_micro_batch_size_per_gpu"} & config.keys()):
        raise ConfigError('"train_micro_batch_size_per_gpu": missing; how many rows does a rank take at a time?')
    with building(arguments, config):
        return stock(**arguments, config=config)


@contextlib.contextmanager
def _file_was_read(args: Any) -> Iterator[None]:
    """Inside this block ``args`` names no file with a config: DeepSpeed takes one in one place only."""
    file = getattr(args, "deepspeed_config", None)
    if file is None:
        yield
        return
    args.deepspeed_config = None
    try:
        yield
    finally:
        args.deepspeed_config = file


@contextlib.contextmanager
def building(
    arguments: Mapping[str, Any], config: dict[str, Any], engine: type[HiFTEngine] = HiFTEngine
) -> Iterator[None]:
    """DeepSpeed's ``initialize`` with ``arguments`` and ``config`` builds an ``engine`` inside this block. The
    ``"hift"`` block of ``config`` is left there parsed.

    Raises:
        ConfigError: as :func:`initialize`, for all but the model.
    """
    config[BLOCK] = parsed(config[BLOCK])
    check_against_deepspeed(parse_block(config[BLOCK]), config)
    if arguments.get("model") is None:
        raise ConfigError("initialize: model= is missing")
    if isinstance(arguments["model"], deepspeed.PipelineModule):
        raise ConfigError('initialize: a PipelineModule (pipeline engine) is not supported with a "hift" block')
    mpu = arguments.get("mpu")
    # mpu may be DeepSpeed's Ulysses module, whose sequence ranks answer to model-parallel names.
    shares_sequences = hasattr(mpu, "initialize_sequence_parallel")
    if mpu is not None and not shares_sequences and getattr(mpu, "get_model_parallel_world_size", lambda: 1)() > 1:
        raise ConfigError('initialize: mpu= with model parallelism is not supported with a "hift" block')
    with as_single_process(), nothing_compiled(), _file_was_read(arguments.get("args")), engine_class(engine):
        yield


_told: list[Callable[[HiFTEngine], None]] = []


@contextlib.contextmanager
def hift_engines(
    block: Mapping[str, Any] | None = None, on_made: Callable[[HiFTEngine], None] = lambda engine: None
) -> Iterator[None]:
    """Inside this block ``deepspeed.initialize`` itself builds HiFT engines for models that are trained, if their
    config has a ``"hift"`` block, and nothing is compiled. For frameworks that call it on their own (accelerate).

    A model without an optimizer (a reference model, a reward model) gets DeepSpeed's own engine.

    Args:
        block: the ``"hift"`` block of every config without one: for frameworks that would read ours as theirs.
        on_made: called with each HiFT engine as soon as it exists, of the blocks around this one and inside it too.
    """
    stock = inspect.unwrap(deepspeed.initialize)
    signature = inspect.signature(stock)

    @functools.wraps(stock)
    def initialize(*args: Any, **kwargs: Any) -> tuple[Any, Any, Any, Any]:
        arguments = signature.bind(*args, **kwargs).arguments
        options = arguments.get("args")
        config = config_dict(arguments.pop("config", None), options, arguments.pop("config_params", None))
        own = config.pop(BLOCK, block)
        trained = arguments.get("optimizer") is not None or (config.get("optimizer") or {}).get("type")
        arguments["config"] = config
        if own is None or not trained:
            with as_single_process(), nothing_compiled(), _file_was_read(options):
                return stock(**arguments)
        config[BLOCK] = own.data if isinstance(own, UserDict) else own
        with building(arguments, config):
            built = stock(**arguments)
        for tell in list(_told):
            tell(built[0])
        return built

    _told.append(on_made)
    try:
        with initialize_becomes(initialize):
            yield
    finally:
        _told.remove(on_made)
