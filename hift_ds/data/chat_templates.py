"""Which chat template a run uses: the tokenizer's own, a named one, or a file."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from hift_ds.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

FALLBACK = "alpaca"
"""For a tokenizer without a template of its own: plain words only, so it needs no token that a base model
lacks."""

TEMPLATES = {
    "alpaca": (
        "{%- for message in messages %}"
        "{%- if message['role'] == 'system' %}{{ message['content'] + '\\n\\n' }}"
        "{%- elif message['role'] == 'user' %}{{ '### Instruction:\\n' + message['content'] + '\\n\\n' }}"
        "{%- elif message['role'] == 'assistant' %}"
        "{{ '### Response:\\n' + message['content'] + (eos_token or '') + '\\n\\n' }}"
        "{%- else %}{{ raise_exception('the alpaca template has no role ' + message['role']) }}{%- endif %}"
        "{%- endfor %}"
        "{%- if add_generation_prompt %}{{ '### Response:\\n' }}{%- endif %}"
    ),
    "chatml": (
        "{%- for message in messages %}"
        "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
        "{%- endfor %}"
        "{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{%- endif %}"
    ),
}
_NEEDS = {"chatml": ("<|im_start|>", "<|im_end|>")}


def set_chat_template(tokenizer: PreTrainedTokenizerBase, template: str = "auto") -> str:
    """Give ``tokenizer`` the template of a run, so that it is used here and saved with the model.

    Args:
        template: ``auto`` (the tokenizer's own, else ``alpaca``), a name of ``TEMPLATES``, or a file with a
            Jinja template.

    Returns:
        What was chosen, in words.

    Raises:
        ConfigError: no such name or file.
    """
    if template == "auto":
        if tokenizer.chat_template:
            return "the tokenizer's own"
        template = FALLBACK
    if template in TEMPLATES:
        lacking = [token for token in _NEEDS.get(template, ()) if token not in tokenizer.get_vocab()]
        if lacking:
            raise ConfigError(
                f"data.template: {template} needs the tokens {', '.join(lacking)}, which the tokenizer "
                "lacks; "
                f"use {FALLBACK}"
            )
        tokenizer.chat_template = _bos(tokenizer) + TEMPLATES[template]
        return template
    file = Path(template).expanduser()
    if not file.is_file():
        raise ConfigError(
            f"data.template: {template!r} is neither auto, {', '.join(TEMPLATES)}, nor a file with a "
            "Jinja template"
        )
    tokenizer.chat_template = file.read_text(encoding="utf-8-sig")
    return str(file)


def _bos(tokenizer: PreTrainedTokenizerBase) -> str:
    """What starts a text of a tokenizer that puts a BOS token before every text by itself (GPT-2's does
    not)."""
    first = tokenizer("a").input_ids[:1]
    return (
        "{{- bos_token }}" if tokenizer.bos_token_id is not None and first == [tokenizer.bos_token_id] else ""
    )
