"""``deepspeed --module hift_ds.launch RUN.yaml [section.key=value ...]``: one rank of a job, for any launcher that
starts a module: DeepSpeed's, ``torchrun -m``, ``srun python -m``. In a checkout ``deepspeed launch`` does the same.
"""

import sys

from hift_ds.train.worker import main

if __name__ == "__main__":
    sys.exit(main())
