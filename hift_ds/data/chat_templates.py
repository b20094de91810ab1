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

_SYSTEM_IN_QUESTION = (  # for templates without a role for it
    "{%- set ns = namespace(system='') %}{%- for message in messages %}"
    "{%- if message['role'] == 'system' %}{%- set ns.system = ns.system + message['content'] + '\\n\\n' %}"
    "{%- elif message['role'] not in ('user', 'assistant') %}"
    "{{ raise_exception('this template has no role ' + message['role']) }}"
    "{%- else %}"
    "{%- set content = (ns.system if message['role'] == 'user' else '') + message['content'] %}"
    "{%- if message['role'] == 'user' %}{%- set ns.system = '' %}{%- endif %}"
)

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
    "llama3": (
        "{%- for message in messages %}"
        "{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' + message['content'] | trim }}"
        "{{ '<|eot_id|>' }}{%- endfor %}"
        "{%- if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{%- endif %}"
    ),
    "gemma": (
        _SYSTEM_IN_QUESTION + "{%- set role = 'model' if message['role'] == 'assistant' else 'user' %}"
        "{{ '<start_of_turn>' + role + '\\n' + content | trim + '<end_of_turn>\\n' }}"
        "{%- endif %}{%- endfor %}"
        "{%- if add_generation_prompt %}{{ '<start_of_turn>model\\n' }}{%- endif %}"
    ),
    "mistral": (
        _SYSTEM_IN_QUESTION + "{%- if message['role'] == 'user' %}{{ '[INST] ' + content + ' [/INST]' }}"
        "{%- else %}{{ ' ' + content + eos_token }}{%- endif %}"
        "{%- endif %}{%- endfor %}"
    ),
    "vicuna": (
        "{%- for message in messages %}"
        "{%- if message['role'] == 'system' %}{{ message['content'] + ' ' }}"
        "{%- elif message['role'] == 'user' %}{{ 'USER: ' + message['content'] + ' ' }}"
        "{%- elif message['role'] == 'assistant' %}{{ 'ASSISTANT: ' + message['content'] + eos_token }}"
        "{%- else %}{{ raise_exception('the vicuna template has no role ' + message['role']) }}{%- endif %}"
        "{%- endfor %}"
        "{%- if add_generation_prompt %}{{ 'ASSISTANT:' }}{%- endif %}"
    ),
    "zephyr": (
        "{%- for message in messages %}"
        "{{ '<|' + message['role'] + '|>\\n' + message['content'] + eos_token + '\\n' }}"
        "{%- endfor %}"
        "{%- if add_generation_prompt %}{{ '<|assistant|>\\n' }}{%- endif %}"
    ),
}
ALIASES = {"qwen": "chatml"}
_NEEDS = {
    "chatml": ("<|im_start|>", "<|im_end|>"),
    "llama3": ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
    "gemma": ("<start_of_turn>", "<end_of_turn>"),
}
_END = {"chatml": "<|im_end|>", "llama3": "<|eot_id|>", "gemma": "<end_of_turn>"}
"""What ends a turn where it is not the tokenizer's end token."""


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
    template = ALIASES.get(template, template)
    if template in TEMPLATES:
        lacking = [token for token in _NEEDS.get(template, ()) if token not in tokenizer.get_vocab()]
        if lacking:
            raise ConfigError(
                f"data.template: {template} needs the tokens {', '.join(lacking)}, which the tokenizer lacks; "
                f"use {FALLBACK}"
            )
        bos = _bos(tokenizer)  # asked for before the end token changes
        tokenizer.chat_template = bos + TEMPLATES[template]
        end = _END.get(template)
        if end is not None and end != tokenizer.eos_token:
            # A base model's end token ends documents. What is written here would not stop at its turn's end.
            tokenizer.eos_token = end
            return f"{template} ({end} is the end token now)"
        return template
    file = Path(template).expanduser()
    if not file.is_file():
        raise ConfigError(
            f"data.template: {template!r} is neither auto, {', '.join(TEMPLATES)}, nor a file with a Jinja template"
        )
    tokenizer.chat_template = file.read_text(encoding="utf-8-sig")
    return str(file)


def _bos(tokenizer: PreTrainedTokenizerBase) -> str:
    """What starts a text of a tokenizer that puts a BOS token before every text by itself (GPT-2's does
    not)."""
    first = tokenizer("a").input_ids[:1]
    return "{{- bos_token }}" if tokenizer.bos_token_id is not None and first == [tokenizer.bos_token_id] else ""
