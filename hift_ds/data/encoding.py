"""A sample -> token ids, and which of them are learned.

Only answers are learned, unless asked otherwise. For a conversation of two turns rendered by ChatML:

    <|im_start|>user  Hi <|im_end|> <|im_start|>assistant  Hello <|im_end|>  <|im_start|>user  Bye ...
    .            .    .  .          .            .         LEARNED LEARNED . .            .    .

Where an answer lies in what the chat template prints is found by :mod:`hift_ds.data.rendering`. Some templates print
an answer otherwise when a conversation goes on (Qwen3 drops the thoughts of earlier turns): then each answer becomes a
sample of its own, behind exactly the prompt that the model will see when it is used.
"""

from __future__ import annotations

import dataclasses
import functools
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from hift_ds.data import left_out
from hift_ds.data.formats import Completion, Conversation, Sample, Text
from hift_ds.data.rendering import Refused, Renderer, Span
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
    remarks: tuple[str, ...] = ()
    """What of the row the chat template has not printed, though nothing refuses it."""


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
    renderer: Renderer = field(init=False, repr=False)
    affixes: tuple[list[int], list[int]] | None = field(init=False, repr=False)
    """What the tokenizer puts before (BOS) and behind every text by itself; None where that is not told."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "renderer", Renderer(self.tokenizer))
        object.__setattr__(self, "affixes", _affixes(self.tokenizer))

    def __call__(self, sample: Sample, origin: str) -> list[Encoded]:
        """One or more training samples.

        Raises:
            Refused: no answer to learn, or the chat template refuses the messages; begins with ``origin``.
            DataError: the chat template leaves out what should be learned; begins with ``origin``.
            ConfigError: the chat template does not come to an end.
        """
        if isinstance(sample, Text):
            if not sample.text.strip():  # to end at once is nothing to learn
                return [Encoded([], [])]
            ids = self._with_end(self._text_ids(sample.text))
            return [Encoded(ids, [True] * len(ids), splittable=True)]
        if isinstance(sample, Completion):
            return [self._completion(sample)]
        return self._conversation(sample, origin)

    def prompt_ids(self, sample: Sample, origin: str) -> list[int]:
        """What a model that learned from such samples is given to write the last answer, or to go on with a text.

        Raises:
            DataError: the chat template refuses the messages, or there are none before the answer.
        """
        if isinstance(sample, Text | Completion):
            return self._text_ids(sample.text if isinstance(sample, Text) else sample.prompt, goes_on=True)
        sample = self.renderer.in_the_templates_form(sample, [], origin)
        count = len(sample.messages) - (sample.messages[-1]["role"] == "assistant")
        if count == 0:
            raise DataError(f"{origin}: only an answer, and no message before it; expected a question")
        return self.renderer.tokens(self.renderer.render(sample, count, True, origin))

    # -- texts -----------------------------------------------------------------------------------------------

    def _completion(self, sample: Completion) -> Encoded:
        prompt = self._text_ids(sample.prompt, goes_on=True)
        ids = self._with_end(self._text_ids(sample.prompt + sample.completion))
        # A token with the prompt's last letters and the answer's first in it belongs to the answer.
        begin = 0 if self.train_on_prompt else common_prefix_length(prompt, ids)
        remarks = () if sample.completion else ("an answer is empty",)
        return Encoded(ids, [index >= begin for index in range(len(ids))], remarks=remarks)

    def _text_ids(self, text: str, goes_on: bool = False) -> list[int]:
        """The tokens of a text with what the tokenizer puts around it, once: one rendered in advance may have it.

        Args:
            goes_on: more text will follow, so nothing is put behind it.
        """
        ids: list[int] = self.tokenizer(text, add_special_tokens=self.affixes is None).input_ids
        ids = ids if goes_on else self._until_its_end(ids)
        if self.affixes is None:
            return ids
        prefix, suffix = self.affixes
        said = next((n for n in range(len(prefix), 0, -1) if ids[:n] == prefix[-n:]), 0)
        ids = [*prefix[: len(prefix) - said], *ids]
        return ids if goes_on or ids[-len(suffix) :] == suffix else [*ids, *suffix]

    def _with_end(self, ids: list[int]) -> list[int]:
        end = self.tokenizer.eos_token_id
        return ids if end is None or ids[-1:] == [end] else [*ids, end]

    def _until_its_end(self, ids: list[int]) -> list[int]:
        """The tokens without the white space that a template has written behind the end token."""
        for last in range(len(ids) - 1, -1, -1):
            if ids[last] == self.tokenizer.eos_token_id:
                return ids[: last + 1]
            if str(self.tokenizer.decode([ids[last]])).strip():
                break
        return ids

    # -- conversations ---------------------------------------------------------------------------------------

    def _conversation(self, sample: Conversation, origin: str) -> list[Encoded]:
        answers = [
            index
            for index, message in enumerate(sample.messages)
            if message["role"] == "assistant" and index >= sample.first_answer
        ]
        if not self.mask_history:
            answers = sorted({*answers, *sample.asked})
        if not answers and not self.train_on_prompt:
            roles = ", ".join(message["role"] for message in sample.messages)
            raise Refused(f"{origin}: no assistant message to learn from; roles are {roles}")
        if self.mask_history:
            answers = answers[-1:]
        answers = [index for index in answers if index not in sample.masked]
        sample = self.renderer.in_the_templates_form(sample, answers, origin)
        whole = self.renderer.render(sample, len(sample.messages), False, origin)
        remarks = left_out.remarks(sample, whole)
        if self.train_on_prompt:
            return [dataclasses.replace(self._all_but_masked(sample, whole, origin), remarks=remarks)]
        spans = [self.renderer.span(sample, index, whole, origin) for index in answers]
        for span in spans:
            left_out.check_answer(sample.messages[span.index], span.printed, origin)
        if all(span.lies_in(whole) for span in spans):
            marked = [self._mark(sample, whole, spans)]
        else:
            marked, passed_over = self._each_alone(sample, answers, origin)
            remarks += passed_over
        return [dataclasses.replace(encoded, remarks=remarks) for encoded in marked]

    def _all_but_masked(self, sample: Conversation, whole: str, origin: str) -> Encoded:
        ids = self.renderer.tokens(whole)
        learned = [True] * len(ids)
        for index in sorted(sample.masked):
            inside = self.renderer.span(sample, index, whole, origin)
            span = inside if inside.lies_in(whole) else self.renderer.inside(sample, index, whole)
            if span is None:
                raise DataError(
                    f"{origin}: message {index + 1} is not to be learned, but the chat template renders it "
                    "differently at another place; set data.train_on_prompt: false"
                )
            begin, end = (common_prefix_length(self.renderer.tokens(part), ids) for part in (span.before, span.through))
            learned[begin:end] = [False] * (end - begin)
        last = len(sample.messages) - 1
        if sample.messages[last]["role"] == "assistant" and last not in sample.masked:
            end, closed = self._answer_end(sample, last, ids, 0, len(ids))
            if not closed:
                return self._closed(ids, learned)
        return Encoded(ids, learned)

    def _each_alone(
        self, sample: Conversation, answers: list[int], origin: str
    ) -> tuple[list[Encoded], tuple[str, ...]]:
        """A sample for each answer, and what there is to say if the template cannot end with some of them."""
        marked, refusals = [], []
        for index in answers:
            try:
                marked.append(self._alone(sample, index, origin))
            except DataError as refusal:
                refusals.append(refusal)
        if refusals and not marked:
            raise refusals[0]
        remark = "answers that the chat template refuses to end with are context only"
        return marked, (remark,) if refusals else ()

    def _alone(self, sample: Conversation, answer: int, origin: str) -> Encoded:
        """The conversation up to one answer; learned from where it departs from its prompt."""
        until_answer = dataclasses.replace(sample, messages=sample.messages[: answer + 1])
        whole = self.renderer.render(until_answer, answer + 1, False, origin)
        return self._mark(until_answer, whole, [self.renderer.span(until_answer, answer, whole, origin)])

    def _mark(self, sample: Conversation, whole: str, spans: list[Span]) -> Encoded:
        ids = self.renderer.tokens(whole)
        learned = [False] * len(ids)
        closed = True
        for span in spans:
            begin = common_prefix_length(self.renderer.tokens(span.before), ids)
            last = span.through == whole
            end = len(ids) if last else common_prefix_length(self.renderer.tokens(span.through), ids)
            end, closed = self._answer_end(sample, span.index, ids, begin, end)
            learned[begin:end] = [True] * (end - begin)
        if spans and spans[-1].through == whole and not closed and any(learned):
            return self._closed(ids, learned)
        return Encoded(ids, learned)

    def _closed(self, ids: list[int], learned: list[bool]) -> Encoded:
        """The template leaves the last answer open: without an end token a model would never learn to stop."""
        end_token = self.tokenizer.eos_token_id
        return Encoded(ids, learned) if end_token is None else Encoded([*ids, end_token], [*learned, True])

    def _answer_end(self, sample: Conversation, answer: int, ids: list[int], begin: int, end: int) -> tuple[int, bool]:
        """``end`` so that the last learned token is the one that ends a turn, and whether there is one.

        White space behind an end-of-turn token is left out. Where a template has no such token (GLM), the
        token that begins the next message is what stops the model, so it is taken in.
        """
        for last in range(end - 1, begin - 1, -1):
            if ids[last] in self.renderer.control_ids:
                if self._ends_a_turn(sample, answer, ids[last]):
                    return last + 1, True
                break
            if str(self.tokenizer.decode([ids[last]])).strip():
                break
        following = sample.messages[answer + 1]["content"] if answer + 1 < len(sample.messages) else ""
        if (
            end < len(ids)
            and ids[end] in self.renderer.control_ids
            and not self._is_said(ids[end], following, front=True)
        ):
            return end + 1, True
        return end, False

    def _ends_a_turn(self, sample: Conversation, answer: int, token: int) -> bool:
        """Whether ``token``, the last of an answer, is the template's mark and not the answer's own text."""
        if token == self.tokenizer.eos_token_id:
            return True
        message = sample.messages[answer]
        if self._is_said(token, message["content"]):
            return bool(self.renderer.control_ids.intersection(self.renderer.written_behind(sample, answer)))
        if message.get("tool_calls") and not self.tokenizer.added_tokens_decoder[token].special:
            return token in self.renderer.written_behind(sample, answer)  # else it closes the call (</tool_call>)
        return True

    def _is_said(self, token: int, content: str | None, front: bool = False) -> bool:
        """Whether a message's own text has ``token`` at its end, or at its ``front``."""
        mark, text = self.tokenizer.added_tokens_decoder[token].content.strip(), (content or "").strip()
        return text.startswith(mark) if front else text.endswith(mark)


def _affixes(tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]] | None:
    for text in ("a", "1", "\u4e00"):
        bare, full = tokenizer(text, add_special_tokens=False).input_ids, tokenizer(text).input_ids
        for begin in range(len(full) if bare else 0):
            if full[begin : begin + len(bare)] == bare:
                return full[:begin], full[begin + len(bare) :]
    return None


def without_affixes(tokenizer: PreTrainedTokenizerBase, text: str) -> str:
    """``text`` without the tokens that the tokenizer puts around every text by itself: one that was rendered in advance
    has them already, and would have them twice."""
    front, back = _affix_texts(tokenizer)
    return text.removeprefix(front).removesuffix(back)


@functools.lru_cache(maxsize=8)
def _affix_texts(tokenizer: PreTrainedTokenizerBase) -> tuple[str, str]:
    front, back = _affixes(tokenizer) or ([], [])
    return "".join(tokenizer.convert_ids_to_tokens(front)), "".join(tokenizer.convert_ids_to_tokens(back))


def common_prefix_length(first: list[int], second: list[int]) -> int:
    """The number of leading tokens that two sequences share."""
    for index, (a, b) in enumerate(zip(first, second, strict=False)):
        if a != b:
            return index
    return min(len(first), len(second))
