"""``hift-ds report RUN``: one HTML page about a run."""

from __future__ import annotations

import argparse

EXAMPLES = """examples:
  hift-ds report runs/first     # writes runs/first/report.html, which any browser shows, also without a network
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run_dir", metavar="RUN", help="a run folder, of a run that has ended or not")


def run(args: argparse.Namespace) -> int:
    from hift_ds.report.page import write_report

    print(write_report(args.run_dir))
    return 0
