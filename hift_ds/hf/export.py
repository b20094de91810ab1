"""Write a model as a Hugging Face folder that any program can load: the names and dtypes of its input.

Host memory is bounded by one shard, whatever the model's size; nothing is ever written over a good file.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import tempfile
import uuid
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from copy import deepcopy
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors.torch import save_file

from hift_ds.durable import sync
from hift_ds.errors import CheckpointError, ConfigError, HiFTError
from hift_ds.hf.safetensors_folder import INDEX_FILE, SINGLE_FILE
from hift_ds.hf.saved_tokenizer import save_tokenizer
from hift_ds.hf.weight_names import NamePlan, plan_names, to_saved

if TYPE_CHECKING:
    from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

GENERATION_CONFIG = "generation_config.json"

DTypes = torch.dtype | Mapping[str, torch.dtype] | None
DtypeChooser = Callable[[str, torch.dtype], torch.dtype]  # by name in the checkpoint, and the dtype it comes with

_UNITS = {"": 1, "B": 1} | {
    f"{prefix}{suffix}": base**power
    for power, prefix in enumerate(("K", "M", "G", "T"), start=1)
    for suffix, base in (("B", 1000), ("IB", 1024))
}


def export_model(
    model: PreTrainedModel,
    out_dir: str | Path,
    *,
    tensors: Iterable[tuple[str, torch.Tensor]] | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    generation_config: GenerationConfig | None = None,
    max_shard_size: int | str = "5GB",
    dtype: DTypes = None,
) -> list[Path]:
    """Write ``model`` to ``out_dir``: safetensors (with an index if there are several), config, tokenizer.

    Files appear under their final names only when all of them are complete and on disk; what else is in
    ``out_dir`` stays. Tensors get the names the checkpoint format has (see ``weight_names``), tied ones are
    written once.

    Args:
        model: gives names, ties, config and, unless ``tensors`` is given, values. May be on the meta device
            (``weight_names.skeleton``); must not be partitioned.
        tensors: (name in memory, full tensor) for every weight, in any order; for weights that live elsewhere
            (a training checkpoint, ZeRO-3 shards gathered one by one). Tensors are held until their shard is
            written, so each must own its memory. When making them is a collective, every other rank must
            exhaust its own iterator.
        tokenizer: anything with ``save_pretrained``; see :func:`~hift_ds.hf.saved_tokenizer.save_tokenizer`.
        generation_config: the model's own if None.
        max_shard_size: bytes, or "500MB", "5GB" (powers of 1000), "5GiB" (1024). A larger tensor gets its own
            file.
        dtype: of the floating-point weights: one for all; or one for each name in the checkpoint
            (``safetensors_folder.tensor_dtypes(input_folder)``), where names it lacks take its commonest; or None
            to keep each as it comes.

    Returns:
        The weight files, in order.

    Raises:
        CheckpointError: a weight is missing or unknown, or the disk lacks the space; or, with the weights
            written, ``AutoTokenizer`` would read other ids than the tokenizer's.
        ConfigError: ``max_shard_size`` cannot be read.
    """
    out_dir = Path(out_dir)
    shard_bytes = parse_size(max_shard_size)
    plan = plan_names(model)
    target_dtype = _dtype_chooser(dtype)
    if tensors is None:
        tensors = model.state_dict().items()

    with _temporary_folder(out_dir, _bytes_needed(model, plan, target_dtype)) as temporary:
        writer = ShardWriter(temporary, shard_bytes)
        for name, tensor in to_saved(model, tensors, plan):
            writer.add(name, tensor.detach().to(device="cpu", dtype=target_dtype(name, tensor.dtype)))
        weight_files = writer.finish()
        _write_config(model, temporary, writer.commonest_dtype())
        _write_generation_config(model, generation_config, temporary)
        unreadable = _write_tokenizer(tokenizer, temporary) if tokenizer is not None else None
        _publish(temporary, out_dir)
    if unreadable is not None:
        raise CheckpointError(f"the weights are in {str(out_dir)!r}, without a tokenizer: {unreadable}")
    return [out_dir / name for name in weight_files]


def check_files_can_be_written(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None = None) -> None:
    """Write everything of an export but the weights into a temporary folder, as a rehearsal.

    A finished run, or its first checkpoint, would come upon the same errors after hours.

    Raises:
        CheckpointError: ``AutoTokenizer`` would read other ids than the tokenizer's.
        ConfigError: transformers refuses to write the config or the tokenizer.
    """
    with tempfile.TemporaryDirectory() as name:
        try:
            _write_config(model, Path(name), model.dtype)
            _write_generation_config(model, None, Path(name))
            if tokenizer is not None:
                save_tokenizer(tokenizer, name)
        except HiFTError:
            raise
        except Exception as error:  # whatever a class of its own, or a check of transformers, raises
            reason = " ".join(str(error).split()) or type(error).__name__
            raise ConfigError(
                f"model.path: the files of a checkpoint of this model could not be written: {reason[:300]}"
            ) from error


@contextmanager
def savable_generation_config(model: PreTrainedModel, folder: str | Path | None) -> Iterator[None]:
    """Inside, ``save_pretrained`` of ``model`` does not fail on its generation config.

    Published models ship settings that transformers refuses to save once the special tokens have been aligned
    with a tokenizer (a temperature without sampling). They came with the input and go out as they came.

    Args:
        folder: where the model is saved inside, and its config then written; None: another rank writes.
    """
    own = getattr(model, "generation_config", None)
    if own is None or _passes(own):
        yield
        return
    model.generation_config = type(own)()
    try:
        yield
    finally:
        model.generation_config = own
    if folder is not None:
        own.to_json_file(str(Path(folder) / GENERATION_CONFIG))


def _passes(config: GenerationConfig) -> bool:
    try:
        config.validate(strict=True)
    except ValueError:
        return False
    return True


def parse_size(size: int | str) -> int:
    """Bytes of "5GB", "500MB", "1.5GiB" or a plain number."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?I?B?)\s*", str(size).upper())
    factor = _UNITS.get(match.group(2)) if match else None
    num_bytes = int(float(match.group(1)) * factor) if match and factor else 0
    if num_bytes <= 0:
        raise ConfigError(f"max_shard_size: {size!r} is not a size; expected something like '5GB' or '500MB'")
    return num_bytes


class ShardWriter:
    """Collects tensors and writes a safetensors file whenever the next one would exceed the limit.

    How many files there will be is known only at the end, so they carry provisional names until
    :meth:`finish`.
    """

    def __init__(self, folder: Path, max_bytes: int) -> None:
        self._folder = folder
        self._max_bytes = max_bytes
        self._pending: dict[str, torch.Tensor] = {}
        self._pending_bytes = 0
        self._shards: list[list[str]] = []
        self._total_bytes = 0
        self._total_numel = 0
        self._numel_of_dtype: Counter[torch.dtype] = Counter()

    def add(self, name: str, tensor: torch.Tensor) -> None:
        """Take ``tensor``, which is on the host, under its name in the checkpoint; it is kept until its shard is
        written."""
        num_bytes = tensor.numel() * tensor.element_size()
        if self._pending and self._pending_bytes + num_bytes > self._max_bytes:
            self._flush()
        pointers = {t.data_ptr() for t in self._pending.values()}
        # safetensors refuses two names for one memory; undeclared ties are written twice (see weight_names).
        self._pending[name] = tensor.clone() if tensor.data_ptr() in pointers else tensor.contiguous()
        self._pending_bytes += num_bytes
        self._total_bytes += num_bytes
        self._total_numel += tensor.numel()
        if tensor.is_floating_point():
            self._numel_of_dtype[tensor.dtype] += tensor.numel()

    def finish(self) -> list[str]:
        """Write what is left, give the files their names and write the index. Returns the file names."""
        if self._pending or not self._shards:
            self._flush()
        count = len(self._shards)
        if count == 1:
            os.rename(self._provisional(1), self._folder / SINGLE_FILE)
            return [SINGLE_FILE]
        names: list[str] = []
        weight_map: dict[str, str] = {}
        for number, members in enumerate(self._shards, start=1):
            names.append(f"model-{number:05d}-of-{count:05d}.safetensors")
            os.rename(self._provisional(number), self._folder / names[-1])
            weight_map |= dict.fromkeys(members, names[-1])
        metadata = {"total_parameters": self._total_numel, "total_size": self._total_bytes}
        _write_json(self._folder / INDEX_FILE, {"metadata": metadata, "weight_map": dict(sorted(weight_map.items()))})
        return names

    def commonest_dtype(self) -> torch.dtype | None:
        """The dtype that most elements were written in; ``None`` before the first."""
        return self._numel_of_dtype.most_common(1)[0][0] if self._numel_of_dtype else None

    def _provisional(self, number: int) -> Path:
        return self._folder / f"shard-{number:05d}.safetensors"

    def _flush(self) -> None:
        self._shards.append(list(self._pending))
        path = self._provisional(len(self._shards))
        save_file(self._pending, str(path), metadata={"format": "pt"})
        self._pending.clear()
        self._pending_bytes = 0


def _dtype_chooser(dtype: DTypes) -> DtypeChooser:
    if not isinstance(dtype, Mapping):
        return lambda name, own: dtype if dtype is not None and own.is_floating_point else own
    floating = Counter(value for value in dtype.values() if value.is_floating_point)
    default = floating.most_common(1)[0][0] if floating else None

    def choose(name: str, own: torch.dtype) -> torch.dtype:
        wanted = dtype.get(name, default)
        return wanted if own.is_floating_point and wanted is not None and wanted.is_floating_point else own

    return choose


def _bytes_needed(model: PreTrainedModel, plan: NamePlan, target_dtype: DtypeChooser) -> int:
    own = model.dtype
    return sum(shape.numel() * target_dtype(name, own).itemsize for name, shape in plan.saved.items())


@contextmanager
def _temporary_folder(out_dir: Path, num_bytes: int) -> Iterator[Path]:
    """A new folder beside ``out_dir``, removed at the end unless it became ``out_dir``."""
    if out_dir.exists() and not out_dir.is_dir():
        raise CheckpointError(f"export folder {str(out_dir)!r} is a file")
    parent = out_dir.absolute().parent
    parent.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(parent).free
    if free < num_bytes:
        raise CheckpointError(f"export to {str(out_dir)!r} needs {num_bytes:,} bytes, {free:,} are free")
    temporary = parent / f".{out_dir.name}.{uuid.uuid4().hex[:8]}.tmp"
    temporary.mkdir()
    try:
        yield temporary
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _publish(temporary: Path, out_dir: Path) -> None:
    """Give the finished files their place. Readers see the old weights, none, or all of the new ones.

    "None" only while files move into a folder that is in use; a crash just then leaves the complete new
    weights in the temporary folder.
    """
    for path in temporary.iterdir():
        if path.suffix == ".safetensors":  # which safetensors makes readable by the owner alone
            shutil.copymode(temporary / "config.json", path)
        sync(path)
    sync(temporary)
    if not out_dir.exists() or not any(out_dir.iterdir()):
        os.replace(temporary, out_dir)
        sync(out_dir.absolute().parent)
        return
    entry_points = (SINGLE_FILE, INDEX_FILE)
    for path in out_dir.iterdir():
        if path.name in entry_points or re.fullmatch(r"model-\d{5}-of-\d{5}\.safetensors", path.name):
            path.unlink()
    for path in sorted(temporary.iterdir(), key=lambda p: p.name in entry_points):
        if path.is_dir():
            shutil.copytree(path, out_dir / path.name, dirs_exist_ok=True)
        else:
            os.replace(path, out_dir / path.name)
    sync(out_dir)


def _write_config(model: PreTrainedModel, folder: Path, dtype: torch.dtype | None) -> None:
    config = deepcopy(model.config)
    config.architectures = [type(model).__name__]
    if dtype is not None:
        name = str(dtype).removeprefix("torch.")
        for part in [
            config,
            *(getattr(config, key, None) for key in getattr(config, "sub_configs", None) or {}),
        ]:
            if part is not None:
                part.dtype = name
    if not type(model).__module__.startswith("transformers_modules"):
        vars(config).pop("auto_map", None)  # names code that the input brought, that was not used, and is not here
    else:
        from transformers.dynamic_module_utils import custom_object_save

        custom_object_save(model, str(folder), config=config)  # type: ignore[arg-type]  # declared a dict, used as ours
    config.save_pretrained(str(folder))
    if dtype is not None:
        # transformers 5 reads and writes "dtype"; most other programs still look for "torch_dtype".
        path = folder / "config.json"
        entries = json.loads(path.read_text(encoding="utf-8"))
        _write_json(path, dict(sorted({**entries, "torch_dtype": name}.items())))


def _write_tokenizer(tokenizer: PreTrainedTokenizerBase, folder: Path) -> CheckpointError | None:
    """What is wrong with the tokenizer, which then is not written: no reason to lose the weights."""
    try:
        save_tokenizer(tokenizer, folder)
    except CheckpointError as error:
        return error
    return None


def _write_generation_config(model: PreTrainedModel, given: GenerationConfig | None, folder: Path) -> None:
    config = given or (model.generation_config if model.can_generate() else None)
    if config is None:
        return
    if _passes(config):
        config.save_pretrained(str(folder))
    else:  # as it came: see savable_generation_config
        config.to_json_file(str(folder / GENERATION_CONFIG))


def _write_json(path: Path, content: object) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
