"""What can be known of a model folder before any weight is loaded: is it whole, and what is in it."""

from __future__ import annotations

import errno
import json
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hift_ds.dtypes import TORCH_NAMES, Dtype, short_name, torch_name
from hift_ds.errors import CheckpointError, ConfigError
from hift_ds.hf.safetensors_folder import check_weights

HUB = "hub:"
CANNOT_WRITE = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT, errno.ENOTDIR)
"""What a folder that cannot be written answers, by the system's numbers."""
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
# What a model needs from the Hub; code only if the user trusts it, pickled weights never.
_HUB_FILES = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]
# Where configs keep the longest sequence, in order of trust.
_LENGTH_KEYS = ("max_position_embeddings", "n_positions", "max_sequence_length", "max_seq_len", "n_ctx")
# Their positions are counted from pad_token_id + 1, so that the first rows of the table are never used.
_POSITIONS_BEHIND_PADDING = {
    "camembert", "data2vec-text", "roberta", "roberta-prelayernorm", "xlm-roberta", "xlm-roberta-xl", "xmod",
}  # fmt: skip
# Encoders, unless the config says is_decoder: every token would see those that it should predict.
_DECODERS_ON_REQUEST = {
    "bert", "bert-generation", "big_bird", "electra", "ernie", "megatron-bert", "reformer", "rembert", "roc_bert",
    "roformer", *_POSITIONS_BEHIND_PADDING,
}  # fmt: skip
# Their causal classes compare the logits of a token with the label of that same token: what is learned is to
# repeat the input. Most are the decoders of sequence-to-sequence models, whose labels come shifted.
_LABELS_NOT_SHIFTED = {
    "bart", "bigbird_pegasus", "blenderbot", "blenderbot-small", "cpmant", "gemma4_assistant",
    "gemma4_unified_assistant", "marian", "mbart", "musicgen",
    "musicgen_melody", "mvp", "pegasus", "plbart", "prophetnet", "trocr", "whisper", "xlm", "xlnet",
}  # fmt: skip


@dataclass(frozen=True)
class ModelFolder:
    """A checked checkpoint in Hugging Face's layout.

    Attributes:
        config: the contents of config.json.
        dtype: of most weights: fp32, bf16 or fp16.
        numel: of all tensors in the files; tied ones are usually stored once.
        weight_bytes: size of the files' tensors.
        max_length: tokens of the longest sequence that the positions allow; None where nothing limits it.
        vocab_size: rows of the embedding, by the config.
    """

    path: Path
    config: Mapping[str, Any] = field(repr=False)
    dtype: Dtype
    numel: int
    weight_bytes: int
    max_length: int | None
    vocab_size: int | None


def resolve_model(path: str, *, key: str = "model.path", trust_remote_code: bool = False) -> Path:
    """The local folder of a model: ``path`` itself, or what is downloaded for a Hub name.

    The network is used only if ``path`` is written ``hub:owner/name``, or reads ``owner/name`` while neither
    that folder nor the folder ``owner`` exists here. Pickled weights are never downloaded.

    Raises:
        ConfigError: no such folder, or the Hub does not give it.
    """
    local = Path(path).expanduser()
    if local.exists():
        return local
    name = path.removeprefix(HUB)
    on_hub = path.startswith(HUB) or (_HUB_ID.fullmatch(path) is not None and not local.parent.exists())
    if not on_hub:
        hint = "" if local.is_absolute() else f"; for a model of the Hugging Face Hub write {HUB}owner/name"
        raise ConfigError(f"{key}: no such folder: {path!r}{hint}")
    from huggingface_hub import snapshot_download

    patterns = [*_HUB_FILES, "*.py"] if trust_remote_code else _HUB_FILES
    try:
        return Path(snapshot_download(name, allow_patterns=patterns))
    except Exception as error:
        if isinstance(error, OSError) and error.errno in CANNOT_WRITE:
            raise ConfigError(
                f"{key}: the cache of the Hugging Face Hub cannot be written: {error}; set the environment variable "
                "HF_HOME to a folder that can"
            ) from error
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ConfigError(
            f"{key}: {path!r} is not a folder here, and the Hugging Face Hub does not give it: {reason[:200]}"
        ) from error


def check_model_folder(
    path: str | Path,
    *,
    key: str = "model.path",
    trust_remote_code: bool = False,
    auto_class: str = "AutoModelForCausalLM",
) -> ModelFolder:
    """Read config.json and the headers of the weight files, nothing more.

    Args:
        path: a local folder; see :func:`resolve_model`.
        key: of the run file, for messages.
        auto_class: of transformers, which is to make the model. Any but the default may give it a new head.

    Raises:
        ConfigError: it is no model folder, or not of a model that ``auto_class`` can make.
        CheckpointError: weights are missing, pickled, quantized, truncated, or do not match their index.
    """
    folder = Path(path).expanduser()
    if folder.suffix == ".gguf" and folder.is_file():
        raise _gguf(key, folder.parent, folder.name)
    if not folder.is_dir():
        raise ConfigError(f"{key}: no such folder: {str(path)!r}")
    config = read_config_json(folder, key)
    _check_architecture(config, folder, key, trust_remote_code, auto_class)
    tensors = check_weights(folder)
    numel_by_dtype: Counter[str] = Counter()
    for tensor in tensors.values():
        numel_by_dtype[torch_name(tensor.dtype)] += tensor.numel
    return ModelFolder(
        path=folder,
        config=config,
        dtype=_main_dtype(numel_by_dtype, folder),
        numel=sum(tensor.numel for tensor in tensors.values()),
        weight_bytes=sum(tensor.numel * tensor.dtype.itemsize for tensor in tensors.values()),
        max_length=max_sequence_length(config),
        vocab_size=_text_config(config).get("vocab_size"),
    )


def classes_by_model_type(auto_class: str) -> Mapping[str, Any]:
    """What an ``Auto...`` class of transformers can make: model_type -> the class's name, or several."""
    from transformers.models.auto import modeling_auto

    names = {
        "AutoModelForCausalLM": "CAUSAL_LM",
        "AutoModelForSeq2SeqLM": "SEQ_TO_SEQ_CAUSAL_LM",
        "AutoModelForSequenceClassification": "SEQUENCE_CLASSIFICATION",
        "AutoModelForTokenClassification": "TOKEN_CLASSIFICATION",
        "AutoModelForQuestionAnswering": "QUESTION_ANSWERING",
    }
    return getattr(modeling_auto, f"MODEL_FOR_{names[auto_class]}_MAPPING_NAMES")


def max_sequence_length(config: Mapping[str, Any]) -> int | None:
    """Tokens of the longest sequence that the model's positions allow; None where nothing limits it."""
    text = _text_config(config)
    limits = [text[key] for key in _LENGTH_KEYS if isinstance(text.get(key), int) and text[key] > 0]
    if not limits:
        limits = _default_length(text.get("model_type"))
    if not limits:
        return None
    if text.get("model_type") in _POSITIONS_BEHIND_PADDING:
        padding = text.get("pad_token_id")
        return limits[0] - (1 if padding is None else padding) - 1
    scaling = text.get("rope_scaling") or text.get("rope_parameters") or {}
    original, factor = scaling.get("original_max_position_embeddings"), scaling.get("factor")
    if original and factor and limits[0] <= original:  # otherwise the limit is the stretched one already
        return int(original * factor)
    return limits[0]


def _default_length(model_type: Any) -> list[int]:
    """What transformers takes where config.json says nothing; empty if it knows no limit either."""
    from transformers import CONFIG_MAPPING

    if model_type not in CONFIG_MAPPING:
        return []
    default = CONFIG_MAPPING[model_type]()
    found = [getattr(default, key, None) for key in _LENGTH_KEYS]
    return [length for length in found if isinstance(length, int) and length > 0]


def read_config_json(folder: Path, key: str = "model.path") -> dict[str, Any]:
    """The contents of config.json.

    Raises:
        ConfigError: it is missing (GGUF files and LoRA adapters are told what to do) or damaged.
    """
    file = folder / "config.json"
    if file.is_file():
        try:
            config = json.loads(file.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ConfigError(f"{file}: not valid JSON: {error}") from None
        if not isinstance(config, dict):
            raise ConfigError(f"{file}: expected an object, got {type(config).__name__}")
        return config
    gguf = sorted(folder.glob("*.gguf"))
    if gguf:
        raise _gguf(key, folder, gguf[0].name)
    if (folder / "adapter_config.json").is_file():
        raise ConfigError(
            f"{key}: {str(folder)!r} is a LoRA adapter; merge it into its base model and give that folder"
        )
    raise ConfigError(f"{key}: no config.json in {str(folder)!r}; expected a model folder in Hugging Face's layout")


def _check_architecture(
    config: Mapping[str, Any], folder: Path, key: str, trust_remote_code: bool, auto_class: str
) -> None:
    if (folder / "adapter_config.json").is_file():
        raise ConfigError(
            f"{key}: {str(folder)!r} holds an adapter beside the model (adapter_config.json), which transformers would "
            "load over the model that it names, where PEFT is installed; remove the adapter's files, or merge it and "
            "give the folder of the result"
        )
    model_type, known = config.get("model_type"), classes_by_model_type(auto_class)
    if "auto_map" in config and model_type not in known:
        if not trust_remote_code:
            raise ConfigError(
                f"{key}: {str(folder)!r} brings its own Python code; set model.trust_remote_code: true if you trust it"
            )
    elif model_type not in known:
        what = "is no causal language model that transformers knows"
        if auto_class != "AutoModelForCausalLM":
            what = f"has no {auto_class.removeprefix('AutoModelFor')} model in transformers"
        raise ConfigError(f"{key}: model_type {model_type!r} in {str(folder / 'config.json')!r} {what}")
    elif auto_class == "AutoModelForCausalLM":
        _check_class(config, folder, key)
    if config.get("quantization_config"):
        method = config["quantization_config"].get("quant_method", "quantized")
        raise CheckpointError(
            f"{key}: {str(folder)!r} has {method} weights, which cannot be trained; use the unquantized model"
        )


def _check_class(config: Mapping[str, Any], folder: Path, key: str) -> None:
    """See that the weights are of a causal language model, and not of another head or an encoder."""
    model_type, names = config["model_type"], config.get("architectures") or []
    reason = None
    if names and not any(_is_causal(name, config) for name in names):
        reason = f"is a {names[0]}"
    elif model_type in _DECODERS_ON_REQUEST and not config.get("is_decoder"):
        reason = f"is an encoder ({model_type} without is_decoder: true), whose tokens see those that follow"
    elif model_type in _LABELS_NOT_SHIFTED:
        reason = f"is of type {model_type}, which transformers does not train to predict the next token"
    if reason is not None:
        raise ConfigError(
            f"{key}: {str(folder)!r} {reason}; expected a causal language model (for other models: "
            "hift_ds.HiFTTrainer in a script of your own)"
        )


def _is_causal(name: str, config: Mapping[str, Any]) -> bool:
    """Whether a class, as config.json names it, predicts the next token."""
    import transformers
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    own_code = (config.get("auto_map") or {}).get("AutoModelForCausalLM", "")
    if name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values() or name == own_code.rpartition(".")[2]:
        return True
    if name.endswith("ForConditionalGeneration") and not config.get("is_encoder_decoder"):
        return isinstance(config.get("text_config"), Mapping)  # texts alone, to a model that also takes images
    if hasattr(transformers, name):
        return False
    # Of no class here: older spellings (LLaMAForCausalLM), and models of somebody's own.
    return re.search(r"CausalLM|LMHead", name) is not None or re.search(r"For[A-Z]|Model$", name) is None


def _gguf(key: str, folder: Path, name: str) -> ConfigError:
    return ConfigError(
        f"{key}: {name!r} is a GGUF file; rebuild a safetensors folder from it: python -c "
        '"from transformers import AutoModelForCausalLM as M, AutoTokenizer as T; '
        f"[c.from_pretrained('{folder}', gguf_file='{name}').save_pretrained('{folder}-safetensors') for c in (M, T)]\""
    )


def _main_dtype(numel_by_dtype: Counter[str], folder: Path) -> Dtype:
    main = numel_by_dtype.most_common(1)[0][0] if numel_by_dtype else "nothing"
    name = short_name(main)
    if name is None:
        raise CheckpointError(
            f"{folder}: most weights are stored as {main}, expected {', '.join(TORCH_NAMES.values())}; use an "
            "unquantized model"
        )
    return name


def _text_config(config: Mapping[str, Any]) -> Mapping[str, Any]:
    nested = config.get("text_config")
    return {**config, **nested} if isinstance(nested, Mapping) else config
