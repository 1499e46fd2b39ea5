#!/usr/bin/env bash
# Chat, with the paper's 7B target model on 4 to 8 GPUs of 80 GB.
#
#   bash scripts/recipes/sharegpt.sh TRAIN TEST     # ShareGPT's JSON, or "" for the hub dataset; MT-bench's question.jsonl
#
# data      20,000 first turns of ShareGPT for collection, MT-bench's 80 questions for measurement
# tokens    up to 10 M response tokens per epoch (at most 512 each), one epoch
# time      has not been run
# memory    has not been run; as in gsm8k_7b.sh
# result    has not been run
#
# The answers are not graded here; `cllm acc --task sharegpt --eval_only --judge_model ...` does that.
set -euo pipefail
if [ $# -ne 2 ]; then
  echo "usage: bash $0 TRAIN TEST: ShareGPT's JSON (\"\" for the hub dataset) and MT-bench's question.jsonl" >&2
  exit 2
fi
# shellcheck source=scripts/recipes/chain.sh
source "$(dirname "$0")/chain.sh"
shards 8
recipe sharegpt sharegpt lmsys/vicuna-7b-v1.5 cllm/vicuna-7b-sharegpt-gpt4-48k 16 512 "$@"
sft=(--data_size 20000 --num_train_epochs 1 "${seven_billion[@]}")
collect=(--data_size 20000 --batch_size 32)
train=(--num_train_epochs 1 "${seven_billion[@]}")
make=(--minutes 240)
speedup=(--batch_size 1 --baseline generate)
acc=(--batch_size 16)
chain
