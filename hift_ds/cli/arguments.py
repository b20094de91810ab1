"""Arguments that several commands take."""

from __future__ import annotations

import argparse

from hift_ds.dtypes import TORCH_NAMES


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """The model of a run, and how it is loaded."""
    parser.add_argument(
        "model", metavar="RUN", help="a run folder (train.output_dir), a folder with a model, or hub:owner/name"
    )
    parser.add_argument(
        "--dtype", choices=("auto", *TORCH_NAMES), default="auto", help="to compute in (default: that of the files)"
    )
    parser.add_argument(
        "--device", metavar="NAME", help="of torch, such as cuda:1 or cpu (default: an accelerator if there is one)"
    )
    parser.add_argument(
        "--trust-remote-code", action="store_true",
        help="run the code that a model folder brings along (of a run: as its run file says)",
    )  # fmt: skip
