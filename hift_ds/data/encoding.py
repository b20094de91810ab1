"""A sample -> token ids, and which of them are learned.

Only answers are learned, unless asked otherwise. For a conversation of two turns rendered by ChatML:

    <|im_start|>user  Hi <|im_end|> <|im_start|>assistant  Hello <|im_end|>  <|im_start|>user  Bye ...
    .            .    .  .          .            .         LEARNED LEARNED . .            .    .

Chat templates rarely say where an answer begins and ends (``{% generation %}``), so it is found from outside:
what the template renders for the messages before an answer, with the generation prompt, is where the answer
begins; what it renders for the messages up to and including the answer is where it ends. Both hold if they
are prefixes of the whole. Some templates break that (Qwen3 drops the thoughts of earlier turns): then each
answer becomes a sample of its own, behind exactly the prompt that the model will see when it is used.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from hift_ds.data.formats import Completion, Conversation, Message, Sample, Text
from hift_ds.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass
class Encoded:
    """One training sample. ``learned`` has a flag for each of ``ids``."""

    ids: list[int]
    learned: list[bool]
    splittable: bool = False
    """Plain text: may be cut into several samples instead of being truncated."""


@dataclass(frozen=True)
class Encoder:
    """Turns samples into token ids.

    Attributes:
        tokenizer: with its chat template set.
        train_on_prompt: learn every token.
        mask_history: learn only a conversation's last answer.
    """

    tokenizer: PreTrainedTokenizerBase = field(repr=False)
    train_on_prompt: bool = False
    mask_history: bool = False
    control_ids: frozenset[int] = field(init=False, repr=False)
    """Tokens added to the vocabulary that are not white space: begin, end and role markers."""

    def __post_init__(self) -> None:
        added = self.tokenizer.added_tokens_decoder.items()
        control = frozenset(index for index, token in added if token.content.replace("▁", " ").strip())
        object.__setattr__(self, "control_ids", control)

    def __call__(self, sample: Sample, origin: str) -> list[Encoded]:
        """One or more training samples.

        Raises:
            DataError: no answer to learn, or the chat template refuses the messages; begins with ``origin``.
        """
        if isinstance(sample, Text):
            ids = self._with_end(self.tokenizer(sample.text).input_ids)
            return [Encoded(ids, [True] * len(ids), splittable=True)]
        if isinstance(sample, Completion):
            return [self._completion(sample)]
        return self._conversation(sample, origin)

    def _completion(self, sample: Completion) -> Encoded:
        prompt = self.tokenizer(sample.prompt).input_ids
        if (
            prompt
            and prompt[-1] == self.tokenizer.eos_token_id
            and not sample.prompt.endswith(self.tokenizer.eos_token)
        ):
            prompt = prompt[:-1]  # of a tokenizer that ends every text by itself
        ids = self._with_end(self.tokenizer(sample.prompt + sample.completion).input_ids)
        # A token with the prompt's last letters and the answer's first in it belongs to the answer.
        begin = 0 if self.train_on_prompt else common_prefix_length(prompt, ids)
        return Encoded(ids, [index >= begin for index in range(len(ids))])

    def _with_end(self, ids: list[int]) -> list[int]:
        end = self.tokenizer.eos_token_id
        return ids if end is None or ids[-1:] == [end] else [*ids, end]

    def _conversation(self, sample: Conversation, origin: str) -> list[Encoded]:
        answers = [
            index
            for index, message in enumerate(sample.messages)
            if message["role"] == "assistant" and index >= sample.first_answer
        ]
        if not answers and not self.train_on_prompt:
            roles = ", ".join(message["role"] for message in sample.messages)
            raise DataError(f"{origin}: no assistant message to learn from; roles are {roles}")
        if self.mask_history:
            answers = answers[-1:]
        whole = self._render(sample, len(sample.messages), False, origin)
        if self.train_on_prompt:
            ids = self._tokens(whole)
            return [Encoded(ids, [True] * len(ids))]
        spans = [self._span(sample, index, whole, origin) for index in answers]
        if None not in spans:
            return [self._mark(whole, [span for span in spans if span is not None])]
        return [self._alone(sample, index, origin) for index in answers]

    def _span(self, sample: Conversation, answer: int, whole: str, origin: str) -> tuple[str, str] | None:
        """What comes before an answer and what ends with it, if both are prefixes of ``whole``."""
        before = self._render(sample, answer, True, origin)
        through = (
            whole if answer + 1 == len(sample.messages) else self._render(sample, answer + 1, False, origin)
        )
        _check_rendered(sample.messages[answer]["content"], before, through, origin)
        inside = whole.startswith(before) and whole.startswith(through) and len(before) <= len(through)
        return (before, through) if inside else None

    def _alone(self, sample: Conversation, answer: int, origin: str) -> Encoded:
        """The conversation up to one answer; learned from where it departs from its prompt."""
        until_answer = Conversation(sample.messages[: answer + 1], sample.tools)
        whole = self._render(until_answer, answer + 1, False, origin)
        before = self._render(until_answer, answer, True, origin)
        return self._mark(whole, [(before, whole)])

    def _mark(self, whole: str, spans: list[tuple[str, str]]) -> Encoded:
        ids = self._tokens(whole)
        learned = [False] * len(ids)
        for before, through in spans:
            begin = common_prefix_length(self._tokens(before), ids)
            end = len(ids) if through == whole else common_prefix_length(self._tokens(through), ids)
            end = self._answer_end(ids, begin, end)
            learned[begin:end] = [True] * (end - begin)
        last = max((index for index, flag in enumerate(learned) if flag), default=None)
        if last is not None and spans[-1][1] == whole and ids[last] not in self.control_ids:
            # The template leaves the last answer open: a model would never learn to stop.
            end_token = self.tokenizer.eos_token_id
            if end_token is not None:
                return Encoded([*ids, end_token], [*learned, True])
        return Encoded(ids, learned)

    def _answer_end(self, ids: list[int], begin: int, end: int) -> int:
        """``end`` so that the last learned token is the one that ends a turn.

        White space behind an end-of-turn token is left out. Where a template has no such token (GLM), the
        token that begins the next message is what stops the model, so it is taken in.
        """
        for last in range(end - 1, begin - 1, -1):
            if ids[last] in self.control_ids:
                return last + 1
            if str(self.tokenizer.decode([ids[last]])).strip():
                break
        return end + 1 if end < len(ids) and ids[end] in self.control_ids else end

    def _tokens(self, text: str) -> list[int]:
        # As apply_chat_template does: the template writes BOS itself.
        return self.tokenizer(text, add_special_tokens=False).input_ids

    def _render(self, sample: Conversation, count: int, generation_prompt: bool, origin: str) -> str:
        messages: list[Message] = sample.messages[:count]
        if not messages:
            return ""
        try:
            rendered = self.tokenizer.apply_chat_template(
                messages,
                tools=sample.tools,  # type: ignore[arg-type]
                tokenize=False,
                add_generation_prompt=generation_prompt,
            )
            return str(rendered)
        except Exception as error:  # Jinja's, or whatever a template raises by itself
            reason = " ".join(str(error).split()) or type(error).__name__
            roles = ", ".join(message["role"] for message in messages)
            raise DataError(
                f"{origin}: the chat template refuses messages of {roles}: {reason[:200]}"
            ) from error


def _check_rendered(answer: str, before: str, through: str, origin: str) -> None:
    """Templates may shorten an answer (drop its thoughts), but one that drops all of it would teach
    silence."""
    words = re.findall(r"\w+", answer)
    if words and words[-1] not in through[len(os.path.commonprefix([before, through])) :]:
        raise DataError(
            f"{origin}: the chat template leaves out the answer that ends with {words[-1][-40:]!r}; it "
            "may expect content in "
            "parts, as those of vision models do; set data.template"
        )


def common_prefix_length(first: list[int], second: list[int]) -> int:
    """The number of leading tokens that two sequences share."""
    for index, (a, b) in enumerate(zip(first, second, strict=False)):
        if a != b:
            return index
    return min(len(first), len(second))
