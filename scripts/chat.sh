#!/usr/bin/env bash
# Chat with a model:  bash scripts/chat.sh MODEL [CLLM_TYPE] [more flags of `cllm chat`]
set -euo pipefail
[ $# -ge 1 ] || { echo "usage: bash scripts/chat.sh MODEL [CLLM_TYPE] [more flags]" >&2; exit 2; }
model=$1 type=gsm8k
shift
if [ $# -ge 1 ] && [ "${1#-}" = "$1" ]; then
  type=$1
  shift
fi
exec python -m cllm chat --model "$model" --cllm_type "$type" --stats "$@"
