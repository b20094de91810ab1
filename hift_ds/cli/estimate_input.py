"""What ``hift-ds estimate`` is asked about: a run file, or a model with batch, length and precision, as a Setting."""

from __future__ import annotations

import argparse
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from hift_ds.dtypes import short_name
from hift_ds.errors import ConfigError, DataError
from hift_ds.forecast.setting import SWITCHES, Setting, with_hift, with_switch
from hift_ds.train.run_file import add_run_file

if TYPE_CHECKING:
    from hift_ds.train.fit import Chosen
    from hift_ds.train.run_config import RunConfig

PRECISIONS = ("fp32", "mixed", "mixed_hi", "bf16")


def count_or_all(text: str) -> int | str:
    """The value of ``--group-size`` where nothing is known that "auto" could go by."""
    try:
        return "all" if text == "all" else int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected a whole number or all, got {text!r}") from None


def count_all_or_auto(text: str) -> int | str:
    """The value of ``--group-size`` of an estimate."""
    if text == "auto":
        return text
    try:
        return count_or_all(text)
    except argparse.ArgumentTypeError:
        raise argparse.ArgumentTypeError(f"expected a whole number, all or auto, got {text!r}") from None


_WHAT = {
    "slice_numel": "updating a group in slices", "checkpointing": "recomputing activations in backward",
    "chunked_loss": "computing the loss in chunks", "offload": "keeping activations in host memory",
}  # fmt: skip


def add_input_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments that say which run is asked about."""
    add_run_file(parser, optional=True)
    parser.add_argument("--model", metavar="MODEL", help="folder with a config.json, size of the zoo, or hub name")
    parser.add_argument("--batch", type=int, metavar="B", help="sequences in a micro-batch of one GPU (default: 1)")
    parser.add_argument(
        "--length", type=int, metavar="S", help="tokens in a sequence (default: 2048, or the model's limit)"
    )
    parser.add_argument("--precision", choices=PRECISIONS, help="default: mixed_hi (bf16 weights, fp32 masters)")
    parser.add_argument("--optimizer", metavar="NAME", help="default: AdamW")
    parser.add_argument("--card", type=float, metavar="GIB", help="fit what the run file leaves open to such a card")
    parser.add_argument("--gpus", type=int, default=1, metavar="N", help="data-parallel ranks (default: 1)")
    parser.add_argument("--accumulation", type=int, metavar="N", help="micro-batches in a step (default: 1)")
    parser.add_argument(
        "--group-size",
        type=count_all_or_auto,
        metavar="M",
        help='blocks trained together, "all", or "auto" (default: 1)',
    )
    parser.add_argument("--update", choices=("after_backward", "in_backward"), help="default: after_backward")
    parser.add_argument(
        "--blocks-kept", type=int, metavar="K", help="blocks that checkpointing leaves out (default: 0)"
    )
    parser.add_argument(
        "--padded",
        action="store_true",
        help="batches of several texts with padding: a mask, and grouped heads repeated (a run file decides by itself)",
    )
    parser.add_argument("--eager-attention", action="store_true", help="no fused attention kernel: scores are held")
    for switch in SWITCHES:
        name = switch.replace("_", "-").replace("slice-numel", "slices")
        parser.add_argument(
            f"--no-{name}", dest=f"no_{switch}", action="store_true", help=f"count without {_WHAT[switch]}"
        )
    parser.add_argument("--trust-remote-code", action="store_true", help="run the code the checkpoint brings along")


def setting_from(args: argparse.Namespace) -> Setting:
    """The setting that the command line names: the first of :func:`setting_and_choice`."""
    return setting_and_choice(args)[0]


def setting_and_choice(args: argparse.Namespace) -> tuple[Setting, Chosen | None]:
    """The setting that the command line names, and what was chosen of what a run file leaves open.

    Raises:
        ConfigError: neither a run file nor a model, or flags that a run file decides.
    """
    if args.run_file is not None and "=" in args.run_file:
        args.overrides, args.run_file = [args.run_file, *args.overrides], None
    if args.run_file is not None:
        return _from_run_file(args)
    if args.model is None:
        raise ConfigError("estimate: give a run file, or --model with a folder, a size of the zoo or a hub name")
    if args.overrides:
        raise ConfigError(f"estimate: {args.overrides[0]!r} changes a run file, and none is given")
    if args.card is not None:
        raise ConfigError(
            "estimate: --card is what a run file is fitted to, and none is given; the table has all cards"
        )
    return _from_flags(args), None


def _from_run_file(args: argparse.Namespace) -> tuple[Setting, Chosen]:
    import torch

    from hift_ds.hf.model_folder import max_sequence_length
    from hift_ds.hf.model_structure import read_config
    from hift_ds.train.card import card_here, card_of
    from hift_ds.train.fit import Facts, apply, choose, setting_of
    from hift_ds.train.run_config import load_run_config
    from hift_ds.train.settings import resolve, resolve_dtype, resolve_max_length

    decided = {"batch": "train.micro_batch_size", "length": "data.max_length", "optimizer": "train.optimizer",
               "accumulation": "train.gradient_accumulation_steps", "precision": "model.dtype",
               "group_size": "hift.group_size", "update": "hift.update",
               "blocks_kept": "hift.activations.blocks_kept"}  # fmt: skip
    for flag, key in decided.items():
        if getattr(args, flag) is not None:
            raise ConfigError(f"--{flag.replace('_', '-')}: the run file decides; write {key}=... after it")
    run = load_run_config(args.run_file, args.overrides)
    source = args.model or run.model.path
    config = read_config(source, trust_remote_code=run.model.trust_remote_code)
    stored = short_name(getattr(config, "dtype", None)) or "fp32"
    settings = resolve(run, args.gpus)
    dtype = resolve_dtype(settings, stored)
    if settings.hift is None:
        raise ConfigError("hift: false is ordinary full fine-tuning, which this does not estimate; remove it")
    length = resolve_max_length(run, max_sequence_length(config.to_dict()))
    facts = Facts(settings, dtype, source, length, _num_rows(run))
    if args.card is not None and not args.card > 0:
        raise ConfigError(f"estimate: --card: expected GiB above 0, got {args.card:g}")
    card = None
    if (gib := args.card or run.fit) is not None and gib != "auto":
        card = card_of(gib, args.gpus)
    elif torch.accelerator.is_available():
        card = card_here(settings, dtype)
    chosen = choose(facts, card)
    setting = setting_of(replace(facts, settings=apply(settings, chosen.keys)))
    if args.eager_attention:
        setting = replace(setting, eager_attention=True)
    if args.padded:
        setting = replace(setting, padded=True)
    for switch in SWITCHES:
        if getattr(args, f"no_{switch}"):
            setting = with_switch(setting, switch, on=False)
    return setting, chosen


def _num_rows(run: RunConfig) -> int | None:
    """The number of rows of the training data, if it is here and a row stays a row."""
    from hift_ds.data.rows import load_rows

    sources = run.data.train_sources()
    if run.data.packing or run.train.max_steps or any(source.path.startswith("hub:") for source in sources):
        return None
    try:
        rows = len(load_rows(sources))
    except (DataError, ModuleNotFoundError):
        return None
    held_out = run.data.val_size if run.data.val_size >= 1 else round(run.data.val_size * rows)
    return rows - int(held_out)


def _from_flags(args: argparse.Namespace) -> Setting:
    from hift_ds.hf.model_folder import max_sequence_length
    from hift_ds.hf.model_structure import read_config

    config = read_config(args.model, trust_remote_code=args.trust_remote_code)
    limit = max_sequence_length(config.to_dict())
    length = args.length or min(2048, limit or 2048)
    for flag in ("batch", "length", "gpus", "accumulation", "group_size"):
        value = getattr(args, flag)
        if isinstance(value, int) and value < 1:
            raise ConfigError(f"--{flag.replace('_', '-')}: expected a whole number of at least 1, got {value}")
    if limit is not None and length > limit:
        raise ConfigError(f"--length: {length} is longer than the {limit} positions that {args.model} has")
    precision = args.precision or "mixed_hi"
    engine_config: dict[str, Any] = {
        "optimizer": {"type": args.optimizer or "AdamW", "params": {"lr": 1e-5}},
        "gradient_clipping": 1.0,
        "hift": {"group_size": args.group_size or 1, "update": args.update or "after_backward"},
    }
    if precision == "mixed":
        engine_config["torch_autocast"] = {"enabled": True, "dtype": "bfloat16"}
    elif precision != "fp32":
        engine_config["bf16"] = {"enabled": True}
        engine_config["hift"]["master_weights"] = precision == "mixed_hi"
    setting = Setting(
        args.model, engine_config, "float32" if precision in ("fp32", "mixed") else "bfloat16", args.batch or 1, length,
        world_size=args.gpus, micro_batches=min(args.accumulation or 1, 2), padded=args.padded,
        eager_attention=args.eager_attention,
        trust_remote_code=args.trust_remote_code,
    )  # fmt: skip
    for switch in SWITCHES:
        setting = with_switch(setting, switch, on=not getattr(args, f"no_{switch}"))
    if args.blocks_kept and not args.no_checkpointing:
        setting = with_hift(setting, "activations", {"blocks_kept": args.blocks_kept})
    return setting
