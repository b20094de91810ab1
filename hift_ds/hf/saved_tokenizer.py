"""Write a tokenizer into a model folder so that other programs read the same ids from it."""

from __future__ import annotations

import json
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hift_ds.errors import CheckpointError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SETTINGS_FILE = "tokenizer_config.json"
SENTENCEPIECE_FILE = "tokenizer.model"
"""What llama.cpp's converter reads. transformers converts it to a tokenizer.json and writes only that."""

PROBES = (
    "Hi",
    " Hi",
    "  Hi",
    "Hi ",
    "Hi  there",
    "a b",
    "\n",
    "a\nb\n\n  c",
    "\t",
    "x\t y",
    "   ",
    " " * 37 + "x",
    "",
    "The quick brown fox jumps over 13 lazy dogs.",
    "don't!? (see [1]) <b>&amp;</b> {x: 'y'}",
    "    def f(x):\n        return x ** 2  # square\n",
    "1234567890 3.14 1e-5",
    "naïve café à la carte",
    "a\u0301e",
    "Ελληνικά русский עברית العربية हिन्दी",
    "你好，世界。日本語テキスト 한국어",
    "🙂👩‍👩‍👧🏽🇩🇪",
    "ﬁ ™ ① ａｂｃ\u3000\u00a0\u200b",
    "▁",
    "▁Hi ▁ there",
    "https://example.org/a_b?c=d&e=%20#f",
    "\x00\x07",
    "AAAAAAAAaaaaaaaa",
    "\r\n",
)
"""Texts on which two tokenizers that should be one are compared: dummy prefix, runs of spaces, control
characters, bytes, composed and decomposed letters, full-width forms, many scripts."""


def save_tokenizer(tokenizer: PreTrainedTokenizerBase, folder: str | Path) -> None:
    """Write the tokenizer into a model's folder, and check that ``AutoTokenizer`` reads the same ids from it.

    The check is made in a temporary folder with the model's config.json, by whose type AutoTokenizer may choose
    another class than the one that was saved; if it fails, nothing is written. Python code is run only if the
    tokenizer's own class is code that was loaded with ``trust_remote_code``.

    Args:
        tokenizer: a processor, or anything else with ``save_pretrained``, is written without the check.
        folder: has config.json already.

    Raises:
        CheckpointError: the files read back give other ids or special tokens; names a text.
    """
    from transformers import PreTrainedTokenizerBase

    folder = Path(folder)
    own_code = type(tokenizer).__module__.startswith("transformers_modules")
    with tempfile.TemporaryDirectory() as name:
        made = Path(name)
        tokenizer.save_pretrained(str(made))
        _mend_settings(made / SETTINGS_FILE, own_code)
        _add_sentencepiece_model(tokenizer, made)
        if isinstance(tokenizer, PreTrainedTokenizerBase):
            files = sorted(made.iterdir())
            for file in [folder / "config.json", *(folder.glob("*.py") if own_code else ())]:
                if file.is_file() and not (made / file.name).exists():
                    shutil.copy(file, made / file.name)
            _compare(tokenizer, made, folder, own_code)
        else:
            files = sorted(made.iterdir())
        for file in files:
            if file.is_dir():
                shutil.copytree(file, folder / file.name, dirs_exist_ok=True)
            else:
                shutil.copyfile(file, folder / file.name)


def _mend_settings(file: Path, own_code: bool) -> None:
    """Write into tokenizer_config.json the class by its old name, and nothing of the folder that it came from."""
    if not file.is_file():
        return
    settings: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    if settings.get("tokenizer_class") == "TokenizersBackend":
        # transformers 4 and programs built on it know the same class by its old name only
        settings["tokenizer_class"] = "PreTrainedTokenizerFast"
    settings.pop("local_files_only", None)
    if not own_code:
        settings.pop("auto_map", None)  # names code that is not here, and that was not used
    file.write_text(json.dumps(settings, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _add_sentencepiece_model(tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    known = getattr(tokenizer, "vocab_file", None), getattr(tokenizer, "name_or_path", None)
    vocab_file, source = (Path(str(path)) if path else None for path in known)
    for file in (vocab_file, source / SENTENCEPIECE_FILE if source is not None else None):
        if file is None:
            continue
        if file.name == SENTENCEPIECE_FILE and file.is_file() and not (folder / SENTENCEPIECE_FILE).exists():
            shutil.copyfile(file, folder / SENTENCEPIECE_FILE)


def _compare(tokenizer: PreTrainedTokenizerBase, made: Path, folder: Path, own_code: bool) -> None:
    from transformers import AutoTokenizer

    advice = (
        "transformers takes a class of its own for this type of model; set model.tokenizer to a folder with "
        "files that it reads right, or copy those of the input model"
    )
    try:
        again = AutoTokenizer.from_pretrained(made, local_files_only=True, trust_remote_code=own_code)
    except Exception as error:  # whatever a class that does not fit makes of the files
        reason = " ".join(str(error).split()) or type(error).__name__
        raise CheckpointError(
            f"{folder}: AutoTokenizer cannot read the tokenizer that was trained with: {reason[:200]}; {advice}"
        ) from error
    for text in (*PROBES, "".join(tokenizer.all_special_tokens)):
        expected, found = tokenizer(text).input_ids, again(text).input_ids
        if expected != found:
            raise CheckpointError(
                f"{folder}: AutoTokenizer reads other ids than were trained with: {text!r} is {expected} "
                f"here and {found} there; {advice}"
            )
    for role in ("bos_token_id", "eos_token_id", "pad_token_id", "unk_token_id", "chat_template"):
        expected, found = getattr(tokenizer, role, None), getattr(again, role, None)
        if expected != found:
            raise CheckpointError(
                f"{folder}: AutoTokenizer reads another {role} than was trained with: {expected!r} here, "
                f"{found!r} there; {advice}"
            )
