"""The study: which runs of the plan are missing, their step times, and the tables and pictures made from their lines.

    python benchmarks/methods/study.py seconds --models DIR [--data DIR]   # on a quiet machine
    python benchmarks/methods/study.py run     --models DIR [--data DIR] [--only TASK/METHOD] [--limit N] [--jobs J]
    python benchmarks/methods/study.py table   # results/methods.md, its pictures, the summary in README and docs

``--models`` is a folder with a Hugging Face folder for each model that the plan names (``smollm2``: what `make demo`
fetches).
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import yaml

HERE = Path(__file__).resolve().parent
LINES, SECONDS = HERE / "lines.jsonl", HERE / "seconds.json"
RESULTS = HERE.parent / "results"
BEGIN, END = "<!-- methods: python benchmarks/methods/study.py table -->", "<!-- end of methods -->"
TOGETHER = 4  # methods timed in one process, beside full fine-tuning
AUTHORS = "authors"  # the method that `authors.py` runs, by the interpreter of --authors-python
KEY = ("task", "name", "rate", "seed", "budget_s")


def without_authors(plan: dict[str, Any]) -> dict[str, Any]:
    """The plan without the methods that need the authors' environment."""
    theirs = {name for name, entry in plan["methods"].items() if entry["method"] == AUTHORS}
    tasks = {
        task: {k: [n for n in v if n not in theirs] if k in ("methods", "quoted") else v for k, v in entry.items()}
        for task, entry in plan["tasks"].items()
    }
    return {**plan, "tasks": tasks}


def read_lines(path: Path = LINES) -> list[dict[str, Any]]:
    """The runs that are done; a line that a kill cut short is none."""
    lines = path.read_text().splitlines() if path.is_file() else []
    done = []
    for line in lines:
        try:
            done.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return done


def key_of(spec: dict[str, Any]) -> tuple:
    """What makes two runs the same run."""
    return tuple(spec[k] for k in KEY)


def spec_of(plan: dict[str, Any], task: str, name: str) -> dict[str, Any]:
    """One method on one task; without rate, seed and number of steps."""
    entry = plan["methods"][name]
    return {
        "task": task, "name": name, "method": entry["method"], "settings": entry.get("settings", {}),
        "batch_size": plan["batch_size"], "max_length": plan["max_length"],
        **{key: plan["tasks"][task][key] for key in ("budget_s", "evaluations", "held_out")},
        **{key: entry[key] for key in ("decays",) if key in entry},
    }  # fmt: skip


def missing(plan: dict[str, Any], seconds: dict[str, float], done: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What can be run now: for each method its next rate with the first seed, then the best rates with the others."""
    have = {key_of(line) for line in done}
    wanted = []
    for task, entry in plan["tasks"].items():
        for name in entry["methods"]:
            measured = f"{task}/{plan['methods'][name].get('steps_as', name)}"
            if measured not in seconds:
                continue
            spec = {**spec_of(plan, task, name), "steps": max(int(entry["budget_s"] / seconds[measured]), 1)}
            tried = rates_tried(done, spec, plan["seeds"][0])
            if len(tried) < entry.get("tries", plan["tries"]):
                first = entry.get("rates", {}).get(name, plan["methods"][name]["rate"])
                rate = next_rate(float(first), tried)
                wanted.append({**spec, "rate": rate, "seed": plan["seeds"][0]})
            elif name in entry.get("quoted", entry["methods"]):
                best = min(tried, key=tried.__getitem__)
                wanted += [{**spec, "rate": best, "seed": seed} for seed in plan["seeds"][1:]]
    wanted.sort(key=lambda spec: plan["seeds"].index(spec["seed"]))
    return [spec for spec in wanted if key_of(spec) not in have]


def rates_tried(done: list[dict[str, Any]], spec: dict[str, Any], seed: int) -> dict[float, float]:
    """The final held-out loss of each rate that was tried; infinite where the run diverged."""
    keys = ("task", "name", "budget_s")
    return {
        line["rate"]: math.inf if line["diverged"] else line["final"]
        for line in done
        if line["seed"] == seed and all(line[key] == spec[key] for key in keys)
    }


def next_rate(first: float, tried: dict[float, float]) -> float:
    """The same search for every method: ``first`` and its double; then by factors of 2 on the side that is better,
    until the best has a worse rate on either side; then between the best two neighbours."""
    guesses = [rate for rate in (first, first * 2) if rate not in tried]
    if guesses and len(tried) < 2:
        return guesses[0]
    rates = sorted(tried)
    best = min(rates, key=tried.__getitem__)
    if best == rates[-1]:
        return best * 2
    if best == rates[0]:
        return best / 2
    at = rates.index(best)
    beside = min(rates[at - 1], rates[at + 1], key=tried.__getitem__)
    return float(f"{math.sqrt(best * beside):.3g}")


def run_missing(args: argparse.Namespace, plan: dict[str, Any]) -> None:
    """Run them, ``--jobs`` at a time, each line added as soon as it is there; a run that fails is said and passed
    over."""
    if not SECONDS.is_file():
        raise SystemExit(f"no {SECONDS.name}: run `study.py seconds` first, on a quiet machine")
    seconds = {f"{s['task']}/{s['name']}": s["seconds"] for s in json.loads(SECONDS.read_text())}
    failed: set[tuple] = set()
    left = args.limit
    while left > 0:
        todo = [s for s in missing(plan, seconds, read_lines()) if key_of(s) not in failed and _chosen(args, s)]
        if not todo:
            return
        wave = todo[: min(args.jobs, left)]  # of several methods: the next rate depends on the last one's loss
        left -= len(wave)
        with ThreadPoolExecutor(len(wave)) as pool:
            for spec, line in zip(wave, pool.map(lambda s: _start(s, args, plan), wave), strict=True):
                if line is None:
                    failed.add(key_of(spec))
                    continue
                with open(LINES, "a") as file:
                    file.write(line + "\n")


def _chosen(args: argparse.Namespace, spec: dict[str, Any]) -> bool:
    return args.only is None or args.only in f"{spec['task']}/{spec['name']}"


def _command(args: argparse.Namespace, plan: dict[str, Any], task: str, what: Any, *more: str) -> list[str]:
    folder = Path(args.models) / plan["tasks"][task]["model"]
    data = ["--data", args.data] if args.data else []
    method = (what[0] if isinstance(what, list) else what)["method"]
    # -E: a PYTHONPATH of ours names packages that are not for that environment.
    program = [args.authors_python, "-E", "authors.py"] if method == AUTHORS else [sys.executable, "run.py"]
    return [*program[:-1], str(HERE / program[-1]), json.dumps(what), "--model", str(folder), *data, *more]


def _start(spec: dict[str, Any], args: argparse.Namespace, plan: dict[str, Any]) -> str | None:
    env = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    job = subprocess.run(_command(args, plan, spec["task"], spec), capture_output=True, text=True, env=env)
    label = f"{spec['task']}/{spec['name']} rate {spec['rate']:g} seed {spec['seed']}"
    if job.returncode:
        print(f"{label}: failed: {(job.stderr.strip().splitlines() or ['no message'])[-1]}", flush=True)
        return None
    line = job.stdout.strip().splitlines()[-1]
    print(f"{label}: {json.loads(line)['final']:.4f} after {spec['steps']} steps", flush=True)
    return line


def measure_seconds(args: argparse.Namespace, plan: dict[str, Any]) -> None:
    """Time a step of every method of every task: a few methods a process, since their models must fit together, and
    full fine-tuning in each; a method's time is its ratio to full fine-tuning there, times the median of the latter."""
    found: list[dict[str, Any]] = []
    old = json.loads(SECONDS.read_text()) if SECONDS.is_file() else []
    for task in plan["tasks"]:
        names = [n for n in plan["tasks"][task]["methods"] if n != "full" and "steps_as" not in plan["methods"][n]]
        specs = [
            {**spec_of(plan, task, name), "seed": 0, "timed": plan["methods"][name].get("timed", {}).get(task, {})}
            for name in ["full", *names]
        ]
        full, others = specs[0], [spec for spec in specs[1:] if _chosen(args, spec)]
        here = [spec for spec in others if spec["method"] != AUTHORS]
        parts = [
            _timed(args, plan, task, [full, *here[start : start + TOGETHER]]) for start in range(0, len(here), TOGETHER)
        ]
        # In another environment, so in a process of its own, right after full fine-tuning in ours.
        parts += [
            [part for one in (full, spec) for part in _timed(args, plan, task, [one])]
            for spec in others
            if spec["method"] == AUTHORS
        ]
        if parts:
            # What was measured before stays comparable: its full fine-tuning is the measure of a later part.
            known = [row["seconds"] for row in old if args.only and (row["task"], row["name"]) == (task, "full")]
            median = statistics.median(known or [part[0]["seconds"] for part in parts])
            found.append({**parts[0][0], "seconds": median})
            for part in parts:
                found += [{**row, "seconds": row["seconds"] / part[0]["seconds"] * median} for row in part[1:]]
    new = {(s["task"], s["name"]) for s in found}
    kept = [s for s in old if (s["task"], s["name"]) not in new]
    SECONDS.write_text(json.dumps(kept + found, indent=1) + "\n")


def _timed(args: argparse.Namespace, plan: dict[str, Any], task: str, specs: list[dict[str, Any]]) -> list[dict]:
    command = _command(args, plan, task, specs, "--seconds", str(args.rounds))
    job = subprocess.run(command, stdout=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    if job.returncode:
        raise SystemExit(job.returncode)
    return json.loads(job.stdout.strip().splitlines()[-1])


def rows_of(done: list[dict[str, Any]], task: str) -> list[dict[str, Any]]:
    """One row a method on ``task``: its best rate's held-out loss (mean and range over seeds), steps and peak."""
    rows = []
    for name in dict.fromkeys(line["name"] for line in done if line["task"] == task):
        lines = [line for line in done if (line["task"], line["name"]) == (task, name)]
        tried = rates_tried(lines, lines[0], 0)
        if not tried:
            continue
        rate = min(tried, key=tried.__getitem__)
        same = [line for line in lines if line["rate"] == rate]
        finals = [line["final"] for line in same]
        ends = [line["curve"][-1] for line in same]
        rows.append({
            "name": name, "rate": rate, "steps": same[0]["steps"], "seeds": len(same), "tried": tried,
            "loss": statistics.fmean(finals), "low": min(finals), "high": max(finals),
            "start": same[0]["curve"][0]["loss"], "tokens": statistics.fmean(line["tokens"] for line in same),
            "accuracy": statistics.fmean(end["accuracy"] for end in ends) if "accuracy" in ends[0] else None,
            "peak_gib": max((line["peak_gib"] for line in lines if line["peak_gib"] is not None), default=math.nan),
        })  # fmt: skip
    return sorted(rows, key=lambda row: row["loss"])


STATES_MOVED = (
    "`states moved`: what travels in a step to the device and back where states rest in host memory (24 bytes a "
    "trained weight); here they were resident."
)
COLUMNS = (
    "method", "held-out loss", "range over seeds", "accuracy", "rate", "steps", "tokens", "s a step", "TFLOP a step",
    "weights trained a step, M", "states moved a step, GB", "peak, GiB", "all rates (seed 0)",
)  # fmt: skip


def where_run(lines: list[dict[str, Any]]) -> str:
    """On what, and when, these runs were made."""
    where, dates = lines[0]["where"], sorted({line["where"]["date"] for line in lines})
    text = (
        f"One thread, torch {where['torch']}, {where['machine']}, {' to '.join(dict.fromkeys((dates[0], dates[-1])))}."
    )
    through = sum(line["where"].get("products", "bf16") != "bf16" for line in lines)
    if through:
        text += (
            f" {through} of the {len(lines)} runs on a processor without bf16 instructions: products in fp32, rounded "
            "to bf16; no peaks."
        )
    return text


def table(plan: dict[str, Any], done: list[dict[str, Any]], seconds: list[dict[str, Any]]) -> str:
    """The page, in Markdown: for each task what was run for it, best first."""
    cost = {(s["task"], s["name"]): s for s in seconds}
    out = ["# Methods compared at equal CPU time", "",
           "Made by `python benchmarks/methods/study.py table` from `benchmarks/methods/lines.jsonl`; how: "
           "[benchmarks/methods](../methods/README.md). Lower held-out loss is better. A method with fewer rates than "
           "the others of its task was not tried to the end, and one with one seed was not run again."]  # fmt: skip
    for task in dict.fromkeys(line["task"] for line in done):
        rows = rows_of(done, task)
        some = next(line for line in done if line["task"] == task)
        where = where_run([line for line in done if line["task"] == task])
        out += ["", f"## {task}: {some['budget_s']} CPU-seconds, {some['batch_size']} rows a step, from a loss of "
                f"{rows[0]['start']:.4f}", "", f"{where} {STATES_MOVED}", "",
                f"| {' | '.join(COLUMNS)} |", "|---" * len(COLUMNS) + "|"]  # fmt: skip
        for row in rows:
            entry = plan["methods"][row["name"]]
            step = cost.get((task, entry.get("steps_as", row["name"])), {})
            tried = ", ".join(f"{rate:g}: {loss:.4f}" for rate, loss in sorted(row["tried"].items()))
            spread = f"{row['low']:.4f} to {row['high']:.4f} ({row['seeds']})" if row["seeds"] > 1 else "one seed"
            moved = f"{24 * step.get('trained', math.nan) / 1e9:.3f}" if entry["method"] == "hift" else "-"
            accuracy = "-" if row["accuracy"] is None else f"{row['accuracy']:.3f}"
            cells = (
                row["name"], f"{row['loss']:.4f}", spread, accuracy, f"{row['rate']:g}", row["steps"],
                f"{row['tokens']:.0f}", f"{step.get('seconds', math.nan):.3f}",
                f"{step.get('flops', math.nan) / 1e12:.4f}", f"{step.get('trained', math.nan) / 1e6:.2f}", moved,
                "-" if math.isnan(row["peak_gib"]) else f"{row['peak_gib']:.2f}", tried,
            )  # fmt: skip
            out.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(out) + "\n"


def summary(plan: dict[str, Any], done: list[dict[str, Any]], seconds: list[dict[str, Any]]) -> str:
    """What is quoted, in Markdown: a row a method, for each task its held-out loss and how many steps it made."""
    cost = {(s["task"], s["name"]): s["seconds"] for s in seconds}
    by_task = {task: {row["name"]: row for row in rows_of(done, task)} for task in plan["tasks"]}
    by_task = {task: rows for task, rows in by_task.items() if rows}
    heads = [f"{task}, {plan['tasks'][task]['budget_s']} CPU-s" for task in by_task]
    out = [f"| | {' | '.join(heads)} | a step, of full fine-tuning's |", "|---" * (len(heads) + 2) + "|"]
    for name, title in plan["titles"].items():
        cells, ratios = [], []
        for task, rows in by_task.items():
            row = rows.get(name)
            if row is None:
                cells.append("")
                continue
            seeds = "" if row["seeds"] > 1 else ", one seed"
            cells.append(f"{row['loss']:.3f} ({row['steps']} steps{seeds})")
            step = cost[task, plan["methods"][name].get("steps_as", name)]
            ratios.append(f"{step / cost[task, 'full']:.2f}")
        if any(cells):
            out.append(f"| {title} | {' | '.join(cells)} | {', '.join(ratios)} |")
    return "\n".join(out)


def put(page: Path, text: str, first: str = BEGIN, last: str = END) -> None:
    """Replace what stands between two markers in a page, by default those of the summary."""
    before, begin, rest = page.read_text(encoding="utf-8").partition(first)
    _, end, after = rest.partition(last)
    if not (begin and end):
        raise SystemExit(f"{page.name}: expected {first} and {last}")
    page.write_text(f"{before}{first}\n{text}\n{last}{after}", encoding="utf-8")


def draw(plan: dict[str, Any], done: list[dict[str, Any]], seconds: list[dict[str, Any]], folder: Path) -> list[Path]:
    """A picture a task: held-out loss of what is quoted against the CPU-seconds of its steps, each at its best rate."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    cost = {(s["task"], s["name"]): s["seconds"] for s in seconds}
    made = []
    for task in dict.fromkeys(line["task"] for line in done):
        figure, axes = pyplot.subplots(figsize=(8, 5), layout="constrained")
        axes.set_prop_cycle(color=[*pyplot.get_cmap("tab10").colors, "black", "gold", "navy"])
        quoted = plan["tasks"][task].get("quoted", plan["tasks"][task]["methods"])
        for row in [row for row in rows_of(done, task) if row["name"] in quoted]:
            key = (task, row["name"], row["rate"], 0)
            curve = next(x for x in done if (x["task"], x["name"], x["rate"], x["seed"]) == key)["curve"]
            step = cost[task, plan["methods"][row["name"]].get("steps_as", row["name"])]
            style = "-" if row["name"].startswith("hift") else "--"
            label = f"{row['name']} ({row['loss']:.3f})"
            x, y = [point["step"] * step for point in curve], [point["loss"] for point in curve]
            axes.plot(x, y, style, marker="o", ms=3, label=label)
        axes.set(
            xlabel="CPU-seconds of training",
            ylabel="held-out loss (seed 0)",
            title=f"{task}: each method at its best rate",
        )
        axes.legend(fontsize=8, ncols=2, title="mean of the last over seeds")
        made.append(folder / f"methods_{task}.png")
        figure.savefig(made[-1], dpi=110)
        pyplot.close(figure)
    return made


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=("seconds", "run", "table"))
    parser.add_argument("--plan", type=Path, default=HERE / "plan.yaml")
    parser.add_argument("--models", default="demo")
    parser.add_argument("--data")
    parser.add_argument("--only", metavar="TASK/METHOD", help="only runs whose task/method contains this")
    parser.add_argument("--limit", type=int, default=10**6, help="stop after so many runs")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time, one thread each")
    parser.add_argument("--rounds", type=int, default=3, help="of `seconds`: cycles timed a method")
    parser.add_argument("--authors-python", metavar="PYTHON", help="of an environment with authors_requirements.txt")
    args = parser.parse_args()
    plan = yaml.safe_load(args.plan.read_text())
    if args.what != "table" and not args.authors_python:
        print("the authors' package is left out: --authors-python names no interpreter that has it", flush=True)
        plan = without_authors(plan)
    if args.what == "seconds":
        measure_seconds(args, plan)
    elif args.what == "run":
        run_missing(args, plan)
    else:
        done, seconds = read_lines(), json.loads(SECONDS.read_text())
        (RESULTS / "methods.md").write_text(table(plan, done, seconds))
        for page in ("README.md", "docs/results.md"):
            put(HERE.parents[1] / page, summary(plan, done, seconds))
        draw(plan, done, seconds, RESULTS)
    return 0


if __name__ == "__main__":
    sys.exit(main())
