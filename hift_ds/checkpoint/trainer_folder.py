"""The ``checkpoint-N`` folders that a Trainer writes: whether one is whole, which one a run goes on from, which may go.

The engine's checkpoint inside has its own manifest. What the Trainer writes beside it (``trainer_state.json``, the
scheduler's state, the random states) is written file by file under final names; the seal, a list of sizes and checksums
written last, says that they are complete, and finds damage before a run resumes with them.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Collection
from pathlib import Path

from hift_ds.checkpoint.files import (
    FileRecord,
    as_json,
    is_plain_name,
    is_temporary,
    read_regular_text,
    record_of,
    remove_folder,
    replace_text,
)
from hift_ds.checkpoint.manifest import (
    LATEST,
    DamagedCheckpoint,
    latest_tag,
    read_manifest,
    tags_by_age,
    verify_file,
)
from hift_ds.durable import sync
from hift_ds.errors import CheckpointError, ConfigError

STATE_FILE = "trainer_state.json"  # the last file of a checkpoint that the Trainer writes
SEAL = "trainer_files.json"
_NOT_SEALED = (SEAL, LATEST)  # "latest" comes later if the engine saves asynchronously
_NAME = re.compile(r"checkpoint-(\d+)")
# By a Trainer, if they are there.
_READ = ("scheduler.pt", "optimizer.pt", "optimizer.bin", "scaler.pt", "rng_state.pth")


# -- the seal -------------------------------------------------------------------------------------------------


def seal_folder(folder: Path, but: Collection[str] = ()) -> None:
    """Write the seal. Called by one process, when all have written their files.

    Args:
        but: names of files that may still be replaced.
    """
    files = [p for p in sorted(folder.iterdir()) if p.is_file() and p.name not in (*_NOT_SEALED, *but)]
    for path in (*files, folder):
        sync(path)
    replace_text(folder / SEAL, json.dumps(as_json({path.name: record_of(path) for path in files}), indent=1))


def broken_seal(folder: Path, weights: bool = False) -> str | None:
    """Why the files of a folder are not those that were sealed; None if they are, or if the folder was never sealed.

    Args:
        weights: read the weights too (a quarter of a second for each GiB). A run that goes on reads the engine's own
            copy; these are for ``from_pretrained``.
    """
    try:
        content = json.loads(read_regular_text(folder / SEAL))
        if not all(is_plain_name(name) for name in content):
            raise ValueError("it names files outside of the folder")
        records = {name: FileRecord(entry["num_bytes"], entry["crc32"]) for name, entry in content.items()}
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        return f"{folder / SEAL} is damaged ({type(error).__name__})"
    for name, expected in records.items():
        if name.endswith(".safetensors") and not weights:
            continue
        try:
            verify_file(folder / name, expected, SEAL)
        except DamagedCheckpoint as error:
            return str(error)
    return None


# -- which one to go on from ----------------------------------------------------------------------------------


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


def checkpoint_to_resume(output_dir: Path, asked: str | bool) -> tuple[str | bool, list[str]]:
    """The checkpoint that a Trainer goes on from, by its own files; the engine looks at its folder itself.

    Args:
        asked: its folder; or True: the newest whole one of ``output_dir``.

    Returns:
        The folder, or ``asked`` where there is none to choose; and what is wrong with newer ones.

    Raises:
        CheckpointError: a file of the folder asked for is missing or damaged.
    """
    if isinstance(asked, str | Path):
        if reason := why_incomplete(Path(asked)):
            raise CheckpointError(f"resume_from_checkpoint: {reason}; choose another checkpoint")
        _refuse_without_states(Path(asked))
        return asked, []
    usable, reasons = find_checkpoints(output_dir, "auto")
    if not usable:
        for _, newest in sorted(_numbered(output_dir))[-1:]:  # which transformers would take
            _refuse_without_states(newest)
        return asked, []
    return str(usable[0]), reasons


def _refuse_without_states(folder: Path) -> None:
    if why_incomplete(folder) is None and not any(folder.glob("global_step*")):
        raise CheckpointError(
            f"resume_from_checkpoint: {folder} holds the model without the states of training (save_only_model, or "
            "another trainer's); load it with from_pretrained and train anew, or choose another checkpoint"
        )


def why_incomplete(folder: Path) -> str | None:
    """What of the Trainer's own files is missing or damaged in ``folder``; None if nothing is."""
    try:
        state = json.loads(read_regular_text(folder / STATE_FILE))
        int(state["global_step"])
    except FileNotFoundError:
        return f"{folder} was never completed: it has no {STATE_FILE}"
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        return f"{folder / STATE_FILE} is damaged ({type(error).__name__})"
    return broken_seal(folder) or _why_not_saved(folder)


def is_sealed(folder: Path) -> bool:
    """Whether there is a list of what the Trainer wrote: another program's folders have none."""
    return (folder / SEAL).is_file()


def _why_not_saved(folder: Path) -> str | None:
    """What a Trainer would read although the checkpoint was saved without it; None if there is no such file or seal."""
    if not is_sealed(folder):
        return None
    listed = json.loads(read_regular_text(folder / SEAL))
    for name in _READ:
        if name not in listed and (folder / name).exists():
            return f"{folder / name} was not saved with the checkpoint: {SEAL} does not list it"
    return None


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


# -- which may go ---------------------------------------------------------------------------------------------


def rotate_checkpoints(
    output_dir: str | Path, limit: int | None, best: str | Path | None = None, model_only: bool = False
) -> list[Path]:
    """Delete ``checkpoint-N`` folders older than the ``limit`` newest whole ones. Each goes in one step. (The Trainer's
    ``save_total_limit`` counts by name: after a kill the newest may be half a checkpoint, and the only whole one would
    be deleted.)

    Args:
        limit: whole checkpoints that stay; None or 0: nothing is deleted.
        best: stays too, and counts.
        model_only: folders without the engine's checkpoint are whole too, as ``save_only_model`` writes them; sealed
        ones.

    Returns:
        What was deleted.
    """
    output_dir = Path(output_dir)
    if not limit or limit < 0:
        return []
    for path in output_dir.iterdir():
        if is_temporary(path) and path.name.startswith(".checkpoint-"):  # a deletion that was killed
            shutil.rmtree(path, ignore_errors=True)
    folders = sorted(_numbered(output_dir))

    def is_whole(path: Path) -> bool:
        return why_unusable(path) is None or (model_only and (path / SEAL).is_file() and why_incomplete(path) is None)

    whole = [(number, path) for number, path in folders if is_whole(path)]
    if not whole:
        return []
    newest, newest_path = whole[-1]
    kept = {newest_path.name, *([Path(best).name] if best else [])}
    for _, path in reversed(whole):
        if len(kept) < limit:
            kept.add(path.name)
    deleted = [path for number, path in folders if number < newest and path.name not in kept]
    for path in deleted:
        remove_folder(path)
    return deleted
