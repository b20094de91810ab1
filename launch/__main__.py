"""``deepspeed launch RUN.yaml [section.key=value ...]``: Python runs this folder, once per rank."""

import sys
from pathlib import Path

# Where Python has looked for it anyway, unless it was `-m launch`.
sys.path[0] = str(Path(__file__).resolve().parent)

import finetune  # noqa: E402

if __name__ == "__main__":
    finetune.start()
