"""The tasks of the study: tokenized rows to train on, held-out rows, and what a model is judged by.

``gsm8k``   answers to grade-school mathematics; reads ``train.jsonl`` and ``test.jsonl`` of a folder of yours.
``stdlib``  questions about the standard library, made from the docstrings of the Python that runs this.
``module``  which module a docstring is from: sequence classification.
"""

from __future__ import annotations

import json
import random
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

IGNORED = -100
HELD_OUT = 256  # rows that every method is judged by
NUM_MODULES = 12  # classes of the task `module`


@dataclass(frozen=True)
class Row:
    """One sample.

    Attributes:
        ids: token ids.
        labels: one for each token, ``IGNORED`` where nothing is learned; or the class of the row, alone.
    """

    ids: list[int]
    labels: list[int]


@dataclass(frozen=True)
class Task:
    """Rows to train on and to be judged by.

    Attributes:
        kind: ``"lm"`` (mean loss of the learned tokens) or ``"classes"`` (that, and accuracy).
        num_labels: classes; 0 for a language model.
    """

    kind: str
    train: list[Row]
    held_out: list[Row]
    num_labels: int = 0


def load_task(name: str, tokenizer: Any, max_length: int, data: Path | None) -> Task:
    """Tokenize a task.

    Args:
        data: the folder of ``gsm8k``; not used by the others.

    Raises:
        SystemExit: ``gsm8k`` without its folder.
    """
    if name == "module":
        return _modules(tokenizer, max_length)
    pairs = _gsm8k(data) if name == "gsm8k" else _stdlib()
    train, held_out = ([_answer_row(tokenizer, q, a) for q, a in part] for part in pairs)
    short = [[row for row in rows if len(row.ids) <= max_length] for rows in (train, held_out)]
    return Task("lm", short[0], random.Random(0).sample(short[1], min(HELD_OUT, len(short[1]))))


def batches(rows: list[Row], batch_size: int, pad: int, seed: int) -> Iterator[dict[str, Tensor]]:
    """Batches without end, a new order in each epoch; ``input_ids``, ``attention_mask`` and ``labels``, int64, padded
    to the right."""
    rng = random.Random(seed)
    while True:
        order = rng.sample(range(len(rows)), len(rows))
        for start in range(0, len(order) - batch_size + 1, batch_size):
            yield collate([rows[i] for i in order[start : start + batch_size]], pad)


def collate(rows: list[Row], pad: int) -> dict[str, Tensor]:
    """One batch of these rows."""
    width = max(len(row.ids) for row in rows)
    whole = len(rows[0].labels) == 1 < len(rows[0].ids)  # one label for the whole row
    ids = [row.ids + [pad] * (width - len(row.ids)) for row in rows]
    mask = [[1] * len(row.ids) + [0] * (width - len(row.ids)) for row in rows]
    labels = [row.labels[0] if whole else row.labels + [IGNORED] * (width - len(row.labels)) for row in rows]
    return {
        "input_ids": torch.tensor(ids),
        "attention_mask": torch.tensor(mask),
        "labels": torch.tensor(labels),
    }


@torch.no_grad()
def judge(model: nn.Module, task: Task, pad: int, batch_size: int = 16) -> dict[str, float]:
    """Mean held-out loss over the learned tokens (over rows, for classes), and accuracy for classes."""
    was_training = model.training
    model.eval()
    total = correct = weight = 0.0
    rows = sorted(task.held_out, key=lambda row: len(row.ids))
    for start in range(0, len(rows), batch_size):
        batch = collate(rows[start : start + batch_size], pad)
        out = model(**batch)
        logits, labels = out.logits.float(), batch["labels"]  # the mean of a bf16 loss has three digits
        if task.kind == "classes":
            correct += float((logits.argmax(-1) == labels).sum())
        else:
            logits, labels = logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
        total += float(nn.functional.cross_entropy(logits, labels, ignore_index=IGNORED, reduction="sum"))
        weight += int((labels != IGNORED).sum())
    model.train(was_training)
    result = {"loss": total / weight}
    return {**result, "accuracy": correct / weight} if task.kind == "classes" else result


def _answer_row(tokenizer: Any, question: str, answer: str) -> Row:
    """The model's own chat template; only the answer and its end are learned."""
    turn = [{"role": "user", "content": question}]
    prompt = tokenizer.apply_chat_template(turn, add_generation_prompt=True, tokenize=False)
    prompt_ids = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    answer_ids = [*tokenizer(answer, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
    return Row(prompt_ids + answer_ids, [IGNORED] * len(prompt_ids) + answer_ids)


def _gsm8k(data: Path | None) -> list[list[tuple[str, str]]]:
    if data is None or not (data / "train.jsonl").is_file():
        raise SystemExit("gsm8k: --data names a folder with its train.jsonl and test.jsonl")
    files = [(data / name).read_text(encoding="utf-8").splitlines() for name in ("train.jsonl", "test.jsonl")]
    return [[(row["question"], row["answer"]) for row in map(json.loads, lines)] for lines in files]


def _stdlib() -> list[list[tuple[str, str]]]:
    """Whole modules are held out, as in the demo."""
    from examples.demo.stdlib_qa import HELDOUT, iter_entries, make_pairs

    triples = make_pairs(iter_entries())
    return [[(q, a) for module, q, a in triples if (module in HELDOUT) is held] for held in (False, True)]


def _modules(tokenizer: Any, max_length: int) -> Task:
    """The modules with the most documented names; their docstrings, without the question, which names them."""
    from examples.demo.stdlib_qa import iter_entries, make_pairs

    found = [(module, answer) for module, _, answer in make_pairs(iter_entries())]
    names = [name for name, _ in Counter(module for module, _ in found).most_common(NUM_MODULES)]
    rows = [
        Row(tokenizer(text, truncation=True, max_length=max_length)["input_ids"], [names.index(module)])
        for module, text in found
        if module in names
    ]
    random.Random(0).shuffle(rows)
    return Task("classes", rows[HELD_OUT:], rows[:HELD_OUT], num_labels=len(names))
