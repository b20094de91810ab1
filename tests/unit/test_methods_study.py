"""The study of methods (benchmarks/methods): what is still to be run, the page from the lines, and each method on a
toy."""

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from torch import nn
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
    "batch_size": 2, "max_length": 16, "seeds": [0, 1], "tries": 3,
    "tasks": {"stdlib": {"budget_s": 10, "model": "m", "evaluations": 1, "held_out": 8, "methods": ["full", "late"]}},
    "methods": {"full": {"method": "full", "rate": 0.1}, "late": {"method": "full", "rate": 0.1}},
}  # fmt: skip
SECONDS = {"stdlib/full": 2.0}  # "late" has no step time yet: not run


def line(spec, final, **more):
    where = {"machine": "m", "torch": "2", "threads": 1, "date": "d"}
    curve = [{"step": 0, "cpu_s": 0, "loss": 3.0}, {"step": spec["steps"], "cpu_s": 9, "loss": final}]
    common = {"final": final, "curve": curve, "tokens": 5, "peak_gib": 0.5, "where": where, "diverged": False}
    return {**spec, **common, **more}


def run_all(study, loss_of):
    """Every run that the plan asks for, one after the other."""
    done = []
    while todo := study.missing(PLAN, SECONDS, done):
        done.append(line(todo[0], loss_of(todo[0])))
    return done


def test_rates_come_one_by_one_and_then_the_best_with_the_other_seeds(study):
    done = run_all(study, lambda spec: abs(spec["rate"] - 0.2) + spec["seed"])
    assert [(s["rate"], s["seed"], s["steps"]) for s in done] == [(0.1, 0, 5), (0.2, 0, 5), (0.4, 0, 5), (0.2, 1, 5)]


def test_rates_of_all_methods_come_before_the_seeds_of_any(study):
    done, seconds = [], {**SECONDS, "stdlib/late": 2.0}
    while todo := study.missing(PLAN, seconds, done):
        done.append(line(todo[0], abs(todo[0]["rate"] - 0.2)))
    assert [(s["name"], s["seed"]) for s in done] == [("full", 0)] * 3 + [("late", 0)] * 3 + [("full", 1), ("late", 1)]


def test_products_in_fp32_are_rounded_once(methods):
    run = __import__("run")
    torch.manual_seed(0)
    a, b, bias = (torch.randn(shape).bfloat16().requires_grad_() for shape in ((8, 32), (16, 32), (16,)))
    q, k, v = (torch.randn(2, 2, 8, 16).bfloat16().requires_grad_() for _ in range(3))
    with run.ProductsInFp32():
        made = nn.functional.linear(a, b, bias)
        mixed = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        (made.sum() + mixed.sum()).backward()
    wide_a, wide_b, wide_bias, *wide = (x.detach().float().requires_grad_() for x in (a, b, bias, q, k, v))
    expected = (
        nn.functional.linear(wide_a, wide_b, wide_bias),
        nn.functional.scaled_dot_product_attention(*wide, is_causal=True),
    )
    (expected[0].sum() + expected[1].sum()).backward()
    assert made.dtype == mixed.dtype == torch.bfloat16
    assert torch.equal(made, expected[0].bfloat16()) and torch.equal(mixed, expected[1].bfloat16())
    assert torch.equal(a.grad, wide_a.grad.bfloat16()) and torch.equal(b.grad, wide_b.grad.bfloat16())
    for narrow, exact in zip((q, k, v), wide, strict=True):  # from an output that is rounded
        torch.testing.assert_close(narrow.grad.float(), exact.grad, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize(
    ("tried", "then"),
    [
        ({}, 0.1),
        ({0.1: 2.0}, 0.2),
        ({0.2: 2.0}, 0.1),
        ({0.1: 2.0, 0.2: 1.0}, 0.4),
        ({0.1: 1.0, 0.2: 2.0}, 0.05),
        ({0.1: 1.0, 0.2: float("inf")}, 0.05),
        ({0.1: 2.0, 0.2: 1.0, 0.4: 1.5}, 0.283),
    ],
)
def test_the_next_rate_lies_on_the_better_side(study, tried, then):
    assert study.next_rate(0.1, tried) == pytest.approx(then)


def test_a_rate_that_diverged_is_never_the_best(study):
    spec = study.missing(PLAN, SECONDS, [])[0]
    assert study.rates_tried([line(spec, 0.5, diverged=True)], spec, 0) == {0.1: float("inf")}


def test_a_line_that_a_kill_cut_short_is_run_again(study, tmp_path):
    (tmp_path / "lines").write_text('{"task": "a"}\n{"task": "b", "na')
    assert study.read_lines(tmp_path / "lines") == [{"task": "a"}]


def test_the_page_quotes_the_best_rate_over_all_seeds_and_shows_every_rate(study):
    seconds = [{"task": "stdlib", "name": "full", "seconds": 2.0, "flops": 3e12, "trained": 5e6}]
    done = run_all(study, lambda spec: abs(spec["rate"] - 0.2) + spec["seed"])
    page = study.table(PLAN, done, seconds)
    row = "| full | 0.5000 | 0.0000 to 1.0000 (2) | - | 0.2 | 5 | 5 | 2.000 | 3.0000 | 5.00 | - | 0.50 | "
    assert row + "0.1: 0.1000, 0.2: 0.0000, 0.4: 0.2000 |" in page


def test_the_summary_has_a_row_a_method_with_its_steps_and_the_time_of_a_step(study, tmp_path):
    seconds = [{"task": "stdlib", "name": "full", "seconds": 2.0}]
    done = run_all(study, lambda spec: abs(spec["rate"] - 0.2) + spec["seed"])
    text = study.summary({**PLAN, "titles": {"full": "full", "late": "never run"}}, done, seconds)
    assert text.splitlines()[0] == "| | stdlib, 10 CPU-s | a step, of full fine-tuning's |"
    assert text.splitlines()[2:] == ["| full | 0.500 (5 steps) | 1.00 |"]
    page = tmp_path / "page.md"
    page.write_text(f"before\n{study.BEGIN}\nold\n{study.END}\nafter\n")
    study.put(page, text)
    assert page.read_text() == f"before\n{study.BEGIN}\n{text}\n{study.END}\nafter\n"


@pytest.mark.parametrize("page", ["README.md", "docs/results.md"])
def test_the_pages_say_what_the_lines_say(study, page):
    plan = yaml.safe_load((FOLDER / "plan.yaml").read_text())
    text = study.summary(plan, study.read_lines(), json.loads(study.SECONDS.read_text()))
    assert f"{study.BEGIN}\n{text}\n{study.END}" in (FOLDER.parents[1] / page).read_text()


def test_the_plan_names_only_methods_that_there_are(study, methods):
    plan = yaml.safe_load((FOLDER / "plan.yaml").read_text())
    assert {entry["method"] for entry in plan["methods"].values()} <= {*methods.METHODS, study.AUTHORS}
    for task in plan["tasks"].values():
        assert set(task["quoted"]) <= set(task["methods"]) <= set(plan["methods"])
    assert {entry.get("steps_as", name) for name, entry in plan["methods"].items()} <= set(plan["methods"])


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
    method = methods.build("full", ours, 0, lambda step: 0.01, {})
    optimizer = torch.optim.AdamW(plain.parameters(), lr=0.01, weight_decay=0.0, fused=True)
    for step in range(3):
        method.step(batch_of(step))
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
    method = methods.build(name, model, 0, lambda step: 0.02, settings)
    losses = [method.step(batch_of(0)) for _ in range(steps)]
    assert losses[-1] < losses[0]
    names = {
        n.replace(".base_layer", "").removeprefix("base_model.model."): p for n, p in method.model.named_parameters()
    }
    moved = {n for n, p in before.items() if n in names and not torch.equal(names[n], p)}
    assert (moved == set(before)) if all_move else (moved != set(before))
    if name == "lora":
        assert not moved  # only its adapters
    method.close()


def test_the_authors_run_in_their_own_environment_and_are_left_out_without_it(study):
    plan = {**PLAN, "methods": {**PLAN["methods"], "theirs": {"method": study.AUTHORS}}}
    plan["tasks"] = {"stdlib": {**PLAN["tasks"]["stdlib"], "methods": ["full", "theirs"], "quoted": ["theirs"]}}
    left = study.without_authors(plan)["tasks"]["stdlib"]
    assert (left["methods"], left["quoted"]) == (["full"], [])
    assert plan["tasks"]["stdlib"]["methods"] == ["full", "theirs"]
    args = SimpleNamespace(models="m", data=None, authors_python="/there/python")
    for what in ({"method": study.AUTHORS}, [{"method": study.AUTHORS}]):
        command = study._command(args, plan, "stdlib", what)
        assert command[:3] == ["/there/python", "-E", str(FOLDER / "authors.py")]
    assert study._command(args, plan, "stdlib", {"method": "full"})[:2] == [sys.executable, str(FOLDER / "run.py")]
