"""``hift-ds plot RUN_DIR``: the pictures of a run, finished or not, drawn from its metrics."""

from __future__ import annotations

import argparse

EXAMPLES = """examples:
  hift-ds plot runs/first
Into the run folder: loss.png; groups.png, which layer group moved when, and how far;
memory.png, peak memory of each group beside its forecast; transfers.png if steps waited.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run_dir", metavar="RUN_DIR", help="folder with a metrics.jsonl; the pictures go there too")


def run(args: argparse.Namespace) -> int:
    from hift_ds.report.plots import plot_run

    for path in plot_run(args.run_dir):
        print(path)
    return 0
