"""``hift-ds env``: versions, accelerators, memory and disk of this machine, to paste into a report of a problem."""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
from typing import Any

from hift_ds.report.run_summary import versions
from hift_ds.store.machine import disk_bytes_free, host_bytes

VARIABLES = ("NCCL_", "DS_", "CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS", "PYTORCH_", "HF_HUB_OFFLINE")


def describe() -> dict[str, Any]:
    """What this machine has, by topic, as plain data. Sizes are in GB (10**9 bytes), for people to read."""
    import torch

    memory, found = host_bytes(), versions()
    return {
        "hift_ds": found.pop("hift_ds"),
        "python": found.pop("python"),
        "system": platform.platform(),
        "packages": found,
        "cuda": torch.version.cuda,
        "accelerators": _accelerators(),
        "cores": os.cpu_count(),
        "host_memory_gb": {"total": _gb(memory.total), "available": _gb(memory.available)},
        "disk_free_gb": _gb(disk_bytes_free(os.getcwd())),
        "variables": {name: os.environ[name] for name in sorted(os.environ) if name.startswith(VARIABLES)},
    }


def _accelerators() -> list[str]:
    """A line for each device that torch sees."""
    import torch

    device = torch.accelerator.current_accelerator(check_available=True)
    if device is None:
        return []
    kind = device.type
    if kind != "cuda":
        return [f"{kind}:{index}" for index in range(torch.accelerator.device_count())]
    devices = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
    return [f"{device.name}, {_gb(device.total_memory)} GB" for device in devices]


def _gb(num_bytes: int) -> float:
    return round(num_bytes / 1e9, 1)


EXAMPLES = """examples:
  hift-ds env            # to paste into a report of a problem
  hift-ds env --json
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print as JSON")


def run(args: argparse.Namespace) -> int:
    found = describe()
    if args.json:
        json.dump(found, sys.stdout, indent=2)
        print()
        return 0
    for topic, value in found.items():
        if isinstance(value, dict):
            value = ", ".join(f"{name} {text}" for name, text in value.items())
        elif isinstance(value, list):
            value = "; ".join(value)
        print(f"{topic:16} {'none' if value in ('', None) else value}")
    return 0
