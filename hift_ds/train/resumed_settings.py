"""What a checkpoint was saved with, beside it, and what becomes of each setting that is another when a run goes on.

Nothing that differs is passed over: a setting is refused, kept as the checkpoint has it with a line, or changed from
here on with a line. ``RULES`` says which, for every key of the run file (a test walks over them). The ``"hift"`` block
is the engine's to compare (``engine/loading.py``).
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hift_ds.checkpoint.files import read_regular_text
from hift_ds.errors import CheckpointError
from hift_ds.train.run_config import RunConfig

SETTINGS_FILE = "settings.json"  # in checkpoint-N
REFUSED, KEPT, CHANGED, ELSEWHERE = "refused", "kept", "changed", "elsewhere"

_ROWS = "the epoch goes on at the same step, so that rows may be met twice or not at all"
_SCHEDULE = "from the next cycle on"
_NOTHING = ""

# key -> (what becomes of another value, and what that means)
RULES: dict[str, tuple[str, str]] = {
    "task": (REFUSED, "its states are another model's"),
    "model.path": (KEPT, "the weights are the checkpoint's"),
    "model.tokenizer": (CHANGED, _ROWS),
    "model.dtype": (CHANGED, "masters go with their weights"),
    "model.added_tokens": (REFUSED, "the embeddings have other rows"),
    "model.added_special_tokens": (REFUSED, "the embeddings have other rows"),
    "model.attn_implementation": (CHANGED, _NOTHING),
    "model.trust_remote_code": (CHANGED, _NOTHING),
    "data.train": (CHANGED, _ROWS),
    "data.eval": (CHANGED, "losses are not to be compared with earlier ones"),
    "data.val_size": (CHANGED, _ROWS),
    "data.format": (CHANGED, _ROWS),
    "data.columns": (CHANGED, _ROWS),
    "data.template": (CHANGED, _NOTHING),
    "data.max_length": (CHANGED, _NOTHING),
    "data.truncation": (CHANGED, _NOTHING),
    "data.packing": (CHANGED, _ROWS),
    "data.train_on_prompt": (CHANGED, _NOTHING),
    "data.mask_history": (CHANGED, _NOTHING),
    "data.labels": (REFUSED, "the head has other classes"),
    "data.shuffle": (CHANGED, _ROWS),
    "data.max_samples": (CHANGED, _ROWS),
    "data.streaming": (CHANGED, _ROWS),
    "data.shuffle_buffer": (CHANGED, _ROWS),
    "data.seed": (CHANGED, _ROWS),
    "data.num_workers": (CHANGED, _NOTHING),
    "train.output_dir": (CHANGED, _NOTHING),
    "train.epochs": (CHANGED, f"the schedule's length {_SCHEDULE}"),
    "train.max_steps": (CHANGED, f"the schedule's length {_SCHEDULE}"),
    "train.micro_batch_size": (CHANGED, _ROWS),
    "train.gradient_accumulation_steps": (CHANGED, _ROWS),
    "train.global_batch_size": (CHANGED, _ROWS),
    "train.eval_batch_size": (CHANGED, _NOTHING),
    "train.auto_find_batch_size": (CHANGED, _NOTHING),
    "train.optimizer": (REFUSED, "its states are another optimizer's"),
    "train.optimizer_args": (KEPT, _NOTHING),
    "train.learning_rate": (KEPT, _NOTHING),
    "train.lr_scheduler": (CHANGED, _SCHEDULE),
    "train.lr_scheduler_args": (CHANGED, _SCHEDULE),
    "train.warmup_ratio": (CHANGED, _SCHEDULE),
    "train.warmup_steps": (CHANGED, _SCHEDULE),
    "train.weight_decay": (KEPT, _NOTHING),
    "train.max_grad_norm": (CHANGED, _NOTHING),
    "train.gradient_checkpointing": (CHANGED, _NOTHING),
    "train.logging_steps": (CHANGED, _NOTHING),
    "train.eval_steps": (CHANGED, _NOTHING),
    "train.save_steps": (CHANGED, _NOTHING),
    "train.save_total_limit": (CHANGED, _NOTHING),
    "train.load_best_model_at_end": (CHANGED, _NOTHING),
    "train.best_metric": (CHANGED, "what was best by the other measure is kept until a checkpoint is better"),
    "train.early_stopping.patience": (CHANGED, _NOTHING),
    "train.early_stopping.threshold": (CHANGED, _NOTHING),
    "train.arguments": (CHANGED, _NOTHING),
    "train.resume": (ELSEWHERE, "says itself where the run goes on"),
    "train.on_divergence": (CHANGED, _NOTHING),
    "train.hang_timeout_s": (CHANGED, _NOTHING),
    "train.seed": (KEPT, "random numbers go on where the checkpoint's were"),
    "train.report_to": (CHANGED, _NOTHING),
    "export.dir": (CHANGED, _NOTHING),
    "export.dtype": (CHANGED, _NOTHING),
    "export.max_shard_size": (CHANGED, _NOTHING),
    "deepspeed": (CHANGED, _NOTHING),  # its contents, as deepspeed.KEY
    "hift": (ELSEWHERE, "the engine compares the block; false against a block is refused"),
    # What the keys above lead to.
    "hift: false": (REFUSED, "its states are of another engine"),
    "training data": (CHANGED, _ROWS),
    "model config": (CHANGED, "the model computes something else"),
}  # fmt: skip

# Settings that the run file and the DeepSpeed JSON can both make: compared as they were resolved, named as in the run
# file.
RESOLVED = {
    "optimizer.type": "train.optimizer",
    "optimizer.params.lr": "train.learning_rate",
    "optimizer.params.weight_decay": "train.weight_decay",
    "optimizer.params": "train.optimizer_args",
    "gradient_clipping": "train.max_grad_norm",
    "train_batch_size": "train.global_batch_size",
    "train_micro_batch_size_per_gpu": "train.micro_batch_size",
    "gradient_accumulation_steps": "train.gradient_accumulation_steps",
}
_NOT_THE_MODEL = (
    "transformers_version",
    "_name_or_path",
    "use_cache",
    "dtype",
    "torch_dtype",
    "architectures",
)


@dataclass(frozen=True)
class Differences:
    """Lines, each of one setting."""

    refused: tuple[str, ...]
    kept: tuple[str, ...]
    changed: tuple[str, ...]

    def raise_refused(self, folder: Path) -> None:
        """Refuse to go on from ``folder``.

        Raises:
            CheckpointError: a setting differs that must not; names all of them.
        """
        if self.refused:
            raise CheckpointError(
                f"{folder} was saved with other settings: {'; '.join(self.refused)}; set it back, or choose another "
                "train.output_dir"
            )

    def lines(self, folder: Path) -> list[str]:
        """What is said when a run goes on from ``folder`` with other settings."""
        out = []
        if self.kept:
            out.append(f"going on with settings of {folder}: " + "; ".join(self.kept))
        if self.changed:
            out.append(f"changed since {folder}: " + "; ".join(self.changed))
        return out


def settings_of(
    run: RunConfig, deepspeed: Mapping[str, Any], model_config: Mapping[str, Any], data: Mapping[str, Any]
) -> dict[str, Any]:
    """What is written beside a checkpoint. JSON.

    Args:
        deepspeed: the resolved config.
        data: from :func:`fingerprint`.
    """
    config = {key: value for key, value in model_config.items() if key not in _NOT_THE_MODEL and "attn_impl" not in key}
    content = {
        "run": run.model_dump(mode="json"), "deepspeed": dict(deepspeed), "model config": config,
        "training data": dict(data),
    }  # fmt: skip
    return json.loads(json.dumps(content, default=str))


def fingerprint(dataset: Any) -> dict[str, Any]:
    """The number of prepared rows, and a checksum of all their numbers in order; of streamed rows their own."""
    if hasattr(dataset, "fingerprint"):
        return dict(dataset.fingerprint())
    crc32 = 0
    table = dataset.with_format("arrow")
    for batch in table.iter(batch_size=1000):
        for column in batch.columns:
            for chunk in column.chunks:
                for buffer in _whole(chunk).buffers():
                    crc32 = zlib.crc32(buffer, crc32) if buffer is not None else crc32
    return {"rows": len(dataset), "crc32": f"{crc32:08x}"}


def _whole(chunk: Any) -> Any:
    """The same values in buffers of their own: a slice's buffers are those of the whole table."""
    import pyarrow as pa

    return pa.concat_arrays([chunk, chunk[:0]])


def settings_text(settings: Mapping[str, Any]) -> str:
    """What stands in the file: the settings and a checksum of them."""
    return json.dumps({**settings, _CHECKSUM: _crc32(settings)}, indent=1)


_CHECKSUM = "crc32"


def _crc32(settings: Mapping[str, Any]) -> str:
    return f"{zlib.crc32(json.dumps(settings, sort_keys=True).encode()):08x}"


def read_settings(folder: Path) -> dict[str, Any] | None:
    """What :func:`settings_of` had made of the run that saved ``folder``; None if that is not known, or not what was
    written."""
    try:
        content = json.loads(read_regular_text(folder / SETTINGS_FILE))
        if content.pop(_CHECKSUM, None) not in (None, _crc32(content)):  # None: of an earlier version
            return None
        return content if isinstance(content["run"], dict) else None
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def compare(then: Mapping[str, Any], now: Mapping[str, Any]) -> Differences:
    """Compare the settings of two runs, both from :func:`settings_of`."""
    found: dict[str, list[str]] = {REFUSED: [], KEPT: [], CHANGED: [], ELSEWHERE: []}
    for key, theirs, ours in _pairs(then, now):
        what, why = _rule(key)
        theirs, ours = _short(theirs), _short(ours)
        line = f"{key} {theirs}, not {ours}" if what == KEPT else f"{key} {theirs} -> {ours}"
        found[what].append(f"{line} ({why})" if why else line)
    return Differences(tuple(found[REFUSED]), tuple(found[KEPT]), tuple(found[CHANGED]))


def _pairs(then: Mapping[str, Any], now: Mapping[str, Any]) -> Iterator[tuple[str, Any, Any]]:
    """(key, value then, value now) of all that differs."""
    theirs, ours = (dict(_flat(content["run"], depth=3)) for content in (then, now))
    for key in sorted(theirs.keys() | ours.keys()):
        above = ".".join(key.split(".")[:2])
        elsewhere = above in RESOLVED.values() or key.split(".")[0] in ("hift", "deepspeed")
        if key not in theirs and ours[key] == _default(key):  # a key that the version which saved did not have
            continue
        if not elsewhere and _nothing_as_none(theirs.get(key)) != _nothing_as_none(ours.get(key)):
            yield key, theirs.get(key), ours.get(key)
    modes = [content["run"].get("hift") is False for content in (then, now)]
    if modes[0] != modes[1]:
        yield "hift: false", modes[0], modes[1]
    for section in ("deepspeed", "model config"):
        theirs, ours = (dict(_flat(content.get(section) or {})) for content in (then, now))
        for key in sorted(theirs.keys() | ours.keys()):
            if theirs.get(key) != ours.get(key) and not (section == "deepspeed" and key.startswith("hift.")):
                yield _name(section, key), theirs.get(key), ours.get(key)
    if then.get("training data") != now.get("training data"):
        rows = [(content.get("training data") or {}).get("rows") for content in (then, now)]
        told = rows if rows[0] != rows[1] else [f"{rows[0]} rows", "other rows"]
        yield "training data", told[0], told[1]


def _default(key: str) -> Any:
    """The default of a key of the run file; None where it has none."""
    model: Any = RunConfig
    info: Any = None
    for part in key.split("."):
        info = getattr(model, "model_fields", {}).get(part)
        if info is None:
            return None
        model = info.annotation
    return None if info is None or info.is_required() else info.get_default(call_default_factory=True)


def _nothing_as_none(value: Any) -> Any:
    return None if value == {} else value


def _name(section: str, key: str) -> str:
    """The value as the user would write it."""
    if section == "deepspeed":
        if key in RESOLVED:
            return RESOLVED[key]
        above, _, last = key.rpartition(".")
        if above in RESOLVED:
            return f"{RESOLVED[above]}.{last}"
    return f"{section}.{key}"


def _rule(key: str) -> tuple[str, str]:
    """The rule of the key, or of the nearest one above it that has one."""
    while key not in RULES:
        key, _, _ = key.rpartition(".")
    return RULES[key]


def _flat(content: Mapping[str, Any], prefix: str = "", depth: int = 9) -> Iterator[tuple[str, Any]]:
    for key, value in content.items():
        if isinstance(value, Mapping) and value and depth > 1:
            yield from _flat(value, f"{prefix}{key}.", depth - 1)
        else:
            yield prefix + str(key), value


def _short(value: Any) -> str:
    text = json.dumps(value) if not isinstance(value, str) else value
    return text if len(text) <= 60 else text[:57] + "..."
