"""Tokenizers from a model folder. How they are written: :mod:`hift_ds.hf.saved_tokenizer`."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hift_ds.data import sentencepiece_conversion as sentencepiece
from hift_ds.errors import ConfigError
from hift_ds.hf.saved_tokenizer import save_tokenizer

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerBase

__all__ = ["check_tokenizer_folder", "choose_pad_token", "load_tokenizer", "save_tokenizer"]

# Any of these makes a folder a tokenizer's.
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "vocab.json",
    "spiece.model",
    "vocab.txt",
    "tekken.json",
)
# What may lie beside a bare tokenizer.model and still counts.
_SIDE_FILES = ("special_tokens_map.json", "added_tokens.json", "chat_template.jinja", "chat_template.json")
# Tokens of published vocabularies that exist for padding.
_PAD_TOKENS = (
    "<pad>",
    "[PAD]",
    "<|pad|>",
    "<PAD>",
    "<|finetune_right_pad_id|>",
    "<|padding|>",
    "<｜▁pad▁｜>",
)


def load_tokenizer(
    folder: str | Path, *, trust_remote_code: bool = False, key: str = "model.tokenizer"
) -> PreTrainedTokenizerBase:
    """The tokenizer of a local folder, with a pad token and without any access to the network.

    A folder with Hugging Face tokenizer files goes to ``AutoTokenizer``. A folder whose only vocabulary is a
    sentencepiece ``tokenizer.model`` gets exactly sentencepiece's ids, with BOS in front if the model has it.

    Args:
        folder: of the tokenizer; usually the model's.
        trust_remote_code: run Python code from the folder.
        key: of the run file, for messages.

    Raises:
        ConfigError: there is no such folder, or no tokenizer in it, or it cannot be read.
        DataError: its sentencepiece model cannot be converted faithfully.
    """
    folder = Path(folder).expanduser()
    check_tokenizer_folder(folder, key=key)
    tokenizer = _load_sentencepiece(folder, trust_remote_code) or _load_auto(folder, trust_remote_code, key)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = choose_pad_token(tokenizer)
    return tokenizer


def add_tokens(tokenizer: PreTrainedTokenizerBase, tokens: Sequence[str], special: Sequence[str] = ()) -> int:
    """Give the tokenizer tokens that it lacks, each one token wherever its text stands.

    Args:
        special: left out where a text is decoded without special tokens.

    Returns:
        How many are new.
    """
    from transformers import AddedToken

    made = tokenizer.add_tokens([AddedToken(token, normalized=False) for token in tokens])
    return made + tokenizer.add_tokens([AddedToken(token, normalized=False) for token in special], special_tokens=True)


def check_tokenizer_folder(folder: Path, *, key: str = "model.tokenizer") -> None:
    """Raises ConfigError if there is no such folder, or no tokenizer in it. Reads no file."""
    if not folder.is_dir():
        raise ConfigError(
            f"{key}: no such folder: {str(folder)!r}; expected one with {' or '.join(TOKENIZER_FILES[:2])}"
        )
    if not any((folder / name).is_file() for name in TOKENIZER_FILES):
        raise ConfigError(
            f"{key}: no tokenizer in {str(folder)!r}; expected one of {', '.join(TOKENIZER_FILES)}; "
            "set model.tokenizer to the folder that has it"
        )


def _load_auto(folder: Path, trust_remote_code: bool, key: str) -> PreTrainedTokenizerBase:
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code, local_files_only=True)
    except Exception as error:  # whatever a damaged file provokes deep inside the libraries
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ConfigError(f"{key}: cannot load the tokenizer in {str(folder)!r}: {reason[:300]}") from error


def _load_sentencepiece(folder: Path, trust_remote_code: bool) -> PreTrainedTokenizerBase | None:
    """The tokenizer of ``tokenizer.model``; None where that is not the vocabulary that counts."""
    model_file = folder / "tokenizer.model"
    if not model_file.is_file() or any((folder / name).is_file() for name in ("tokenizer.json", "tekken.json")):
        return None
    settings = _read_json(folder / "tokenizer_config.json")
    if trust_remote_code and "auto_map" in settings:
        return None
    proto = sentencepiece.read_model_proto(model_file)
    if proto is None:
        return None
    spec = proto.trainer_spec
    for name, index in (("bos_token", spec.bos_id), ("eos_token", spec.eos_id), ("unk_token", spec.unk_id)):
        if 0 <= index < len(proto.pieces):
            settings.setdefault(name, proto.pieces[index].piece)
    converted = sentencepiece.convert(proto, model_file)
    sentencepiece.add_special_tokens(
        converted,
        bos=_content(settings.get("bos_token")) if settings.pop("add_bos_token", True) else None,
        eos=_content(settings.get("eos_token")) if settings.pop("add_eos_token", False) else None,
    )
    settings.setdefault("clean_up_tokenization_spaces", False)
    settings["tokenizer_class"] = "PreTrainedTokenizerFast"
    return _assemble(converted, settings, folder)


def _content(token: str | dict[str, Any] | None) -> str | None:
    """The text of a token as tokenizer_config.json has it: text, or an object with flags."""
    return token["content"] if isinstance(token, dict) else token


def _assemble(converted: Tokenizer, settings: dict[str, Any], folder: Path) -> PreTrainedTokenizerBase:
    """Through files, so that chat templates and added tokens are read by transformers and not by us."""
    from transformers import PreTrainedTokenizerFast

    with tempfile.TemporaryDirectory() as name:
        made = Path(name)
        converted.save(str(made / "tokenizer.json"))
        (made / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
        for side in _SIDE_FILES:
            if (folder / side).is_file():
                shutil.copy(folder / side, made / side)
        tokenizer = PreTrainedTokenizerFast.from_pretrained(made, local_files_only=True)
    tokenizer.name_or_path = str(folder)
    tokenizer.init_kwargs.pop("local_files_only", None)  # would be saved with the tokenizer
    tokenizer.vocab_file = str(folder / "tokenizer.model")
    return tokenizer


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ConfigError(f"{path}: not valid JSON: {error}") from None


def choose_pad_token(tokenizer: PreTrainedTokenizerBase) -> str:
    """A token of the vocabulary to pad with, so that no embedding has to be added.

    Padding never reaches the loss or the attention, so any token would train the same. The order only matters
    to programs that later take every pad token for padding: a token meant for it, else the unknown token, and
    the end token last.

    Raises:
        ConfigError: the tokenizer has none of them.
    """
    vocabulary = tokenizer.get_vocab()
    candidates = [token for token in _PAD_TOKENS if token in vocabulary and token != tokenizer.eos_token]
    candidates += [token for token in (tokenizer.unk_token, tokenizer.eos_token) if token is not None]
    if not candidates:
        raise ConfigError(f"model.tokenizer: {tokenizer.name_or_path!r} has no pad, unknown or end token to pad with")
    return candidates[0]
