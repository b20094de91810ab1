"""What the config of a run says of an engine, as DeepSpeed has understood it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from hift_ds.collectives import Ranks
from hift_ds.config import HiFTConfig, sum_dtype
from hift_ds.dtypes import torch_dtype
from hift_ds.engine.deepspeed_seam import SeamEngine
from hift_ds.optim.clip_in_backward import parked_bytes
from hift_ds.optim.parameters import DEFAULT_BUCKET_NUMEL
from hift_ds.store.machine import Machine


@dataclass(frozen=True)
class EngineFacts:
    """What the run's config says, as DeepSpeed has understood it."""

    hift: HiFTConfig
    config: Mapping[str, Any]  # the whole DeepSpeed config
    optimizer: tuple[str | None, Mapping[str, Any]]  # "optimizer.type" and "optimizer.params"
    device: torch.device  # where the model computes
    rank: int  # in the job
    ranks: Ranks  # that hold replicas of the weights
    low_dtype: torch.dtype | None  # bf16 or fp16, if DeepSpeed casts the weights
    autocast_dtype: torch.dtype | None  # of torch_autocast, if that is on
    comm_dtype: torch.dtype  # of gradient sums
    partitioned: bool  # the weights are cut over the ranks (ZeRO-3)
    micro_batches: int  # of a step
    max_grad_norm: float  # 0 for no clipping
    machine: Machine  # what the state store knows of where it runs
    hollow_weights: bool  # an optimizer's constructor is shown weights without elements

    @property
    def update_device(self) -> torch.device:
        """Where the arithmetic of updates runs."""
        return torch.device("cpu") if self.hift.state.step_on == "host" else self.device

    @property
    def bucket_numel(self) -> int:
        """Elements in one collective, over all ranks."""
        configured = (self.config.get("zero_optimization") or {}).get("reduce_bucket_size")
        return int(configured) if isinstance(configured, int | float) else DEFAULT_BUCKET_NUMEL

    @property
    def overlaps_reduction(self) -> bool:
        """Gradients are averaged over ranks while backward goes on."""
        wanted = (self.config.get("zero_optimization") or {}).get("overlap_comm")
        return self.ranks.world_size > 1 and wanted is not False

    @property
    def in_backward(self) -> bool:
        """Each embedding, block and head is updated as soon as its gradients are complete."""
        return self.hift.update == "in_backward"

    @property
    def sum_dtype(self) -> torch.dtype:
        """The dtype in which gradients of several micro-batches are summed in host memory, with the update in
        backward."""
        return torch_dtype(sum_dtype(self.config))

    def parked_bytes(self, weight: torch.dtype) -> int | None:
        """See :func:`~hift_ds.optim.clip_in_backward.parked_bytes`.

        Args:
            weight: dtype of the weights.
        """
        ranks = self.ranks.world_size
        return parked_bytes(self.hift, self.config, self.max_grad_norm, weight, self.micro_batches, ranks)


def facts_of(engine: SeamEngine) -> EngineFacts:
    """The facts of an engine whose process groups are there."""
    return EngineFacts(
        hift=engine.hift,
        config=engine.config,
        optimizer=(engine.optimizer_name(), engine.optimizer_params() or {}),
        device=engine.device,
        rank=engine.global_rank,
        ranks=engine.replica_ranks(),
        low_dtype=engine.low_dtype(),
        autocast_dtype=engine.torch_autocast_dtype() if engine.torch_autocast_enabled() else None,
        comm_dtype=engine.requested_comm_dtype(),
        partitioned=engine.zero_optimization_partition_weights(),
        micro_batches=engine.gradient_accumulation_steps(),
        max_grad_norm=engine.gradient_clipping(),
        machine=engine.machine,
        hollow_weights=engine.hollow_weights,
    )
