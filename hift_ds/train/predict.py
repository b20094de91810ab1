"""Answers to the rows of a file, many at once."""

from __future__ import annotations

import json
from collections.abc import Iterator
from itertools import islice
from typing import TYPE_CHECKING, Any

import torch

from hift_ds.data.chat_templates import set_chat_template
from hift_ds.data.encoding import Encoder
from hift_ds.data.formats import to_sample
from hift_ds.data.rows import iterate_rows
from hift_ds.data.sources import Source
from hift_ds.errors import DataError
from hift_ds.hf.model_folder import max_sequence_length
from hift_ds.train.trained_model import generation_options

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

WINDOW = 16  # batches whose rows are sorted by length together


def predict(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, source: Source, *, template: str = "auto",
    batch_size: int = 8, max_new_tokens: int = 256, temperature: float | None = 0.0,
) -> Iterator[dict[str, Any]]:  # fmt: skip
    """Each row of ``source`` in order, with what the model answers to it under ``prediction``.

    A row's own last answer is not shown to the model. Prompts of like length are answered together, padded on the left,
    which changes nothing: padding is masked, and positions are counted from the first token.

    Raises:
        DataError: a row is malformed, or leaves no room for an answer.
    """
    set_chat_template(tokenizer, template)
    encoder = Encoder(tokenizer)
    options = generation_options(model, tokenizer, temperature) | {"max_new_tokens": max_new_tokens}
    is_encoder_decoder = model.config.is_encoder_decoder
    limit = None if is_encoder_decoder else max_sequence_length(model.config.to_dict())
    rows = iterate_rows(source, answered=False)
    while window := list(islice(rows, WINDOW * batch_size)):
        prompts = []
        for row in window:
            ids = encoder.prompt_ids(to_sample(json.loads(row["row"]), row["format"], row["origin"]), row["origin"])
            if limit is not None and len(ids) + max_new_tokens > limit:
                raise DataError(
                    f"{row['origin']}: {len(ids):,} tokens and {max_new_tokens:,} new ones are more than the model's "
                    f"{limit:,} positions; shorten the row, or use a smaller --max-new-tokens"
                )
            prompts.append(ids)
        answers = [""] * len(window)
        order = sorted(range(len(window)), key=lambda index: -len(prompts[index]))
        for begin in range(0, len(order), batch_size):
            chosen = order[begin : begin + batch_size]
            for index, answer in zip(
                chosen, answer_prompts(model, tokenizer, [prompts[i] for i in chosen], options), strict=True
            ):
                answers[index] = answer
        for row, answer in zip(window, answers, strict=True):
            yield {**json.loads(row["row"]), "prediction": answer}


@torch.no_grad()
def answer_prompts(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: list[list[int]], options: dict[str, Any]
) -> list[str]:
    """What ``model.generate(**options)`` answers to each prompt's token ids."""
    width = max(map(len, prompts))
    ids = torch.full((len(prompts), width), tokenizer.pad_token_id)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, width - len(prompt) :] = torch.tensor(prompt)
        mask[row, width - len(prompt) :] = 1
    out = model.generate(input_ids=ids.to(model.device), attention_mask=mask.to(model.device), **options)
    new = out if model.config.is_encoder_decoder else out[:, width:]
    return [text.strip() for text in tokenizer.batch_decode(new, skip_special_tokens=True)]
