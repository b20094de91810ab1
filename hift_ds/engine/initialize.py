"""``hift_ds.initialize``: ``deepspeed.initialize`` for configs with a ``"hift"`` block."""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Iterator
from typing import Any

import deepspeed
from deepspeed.accelerator import get_accelerator
from torch import nn

from hift_ds.config import BLOCK, check_against_deepspeed, parse_block
from hift_ds.engine.deepspeed_seam import config_dict, engine_class, nothing_compiled
from hift_ds.engine.engine import HiFTEngine
from hift_ds.errors import ConfigError


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
    """The signature and result of ``deepspeed.initialize``.

    With a top-level ``"hift"`` block in the config (dict, path or ``args.deepspeed_config``) the engine is a
    :class:`HiFTEngine`; without one the call goes to DeepSpeed unchanged. Either way a process that no launcher
    started is a job of one rank.

    Returns:
        (engine, optimizer, training dataloader or None, learning-rate scheduler or None).

    Raises:
        ConfigError: a bad block, or DeepSpeed settings that contradict it; before any process group is made.
        GroupingError: the model cannot be cut as asked.
    """
    arguments = {key: value for key, value in locals().items() if key not in ("config", "config_params")}
    config = config_dict(config, args, config_params)
    if BLOCK not in config:
        join_as_single_process()
        return deepspeed.initialize(**arguments, **_where_stock_looks(args, config))
    check_against_deepspeed(parse_block(config[BLOCK]), config)
    if model is None:
        raise ConfigError("initialize: model= is missing")
    if isinstance(model, deepspeed.PipelineModule):
        raise ConfigError(
            'initialize: a PipelineModule (pipeline engine) is not supported with a "hift" block'
        )
    # DeepSpeed's: calls those ranks model-parallel.
    shares_sequences = hasattr(mpu, "initialize_sequence_parallel")
    if (
        mpu is not None
        and not shares_sequences
        and getattr(mpu, "get_model_parallel_world_size", lambda: 1)() > 1
    ):
        raise ConfigError('initialize: mpu= with model parallelism is not supported with a "hift" block')
    join_as_single_process()
    with hift_engines():
        return deepspeed.initialize(**arguments, **_where_stock_looks(args, config))


def join_as_single_process() -> None:
    """A process that no launcher started is a job of one rank (DeepSpeed would ask for mpi4py).

    Sets the variables a launcher would have set, with a free port, if none of them is there.
    """
    launched = any(
        name in os.environ for name in ("RANK", "OMPI_COMM_WORLD_RANK", "PMI_RANK", "SLURM_PROCID")
    )
    if launched or (deepspeed.comm.is_initialized() and deepspeed.comm.get_world_size() > 1):
        return
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    os.environ.update(
        RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port)
    )


def ensure_process_group() -> None:
    """The process group that an engine would make, for collectives before there is an engine (evaluation, say)."""
    join_as_single_process()
    get_accelerator().set_device(int(os.environ.get("LOCAL_RANK", "0")))
    with nothing_compiled():
        deepspeed.init_distributed()


@contextlib.contextmanager
def hift_engines(block: Any = None) -> Iterator[None]:
    """Inside this block ``deepspeed.initialize`` itself builds HiFT engines for configs with a ``"hift"`` block, and
    nothing is compiled. For frameworks that call it on their own (accelerate).

    Args:
        block: the ``"hift"`` block of every config without one: for frameworks that would read ours as theirs.
    """

    class EngineForConfig(HiFTEngine):
        """Chooses the engine when it is constructed, since only then the config is known."""

        def __new__(cls, *args: Any, config: Any = None, **kwargs: Any):
            if block is not None and isinstance(config, dict):
                config = {BLOCK: block, **config}
            stock = deepspeed.runtime.engine.DeepSpeedEngine
            chosen = HiFTEngine if isinstance(config, dict) and BLOCK in config else stock
            return chosen(*args, config=config, **kwargs)

    with nothing_compiled(), engine_class(EngineForConfig):
        yield


def _where_stock_looks(args: Any, config: dict[str, Any]) -> dict[str, Any]:
    """DeepSpeed refuses a config given twice."""
    return {} if getattr(args, "deepspeed_config", None) is not None else {"config": config}
