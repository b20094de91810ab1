"""``manifest.json``: the list of a checkpoint's files with sizes and checksums, written last.

A folder with a manifest was complete when the manifest was written; a folder that agrees with its manifest is
whole now. The manifest carries its own checksum, so a damaged one is found too.
"""

from __future__ import annotations

import json
import os
import time
import zlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hift_ds.checkpoint.files import (
    FileRecord,
    as_json,
    is_plain_name,
    open_regular,
    read_regular_text,
    record_of,
    write_json,
)
from hift_ds.errors import CheckpointError
from hift_ds.version import __version__

MANIFEST = "manifest.json"
LATEST = "latest"
MAX_TAG_BYTES = 220  # of the 255 that a name may have: the folder's temporary name is longer
FORMAT = 1  # of the whole checkpoint folder; raised when an older hift_ds could not read a newer folder


class DamagedCheckpoint(CheckpointError):
    """The folder is not what its manifest says, or has none."""


class NewerCheckpoint(CheckpointError):
    """Written by a version of hift_ds whose format this one does not know."""


@dataclass(frozen=True)
class Manifest:
    """The list of a checkpoint's files, read from ``manifest.json``."""

    tag: str
    global_steps: int
    files: Mapping[str, FileRecord]
    written_s: float  # seconds since 1970
    node_local: bool  # lists this node's files only


def write_manifest(
    folder: Path, tag: str, global_steps: int, files: Mapping[str, FileRecord], node_local: bool = False
) -> None:
    """Write ``manifest.json`` into ``folder``, which by that is a complete checkpoint."""
    content: dict[str, Any] = {
        "format": FORMAT,
        "hift_ds": __version__,
        "tag": tag,
        "global_steps": global_steps,
        "written_s": time.time(),
        "node_local": node_local,
        "files": as_json(files),
    }
    write_json(folder / MANIFEST, {**content, "crc32": _crc32(content)})


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a checkpoint folder.

    Raises:
        DamagedCheckpoint: there is none, or it is not what was written.
        NewerCheckpoint: another hift_ds wrote it.
    """
    path = folder / MANIFEST
    if not folder.is_dir():
        raise DamagedCheckpoint(f"{folder} does not exist")
    try:
        content = json.loads(read_regular_text(path))
        checksum = content.pop("crc32")
        if checksum != _crc32(content):
            raise ValueError("its checksum does not match")
        if content["format"] > FORMAT:
            raise NewerCheckpoint(
                f"{folder}: written by hift_ds {content['hift_ds']} in format {content['format']}; "
                f"this version ({__version__}) reads formats up to {FORMAT}: upgrade hift_ds"
            )
        files = {name: FileRecord(**record) for name, record in content["files"].items()}
        if outside := next((name for name in files if not is_plain_name(name)), None):
            raise ValueError(f"it names {outside!r}, which is not a file of the folder")
        return Manifest(content["tag"], content["global_steps"], files, content["written_s"], content["node_local"])
    except NewerCheckpoint:
        raise
    except FileNotFoundError:
        raise DamagedCheckpoint(f"{path} is missing: the checkpoint was never completed") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DamagedCheckpoint(f"{path} is damaged ({error})") from None


def verify_files(folder: Path, manifest: Manifest, names: Iterable[str]) -> None:
    """Read the named files and compare them with the manifest.

    Raises:
        DamagedCheckpoint: names the first file that is missing, truncated or changed.
    """
    for name in names:
        verify_file(folder / name, manifest.files[name], MANIFEST)


def verify_file(path: Path, expected: FileRecord, listed_in: str) -> None:
    """Read a file and compare it with what the list ``listed_in`` says of it. One of another size is not read.

    Raises:
        DamagedCheckpoint: it is missing, truncated or changed.
    """
    try:
        num_bytes = path.stat().st_size
        if num_bytes != expected.num_bytes:
            raise DamagedCheckpoint(f"{path} has {num_bytes} bytes, expected {expected.num_bytes}")
        if record_of(path) != expected:
            raise DamagedCheckpoint(f"{path} is damaged: its checksum does not match the one in {listed_in}")
    except FileNotFoundError:
        raise DamagedCheckpoint(f"{path} is missing") from None
    except OSError as error:
        raise DamagedCheckpoint(f"{path} cannot be read ({error.strerror})") from None


def verify(folder: Path) -> Manifest:
    """The manifest of a folder whose every file agrees with it.

    Raises:
        DamagedCheckpoint, NewerCheckpoint.
    """
    manifest = read_manifest(folder)
    verify_files(folder, manifest, manifest.files)
    return manifest


def share_of_files(manifest: Manifest, rank: int, world_size: int) -> list[str]:
    """The files that ``rank`` verifies, so that together the ranks read each file once: largest first."""
    by_size = sorted(manifest.files, key=lambda name: (-manifest.files[name].num_bytes, name))
    return by_size[rank::world_size]


def tags_by_age(save_dir: Path) -> list[str]:
    """Every folder with a readable manifest, newest step first. Its files are not looked at."""
    found: list[tuple[int, float, str]] = []
    for path in save_dir.glob(f"*/{MANIFEST}"):
        if path.parent.name.startswith("."):
            continue  # being written, or left by a killed save
        try:
            manifest = read_manifest(path.parent)
        except CheckpointError:
            continue
        found.append((manifest.global_steps, manifest.written_s, path.parent.name))
    return [tag for *_, tag in sorted(found, reverse=True)]


def latest_tag(save_dir: Path) -> str | None:
    """What ``latest`` says; ``None`` if there is no such file, or nothing in it that names a folder."""
    try:
        with open_regular(save_dir / LATEST) as file:
            tag = file.read(2 * MAX_TAG_BYTES).decode(errors="replace").strip()
    except OSError:
        return None
    return tag if why_no_tag(tag) is None else None


def why_no_tag(tag: str) -> str | None:
    """Why a checkpoint cannot have this name; None if it can."""
    if not is_plain_name(tag) or tag != tag.strip() or not tag.isprintable():
        return "not a folder name"
    if tag.startswith("."):
        return "hidden, as folders are that are being written"
    if tag == LATEST:
        return "the name of the file that names the newest checkpoint"
    if len(os.fsencode(tag)) > MAX_TAG_BYTES:
        return f"longer than {MAX_TAG_BYTES} bytes"
    return None


def _crc32(content: Mapping[str, Any]) -> str:
    return f"{zlib.crc32(json.dumps(content, sort_keys=True).encode()):08x}"
