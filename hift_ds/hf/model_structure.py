"""The structure of a model without its weights: from a ``config.json``, a hub name or a size in the zoo."""

from __future__ import annotations

import difflib
import json
import re
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import huggingface_hub
import torch
import transformers
from transformers import CONFIG_MAPPING, AutoConfig, PretrainedConfig, PreTrainedModel

from hift_ds.errors import ConfigError
from hift_ds.hf.model_folder import classes_by_model_type
from hift_ds.hf.weight_names import zero_init_set_aside

HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
CONFIG_FILE = "config.json"
MAX_REASON = 300  # characters of another library's message worth repeating


def read_config(source: str, *, trust_remote_code: bool = False) -> PretrainedConfig:
    """The config that ``source`` names; the network is asked for a hub name only.

    Args:
        source: a folder with a ``config.json`` (or that file), else a size of ``model_zoo``, else a hub name
            ``owner/name``.
        trust_remote_code: run the code that the checkpoint brings along.

    Raises:
        ConfigError: it is none of these, or transformers cannot make a config of it.
    """
    path = Path(source).expanduser()
    if path.exists():
        file = path / CONFIG_FILE if path.is_dir() else path
        _check_config_file(file, trust_remote_code)
        return _auto_config(str(path), trust_remote_code, local_files_only=True)

    import model_zoo

    if source in model_zoo.SIZES:
        return model_zoo.config(source)
    if HUB_NAME.fullmatch(source) and not Path(source).parent.exists():
        return _auto_config(source, trust_remote_code, local_files_only=False)
    near = difflib.get_close_matches(source, model_zoo.SIZES, n=1) or ["llama2_7b"]
    raise ConfigError(
        f"{source}: no such folder; expected a folder with a {CONFIG_FILE}, a hub name owner/name, "
        f"or a size of the zoo such as {near[0]}"
    )


def read_task_config(source: str, auto_class: str, *, trust_remote_code: bool = False) -> PretrainedConfig:
    """The config that :func:`read_config` gives, with ``architectures`` naming what ``auto_class`` of transformers
    makes of it, whatever head the weights have; for ``AutoModelForCausalLM`` what the config itself names."""
    config = read_config(source, trust_remote_code=trust_remote_code)
    if auto_class != "AutoModelForCausalLM":
        name = classes_by_model_type(auto_class)[config.model_type]
        config.architectures = [name] if isinstance(name, str) else list(name[:1])
    return config


def is_zoo_size(name: str) -> bool:
    """Whether :func:`read_config` has a config of that name without a folder or the network."""
    import model_zoo

    return name in model_zoo.SIZES


def configs_with_cache(config: PretrainedConfig) -> list[PretrainedConfig]:
    """The config of a model and those inside it, as far as they have ``use_cache``."""
    parts: list[Any] = [config, *(getattr(config, name, None) for name in getattr(config, "sub_configs", None) or ())]
    return [part for part in parts if hasattr(part, "use_cache")]


def turn_cache_off(config: PretrainedConfig) -> Callable[[], None]:
    """Set ``use_cache`` to False in a config and in those inside it (multimodal ones keep it for the text only).

    Training reads no cache of keys and values; making one takes memory.

    Returns:
        A function that restores what was set.
    """
    had_one = hasattr(config, "use_cache")
    before = [(part, part.use_cache) for part in configs_with_cache(config)]
    for part, _ in before:
        part.use_cache = False

    def restore() -> None:
        for part, value in before:
            part.use_cache = value
        if not had_one and hasattr(config, "use_cache"):
            del config.use_cache  # set by transformers' Trainer

    return restore


def build_on_meta(config: PretrainedConfig, *, trust_remote_code: bool = False) -> PreTrainedModel:
    """The model that ``config.architectures`` names, its parameters on ``meta``: shapes and ties, no memory.

    Without ``architectures``: the model with a language head if transformers has one, else the bare model.

    Raises:
        ConfigError: the model's constructor refuses the config.
    """
    with warnings.catch_warnings(), quiet_hugging_face(), zero_init_set_aside(), torch.device("meta"):
        warnings.simplefilter("ignore")
        try:
            if trust_remote_code and (auto_class := _remote_auto_class(config)):
                model = auto_class.from_config(config, trust_remote_code=True)
            else:
                model = _model_class(config)(config)
            model.tie_weights()  # transformers 5.0 leaves it out on meta
            return model
        except ConfigError:
            raise
        except Exception as error:  # whatever a constructor out of our reach raises, the config is the cause
            raise ConfigError(f"transformers cannot build a {config.model_type} of this config: {error}") from error


@contextmanager
def quiet_hugging_face() -> Iterator[None]:
    """Keeps the notices of transformers and of its hub client off the terminal; what fails still raises."""
    logs = (transformers.logging, huggingface_hub.logging)
    before = [log.get_verbosity() for log in logs]
    for log in logs:
        log.set_verbosity_error()
    try:
        yield
    finally:
        for log, verbosity in zip(logs, before, strict=True):
            log.set_verbosity(verbosity)


def _check_config_file(file: Path, trust_remote_code: bool) -> None:
    """Says in our words what is wrong with a config file before transformers does in many."""
    if not file.is_file():
        raise ConfigError(f"{file.parent}: there is no {CONFIG_FILE} in this folder")
    try:
        entries: Any = json.loads(file.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{file}: not JSON: {error}") from None
    model_type = entries.get("model_type") if isinstance(entries, dict) else None
    if not isinstance(model_type, str):
        raise ConfigError(f'{file}: has no "model_type", so that it is no transformers config')
    if model_type in CONFIG_MAPPING or (entries.get("auto_map") and trust_remote_code):
        return
    hint = "; its own code is run only with --trust-remote-code" if entries.get("auto_map") else ""
    raise ConfigError(
        f'{file}: "model_type" {model_type!r} is unknown to transformers {transformers.__version__}{hint}'
    )


def _auto_config(name: str, trust_remote_code: bool, *, local_files_only: bool) -> PretrainedConfig:
    try:
        with quiet_hugging_face():
            return AutoConfig.from_pretrained(
                name, trust_remote_code=trust_remote_code, local_files_only=local_files_only
            )
    except Exception as error:  # OSError, ValueError, KeyError, validation errors of many kinds
        reason = " ".join(str(error).split())[:MAX_REASON] or type(error).__name__
        where = name if local_files_only else f"{name}: no such folder, and as a hub name"
        raise ConfigError(f"{where}: transformers cannot read its config: {reason}") from error


def _remote_auto_class(config: PretrainedConfig) -> Any:
    """The ``Auto...`` class under which a checkpoint registers a model of its own, if it does."""
    keys = getattr(config, "auto_map", None) or {}
    return next((getattr(transformers, key, None) for key in keys if key.startswith("AutoModel")), None)


def _model_class(config: PretrainedConfig) -> type[PreTrainedModel]:
    named = getattr(transformers, (config.architectures or [""])[0], None)
    if isinstance(named, type) and issubclass(named, PreTrainedModel):
        return named
    for mapping in (
        transformers.MODEL_FOR_CAUSAL_LM_MAPPING,
        transformers.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING,
        transformers.MODEL_MAPPING,
    ):
        if type(config) in mapping:
            found = mapping[type(config)]
            return cast("type[PreTrainedModel]", found[0] if isinstance(found, tuple) else found)
    raise ConfigError(f"transformers has no model for a {config.model_type} config")
