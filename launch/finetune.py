"""``deepspeed launch/finetune.py RUN.yaml [section.key=value ...]``: fine-tune a model as a run file says.

DeepSpeed's launcher starts this once per rank. Read on in hift_ds/train/worker.py (one process and its
errors), then hift_ds/train/finetune.py (the phases of a run).
"""

import sys
from pathlib import Path


def start() -> None:
    sys.path[0] = str(Path(__file__).resolve().parent.parent)  # this checkout, installed or not
    from hift_ds.train.worker import main

    sys.exit(main())


if __name__ == "__main__":
    start()
