"""Where a run goes on: the newest whole checkpoint of its run folder."""

from __future__ import annotations

import json
import re
from pathlib import Path

from hift_ds.checkpoint.files import read_regular_text
from hift_ds.checkpoint.manifest import latest_tag, read_manifest, tags_by_age
from hift_ds.checkpoint.sealed_folder import broken_seal
from hift_ds.errors import CheckpointError, ConfigError

STATE_FILE = "trainer_state.json"  # the last file of a checkpoint that the Trainer writes
_NAME = re.compile(r"checkpoint-(\d+)")


def find_checkpoints(output_dir: Path, resume: str) -> tuple[list[Path], list[str]]:
    """The checkpoints to try, best first, and what is wrong with the others. Checksums are left to the
    loading.

    Args:
        resume: ``auto``, ``never`` or the folder of one checkpoint.

    Raises:
        ConfigError: ``never`` although the run folder has checkpoints, which the next ``auto`` would take for
            this run's.
        CheckpointError: the folder asked for holds no whole checkpoint.
    """
    if resume not in ("auto", "never"):
        folder = Path(resume).expanduser()
        if reason := why_unusable(folder):
            raise CheckpointError(f"train.resume: {reason}")
        return [folder], []
    found = sorted(_numbered(output_dir), reverse=True)
    if resume == "never":
        if found:
            raise ConfigError(
                f"train.resume: never, but {str(output_dir)!r} holds {found[0][1].name} of an earlier run; "
                "choose another train.output_dir or remove it"
            )
        return [], []
    reasons = {folder: why_unusable(folder) for _, folder in found}
    usable = [folder for folder, reason in reasons.items() if reason is None]
    return usable, [reason for reason in reasons.values() if reason is not None]


def why_incomplete(folder: Path) -> str | None:
    """What of the Trainer's own files is missing or damaged in ``folder``; None if nothing is."""
    try:
        state = json.loads(read_regular_text(folder / STATE_FILE))
        int(state["global_step"])
    except FileNotFoundError:
        return f"{folder} was never completed: it has no {STATE_FILE}"
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"{folder / STATE_FILE} is damaged ({type(error).__name__})"
    return broken_seal(folder)


def why_unusable(folder: Path) -> str | None:
    """Why a run cannot go on from ``folder``, judged by names, sizes, and the checksums of small files; None if it
    can."""
    if reason := why_incomplete(folder):
        return reason
    tag = latest_tag(folder)
    if tag is None:
        return f"{folder} holds no DeepSpeed checkpoint: it has no 'latest' file"
    if any((folder / tag).glob("mp_rank_*_model_states.pt")):
        return None  # of a run with `hift: false`: DeepSpeed's own, which has no list of its files
    if any(_has_its_files(folder / name) for name in dict.fromkeys([tag, *tags_by_age(folder)])):
        return None
    return f"{folder / tag} is not whole"


def _has_its_files(folder: Path) -> bool:
    try:
        manifest = read_manifest(folder)
        return all((folder / n).stat().st_size == file.num_bytes for n, file in manifest.files.items())
    except (CheckpointError, OSError):
        return False


def _numbered(output_dir: Path) -> list[tuple[int, Path]]:
    if not output_dir.is_dir():
        return []
    folders = [path for path in output_dir.iterdir() if path.is_dir()]
    return [(int(match[1]), path) for path in folders if (match := _NAME.fullmatch(path.name))]
