"""The default tests under the kernels of other processors: ``make test-kernels [-- pytest's arguments]``.

torch, MKL and oneDNN choose their kernels by what the processor can do, and another kernel may sum in another order.
Each library can be told to use those of an older processor, so that a test that asks for the same bits of two
*different* computations fails here and not on the next user's machine.
"""

from __future__ import annotations

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


def main(arguments: list[str]) -> int:
    failed = []
    for name, variables in KERNELS.items():
        for threads in THREADS:
            row = f"{name}, {threads} thread{'s' if threads > 1 else ''}"
            print(f"== {row}: {variables}", flush=True)
            env = {**os.environ, **variables, "OMP_NUM_THREADS": str(threads)}
            command = [sys.executable, "-m", "pytest", "-q", "-n", "3", "--dist", "loadfile", *arguments]
            if subprocess.run(command, env=env).returncode:
                failed.append(row)
    print("failed: " + "; ".join(failed) if failed else "the same under all kernels")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
