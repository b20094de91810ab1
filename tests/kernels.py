"""The default tests under the kernels of other processors: ``make test-kernels``, or some rows of it,
``python -m tests.kernels --rows "AVX2, 2" -- pytest's arguments``.

torch, MKL and oneDNN choose their kernels by what the processor can do, and another kernel may sum in another order.
Each library can be told to use those of an older processor, so that a test that asks for the same bits of two
*different* computations fails here and not on the next user's machine.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys

KERNELS = {
    # torch would pack bf16 weights for oneDNN's AMX kernels, and fail where its own are without AVX-512.
    "no vector instructions": {
        "ATEN_CPU_CAPABILITY": "default",
        "MKL_CBWR": "COMPATIBLE",
        "ONEDNN_MAX_CPU_ISA": "SSE41",
    },
    "AVX2": {"ATEN_CPU_CAPABILITY": "avx2", "MKL_CBWR": "AVX2", "ONEDNN_MAX_CPU_ISA": "AVX2"},
    "this processor's": {},
}
THREADS = (1, 2)
# Two threads of each of three workers on two cores: a thread that waits for its sibling must not spin meanwhile.
WAIT = {"OMP_WAIT_POLICY": "PASSIVE"}


def rows() -> dict[str, dict[str, str]]:
    """The variables of each row, by its name."""
    return {
        f"{name}, {threads} thread{'s' if threads > 1 else ''}": {**variables, "OMP_NUM_THREADS": str(threads), **WAIT}
        for name, variables in KERNELS.items()
        for threads in THREADS
    }


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.kernels", description="The default tests, row by row.")
    parser.add_argument(
        "--rows", action="append", default=[], help=f"rows whose names contain this: {'; '.join(rows())}"
    )
    parser.add_argument("pytest", nargs="*", help="arguments of pytest, after --")
    args = parser.parse_args(arguments)
    chosen = {name: env for name, env in rows().items() if not args.rows or any(part in name for part in args.rows)}
    if not chosen:
        parser.error(f"no row contains {args.rows}; there are: {'; '.join(rows())}")
    failed = []
    for name, variables in chosen.items():
        print(f"== {name}: {variables}", flush=True)
        command = [sys.executable, "-m", "pytest", "-q", "-n", "3", "--dist", "loadfile", *args.pytest]
        if subprocess.run(command, env={**os.environ, **variables}).returncode:
            failed.append(name)
    print(f"failed: {'; '.join(failed)}" if failed else f"the same under {len(chosen)} of {len(rows())} rows")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
