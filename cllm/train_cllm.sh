#!/usr/bin/env bash
# Fine-tune a target model into a CLLM.
#
#   bash train_cllm.sh MODEL TRAJECTORIES OUTPUT BLOCK_SIZE [more flags]
#
# More flags are those of `cllm train --help`: all of transformers.TrainingArguments and the objective's own. With --lossless
# the target model stays as it is, and OUTPUT gets an adapter that drafts for it (`cllm train --lossless --help`).
# NUM_PROCESSES=8 trains on eight GPUs through `accelerate launch`; ACCELERATE_ARGS is passed on to it: a configuration from
# cllm/configs, and on several hosts, on each of them (NUM_PROCESSES counts the GPUs of all),
#   ACCELERATE_ARGS="--num_machines 2 --machine_rank 0 --main_process_ip HOST --main_process_port 29500"
set -euo pipefail

if [ $# -lt 4 ]; then
  echo "usage: bash train_cllm.sh MODEL TRAJECTORIES OUTPUT BLOCK_SIZE [more flags]" >&2
  exit 2
fi
model=$1 trajectories=$2 output=$3 block_size=$4
shift 4

launch=(python)
if [ "${NUM_PROCESSES:-1}" -gt 1 ]; then
  # shellcheck disable=SC2206
  launch=(python -m accelerate.commands.launch --num_processes "$NUM_PROCESSES" ${ACCELERATE_ARGS:-})
fi
exec "${launch[@]}" -m cllm train \
  --model "$model" --trajectories "$trajectories" --output_dir "$output" --block_size "$block_size" "$@"
