#!/usr/bin/env bash
# Check and measure decoding on a CUDA device: the tests marked gpu, captured and compiled steps against plain ones, host
# synchronizations, speed. Writes one JSON named after the device to docs/results.
#
#   bash scripts/gpu_check.sh [--model MODEL] [--output FILE]     # default: the small real model
#   bash scripts/gpu_check.sh --device cpu --model MODEL          # the same functions without a GPU; the figures mean nothing
set -euo pipefail
# shellcheck source=scripts/environment.sh
source "$(dirname "$0")/environment.sh"
use_environment requirements-dev.txt
exec python scripts/gpu_check.py "$@"
