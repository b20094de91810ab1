"""``hift-ds chat RUN``: talk to a fine-tuned model in the terminal, or through a pipe."""

from __future__ import annotations

import argparse
import sys
from threading import Thread
from typing import TYPE_CHECKING, Any, cast

from hift_ds.cli.arguments import add_model_arguments
from hift_ds.errors import ConfigError, HiFTError

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

HELP = "/reset begins anew, /exit or Ctrl-D ends"
EXAMPLES = """examples:
  hift-ds chat runs/first
  hift-ds chat runs/first --system "Answer in one sentence." --temperature 0
  echo "What is a generator?" | hift-ds chat runs/first
  hift-ds chat runs/pretrained --plain            # goes on with what you type, no chat template
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model_arguments(parser)
    parser.add_argument("--max-new-tokens", type=int, default=512, metavar="N", help="of an answer (default: 512)")
    parser.add_argument(
        "--temperature", type=float, metavar="T",
        help="0: the likeliest token each time; higher: more varied (default: as the model's generation config says)",
    )  # fmt: skip
    parser.add_argument("--system", metavar="TEXT", help="what the model is told before your first message")
    parser.add_argument("--plain", action="store_true", help="no chat template: the model goes on with your text")


def run(args: argparse.Namespace) -> int:
    from hift_ds.report.quiet import quiet_libraries
    from hift_ds.train.trained_model import find_trained

    if args.plain and args.system:
        raise ConfigError("--system with --plain: a plain text has no system message; remove one")
    quiet_libraries(is_main=True)
    if args.max_new_tokens < 1:
        raise ConfigError(f"--max-new-tokens: expected at least 1, got {args.max_new_tokens}")
    trained = find_trained(args.model, trust_remote_code=args.trust_remote_code)
    model, tokenizer = trained.load(dtype=args.dtype, device=args.device)
    chat = Chat(model, tokenizer, system=args.system, plain=args.plain or not tokenizer.chat_template,
                max_new_tokens=args.max_new_tokens, temperature=args.temperature)  # fmt: skip
    at_terminal = sys.stdin.isatty()
    if at_terminal:
        how = "goes on with your text" if chat.plain else "chat template"
        size = sum(param.numel() for param in model.parameters())
        print(f"{trained.folder}: {size:,} parameters on {model.device}, {how}; {HELP}")
    while True:
        try:
            line = input("\n> " if at_terminal else "")
        except EOFError:
            break
        if line.strip() in ("/exit", "/quit"):
            break
        if line.strip() == "/reset":
            chat.reset()
        elif line.strip():
            try:
                chat.answer(line, lambda piece: print(piece, end="", flush=True))
            except KeyboardInterrupt:
                pass  # enough of this answer
            except HiFTError as error:
                if not at_terminal:
                    raise
                print(error, end="")
            print(flush=True)
    return 0


class Chat:
    """A conversation with a model.

    Args:
        plain: no template and no memory: each text is gone on with.
        temperature: see :func:`~hift_ds.train.trained_model.generation_options`.
    """

    def __init__(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, *, system: str | None = None,
        plain: bool = False, max_new_tokens: int = 512,
        temperature: float | None = None,
    ) -> None:  # fmt: skip
        from hift_ds.train.trained_model import generation_options

        self.model, self.tokenizer, self.plain, self.system = model, tokenizer, plain, system
        self._options = {**generation_options(model, tokenizer, temperature), "max_new_tokens": max_new_tokens}
        self.reset()

    def reset(self) -> None:
        """Forget what was said."""
        self.messages = [{"role": "system", "content": self.system}] if self.system else []

    def answer(self, text: str, show: Callable[[str], None]) -> str:
        """What the model says to ``text``; ``show`` is given it piece by piece. An answer that is interrupted is
        forgotten, with its question.

        Raises:
            ConfigError: there is no room left among the model's positions.
            DataError: the chat template refuses the conversation.
        """
        from transformers import StoppingCriteria, StoppingCriteriaList, TextIteratorStreamer

        from hift_ds.hf.model_folder import max_sequence_length

        asked = [*self.messages, {"role": "user", "content": text}]
        ids = self._ids(text, asked)
        limit = None if self.model.config.is_encoder_decoder else max_sequence_length(self.model.config.to_dict())
        room = self._options["max_new_tokens"] if limit is None else limit - ids["input_ids"].shape[1]
        if room < 1:
            raise ConfigError(f"the conversation is longer than the model's {limit:,} positions; /reset begins anew")
        stopped, failure = [False], []

        class Stopped(StoppingCriteria):
            def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs: Any) -> Tensor:
                import torch

                return torch.full((len(input_ids),), stopped[0], device=input_ids.device)

        streamer = TextIteratorStreamer(self.tokenizer, skip_prompt=True, skip_special_tokens=True)
        generate_text = cast("Callable[..., Any]", self.model.generate)
        options = self._options | {"max_new_tokens": min(room, self._options["max_new_tokens"])}

        def generate() -> None:
            try:
                generate_text(**ids, **options, streamer=streamer, stopping_criteria=StoppingCriteriaList([Stopped()]))
            except BaseException as error:  # raised again by the thread that reads
                failure.append(error)
                streamer.end()

        thread = Thread(target=generate, daemon=True)
        thread.start()
        pieces = []
        try:
            for piece in streamer:
                pieces.append(piece)
                show(piece)
        finally:
            stopped[0] = True
            thread.join()
        if failure:
            raise failure[0]
        said = "".join(pieces)
        if not self.plain:
            self.messages = [*asked, {"role": "assistant", "content": said}]
        return said

    def _ids(self, text: str, asked: list[dict[str, str]]) -> dict[str, Tensor]:
        import torch

        from hift_ds.data.encoding import Encoder
        from hift_ds.data.formats import Conversation, Text

        sample = Text(text) if self.plain else Conversation(asked)
        ids = torch.tensor([Encoder(self.tokenizer).prompt_ids(sample, "this conversation")], device=self.model.device)
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
