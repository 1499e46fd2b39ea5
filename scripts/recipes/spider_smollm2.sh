#!/usr/bin/env bash
# Spider (text to SQL) with SmolLM2-135M-Instruct on one GPU.
#
#   bash scripts/recipes/spider_smollm2.sh SPIDER                  # the folder as it is distributed, databases included
#   REDUCED=1 bash scripts/recipes/spider_smollm2.sh SPIDER        # a functional check on a CPU: 256 questions
#
# data      7,000 questions for training, dev's 1,034 for measurement; probes during training use the first 64 of the latter
# tokens    0.24 M query tokens per epoch (34 each, after the schemas in the prompts), three epochs; the target writes about as many
# time      has not been run; should take minutes on one GPU
# memory    has not been run
# result    has not been run
set -euo pipefail
if [ $# -ne 1 ]; then
  echo "usage: bash $0 SPIDER, a folder with train_spider.json, dev.json, tables.json and database/" >&2
  exit 2
fi
# shellcheck source=scripts/recipes/chain.sh
source "$(dirname "$0")/chain.sh"
recipe spider_smollm2 spider HuggingFaceTB/SmolLM2-135M-Instruct "" 16 128 "$1" "$1"
probe=(--on_collapse stop --probe_length "$length" "${probe_data[@]}")
if [ -n "${REDUCED:-}" ]; then
  sft=(--data_size 256 --num_train_epochs 2 --per_device_train_batch_size 8 --learning_rate 1e-4)
  collect=(--data_size 112 --batch_size 16)
  train=(--num_train_epochs 2 --per_device_train_batch_size 4 --learning_rate 1.5e-4 "${probe[@]}" --probe_prompts 8
    --probe_every 0.25)
  make=(--minutes 8)
  speedup=(--data_size 16 --batch_size 8)
  acc=(--data_size 16 --batch_size 8)
else
  sft=(--num_train_epochs 3 --per_device_train_batch_size 16 --learning_rate 1e-4)
  collect=(--batch_size 128)
  train=(--num_train_epochs 3 --per_device_train_batch_size 16 --learning_rate 1.5e-4 "${probe[@]}" --probe_prompts 64)
  speedup=(--data_size 200 --baseline generate)
  acc=(--batch_size 64)
fi
chain
