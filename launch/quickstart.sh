#!/usr/bin/env bash
# From nothing to a fine-tuned adapter and its report: real Gemma 3 270M on generated word problems.
#   bash launch/quickstart.sh [WORKDIR] [--config.key=value ...]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
workdir=runs/quickstart
if [ $# -gt 0 ] && [ "${1#-}" = "$1" ]; then workdir=$1; shift; fi
bash launch/setup.sh .venv demo
.venv/bin/python -m gemma_lora.train --config configs/quickstart.py --workdir "$workdir" "$@"
