"""``python -m benchmarks.needs``: write the table "what it needs" in README.md: GPU, host memory and disk, counted by
the
simulation behind ``hift-ds estimate`` with the settings of ds_configs/bf16_host_small.json."""

from __future__ import annotations

import argparse
from pathlib import Path

from hift_ds.cli.estimate_input import add_input_arguments, setting_from
from hift_ds.forecast.steps import GIB, Request, read_structure, run_requests

ROOT = Path(__file__).resolve().parents[1]
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


def main() -> None:
    lines = ["| | GPU, GiB | host memory, GiB | disk, GiB |", "|---|---|---|---|"]
    for name, size in MODELS.items():
        lines.append(row(name, size))
        print(lines[-1], flush=True)
    readme = ROOT / "README.md"
    before, _, rest = readme.read_text(encoding="utf-8").partition(BEGIN)
    _, _, after = rest.partition(END)
    readme.write_text("\n".join([f"{before}{BEGIN}", *lines, f"{END}{after}"]), encoding="utf-8")


if __name__ == "__main__":
    main()
