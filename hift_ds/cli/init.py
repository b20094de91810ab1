"""``hift-ds init MODEL --card 24``: write a commented run file whose settings fit the card."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from hift_ds.errors import ConfigError
from hift_ds.forecast.simulator import one_simulator
from hift_ds.shipped import BUNDLED, find

DATA = f"{BUNDLED}hift_questions"
LENGTH, ROWS = 1024, 16
TEMPLATE = """\
# yaml-language-server: $schema=hift_run.schema.json
# (completion in an editor, once there: hift-ds schema -o hift_run.schema.json)
# {title}
#   hift-ds preview {file}     which tokens are learned from
#   hift-ds estimate {file}    memory, counted
#   hift-ds train {file}       any key can be changed here: train.learning_rate=5e-5
# Every key: docs/run_file.md
model:
  path: {path}
  dtype: {dtype}  # of the weights; {dtype_note}
data:
  train: {data}  # {data_note}
  val_size: 0.02  # rows held out for evaluation, a share or a number; or eval: FILE
  max_length: {length}  # tokens of the longest sample; memory grows with it
  # template: auto  # chat template: auto takes the model's own, else alpaca
  # packing: true  # several samples in a row, unseen by each other: less padding
  # train_on_prompt: true  # learn every token, not only answers
train:
  output_dir: runs/{name}
  epochs: 1  # or max_steps
  global_batch_size: {rows}  # rows in an optimizer step, whatever the number of GPUs
{batch}
  learning_rate: 2.0e-5  # {rate_note}
  lr_scheduler: cosine
  warmup_ratio: 0.03
  # optimizer: AdamW  # any of torch.optim, Lion, Muon
  # eval_steps: 100  # default: after each epoch
  save_steps: 500  # a checkpoint takes {checkpoint}, save_total_limit (2) of them are kept
  # report_to: [tensorboard]  # or wandb, mlflow, ...
hift:
  fit: {fit}  # {fit_note}
  # group_size: 1  # blocks trained together; left out it follows from the length of the run
  order: bottom2up  # or top2down, random
{switches}
"""
COMMENTS = {
    "hift.activations.checkpointing": "blocks are recomputed in backward",
    "hift.activations.blocks_kept": "of these so many are not recomputed",
    "hift.activations.chunked_loss": "logits a few hundred tokens at a time",
    "hift.activations.offload": "what backward needs waits in host memory",
    "hift.state.slice_numel": "weights updated at once",
    "hift.state.residency": "masters and optimizer states stay on the GPU",
    "train.micro_batch_size": "rows in a forward pass; what is left of the step is accumulated",
}


EXAMPLES = """examples:
  hift-ds init path/to/model --card 24                   # written for a card with 24 GiB
  hift-ds init owner/name --data my.jsonl -o my.yaml     # for the card that is here
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help="folder with a config.json, hub name, or a preset's name")
    parser.add_argument(
        "--card", type=float, metavar="GIB", help="memory of the GPU (default: of the one that is here)"
    )
    parser.add_argument("--gpus", type=int, default=1, metavar="N", help="of them (default: 1)")
    parser.add_argument("--data", default=DATA, metavar="FILE", help=f"training data (default: {DATA})")
    parser.add_argument("-o", "--output", metavar="FILE", help="default: the model's name with .yaml, here")
    parser.add_argument("--trust-remote-code", action="store_true", help="run the code the checkpoint brings along")


@one_simulator()
def run(args: argparse.Namespace) -> int:
    path, source = _model(args.model)
    name = Path(path.rstrip("/")).name.lower().replace("-", "_")
    file = Path(args.output or f"{name}.yaml")
    if file.exists():
        raise ConfigError(f"init: {str(file)!r} exists; give another name with -o")
    text, lines = write_run_file(path, source, file=str(file), name=name, data=args.data, card=args.card,
                                 gpus=args.gpus, trust_remote_code=args.trust_remote_code)  # fmt: skip
    try:
        file.write_text(text, encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"init: cannot write {str(file)!r}: {error.strerror}") from None
    for line in lines:
        print(line)
    print(f"written: {file}    next: hift-ds preview {file}    hift-ds train {file}")
    return 0


def _model(given: str) -> tuple[str, str]:
    """What a run file names, and where its config is read: for a preset that is the zoo, which needs no network."""
    from hift_ds.hf.model_structure import is_zoo_size
    from hift_ds.shipped import presets
    from hift_ds.train.run_config import load_run_config

    if given in presets() and not Path(given).exists():
        path = load_run_config(find(given, "preset")).model.path
        return path, given if is_zoo_size(given) else path
    if is_zoo_size(given) and not Path(given).exists():
        raise ConfigError(
            f"init: {given!r} is a size without weights; give a folder, a hub name, or one of {', '.join(presets())}"
        )
    return given, given


def write_run_file(
    path: str, source: str, *, file: str, name: str, data: str, card: float | None, gpus: int = 1,
    trust_remote_code: bool = False,
) -> tuple[str, tuple[str, ...]]:  # fmt: skip
    """A run file as text, and lines about what was chosen in it.

    Args:
        path: ``model.path`` of the run file.
        source: where the model's config is read.
        card: GiB; None: the accelerator of this machine.

    Raises:
        ConfigError: no card given and none here; no such model.
    """
    import torch
    import yaml

    from hift_ds.forecast.fit import gib
    from hift_ds.hf.model_folder import max_sequence_length
    from hift_ds.train.card import card_here, card_of
    from hift_ds.train.fit import Facts, choose
    from hift_ds.train.group_size import ModelSizes
    from hift_ds.train.run_config import RunConfig
    from hift_ds.train.settings import resolve

    if card is not None and not card > 0:
        raise ConfigError(f"init: --card: expected GiB above 0, got {card:g}")
    if card is None and not torch.accelerator.is_available():
        raise ConfigError("init: there is no accelerator here; --card says for how many GiB the file is written")
    model = ModelSizes.read(source, trust_remote_code)
    length = min(LENGTH, max_sequence_length(model.config.to_dict()) or LENGTH)
    dtype = "bf16"
    words: dict[str, Any] = {
        "title": f"{path}: {model.numel / 1e9:.2f} B parameters, every one of them trained",
        "file": file, "path": yaml_text(path), "dtype": dtype, "name": name, "data": yaml_text(data), "length": length,
        "dtype_note": "masters and optimizer states are fp32, in host memory unless said otherwise",
        "data_note": "messages, alpaca, sharegpt, prompt and completion, CSV, text: docs/data.md",
        "rows": ROWS, "rate_note": "full fine-tuning's, a tenth of LoRA's", "checkpoint": gib(14 * model.numel),
        "fit": "auto" if card is None else f"{card:g}",
        "fit_note": "GiB of the card; what is left open below is chosen for it when a run starts",
    }  # fmt: skip
    bare = RunConfig.model_validate(yaml.safe_load(TEMPLATE.format(**words, batch="", switches="")))
    settings = resolve(bare, gpus)
    found = card_of(card, gpus) if card is not None else card_here(settings, "bf16")
    steps_say_nothing = {"hift.group_size", "hift.update"}  # of the run's length, which the data decide
    chosen = choose(Facts(settings, "bf16", source, length, None), found)
    keys = {key: value for key, value in chosen.keys.items() if key not in steps_say_nothing}
    batch = keys.pop("train.micro_batch_size", None)
    text = TEMPLATE.format(
        **words,
        batch=_line(2, "micro_batch_size", batch, COMMENTS["train.micro_batch_size"])
        if batch
        else "  # micro_batch_size:",
        switches=_switches(keys),
    )
    text = _aligned(text)
    RunConfig.model_validate(yaml.safe_load(text))
    return text, tuple(line for line in chosen.lines if line.startswith("fit:"))


def _aligned(text: str) -> str:
    """The comments behind keys, commented-out ones included, in one column where there is room."""
    lines = []
    for line in text.splitlines():
        key, _, comment = line.rpartition("  # ")
        lines.append(f"{key.rstrip():<33} # {comment}" if key.strip() else line)
    return "\n".join(lines) + "\n"


def _switches(keys: dict[str, Any]) -> str:
    """The rest of the "hift" section, and sections after it."""
    lines = []
    for section in ("activations", "state"):
        found = {key: value for key, value in keys.items() if key.startswith(f"hift.{section}.")}
        if found:
            lines.append(f"  {section}:  # what makes it fit; off it would be faster")
        lines += [_line(4, key.rpartition(".")[2], value, COMMENTS[key]) for key, value in found.items()]
    if not lines:
        lines = ["  # activations: {checkpointing: true, chunked_loss: true}   # not needed on this card"]
    if zero := keys.get("deepspeed.zero_optimization"):
        lines += ["deepspeed:", "  zero_optimization:             # weights streamed from host memory",
                  f"    stage: {zero['stage']}", "    offload_param: {device: cpu, pin_memory: true}"]  # fmt: skip
    return "\n".join(lines)


def _line(indent: int, key: str, value: object, comment: str) -> str:
    text = " " * indent + f"{key}: {str(value).lower() if isinstance(value, bool) else value}"
    return f"{text}  # {comment}"


def yaml_text(value: str) -> str:
    """The value as a YAML scalar."""
    import yaml

    return yaml.safe_dump(value, default_flow_style=True, width=1000).removesuffix("\n").removesuffix("\n...")
