#!/usr/bin/env bash
# Fine-tune on this machine, one process per accelerator, through DeepSpeed's launcher:
#   launch/single_node.sh RUN.yaml [section.key=value ...]
# NUM_GPUS      fewer accelerators than there are, or the number of processes on a CPU-only machine
# MASTER_PORT   where the processes meet; two jobs on one machine need two (default: a random one)
# PYTHON        default: this checkout's .venv, else python
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
if [ $# -lt 1 ]; then
    sed -n '2,6s/^# \{0,1\}//p' "${BASH_SOURCE[0]}" >&2
    exit 2
fi
python=${PYTHON:-$([ -x "$root/.venv/bin/python" ] && echo "$root/.venv/bin/python" || command -v python3)}
exec "$python" -m deepspeed.launcher.runner ${NUM_GPUS:+--num_gpus "$NUM_GPUS"} \
    --master_port "${MASTER_PORT:-$((20000 + RANDOM % 20000))}" "$root/launch" "$@"
