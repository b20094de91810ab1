"""A run file on the command line, reading YAML strictly, dotted overrides, and pydantic's complaints as one line for
a person."""

from __future__ import annotations

import argparse
import difflib
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from hift_ds.errors import ConfigError, unknown_key

# What users of other tools write -> what it is called here.
SYNONYMS = {
    "model_name_or_path": "model.path",
    "base_model": "model.path",
    "torch_dtype": "model.dtype",
    "tokenizer_name_or_path": "model.tokenizer",
    "flash_attn": "model.attn_implementation",
    "bf16": "model.dtype",
    "fp16": "model.dtype",
    "dataset": "data.train",
    "datasets": "data.train",
    "train_file": "data.train",
    "eval_dataset": "data.eval",
    "validation_file": "data.eval",
    "cutoff_len": "data.max_length",
    "sequence_len": "data.max_length",
    "max_seq_length": "data.max_length",
    "max_seq_len": "data.max_length",
    "chat_template": "data.template",
    "neat_packing": "data.packing",
    "sample_packing": "data.packing",
    "train_on_inputs": "data.train_on_prompt",
    "preprocessing_num_workers": "data.num_workers",
    "val_set_size": "data.val_size",
    "buffer_size": "data.shuffle_buffer",
    "stage": "task",
    "rl": "task",
    "num_train_epochs": "train.epochs",
    "num_epochs": "train.epochs",
    "per_device_train_batch_size": "train.micro_batch_size",
    "batch_size": "train.micro_batch_size",
    "train_micro_batch_size_per_gpu": "train.micro_batch_size",
    "train_batch_size": "train.global_batch_size",
    "per_device_eval_batch_size": "train.eval_batch_size",
    "lr": "train.learning_rate",
    "lr_scheduler_type": "train.lr_scheduler",
    "lr_scheduler_kwargs": "train.lr_scheduler_args",
    "optim": "train.optimizer",
    "optim_args": "train.optimizer_args",
    "gradient_clipping": "train.max_grad_norm",
    "activation_checkpointing": "train.gradient_checkpointing",
    "resume_from_checkpoint": "train.resume",
    "export_dir": "export.dir",
    "ds_config": "deepspeed",
    "deepspeed_config": "deepspeed",
}

_OTHER_TOOLS = {  # by the key that names the model
    "model_name_or_path": ("LLaMA-Factory or TRL", "python -m hift_ds.launch_with"),
    "base_model": ("Axolotl", "its plugins key with hift_ds.integrations.axolotl.HiFTPlugin"),
}

_EXPECTED = {
    "int_type": "a whole number",
    "float_type": "a number",
    "bool_type": "true or false",
    "string_type": "text",
    "dict_type": "keys with values",
    "list_type": "a list",
    "model_type": "keys with values",
    "int_from_float": "a whole number",
}


class _Loader(yaml.SafeLoader):
    """YAML without two surprises: a key given twice is an error, and 1e-5 is a number (YAML 1.1 wants
    1.0e-5)."""


def _unique_mapping(loader: _Loader, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
    seen = set()
    for key_node, _ in node.value:
        if key_node.tag == "tag:yaml.org,2002:merge":  # <<: *anchor, whose keys those of this mapping replace
            continue
        key = loader.construct_object(key_node, deep=True)
        if isinstance(key, str) and key in seen:
            raise yaml.constructor.ConstructorError(None, None, f"key {key!r} is given twice", key_node.start_mark)
        seen.add(key if isinstance(key, str) else None)
    return yaml.SafeLoader.construct_mapping(loader, node, deep)


_Loader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _unique_mapping)
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?[0-9][0-9_]*(\.[0-9_]*)?[eE][-+]?[0-9]+$"),
    list("-+0123456789"),
)


def add_run_file(parser: argparse.ArgumentParser, *, optional: bool = False) -> None:
    """Add the arguments ``run_file`` and ``overrides`` of a command; :func:`~hift_ds.train.run_config.load_run_config`
    takes both."""
    parser.add_argument(
        "run_file", nargs="?" if optional else None, metavar="RUN.yaml",
        help="a run file, or the name of one in the package" + ("; every setting is taken from it" if optional else ""),
    )  # fmt: skip
    parser.add_argument(
        "overrides", nargs="*", default=[], metavar="section.key=value",
        help="over the run file's, such as train.max_steps=100",
    )  # fmt: skip


def read_yaml(file: Path) -> dict[str, Any]:
    """The mapping in a YAML file.

    Raises:
        ConfigError: there is no such file, or it holds no mapping; names the line.
    """
    try:
        content = yaml.load(file.read_text(encoding="utf-8"), _Loader)  # noqa: S506 - a SafeLoader
    except FileNotFoundError:
        raise ConfigError(f"no such run file: {str(file)!r}") from None
    except UnicodeDecodeError:
        raise ConfigError(f"cannot read run file {str(file)!r}: it is not text in UTF-8; save it as that") from None
    except OSError as error:
        raise ConfigError(f"cannot read run file {str(file)!r}: {error}") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{file}{_line(error)}: not valid YAML: {_problem(error)}") from None
    if not isinstance(content, dict):
        given = "an empty file" if content is None else "a list" if isinstance(content, list) else f"{content!r:.60}"
        raise ConfigError(f"{file}: expected sections model, data, train, got {given}")
    return content


def refuse_other_tools(content: Mapping[str, Any], file: Path) -> None:
    """Refuse a run file of another program, told by a key that names its model.

    Raises:
        ConfigError: names the program, how its file is trained with HiFT as it is, and what its keys are called here.
    """
    for key, (tool, how) in _OTHER_TOOLS.items():
        if key in content and "model" not in content:
            ours = [f"{name}: {SYNONYMS[name]}" for name in content if name in SYNONYMS]
            raise ConfigError(
                f"{file}: this looks like a file of {tool}, which {how} trains as it is (docs/other_tools.md); "
                f"here its keys are called {', '.join(ours)}"
            )


def apply_overrides(content: dict[str, Any], overrides: Iterable[str]) -> dict[str, str]:
    """Set ``section.key=value`` in ``content``.

    Returns:
        Dotted key -> the override that sets it, for messages.

    Raises:
        ConfigError: not of that form, or the value is not YAML.
    """
    origin = {}
    for override in overrides:
        key, equals, text = override.partition("=")
        parts = key.split(".")
        if not equals or not all(parts):
            raise ConfigError(f"override {override!r}: expected section.key=value, such as train.learning_rate=1e-5")
        try:
            value = yaml.load(text, _Loader)  # noqa: S506 - a SafeLoader
        except yaml.YAMLError as error:
            raise ConfigError(f"override {override!r}: the value is not valid YAML: {_problem(error)}") from None
        place = content
        for index, part in enumerate(parts[:-1]):
            below = place.get(part)
            if below is None or (index == 0 and below is False):
                below = place[part] = {}
            if not isinstance(below, dict):
                raise ConfigError(
                    f"override {override!r}: {'.'.join(parts[: index + 1])} is {below!r}, which has no keys"
                )
            place = below
        place[parts[-1]] = value
        origin[key] = override
    return origin


def explain(error: ValidationError, model: type[BaseModel], file: Path, overridden: Mapping[str, str]) -> ConfigError:
    """The first complaint of pydantic as one line: where, key, what was given, what is expected."""
    first = error.errors()[0]
    path = [str(part) for part in first["loc"] if part in _names(model) or isinstance(part, int)]
    key = ".".join(path)
    where = f"override {overridden[key]!r}" if key in overridden else str(file)
    kind, given = first["type"], first["input"]
    if kind == "extra_forbidden":
        name = str(first["loc"][-1])
        section = [str(part) for part in first["loc"][:-1]]
        full = ".".join([*section, name])
        where = f"override {overridden[full]!r}" if full in overridden else str(file)
        return _unknown(name, section, model, where)
    if kind == "missing":
        return ConfigError(f"{file}: {key}: this key is required")
    if kind == "value_error":
        message = first["msg"].removeprefix("Value error, ")
        if not key or message.startswith(
            (f"{key}:", f"{key}.")
        ):  # parts with a check of their own name the key themselves
            return ConfigError(f"{where}: {message}")
        return ConfigError(f"{where}: {key}: {message.removeprefix(key.rpartition('.')[2] + ': ')}")
    return ConfigError(f"{where}: {key}: expected {_expected(first)}, got {given!r}")


def _unknown(name: str, section: list[str], model: type[BaseModel], where: str) -> ConfigError:
    known = _fields_of(model, section)
    place = ".".join(section)
    if difflib.get_close_matches(name, known, n=1, cutoff=0.75):
        return unknown_key(name, known, f"{where}: {place}" if place else where)
    everywhere = dict(_all_keys(model))
    if name in SYNONYMS:
        right = SYNONYMS[name]
    elif name in everywhere:
        right = everywhere[name]
    else:
        return unknown_key(name, known, f"{where}: {place}" if place else where)
    return ConfigError(f"{where}: unknown key {'.'.join([*section, name])!r}; did you mean {right!r}?")


def _expected(error: Mapping[str, Any]) -> str:
    kind, context = error["type"], error.get("ctx", {})
    if kind == "literal_error":
        return f"one of {context['expected']}".replace("'", "").replace(" or ", ", ")
    for bound, sign in (("ge", ">="), ("gt", ">"), ("le", "<="), ("lt", "<")):
        if bound in context:
            return f"a number {sign} {context[bound]:g}"
    return _EXPECTED.get(kind, error["msg"][0].lower() + error["msg"][1:])


def _fields_of(model: type[BaseModel], section: list[str]) -> list[str]:
    for name in section:
        annotation = model.model_fields[name].annotation
        assert isinstance(annotation, type) and issubclass(annotation, BaseModel)
        model = annotation
    return list(model.model_fields)


def _all_keys(model: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, str]]:
    for name, info in model.model_fields.items():
        yield name, prefix + name
        if isinstance(info.annotation, type) and issubclass(info.annotation, BaseModel):
            yield from _all_keys(info.annotation, f"{prefix}{name}.")


def _names(model: type[BaseModel]) -> set[str]:
    return {name for name, _ in _all_keys(model)}


def _line(error: yaml.YAMLError) -> str:
    mark = getattr(error, "problem_mark", None)
    return f", line {mark.line + 1}" if mark is not None else ""


def _problem(error: yaml.YAMLError) -> str:
    return " ".join(str(getattr(error, "problem", None) or error).split())
