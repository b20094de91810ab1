"""``hift-ds plot RUN_DIR``: draw loss.png, groups.png and transfers.png of a run, finished or not."""

from __future__ import annotations

import argparse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run_dir", metavar="RUN_DIR", help="folder with a metrics.jsonl; the pictures go there too")


def run(args: argparse.Namespace) -> int:
    from hift_ds.report.plots import plot_run

    for path in plot_run(args.run_dir):
        print(path)
    return 0
