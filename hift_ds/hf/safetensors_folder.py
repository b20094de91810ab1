"""Hugging Face safetensors folders: check, read, load. Writing them is in :mod:`hift_ds.hf.export`, comparing two of
them in :mod:`hift_ds.hf.weight_distances`.

Loading a model is transformers' own work: ``from_pretrained`` maps the files (no copy at all when the dtype
stays, one weight in flight when it changes), so :func:`load_pretrained` only adds what it lacks: damaged or
missing files named before a model is built, and a weight that would silently be initialised at random turned
into an error. :func:`stream_weights` gives the same weights to a model that exists already, one conversion
set at a time.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open

from hift_ds.dtypes import CODES, from_safetensors
from hift_ds.errors import CheckpointError
from hift_ds.hf.weight_names import plan_load
from hift_ds.layers.arch import whole_shape

if TYPE_CHECKING:
    from transformers import PreTrainedModel

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"


@dataclass(frozen=True)
class TensorHeader:
    """What a safetensors file says about one tensor without reading it."""

    file: Path
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def numel(self) -> int:
        """The number of elements."""
        return math.prod(self.shape)

    def on_meta(self) -> torch.Tensor:
        """A tensor of this shape and dtype without memory."""
        return torch.empty(self.shape, dtype=self.dtype, device="meta")


def check_weights(folder: str | Path) -> dict[str, TensorHeader]:
    """Every tensor of a Hugging Face folder, from the files' headers alone: fast, whatever the size.

    Raises:
        CheckpointError: no such folder, no safetensors in it (a pickled checkpoint is refused with the way to
            convert it), a file of the index that is missing or truncated, or an index that does not match its
            files.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise CheckpointError(f"model folder {str(folder)!r} does not exist")
    index = folder / INDEX_FILE
    if (folder / SINGLE_FILE).is_file():
        return _read_headers(folder / SINGLE_FILE)
    if not index.is_file():
        raise _no_weights(folder)

    try:
        weight_map: dict[str, str] = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError) as error:
        raise CheckpointError(f"{index}: not a safetensors index ({type(error).__name__}: {error})") from None
    headers: dict[str, TensorHeader] = {}
    for file_name in sorted(set(weight_map.values())):
        if Path(file_name).is_absolute() or ".." in Path(file_name).parts:
            raise CheckpointError(f"{index}: names {file_name!r}, outside of the folder; fetch the folder again")
        if not (folder / file_name).is_file():
            raise CheckpointError(f"{folder / file_name} is missing; {INDEX_FILE} names it")
        headers |= _read_headers(folder / file_name)
    for name, file_name in weight_map.items():
        if name not in headers or headers[name].file != folder / file_name:
            raise CheckpointError(f"{folder / file_name} lacks tensor {name!r}, which {INDEX_FILE} places there")
    return headers


def tensor_dtypes(folder: str | Path) -> dict[str, torch.dtype]:
    """Each tensor's dtype by its name in the checkpoint; what ``export_model(dtype=...)`` takes."""
    return {name: header.dtype for name, header in check_weights(folder).items()}


class SafetensorsFolder:
    """The tensors of a Hugging Face folder by name, each mapped from disk when it is asked for.

    Raises:
        CheckpointError: see :func:`check_weights`.
    """

    def __init__(self, folder: str | Path) -> None:
        self.headers = check_weights(folder)
        self._open: dict[Path, Any] = {}

    def tensor(self, name: str) -> torch.Tensor:
        """The tensor, read from its file: of the shape and dtype in its header, on the host."""
        file = self.headers[name].file
        if file not in self._open:
            self._open[file] = safe_open(str(file), framework="pt")
        return self._open[file].get_tensor(name)


def stream_weights(
    model: PreTrainedModel,
    folder: str | Path,
    *,
    convert: bool = True,
    new: Collection[str] = (),
    unused: Collection[str] = (),
) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield (name in memory, tensor) for every weight of ``model`` in ``folder``, converted as transformers
    does.

    Only the tensors of one conversion (one weight, or the experts of one block) are materialised at a time,
    in the checkpoint's dtype. A tied weight comes once, under the name the checkpoint has.

    Args:
        convert: False: a weight made of several tensors comes on the meta device, without values; for ranks
            that get it from one that converts, so that not every rank holds the set.
        new: names in memory that the folder need not have; from :func:`head_of`.
        unused: tensors of the folder that are left aside; from :func:`head_of`.

    Raises:
        CheckpointError: the checkpoint has a tensor the model does not know, lacks one that it needs, or has
            one of another shape; names file and tensor.
    """
    source_folder = SafetensorsFolder(folder)
    headers = source_folder.headers
    tensors = model.state_dict(keep_vars=True)
    ignored = _not_expected(model)
    given: set[str] = set(new)
    for conversion in plan_load(model, headers):
        if unused and conversion.sources[0] in unused:
            continue
        if conversion.first_name not in tensors:
            if any(pattern.search(conversion.first_name) for pattern in ignored):
                continue
            source = conversion.sources[0]
            raise CheckpointError(
                f"{headers[source].file}: tensor {source!r} has no place in {type(model).__name__}; "
                "is this the checkpoint of another model?"
            )
        if convert or conversion.is_plain:
            sources = {source: source_folder.tensor(source) for source in conversion.sources}
        else:
            sources = {source: headers[source].on_meta() for source in conversion.sources}
        try:
            converted = conversion.convert(model, sources)
        except (RuntimeError, ValueError, KeyError) as error:
            raise CheckpointError(
                f"{headers[conversion.sources[0]].file}: tensors {conversion.sources[0]!r}, ... "
                f"do not make {conversion.first_name!r} ({error})"
            ) from error
        for name, tensor in converted.items():
            expected = whole_shape(tensors[name])
            if tuple(tensor.shape) != expected:
                raise CheckpointError(
                    f"{headers[conversion.sources[0]].file}: tensor {conversion.sources[0]!r} gives {name!r} the shape "
                    f"{tuple(tensor.shape)}, the model expects {expected}"
                )
            given.add(name)
            yield name, tensor
    _check_complete(model, tensors, given, folder)


@torch.no_grad()
def note_filled(
    filled: dict[int, str],
    target: torch.Tensor,
    name: str,
    folder: str | Path,
    there: torch.Tensor,
    values: torch.Tensor,
) -> None:
    """Note in ``filled`` (id of a weight -> name that filled it) that ``name`` fills ``target``.

    Args:
        there: the part of ``target`` that this rank has; any shape, device and dtype.
        values: what goes there, of the same shape.

    Raises:
        CheckpointError: another name has filled it, since the model ties the two, with other values.
    """
    if id(target) in filled and not torch.equal(there, values.to(there.device, there.dtype)):
        raise CheckpointError(
            f"{folder}: {filled[id(target)]!r} and {name!r} differ, but the model ties them; "
            "set tie_word_embeddings to false in its config.json"
        )
    filled[id(target)] = name


def load_pretrained(
    folder: str | Path,
    *,
    dtype: torch.dtype | str = "auto",
    model_class: Any = None,
    device: torch.device | str | None = None,
    allow_missing: Sequence[str] = (),
    allow_unexpected: Sequence[str] = (),
    trust_remote_code: bool = False,
    **from_pretrained: Any,
) -> PreTrainedModel:
    """``from_pretrained`` of a local safetensors folder that fails where it would go on with random weights.

    Args:
        dtype: of the parameters in memory; "auto" keeps the checkpoint's, and then the weights stay mapped
            from disk and cost no memory until they are changed.
        model_class: ``AutoModelForCausalLM`` by default.
        device: put the weights there directly.
        allow_missing: patterns (``re.search``) of weights that may be absent and start at random: a new head.
        allow_unexpected: patterns of checkpoint tensors that may go unused: the old head.
        from_pretrained: passed on, for example ``attn_implementation``.

    Raises:
        CheckpointError: damaged files, and missing, unexpected or misshapen weights.
    """
    from transformers import AutoModelForCausalLM

    if device is not None:
        from_pretrained["device_map"] = {"": device}
    model, info = _from_pretrained(
        folder,
        model_class or AutoModelForCausalLM,
        dtype=dtype,
        trust_remote_code=trust_remote_code,
        **from_pretrained,
    )
    for name, found, expected in sorted(info["mismatched_keys"]):
        if not _matches(name, allow_missing):
            raise CheckpointError(
                f"{folder}: {name!r} has shape {tuple(found)}, {type(model).__name__} expects {tuple(expected)}"
            )
    _refuse(info["missing_keys"], allow_missing, f"{folder} lacks", f"of {type(model).__name__}")
    _refuse(info["unexpected_keys"], allow_unexpected, f"{folder} has", f"unknown to {type(model).__name__}")
    return model


def load_pretrained_with_head(
    folder: str | Path, model_class: Any, **options: Any
) -> tuple[PreTrainedModel, list[str], list[str]]:
    """Load as :func:`load_pretrained` does, for a task: what lies below the model's head must be there, the head and a
    pooler may be new, and another head in the folder is left aside.

    Args:
        model_class: an ``Auto...`` class of transformers.
        options: ``dtype``, and what ``from_pretrained`` takes, entries of the config such as ``num_labels`` among it.
            New weights are drawn from the global generators.

    Returns:
        The model, the names of its new weights, the names of tensors of the folder that it does not use.

    Raises:
        CheckpointError: damaged files, or a weight below the head that is missing, unexpected or misshapen.
    """
    model, info = _from_pretrained(folder, model_class, **options)
    sized = [name for name, *_ in info["mismatched_keys"]]
    _refuse_below_head(model, folder, info["missing_keys"], info["unexpected_keys"], sized)
    return model, sorted({*info["missing_keys"], *sized}), sorted(info["unexpected_keys"])


def head_of(model: PreTrainedModel, folder: str | Path) -> tuple[list[str], list[str]]:
    """What :func:`load_pretrained_with_head` would find, from names and shapes alone.

    Args:
        model: on any device, meta included; not partitioned.

    Returns:
        The names of weights that ``folder`` lacks or has in another shape, the names of its tensors that have no place.

    Raises:
        CheckpointError: as :func:`load_pretrained_with_head`.
    """
    headers, tensors = check_weights(folder), model.state_dict(keep_vars=True)
    ignored = _not_expected(model)
    filled: set[int] = set()
    unused, sized = [], {}
    for conversion in plan_load(model, headers):
        name, source = conversion.first_name, conversion.sources[0]
        if name not in tensors:
            unused += [] if any(pattern.search(name) for pattern in ignored) else [source]
        elif conversion.is_plain and headers[source].shape != tuple(tensors[name].shape):
            sized[name] = source
        else:
            made = conversion.convert(model, {source: headers[source].on_meta() for source in conversion.sources})
            filled |= {id(tensors[name]) for name in made}
    may_lack = _patterns(getattr(model, "_keys_to_ignore_on_load_missing", None))
    missing = [
        name
        for name, tensor in tensors.items()
        if name not in sized and id(tensor) not in filled and not any(pattern.search(name) for pattern in may_lack)
    ]
    _refuse_below_head(model, folder, missing, unused, list(sized))
    return sorted({*missing, *sized}), sorted({*unused, *sized.values()})


def _refuse_below_head(
    model: PreTrainedModel, folder: str | Path, missing: Iterable[str], unexpected: Iterable[str], sized: Iterable[str]
) -> None:
    is_head = _tells_head(model)
    of_model = type(model).__name__
    _refuse([n for n in missing if not is_head(n)], (), f"{folder} lacks", f"of {of_model}")
    _refuse([n for n in unexpected if not is_head(n)], (), f"{folder} has", f"unknown to {of_model}")
    _refuse([n for n in sized if not is_head(n)], (), f"{folder} has another shape of", f"in {of_model}")


def _tells_head(model: PreTrainedModel) -> Callable[[str], bool]:
    """Whether a name is of a head or a pooler, which may be new."""
    below = f"{model.base_model_prefix}."
    base = getattr(model, model.base_model_prefix, model)
    # Folders without a head of their own name weights without the prefix.
    parts = {name.partition(".")[0] for name, _ in base.named_parameters()}
    return lambda name: ".pooler." in f".{name}" or not (name.startswith(below) or name.partition(".")[0] in parts)


def _from_pretrained(folder: str | Path, model_class: Any, **options: Any) -> tuple[PreTrainedModel, dict[str, Any]]:
    """The model, and which weights were missing, unexpected or of another shape."""
    check_weights(folder)
    return model_class.from_pretrained(
        str(folder),
        use_safetensors=True,
        local_files_only=True,
        ignore_mismatched_sizes=True,
        output_loading_info=True,
        **options,
    )


def _read_headers(file: Path) -> dict[str, TensorHeader]:
    try:
        with safe_open(str(file), framework="pt") as reader:
            out = {}
            for name in reader.keys():  # noqa: SIM118 (it is no mapping)
                piece = reader.get_slice(name)
                code = piece.get_dtype()
                dtype = from_safetensors(code)
                if dtype is None:
                    raise CheckpointError(f"{file}: tensor {name!r} has dtype {code}, expected one of {list(CODES)}")
                out[name] = TensorHeader(file, tuple(piece.get_shape()), dtype)
            return out
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{file}: truncated or not a safetensors file ({error})") from None


def _no_weights(folder: Path) -> CheckpointError:
    pickled = sorted(p.name for suffix in ("*.bin", "*.pt", "*.pth", "*.ckpt") for p in folder.glob(suffix))
    pickled = [name for name in pickled if name not in ("training_args.bin", "optimizer.pt", "scheduler.pt")]
    if pickled:
        return CheckpointError(
            f"{folder}: weights are pickled ({pickled[0]}), which can run code when loaded; "
            "if you trust them, convert once: "
            f"AutoModel.from_pretrained({str(folder)!r}, use_safetensors=False)"
            ".save_pretrained(NEW_FOLDER), with the Auto class of your task"
        )
    return CheckpointError(f"{folder}: no {SINGLE_FILE} and no {INDEX_FILE}")


def _check_complete(
    model: PreTrainedModel, tensors: dict[str, torch.Tensor], given: set[str], folder: str | Path
) -> None:
    filled = {id(tensors[name]) for name in given}
    ignored = _patterns(getattr(model, "_keys_to_ignore_on_load_missing", None))
    missing = [
        name
        for name, tensor in tensors.items()
        if id(tensor) not in filled and not any(pattern.search(name) for pattern in ignored)
    ]
    if missing:
        raise CheckpointError(f"{folder} lacks {len(missing)} weights of {type(model).__name__}: {missing[0]!r}, ...")


def _refuse(names: Iterable[str], allowed: Sequence[str], has: str, of_what: str) -> None:
    wrong = sorted(name for name in names if not _matches(name, allowed))
    if wrong:
        more = f" and {len(wrong) - 1} more" if len(wrong) > 1 else ""
        raise CheckpointError(f"{has} tensor {wrong[0]!r}{more} {of_what}")


def _matches(name: str, patterns: Sequence[str]) -> bool:
    return any(re.search(pattern, name) for pattern in patterns)


def _not_expected(model: PreTrainedModel) -> list[re.Pattern[str]]:
    """Patterns of tensors that ``from_pretrained`` passes over: those that the class names, and the tables of rotary
    positions, of which old folders have one for each layer and models one for all."""
    named = list(getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ())
    if any(name.endswith("rotary_emb.inv_freq") for name, _ in model.named_buffers()):
        named.append(r"rotary_emb\.inv_freq")
    return _patterns(named)


def _patterns(patterns: Iterable[str] | None) -> list[re.Pattern[str]]:
    return [re.compile(pattern) for pattern in patterns or ()]
