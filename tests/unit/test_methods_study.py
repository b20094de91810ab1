"""The study of methods (benchmarks/methods): what is still to be run, the page from the lines, and each method on a
toy."""

import sys
from pathlib import Path

import pytest
import torch
import yaml
from transformers import LlamaConfig, LlamaForCausalLM

FOLDER = Path(__file__).resolve().parents[2] / "benchmarks" / "methods"


@pytest.fixture(scope="module")
def study():
    sys.path.insert(0, str(FOLDER))
    try:
        yield __import__("study")
    finally:
        sys.path.remove(str(FOLDER))


@pytest.fixture(scope="module")
def methods(study):
    return __import__("methods")


PLAN = {
    "batch_size": 2, "max_length": 16, "seeds": [0, 1],
    "tasks": {"stdlib": {"budget_s": 10, "model": "m", "evaluations": 1, "held_out": 8}},
    "methods": {"full": {"method": "full", "rates": [0.1, 0.2]}, "late": {"method": "full", "rates": [0.1]}},
}  # fmt: skip


def line(spec, final):
    where = {"machine": "m", "torch": "2", "threads": 1, "date": "d"}
    curve = [{"step": 0, "cpu_s": 0, "loss": 3.0}, {"step": spec["steps"], "cpu_s": 9, "loss": final}]
    return {**spec, "final": final, "curve": curve, "tokens": 5, "peak_gib": 0.5, "where": where}


def test_all_rates_come_first_and_then_the_best_with_the_other_seeds(study):
    seconds = {"stdlib/full": 2.0}  # "late" has no step time yet: not run
    first = study.missing(PLAN, seconds, [])
    assert [(s["rate"], s["seed"], s["steps"]) for s in first] == [(0.1, 0, 5), (0.2, 0, 5)]
    done = [line(first[0], 2.0), line(first[1], 1.5)]
    assert study.missing(PLAN, seconds, done[:1]) == [first[1]]
    (again,) = study.missing(PLAN, seconds, done)
    assert (again["rate"], again["seed"]) == (0.2, 1)
    assert study.missing(PLAN, seconds, [*done, line(again, 1.7)]) == []


def test_a_line_that_a_kill_cut_short_is_run_again(study, tmp_path):
    (tmp_path / "lines").write_text('{"task": "a"}\n{"task": "b", "na')
    assert study.read_lines(tmp_path / "lines") == [{"task": "a"}]


def test_the_page_quotes_the_best_rate_over_all_seeds_and_shows_every_rate(study):
    seconds = [{"task": "stdlib", "name": "full", "seconds": 2.0, "flops": 3e12}]
    first = study.missing(PLAN, {"stdlib/full": 2.0}, [])
    done = [line(first[0], 2.0), line(first[1], 1.5), line({**first[1], "seed": 1}, 1.7)]
    page = study.table(done, seconds)
    assert (
        "| full | 1.6000 | 1.5000 to 1.7000 (2) | 0.2 | 5 | 2.000 | 3.000 | 0.50 | 0.1: 2.0000, 0.2: 1.5000 |" in page
    )


def test_the_plan_gives_every_method_as_many_rates(study, methods):
    plan = yaml.safe_load((FOLDER / "plan.yaml").read_text())
    assert len({len(entry["rates"]) for entry in plan["methods"].values()}) == 1
    assert {entry["method"] for entry in plan["methods"].values()} == set(methods.METHODS)


def tiny(dtype=torch.bfloat16):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=2,
        use_cache=False,
    )
    return LlamaForCausalLM(config).to(dtype).train()


def batch_of(step):
    ids = torch.randint(0, 64, (2, 12), generator=torch.Generator().manual_seed(step))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}


def test_full_is_torch_adamw_where_weights_are_fp32(methods):
    ours, plain = tiny(torch.float32), tiny(torch.float32)
    method = methods.build("full", ours, 0, {})
    optimizer = torch.optim.AdamW(plain.parameters(), lr=0.01, weight_decay=0.0, fused=True)
    for step in range(3):
        method.step(batch_of(step), 0.01)
        plain(**batch_of(step)).loss.backward()
        torch.nn.utils.clip_grad_norm_(plain.parameters(), methods.CLIP)
        optimizer.step()
        optimizer.zero_grad()
    for a, b in zip(ours.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(
    ("name", "package", "settings", "steps", "all_move"),
    [
        ("hift", None, {"group_size": 2}, 3, True),
        ("lisa", None, {"num_blocks": 1, "every": 2}, 2, False),
        ("badam", "badam", {"switch_block_every": 1}, 2, False),
        ("lora", "peft", {"rank": 4}, 3, False),
        ("galore", "galore_torch", {"rank": 4}, 3, True),
    ],
)
def test_each_method_trains_what_it_says(methods, name, package, settings, steps, all_move):
    if package:
        pytest.importorskip(package, reason="benchmarks/methods/requirements.txt", exc_type=ImportError)
    model = tiny()
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    method = methods.build(name, model, 0, settings)
    losses = [method.step(batch_of(0), 0.02) for _ in range(steps)]
    assert losses[-1] < losses[0]
    names = {
        n.replace(".base_layer", "").removeprefix("base_model.model."): p for n, p in method.model.named_parameters()
    }
    moved = {n for n, p in before.items() if n in names and not torch.equal(names[n], p)}
    assert (moved == set(before)) if all_move else (moved != set(before))
    if name == "lora":
        assert not moved  # only its adapters
    method.close()
