"""``hift-ds eval RUN``: the held-out loss and scores of a run; with ``--tasks``, benchmarks of lm-eval."""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
from typing import TYPE_CHECKING, Any

from hift_ds.cli.arguments import add_model_arguments
from hift_ds.dtypes import TORCH_NAMES
from hift_ds.errors import ConfigError
from hift_ds.train.tasks import TASKS

if TYPE_CHECKING:
    from hift_ds.train.trained_model import TrainedModel

EXAMPLES = """examples:
  hift-ds eval runs/first                          # on the rows that the run held out
  hift-ds eval runs/first --data other.jsonl       # on others
  hift-ds eval hub:owner/name --data held_out.jsonl # the model before the run, to compare with
  hift-ds eval runs/first --tasks hellaswag,arc_easy --limit 200
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model_arguments(parser)
    parser.add_argument(
        "--data",
        metavar="FILE",
        help="what to evaluate on, as data.eval of a run file (default: what the run held out)",
    )
    parser.add_argument(
        "--batch-size", type=int, metavar="N", help="rows at once (default: 8; of task kto the run's own)"
    )
    parser.add_argument(
        "--tasks", metavar="NAMES", help="benchmarks of the package lm-eval, with commas between; instead of the loss"
    )
    parser.add_argument("--limit", type=int, metavar="N", help="with --tasks: questions of each")
    parser.add_argument("--include-path", metavar="DIR", help="with --tasks: a folder with tasks of your own")
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(args: argparse.Namespace) -> int:
    from hift_ds.report.quiet import quiet_libraries
    from hift_ds.train.trained_model import find_trained

    if args.batch_size is not None and args.batch_size < 1:
        raise ConfigError(f"--batch-size: expected at least 1, got {args.batch_size}")
    quiet_libraries(is_main=True)
    trained = find_trained(args.model, trust_remote_code=args.trust_remote_code)
    results = (
        benchmarks(trained, args) if args.tasks
        else held_out(trained, args) if TASKS[trained.task].is_language_modelling
        else scores(trained, args)
    )  # fmt: skip
    if args.json:
        json.dump(results, sys.stdout, indent=1)
        print()
    return 0


def held_out(trained: TrainedModel, args: argparse.Namespace) -> dict[str, Any]:
    """Count and print the held-out loss."""
    from hift_ds.train.held_out import data_to_evaluate, held_out_loss

    data = data_to_evaluate(trained, args.data)
    model, tokenizer = trained.load(dtype=args.dtype, device=args.device)
    found = held_out_loss(trained, model, tokenizer, data, args.batch_size or 8)
    if not args.json:
        print(
            f"{trained.folder}: loss {found.loss:.4f}, perplexity {found.perplexity:,.2f} "
            f"({found.tokens:,} learned tokens of {found.samples:,} held-out samples)"
        )
    return {
        "model": str(trained.folder),
        "loss": found.loss,
        "perplexity": found.perplexity,
        "tokens": found.tokens,
        "samples": found.samples,
    }


def scores(trained: TrainedModel, args: argparse.Namespace) -> dict[str, Any]:
    """Count and print loss and scores of a task other than language modelling."""
    from hift_ds.train.task_evaluation import evaluate_task, task_data

    data = task_data(trained, args.data)
    model, tokenizer = trained.load(dtype=args.dtype, device=args.device, writes_text=False)
    batch_size = args.batch_size or 8
    if args.batch_size is None and trained.task == "kto":  # which compares the neighbours in a batch
        assert trained.run is not None, "a model folder alone has no task of TRL's"
        train = trained.run.train
        batch_size = train.eval_batch_size or train.micro_batch_size or batch_size
    found = evaluate_task(trained, model, tokenizer, data, batch_size)
    if not args.json:
        rows = found["rows"]
        told = ", ".join(f"{name} {value:.4f}" for name, value in found.items() if name != "rows")
        print(f"{trained.folder}: {told} ({rows:,} held-out rows)")
    return {"model": str(trained.folder), **found}


def benchmarks(trained: TrainedModel, args: argparse.Namespace) -> dict[str, Any]:
    """Run and print benchmarks of lm-eval."""
    if importlib.util.find_spec("lm_eval") is None:
        raise ConfigError("--tasks needs the package lm-eval, not installed here; pip install lm-eval")
    import lm_eval
    import torch
    from lm_eval.tasks import TaskManager

    from hift_ds.train.trained_model import check_device

    manager = TaskManager(include_path=args.include_path)
    names = [name.strip() for name in args.tasks.split(",") if name.strip()]
    if unknown := [name for name in names if not manager.match_tasks([name])]:
        raise ConfigError(f"--tasks: lm-eval has no {', '.join(unknown)}; its names: lm-eval ls tasks")
    options: dict[str, Any] = {"pretrained": str(trained.folder)}
    if trained.trusts_its_code:
        options["trust_remote_code"] = True
    if args.dtype != "auto":
        options["dtype"] = TORCH_NAMES[args.dtype]
    check_device(args.device)
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    device = args.device or ("cpu" if accelerator is None else accelerator.type)  # lm-eval's own default is cuda
    try:
        found = lm_eval.simple_evaluate(
            model="hf", model_args=options, tasks=names, batch_size=args.batch_size or 8, limit=args.limit,
            task_manager=manager, device=device,
        )  # fmt: skip
    except OSError as error:  # ConnectionError too
        raise ConfigError(
            f"--tasks: the data of {', '.join(names)} are not to be had ({error}); fetch them where there is a network"
        ) from error
    results = {
        task: {k: v for k, v in numbers.items() if isinstance(v, int | float)}
        for task, numbers in found["results"].items()
    }
    if not args.json:
        for task, numbers in results.items():
            print(
                f"{task}: " + ", ".join(f"{name.removesuffix(',none')} {value:.4g}" for name, value in numbers.items())
            )
    return results
