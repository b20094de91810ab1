"""Is the fine-tuned model better? Loss on held-out answers before and after, some answers side by side."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hift_ds.errors import DataError

if TYPE_CHECKING:
    from rich.console import Console
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Pair:
    """A question and the answer it should get."""

    question: str
    answer: str

    @property
    def messages(self) -> list[dict[str, str]]:
        return [{"role": "user", "content": self.question}, {"role": "assistant", "content": self.answer}]


@dataclass(frozen=True)
class Evaluation:
    """``loss``: nats per answer token, mean over all tokens of all pairs; ``answers``: generated, greedy."""

    loss: float
    num_tokens: int
    num_pairs: int
    answers: tuple[str, ...]

    @property
    def perplexity(self) -> float:
        return math.exp(min(self.loss, 700.0))


def read_pairs(path: str | Path, limit: int | None = None) -> list[Pair]:
    """The first ``limit`` pairs of a file of ``stdlib_qa.build`` (which mixes modules: any part is fair)."""
    path = Path(path)
    if not path.is_file():
        raise DataError(f"no such file: {str(path)!r}; `python -m examples.demo` builds it")
    with open(path, encoding="utf-8") as file:
        rows = [json.loads(line)["messages"] for line in file]
    return [Pair(row[0]["content"], row[1]["content"]) for row in rows[:limit]]


def evaluate_folder(
    model_dir: str | Path, pairs: Sequence[Pair], questions: Sequence[str] = (), *, device: str = "cpu"
) -> Evaluation:
    """Load a model as any user would, with ``from_pretrained``, and evaluate it."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    model = AutoModelForCausalLM.from_pretrained(model_dir).to(device).eval()
    loss, num_tokens = answer_loss(model, tokenizer, pairs)
    return Evaluation(loss, num_tokens, len(pairs), tuple(generate_answers(model, tokenizer, questions)))


def answer_loss(
    model: PreTrainedModel, tokenizer: Any, pairs: Sequence[Pair], batch_size: int = 8
) -> tuple[float, int]:
    """Mean loss over the tokens of the answers (their end token included), and how many there are.

    Written without our own data code on purpose: an evaluation that shares a wrong mask with training would
    not see it.
    """
    import torch

    examples = []
    for pair in pairs:
        prompt = _token_ids(tokenizer, pair.messages[:1], add_generation_prompt=True)
        whole = _token_ids(tokenizer, pair.messages)
        assert whole[: len(prompt)] == prompt, "the chat template must extend the prompt"
        examples.append((whole, len(prompt)))
    examples.sort(key=lambda example: len(example[0]))  # little padding

    total, count = 0.0, 0
    for start in range(0, len(examples), batch_size):
        batch = examples[start : start + batch_size]
        longest = max(len(ids) for ids, _ in batch)
        input_ids = torch.zeros(len(batch), longest, dtype=torch.long)
        mask = torch.zeros_like(input_ids)
        labels = torch.full_like(input_ids, -100)
        for row, (ids, prompt_length) in enumerate(batch):
            input_ids[row, : len(ids)] = torch.tensor(ids)
            mask[row, : len(ids)] = 1
            labels[row, prompt_length : len(ids)] = torch.tensor(ids[prompt_length:])
        with torch.inference_mode():
            logits = model(
                input_ids=input_ids.to(model.device), attention_mask=mask.to(model.device), use_cache=False
            ).logits
        losses = torch.nn.functional.cross_entropy(
            logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten().to(model.device), reduction="sum"
        )
        total += losses.item()
        count += int((labels[:, 1:] != -100).sum())
    return total / max(count, 1), count


def generate_answers(
    model: PreTrainedModel, tokenizer: Any, questions: Sequence[str], max_new_tokens: int = 48
) -> list[str]:
    """The model's most likely answers, one question at a time (no padding, hence no surprises)."""
    import torch

    answers = []
    for question in questions:
        messages = [{"role": "user", "content": question}]
        prompt = torch.tensor([_token_ids(tokenizer, messages, add_generation_prompt=True)], device=model.device)
        with torch.inference_mode():
            out = model.generate(
                prompt,
                attention_mask=torch.ones_like(prompt),
                max_new_tokens=max_new_tokens,
                do_sample=False,
                pad_token_id=tokenizer.pad_token_id,
            )
        answers.append(tokenizer.decode(out[0, prompt.shape[1] :], skip_special_tokens=True).strip())
    return answers


def show_comparison(
    before: Evaluation, after: Evaluation, pairs: Sequence[Pair], console: Console | None = None
) -> None:
    """Print the losses, and for each of ``pairs`` the answer before, after, and the documented one."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = console or Console()
    console.print(
        f"held-out answers ({after.num_pairs} pairs, {after.num_tokens} tokens): "
        f"loss {before.loss:.3f} -> {after.loss:.3f}, "
        f"perplexity {before.perplexity:.1f} -> {after.perplexity:.1f}",
        highlight=False,
    )
    for pair, old, new in zip(pairs, before.answers, after.answers, strict=False):
        table = Table.grid(padding=(0, 2))
        table.add_row("", Text(pair.question, style="bold"))
        for label, text in (("before", old), ("after", new), ("documented", pair.answer)):
            table.add_row(Text(label, style="cyan"), Text(" ".join(text.split())))
        console.print()
        console.print(table)


def _token_ids(tokenizer: Any, messages: list[dict[str, str]], add_generation_prompt: bool = False) -> list[int]:
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=add_generation_prompt)
    return tokenizer(text, add_special_tokens=False)["input_ids"]
