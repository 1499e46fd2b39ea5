#!/usr/bin/env bash
# Talk to a model:  bash scripts/chat.sh MODEL [CLLM_TYPE] [more flags of `cllm chat`]
set -euo pipefail
[ $# -ge 1 ] || { echo "usage: bash scripts/chat.sh MODEL [CLLM_TYPE] [more flags]" >&2; exit 2; }
model=$1 type=${2:-gsm8k}
shift $(( $# > 1 ? 2 : 1 ))
exec python -m cllm chat --model "$model" --cllm_type "$type" --stats "$@"
