"""A sample -> token ids, and which of them are learned.

Only answers are learned, unless asked otherwise. For a conversation of two turns rendered by ChatML:

    <|im_start|>user  Hi <|im_end|> <|im_start|>assistant  Hello <|im_end|>  <|im_start|>user  Bye ...
    .            .    .  .          .            .         LEARNED LEARNED . .            .    .

Chat templates rarely say where an answer begins and ends (``{% generation %}``), so it is found from outside:
what the template renders for the messages before an answer, with the generation prompt, is where the answer
begins; what it renders for the messages up to and including the answer is where it ends. Both hold if they
are prefixes of the whole. Some templates break that (Qwen3 drops the thoughts of earlier turns): then each
answer becomes a sample of its own, behind exactly the prompt that the model will see when it is used.

What the template alone writes (a header, the end of a turn) is told from what the data say by rendering
``PROBE`` in the answer's place.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import signal
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NoReturn

from hift_ds.data import left_out, tool_calls
from hift_ds.data.formats import Completion, Conversation, Message, Sample, Text
from hift_ds.errors import ConfigError, DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PROBE = "HiFTprobe"
"""Stands for an answer where only what the template writes around it is asked."""
RENDER_TIMEOUT_S = 60.0
"""A conversation of 100,000 messages takes a second."""


@dataclass
class Encoded:
    """One training sample. ``learned`` has a flag for each of ``ids``."""

    ids: list[int]
    learned: list[bool]
    splittable: bool = False
    """Plain text: may be cut into several samples instead of being truncated."""
    remarks: tuple[str, ...] = ()
    """What of the row the chat template has not printed, though nothing refuses it."""


class Refused(DataError):
    """A row that the chat template does not render, or that has no answer: another row may be good."""


@dataclass(frozen=True)
class _Span:
    """Where a message lies in a rendered conversation: after ``before`` and to the end of ``through``."""

    index: int
    before: str
    through: str

    def lies_in(self, whole: str) -> bool:
        parts = whole.startswith(self.before) and whole.startswith(self.through)
        return parts and len(self.before) <= len(self.through)

    @property
    def printed(self) -> str:
        return self.through[len(os.path.commonprefix([self.before, self.through])) :]


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
    """Tokens added to the vocabulary that are not white space: begin, end and role markers, and whatever its
    users have added."""
    affixes: tuple[list[int], list[int]] | None = field(init=False, repr=False)
    """What the tokenizer puts before (BOS) and behind every text by itself; None where that is not told."""

    def __post_init__(self) -> None:
        added = self.tokenizer.added_tokens_decoder.items()
        control = frozenset(index for index, token in added if token.content.replace("▁", " ").strip())
        object.__setattr__(self, "control_ids", control)
        object.__setattr__(self, "affixes", _affixes(self.tokenizer))

    def __call__(self, sample: Sample, origin: str) -> list[Encoded]:
        """One or more training samples.

        Raises:
            Refused: no answer to learn, or the chat template refuses the messages; begins with ``origin``.
            DataError: the chat template leaves out what should be learned; begins with ``origin``.
            ConfigError: the chat template does not come to an end.
        """
        if isinstance(sample, Text):
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
        sample = self._in_the_templates_form(sample, [], origin)
        count = len(sample.messages) - (sample.messages[-1]["role"] == "assistant")
        if count == 0:
            raise DataError(f"{origin}: only an answer, and no message before it; expected a question")
        return self._tokens(self._render(sample, count, True, origin))

    # -- texts -----------------------------------------------------------------------------------------------

    def _completion(self, sample: Completion) -> Encoded:
        prompt = self._text_ids(sample.prompt, goes_on=True)
        ids = self._with_end(self._text_ids(sample.prompt + sample.completion))
        # A token with the prompt's last letters and the answer's first in it belongs to the answer.
        begin = 0 if self.train_on_prompt else common_prefix_length(prompt, ids)
        remarks = () if sample.completion else ("an answer is empty",)
        return Encoded(ids, [index >= begin for index in range(len(ids))], remarks=remarks)

    def _text_ids(self, text: str, goes_on: bool = False) -> list[int]:
        """With what the tokenizer puts around it, once: a text rendered in advance may have it already.

        Args:
            goes_on: more text will follow, so nothing is put behind it.
        """
        if self.affixes is None:
            return self.tokenizer(text).input_ids
        prefix, suffix = self.affixes
        ids = self.tokenizer(text, add_special_tokens=False).input_ids
        said = next((n for n in range(len(prefix), 0, -1) if ids[:n] == prefix[-n:]), 0)
        ids = [*prefix[: len(prefix) - said], *ids]
        return ids if goes_on or ids[-len(suffix) :] == suffix else [*ids, *suffix]

    def _with_end(self, ids: list[int]) -> list[int]:
        end = self.tokenizer.eos_token_id
        return ids if end is None or ids[-1:] == [end] else [*ids, end]

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
        sample = self._in_the_templates_form(sample, answers, origin)
        whole = self._render(sample, len(sample.messages), False, origin)
        remarks = left_out.remarks(sample, whole)
        if self.train_on_prompt:
            return [dataclasses.replace(self._all_but_masked(sample, whole, origin), remarks=remarks)]
        spans = [self._span(sample, index, whole, origin) for index in answers]
        for span in spans:
            left_out.check_answer(sample.messages[span.index], span.printed, origin)
        if all(span.lies_in(whole) for span in spans):
            marked = [self._mark(sample, whole, spans)]
        else:
            marked, passed_over = self._each_alone(sample, answers, origin)
            remarks += passed_over
        return [dataclasses.replace(encoded, remarks=remarks) for encoded in marked]

    def _in_the_templates_form(self, sample: Conversation, answers: list[int], origin: str) -> Conversation:
        """With the tool calls in the first form that the template prints, whole and once quoted.

        Where none is, the answers to learn are refused; calls that are context only may be left out.
        """
        if not tool_calls.has_calls(sample):
            return sample
        refused: list[DataError] = []
        left_out: list[DataError] = []
        fallback = None
        for form in tool_calls.forms(sample):
            try:
                wrong = self._unprinted_calls(form, origin)
            except DataError as error:
                refused.append(error)
                continue
            if not wrong:
                return form
            if any(index in answers for index in wrong):
                what = next(wrong[index] for index in answers if index in wrong)
                left_out.append(DataError(f"{origin}: the chat template {what}; set data.template to one for tools"))
            else:
                fallback = fallback or form
        if fallback is None:
            raise (left_out or refused)[0]
        return fallback

    def _unprinted_calls(self, sample: Conversation, origin: str) -> dict[int, str]:
        """Index of each message whose calls the template does not print as it should -> what is wrong."""
        whole = self._render(sample, len(sample.messages), False, origin)
        objects = tool_calls.with_objects(sample)
        wrong = {}
        for index, message in enumerate(sample.messages):
            if message.get("tool_calls"):
                printed = self._span(sample, index, whole, origin).printed
                of_objects = self._printed_calls(objects, index) if objects is not None else None
                what = tool_calls.not_printed(message, printed, of_objects)
                if what is not None:
                    wrong[index] = what
        return wrong

    def _printed_calls(self, sample: Conversation, index: int) -> str | None:
        """What the template prints for a message with calls; None if it refuses it or leaves calls out."""
        try:
            whole = self._render(sample, len(sample.messages), False, "")
            printed = self._span(sample, index, whole, "").printed
        except DataError:
            return None
        return printed if tool_calls.not_printed(sample.messages[index], printed) is None else None

    def _all_but_masked(self, sample: Conversation, whole: str, origin: str) -> Encoded:
        ids = self._tokens(whole)
        learned = [True] * len(ids)
        for index in sorted(sample.masked):
            span: _Span | None = self._span(sample, index, whole, origin)
            if not span.lies_in(whole):
                span = self._inside(sample, index, whole)
            if span is None:
                raise DataError(
                    f"{origin}: message {index + 1} is not to be learned, but the chat template renders it "
                    "differently at another place; set data.train_on_prompt: false"
                )
            begin, end = (common_prefix_length(self._tokens(part), ids) for part in (span.before, span.through))
            learned[begin:end] = [False] * (end - begin)
        last = len(sample.messages) - 1
        if sample.messages[last]["role"] == "assistant" and last not in sample.masked:
            end, closed = self._answer_end(sample, last, ids, 0, len(ids))
            if not closed:
                return self._closed(ids, learned)
        return Encoded(ids, learned)

    def _span(self, sample: Conversation, index: int, whole: str, origin: str) -> _Span:
        last = index + 1 == len(sample.messages)
        try:
            through = whole if last else self._render(sample, index + 1, False, origin)
        except DataError:
            inside = self._inside(sample, index, whole)
            if inside is None:
                raise
            return inside
        if index in sample.asked:  # its header is the template's, as that of an answer is
            around = self._around(sample, index, index + 1)
            if around is not None:
                return _Span(index, around[0], through)
        return _Span(index, self._before(sample, index, origin), through)

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
        whole = self._render(until_answer, answer + 1, False, origin)
        return self._mark(until_answer, whole, [self._span(until_answer, answer, whole, origin)])

    def _mark(self, sample: Conversation, whole: str, spans: list[_Span]) -> Encoded:
        ids = self._tokens(whole)
        learned = [False] * len(ids)
        closed = True
        for span in spans:
            begin = common_prefix_length(self._tokens(span.before), ids)
            last = span.through == whole
            end = len(ids) if last else common_prefix_length(self._tokens(span.through), ids)
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
            if ids[last] in self.control_ids:
                if self._ends_a_turn(sample, answer, ids[last]):
                    return last + 1, True
                break
            if str(self.tokenizer.decode([ids[last]])).strip():
                break
        following = sample.messages[answer + 1]["content"] if answer + 1 < len(sample.messages) else ""
        if end < len(ids) and ids[end] in self.control_ids and not self._is_said(ids[end], following, front=True):
            return end + 1, True
        return end, False

    def _ends_a_turn(self, sample: Conversation, answer: int, token: int) -> bool:
        """Whether ``token``, the last of an answer, is the template's mark and not the answer's own text."""
        if token == self.tokenizer.eos_token_id:
            return True
        message = sample.messages[answer]
        if self._is_said(token, message["content"]):
            return bool(self.control_ids.intersection(self._written_behind(sample, answer)))
        if message.get("tool_calls") and not self.tokenizer.added_tokens_decoder[token].special:
            return token in self._written_behind(sample, answer)  # else it closes the call (</tool_call>)
        return True

    def _is_said(self, token: int, content: str | None, front: bool = False) -> bool:
        """Whether a message's own text has ``token`` at its end, or at its ``front``."""
        mark, text = self.tokenizer.added_tokens_decoder[token].content.strip(), (content or "").strip()
        return text.startswith(mark) if front else text.endswith(mark)

    # -- what the template writes ----------------------------------------------------------------------------

    def _tokens(self, text: str) -> list[int]:
        # As apply_chat_template does: the template writes BOS itself. If the text that it prints first begins
        # with another (rendered in advance), one is enough.
        ids = self.tokenizer(text, add_special_tokens=False).input_ids
        begin = self.tokenizer.bos_token_id
        return ids[1:] if begin is not None and ids[:2] == [begin, begin] else ids

    def _before(self, sample: Conversation, index: int, origin: str) -> str:
        """What the model is given before it writes message ``index``; for other roles, what precedes it.

        The messages before it and the generation prompt. There may be no messages before it, or none that the
        template accepts alone (only a system prompt): then what stands before it in the conversation.
        """
        is_answer = sample.messages[index]["role"] == "assistant"
        around = None
        try:
            if index:
                return self._render(sample, index, is_answer, origin)
        except DataError:
            around = self._around(sample, index, index + 1)
            if around is None:
                raise
        around = around or self._around(sample, index, index + 1)
        return self._prompt_in(around[0], sample, is_answer) if around is not None else ""

    def _prompt_in(self, front: str, sample: Conversation, is_answer: bool) -> str:
        """``front``, what stands before a text, up to and including the generation prompt: what else the
        template writes before the text of an answer (the marks of empty thoughts) is part of the answer."""
        question = dataclasses.replace(sample, messages=[{"role": "user", "content": PROBE}])
        try:
            silent, prompt = (self._render(question, 1, prompted, "") for prompted in (False, is_answer))
        except DataError:
            return front
        prompt = prompt[len(silent) :] if prompt.startswith(silent) else ""
        for length in range(len(prompt), len(prompt) // 2, -1):  # it may end with the first mark of thoughts
            if prompt[:length] in front:
                return front[: front.rindex(prompt[:length]) + length]
        return front

    def _inside(self, sample: Conversation, index: int, whole: str) -> _Span | None:
        """A message's place in a conversation of which the part that ends with it cannot be rendered."""
        around = self._around(sample, index, len(sample.messages))
        if around is None:
            return None
        front, back = around
        if not (whole.startswith(front) and whole.endswith(back) and len(front) + len(back) <= len(whole)):
            return None
        end = len(whole) - len(back)
        first = next((token for token in self._tokens(back) if token in self.control_ids), None)
        if first is not None:  # the mark that ends the turn, if nothing but white space stands before it
            space, _, _ = back.partition(self.tokenizer.added_tokens_decoder[first].content)
            end += 0 if space.strip() else len(space) + len(self.tokenizer.added_tokens_decoder[first].content)
        before = self._prompt_in(front, sample, sample.messages[index]["role"] == "assistant")
        return _Span(index, before, whole[:end])

    def _written_behind(self, sample: Conversation, answer: int) -> list[int]:
        """The tokens that the template itself writes behind a text in the place of an answer."""
        return self._tokens((self._around(sample, answer, answer + 1) or ("", ""))[1])

    def _around(self, sample: Conversation, index: int, count: int) -> tuple[str, str] | None:
        """What stands before and behind a message's text, in the first ``count`` messages; None if the template
        does not print such a text."""
        probe = {"role": sample.messages[index]["role"], "content": PROBE}
        messages = [*sample.messages[:index], probe, *sample.messages[index + 1 : count]]
        try:
            rendered = self._render(dataclasses.replace(sample, messages=messages), count, False, "")
        except DataError:
            return None
        front, found, back = rendered.rpartition(PROBE)
        return (front, back) if found else None

    def _render(self, sample: Conversation, count: int, generation_prompt: bool, origin: str) -> str:
        messages: list[Message] = sample.messages[:count]
        try:
            with _comes_to_an_end():
                rendered = self.tokenizer.apply_chat_template(
                    messages,
                    tools=sample.tools,  # type: ignore[arg-type]
                    tokenize=False,
                    add_generation_prompt=generation_prompt,
                    **(sample.template_options or {}),
                )
            return str(rendered)
        except ConfigError:
            raise
        except Exception as error:  # Jinja's, or whatever a template raises by itself
            reason = " ".join(str(error).split()) or type(error).__name__
            roles = ", ".join(message["role"] for message in messages)
            raise Refused(f"{origin}: the chat template refuses messages of {roles}: {reason[:200]}") from error


@contextlib.contextmanager
def _comes_to_an_end() -> Iterator[None]:
    """Ends the rendering of a chat template whose loops have no end, or one that nobody will live to see.

    transformers renders in a sandbox that limits each ``range`` to 100,000, but not loops inside loops. A timer of
    the operating system: it interrupts Python's code in the main thread, where data are prepared, and costs nothing.

    Raises:
        ConfigError: after ``RENDER_TIMEOUT_S``.
    """
    if threading.current_thread() is not threading.main_thread() or signal.getsignal(signal.SIGALRM) is None:
        yield
        return

    def stop(*_: object) -> NoReturn:
        raise ConfigError(
            f"data.template: the chat template does not come to an end within {RENDER_TIMEOUT_S:g} s on one "
            "conversation; give another one"
        )

    before = signal.signal(signal.SIGALRM, stop)
    callers = signal.setitimer(signal.ITIMER_REAL, RENDER_TIMEOUT_S)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, *callers)
        signal.signal(signal.SIGALRM, before)


def _affixes(tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]] | None:
    for text in ("a", "1", "\u4e00"):
        bare, full = tokenizer(text, add_special_tokens=False).input_ids, tokenizer(text).input_ids
        for begin in range(len(full) if bare else 0):
            if full[begin : begin + len(bare)] == bare:
                return full[:begin], full[begin + len(bare) :]
    return None


def common_prefix_length(first: list[int], second: list[int]) -> int:
    """The number of leading tokens that two sequences share."""
    for index, (a, b) in enumerate(zip(first, second, strict=False)):
        if a != b:
            return index
    return min(len(first), len(second))
