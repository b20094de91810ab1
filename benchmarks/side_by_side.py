"""Seconds of a step and peak memory of each way of training, beside a bare loop that does the same arithmetic.

    python benchmarks/side_by_side.py steps   --path /scratch --shape 135m     step times: on a quiet machine
    python benchmarks/side_by_side.py memory  --path /scratch --shape 135m     peaks of resident memory
    python benchmarks/side_by_side.py counted --shape 135m                     peaks on a GPU, counted (docs/memory.md)
    python benchmarks/side_by_side.py table                                    the page, from the lines alone

Each row is a process of its own. Rows with the same layers and the same arithmetic share a limit: a loop that anybody
would write, in which those layers ask for gradients and torch's fused AdamW updates them, everything resident. The
limit, full fine-tuning and as many rows as memory holds take turns of a few steps while the others sleep; a ratio is
the median over turns of a turn's own ratio. Where even one row and its limit do not fit together, they run one after
the other, which the page says. Nobody clips. Layer groups are timed on some groups, spread from bottom to top, the
others frozen: a step does the same work. Peaks are of the whole model: every group has trained, at least on a few
tokens, and the lowest ones on a whole batch.

Peers are used as their packages give them, what fails is said with its own line:

    pip install --no-deps --target PEERS -r benchmarks/methods/requirements.txt

and PEERS on PYTHONPATH. Lines go to benchmarks/results/side_by_side.jsonl; what is there is not run again. ``--quick``:
fewer turns, lines of their own.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks import forked_steps as forked  # noqa: E402
from benchmarks.forked_steps import GIB, Engine, Failed, Worker  # noqa: E402

RESULTS = ROOT / "benchmarks" / "results"
STAGES = ("steps", "memory", "counted", "table")
MIXED, BF16, FP32 = "bf16, fp32 masters", "bf16, stochastic rounding", "fp32"
FULL = "torch AdamW, fused (full fine-tuning)"
GOAL = 1.05
FEW_TOKENS = (1, 8)  # of steps that only make states


@dataclass(frozen=True)
class Workload:
    """What a step of a shape does.

    Attributes:
        rows, length: of a batch.
        groups: layer groups that are timed, of one layer and of four.
        turns: of each row, after one that is not counted.
        ours: substrings of the names of ours that are run; none for all.
    """

    rows: int
    length: int
    groups: dict[int, int]
    turns: int
    ours: tuple[str, ...] = ()


WORKLOADS = {
    "tiny": Workload(1, 16, {1: 2, 4: 1}, 2),
    "135m": Workload(2, 128, {1: 4, 4: 3}, 3),
    "1b": Workload(1, 128, {1: 3, 4: 2}, 2, (
        f"1 layer, {MIXED}", f"1 layer, {BF16}, host, after", f"1 layer, {FP32}, host, after",
        f"4 layers, {MIXED}, host", f"all layers, {MIXED}, disk", f"all layers, {MIXED}, device, after",
        "least memory", "2 ranks",
    )),
}  # fmt: skip


@dataclass(frozen=True, eq=False)
class Row:
    """A way of training.

    Attributes:
        name: in the page.
        method: a key of ``MAKERS``.
        group: layers that train in a step, a number or "all"; rows of the same group and precision share a limit.
        settings: of the method.
        states: every weight is trained by Adam with fp32 masters (or in fp32).
        peer: trains by groups and is not ours.
        against: the name of the row of ours that does the same, for peers that train by groups.
        ranks: gloo processes.
    """

    name: str
    method: str
    group: int | str
    precision: str = MIXED
    settings: dict[str, Any] = field(default_factory=dict)
    states: bool = True
    peer: bool = False
    against: str = ""
    ranks: int = 1


def layers(group: int | str) -> str:
    """How a group's size is called."""
    return "all layers" if group == "all" else f"{group} layer{'s' if group != 1 else ''}"


def limit_of(row: Row) -> str:
    """The name of the bare loop with the same layers and arithmetic."""
    return FULL if (row.group, row.precision) == ("all", MIXED) else f"bare loop, {layers(row.group)}, {row.precision}"


RESIDENCIES: dict[str, dict[str, Any]] = {
    "device": {"residency": "device"},
    "host": {"residency": "host", "slots": 2},
    "disk": {"residency": "disk", "slots": 2},
}
PRECISIONS: dict[str, dict[str, Any]] = {
    MIXED: {}, BF16: {"master_weights": False, "stochastic_rounding": True}, FP32: {},
}  # fmt: skip
LEAN = {
    "state": {"residency": "disk", "prefetch": False, "slice_numel": 1 << 22},
    "activations": {"checkpointing": True, "chunked_loss": True},
}
LISA = {"group_size": 2, "order": "random", "reshuffle": True, "always_active": [r"embed|lm_head|^model\.norm"]}
LISA_OURS = "ours, LISA's layers (2 and both ends), device"
STAGE_3_OURS = "ours, 1 layer, stage 3, 2 ranks"


def _ours() -> Iterator[Row]:
    for group in (1, 4, "all"):
        for precision, block in PRECISIONS.items():
            for residency, state in RESIDENCIES.items():
                for update in ("after_backward", "in_backward"):
                    name = f"ours, {layers(group)}, {precision}, {residency}, {update.replace('_', ' ')}"
                    settings = {"group_size": group, "update": update, "state": state, **block}
                    yield Row(name, "hift", group, precision, settings, states=precision != BF16)
    yield Row("ours, 1 layer, least memory", "hift", 1, MIXED, {"group_size": 1, **LEAN})
    settings = {"group_size": "all", "update": "in_backward", **LEAN}
    yield Row("ours, all layers, least memory", "hift", "all", MIXED, settings)
    yield Row(LISA_OURS, "hift", "lisa", MIXED, {"state": RESIDENCIES["device"], **LISA})
    yield Row(STAGE_3_OURS, "hift", "ranks", MIXED, {"group_size": 1, "stage": 3}, ranks=2)


def _peers() -> Iterator[Row]:
    yield Row("DeepSpeed ZeRO-0", "deepspeed", "all", settings={"stage": 0})
    yield Row("DeepSpeed ZeRO-2", "deepspeed", "all", settings={"stage": 2})
    yield Row("DeepSpeed ZeRO-Offload", "deepspeed", "all", settings={"stage": 2, "offload": True})
    for group in (1, 4):
        same = f"ours, {layers(group)}, {MIXED}, device, after backward"
        yield Row(f"BAdam, {layers(group)}", "badam", group, peer=True, against=same, states=False)
    yield Row("LISA (its rule: 2 blocks and both ends)", "lisa", "lisa", peer=True, against=LISA_OURS)
    yield Row("LoRA, rank 16", "lora", "lora", states=False)
    yield Row("GaLore, rank 128", "galore", "galore", states=False)
    yield Row("LOMO", "lomo", "lomo", states=False)
    yield Row("DeepSpeed ZeRO-3, 2 ranks", "deepspeed", "ranks", settings={"stage": 3}, ranks=2)
    yield Row("BAdam with ZeRO-3, 2 ranks", "badam", "ranks", settings={"stage": 3}, peer=True, against=STAGE_3_OURS,
              ranks=2, states=False)  # fmt: skip


OURS, PEERS = tuple(_ours()), tuple(_peers())
LIMITS = tuple(Row(limit_of(row), "bare", row.group, row.precision)
               for row in {limit_of(r): r for r in OURS if r.group in (1, 4, "all")}.values())  # fmt: skip
ROWS = {row.name: row for row in (*LIMITS, *PEERS, *OURS)}


def rows_of(shape: str, only: Sequence[str] = ()) -> list[Row]:
    """The rows that are run for a shape, limits left out."""
    kept = WORKLOADS[shape].ours
    chosen = [*PEERS, *(row for row in OURS if not kept or any(word in row.name for word in kept))]
    return [row for row in chosen if not only or any(word in row.name for word in only)]


# By shape and row, why it is not even tried.
NOT_TRIED = {
    ("1b", "GaLore, rank 128"): "the decompositions of its first step, 154 matrices of up to 2048 x 5632, take "
    "longer than everything else here",
}  # fmt: skip


# -- ways of training ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Job:
    """What a process builds: a row, of a shape, with so many of its groups (``None``: all)."""

    row: Row
    shape: str
    num_groups: int | None
    path: str

    def model(self) -> tuple[Any, list[list[str]] | None]:
        """The model, and the names of the parameters of each group that trains; ``None`` where all do at once."""
        import torch

        from hift_ds.layers.grouping import partition_model

        model = forked.build(self.shape, torch.float32 if self.row.precision == FP32 else torch.bfloat16)
        size = 1 if self.row.group == "ranks" else self.row.group
        if not isinstance(size, int):
            return model, None
        if self.num_groups is not None:
            blocks = forked.blocks_of(model)
            model.requires_grad_(False)
            for group in forked.spread(len(blocks), size, self.num_groups):
                for index in group:
                    blocks[index].requires_grad_(True)
        return model, [list(group.param_names) for group in partition_model(model, group_size=size).groups]


class Bare:
    """The limit: each group's weights ask for gradients in turn, torch's fused AdamW updates them, nothing else."""

    def __init__(self, job: Job) -> None:
        import torch

        self.model, names = job.model()
        weights = dict(self.model.named_parameters())
        self.groups = [[weights[n] for n in group] for group in names or [list(weights)]]
        self.precision = job.row.precision
        self.generator = torch.Generator().manual_seed(0)
        self.model.requires_grad_(False)
        self.optimizers = []
        for params in self.groups:
            targets = params if self.precision == FP32 else [torch.nn.Parameter(p.detach().float()) for p in params]
            if self.precision == BF16:
                _empty(targets)
            self.optimizers.append(torch.optim.AdamW(targets, lr=1e-5, weight_decay=0.0, fused=True))
        self.steps = 0

    def step(self, batch: dict[str, Any]) -> None:
        params, optimizer = (them[self.steps % len(self.groups)] for them in (self.groups, self.optimizers))
        for param in params:
            param.requires_grad_(True)
        self.model(**batch).loss.backward()
        if self.precision == FP32:
            optimizer.step()
        else:
            self._step_of_copies(params, optimizer)
        for param in params:
            param.requires_grad_(False).grad = None
        self.steps += 1

    def _step_of_copies(self, params: list[Any], optimizer: Any) -> None:
        import torch

        from hift_ds.precision import round_to_bf16_stochastic

        copies = optimizer.param_groups[0]["params"]
        with torch.no_grad():
            for copy, param in zip(copies, params, strict=True):
                if self.precision == BF16:
                    copy.data = param.float()
                copy.grad, param.grad = param.grad.float(), None
            optimizer.step()
            for copy, param in zip(copies, params, strict=True):
                rounds = self.precision == BF16
                param.copy_(round_to_bf16_stochastic(copy, self.generator) if rounds else copy)
                copy.grad = None
        if self.precision == BF16:
            _empty(copies)

    def close(self) -> None:
        """Nothing to give back."""


def _empty(params: Sequence[Any]) -> None:
    for param in params:
        param.data = param.data.new_empty(0)


def hift(job: Job) -> Engine:
    """Ours."""
    import hift_ds

    model, names = job.model()
    block = dict(job.row.settings)
    stage = block.pop("stage", 0)
    if block.get("state", {}).get("residency") == "disk":
        block["state"] = {**block["state"], "path": job.path}
    engine, *_ = hift_ds.initialize(
        model=model, model_parameters=[p for p in model.parameters() if p.requires_grad],
        config={
            **_deepspeed_config(job, stage),
            "optimizer": {"type": "AdamW", "params": {"lr": 1e-5, "weight_decay": 0.0, "fused": True}}, "hift": block,
        },
    )  # fmt: skip
    if names is not None and len(engine.groups) != len(names):
        raise ValueError(f"{len(engine.groups)} groups train, {len(names)} expected")
    return Engine(engine)


def _deepspeed_config(job: Job, stage: int) -> dict[str, Any]:
    return {
        "train_micro_batch_size_per_gpu": WORKLOADS[job.shape].rows, "zero_optimization": {"stage": stage},
        "zero_allow_untested_optimizer": True, "timers": {"throughput": {"enabled": False}},
        **({} if job.row.precision == FP32 else {"bf16": {"enabled": True}}),
    }  # fmt: skip


def deepspeed(job: Job) -> Engine:
    """DeepSpeed's own engine; ZeRO-Offload with its own Adam, which it compiles."""
    import torch

    import hift_ds

    model, _ = job.model()
    model.requires_grad_(True)
    config = _deepspeed_config(job, job.row.settings["stage"])
    optimizer = None
    if job.row.settings.get("offload"):
        config["zero_optimization"]["offload_optimizer"] = {"device": "cpu"}
        config["optimizer"] = {"type": "AdamW", "params": {"lr": 1e-5, "weight_decay": 0.0}}
    else:
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, weight_decay=0.0, fused=True)
    engine, *_ = hift_ds.initialize(
        model=model, optimizer=optimizer, model_parameters=list(model.parameters()), config=config
    )  # without a "hift" block DeepSpeed's
    return Engine(engine)


class OfStudy:
    """A peer as the study of methods uses its package; it does not clip here."""

    def __init__(self, job: Job, **settings: Any) -> None:
        from torch import nn

        from benchmarks.methods import methods

        nn.utils.clip_grad_norm_ = lambda *args, **kwargs: None
        model, _ = job.model()
        model.requires_grad_(True)
        self.method = methods.build(job.row.method, model, 0, lambda step: 1e-5, settings)

    def step(self, batch: dict[str, Any]) -> None:
        self.method.step(batch)

    def close(self) -> None:
        self.method.close()


class BAdam:
    """The package's BlockOptimizer over torch's fused AdamW, another block in each step, from the bottom up."""

    def __init__(self, job: Job) -> None:
        import torch

        self.model, names = job.model()
        config = _deepspeed_config(job, 3)
        if job.row.ranks > 1:
            from transformers.integrations import HfDeepSpeedConfig

            self.zero3 = HfDeepSpeedConfig(config)  # where the package looks, when it is imported
        from badam import BlockOptimizer

        self.model.requires_grad_(True)
        base = torch.optim.AdamW(self.model.parameters(), lr=1e-5, weight_decay=0.0, fused=True)
        self.optimizer = BlockOptimizer(
            base_optimizer=base, named_parameters_list=list(self.model.named_parameters()), block_prefix_list=names,
            switch_mode="ascending", switch_block_every=1, verbose=0,
        )  # fmt: skip
        self.engine = None
        if job.row.ranks > 1:
            import deepspeed

            self.engine, *_ = deepspeed.initialize(model=self.model, optimizer=self.optimizer, config=config)
            self.optimizer.ds_optimizer = self.engine.optimizer

    def step(self, batch: dict[str, Any]) -> None:
        if self.engine is not None:
            self.engine.backward(self.engine(**batch).loss)
            self.engine.step()
            return
        self.model(**batch).loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def close(self) -> None:
        """Nothing to give back."""


class LOMO:
    """The package ``lomo-optim``: plain SGD on 16-bit weights, in backward."""

    def __init__(self, job: Job) -> None:
        from lomo_optim import Lomo

        self.model, _ = job.model()
        self.optimizer = Lomo(self.model, lr=1e-5)

    def step(self, batch: dict[str, Any]) -> None:
        self.optimizer.fused_backward(self.model(**batch).loss, 1e-5)

    def close(self) -> None:
        """Nothing to give back."""


MAKERS = {
    "bare": Bare, "hift": hift, "deepspeed": deepspeed, "badam": BAdam, "lomo": LOMO, "lisa": OfStudy,
    "lora": partial(OfStudy, rank=16), "galore": partial(OfStudy, rank=128),
}  # fmt: skip
# Imported before the first fork, so that they are no memory of the row; BAdam's looks for ZeRO-3 when it is imported.
MODULES = ("peft", "galore_torch", "lomo_optim")
PACKAGES = {"badam": "badam", "lora": "peft", "galore": "galore-torch", "lomo": "lomo-optim"}


def compile_adam() -> None:
    """DeepSpeed's Adam for the host, which it compiles once, in minutes; kept in TORCH_EXTENSIONS_DIR. Where that fails
    its row says why."""
    print("DeepSpeed compiles its Adam, unless it has done so before", flush=True)
    code = "from deepspeed.ops.op_builder.cpu import CPUAdamBuilder; CPUAdamBuilder().load(verbose=False)"
    subprocess.run([sys.executable, "-c", code], capture_output=True, env={**os.environ, "DS_ACCELERATOR": "cpu"})


def start(job: Job) -> Worker:
    """The row's processes; with a limit on memory, so that what does not fit fails by itself."""
    limit = int((forked.available() - GIB // 2) / job.row.ranks)
    return Worker(lambda rank: MAKERS[job.row.method](job), job.row.ranks, limit)


# -- step times ----------------------------------------------------------------------------------------------------


def bytes_needed(job: Job, numel: int, block_numel: int) -> float:
    """About what a row of a shape will hold while it is timed."""
    weights = 4 if job.row.precision == FP32 else 2
    trained = numel
    if isinstance(job.row.group, int) or job.row.group == "ranks":
        size = job.row.group if isinstance(job.row.group, int) else 1
        trained = block_numel * size * (job.num_groups or 1)
    return job.row.ranks * (numel * weights + trained * 18 + 0.4 * GIB)


def companies(todo: Sequence[Row], room: float, needs: Any) -> list[list[Row]]:
    """Rows that take turns with each other: of the same layers and arithmetic, with their limit and full fine-tuning
    first, as many as memory holds; a row alone where it does not hold even that."""
    found: list[list[Row]] = []
    for key in dict.fromkeys((row.group if row.group in (1, 4, "ranks") else "all", row.precision) for row in todo):
        rows = [r for r in todo if (r.group if r.group in (1, 4, "ranks") else "all", r.precision) == key]
        first = [] if key[0] == "ranks" else list(dict.fromkeys([ROWS[limit_of(_of(key))], ROWS[FULL]]))
        first = first if sum(map(needs, first)) + min(map(needs, rows)) <= room else first[:1]
        company: list[Row] = []
        for row in rows:
            if company and sum(map(needs, [*company, row])) > room:
                found.append(company)
                company = []
            company = [*(company or first), row]
            if len(company) > 1 and sum(map(needs, company)) > room:  # nothing fits beside it
                found += [[one] for one in company if [one] not in found]
                company = []
        if company:
            found.append(company)
    return found


def _of(key: tuple[int | str, str]) -> Row:
    return Row("", "", key[0], key[1])


def measure_steps(args: argparse.Namespace, lines: Lines) -> None:
    """Take turns, company by company, and add a line for each row."""
    work = WORKLOADS[args.shape]
    config = forked.shape_config(args.shape)
    numel, block = _numels(args.shape)
    todo = [row for row in rows_of(args.shape, args.only) if not lines.has("steps", row)]

    def job(row: Row) -> Job:
        return Job(row, args.shape, work.groups.get(1 if row.group == "ranks" else row.group), args.path)

    def needs(row: Row) -> float:
        return bytes_needed(job(row), numel, block)

    for company in companies(todo, 0.9 * forked.available(), needs):
        started = time.perf_counter()
        turns, failed = _turns([job(row) for row in company], 1 if args.quick else work.turns, config.vocab_size)
        for row in company:
            if row.name in failed:
                lines.add("steps", row, left_out=failed[row.name])
            elif row.name in turns:
                lines.add("steps", row, **_against(turns, row, company))
        print(f"{', '.join(row.name for row in company)}: {time.perf_counter() - started:.0f} s", flush=True)


def _numels(shape: str) -> tuple[int, int]:
    model = forked.on_meta(shape)
    return sum(p.numel() for p in model.parameters()), sum(p.numel() for p in forked.blocks_of(model)[0].parameters())


def _turns(jobs: Sequence[Job], turns: int, vocab_size: int) -> tuple[dict[str, list[dict]], dict[str, str]]:
    """By name, each row's turns; or why it was left out. The first turn of a row is not counted."""
    workers: dict[str, Worker] = {}
    found: dict[str, list[dict[str, Any]]] = {}
    failed: dict[str, str] = {}
    work = WORKLOADS[jobs[0].shape]
    try:
        for number in range(-1, turns):
            for job in jobs if number % 2 else jobs[::-1]:  # not always the same one first
                name = job.row.name
                if name in failed:
                    continue
                try:
                    if number < 0:
                        workers[name] = start(job)
                    steps = job.num_groups or 2
                    batches = [forked.batch_of(vocab_size, work.rows, work.length, i) for i in range(steps)]
                    turn = workers[name].turn(batches)
                except Failed as error:
                    failed[name] = str(error)
                    continue
                found.setdefault(name, []).append(turn)
    finally:
        for worker in workers.values():
            worker.end()
    return {name: them for name, them in found.items() if name not in failed}, failed


def _against(turns: dict[str, list[dict]], row: Row, company: Sequence[Row]) -> dict[str, Any]:
    """A row's line. The first turn is warm-up, but it says what the first step took."""
    mine = turns[row.name][1:]
    line: dict[str, Any] = {
        "seconds": [_mean(turn, "seconds") for turn in mine], "first_step_s": turns[row.name][0]["seconds"][0],
        "cpu_s": statistics.median(_mean(turn, "cpu") for turn in mine), "company": len(company),
        "peak_bytes": max(turn["peak_bytes"] for turn in turns[row.name]),
    }  # fmt: skip
    for key, name in (("limit", limit_of(row) if row.group in (1, 4, "all") else ""), ("full", FULL)):
        if name in turns and name != row.name:
            base = turns[name][1:]
            pairs = list(zip(mine, base, strict=True))
            line[f"of_{key}"] = [_mean(a, "seconds") / _mean(b, "seconds") for a, b in pairs]
            line[f"cpu_of_{key}"] = statistics.median(_mean(a, "cpu") / _mean(b, "cpu") for a, b in pairs)
    return line


def _mean(turn: dict[str, Any], key: str) -> float:
    return statistics.fmean(turn[key])


# -- peaks ---------------------------------------------------------------------------------------------------------


def measure_memory(args: argparse.Namespace, lines: Lines) -> None:
    """One row at a time, the whole model."""
    work, config = WORKLOADS[args.shape], forked.shape_config(args.shape)
    rows = [*(row for row in LIMITS if not args.only or any(word in row.name for word in args.only)),
            *rows_of(args.shape, args.only)]  # fmt: skip
    for row in rows:
        if lines.has("memory", row):
            continue
        groups = len(_group_names(args.shape, row))
        few = [forked.batch_of(config.vocab_size, *FEW_TOKENS, i) for i in range(groups)] if groups > 1 else []
        whole = [forked.batch_of(config.vocab_size, work.rows, work.length, i) for i in range(2)]
        started = time.perf_counter()
        worker = None
        try:
            worker = start(Job(row, args.shape, None, args.path))
            peak = worker.turn([*few, *whole])["peak_bytes"]
            lines.add("memory", row, peak_bytes=peak, start_peak_bytes=worker.ready["peak_bytes"])
        except Failed as error:
            lines.add("memory", row, left_out=str(error))
        if worker is not None:
            worker.end()
        print(f"{row.name}: {time.perf_counter() - started:.0f} s", flush=True)


def _group_names(shape: str, row: Row) -> list[str]:
    from hift_ds.layers.grouping import partition_model

    size = {"ranks": 1, "lisa": 2}.get(str(row.group), row.group)
    if not isinstance(size, int):
        return ["all"]
    return [group.name for group in partition_model(forked.on_meta(shape), group_size=size).groups]


def measure_counted(args: argparse.Namespace, lines: Lines) -> None:
    """The peaks of ours on a GPU, counted on a fake device (docs/memory.md), in one process for all rows."""
    from benchmarks import counting

    work = WORKLOADS[args.shape]
    rows = [r for r in rows_of(args.shape, args.only) if r.method == "hift" and r.ranks == 1]
    rows = [row for row in rows if not lines.has("counted", row)]
    if not rows:
        return
    with tempfile.TemporaryDirectory() as folder:
        forked.shape_config(args.shape).save_pretrained(folder)
        settings = []
        for row in rows:
            block = dict(row.settings)
            if block["state"]["residency"] == "disk":
                block["state"] = {**block["state"], "path": folder}
            precision = counting.FP32 if row.precision == FP32 else counting.MIXED_HI
            settings.append(counting.setting(folder, precision, work.rows, work.length, block))
        for row, steps in zip(rows, counting.count(settings), strict=True):
            lines.add("counted", row, peak_bytes=max(steps.step(i).peak_bytes for i in steps.known()))


# -- lines ---------------------------------------------------------------------------------------------------------


class Lines:
    """What was measured: a JSON line for each row of a shape and a stage, in a file that is only appended to."""

    def __init__(self, path: Path, shape: str, quick: bool) -> None:
        self.path, self.shape, self.quick = path, shape, quick
        self.found: list[dict[str, Any]] = []
        for line in path.read_text().splitlines() if path.is_file() else []:
            try:
                self.found.append(json.loads(line))
            except json.JSONDecodeError:  # a kill cut it short
                continue

    def has(self, stage: str, row: Row) -> bool:
        return self.get(stage, row.name) is not None

    def get(self, stage: str, name: str) -> dict[str, Any] | None:
        """The last line of that row."""
        key = (stage, self.shape, self.quick, name)
        return next(
            (x for x in reversed(self.found) if (x["stage"], x["shape"], x["quick"], x["row"]) == key), None
        )  # fmt: skip

    def add(self, stage: str, row: Row, **values: Any) -> None:
        work = WORKLOADS[self.shape]
        line = {
            "stage": stage, "shape": self.shape, "quick": self.quick, "row": row.name, **values,
            "batch": f"{work.rows} x {work.length}", "where": where(row), "date": time.strftime("%Y-%m-%d"),
        }  # fmt: skip
        self.found.append(line)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with open(self.path, "a") as file:
            file.write(json.dumps(line) + "\n")


def where(row: Row) -> dict[str, Any]:
    """Machine and versions."""
    names = ["torch", "transformers", "deepspeed", *([PACKAGES[row.method]] if row.method in PACKAGES else [])]
    versions = {}
    for name in names:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = "not installed"
    threads = os.environ.get("OMP_NUM_THREADS", "1")
    return {"machine": platform.machine(), "cores": os.cpu_count(), "threads": threads, "load": os.getloadavg()[0],
            "versions": versions}  # fmt: skip


# -- the page ------------------------------------------------------------------------------------------------------


def page(lines_of: dict[str, Lines], authors: Sequence[dict[str, Any]]) -> str:
    """In Markdown, from the lines alone."""
    out = [
        "# Step time and memory, side by side", "",
        "Made by `benchmarks/side_by_side.py`, which says how, from `side_by_side.jsonl`. `of limit`: seconds against "
        "a bare loop with the same layers and arithmetic, everything resident, taking turns with it: the median over "
        "turns (least, most). `of full`: against full fine-tuning with torch's fused AdamW. Peak: resident memory of "
        "the process above what it held before the model was there, the whole model trained; on a CPU states on the "
        "device and in host memory are the same memory. Counted: bytes allocated on a GPU, not measured on one "
        "([how](../../docs/memory.md)).",
    ]  # fmt: skip
    for shape, lines in lines_of.items():
        if any(line["shape"] == shape and line["quick"] == lines.quick for line in lines.found):
            out += ["", *_shape_page(shape, lines, [x for x in authors if x["shape"] == shape])]
    return "\n".join(out) + "\n"


def _shape_page(shape: str, lines: Lines, authors: Sequence[dict[str, Any]]) -> list[str]:
    some = [x for x in lines.found if x["shape"] == shape and x["quick"] == lines.quick]
    timed = [x for x in some if x["stage"] == "steps"] or some
    place, loads = timed[0]["where"], [x["where"]["load"] for x in timed]
    versions = ", ".join(f"{name} {v}" for name, v in {
        k: v for x in some for k, v in x["where"]["versions"].items()}.items())  # fmt: skip
    numel = _numels(shape)[0] / 1e6
    out = [
        f"## {numel:,.0f}M parameters, {some[0]['batch']} tokens a step", "",
        f"LLaMA's layout (`{shape}`), random weights; {place['cores']} cores ({place['machine']}), {place['threads']} "
        f"thread, load {min(loads):.1f} to {max(loads):.1f}, {max(x['date'] for x in some)}; {versions}.", "",
        "| way of training | s a step | of limit | of full | CPU s of limit | peak GiB | counted GiB |",
        "|---|---|---|---|---|---|---|",
    ]  # fmt: skip
    for row in ROWS.values():
        found = {stage: lines.get(stage, row.name) for stage in STAGES[:3]}
        if any(found.values()):
            out.append(_line_of(row, found))
    for one in authors:
        cells = (f"{one.get('seconds', float('nan')):.3f}", "-", f"{one.get('of_full', float('nan')):.2f}", "-",
                 f"{one.get('peak_gib', float('nan')):.2f}", "-")  # fmt: skip
        out.append(f"| {one['row']} | {' | '.join(cells)} |")
    left_out = {line["row"]: line["left_out"] for line in some if "left_out" in line}
    out += ["", *(f"- {name}: left out: `{why}`" for name, why in left_out.items())]
    alone = [line["row"] for line in some if line["stage"] == "steps" and line.get("company") == 1]
    if alone:
        out.append(f"- One after the other, without turns, since they do not fit together: {', '.join(alone)}.")
    return [*out, "", *goals(shape, lines, authors)]


def _line_of(row: Row, found: dict[str, dict[str, Any] | None]) -> str:
    steps, memory, counted = (found[stage] or {} for stage in STAGES[:3])
    first = ""
    if row.method == "galore" and "first_step_s" in steps:
        first = f" (every 200th: {steps['first_step_s']:.1f})"
    limit = _spread(steps.get("of_limit"))
    cells = [
        f"{statistics.median(steps['seconds']):.3f}{first}" if "seconds" in steps else "-",
        "limit" if row.name == limit_of(row) else limit, _spread(steps.get("of_full")),
        f"{steps['cpu_of_limit']:.2f}" if "cpu_of_limit" in steps else "-",
        f"{memory['peak_bytes'] / GIB:.2f}" if "peak_bytes" in memory else "-",
        f"{counted['peak_bytes'] / GIB:.2f}" if "peak_bytes" in counted else "-",
    ]  # fmt: skip
    return f"| {row.name} | {' | '.join(cells)} |"


def _spread(ratios: Sequence[float] | None) -> str:
    if not ratios:
        return "-"
    return f"{statistics.median(ratios):.3f} ({min(ratios):.2f}, {max(ratios):.2f})"


def goals(shape: str, lines: Lines, authors: Sequence[dict[str, Any]]) -> list[str]:
    """Each goal, passed or failed, with what decides it."""
    out = [f"Goal 1, at most {GOAL:.2f} of the limit in every mode:"]
    for row in OURS:
        steps = lines.get("steps", row.name) or {}
        ratio = _to_limit(lines, row)
        if ratio is not None:
            how = "" if steps.get("of_limit") else ", one after the other"
            out.append(f"- {'pass' if ratio <= GOAL else 'FAIL'}: {row.name}: {ratio:.3f}{how}")
    out += ["", "Goal 2, faster than each peer that trains by groups, with the same layers and batch:"]
    for row in (r for r in PEERS if r.peer):
        theirs, mine = (lines.get("steps", name) or {} for name in (row.name, row.against))
        if "seconds" in theirs and "seconds" in mine:
            ratio = _same_scale(mine) / _same_scale(theirs)
            out.append(f"- {'pass' if ratio < 1 else 'FAIL'}: {ratio:.3f} of {row.name}")
        else:
            out.append(f"- not measured: {row.name}")
    out += _authors_goal(lines, authors)
    peaks = {
        row.name: line["peak_bytes"] / GIB
        for row in ROWS.values()
        if row.states and row.ranks == 1 and "peak_bytes" in (line := lines.get("memory", row.name) or {})
    }
    out += ["", "Goal 3, the lowest peak of all that train every weight with Adam and keep fp32 masters:"]
    mine, theirs = (
        {n: v for n, v in peaks.items() if (ROWS[n].method == "hift") is ours} for ours in (True, False)
    )  # fmt: skip
    if mine and theirs:
        ours, other = min(mine, key=mine.__getitem__), min(theirs, key=theirs.__getitem__)
        word = "pass" if mine[ours] < theirs[other] else "FAIL"
        out.append(f"- {word}: {ours}: {mine[ours]:.2f} GiB; of the others {other}: {theirs[other]:.2f} GiB")
    else:
        out.append("- not measured")
    return out


def _to_limit(lines: Lines, row: Row) -> float | None:
    steps = lines.get("steps", row.name) or {}
    if steps.get("of_limit"):
        return statistics.median(steps["of_limit"])
    limit = lines.get("steps", limit_of(row)) or {}
    if row.group in (1, 4, "all") and "seconds" in steps and "seconds" in limit:
        return statistics.median(steps["seconds"]) / statistics.median(limit["seconds"])
    return None


def _same_scale(line: dict[str, Any]) -> float:
    """As a share of what took turns with it, if anything did: two rows may have been measured at different times."""
    for key in ("of_limit", "of_full", "seconds"):
        if line.get(key):
            return statistics.median(line[key])
    raise ValueError(f"{line['row']}: no seconds")


def _authors_goal(lines: Lines, authors: Sequence[dict[str, Any]]) -> list[str]:
    """Against the authors' program, which has an environment of its own, so that they take no turns; its precision on a
    CPU is fp32."""
    out = []
    for one in (x for x in authors if x["group_size"] != "all"):
        name = f"ours, {layers(one['group_size'])}, {FP32}, device, after backward"
        mine = (lines.get("steps", name) or {}).get("seconds")
        if mine:
            ratio = statistics.median(mine) / one["seconds"]
            verdict = "pass" if ratio < 1 else "FAIL"
            out.append(f"- {verdict}: {ratio:.3f} of authors' HiFT, {layers(one['group_size'])}, fp32, at another hour")
    return out or ["- not measured: authors' HiFT (`--authors`)"]


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stages", nargs="*", metavar="STAGE", help=f"of {', '.join(STAGES)}; all by default")
    parser.add_argument("--path", help="folder on a disk, for states; a temporary one by default")
    parser.add_argument("--shape", choices=WORKLOADS, default="135m")
    parser.add_argument("--only", action="append", default=[], help="rows whose names contain this (several times)")
    parser.add_argument("--quick", action="store_true", help="one turn that counts")
    parser.add_argument(
        "--authors", type=Path, default=RESULTS / "authors.jsonl",
        help="JSON lines of the authors' program: row, shape, group_size, seconds, of_full, peak_gib",
    )  # fmt: skip
    parser.add_argument("--out", type=Path, default=RESULTS / "side_by_side.md", help="the page; lines lie beside it")
    args = parser.parse_args(argv)
    unknown = set(args.stages) - set(STAGES)
    if unknown:
        parser.error(f"no stage {', '.join(sorted(unknown))}; there are {', '.join(STAGES)}")
    return args


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    stages = args.stages or STAGES
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    forked.import_all()
    for module in MODULES:
        with contextlib.suppress(ImportError):
            importlib.import_module(module)
    file = args.out.with_suffix(".jsonl")
    with tempfile.TemporaryDirectory(prefix="side-by-side-", dir=args.path) as folder:
        args.path = folder
        lines = Lines(file, args.shape, args.quick)
        for (shape, name), why in NOT_TRIED.items():
            if shape == args.shape and ROWS[name] in rows_of(shape, args.only):
                for stage in (s for s in ("steps", "memory") if s in stages and not lines.has(s, ROWS[name])):
                    lines.add(stage, ROWS[name], left_out=why)
        runs = {"steps", "memory"} & set(stages)
        if runs and any(row.settings.get("offload") for row in rows_of(args.shape, args.only)):
            compile_adam()
        for stage, measure in (("counted", measure_counted), ("memory", measure_memory), ("steps", measure_steps)):
            if stage in stages:
                measure(args, lines)
    if "table" in stages:
        authors = args.authors.read_text().splitlines() if args.authors.is_file() else []
        shown = {shape: Lines(file, shape, args.quick) for shape in WORKLOADS}
        text = page(shown, [json.loads(line) for line in authors if line.strip()])
        args.out.write_text(text)
        print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
