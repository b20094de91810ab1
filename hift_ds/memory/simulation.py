"""One training step of the real engine on a device that has no memory, every allocation counted.

    python -m hift_ds.memory.simulation < settings.json > results.json

runs in a process of its own (:func:`simulate` starts it), since a fake device changes the whole process.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass(frozen=True)
class Setting:
    """What to run.

    Attributes:
        model: what :func:`hift_ds.model_structure.read_config` takes: folder, size of the zoo, hub name.
        engine_config: the DeepSpeed config with its ``"hift"`` block. Batch keys are replaced.
        weight_dtype: in which the model is loaded, ``"float32"``, ``"bfloat16"`` or ``"float16"``.
        batch: sequences in a micro-batch on one rank.
        length: tokens in a sequence.
        num_blocks: build only so many blocks of each stack; ``None`` for the whole model.
        groups: indices of the layer groups to train; negative ones count from the top; ``None`` for all.
        world_size: data-parallel ranks; rank 0 is counted.
        micro_batches: accumulated before an update.
        trust_remote_code: run the code that the checkpoint brings along.
    """

    model: str
    engine_config: dict[str, Any]
    weight_dtype: str = "bfloat16"
    batch: int = 1
    length: int = 512
    num_blocks: int | None = None
    groups: tuple[int, ...] | None = None
    world_size: int = 1
    micro_batches: int = 1
    trust_remote_code: bool = False


@dataclass
class GroupPeaks:
    """The step of one layer group. Bytes on the device, rank 0.

    Attributes:
        phases: the peak of "forward", "backward" and "update".
        categories: what was alive at the highest of them.
        stretches: peaks within the phases, by place: which block was running, seen from the active group.
        flops: of matrix products, by phase.
    """

    index: int
    name: str
    numel: int
    phases: dict[str, int]
    categories: dict[str, int]
    stretches: dict[str, int]
    flops: dict[str, int]

    @property
    def peak_bytes(self) -> int:
        return max(self.phases.values())


@dataclass
class Result:
    """What :class:`Setting` led to.

    Attributes:
        num_blocks: blocks of the model as built.
        groups: in the order of ``Setting.groups``.
        weight_bytes: parameters and buffers on the device.
        host_bytes: what the engine keeps in host memory (states, masters, offloaded activations at their peak).
    """

    num_blocks: int
    num_groups: int
    weight_bytes: int
    host_bytes: int
    groups: list[GroupPeaks] = field(default_factory=list)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Result:
        return cls(**{**data, "groups": [GroupPeaks(**group) for group in data["groups"]]})


def simulate(settings: Sequence[Setting]) -> list[Result]:
    """Run each setting in one fresh process.

    Raises:
        RuntimeError: the process failed; its last words are in the message.
    """
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    job = subprocess.run(
        [sys.executable, "-m", "hift_ds.memory.simulation"],
        input=json.dumps([asdict(setting) for setting in settings]),
        capture_output=True,
        text=True,
        env=environment,
    )
    if job.returncode != 0:
        raise RuntimeError(f"the memory simulation failed:\n{job.stderr[-3000:]}")
    return [Result.from_dict(data) for data in json.loads(job.stdout.splitlines()[-1])]


def _main() -> None:
    from hift_ds.memory.fake_step import run

    settings = json.load(sys.stdin)
    answers, sys.stdout = sys.stdout, sys.stderr  # whatever libraries print is not the answer
    results = [asdict(run(Setting(**setting))) for setting in settings]
    print(json.dumps(results), file=answers, flush=True)


if __name__ == "__main__":
    _main()
