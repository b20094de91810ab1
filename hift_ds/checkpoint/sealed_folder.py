"""A list with sizes and checksums of the small files that a Trainer writes beside the engine's checkpoint.

``trainer_state.json``, the scheduler's state and the random states are written one by one under their final
names. The seal, written last, says that they are complete, and finds damage before a run resumes with them.
"""

from __future__ import annotations

import json
import os
from dataclasses import asdict
from pathlib import Path

from hift_ds.checkpoint.files import is_plain_name, read_regular_text, record_of, replace_text, sync_folder
from hift_ds.checkpoint.manifest import LATEST

SEAL = "trainer_files.json"
_NOT_SEALED = (SEAL, LATEST)  # "latest" comes later if the engine saves asynchronously


def seal_folder(folder: Path) -> None:
    """By one process, when all have written their files."""
    files = [p for p in sorted(folder.iterdir()) if p.is_file() and p.name not in _NOT_SEALED]
    for path in files:
        with open(path, "rb") as file:
            os.fsync(file.fileno())
    sync_folder(folder)
    replace_text(folder / SEAL, json.dumps({path.name: asdict(record_of(path)) for path in files}, indent=1))


def broken_seal(folder: Path, weights: bool = False) -> str | None:
    """Which sealed file is not what it was; None if all are, or if the folder was never sealed.

    Args:
        weights: read the weights too (a quarter of a second for each GiB). A run that goes on reads the engine's own
            copy; these are for ``from_pretrained``.
    """
    try:
        content = json.loads(read_regular_text(folder / SEAL))
        if not all(is_plain_name(name) for name in content):
            raise ValueError("it names files outside of the folder")
        records = {name: (entry["num_bytes"], entry["crc32"]) for name, entry in content.items()}
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"{folder / SEAL} is damaged ({type(error).__name__})"
    for name, expected in records.items():
        if name.endswith(".safetensors") and not weights:
            continue
        try:
            found = record_of(folder / name)
        except FileNotFoundError:
            return f"{folder / name} is missing"
        except OSError as error:
            return f"{folder / name} cannot be read ({error.strerror})"
        if (found.num_bytes, found.crc32) != expected:
            return f"{folder / name} is damaged: its checksum is not the one in {SEAL}"
    return None
