"""``python -m benchmarks.group_size``: how the number of turns that each layer group gets decides what a short run
learns.

A small LLaMA is trained on the answers of the standard library's docstrings until it can spell, and then fine-tuned,
from the same weights, data and learning rate, on questions about hift_ds: with every number of groups, and in full. The
held-out loss after runs of several lengths goes into benchmarks/results/group_size.json, and from there into
docs/group_size.png. Real models differ in the figures; what is compared is the same model with itself. A minute or two
on two cores.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch

import hift_ds
import model_zoo
from examples.demo.stdlib_qa import iter_entries, make_pairs
from hift_ds.shipped import find

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "group_size.json"
PICTURE = ROOT / "docs" / "group_size.png"
BLOCKS, ROWS, TOKENS = 14, 8, 64  # 16 units: embedding, blocks, norm with head
STEPS = (32, 64, 128)
SIZES = (1, 2, 4, 8, 16)
LEARNING_RATE = 1e-3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--plot-only", action="store_true", help="draw the picture from the results that are there")
    args = parser.parse_args()
    if not args.plot_only:
        RESULTS.write_text(json.dumps(measure(), indent=1) + "\n", encoding="utf-8")
    draw(json.loads(RESULTS.read_text(encoding="utf-8")))


def measure() -> dict:
    first = [answer for _, _, answer in make_pairs(iter_entries())]
    lines = find("bundled:hift_questions", "data").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line)["messages"] for line in lines]
    texts = [f"{question['content']} {answer['content']}" for question, answer in rows]
    held_out, train = texts[::8], [text for i, text in enumerate(texts) if i % 8]
    start = pretrained(blocks_of(first))
    print("pretrained", flush=True)
    batches, evaluation = blocks_of(train), blocks_of(held_out)
    results = {"before": loss_on(model_of(start), evaluation), "runs": []}
    for steps in STEPS:
        for size in SIZES:
            loss, groups = fine_tuned(start, batches, evaluation, steps, size)
            results["runs"].append({"steps": steps, "group_size": size, "groups": groups, "loss": loss})
            print(results["runs"][-1], flush=True)
    return results


def blocks_of(texts: list[str]) -> torch.Tensor:
    """Bytes of the texts, one after another, in rows of ``TOKENS``: int64[rows, TOKENS]."""
    data = torch.tensor(list("\n".join(texts).encode()), dtype=torch.int64)
    return data[: len(data) // TOKENS * TOKENS].reshape(-1, TOKENS)


def model_of(weights: dict[str, torch.Tensor] | None):
    model = model_zoo.tiny.build(
        "llama", vocab_size=256, hidden_size=64, intermediate_size=128, num_hidden_layers=BLOCKS,
        num_attention_heads=4, num_key_value_heads=4, max_position_embeddings=TOKENS,
    )  # fmt: skip
    if weights is not None:
        model.load_state_dict(weights)
    return model


def pretrained(rows: torch.Tensor, steps: int = 400) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    model = model_of(None)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE)
    for _ in range(steps):
        batch = rows[torch.randint(len(rows), (ROWS,))]
        model(input_ids=batch, labels=batch).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    return {name: value.clone() for name, value in model.state_dict().items()}


def fine_tuned(start, rows, evaluation, steps: int, size: int) -> tuple[float, int]:
    """Held-out loss, layer groups."""
    torch.manual_seed(1)
    model = model_of(start)
    config = {
        "train_micro_batch_size_per_gpu": ROWS,
        "gradient_clipping": 1.0,
        "optimizer": {"type": "AdamW", "params": {"lr": LEARNING_RATE / 2}},
        "hift": {"group_size": size},
    }
    engine, *_ = hift_ds.initialize(model=model, config=config)
    for _ in range(steps):
        batch = rows[torch.randint(len(rows), (ROWS,))]
        engine.backward(engine(input_ids=batch, labels=batch).loss)
        engine.step()
    groups = engine.schedule.num_groups
    engine.destroy()
    return loss_on(model, evaluation), groups


@torch.no_grad()
def loss_on(model, rows: torch.Tensor) -> float:
    model.eval()
    losses = [model(input_ids=part, labels=part).loss.item() for part in rows.split(32)]
    return sum(losses) / len(losses)


def draw(results: dict) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.6), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    for steps in STEPS:
        runs = [run for run in results["runs"] if run["steps"] == steps]
        full = next(run["loss"] for run in runs if run["groups"] == 1)
        points = [(steps / run["groups"], run["loss"] - full) for run in runs if run["groups"] > 1]
        axes.plot(*zip(*points, strict=True), "o-", label=f"{steps} steps")
        for run in runs:
            if run["groups"] > 1:
                axes.annotate(f"{run['groups']}", (steps / run["groups"], run["loss"] - full), fontsize=8,
                              xytext=(4, 4), textcoords="offset points")  # fmt: skip
    axes.axvline(16, color="#9aa5b1", linestyle=":", label="what hift-ds train aims at")
    axes.axhline(0, color="#9aa5b1", linewidth=0.8)
    axes.set(
        xscale="log",
        xlabel="turns of each group (numbers: layer groups)",
        ylabel="held-out loss above full fine-tuning's",
        title="What few turns cost: one small model, one learning rate",
    )
    axes.set_xticks([2, 4, 8, 16, 32, 64, 128], labels=["2", "4", "8", "16", "32", "64", "128"])
    axes.legend(frameon=False)
    figure.savefig(PICTURE, dpi=110)


if __name__ == "__main__":
    main()
