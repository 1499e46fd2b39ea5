#!/usr/bin/env bash
# Set up the environment and run linter, formatter check, type checker and tests. Takes 18 to 45 minutes on two cores.
#
#   bash scripts/test.sh                  # everything
#   bash scripts/test.sh -m "not slow"    # arguments go to pytest
set -euo pipefail
# shellcheck source=scripts/environment.sh
source "$(dirname "$0")/environment.sh"
use_environment requirements-dev.txt

echo "==> linter, formatter and type checker"
ruff check .
ruff format --check .
mypy cllm scripts/benchmarks
echo "==> fetching the small real model (once; kept in the user's cache)"
CLLM_TEST_MODEL=$(python scripts/small_model.py)
workers=$(nproc)  # one thread and one test file at a time each; counted before setting OMP_NUM_THREADS, which nproc obeys
export CLLM_TEST_MODEL HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false OMP_NUM_THREADS=1
echo "==> tests"
exec python -m pytest -n "$((workers < 8 ? workers : 8))" --dist loadfile --no-loadscope-reorder --durations 60 "$@"
