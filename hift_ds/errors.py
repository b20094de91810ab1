"""The errors a user can meet. Each message is one line: what was given, what was expected, which key to change.

The command line turns every :class:`HiFTError` into that line and exit code 2; anything else is a bug of ours.
"""

from __future__ import annotations

import argparse
import difflib
import importlib.util
from collections.abc import Iterable
from typing import Any, NoReturn

PROG = "hift-ds"  # what a line on stderr begins with
USER_ERROR = 2  # exit codes
INTERRUPTED = 130


class HiFTError(Exception):
    """Base of every error raised on purpose by hift_ds.

    Attributes:
        seen_by_all_ranks: every rank raises it, so that one of them may say it for all.
    """

    seen_by_all_ranks = False


class ConfigError(HiFTError, ValueError):
    """A setting is unknown, has the wrong type, or contradicts another one."""


class GroupingError(ConfigError):
    """The model cannot be cut into layer groups as asked."""


class DataError(HiFTError, ValueError):
    """Training data is missing, empty, malformed or carries no label to learn from."""


class CheckpointError(HiFTError):
    """A checkpoint or weight file is missing, damaged, or belongs to something else."""


class TrainingError(HiFTError):
    """A run cannot usefully go on: it diverges, or has lost a rank."""


class OutOfMemory(HiFTError, RuntimeError):
    """The device has no room. The message says what would fit; it contains accelerate's " out of memory."."""


class NoRoomForModel(HiFTError):
    """The device has no room for what is there whatever the batch; no loop need try a smaller one."""


class StateStoreError(HiFTError):
    """Optimizer state cannot be kept or moved where it was asked to be."""


def keys_once(pairs: list[tuple[str, Any]], words: str = "key {!r} is given twice") -> dict[str, Any]:
    """An object of JSON from its keys and values, for a parser's ``object_pairs_hook``.

    Raises:
        ValueError: a key is there twice, of which one value would be lost; ``words`` say so with the key.
    """
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(words.format(next(name for name in names if names.count(name) > 1)))
    return found


def unknown_key(key: str, known: Iterable[str], where: str, what: str = "key") -> ConfigError:
    """The error for a key that does not exist, naming the nearest one that does.

    Args:
        what: in words, if it is no key, such as ``"optimizer"``.
    """
    by_lower = {name.lower(): name for name in sorted(known)}
    near = difflib.get_close_matches(key.lower(), by_lower, n=1, cutoff=0.6)
    hint = f"did you mean {by_lower[near[0]]!r}?" if near else f"known {what}s: {', '.join(by_lower.values())}"
    return ConfigError(f"{where}: unknown {what} {key!r}; {hint}")


# What only the commands import, by the name it is imported under; pyproject.toml's extra "train" installs them.
COMMANDS_IMPORT = ("datasets", "matplotlib", "rich", "sentencepiece", "trl")
_EXTRA = "pip install 'hift_ds[train]'"


def check_that_commands_can_run(*packages: str) -> None:
    """Raises :class:`ConfigError` if one of ``packages`` is not installed: before a run, not where it ends."""
    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    if missing:
        raise ConfigError(f"this needs {', '.join(missing)}, not installed here; {_EXTRA}")


def as_missing_extra(error: ModuleNotFoundError) -> ConfigError | None:
    """The line for an import that failed because hift_ds was installed without what its commands need; None for any
    other."""
    name = (error.name or "").split(".")[0]
    return ConfigError(f"this needs {name}, not installed here; {_EXTRA}") if name in COMMANDS_IMPORT else None


class OneLineParser(argparse.ArgumentParser):
    """An argument parser for which a wrong argument is like any other error of the user.

    Raises:
        ConfigError: from :meth:`parse_args`, in place of printing the usage and exiting.
    """

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message} (try: {self.prog} --help)")
