#!/usr/bin/env bash
# Train on this machine, one process per accelerator:
#   launch/local.sh RUN.yaml [key.path=value ...]
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
exec "$root/.venv/bin/harness" train "$@"
