#!/usr/bin/env bash
# Train on several machines with DeepSpeed's own launcher (pdsh over ssh), started on any one of them:
#   launch/multinode.sh HOSTFILE RUN.yaml [key.path=value ...]
# Each machine needs this checkout with its .venv, the data and the run directory under the same path (a shared file
# system), and must accept ssh from here without a password. MASTER_ADDR and MASTER_PORT say where the ranks meet;
# default: the first machine of HOSTFILE, port 29500. Variables for all ranks go into .deepspeed_env.
set -euo pipefail

if (($# < 2)); then
    echo "usage: launch/multinode.sh HOSTFILE RUN.yaml [key.path=value ...]" >&2
    exit 2
fi
hostfile=$1
shift
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
first_host=$(awk '!/^[[:space:]]*(#|$)/ { print $1; exit }' "$hostfile")

# Without the keep-alive a machine that loses its power is never missed.
export PDSH_SSH_ARGS_APPEND="-oServerAliveInterval=5 -oServerAliveCountMax=3 ${PDSH_SSH_ARGS_APPEND:-}"
exec "$root/.venv/bin/deepspeed" --hostfile "$hostfile" --launcher pdsh \
    --master_addr "${MASTER_ADDR:-$first_host}" --master_port "${MASTER_PORT:-29500}" \
    "$root/launch/train.py" "$@"
