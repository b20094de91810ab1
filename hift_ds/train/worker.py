"""One process of a fine-tuning job: what DeepSpeed's launcher, torchrun or srun starts, once per rank.

    RUN.yaml [section.key=value ...] [--local_rank N]

launch/multi_node.sh gives all of that as ``--encoded=`` and the base64 of a JSON list, which no shell changes on the
way.

The first rank speaks for all. An error of the user's is one line and exit code 2.
"""

from __future__ import annotations

import argparse
import base64
import errno
import json
import logging
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from hift_ds.errors import (
    INTERRUPTED,
    PROG,
    USER_ERROR,
    HiFTError,
    OneLineParser,
    OutOfMemory,
    TrainingError,
    check_that_commands_can_run,
)
from hift_ds.ranks import free_port, launch_variables, rank_and_world_size
from hift_ds.report.quiet import escape_what_cannot_be_shown, quiet_libraries
from hift_ds.train.processes import bind_to_device, end_with_launcher
from hift_ds.train.run_file import add_run_file

DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)  # never a bug, wherever they come from
PATIENCE_S = 5.0  # for the first rank to say what is wrong and for the launcher to stop the others


def main(argv: Sequence[str] | None = None) -> int:
    """Runs this rank's part of the job and returns the exit code."""
    escape_what_cannot_be_shown()
    try:
        if "RANK" in os.environ:
            end_with_launcher()
        args = _parse(sys.argv[1:] if argv is None else argv)
        _join_job(args.local_rank)
        bind_to_device(int(os.environ.get("LOCAL_RANK", "0")))
        quiet_libraries(is_main=rank_and_world_size()[0] == 0)
        # It compares the accumulation that the Trainer does itself with DeepSpeed's, and warns at every
        # start.
        logging.getLogger("accelerate").setLevel(logging.ERROR)

        check_that_commands_can_run("datasets", "matplotlib", "rich")

        from hift_ds.train.run_config import load_run_config

        run = load_run_config(args.run_file, args.overrides)
        from hift_ds.train.finetune import finetune

        finetune(run, dry_run=args.dry_run)
        _leave_job()
        return 0
    except HiFTError as error:
        _report(error)
        return USER_ERROR
    except KeyboardInterrupt:
        return INTERRUPTED
    except Exception as error:
        from hift_ds.checkpoint.files import explain_refusal, refusal_of

        refusal = refusal_of(error)
        if refusal is None or refusal.errno not in DISK_ERRORS:
            raise
        where = Path(refusal.filename) if refusal.filename else Path.cwd()
        _report(TrainingError(explain_refusal(refusal, where, "files of the run")))
        return USER_ERROR


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    argv = [word for given in argv for word in _decoded(given)]
    parser = OneLineParser(prog=PROG, description="Fine-tune as a run file says; started once per rank.")
    parser.add_argument("--local_rank", "--local-rank", type=int, default=None, help="given by some launchers")
    parser.add_argument("--dry-run", action="store_true", help="end where the first step would begin")
    add_run_file(parser)
    return parser.parse_args(argv)


def _decoded(word: str) -> list[str]:
    prefix = "--encoded="
    if not word.startswith(prefix):
        return [word]
    return json.loads(base64.urlsafe_b64decode(word.removeprefix(prefix)))


def _join_job(local_rank: int | None) -> None:
    """The variables that torch and DeepSpeed read, before either is loaded. Without a launcher: a job of one
    rank."""
    env = os.environ
    if "RANK" not in env:
        env.update(launch_variables(rank=0, world_size=1, port=free_port()))
    elif "LOCAL_RANK" not in env and local_rank is not None:
        env["LOCAL_RANK"] = str(local_rank)
    if not {"PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"} & env.keys():
        # Groups of different sizes take turns: fixed segments would hold a tenth more than is allocated, or more.
        env["PYTORCH_ALLOC_CONF"] = "expandable_segments:True"


def _leave_job() -> None:
    import torch.distributed as dist

    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()


def _report(error: HiFTError) -> None:
    """Say what went wrong, by the first rank. Another one speaks only if the first has nothing to say: it is still
    alive a while later, and so are we, since launchers stop all ranks when one fails."""
    rank, _ = rank_and_world_size()
    if rank > 0:
        if error.seen_by_all_ranks:
            return
        time.sleep(PATIENCE_S)
    where = f"rank {rank}: " if rank > 0 else ""
    text = " ".join(str(error).split())
    if isinstance(error, OutOfMemory):
        text = text.replace("; ", "\n    ")  # what ran, the forecast, and each thing that would fit
    print(f"{PROG}: error: {where}{text}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
