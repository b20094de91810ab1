"""Seconds of a step and peak memory of each way of training, beside a bare loop that does the same arithmetic.

    python benchmarks/side_by_side.py steps   --path /scratch --shape 135m     step times: on a quiet machine
    python benchmarks/side_by_side.py memory  --path /scratch --shape 135m     peaks of resident memory
    python benchmarks/side_by_side.py counted --shape 7b                       peaks on a GPU, counted (docs/memory.md)
    python benchmarks/side_by_side.py table        the page and the peaks in README and docs, from the lines alone

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
import importlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import counted_steps  # noqa: E402
from benchmarks import forked_steps as forked  # noqa: E402
from benchmarks.forked_steps import GIB, Engine, Failed, Worker  # noqa: E402
from benchmarks.side_by_side_page import BEGIN, END, page, peaks_at_7b  # noqa: E402
from benchmarks.side_by_side_rows import (  # noqa: E402
    BF16,
    FP32,
    FULL,
    LIMITS,
    MIXED,
    NOT_TRIED,
    RESULTS,
    ROOT,
    ROWS,
    STAGES,
    WORKLOADS,
    Lines,
    Row,
    limit_of,
    numels,
    rows_of,
)

FEW_TOKENS = (1, 8)  # of steps that only make states


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

        model = self.build(torch.float32 if self.row.precision == FP32 else torch.bfloat16)
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

    def build(self, dtype: Any) -> Any:
        """The model, with random weights of ``dtype``."""
        return forked.build(self.shape, dtype)


@dataclass(frozen=True)
class CountedJob(Job):
    """The same on a device without memory."""

    device: str = ""

    def build(self, dtype: Any) -> Any:
        """The model, with weights of ``dtype`` that have a size and no values."""
        model = counted_steps.on_fake_device(self.shape, dtype, self.device)
        if WORKLOADS[self.shape].recompute:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        return model


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
    offloads, counted, optimizer = job.row.settings.get("offload"), isinstance(job, CountedJob), None
    if offloads:
        config["zero_optimization"]["offload_optimizer"] = {"device": "cpu"}
    if offloads and not counted:
        config["optimizer"] = {"type": "AdamW", "params": {"lr": 1e-5, "weight_decay": 0.0}}
    else:
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, weight_decay=0.0, fused=True)
    if counted:
        from deepspeed.runtime.utils import CheckOverflow

        # Where nothing has a value, an overflow is seen, which skips the step; the host's own Adam reads values.
        CheckOverflow.check = CheckOverflow.check_using_norm = lambda *args, **kwargs: False
        config["bf16"]["check_grad_overflow"] = False
        config["zero_force_ds_cpu_optimizer"] = False
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
    numel, block = numels(args.shape)
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
    """The peaks on a GPU, counted on a fake device (docs/memory.md)."""
    rows = [row for row in (*LIMITS, *rows_of(args.shape)) if row.ranks == 1 and not lines.has("counted", row)]
    rows = [row for row in rows if not args.only or any(word in row.name for word in args.only)]
    _count_ours([row for row in rows if row.method == "hift"], args, lines)
    for row in rows:
        if row.method != "hift" and (row.precision == MIXED or row.group == "all"):
            _count_other(row, args, lines)


def _count_ours(rows: Sequence[Row], args: argparse.Namespace, lines: Lines) -> None:
    """All of them in one process, their lowest, middle and highest groups."""
    from benchmarks import counting

    if not rows:
        return
    work = WORKLOADS[args.shape]
    with tempfile.TemporaryDirectory() as folder:
        forked.shape_config(args.shape).save_pretrained(folder)
        settings = []
        for row in rows:
            block = dict(row.settings)
            if block["state"]["residency"] == "disk":
                block["state"] = {**block["state"], "path": folder}
            if work.recompute:
                block["activations"] = {"checkpointing": True, **block.get("activations", {})}
            precision = counting.FP32 if row.precision == FP32 else counting.MIXED_HI
            settings.append(counting.setting(folder, precision, work.rows, work.length, block))
        for row, steps in zip(rows, counting.count(settings), strict=True):
            lines.add("counted", row, peak_bytes=max(steps.step(i).peak_bytes for i in steps.known()))


def _count_other(row: Row, args: argparse.Namespace, lines: Lines) -> None:
    """A peer, or a bare loop: its own program, a step of every group."""
    work, started = WORKLOADS[args.shape], time.perf_counter()
    count = max(len(_group_names(args.shape, row)), 2) + 1

    def make(device: str) -> forked.Steps:
        return MAKERS[row.method](CountedJob(row, args.shape, None, args.path, device))

    worker = None
    try:
        worker = Worker(lambda rank: counted_steps.CountedSteps(make, work.rows, work.length, count))
        lines.add("counted", row, peak_bytes=worker.ask("peak_bytes"))
    except Failed as error:
        lines.add("counted", row, left_out=str(error))
    if worker is not None:
        worker.end()
    print(f"{row.name}: {time.perf_counter() - started:.0f} s", flush=True)


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
        if file == RESULTS / "side_by_side.jsonl":
            from benchmarks.methods.study import put

            for page_of in ("README.md", "docs/results.md"):
                put(ROOT / page_of, peaks_at_7b(shown), BEGIN, END)
    return 0


if __name__ == "__main__":
    sys.exit(main())
