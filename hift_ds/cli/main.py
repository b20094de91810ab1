"""``hift-ds COMMAND ...``: a table of commands, each in a module that is imported only when it is called.

A command's module has ``add_arguments(parser)``, ``run(args) -> int``, the exit code, and ``EXAMPLES``, the end of its
help. An error that is the user's (:class:`~hift_ds.errors.HiFTError`) becomes one line on stderr and exit code 2; any
other is a bug and keeps its traceback.
"""

from __future__ import annotations

import argparse
import importlib
import os
import sys
import textwrap
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from hift_ds.errors import INTERRUPTED, PROG, USER_ERROR, HiFTError, OneLineParser, as_missing_extra, unknown_key
from hift_ds.report.quiet import escape_what_cannot_be_shown
from hift_ds.version import __version__


@dataclass(frozen=True)
class Command:
    """One row of the table: where it is implemented and what it does."""

    module: str
    help: str


EXAMPLES = """examples:
  hift-ds train smollm2_135m         # runs as it is: model from the Hub, data from the package
  hift-ds init MODEL --card 24       # a run file for your model and card, to edit
  hift-ds preview run.yaml           # see what is learned from
  hift-ds train run.yaml             # train; the same command goes on where it was stopped
  hift-ds chat runs/NAME             # talk to what came of it
hift-ds COMMAND --help has more, with examples."""

COMMANDS = {
    "init": Command("hift_ds.cli.init", "write a run file for a model and a card, every common key with a comment"),
    "train": Command("hift_ds.cli.train", "fine-tune as a run file says, with the accelerators found"),
    "groups": Command("hift_ds.cli.groups", "print the layer groups of a model, from its config alone"),
    "export": Command("hift_ds.cli.export", "write a training checkpoint as a Hugging Face folder"),
    "chat": Command("hift_ds.cli.chat", "talk to what a run has made, in the terminal or through a pipe"),
    "eval": Command("hift_ds.cli.eval", "held-out loss and scores of what a run has made, or benchmarks of lm-eval"),
    "predict": Command("hift_ds.cli.predict", "answer, or label, the rows of a file, many at once"),
    "report": Command("hift_ds.cli.report", "write one HTML page about a run, finished or not"),
    "plot": Command("hift_ds.cli.plot", "draw the pictures of a run, finished or not"),
    "estimate": Command(
        "hift_ds.cli.estimate",
        "count how much memory a run will take, before anything is rented or loaded",
    ),
    "preview": Command("hift_ds.cli.preview", "print the first training samples of a run file, learned tokens marked"),
    "schema": Command("hift_ds.cli.schema", "print the JSON schema of a run file, for editors"),
    "completion": Command("hift_ds.cli.completion", "print a script that completes commands and options in a shell"),
    "env": Command(
        "hift_ds.cli.env",
        "print versions, accelerators, memory and disk, for a report of a problem",
    ),
}


class _HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """Lines of examples that fit the terminal: a comment above its command, a long command over several lines."""

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        return "\n".join(part for line in text.splitlines() for part in _fitting(indent + line, width))


def _fitting(line: str, width: int) -> list[str]:
    if len(line) <= width:
        return [line]
    margin = " " * (len(line) - len(line.lstrip()))

    def wrapped(text: str, first: str, then: str, room: int = 0) -> list[str]:
        return textwrap.wrap(
            text, width - room, initial_indent=first, subsequent_indent=then, break_long_words=False,
            break_on_hyphens=False,
        )  # fmt: skip

    command, mark, comment = line.partition(" # ")
    if mark:
        return [*wrapped(comment, f"{margin}# ", f"{margin}# "), *_fitting(command.rstrip(), width)]
    if not margin:
        return wrapped(line, "", "")
    *parts, last = wrapped(line.strip(), margin, f"{margin}    ", room=2)
    return [*(f"{part} \\" for part in parts), last]


def make_parser(loaded: Collection[str]) -> argparse.ArgumentParser:
    """The parser, with the arguments of the commands in ``loaded``, whose modules it imports, and the names of all."""
    parser = OneLineParser(
        prog=PROG,
        description="Full-parameter fine-tuning, one layer group at a time, on DeepSpeed.",
        epilog=EXAMPLES,
        formatter_class=_HelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"{PROG} {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name, command in COMMANDS.items():
        subparser = commands.add_parser(
            name, help=command.help, description=command.help, formatter_class=_HelpFormatter
        )
        if name in loaded:
            module = importlib.import_module(command.module)
            subparser.epilog = module.EXAMPLES
            module.add_arguments(subparser)
            subparser.set_defaults(run=module.run)
    return parser


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    called = next((argument for argument in argv if not argument.startswith("-")), None)
    if called is not None and called not in COMMANDS:
        raise unknown_key(called, COMMANDS, "COMMAND", "command")
    parser = make_parser({called} if called else set())
    if not argv:
        parser.print_help()
        raise SystemExit(USER_ERROR)
    args, rest = parser.parse_known_args(argv)
    if "overrides" in args and not any(argument.startswith("-") for argument in rest):
        args.overrides += rest  # argparse gives up on section.key=value texts that come after an option
    elif rest:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    return args


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command line (``sys.argv`` if none is given) and returns its exit code."""
    escape_what_cannot_be_shown()
    try:
        args = _parse(sys.argv[1:] if argv is None else argv)
        code = args.run(args)
        sys.stdout.flush()
        return code
    except HiFTError as error:
        print(f"{PROG}: error: {' '.join(str(error).split())}", file=sys.stderr)
        return USER_ERROR
    except ModuleNotFoundError as error:
        if (line := as_missing_extra(error)) is None:
            raise
        print(f"{PROG}: error: {line}", file=sys.stderr)
        return USER_ERROR
    except SystemExit as stop:  # --help and --version
        return int(stop.code or 0)
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:  # the reader of our output, such as `head`, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


if __name__ == "__main__":
    sys.exit(main())
