"""``hift-ds groups MODEL``: the layer groups of a model in the order in which a cycle updates them."""

from __future__ import annotations

import argparse
import json
import sys
from typing import Any

from hift_ds.cli.estimate_input import count_or_all
from hift_ds.schedule import ORDERS

EXAMPLES = """examples:
  hift-ds groups path/to/model
  hift-ds groups llama2_7b --group-size 4      # a size that needs no folder
  hift-ds groups owner/name --json             # from the Hub: its config alone
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "model",
        metavar="MODEL",
        help="folder with a config.json (no weights needed), hub name, or size of the zoo",
    )
    parser.add_argument(
        "--group-size", type=count_or_all, default=1, metavar="M", help='blocks in a group, or "all" (default: 1)'
    )
    parser.add_argument("--order", choices=ORDERS, default=ORDERS[0], help=f"default: {ORDERS[0]}")
    parser.add_argument("--seed", type=int, default=0, help="of the random order (default: 0)")
    parser.add_argument("--json", action="store_true", help='print a list of {"name", "numel", "params"}')
    parser.add_argument("--trust-remote-code", action="store_true", help="run the code the checkpoint brings along")


def run(args: argparse.Namespace) -> int:
    from hift_ds.hf.model_structure import build_on_meta, read_config
    from hift_ds.layers.grouping import describe, partition_model

    config = read_config(args.model, trust_remote_code=args.trust_remote_code)
    model = build_on_meta(config, trust_remote_code=args.trust_remote_code)
    partition = partition_model(model, group_size=args.group_size)
    groups = describe(partition, order=args.order, seed=args.seed)
    if args.json:
        json.dump(groups, sys.stdout, indent=2)
        print()
    else:
        _print_table(f"{type(model).__name__}, group size {args.group_size}, {args.order}", groups)
    return 0


def _print_table(title: str, groups: list[dict[str, Any]]) -> None:
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table

    total = sum(group["numel"] for group in groups)
    largest = max(groups, key=lambda group: group["numel"])
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, show_footer=True, pad_edge=False)
    table.add_column("turn", justify="right")
    table.add_column("group", footer=f"{len(groups)} groups", overflow="fold")
    table.add_column("tensors", justify="right", footer=str(sum(len(group["params"]) for group in groups)))
    table.add_column("parameters", justify="right", footer=f"{total:,}")
    table.add_column("share", justify="right", footer="100.00 %")
    for turn, group in enumerate(groups, start=1):
        share = f"{100 * group['numel'] / total:.2f} %"
        table.add_row(str(turn), group["name"], str(len(group["params"])), f"{group['numel']:,}", share)
    console = Console(highlight=False)
    console.print(table)
    console.print(
        f"Largest group: {largest['name']}, {largest['numel'] / 1e6:,.2f} M of {total / 1e6:,.2f} M "
        f"trainable parameters ({100 * largest['numel'] / total:.1f} %).",
        markup=False,
    )
