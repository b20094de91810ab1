"""What the files of a run folder say of it, for the pages that are written about a run."""

from __future__ import annotations

import importlib.metadata
import json
import platform
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from hift_ds.errors import DataError
from hift_ds.report import coverage as coverage_file
from hift_ds.report.groups import GroupSummary, read_groups
from hift_ds.report.metrics import FILE_NAME, Metrics, read_metrics, share_waited
from hift_ds.version import __version__

SETTINGS_FILE, RESULTS_FILE, DEEPSPEED_FILE = "run.yaml", "all_results.json", "deepspeed.json"
PACKAGES = ("torch", "deepspeed", "transformers", "accelerate", "datasets", "safetensors", "trl", "sentencepiece")


def versions() -> dict[str, str | None]:
    """The versions of Python, hift_ds and the packages that a run depends on; None: not installed."""
    return {"hift_ds": __version__, "python": platform.python_version(), **{name: _version(name) for name in PACKAGES}}


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


@dataclass(frozen=True)
class GroupMemory:
    """The peaks of one group's steps, in GiB; None: not known."""

    name: str
    peak: float | None
    forecast: float | None
    of_process: bool = False  # the peak is the memory of the process as a step ended: there was no accelerator


@dataclass(frozen=True)
class RunSummary:
    """The files of a run folder, read; what is not there yet is empty."""

    folder: Path
    settings: Mapping[str, Any]
    deepspeed: Mapping[str, Any]
    results: Mapping[str, Any]
    metrics: Metrics
    groups: list[GroupSummary]
    coverage: Mapping[str, Any]

    @property
    def name(self) -> str:
        """The name of the run's folder."""
        return self.folder.resolve().name

    @property
    def steps(self) -> int:
        """Optimizer steps done."""
        return max((record["step"] for record in self.metrics.steps), default=0)

    @property
    def base_model(self) -> str:
        """The model that was fine-tuned, by the last part of its path: a page about a run is published, and where
        things lie on this machine is nobody's business."""
        return self.base_model_on_hub or Path(_at(self.settings, "model", "path") or "?").name

    @property
    def base_model_on_hub(self) -> str | None:
        """Its name on the Hugging Face Hub, where the run file has one."""
        path = str(_at(self.settings, "model", "path") or "")
        name = path.removeprefix("hub:")
        named = name.count("/") == 1 and not name.startswith((".", "~", "/")) and not Path(path).expanduser().exists()
        return name if path.startswith("hub:") or named else None

    @property
    def data(self) -> list[str]:
        """Names of the training data: hub names, or files without their folders."""
        return [_data_name(source) for source in _listed(_at(self.settings, "data", "train"))]

    @property
    def data_on_hub(self) -> list[str]:
        """The names of the training data sets that are on the Hugging Face hub."""
        paths = [_path_of(source) for source in _listed(_at(self.settings, "data", "train"))]
        return [path.removeprefix("hub:") for path in paths if path.startswith("hub:")]

    @property
    def hift(self) -> Mapping[str, Any] | None:
        """The "hift" block in force; None: full fine-tuning."""
        return self.deepspeed.get("hift", {} if self.groups else None)

    @property
    def evaluations(self) -> list[tuple[int, float]]:
        """(step, held-out loss)."""
        return [(r["step"], r["eval_loss"]) for r in self.metrics.evals if r.get("eval_loss") is not None]

    @property
    def waited(self) -> float | None:
        """The share of the steps' time that they stood still, whatever for; None: not known."""
        known = [r for r in self.metrics.steps if r.get("waits_s") is not None or r.get("stalled_s") is not None]
        return share_waited(known)[0]

    @property
    def memory(self) -> list[GroupMemory]:
        """The peaks of each group, in the model's order."""
        steps: dict[int, list[Mapping[str, Any]]] = {}
        for record in self.metrics.steps:
            if record.get("group") is not None:
                steps.setdefault(record["group"], []).append(record)

        def highest(records: list[Mapping[str, Any]], key: str) -> float | None:
            return max((record[key] for record in records if record.get(key) is not None), default=None)

        return [
            GroupMemory(
                records[-1].get("group_name") or str(index),
                highest(records, "peak_memory_gib"),
                highest(records, "forecast_memory_gib"),
                any(record.get("memory_of_process") for record in records),
            )
            for index, records in sorted(steps.items())
        ]

    @property
    def tokens_per_s(self) -> float | None:
        """Tokens a second over all steps but the first, which has the warm-up."""
        known = [r for r in self.metrics.steps[1:] if r.get("tokens_per_s") is not None]
        seconds = sum(r["step_time_s"] for r in known)
        return (
            float(np.dot([r["tokens_per_s"] for r in known], [r["step_time_s"] for r in known]) / seconds)
            if seconds
            else None
        )


def read_run(folder: str | Path) -> RunSummary:
    """Read the files of a run folder. Raises :class:`DataError` if the folder is not that of a run."""
    folder = Path(folder)
    if not folder.exists():
        raise DataError(f"no such folder: {str(folder)!r}; expected the folder of a run (train.output_dir)")
    metrics = read_metrics(folder)
    if not metrics.steps:
        raise DataError(
            f"{str(folder)!r} holds no optimizer step in {FILE_NAME}; expected the folder of a run that has begun"
        )
    settings = folder / SETTINGS_FILE
    return RunSummary(
        folder,
        settings=(yaml.safe_load(settings.read_text(encoding="utf-8")) or {}) if settings.is_file() else {},
        deepspeed=_json(folder / DEEPSPEED_FILE),
        results=_json(folder / RESULTS_FILE),
        metrics=metrics,
        groups=read_groups(folder),
        coverage=_json(folder / coverage_file.FILE_NAME),
    )


def _json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def _at(settings: Mapping[str, Any], *keys: str) -> Any:
    value: Any = settings
    for key in keys:
        value = value.get(key) if isinstance(value, Mapping) else None
    return value


def _listed(value: object) -> list[Any]:
    return value if isinstance(value, list) else [] if value is None else [value]


def _path_of(source: object) -> str:
    return str(source.get("path", "?") if isinstance(source, Mapping) else source)


def _data_name(source: object) -> str:
    path = _path_of(source)
    name = path if path.startswith(("hub:", "bundled:")) else Path(path).name
    more = (
        [f"{key} {source[key]}" for key in ("name", "subset", "split", "weight") if source.get(key)]
        if isinstance(source, Mapping)
        else []
    )
    return ", ".join([name, *more])
