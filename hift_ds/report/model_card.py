"""``README.md`` of an exported model: what it is, how to load it, what it was trained on, how well it does."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from huggingface_hub import ModelCardData

from hift_ds.checkpoint.files import replace_text
from hift_ds.report.run_summary import RunSummary, read_run

FILE_NAME = "README.md"
MARK = "<!-- written by hift_ds -->"  # a card without it is somebody's own, and stays

_LOAD = """```python
from transformers import {auto}, AutoTokenizer

model = {auto}.from_pretrained("FOLDER_OR_REPO", dtype="auto")
tokenizer = AutoTokenizer.from_pretrained("FOLDER_OR_REPO")
```"""
_CHAT = """```python
messages = [{"role": "user", "content": "..."}]
ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
print(tokenizer.decode(model.generate(**ids, max_new_tokens=256)[0], skip_special_tokens=True))
```"""


_PIPELINES = {  # the Hub's names
    "AutoModelForCausalLM": "text-generation",
    "AutoModelForSeq2SeqLM": "text2text-generation",
    "AutoModelForSequenceClassification": "text-classification",
    "AutoModelForTokenClassification": "token-classification",
    "AutoModelForQuestionAnswering": "question-answering",
}


def write_model_card(run_dir: str | Path, out_dir: str | Path, auto: str = "AutoModelForCausalLM") -> Path | None:
    """Write the card of a run into the folder of its exported model; None where a card of somebody's own stays.

    Args:
        auto: the class of transformers that loads the model.
    """
    path = Path(out_dir) / FILE_NAME
    if path.exists() and MARK not in path.read_text(encoding="utf-8"):
        return None
    has_template = any((path.parent / name).is_file() for name in ("chat_template.jinja", "chat_template.json"))
    is_talked_to = has_template and auto == "AutoModelForCausalLM"
    replace_text(path, model_card(read_run(run_dir), has_chat_template=is_talked_to, auto=auto))
    return path


def model_card(run: RunSummary, *, has_chat_template: bool = False, auto: str = "AutoModelForCausalLM") -> str:
    """The model card of a run, as Markdown; paths of this machine are not in it.

    Args:
        has_chat_template: the model is talked to through one.
        auto: the class of transformers that loads it.
    """
    about = ModelCardData(
        base_model=run.base_model_on_hub,
        datasets=run.data_on_hub or None,
        library_name="transformers",
        pipeline_tag=_PIPELINES[auto],
        tags=["hift_ds", "full-fine-tuning"],
    )
    method = "all weights, one group of layers in each optimizer step (HiFT, arXiv:2401.15207)"
    if run.hift is None:
        method = "all weights in every optimizer step"
    parts = [
        f"---\n{about.to_yaml()}\n---\n{MARK}",
        f"# {run.name}",
        f"{run.base_model}, fine-tuned with hift_ds: {method}.",
        "## How to load it",
        _LOAD.format(auto=auto),
        *([_CHAT] if has_chat_template else []),
        "## Results",
        _results(run),
        "## Training data",
        _data(run),
        "## Settings",
        _table(("", ""), settings_table(run)),
        "## Coverage",
        coverage_line(run),
        "## Versions",
        versions_line(run) or "not recorded",
    ]
    return "\n\n".join(parts) + "\n"


def settings_table(run: RunSummary) -> list[tuple[str, str]]:
    """What decides what a run learns, in words: (setting, value)."""
    train, ds = run.settings.get("train", {}), run.deepspeed
    optimizer = ds.get("optimizer", {})
    options = optimizer.get("params", {})
    precision = next((name for name in ("bf16", "fp16") if (ds.get(name) or {}).get("enabled")), "fp32")
    rows = [
        ("steps", f"{run.steps:,}" + (f", {run.results['cycles']} whole cycles" if "cycles" in run.results else "")),
        ("rows a step", str(ds.get("train_batch_size", "?"))),
        (
            "longest sample",
            f"{run.settings.get('data', {}).get('max_length') or 'as the model allows, 2048 at most'} tokens",
        ),
        ("optimizer", optimizer.get("type", "?")),
        ("learning rate", f"{options.get('lr', '?')}, {train.get('lr_scheduler', '?')}"),
        ("weight decay", str(options.get("weight_decay", 0.0))),
        ("gradient clipping", _clipping(run)),
        ("precision", precision),
        ("ZeRO stage", str(ds.get("zero_optimization", {}).get("stage", 0))),
        ("seed", str(train.get("seed", "?"))),
    ]
    if run.hift is not None:
        groups = sum(group.index >= 0 for group in run.groups)
        master = "" if precision == "fp32" else f", fp32 masters: {'yes' if run.hift.get('master_weights') else 'no'}"
        rows.insert(
            1, ("layer groups", f"{groups}, group size {run.hift.get('group_size')}, {run.hift.get('order')}{master}")
        )
    return rows


def _clipping(run: RunSummary) -> str:
    """The largest norm, and of what, where that is a choice."""
    largest, block = run.deepspeed.get("gradient_clipping", "?"), run.hift or {}
    by = f' (`"clipping": "{block.get("clipping", "exact")}"`)'
    return f"{largest}{by if largest and block.get('update') == 'in_backward' else ''}"


def versions_line(run: RunSummary) -> str:
    """What the run was made with; empty if it has not ended."""
    return ", ".join(f"{name} {version}" for name, version in run.results.get("environment", {}).items() if version)


def coverage_line(run: RunSummary) -> str:
    """How often the weights were updated, in a sentence."""
    updates, steps = run.coverage.get("updates", {}), run.coverage.get("num_steps")
    if not updates:
        return "Every trainable weight was updated in every step." if run.hift is None else "Not recorded."
    never, counts = run.coverage["never_updated"], [count for count in updates.values() if count]
    often = (
        ""
        if not counts
        else f", {min(counts)} to {max(counts)} times each"
        if min(counts) < max(counts)
        else f", {counts[0]} times each"
    )
    line = f"{len(counts)} of {len(updates)} trainable tensors were updated in {steps} steps{often}."
    return line + (f" Never updated: {len(never)}, such as {never[0]}." if never else "")


def _results(run: RunSummary) -> str:
    results = run.results
    rows = []
    for key, value in sorted(results.items()):
        if (
            not key.startswith("eval_")
            or key.endswith(("_before", "runtime", "per_second"))
            or not isinstance(value, int | float)
        ):
            continue
        before = results.get(f"{key}_before")
        rows.append(
            (
                f"held-out {key.removeprefix('eval_').replace('_', ' ')}",
                "" if before is None else f"{before:,.4g}",
                f"{value:,.4g}",
            )
        )
    losses = [r["loss"] for r in run.metrics.steps if r.get("loss") is not None]
    if losses:
        rows.append(("training loss, first and last step", f"{losses[0]:,.4g}", f"{losses[-1]:,.4g}"))
    return _table(("", "before", "after"), rows) if rows else "Nothing was held out."


def _data(run: RunSummary) -> str:
    counts = run.results
    line = "; ".join(run.data) or "not recorded"
    if "train_samples" in counts:
        line += f": {counts['train_samples']:,} samples, {counts['train_tokens']:,} tokens"
        if "train_learned_tokens" in counts:
            line += f", {counts['train_learned_tokens'] / max(counts['train_tokens'], 1):.0%} of them learned"
    return line + "."


def _table(head: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> str:
    lines = [head, tuple("---" for _ in head), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)
