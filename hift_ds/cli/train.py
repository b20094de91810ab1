"""``hift-ds train RUN.yaml [section.key=value ...]``: fine-tune with the accelerators of this machine.

One process runs right here; several are started with the variables that ``deepspeed launch RUN.yaml`` or torchrun would
set, and end together (:mod:`hift_ds.train.processes`). Without an accelerator the default is one process, which
computes with all cores: more processes on one CPU need a copy of the weights each and are not faster. ``--num-procs``
asks for them all the same.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from hift_ds.errors import ConfigError
from hift_ds.ranks import free_port, launch_variables, rank_and_world_size
from hift_ds.shipped import presets
from hift_ds.train.processes import RankProcesses
from hift_ds.train.run_config import load_run_config
from hift_ds.train.run_file import add_run_file

WORKER = "hift_ds.train.worker"
FORWARDED = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)


EXAMPLES = f"""examples:
  hift-ds train smollm2_135m                            # a run file and data that come with the package; also on a CPU
  hift-ds train run.yaml --dry-run                      # everything before the first step, then stop
  hift-ds train run.yaml train.learning_rate=1e-5 train.epochs=2
  hift-ds train run.yaml --num-procs 2
The same command goes on where a run was stopped. Every key of a run file: the command schema, or docs/run_file.md
Run files in the package: {", ".join(presets())}
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_run_file(parser)
    parser.add_argument(
        "--num-procs", "--num_procs", type=int, metavar="N",
        help="processes (default: one for each accelerator found; one if there is none)",
    )  # fmt: skip
    parser.add_argument(
        "--master-port",
        "--master_port",
        type=int,
        metavar="PORT",
        help="for the processes to meet (default: a free one)",
    )
    parser.add_argument(
        "--dry-run", action="store_true",
        help="read the data, load the model, build the engine, count memory and disk; stop before the first step",
    )  # fmt: skip


def run(args: argparse.Namespace) -> int:
    run = load_run_config(args.run_file, args.overrides)  # a mistake in it is said once, before anything is started
    arguments = [*(["--dry-run"] if args.dry_run else []), args.run_file, *args.overrides]
    if rank_and_world_size()[1] > 1:  # torchrun or a batch system started this very command on every rank
        return _run_here(arguments)
    accelerators = _visible_accelerators()
    if not accelerators:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    num_procs = args.num_procs if args.num_procs is not None else max(len(accelerators), 1)
    if num_procs < 1 or (accelerators and num_procs > len(accelerators)):
        expected = f"1 to {len(accelerators)}, the accelerators found" if accelerators else "at least 1"
        raise ConfigError(f"--num-procs: expected {expected}; got {num_procs}")
    if num_procs == 1:
        code = _run_here(arguments)
    else:
        devices = accelerators[:num_procs] or [str(i) for i in range(num_procs)]
        code = _launch(devices, args.master_port or free_port(), arguments, on_cpu=not accelerators,
                       output_dir=run.output_dir)  # fmt: skip
    # Rows that were chosen for a CPU are no device's, and the line about them has said what they need.
    is_said = not accelerators and run.fit == "auto" and run.train.micro_batch_size is None
    if args.dry_run and code == 0 and not is_said:
        print(_memory_line(args.run_file, args.overrides))
    return code


def _memory_line(run_file: str, overrides: Sequence[str]) -> str:
    """The most that a step will take, counted as ``hift-ds estimate`` does."""
    from hift_ds.cli.estimate_input import add_input_arguments, setting_from
    from hift_ds.errors import HiFTError, OneLineParser
    from hift_ds.forecast.steps import GIB, Request, read_structure, run_requests, worst_step

    parser = OneLineParser()
    add_input_arguments(parser)
    try:
        setting = setting_from(parser.parse_args([run_file, *overrides]))
        worst = worst_step(run_requests([Request(setting, read_structure(setting))], 1)[0])
    except HiFTError as error:
        return f"memory: not counted ({' '.join(str(error).split())})"
    most = f"{worst.peak_bytes / GIB:.2f} GiB at most on each device, with {setting.batch} x {setting.length:,} tokens"
    return f"memory: {most} (more: hift-ds estimate {run_file})"


def _run_here(arguments: Sequence[str]) -> int:
    from hift_ds.train.worker import main

    return main(arguments)


def _launch(devices: Sequence[str], port: int, arguments: Sequence[str], *, on_cpu: bool, output_dir: Path) -> int:
    """Start one worker per device and wait for them; their exit code."""
    env = dict(os.environ)
    # Without it each rank computes with all cores: on a GPU too, where states are zeroed and pinned by the host.
    env.setdefault("OMP_NUM_THREADS", str(max((os.cpu_count() or 1) // len(devices), 1)))
    if not on_cpu:
        env["CUDA_VISIBLE_DEVICES"] = ",".join(devices)
    env["LOCAL_WORLD_SIZE"] = str(len(devices))
    environments = [{**env, **launch_variables(rank, len(devices), port)} for rank in range(len(devices))]
    command = [sys.executable, "-u", "-m", WORKER, *arguments]
    with tempfile.TemporaryDirectory(prefix="hift-ds-") as folder:
        ranks = RankProcesses(command, environments, Path(folder) / "progress")
        handlers = {number: signal.signal(number, lambda n, _: _pass_on(ranks, n)) for number in FORWARDED}
        try:
            first = ranks.wait()
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)
    if first is None:
        return 0
    if first.code > 0:
        return first.code
    from hift_ds.checkpoint.trainer_folder import find_checkpoints

    good = next(iter(find_checkpoints(output_dir, "auto")[0]), None)
    goes_on = f"last good checkpoint: {good}; the same command goes on from there"
    print(
        f"hift-ds: error: {first.describe()}; {goes_on if good else 'no checkpoint has been saved yet'}",
        file=sys.stderr, flush=True,
    )  # fmt: skip
    return 128 - first.code


def _pass_on(ranks: RankProcesses, number: int) -> None:
    ranks.send_signal(signal.SIGTERM if number == signal.SIGHUP else number)


def _visible_accelerators() -> list[str]:
    """Their names for CUDA_VISIBLE_DEVICES (or what this accelerator has in its place); empty on a CPU-only
    machine."""
    import torch

    if not torch.accelerator.is_available():
        return []
    count = torch.accelerator.device_count()
    shown = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    names = [name.strip() for name in shown.split(",") if name.strip()]
    return names[:count] if len(names) >= count else [str(i) for i in range(count)]
