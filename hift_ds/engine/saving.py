"""What goes into a checkpoint, and in which folder it grows: the part of a save before the first tensor is written.

Begin with :mod:`hift_ds.engine.checkpointer`.
"""

from __future__ import annotations

import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from hift_ds.checkpoint import manifest as manifests
from hift_ds.checkpoint.files import write_errors
from hift_ds.checkpoint.json_state import encode, split_encodable
from hift_ds.checkpoint.random_state import random_state
from hift_ds.checkpoint.shared_folder import SharedFolder
from hift_ds.checkpoint.state_files import class_name, extras_by_group, options_of, scalars_by_parameter
from hift_ds.checkpoint.write_plan import WritePlan, saved_tensors
from hift_ds.checkpoint.writer import CheckpointWriter
from hift_ds.engine.deepspeed_seam import SeamEngine
from hift_ds.errors import CheckpointError
from hift_ds.layers.arch import whole_shape
from hift_ds.ranks import gather, on_all_ranks
from hift_ds.version import __version__


def agree_on_folder(engine: SeamEngine, save_dir: Path, tag: str) -> SharedFolder:
    """Agree on a temporary folder and on who leads."""
    asked = gather((tag, uuid.uuid4().hex[:12]))
    tags = {other for other, _ in asked}
    if len(tags) > 1:
        raise CheckpointError(f"save_checkpoint: tag must be the same on all ranks, got {sorted(tags)}")
    if reason := manifests.why_no_tag(tag):
        raise CheckpointError(f"save_checkpoint: tag {tag[:80]!r} is {reason}")
    shared_folder = SharedFolder(save_dir, tag, token=asked[0][1], rank=engine.global_rank)
    may_lead = engine.global_rank == 0 or (engine.use_node_local_storage() and engine.local_rank == 0)

    def create() -> None:
        with write_errors(save_dir):
            if may_lead:
                if (save_dir / manifests.LATEST).is_dir():
                    raise CheckpointError(
                        f"{save_dir / manifests.LATEST} is a folder, where a file names the newest checkpoint; move it"
                    )
                shared_folder.create()

    on_all_ranks(create, CheckpointError)
    try:
        shared_folder.join(gather(on_all_ranks(shared_folder.find_leader, CheckpointError)))
    except CheckpointError:
        if may_lead:
            shared_folder.discard()
        raise
    if shared_folder.leads:
        shared_folder.remove_leftovers()
    return shared_folder


def open_writer(
    engine: SeamEngine, shared_folder: SharedFolder, client_state: Mapping[str, Any], exclude_frozen: bool
) -> CheckpointWriter:
    """Capture everything small, and make the writer of the tensors, which are read when they are written or copied."""
    tensors = saved_tensors(engine.module)
    excluded: list[str] = []
    if exclude_frozen:
        trained = engine.optimizer.coverage()
        excluded = [name for name, t in tensors.items() if isinstance(t, nn.Parameter) and name not in trained]
        tensors = {name: tensor for name, tensor in tensors.items() if name not in excluded}
    plan = WritePlan(engine.optimizer, tensors, shared_folder.leads, engine.optimizer.parameters.whole_weight)
    encoded, rest = split_encodable(client_state)
    common = {**_common_state(engine, tensors), "excluded": excluded, "client_state": encoded}
    own = {"scalars": scalars_by_parameter(engine.optimizer.states), "random": random_state(engine.device)}
    writer = CheckpointWriter(shared_folder, plan, common, own, rest)
    writer.open(_pending_gradients(engine))
    return writer


def _common_state(engine: SeamEngine, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    optimizer, coverage = engine.optimizer, engine.optimizer.coverage()
    scheduler = None if engine.lr_scheduler is None else _encode_scheduler(engine.lr_scheduler.state_dict())
    return {
        "format": manifests.FORMAT,
        "hift_ds": __version__,
        "hift": engine.hift.model_dump(mode="json"),
        "auto_group_size": engine.auto_groups.chosen,
        "host_share": None if optimizer.states.split is None else optimizer.states.split.share,
        "world_size": engine.world_size,
        "global_steps": engine.global_steps,
        "global_samples": engine.global_samples,
        "micro_steps": engine.micro_steps,
        "gradient_accumulation_steps": engine.gradient_accumulation_steps(),
        "skipped_steps": engine.skipped_steps,
        "applied_steps": optimizer.num_applied,
        "precision": optimizer.states.precision.name,
        "tensors": {
            name: {
                "shape": list(whole_shape(tensor)),
                "dtype": str(tensor.dtype).removeprefix("torch."),
                "trained": name in coverage,
                "updates": coverage.get(name, 0),
            }
            for name, tensor in tensors.items()
        },
        "groups": [
            {"index": g.index, "name": g.name, "parameters": list(g.param_names)} for g in engine.partition.groups
        ],
        "always_active": list(engine.partition.always.param_names) if engine.partition.always else [],
        "schedule": engine.optimizer.schedule.state_dict(),
        "learning_rate": encode(optimizer.lr.state_dict()),
        "scheduler": scheduler,
        "loss_scaler": encode(optimizer.scaler.state_dict()),
        "optimizer": {
            "class": class_name(optimizer.optimizer),
            "param_groups": [encode(options_of(group)) for group in optimizer.param_groups],
            "extras": extras_by_group(optimizer.states),
            "trials": optimizer.trials.state_dict(),
            "last_norms": {str(index): norm for index, norm in optimizer.last_norms.items()},
        },
    }


def _pending_gradients(engine: SeamEngine) -> dict[str, Tensor]:
    """The gradients of a run that is saved between two micro-batches of one step."""
    pending = {}
    for group in engine.optimizer.active_groups:
        for member in group.members:
            grad = engine.optimizer.pending(member.param)
            if grad is not None:
                pending[member.name] = grad
    return pending


def _encode_scheduler(state: Mapping[str, Any]) -> Any:
    try:
        return encode(dict(state))
    except TypeError as error:
        raise CheckpointError(f"the learning-rate scheduler's state cannot be saved: {error}") from None
