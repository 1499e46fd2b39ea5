#!/usr/bin/env bash
# The decoder on a CPU, in one run: gains from its linear layers and attention, an iteration against a bare forward, AR against
# Hugging Face's generate, prompt lookup against Hugging Face's on prompts whose answers copy them, continuous against fixed
# batches.
#
#   bash scripts/benchmarks/cpu.sh MODEL gsm8k_train.jsonl [FOLDER]
set -euo pipefail
model=${1:?which model?} questions=${2:?which questions?} folder=${3:-docs/results}
here=$(dirname "$0")

python "$here/linear.py" --model "$model" --filename "$questions" --output "$folder/linear.json"
python "$here/attention.py" --model "$model" --filename "$questions" --context 2048 --widths 1 4 16 --batches 1 \
    --output "$folder/attention.json"
python "$here/iteration.py" --model "$model" --filename "$questions" --prompts 1 --length 48 --output "$folder/iteration.json"
python "$here/decode.py" --model "$model" --task copying --prompts 16 --rounds 16 --batches 1 --contexts 0 --widths 8 16 \
    --guess prompt_lookup prompt_lookup+pool --length 64 --output "$folder/decode_copying.json"
python "$here/batching.py" --model "$model" --filename "$questions" --block_size 1 --rounds 4 --output "$folder/batching.json"
