"""What comes with the package and is found by its name, from any folder: DeepSpeed configs (``bf16_host``), run files
(``llama3_8b``) and a small data set (``bundled:hift_questions``).

A checkout has them in ``ds_configs/`` and ``model_zoo/presets/``; a wheel has the former inside the package (setup.py).
"""

from __future__ import annotations

import contextlib
import difflib
import json
from pathlib import Path
from typing import Any

from hift_ds.errors import ConfigError

BUNDLED = "bundled:"
_PACKAGE = Path(__file__).resolve().parent
_DS_CONFIGS = (_PACKAGE / "ds_configs", _PACKAGE.parent / "ds_configs")
_PRESETS = (_PACKAGE.parent / "model_zoo" / "presets",)
_DATA = (_PACKAGE / "data" / "bundled",)


def deepspeed_config(name: str) -> dict[str, Any]:
    """A DeepSpeed config that comes with the package, for ``TrainingArguments(deepspeed=...)`` and for
    :func:`hift_ds.initialize`.

    Args:
        name: of a file in ``ds_configs/`` without its ending, such as ``"bf16_host"``.

    Raises:
        ConfigError: there is none of that name; the message has the nearest.
    """
    return json.loads(find(name, "deepspeed").read_text(encoding="utf-8"))


def presets() -> dict[str, Path]:
    """The run files that come with the package, by name."""
    return _files(_PRESETS, ".yaml")


def deepspeed_configs() -> dict[str, Path]:
    """The DeepSpeed configs that come with the package, by name."""
    return _files(_DS_CONFIGS, ".json")


def find(name: str, kind: str) -> Path:
    """What comes with the package by that name.

    Args:
        kind: ``"deepspeed"``, ``"preset"`` or ``"data"``; the last one's names begin with ``bundled:``.

    Raises:
        ConfigError: there is none; the message has the nearest.
    """
    what, known = {
        "deepspeed": ("DeepSpeed config", deepspeed_configs()),
        "preset": ("run file", presets()),
        "data": ("data set", {f"{BUNDLED}{name}": file for name, file in _files(_DATA, ".jsonl").items()}),
    }[kind]
    if name in known:
        return known[name]
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    hint = f"did you mean {near[0]!r}?" if near else f"there are {', '.join(known)}"
    raise ConfigError(f"no {what} named {name!r} comes with hift_ds; {hint}")


def file_or_shipped(given: str | Path, kind: str, *beside: Path) -> Path:
    """The user's file if it exists, here or in a folder of ``beside``; else what comes with the package by that name.

    Raises:
        ConfigError: neither exists.
    """
    path = Path(given).expanduser()
    for candidate in (path, *(folder / path for folder in beside)):
        if candidate.is_file():
            return candidate
    what = "run file" if kind == "preset" else "file"
    if path.is_dir():
        with contextlib.suppress(ConfigError):
            return find(str(given), kind)
        of_a_run = kind == "preset" and (path / "run.yaml").is_file()
        hint = f"; that of the run is {str(path / 'run.yaml')!r}" if of_a_run else ""
        raise ConfigError(f"{str(given)!r} is a folder, expected a {what}{hint}")
    if path.suffix not in (".yaml", ".yml", ".json") and path.name == str(given):
        return find(str(given), kind)
    there = [file.name for file in path.parent.glob("*.*")] if path.parent.is_dir() else []
    near = difflib.get_close_matches(path.name, there, n=1, cutoff=0.7)
    hint = f"; did you mean {str(path.parent / near[0])!r}?" if near else ""
    raise ConfigError(
        f"no such {what}: {str(given)!r}{', neither here nor beside the run file' if beside else ''}{hint}"
    )


def _files(folders: tuple[Path, ...], ending: str) -> dict[str, Path]:
    folder = next((folder for folder in folders if folder.is_dir()), None)
    return {file.name.removesuffix(ending): file for file in sorted(folder.glob(f"*{ending}"))} if folder else {}
