#!/usr/bin/env bash
# GSM8K with SmolLM2-135M-Instruct on one GPU: the model first learns the dataset's answers, which makes it the target model, then
# to write several tokens per forward.
#
#   bash scripts/recipes/gsm8k_smollm2.sh [TRAIN TEST]             # GSM8K's JSONL files; default: the hub dataset
#   REDUCED=1 bash scripts/recipes/gsm8k_smollm2.sh [TRAIN TEST]   # a functional check on a CPU: 256 problems
#
# data      7,473 problems for training, 1,319 for measurement; probes during training use the first 64 of the latter
# tokens    0.92 M answer tokens per epoch (123 each), three epochs; about as many response tokens of the target
# time      has not been run; should take minutes on one GPU
# memory    has not been run
# result    has not been run
set -euo pipefail
# shellcheck source=scripts/recipes/chain.sh
source "$(dirname "$0")/chain.sh"
recipe gsm8k_smollm2 gsm8k HuggingFaceTB/SmolLM2-135M-Instruct "" 16 320 "$@"
probe=(--on_collapse stop "${probe_data[@]}")
if [ -n "${REDUCED:-}" ]; then
  length=${LENGTH:-128}
  sft=(--data_size 256 --num_train_epochs 2 --per_device_train_batch_size 8 --learning_rate 1e-4)
  collect=(--data_size 112 --batch_size 32)
  train=(--num_train_epochs 2 --per_device_train_batch_size 4 --learning_rate 1.5e-4 "${probe[@]}" --probe_prompts 8
    --probe_length "$length" --probe_every 0.25)
  make=(--minutes 8)
  speedup=(--data_size 16 --batch_size 16)
  acc=(--data_size 16 --batch_size 16)
else
  sft=(--num_train_epochs 3 --per_device_train_batch_size 32 --learning_rate 1e-4)
  collect=(--batch_size 256)
  train=(--num_train_epochs 3 --per_device_train_batch_size 32 --learning_rate 1.5e-4 "${probe[@]}" --probe_prompts 64
    --probe_length "$length")
  speedup=(--data_size 200 --baseline generate)
  acc=(--batch_size 128)
fi
chain
