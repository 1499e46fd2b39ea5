#!/usr/bin/env bash
# The main job end to end on a small real model, on a CPU: SmolLM2-135M-Instruct first learns to solve generated word problems,
# which makes it a target model, as the paper's targets were made; then it learns to decode several tokens per forward pass.
# About a quarter of an hour on two cores; memory under 8 GB.
#
#   bash scripts/quickstart.sh            # results in quickstart/
#
# The full-size recipe is the same commands with GSM8K, a 7B target, block 16 and 8 GPUs; see the end of the output.
set -euo pipefail
# shellcheck source=scripts/environment.sh
source "$(dirname "$0")/environment.sh"
use_environment requirements.txt

BLOCK=8 LENGTH=80 TRAIN=256 COLLECT=112 TEST=24
out=quickstart
mkdir -p "$out"
: > "$out/seconds.txt"
# Large tensors come and go in every step; without these, glibc hands their memory back to the system each time.
export MALLOC_MMAP_THRESHOLD_=4294967296 MALLOC_TRIM_THRESHOLD_=17179869184
export TOKENIZERS_PARALLELISM=false

stage() { # NAME TEXT COMMAND...
  timed "$out/seconds.txt" "$@"
}

measure() { # RESULT FLAGS...
  local result=$1
  shift
  cllm speedup --task arithmetic --filename "$out/test.jsonl" --max_new_tokens $BLOCK --max_new_seq_len $LENGTH \
    --output "$result" "$@" > "${result%.json}.txt"
}

training=(--train_sampling_strategy group_by_length --lr_scheduler_type cosine --warmup_steps 0.05 --logging_steps 8
  --save_strategy no --use_cpu --report_to none)

get_model() { model=$(python scripts/small_model.py); }
stage model "the small model (once; kept in the user's cache)" get_model
stage problems "writing $TRAIN word problems to learn from and $TEST held out" \
  python scripts/word_problems.py "$out" "$TRAIN" "$TEST"
stage target "fine-tuning the small model on their answers: the target model" \
  cllm sft --model "$model" --task arithmetic --filename "$out/train.jsonl" --output_dir "$out/target" \
  --num_train_epochs 2 --per_device_train_batch_size 8 --learning_rate 1e-4 "${training[@]}"
stage collect "collecting Jacobi trajectories of the target model" \
  cllm collect --task arithmetic --model "$out/target" --filename "$out/train.jsonl" --data_size $COLLECT \
  --output "$out/trajectories" --no-resume --max_new_tokens $BLOCK --max_new_seq_len $LENGTH --batch_size 32
stage train "training the CLLM" \
  bash cllm/train_cllm.sh "$out/target" "$out/trajectories" "$out/cllm" $BLOCK \
  --num_train_epochs 2 --per_device_train_batch_size 4 --learning_rate 1.5e-4 --adam_beta2 0.95 --states_per_block 2 --ar_weight 10 \
  "${training[@]}"
stage before "measuring the target model on the held-out problems" \
  measure "$out/before.json" --test_model "$out/target"
stage after "measuring the CLLM on the same problems" \
  measure "$out/after.json" --test_model "$out/cllm" --target_model "$out/target"
python scripts/quickstart_report.py "$out"
