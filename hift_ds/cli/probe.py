"""One real step of one layer group on this machine's device, measured, to compare with the simulated one.

    python -m hift_ds.cli.probe < job.json

in a process of its own (:func:`probe` starts it). On an accelerator the measure is ``max_memory_allocated`` of each
step; on the CPU the allocator's own events as torch's profiler records them, and there the parked states count as well.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any

from hift_ds.errors import ConfigError
from hift_ds.forecast.setting import (
    WORKSPACE_BYTES,
    Result,
    Setting,
    deepspeed_config,
    make_batch,
    model_config,
    torch_has_fake_devices,
    with_switch,
)
from hift_ds.forecast.simulator import SimulationError, last_error, simulate
from hift_ds.forecast.steps import GIB, Request, read_structure, run_requests, worst_step
from hift_ds.store import machine

if TYPE_CHECKING:
    import torch

    from hift_ds.engine.engine import HiFTEngine

STEP = "hift_ds_probed_step"
LAUNCHED = (  # what says that this process is one of several
    "RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "OMPI_COMM_WORLD_RANK", "PMI_RANK",
    "SLURM_PROCID",
)  # fmt: skip


def probe(setting: Setting, index: int | None = None) -> dict[str, Any]:
    """Step group ``index`` (default: the one with the highest simulated peak) on the fake device and on the real one.

    The model has random weights and is built whole: it must fit this machine. Without an accelerator activations
    are not offloaded, since the host is the device then; both steps go without.

    Returns:
        ``device``, ``group``, ``predicted_gib``, ``measured_gib``, and on an accelerator ``reserved_gib``, what
        its allocator held.

    Raises:
        ConfigError: the setting is for several ranks, or this machine has no room for the step.
        SimulationError: one of the steps failed.
    """
    if setting.world_size > 1:
        raise ConfigError(
            f"--probe: takes a step on one rank, and the estimate is for {setting.world_size}; leave --gpus out"
        )
    on_cpu = _accelerator() is None
    setting = replace(setting, on_host=not torch_has_fake_devices())
    if on_cpu:
        setting = with_switch(setting, "offload", on=False)
    if index is None:
        index = worst_step(run_requests([Request(setting, read_structure(setting))])[0]).index
    setting = replace(setting, groups=(index,))
    result = simulate([setting])[0]
    step = result.steps[0]
    _check_room(result, on_cpu)
    measured = measure(setting)
    predicted = step.peak_bytes + (measured["parked_bytes"] if on_cpu else WORKSPACE_BYTES)
    return {
        "device": measured["device"],
        "group": f"{step.index} ({step.name})",
        "predicted_gib": predicted / GIB,
        "measured_gib": measured["peak_bytes"] / GIB,
        **({} if on_cpu else {"reserved_gib": measured["reserved_bytes"] / GIB}),
    }


def _accelerator() -> torch.device | None:
    """This machine's, or ``None``."""
    import torch

    return torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None


def _check_room(result: Result, on_cpu: bool) -> None:
    """States of groups that were not stepped are taken to be as large, parameter for parameter."""
    (step,) = result.steps
    states = step.state_bytes * result.numel // max(step.numel, 1)
    needed, there = states + (step.peak_bytes if on_cpu else 0), machine.host_bytes().available
    if needed > there:
        raise ConfigError(
            f"--probe: builds the whole model, with {needed / GIB:.1f} GiB of host memory (states {states / GIB:.1f}), "
            f"and {there / GIB:.1f} GiB are free here; probe a smaller model or drop --probe"
        )
    if not on_cpu and step.peak_bytes > (there := _device_bytes()):
        raise ConfigError(
            f"--probe: the step is predicted to need {step.peak_bytes / GIB:.1f} GiB on the device, which has "
            f"{there / GIB:.1f}; take a smaller batch, more switches, or drop --probe"
        )


def _device_bytes() -> int:
    from hift_ds.engine.deepspeed_seam import device_bytes

    return device_bytes()


def measure(setting: Setting) -> dict[str, Any]:
    """Steps of the setting's one group in a fresh process, two at least: ``device``, ``peak_bytes``, ``parked_bytes``
    (states at rest in host memory), ``reserved_bytes`` (held by the accelerator's allocator)."""
    job = subprocess.run(
        [sys.executable, "-m", "hift_ds.cli.probe"],
        input=json.dumps(asdict(setting)),
        capture_output=True,
        text=True,
        # One rank, on a port of its own.
        env={name: value for name, value in os.environ.items() if name not in LAUNCHED},
    )
    if job.returncode != 0:
        raise SimulationError(f"the real step failed: {last_error(job.stderr)}")
    return json.loads(job.stdout.splitlines()[-1])


def _run(setting: Setting) -> dict[str, Any]:
    import torch

    from hift_ds.store.encoded import EncodedStateStore
    from hift_ds.store.split import SplitStateStore

    device = _accelerator() or torch.device("cpu")
    reported = []
    with _allocations(device) as peak_bytes:
        engine = _build(setting, device)
        for _ in range(max(setting.visits, 2)):  # the first makes the states, the second finds them
            _step(engine, setting, device)
            assert engine.last_report is not None
            reported.append(engine.last_report.peak_bytes)
    store = engine.optimizer.store
    parked = store.total_bytes() if isinstance(store, EncodedStateStore | SplitStateStore) else 0
    # The accelerator's counter starts anew in each step, so each step's peak is the one that it reported.
    peak = peak_bytes() if device.type == "cpu" else max(reported)
    reserved = 0 if device.type == "cpu" else torch.get_device_module(device).max_memory_reserved()
    return {"device": device.type, "peak_bytes": peak, "parked_bytes": parked, "reserved_bytes": reserved}


def _build(setting: Setting, device: torch.device) -> HiFTEngine:
    import torch

    import hift_ds
    from hift_ds.hf.model_structure import build_on_meta

    config = model_config(setting)
    model_class = type(build_on_meta(config, trust_remote_code=setting.trust_remote_code))
    torch.set_default_dtype(getattr(torch, setting.weight_dtype))
    with torch.device(device):
        model = model_class(config).train()
    torch.set_default_dtype(torch.float32)
    engine, *_ = hift_ds.initialize(
        model=model, model_parameters=list(model.parameters()), config=deepspeed_config(setting)
    )
    return engine


def _step(engine: HiFTEngine, setting: Setting, device: torch.device) -> None:
    import torch

    assert setting.groups is not None
    engine.schedule.move_to(setting.groups[0])
    engine.optimizer.activate()
    batch = make_batch(engine.module, setting.batch, setting.length, device, setting.padded)
    with torch.profiler.record_function(STEP):
        for _ in range(setting.micro_batches):
            loss = engine(**batch).loss
            engine.backward(loss)
            del loss
            engine.step()


@contextmanager
def _allocations(device: torch.device) -> Iterator[Callable[[], int]]:
    """Gives a function that says, afterwards, the most bytes that were allocated during the marked steps."""
    import torch

    if device.type != "cpu":
        yield lambda: 0
        return
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profiled:
        yield lambda: _peak_in_steps(profiled)


def _peak_in_steps(profiled: Any) -> int:
    events = profiled.profiler.kineto_results.events()  # which torch does not declare
    steps = [(e.start_ns(), e.start_ns() + e.duration_ns()) for e in events if e.name() == STEP]
    memory = sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]")
    live, peak = 0, 0
    for at, change in memory:
        live += change
        if any(start <= at <= end for start, end in steps):
            peak = max(peak, live)
    return peak


def _main() -> None:
    setting = Setting(**json.load(sys.stdin))
    answers, sys.stdout = sys.stdout, sys.stderr
    print(json.dumps(_run(setting)), file=answers, flush=True)


if __name__ == "__main__":
    _main()
