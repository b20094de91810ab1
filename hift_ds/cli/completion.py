"""``hift-ds completion SHELL``: completion of commands, options and files, made by shtab from our own parser."""

from __future__ import annotations

import argparse
import importlib.util

from hift_ds.errors import ConfigError

SHELLS = ("bash", "zsh", "tcsh")
EXAMPLES = """examples:
  hift-ds completion bash > ~/.local/share/bash-completion/completions/hift-ds
  hift-ds completion zsh > ~/.zfunc/_hift-ds        # a folder in $fpath
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("shell", choices=SHELLS, metavar="SHELL", help=", ".join(SHELLS))


def run(args: argparse.Namespace) -> int:
    if importlib.util.find_spec("shtab") is None:
        raise ConfigError("completion needs the package shtab, not installed here; pip install shtab")
    import shtab

    from hift_ds.cli.main import COMMANDS, make_parser

    print(shtab.complete(make_parser(COMMANDS), shell=args.shell))
    return 0
