#!/usr/bin/env bash
# GSM8K with a 7B target model on 4 to 8 GPUs of 80 GB. As in the paper: its target (Abel-7B, already fine-tuned on the dataset),
# block 16, learning rate 2e-5.
#
#   bash scripts/recipes/gsm8k_7b.sh [TRAIN TEST]                       # GSM8K's JSONL files; default: the hub dataset
#   NUM_PROCESSES=4 bash scripts/recipes/gsm8k_7b.sh                    # 4 GPUs
#   TARGET= MODEL=Qwen/Qwen2.5-7B bash scripts/recipes/gsm8k_7b.sh      # also make the target model
#
# data      7,473 problems for collection, 1,319 for measurement
# tokens    about 1 M response tokens per epoch, one epoch
# time      has not been run
# memory    has not been run; estimated per GPU, without activations: 28 GB for the frozen target, plus 112 GB divided by the
#           number of GPUs for weights, gradients and Adam
# result    has not been run
#
# The weights are sharded, so there are no probes during training: look at the report before you use the result.
set -euo pipefail
# shellcheck source=scripts/recipes/chain.sh
source "$(dirname "$0")/chain.sh"
shards 8
recipe gsm8k_7b gsm8k meta-llama/Llama-2-7b-hf GAIR/Abel-7B-001 16 512 "$@"
sft=(--num_train_epochs 3 "${seven_billion[@]}")
collect=(--batch_size 32)
train=(--num_train_epochs 1 "${seven_billion[@]}")
speedup=(--data_size 200 --baseline generate)
acc=(--batch_size 32)
chain
