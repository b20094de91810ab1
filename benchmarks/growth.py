"""How a run grows: with parameters, layers a group, ranks and tokens.

    python benchmarks/growth.py --path /scratch              all parts that are not there yet, then the page
    python benchmarks/growth.py --path /scratch sizes ranks  some parts
    python benchmarks/growth.py table                        the page and the pictures, from the lines alone

Really run, on random weights: up to 1.1B parameters, up to 4 gloo ranks. Counted (``hift-ds estimate``, the engine on a
device without memory): up to 7B. Computed: bytes between up to 64 ranks, from those that a spy counted on 2 and 4
(benchmarks/traffic.py). The page tells the three apart. Every run trains the whole model: a cycle on a few tokens makes
all states, then steps of a second cycle are timed, on up to 8 groups from bottom to top.

Lines go to benchmarks/results/growth.jsonl; what is there is not run again.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks import forked_steps as forked  # noqa: E402
from benchmarks.forked_steps import GIB, Engine, Failed, Worker  # noqa: E402

RESULTS = ROOT / "benchmarks" / "results"
PARTS = ("sizes", "groups", "ranks", "lengths", "estimates", "table")
TIMED = 8  # groups of a cycle that step on a whole batch
RANKS = (8, 16, 32, 64)
LINKS = {"100 Gbit/s network": 12.5e9, "PCIe 4.0": 25e9, "NVLink": 200e9}  # bytes a second each way: assumed
FLOPS_S = 150e12  # of a card, sustained: assumed
TOKENS = 8 * 2048  # of a rank's step, in the arithmetic


@dataclass(frozen=True)
class Case:
    """A run.

    Attributes:
        shape: of ``forked_steps.SHAPES``.
        residency: of the states.
        saves: write a checkpoint too.
    """

    shape: str
    group_size: int | str = 1
    ranks: int = 1
    length: int = 128
    residency: str = "host"
    saves: bool = False


def cases(base: str, sizes: Sequence[str]) -> dict[str, list[Case]]:
    """By part. ``base``: the shape of all that is not about sizes."""
    return {
        "sizes": [Case(shape, residency=rests, saves=rests == "disk") for shape in sizes for rests in ("host", "disk")],
        "groups": [Case(base, size) for size in (1, 2, 4, 8, 16, "all")],
        "ranks": [Case(base, ranks=n) for n in (1, 2, 4)],
        "lengths": [Case(base, length=n) for n in (64, 128, 256, 512, 1024)],
    }  # fmt: skip


# -- runs ----------------------------------------------------------------------------------------------------------


class Run(Engine):
    """Ours, on a whole model."""

    def __init__(self, case: Case, path: str) -> None:
        import torch

        import hift_ds

        state = {"residency": case.residency, "slots": 2}
        if case.residency == "disk":
            state["path"] = path
        model = forked.build(case.shape, torch.bfloat16)
        self.numel = sum(p.numel() for p in model.parameters())
        self.path = path
        started = time.perf_counter()
        engine, *_ = hift_ds.initialize(
            model=model, model_parameters=list(model.parameters()),
            config={
                "train_micro_batch_size_per_gpu": 1, "bf16": {"enabled": True},
                "zero_optimization": {"stage": 2 if case.ranks > 1 else 0},
                "timers": {"throughput": {"enabled": False}},
                "optimizer": {"type": "AdamW", "params": {"lr": 1e-5, "weight_decay": 0.0, "fused": True}},
                "hift": {"group_size": case.group_size, "state": state},
            },
        )  # fmt: skip
        self.start_s = time.perf_counter() - started
        super().__init__(engine)

    def facts(self) -> dict[str, Any]:
        """What is known without a step."""
        return {"numel": self.numel, "groups": len(self.engine.groups), "start_s": self.start_s}

    def sent(self) -> float:
        """Bytes that this rank sends in a step, the mean of a cycle."""
        from benchmarks.traffic import Spy

        batch = forked.batch_of(self.engine.module.config.vocab_size, 1, 8)
        with Spy() as spy:
            for _ in self.engine.groups:
                self.step(batch)
        return spy.sent / len(self.engine.groups)

    def save(self) -> dict[str, float]:
        """Write a checkpoint: seconds and bytes."""
        with tempfile.TemporaryDirectory(dir=self.path) as folder:
            started = time.perf_counter()
            self.engine.save_checkpoint(folder, tag="measured")
            seconds = time.perf_counter() - started
            size = sum(file.stat().st_size for file in Path(folder).rglob("*") if file.is_file())
        return {"checkpoint_s": seconds, "checkpoint_bytes": size}


def run(case: Case, path: str) -> dict[str, Any]:
    """What a case measures.

    Raises:
        Failed: it could not be run, most often for lack of memory.
    """
    limit = int((forked.available() - GIB // 2) / case.ranks)
    worker = Worker(lambda rank: Run(case, path), case.ranks, limit)
    try:
        facts = worker.ask("facts")
        groups, vocab_size = facts["groups"], forked.shape_config(case.shape).vocab_size
        few = forked.batch_of(vocab_size, 1, 8)
        whole = forked.batch_of(vocab_size, 1, case.length)
        first = worker.turn([few] * groups if groups > 1 else [few] * 2)
        timed = [index % max(groups // TIMED, 1) == 0 for index in range(max(groups, 3))]
        second = worker.turn([whole if is_timed else few for is_timed in timed])
        found = {
            **facts, "first_step_s": first["seconds"][0], "peak_bytes": second["peak_bytes"],
            **{key: statistics.fmean(x for x, is_timed in zip(second[key], timed, strict=True) if is_timed)
               for key in ("seconds", "cpu")},
        }  # fmt: skip
        if case.ranks > 1:
            found["sent_bytes"] = worker.ask("sent")
        if case.saves:
            found |= worker.ask("save")
        return found
    finally:
        worker.end()


def estimate(shape: str) -> dict[str, Any]:
    """``hift-ds estimate`` on the shape: what it says, and how long it takes."""
    with tempfile.TemporaryDirectory() as folder:
        forked.shape_config(shape).save_pretrained(folder)
        command = [
            sys.executable, "-m", "hift_ds", "estimate", "--model", folder, "--batch", "1", "--length", "128", "--json",
            "--no-slices", "--no-checkpointing", "--no-chunked-loss", "--no-offload",
        ]  # fmt: skip
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        started = time.perf_counter()
        done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
        seconds = time.perf_counter() - started
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
    if done.returncode:
        raise Failed((done.stderr.strip().splitlines() or ["no message"])[-1])
    said = json.loads(done.stdout)
    keys = ("numel", "num_groups", "peak_gib", "host_gib", "checkpoint_gib", "flops_per_step")
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return {"estimate_s": seconds, "estimate_cpu_s": cpu, **{key: said[key] for key in keys}}


def read(path: Path) -> list[dict[str, Any]]:
    """The lines that are whole."""
    lines = []
    for line in path.read_text().splitlines() if path.is_file() else []:
        try:
            lines.append(json.loads(line))
        except json.JSONDecodeError:  # a kill cut it short
            continue
    return lines


def measure(parts: Iterable[str], args: argparse.Namespace, file: Path) -> None:
    """Run what is missing; a line each."""
    found = read(file)
    asked = cases(args.base, args.sizes)

    def missing(part: str, key: dict[str, Any]) -> bool:
        return not any(line["part"] == part and line["case"] == key for line in found)

    def add(part: str, key: dict[str, Any], make: Callable[[], dict[str, Any]]) -> None:
        started = time.perf_counter()
        try:
            values = make()
        except Failed as error:
            values = {"left_out": str(error)}
        where = {"machine": platform.machine(), "cores": os.cpu_count(), "load": os.getloadavg()[0],
                 "threads": os.environ["OMP_NUM_THREADS"], "date": time.strftime("%Y-%m-%d")}  # fmt: skip
        with open(file, "a") as lines:
            lines.write(json.dumps({"part": part, "case": key, **values, "where": where}) + "\n")
        print(f"{part} {key}: {time.perf_counter() - started:.0f} s", flush=True)

    for part in parts:
        if part == "estimates":
            for shape in [*args.sizes, *args.counted]:
                if missing(part, {"shape": shape}):
                    add(part, {"shape": shape}, lambda shape=shape: estimate(shape))
        else:
            for case in asked[part]:
                if missing(part, asdict(case)):
                    add(part, asdict(case), lambda case=case: run(case, args.path))


# -- the page ------------------------------------------------------------------------------------------------------


def of_part(lines: Sequence[dict[str, Any]], part: str) -> list[dict[str, Any]]:
    """The lines of a part that measured something."""
    return [line for line in lines if line["part"] == part and "left_out" not in line]


def counted_traffic(path: Path = RESULTS / "traffic.md") -> dict[str, float]:
    """By way of training, the bytes a parameter that many ranks tend to, from the first table of the page that
    benchmarks/traffic.py wrote."""
    found = {}
    for line in path.read_text().partition("\n## ")[0].splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if len(cells) == 5 and cells[0] and not cells[1].endswith("ranks") and "-" not in cells[1]:
            found[cells[0]] = float(cells[3])
    return found


def page(lines: Sequence[dict[str, Any]]) -> str:
    """In Markdown."""
    places = [line["where"] for line in lines]
    loads = [place["load"] for place in places]
    out = [
        "# How a run grows", "",
        "Made by `benchmarks/growth.py`, which says how, from `growth.jsonl`. LLaMA's layout, random weights, bf16 "
        f"with fp32 masters, one layer a group and one sequence of 128 tokens a rank where nothing else is said; "
        f"{places[0]['cores']} cores ({places[0]['machine']}), {places[0]['threads']} thread a rank, load "
        f"{min(loads):.1f} to {max(loads):.1f}, {max(place['date'] for place in places)}. **Measured**: really run "
        "here. **Counted**: by `hift-ds estimate`, without a run. **Computed**: arithmetic.",
    ]  # fmt: skip
    out += _sizes(lines) + _estimates(lines)
    out += _table(
        "Layers a group", "growth_groups.png", of_part(lines, "groups"),
        {"layers a group": lambda x: x["case"]["group_size"], "groups": lambda x: x["groups"], **_STEP, **_PEAK},
    )  # fmt: skip
    out += _table("Tokens a step", "growth_lengths.png", of_part(lines, "lengths"),
                  {"tokens": lambda x: x["case"]["length"], **_STEP, **_PEAK})  # fmt: skip
    out += _ranks(lines)
    left_out = [line for line in lines if "left_out" in line]
    out += ["", *(f"- {line['part']} {line['case']}: left out: `{line['left_out']}`" for line in left_out)]
    return "\n".join(out) + "\n"


Cell = Callable[[dict[str, Any]], Any]
_STEP: dict[str, Cell] = {"s a step": lambda x: f"{x['seconds']:.3f}", "CPU s a step": lambda x: f"{x['cpu']:.3f}"}
_PEAK: dict[str, Cell] = {"peak GiB": lambda x: f"{x['peak_bytes'] / GIB:.2f}"}


def _table(title: str, picture: str, rows: Sequence[dict[str, Any]], cells: dict[str, Cell]) -> list[str]:
    if not rows:
        return []
    out = ["", f"## {title}", "", f"![{title}]({picture})", "", "Measured.", "", f"| {' | '.join(cells)} |",
           "|---" * len(cells) + "|"]  # fmt: skip
    return [*out, *("| " + " | ".join(str(cell(row)) for cell in cells.values()) + " |" for row in rows)]


def _sizes(lines: Sequence[dict[str, Any]]) -> list[str]:
    def checkpoint(row: dict[str, Any]) -> str:
        if "checkpoint_bytes" not in row:
            return "-"
        return f"{row['checkpoint_bytes'] / GIB:.2f} ({row['checkpoint_bytes'] / row['numel']:.2f} bytes a parameter)"

    return _table("Parameters", "growth_parameters.png", of_part(lines, "sizes"), {
        "parameters": lambda x: f"{x['numel'] / 1e6:,.0f}M", "states": lambda x: x["case"]["residency"], **_STEP,
        "start-up s": lambda x: f"{x['start_s']:.2f}", "first step s": lambda x: f"{x['first_step_s']:.2f}", **_PEAK,
        "checkpoint GiB": checkpoint,
        "saved in s": lambda x: f"{x['checkpoint_s']:.1f}" if "checkpoint_s" in x else "-",
    })  # fmt: skip


def _estimates(lines: Sequence[dict[str, Any]]) -> list[str]:
    rows = of_part(lines, "estimates")
    if not rows:
        return []
    out = ["", "Counted, and how long counting took (measured):", "",
           "| parameters | groups | GPU peak GiB | host GiB | checkpoint GiB | TFLOP a step | `hift-ds estimate`, s "
           "(CPU s) |", "|---|---|---|---|---|---|---|"]  # fmt: skip
    for row in rows:
        out.append(
            f"| {row['numel'] / 1e6:,.0f}M | {row['num_groups']} | {row['peak_gib']:.2f} | {row['host_gib']:.2f} | "
            f"{row['checkpoint_gib']:.2f} | {row['flops_per_step'] / 1e12:.2f} | {row['estimate_s']:.0f} "
            f"({row['estimate_cpu_s']:.0f}) |"
        )
    return out


def per_trained(rows: Sequence[dict[str, Any]]) -> float:
    """Bytes that a rank of very many sends for each parameter that a step trains, from the run on most ranks."""
    last = max(rows, key=lambda row: row["case"]["ranks"])
    ranks = last["case"]["ranks"]
    return last["sent_bytes"] * ranks / (ranks - 1) / (last["numel"] / last["groups"])


def _ranks(lines: Sequence[dict[str, Any]]) -> list[str]:
    rows = of_part(lines, "ranks")
    sent = [row for row in rows if "sent_bytes" in row]
    out = _table("Ranks", "growth_ranks.png", rows, {
        "ranks": lambda x: x["case"]["ranks"], **_STEP, "peak GiB of a rank": _PEAK["peak GiB"],
        "MB sent by each rank": lambda x: f"{x.get('sent_bytes', 0) / 1e6:.2f}",
    })  # fmt: skip
    if not sent:
        return out
    each = per_trained(sent)
    out += ["", f"All ranks share the {rows[0]['where']['cores']} cores, so that more ranks than cores take turns: the "
            f"seconds are no measure of how a cluster scales. Bytes are: {each:.2f} (N-1)/N bytes for each parameter "
            "that a step trains.", ""]  # fmt: skip
    out += ["Computed from that, GB sent by each rank in a step:", "",
            f"| | {' | '.join(map(str, RANKS))} ranks |", "|---" * (len(RANKS) + 1) + "|"]  # fmt: skip
    large = max(of_part(lines, "estimates"), key=lambda row: row["numel"], default=None)
    models = [(f"{sent[0]['numel'] / 1e6:,.0f}M", sent[0]["numel"], sent[0]["groups"])]
    if large:
        models.append((f"{large['numel'] / 1e9:.2f}B", large["numel"], large["num_groups"]))
    for name, numel, groups in models:
        for what, trained in (("one layer a group", numel / groups), ("every weight", numel)):
            cells = (f"{each * trained * (n - 1) / n / 1e9:.3f}" for n in RANKS)
            out.append(f"| ours, {name}, {what} | {' | '.join(cells)} |")
        for other in ("torch DDP", "DeepSpeed ZeRO-2", "DeepSpeed ZeRO-3"):
            cells = (f"{counted_traffic()[other] * numel * (n - 1) / n / 1e9:.3f}" for n in RANKS)
            out.append(f"| {other}, {name} (of [traffic.md](traffic.md), two micro-batches) | {' | '.join(cells)} |")
    return [*out, *_link_arithmetic(large, each)] if large else out


def _link_arithmetic(large: dict[str, Any], each: float) -> list[str]:
    """Whether the bytes of the largest model hide behind its arithmetic."""
    tokens = 128  # of the estimate
    computing = large["flops_per_step"] * TOKENS / tokens / FLOPS_S
    name = f"{large['numel'] / 1e9:.2f}B"
    out = ["", f"Computed, {name}: seconds on the link at 64 ranks, against {computing:.2f} s of matrix products in a "
           f"step of {TOKENS:,} tokens a rank (assumed: {FLOPS_S / 1e12:.0f} TFLOP/s; scores of longer sequences left "
           "out).", "", f"| | {' | '.join(LINKS)} (assumed) |", "|---" * (len(LINKS) + 1) + "|"]  # fmt: skip
    ways = {
        "ours, one layer a group": each * large["numel"] / large["num_groups"],
        "ours, every weight": each * large["numel"],
        **{way: counted_traffic()[way] * large["numel"] for way in ("torch DDP", "DeepSpeed ZeRO-3")},
    }
    for way, sent in ways.items():
        out.append(f"| {way} | {' | '.join(f'{sent * 63 / 64 / speed:.3f}' for speed in LINKS.values())} |")
    return out


def draw(lines: Sequence[dict[str, Any]], folder: Path) -> list[Path]:
    """The pictures: filled marks and lines are measured, hollow and broken ones counted or computed."""
    import matplotlib

    matplotlib.use("Agg")
    made = []
    for name, plot in (("parameters", _draw_sizes), ("groups", _draw_groups), ("lengths", _draw_lengths),
                       ("ranks", _draw_ranks)):  # fmt: skip
        figure = plot(lines)
        if figure is not None:
            made.append(folder / f"growth_{name}.png")
            figure.savefig(made[-1], dpi=110)
            matplotlib.pyplot.close(figure)
    return made


COUNTED = {"linestyle": "--", "marker": "o", "markerfacecolor": "white", "color": "tab:gray"}


def _figure(num: int, title: str) -> tuple[Any, Any]:
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, num, figsize=(4 * num, 3.6), layout="constrained", squeeze=False)
    figure.suptitle(title)
    return figure, axes[0]


def _draw_sizes(lines: Sequence[dict[str, Any]]) -> Any:
    rows, counted = of_part(lines, "sizes"), of_part(lines, "estimates")
    if not rows:
        return None
    from matplotlib.ticker import LogLocator

    figure, axes = _figure(5, "Parameters")
    for residency, color in (("host", "tab:blue"), ("disk", "tab:orange")):
        mine = [row for row in rows if row["case"]["residency"] == residency]
        x = [row["numel"] / 1e6 for row in mine]
        label = f"measured, states {'in host memory' if residency == 'host' else 'on disk'}"
        axes[0].plot(x, [row["seconds"] for row in mine], "o-", color=color, label=label)
        axes[1].plot(x, [row["start_s"] for row in mine], "o-", color=color)
        axes[2].plot(x, [row["peak_bytes"] / GIB for row in mine], "o-", color=color)
        saved = [row for row in mine if "checkpoint_bytes" in row]
        axes[3].plot([row["numel"] / 1e6 for row in saved], [row["checkpoint_bytes"] / GIB for row in saved], "o-",
                     color=color)  # fmt: skip
    x = [row["numel"] / 1e6 for row in counted]
    axes[2].plot(x, [row["host_gib"] + row["peak_gib"] for row in counted], **COUNTED)
    axes[3].plot(x, [row["checkpoint_gib"] for row in counted], **COUNTED)
    axes[4].plot(x, [row["estimate_s"] for row in counted], "o-", color="tab:green", label="measured")
    axes[0].plot([], [], **COUNTED, label="counted (host: and the device's peak)")
    titles = ("step, s", "start-up, s", "memory, GiB", "checkpoint, GiB", "hift-ds estimate, s")
    for one, title in zip(axes, titles, strict=True):
        one.set(xscale="log", yscale="log", xlabel="parameters", title=title)
        one.set_xticks([100, 300, 1000, 3000, 10000], ["100M", "300M", "1B", "3B", "10B"])
        one.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        one.yaxis.set_major_formatter("{x:g}")
        one.minorticks_off()
        one.grid(alpha=0.3)
    axes[4].set(yscale="linear", ylim=(0, None))
    figure.legend(loc="outside lower center", ncols=4, fontsize=9)
    return figure


def _draw_groups(lines: Sequence[dict[str, Any]]) -> Any:
    rows = of_part(lines, "groups")
    if not rows:
        return None
    names = [str(row["case"]["group_size"]) for row in rows]
    figure, axes = _figure(2, f"Layers a group, {rows[0]['numel'] / 1e6:,.0f}M parameters, measured")
    axes[0].bar(names, [row["seconds"] for row in rows])
    axes[1].bar(names, [row["peak_bytes"] / GIB for row in rows])
    for one, title in zip(axes, ("step, s", "memory, GiB (states in host memory)"), strict=True):
        one.set(xlabel="layers a group", title=title)
    return figure


def _draw_lengths(lines: Sequence[dict[str, Any]]) -> Any:
    rows = of_part(lines, "lengths")
    if not rows:
        return None
    x = [row["case"]["length"] for row in rows]
    figure, axes = _figure(2, f"Tokens a step, {rows[0]['numel'] / 1e6:,.0f}M parameters, measured")
    axes[0].plot(x, [row["seconds"] for row in rows], "o-")
    axes[1].plot(x, [row["peak_bytes"] / GIB for row in rows], "o-")
    for one, title in zip(axes, ("step, s", "memory, GiB"), strict=True):
        one.set(xlabel="tokens", title=title, xlim=(0, None), ylim=(0, None))
        one.grid(alpha=0.3)
    return figure


def _draw_ranks(lines: Sequence[dict[str, Any]]) -> Any:
    rows = of_part(lines, "ranks")
    sent = [row for row in rows if "sent_bytes" in row]
    if not sent:
        return None
    figure, axes = _figure(3, f"Ranks, {rows[0]['numel'] / 1e6:,.0f}M parameters")
    x = [row["case"]["ranks"] for row in rows]
    axes[0].bar([str(n) for n in x], [row["seconds"] for row in rows])
    axes[0].set(title=f"step, s (all on {rows[0]['where']['cores']} cores)", xlabel="ranks")
    axes[1].bar([str(n) for n in x], [row["peak_bytes"] / GIB for row in rows])
    axes[1].set(title="memory of a rank, GiB", xlabel="ranks")
    counted = [0.0, *(row["sent_bytes"] / 1e6 for row in sent)]
    axes[2].plot([1, *(row["case"]["ranks"] for row in sent)], counted, "o-", label="counted by a spy")
    trained = sent[0]["numel"] / sent[0]["groups"]
    axes[2].plot(RANKS, [per_trained(sent) * trained * (n - 1) / n / 1e6 for n in RANKS], **COUNTED, label="computed")
    axes[2].set(title="sent by each rank in a step, MB", xlabel="ranks", xscale="log", ylim=(0, None))
    axes[2].set_xticks([1, 2, 4, *RANKS], [str(n) for n in (1, 2, 4, *RANKS)])
    axes[2].minorticks_off()
    axes[2].legend(loc="lower right")
    return figure


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"of {', '.join(PARTS)}; all by default")
    parser.add_argument("--path", help="folder on a disk, for states and a checkpoint; a temporary one by default")
    parser.add_argument("--base", choices=forked.SHAPES, default="135m", help="shape of what is not about sizes")
    parser.add_argument("--sizes", nargs="+", choices=forked.SHAPES, default=["135m", "360m", "1b"], help="run")
    parser.add_argument("--counted", nargs="*", choices=forked.SHAPES, default=["3b", "7b"], help="counted only")
    parser.add_argument("--out", type=Path, default=RESULTS / "growth.md", help="the page; the rest lies beside it")
    args = parser.parse_args(argv)
    unknown = set(args.parts) - set(PARTS)
    if unknown:
        parser.error(f"no part {', '.join(sorted(unknown))}; there are {', '.join(PARTS)}")
    parts = args.parts or PARTS
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    forked.import_all()
    file = args.out.with_suffix(".jsonl")
    args.out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="growth-", dir=args.path) as folder:
        args.path = folder
        measure([part for part in parts if part != "table"], args, file)
    if "table" in parts:
        lines = read(file)
        draw(lines, args.out.parent)
        text = page(lines)
        args.out.write_text(text)
        print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
