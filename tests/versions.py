"""The tests of engine and Trainer with other versions of what they stand on: ``make matrix [ROWS="name ..."]``.

Each row is installed into a folder of its own that goes before the environment's packages, so that only what is named
differs from constraints.txt. docs/versions.md has the results; pyproject.toml's lower bounds are the oldest rows that
pass.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
FOLDER = Path(os.environ.get("HIFT_MATRIX", ROOT / ".venv" / "matrix"))

ENGINE = ["tests/unit/test_deepspeed_seam.py", "tests/numerics/test_engine_one_rank.py",
          "tests/unit/test_deepspeed_zero3_seam.py"]  # fmt: skip
TRAINER = ["tests/unit/test_trainer.py", "tests/unit/test_grouping.py"]
TRL = ["tests/parity/test_trl.py", "tests/unit/test_data_prepare.py"]

# Older releases want huggingface_hub 1, which imports what 2 does not.
_HTTPX = ["huggingface_hub<2", "httpx", "httpcore", "h11", "anyio", "sniffio"]

# The index has torch with CUDA. Two small libraries of CUDA's are loaded where no GPU is; stand_ins() makes the rest.
_CUDA_12_4 = ["nvidia-cuda-runtime-cu12==12.4.127", "nvidia-cuda-cupti-cu12==12.4.127"]
_CUDA_12_8 = ["nvidia-cuda-runtime-cu12==12.8.90", "nvidia-cuda-cupti-cu12==12.8.90"]
_CUDA_13 = ["nvidia-cuda-runtime==13.0.96", "nvidia-cuda-cupti==13.0.85"]

# name: (what to install beside constraints.txt, tests)
ROWS: dict[str, tuple[list[str], list[str]]] = {
    "constraints.txt": ([], ENGINE + TRAINER + TRL),
    "torch 2.6.0": (["torch==2.6.0", "sympy==1.13.1", *_CUDA_12_4], ENGINE + TRAINER),
    "torch 2.8.0": (["torch==2.8.0", *_CUDA_12_8], ENGINE + TRAINER),
    "torch 2.14.1": (["torch==2.14.1", *_CUDA_13], ENGINE + TRAINER),
    "newest transformers": (["transformers"], TRAINER),
    "deepspeed 0.18.3": (["deepspeed==0.18.3"], ENGINE + TRAINER),
    "deepspeed 0.19.0": (["deepspeed==0.19.0"], ENGINE + TRAINER),
    "deepspeed 0.19.4": (["deepspeed==0.19.4"], ENGINE + TRAINER),
    "deepspeed 0.19.6": (["deepspeed==0.19.6"], ENGINE + TRAINER),
    "transformers 5.8.1": (["transformers==5.8.1", "tokenizers==0.22.2", *_HTTPX], TRAINER),
    "transformers 5.2.0": (["transformers==5.2.0", "tokenizers==0.22.2", *_HTTPX], TRAINER),
    "transformers 5.0.0": (["transformers==5.0.0", "tokenizers==0.22.2", *_HTTPX], TRAINER),
    "accelerate 1.10.1": (["accelerate==1.10.1"], TRAINER),
    "accelerate 1.6.0": (["accelerate==1.6.0"], TRAINER),
    "trl 1.0.0": (["trl==1.0.0"], TRL),
    "trl 0.29.1": (["trl==0.29.1"], TRL),
    "trl 0.24.0": (["trl==0.24.0"], TRL),
}  # fmt: skip


def stand_ins(folder: Path) -> None:
    """Beside a torch with CUDA, for each library that it names and that is not there, one in which every function ends
    the process: torch loads, and computes on the CPU, without the two GiB that nothing here would call."""
    libraries = [library for library in (folder / "torch" / "lib").glob("*.so*") if library.is_file()]
    there = {library.name for library in folder.rglob("*.so*")}

    def lines(*command: str) -> str:
        return "".join(subprocess.check_output([*command, str(library)], text=True) for library in libraries)

    missing = set(re.findall(r"NEEDED.*\[(lib(?:cu|nv|nccl)\S*)\]", lines("readelf", "-d"))) - there
    functions = set(
        re.findall(r" U ((?:cu(?!da|pti)|nccl|nvrtc|nvshmem|nvml)\w*)", lines("nm", "-D", "--undefined-only"))
    )
    source = "#include <stdlib.h>\n" + "".join(f"void {name}(void) {{ abort(); }}\n" for name in sorted(functions))
    for name in missing:
        out = ["-o", str(folder / "torch" / "lib" / name), f"-Wl,-soname,{name}"]
        subprocess.run(["gcc", "-shared", "-fPIC", "-w", *out, "-x", "c", "-"], input=source, text=True, check=True)


def main(wanted: list[str]) -> int:
    unknown = set(wanted) - set(ROWS)
    if unknown:
        print(f"matrix: no row named {sorted(unknown)}; rows: {sorted(ROWS)}", file=sys.stderr)
        return 2
    failed = 0
    for name in wanted or ROWS:
        packages, tests = ROWS[name]
        folder = FOLDER / re.sub(r"[^\w.]+", "_", name)
        if packages and not folder.exists():
            pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(folder)]
            subprocess.run([*pip, *packages], check=True, env={**os.environ, "DS_BUILD_OPS": "0"})
            stand_ins(folder)
        path = os.pathsep.join([str(folder), str(ROOT)])
        began = time.monotonic()
        done = subprocess.run(
            [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *tests], cwd=ROOT, text=True,
            env={**os.environ, "PYTHONPATH": path}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip
        failed += done.returncode != 0
        lines = done.stdout.strip().splitlines()
        summary = [line for line in lines if re.search(r"\d+ (passed|failed|error)", line)] or ["no summary"]
        print(f"| {name} | {summary[-1].strip('= ')} |", flush=True)
        for line in lines:
            if line.startswith(("FAILED", "ERROR", "E   ")):
                print(f"    {line[:200]}", flush=True)
        print(f"    {time.monotonic() - began:.0f} s", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
