"""``python -m benchmarks.needs``: count what models of 1B to 13B need of a GPU, of host memory and of a disk, as
``hift-ds estimate --model SIZE --batch 1 --length 1024`` does, and write benchmarks/results/needs.md and the table
"what it needs" in README.md."""

from __future__ import annotations

import argparse
from pathlib import Path

from hift_ds.cli.estimate_input import add_input_arguments, setting_from
from hift_ds.forecast.steps import GIB, Request, read_structure, run_requests

ROOT = Path(__file__).resolve().parents[1]
README, RESULT = ROOT / "README.md", ROOT / "benchmarks" / "results" / "needs.md"
TITLE = """\
# What fine-tuning of all weights needs

Counted, not measured: `python -m benchmarks.needs`. bf16 with fp32 masters, AdamW, 1 x 1024 tokens, every exact switch
on; states in host memory; disk for two checkpoints, a third that is being written, and the exported model.
"""
BEGIN, END = "<!-- needs: python -m benchmarks.needs -->", "<!-- end of needs -->"
MODELS = {
    "Llama-3.2-1B": "llama3_2_1b",
    "LLaMA-2-7B": "llama2_7b",
    "Llama-3-8B": "llama3_8b",
    "LLaMA-2-13B": "llama2_13b",
}
BATCH, LENGTH = 1, 1024
KEPT = 2 + 1  # train.save_total_limit, and the one that is being written


def row(name: str, size: str) -> str:
    parser = argparse.ArgumentParser()
    add_input_arguments(parser)
    setting = setting_from(parser.parse_args(["--model", size, "--batch", str(BATCH), "--length", str(LENGTH)]))
    structure = read_structure(setting)
    (found,) = run_requests([Request(setting, structure)], 1)
    steps = [found.step(index) for index in range(structure.num_groups)]
    states = sum(step.state_bytes for step in steps)
    weights = max(steps, key=lambda step: step.peak_bytes).categories["weights"]
    host = states + max(step.offloaded_bytes for step in steps)
    peak = max(step.peak_bytes for step in steps)
    disk = KEPT * (weights + states) + weights
    return f"| {name} | {peak / GIB:.1f} | {host / GIB:.0f} | {disk / GIB:.0f} |"


def table_of(text: str) -> str:
    """The table between the markers of a page.

    Raises:
        ValueError: the page has none.
    """
    _, begin, rest = text.partition(BEGIN)
    table, end, _ = rest.partition(END)
    if not (begin and end):
        raise ValueError(f"no table between {BEGIN!r} and {END!r}")
    return table.strip()


def main() -> None:
    lines = ["| | GPU, GiB | host memory, GiB | disk, GiB |", "|---|---|---|---|"]
    for name, size in MODELS.items():
        lines.append(row(name, size))
        print(lines[-1], flush=True)
    table = "\n".join(lines)
    RESULT.write_text(f"{TITLE}\n{BEGIN}\n{table}\n{END}\n", encoding="utf-8")
    readme = README.read_text(encoding="utf-8")
    README.write_text(readme.replace(table_of(readme), table), encoding="utf-8")


if __name__ == "__main__":
    main()
