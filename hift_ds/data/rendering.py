"""What a chat template prints for a conversation, and where in it a message lies.

Chat templates rarely say where an answer begins and ends (``{% generation %}``), so it is found from outside:
what the template renders for the messages before an answer, with the generation prompt, is where the answer
begins; what it renders for the messages up to and including the answer is where it ends. Both hold if they
are prefixes of the whole.

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

from hift_ds.data import tool_calls
from hift_ds.data.formats import Conversation, Message
from hift_ds.errors import ConfigError, DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PROBE = "HiFTprobe"
"""Stands for an answer where only what the template writes around it is asked."""
RENDER_TIMEOUT_S = 60.0
"""A conversation of 100,000 messages takes a second."""


class Refused(DataError):
    """A row that the chat template does not render, or that has no answer: another row may be good."""


@dataclass(frozen=True)
class Span:
    """Where a message lies in a rendered conversation: after ``before`` and to the end of ``through``."""

    index: int
    before: str
    through: str

    def lies_in(self, whole: str) -> bool:
        """Whether ``whole`` begins with both ends of the span, so that it tells where the message is."""
        parts = whole.startswith(self.before) and whole.startswith(self.through)
        return parts and len(self.before) <= len(self.through)

    @property
    def printed(self) -> str:
        """The text of the message as the template prints it, with what it writes around it."""
        return self.through[len(os.path.commonprefix([self.before, self.through])) :]


@dataclass(frozen=True)
class Renderer:
    """Renders conversations by the chat template of ``tokenizer``.

    Attributes:
        control_ids: tokens added to the vocabulary that are not white space: begin, end and role markers, and whatever
            its users have added.
    """

    tokenizer: PreTrainedTokenizerBase = field(repr=False)
    control_ids: frozenset[int] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        added = self.tokenizer.added_tokens_decoder.items()
        control = frozenset(index for index, token in added if token.content.replace("▁", " ").strip())
        object.__setattr__(self, "control_ids", control)

    def render(self, sample: Conversation, count: int, generation_prompt: bool, origin: str) -> str:
        """What the template prints for the first ``count`` messages.

        Args:
            generation_prompt: and for the header of an answer that is to come.

        Raises:
            Refused: the template refuses them; begins with ``origin``.
            ConfigError: the template does not come to an end.
        """
        messages: list[Message] = sample.messages[:count]
        try:
            with _comes_to_an_end():
                rendered = self.tokenizer.apply_chat_template(
                    messages,
                    tools=sample.tools,  # type: ignore[arg-type]  # transformers' annotation lacks dicts
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

    def tokens(self, text: str) -> list[int]:
        """The token ids of a rendered text."""
        # As apply_chat_template does: the template writes BOS itself. If the text that it prints first begins
        # with another (rendered in advance), one is enough.
        ids = self.tokenizer(text, add_special_tokens=False).input_ids
        begin = self.tokenizer.bos_token_id
        return ids[1:] if begin is not None and ids[:2] == [begin, begin] else ids

    # -- where a message lies ----------------------------------------------------------------------------------

    def span(self, sample: Conversation, index: int, whole: str, origin: str) -> Span:
        """Where message ``index`` lies in ``whole``, what the template prints for all of ``sample``.

        Raises:
            Refused: that cannot be told.
        """
        last = index + 1 == len(sample.messages)
        try:
            through = whole if last else self.render(sample, index + 1, False, origin)
        except DataError:
            inside = self.inside(sample, index, whole)
            if inside is None:
                raise
            return inside
        if index in sample.asked:  # its header is the template's, as that of an answer is
            around = self._around(sample, index, index + 1)
            if around is not None:
                return Span(index, around[0], through)
        return Span(index, self._before(sample, index, origin), through)

    def written_behind(self, sample: Conversation, answer: int) -> list[int]:
        """The tokens that the template itself writes behind a text in the place of an answer."""
        return self.tokens((self._around(sample, answer, answer + 1) or ("", ""))[1])

    def _before(self, sample: Conversation, index: int, origin: str) -> str:
        """What the model is given before it writes message ``index``; for other roles, what precedes it.

        The messages before it and the generation prompt. There may be no messages before it, or none that the
        template accepts alone (only a system prompt): then what stands before it in the conversation.
        """
        is_answer = sample.messages[index]["role"] == "assistant"
        around = None
        try:
            if index:
                return self.render(sample, index, is_answer, origin)
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
            silent, prompt = (self.render(question, 1, prompted, "") for prompted in (False, is_answer))
        except DataError:
            return front
        prompt = prompt[len(silent) :] if prompt.startswith(silent) else ""
        for length in range(len(prompt), len(prompt) // 2, -1):  # it may end with the first mark of thoughts
            if prompt[:length] in front:
                return front[: front.rindex(prompt[:length]) + length]
        return front

    def inside(self, sample: Conversation, index: int, whole: str) -> Span | None:
        """A message's place in a conversation of which the part that ends with it cannot be rendered."""
        around = self._around(sample, index, len(sample.messages))
        if around is None:
            return None
        front, back = around
        if not (whole.startswith(front) and whole.endswith(back) and len(front) + len(back) <= len(whole)):
            return None
        end = len(whole) - len(back)
        first = next((token for token in self.tokens(back) if token in self.control_ids), None)
        if first is not None:  # the mark that ends the turn, if nothing but white space stands before it
            space, _, _ = back.partition(self.tokenizer.added_tokens_decoder[first].content)
            end += 0 if space.strip() else len(space) + len(self.tokenizer.added_tokens_decoder[first].content)
        before = self._prompt_in(front, sample, sample.messages[index]["role"] == "assistant")
        return Span(index, before, whole[:end])

    def _around(self, sample: Conversation, index: int, count: int) -> tuple[str, str] | None:
        """What stands before and behind a message's text, in the first ``count`` messages; None if the template
        does not print such a text."""
        probe = {"role": sample.messages[index]["role"], "content": PROBE}
        messages = [*sample.messages[:index], probe, *sample.messages[index + 1 : count]]
        try:
            rendered = self.render(dataclasses.replace(sample, messages=messages), count, False, "")
        except DataError:
            return None
        front, found, back = rendered.rpartition(PROBE)
        return (front, back) if found else None

    # -- tool calls --------------------------------------------------------------------------------------------

    def in_the_templates_form(self, sample: Conversation, answers: list[int], origin: str) -> Conversation:
        """The conversation with its tool calls in the first form that the template prints, whole and once quoted.

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
        whole = self.render(sample, len(sample.messages), False, origin)
        objects = tool_calls.with_objects(sample)
        wrong = {}
        for index, message in enumerate(sample.messages):
            if message.get("tool_calls"):
                printed = self.span(sample, index, whole, origin).printed
                of_objects = self._printed_calls(objects, index) if objects is not None else None
                what = tool_calls.not_printed(message, printed, of_objects)
                if what is not None:
                    wrong[index] = what
        return wrong

    def _printed_calls(self, sample: Conversation, index: int) -> str | None:
        """What the template prints for a message with calls; None if it refuses it or leaves calls out."""
        try:
            whole = self.render(sample, len(sample.messages), False, "")
            printed = self.span(sample, index, whole, "").printed
        except DataError:
            return None
        return printed if tool_calls.not_printed(sample.messages[index], printed) is None else None


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
