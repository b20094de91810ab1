"""A checkpoint in the files of DeepSpeed's ZeRO-3, for ``zero_to_fp32.py`` and other programs that read only those.

    python -m hift_ds.checkpoint.zero_layout CHECKPOINT OUT && python zero_to_fp32.py OUT MODEL

The files hold the fp32 weights (masters, where there are any) and buffers, no optimizer states, and are pickled as
DeepSpeed's are. Written as if by so many ranks that each one's part is of a bounded size.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from hift_ds.checkpoint.manifest import latest_tag, verify
from hift_ds.checkpoint.saved_checkpoint import SavedCheckpoint
from hift_ds.collectives import shard_bounds, shard_numel
from hift_ds.errors import CheckpointError, HiFTError

PART_BYTES = 1 << 31


def write_zero_layout(checkpoint: str | Path, out_dir: str | Path, *, part_bytes: int = PART_BYTES) -> Path:
    """Write ``checkpoint`` to ``out_dir`` in DeepSpeed's layout.

    Args:
        checkpoint: a ``global_step<N>`` folder, or one with a ``latest`` file.
        part_bytes: of fp32 weights in one file; host memory holds one part at a time.

    Returns:
        The folder with the parts, ``out_dir/<tag>``.

    Raises:
        CheckpointError: no whole checkpoint of ours, or ``out_dir`` is in use.
    """
    folder = Path(checkpoint)
    folder = folder / (latest_tag(folder) or "")
    verify(folder)
    saved = SavedCheckpoint(folder)
    target = Path(out_dir) / folder.name
    if target.exists():
        raise CheckpointError(f"{target} exists already")
    target.mkdir(parents=True)
    weights = {name: entry for name, entry in saved.parameters.items() if _is_float(entry)}
    numel = sum(torch.Size(entry["shape"]).numel() for entry in weights.values())
    num_parts = max(1, -(-4 * numel // part_bytes))
    buffers = {name: saved.weight(name) for name in saved.parameters if name not in weights}
    for part in range(num_parts):
        model = _model_states(weights, buffers, num_parts)
        torch.save(model, target / f"zero_pp_rank_{part}_mp_rank_00_model_states.pt")
        states = {"optimizer_state_dict": _optimizer_states(saved, weights, part, num_parts)}
        torch.save(states, target / f"zero_pp_rank_{part}_mp_rank_00_optim_states.pt")
    (Path(out_dir) / "latest").write_text(folder.name)
    return target


def _is_float(entry: dict[str, Any]) -> bool:
    return getattr(torch, entry["dtype"]).is_floating_point


def _model_states(weights: dict[str, Any], buffers: dict[str, Any], num_parts: int) -> dict[str, Any]:
    return {
        "module": buffers,
        "buffer_names": list(buffers),
        "param_shapes": [{name: torch.Size(entry["shape"]) for name, entry in weights.items()}],
        "frozen_param_shapes": None,
        "frozen_param_fragments": None,
        "shared_params": {},
        "dp_world_size": num_parts,
        "ds_version": "0.0.0+hift_ds",
    }


def _optimizer_states(saved: SavedCheckpoint, weights: dict[str, Any], part: int, num_parts: int) -> dict[str, Any]:
    """Each weight's part, padded to one size for all parts, one after another."""
    flat = []
    for name, entry in weights.items():
        numel = torch.Size(entry["shape"]).numel()
        start, end = shard_bounds(numel, num_parts, part)
        values = torch.zeros(shard_numel(numel, num_parts))
        values[: end - start] = saved.weight(name, best=True).reshape(-1)[start:end]
        flat.append(values)
    return {"zero_stage": 3, "partition_count": num_parts, "fp32_flat_groups": [torch.cat(flat)]}


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""
    parser = argparse.ArgumentParser(prog="python -m hift_ds.checkpoint.zero_layout", description=__doc__)
    parser.add_argument("checkpoint")
    parser.add_argument("out_dir")
    args = parser.parse_args(argv)
    try:
        print(write_zero_layout(args.checkpoint, args.out_dir))
        return 0
    except HiFTError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
