#!/usr/bin/env bash
# Check an exported checkpoint with nothing but torch and transformers, in a temporary virtual environment outside the project.
# Exit status 1 if a text differs from AR decoding's.
#
#   bash scripts/export_check.sh CHECKPOINT   # a folder that `cllm export` or `cllm train` of all weights wrote
set -euo pipefail
[ $# -eq 1 ] || { echo "usage: bash scripts/export_check.sh CHECKPOINT" >&2; exit 2; }
[ -f "$1/custom_generate/generate.py" ] || { echo "error: $1 is not an exported checkpoint; run cllm export" >&2; exit 2; }
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
