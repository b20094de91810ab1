#!/usr/bin/env bash
# Fine-tune on several machines. The hostfile is checked first; see launch/hostfile.example and docs/launch.md.
#
# From one node, which reaches the others by ssh without a password:
#   launch/multi_node.sh HOSTFILE RUN.yaml [section.key=value ...]
# Without ssh, the same command on every node, with its line in the hostfile counted from 0 and the first node's address:
#   NODE_RANK=0 MASTER_ADDR=10.0.0.1 launch/multi_node.sh HOSTFILE RUN.yaml [section.key=value ...]
#
# LAUNCHER      pdsh (default), openmpi, mpich, impi, mvapich or slurm: DeepSpeed's --launcher
# MASTER_PORT   where the processes meet (default: 29500)
# PYTHON        on every node at the same path (default: this checkout's .venv, else python3)
# SKIP_SSH_CHECK=1   start without asking every host first
# NCCL_*, PYTHON* and UCX_* variables travel to the other nodes; others belong into ~/.deepspeed_env (NAME=value lines).
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
if [ $# -lt 2 ]; then
    sed -n '2,14s/^# \{0,1\}//p' "${BASH_SOURCE[0]}" >&2
    exit 2
fi
hostfile=$1
shift
python=${PYTHON:-$([ -x "$root/.venv/bin/python" ] && echo "$root/.venv/bin/python" || command -v python3)}
runner=("$python" -m deepspeed.launcher.runner --hostfile "$hostfile" --master_port "${MASTER_PORT:-29500}")
"$python" "$root/launch/hostfile.py" "$hostfile"

if [ -n "${NODE_RANK:-}" ]; then
    if [ -z "${MASTER_ADDR:-}" ]; then
        echo "multi_node.sh: NODE_RANK is set, so MASTER_ADDR must name the first node's address" >&2
        exit 2
    fi
    exec "${runner[@]}" --no_ssh --node_rank "$NODE_RANK" --master_addr "$MASTER_ADDR" "$root/launch" "$@"
fi

launcher=${LAUNCHER:-pdsh}
if [ "$launcher" = pdsh ] && ! command -v pdsh >/dev/null; then
    echo "multi_node.sh: pdsh is not installed here; install it, choose another LAUNCHER, or start every node with NODE_RANK" >&2
    exit 2
fi
if [ -z "${SKIP_SSH_CHECK:-}" ]; then
    "$python" "$root/launch/hostfile.py" "$hostfile" --ssh --python "$python" >/dev/null
fi
if [ "$launcher" = pdsh ]; then
    # A shell on every node would evaluate $(...) and backticks in overrides: they travel as one word without such signs.
    set -- "--encoded=$("$python" -c 'import base64, json, sys
print(base64.urlsafe_b64encode(json.dumps(sys.argv[1:]).encode()).decode())' "$@")"
fi
# --force_multi: also when the hostfile names one node that is not this one.
exec "${runner[@]}" --force_multi --launcher "$launcher" "$root/launch" "$@"
