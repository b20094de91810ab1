"""``python -m hift_ds.launch_with PROGRAM ARGS``: run another program with HiFT in its Trainer.

    python -m hift_ds.launch_with trl.scripts.sft --deepspeed bf16_host.json ...
    deepspeed --module hift_ds.launch_with llamafactory.launcher run.yaml

PROGRAM is a module or a Python file. Every ``transformers.Trainer`` that it makes gets a :class:`HiFTCallback`, which
acts if the Trainer's DeepSpeed config has a ``"hift"`` block, and says so; without one the program is what it is.
"""

from __future__ import annotations

import runpy
import sys
from collections.abc import Sequence
from pathlib import Path

from hift_ds.errors import HiFTError

USAGE = "usage: python -m hift_ds.launch_with PROGRAM ARGS   (a module or a .py file, and its arguments)"


def main(argv: Sequence[str]) -> int:
    """Returns the exit code: 2 for an error in the use, the config or the inputs, in one line."""
    if not argv or argv[0] in ("-h", "--help"):
        print(USAGE, file=sys.stderr if not argv else sys.stdout)
        return 0 if argv else 2
    program, *rest = argv
    from transformers import trainer

    from hift_ds.integrations.callback import AnnouncedCallback

    AnnouncedCallback.num_on = 0
    trainer.DEFAULT_CALLBACKS.insert(0, AnnouncedCallback)  # before the loggers, which get our fields so
    was = sys.argv
    sys.argv = [program, *rest]
    try:
        if program.endswith(".py") or Path(program).is_file():
            runpy.run_path(program, run_name="__main__")
        else:
            runpy.run_module(program, run_name="__main__", alter_sys=True)
    except HiFTError as error:
        print(f"hift_ds: {error}", file=sys.stderr)
        return 2
    finally:
        sys.argv = was
        trainer.DEFAULT_CALLBACKS.remove(AnnouncedCallback)
    if not AnnouncedCallback.num_on:
        print(
            'hift_ds: HiFT was never on: no Trainer had a DeepSpeed config with a "hift" block',
            file=sys.stderr,
        )
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
