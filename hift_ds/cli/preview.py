"""``hift-ds preview RUN.yaml``: the first training samples, with the learned tokens marked."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from hift_ds.errors import ConfigError
from hift_ds.train.run_config import RunConfig, load_run_config
from hift_ds.train.run_file import add_run_file
from hift_ds.train.tasks import TASKS

if TYPE_CHECKING:
    from rich.console import Console


COUNTED_ROWS = 1000


def preview(run: RunConfig, console: Console, num_samples: int = 3, counted_rows: int | None = COUNTED_ROWS) -> None:
    """Print a run's first training samples and what becomes of each source's rows; reads the model's config and
    its tokenizer, no weights.

    Args:
        counted_rows: of each source; None: all.

    Raises:
        ConfigError: no tokenizer, or a setting is wrong.
        DataError: data is missing or a row is malformed.
    """
    from hift_ds.data.preview import show_samples, show_task_rows, show_totals
    from hift_ds.data.tokenizers import add_tokens, load_tokenizer
    from hift_ds.hf.model_folder import max_sequence_length, read_config_json, resolve_model
    from hift_ds.train.preflight import resolve_tokenizer_folder
    from hift_ds.train.settings import resolve_max_length

    trust = run.model.trust_remote_code
    folder = resolve_model(run.model.path, trust_remote_code=trust)
    max_length = resolve_max_length(run, max_sequence_length(read_config_json(folder)))
    tokenizer = load_tokenizer(resolve_tokenizer_folder(run, folder), trust_remote_code=trust)
    add_tokens(tokenizer, run.model.added_tokens, run.model.added_special_tokens)
    task = TASKS[run.task]
    if not task.is_language_modelling:
        assert task.format is not None
        show_task_rows(run.data, task.format, tokenizer, max_length, console, num_samples, counted_rows)
        return
    show_samples(run.data_of_task, tokenizer, max_length, console, num_samples)
    show_totals(run.data_of_task, tokenizer, max_length, console, counted_rows)


EXAMPLES = """examples:
  hift-ds preview run.yaml
  hift-ds preview run.yaml data.train=other.jsonl -n 5
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_run_file(parser)
    parser.add_argument("-n", "--num-samples", type=int, default=3, help="rows to print (default: %(default)s)")
    parser.add_argument(
        "--all",
        action="store_true",
        help=f"count all rows of each source, not only the first {COUNTED_ROWS:,}",
    )


def run(args: argparse.Namespace) -> int:
    from rich.console import Console

    if args.num_samples < 0:
        raise ConfigError(f"--num-samples: expected at least 0, got {args.num_samples}")

    run = load_run_config(args.run_file, args.overrides)
    preview(run, Console(), args.num_samples, None if args.all else COUNTED_ROWS)
    return 0
