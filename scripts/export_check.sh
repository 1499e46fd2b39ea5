#!/usr/bin/env bash
# Try an exported checkpoint where nothing but torch and transformers is installed: in a new virtual environment, outside of the
# project, which is removed again. Exit status 1 where a text differs from AR's.
#
#   bash scripts/export_check.sh CHECKPOINT   # what `cllm export`, also of a consistency adapter, or `cllm train` wrote
set -euo pipefail
[ $# -eq 1 ] || { echo "usage: bash scripts/export_check.sh CHECKPOINT" >&2; exit 2; }
[ -f "$1/custom_generate/generate.py" ] || { echo "error: $1 is no exported checkpoint; run cllm export" >&2; exit 2; }
checkpoint=$(cd "$1" && pwd)
cd "$(dirname "$0")/.."
# shellcheck source=scripts/environment.sh
source scripts/environment.sh

new=$(mktemp -d)
trap 'rm -rf "$new"' EXIT
"$(find_python)" -m venv "$new/venv"
mapfile -t pinned < <(grep -E '^(torch|transformers)==' requirements.txt)
"$new/venv/bin/python" -m pip install --quiet --disable-pip-version-check "${pinned[@]}"
cp scripts/export_check.py "$new"
cd "$new"
export HF_HUB_OFFLINE=1 HF_MODULES_CACHE="$new/modules" TRANSFORMERS_VERBOSITY=error
venv/bin/python -I export_check.py "$checkpoint"
