"""What `run.py` does, by the authors' own package: `hift` 0.0.5 from PyPI, its trainer, its AdamW, its schedule.

It pins libraries of 2023, so it runs in an environment of its own (README.md: how it is made):

    DIR/bin/python benchmarks/methods/authors.py '{"task": "module", "method": "authors", ...}' --model DIR

Precision is fp32, weights and all: its mixed precision needs DeepSpeed's fp16 on a GPU.
"""

from __future__ import annotations

import json
import math
import os
import resource
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from importlib.metadata import version
from itertools import islice, repeat
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import IterableDataset
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).resolve().parent))

import run  # noqa: E402
import tasks  # noqa: E402
from methods import BETAS, CLIP, EPS  # noqa: E402

# The wheel installs a package `examples` too, which would hide our folder of that name, where the rows are made.
EXAMPLES = ModuleType("examples")
EXAMPLES.__path__ = [str(Path(__file__).resolve().parents[2] / "examples")]
sys.modules["examples"] = EXAMPLES


class Batches(IterableDataset):
    """Batches as they are, in their order; the trainer takes each for one row."""

    def __init__(self, batches: Any) -> None:
        self.batches = batches

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        return iter(self.batches)


def only(rows: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """The collator of :class:`Batches`."""
    (row,) = rows
    return row


def load(spec: dict[str, Any], folder: Path, data: Path | None) -> tuple[nn.Module, tasks.Task, int]:
    """The model in fp32, the tokenized task, the id to pad with; as :func:`run.load`."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification

    tokenizer = load_tokenizer(folder)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    task = tasks.load_task(spec["task"], tokenizer, spec["max_length"], data)
    del task.held_out[spec["held_out"] :]
    config = AutoConfig.from_pretrained(folder)
    rope = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("rope_parameters")
    if rope:  # which this transformers passes over, for its own default
        if rope.get("rope_type", "default") != "default":
            raise SystemExit(f"{folder}: rope_type {rope['rope_type']!r}; transformers of 2023 has only the default")
        config.rope_theta = rope["rope_theta"]
    config.use_cache = False
    torch.manual_seed(spec["seed"])  # of a new head
    if task.kind == "classes":
        config.num_labels, config.pad_token_id = task.num_labels, pad
        model = AutoModelForSequenceClassification.from_pretrained(folder, config=config, torch_dtype=torch.float32)
    else:
        model = AutoModelForCausalLM.from_pretrained(folder, config=config, torch_dtype=torch.float32)
    return model.train(), task, pad


def load_tokenizer(folder: Path) -> Any:
    """The tokenizer of a folder that a newer transformers wrote: merges as pairs, the template in a file of its own."""
    from transformers import AutoTokenizer

    with tempfile.TemporaryDirectory() as made:
        for path in folder.iterdir():
            if path.is_file() and path.stat().st_size < 2**25:
                shutil.copy(path, made)
        file = Path(made, "tokenizer.json")
        content = json.loads(file.read_text(encoding="utf-8"))
        merges = content["model"].get("merges")
        if merges and isinstance(merges[0], list):
            content["model"]["merges"] = [" ".join(pair) for pair in merges]
            file.write_text(json.dumps(content), encoding="utf-8")
        tokenizer = AutoTokenizer.from_pretrained(made)
        template = Path(made, "chat_template.jinja")
        if template.is_file():
            tokenizer.chat_template = template.read_text(encoding="utf-8")
    return tokenizer


def arguments(out: str, steps: int, rate: float, optim: str, seed: int, warmup: float) -> Any:
    """Those of a trainer on the CPU: a batch for a row, linear decay, the norm clipped as everywhere, nothing saved."""
    os.environ.pop("DS_ACCELERATOR", None)  # "cpu" asks this DeepSpeed for Intel's extension
    from transformers import TrainingArguments

    return TrainingArguments(
        output_dir=out, max_steps=steps, per_device_train_batch_size=1, learning_rate=rate,
        lr_scheduler_type="linear", warmup_ratio=warmup, weight_decay=0.0, adam_beta1=BETAS[0],
        adam_beta2=BETAS[1], adam_epsilon=EPS, max_grad_norm=CLIP, optim=optim, seed=seed,
        use_cpu=True, dispatch_batches=False, remove_unused_columns=False, logging_strategy="no", save_strategy="no",
        report_to=[], disable_tqdm=True,
    )  # fmt: skip


def build(spec: dict[str, Any], model: nn.Module, kind: str, batches: Any, watch: Any, out: str) -> Any:
    """Their trainer, with nothing of it replaced.

    Args:
        spec: its ``settings`` are ``group_element`` (layers in a group), ``strategy``, ``optim``, and ``warmup`` (a
            share of the steps).
        kind: of the task.
        watch: a callback of the trainer.
        out: a folder that it may write to.
    """
    settings = spec["settings"]
    args = arguments(out, spec["steps"], spec["rate"], settings["optim"], spec["seed"], settings["warmup"])
    from hift import GetCallBack, HiFTrainer

    return HiFTrainer(
        GetCallBack(model.config.model_type), "SEQ_CLS" if kind == "classes" else "CAUSAL_LM",
        group_element=settings["group_element"], strategy=settings["strategy"], hier_tuning=True, args=args,
        model=model, train_dataset=Batches(batches), data_collator=only, callbacks=[watch],
    )  # fmt: skip


def watcher(at_end_of: Callable[[int, float], bool]) -> Any:
    """A callback for their trainer that times each of its steps, from the batch to the zeroed gradients.

    Args:
        at_end_of: called after each step, outside of its time, with its number (from 1) and CPU seconds; says whether
            to stop.
    """
    from transformers import TrainerCallback

    class Watch(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            self.started = time.process_time()

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            taken = time.process_time() - self.started
            control.should_training_stop |= at_end_of(state.global_step, taken)

    return Watch()


def train(spec: dict[str, Any], folder: Path, data: Path | None) -> dict[str, Any]:
    """Train as ``spec`` says; the line of :func:`run.run`, with ``hift`` and ``dtype`` in ``where``."""
    model, task, pad = load(spec, folder, data)
    batches = list(islice(tasks.batches(task.train, spec["batch_size"], pad, spec["seed"]), spec["steps"]))
    before = tasks.judge(model, task, pad)
    held = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    curve, marks, cpu_s, losses = [{"step": 0, "cpu_s": 0.0, **before}], run.evaluated_at(spec), 0.0, []

    def at_end_of(step: int, taken: float) -> bool:
        nonlocal cpu_s
        cpu_s += taken
        diverged = not math.isfinite(losses[-1])
        if step in marks and not diverged:
            curve.append({"step": step, "cpu_s": round(cpu_s, 2), **tasks.judge(model, task, pad)})
        return diverged

    # The trainer passes over a loss that is not finite.
    model.register_forward_hook(lambda module, _, out: losses.append(float(out.loss)) if module.training else None)
    with tempfile.TemporaryDirectory() as out:
        build(spec, model, task.kind, batches, watcher(at_end_of), out).train()
    tokens = sum(int(batch["attention_mask"].sum()) for batch in batches[: len(losses)])
    line = run.line_of(spec, curve, losses[-1], tokens, cpu_s, held)
    return {**line, "where": {**line["where"], "hift": version("hift"), "dtype": "float32"}}


def seconds(specs: list[dict[str, Any]], folder: Path, data: Path | None, rounds: int) -> list[dict[str, Any]]:
    """As :func:`run.seconds`, but one method after the other."""
    return [_timed(spec, folder, data, rounds) for spec in specs]


def _timed(spec: dict[str, Any], folder: Path, data: Path | None, rounds: int) -> dict[str, Any]:
    """The same batch, whole cycles: one to warm up, ``rounds`` that are timed, one that is counted."""
    model, task, pad = load(spec, folder, data)
    batch = run.typical_batch(task, spec["batch_size"], pad)
    counter = FlopCounterMode(display=False)
    times: list[float] = []
    trained: list[int] = []

    def at_end_of(step: int, taken: float) -> bool:
        times.append(taken)
        trained.append(sum(p.numel() for p in model.parameters() if p.requires_grad))
        if step == cycle * (rounds + 1):
            counter.__enter__()
        return False

    with tempfile.TemporaryDirectory() as out:
        still = {**spec, "rate": 0.0, "steps": 1, "settings": {**spec["settings"], **spec["timed"]}}
        trainer = build(still, model, task.kind, repeat(batch), watcher(at_end_of), out)
        cycle = -(-len(trainer.group_parameters) // trainer.group_element)
        trainer.args.max_steps = cycle * (rounds + 2)
        trainer.train()
        counter.__exit__(None, None, None)
    cycles = sorted(sum(times[cycle * n : cycle * (n + 1)]) / cycle for n in range(1, rounds + 1))
    return {
        **{key: spec[key] for key in ("task", "method", "name", "settings")},
        "seconds": cycles[len(cycles) // 2], "flops": counter.get_total_flops() / cycle,
        "trained": sum(trained[-cycle:]) / cycle,
    }  # fmt: skip


if __name__ == "__main__":
    sys.exit(run.main(train, seconds))
