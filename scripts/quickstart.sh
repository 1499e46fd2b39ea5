#!/usr/bin/env bash
# The whole chain on a small real model, on a CPU. SmolLM2-135M-Instruct first learns to answer questions about two small SQLite
# databases, which makes it the target model. Then `cllm make` trains a consistency adapter for it, so that it decodes several
# tokens per forward pass and still writes its own text, token for token.
# Takes 13 minutes on two cores with instructions for bfloat16, 25 to 40 without, and 5 GB of memory. --paper takes about 18 more and
# 9 GB.
#
#   bash scripts/quickstart.sh            # results in quickstart/
#   bash scripts/quickstart.sh --paper    # also train all weights on Jacobi trajectories, as in the paper
#
# The end of the output shows the commands for GSM8K and a 7B target.
set -euo pipefail
# shellcheck source=scripts/environment.sh
source "$(dirname "$0")/environment.sh"
case "$*" in
  "") paper= ;;
  --paper) paper=yes ;;
  *) echo "error: unknown arguments $*; the only option is --paper" >&2; exit 2 ;;
esac
use_environment requirements.txt

BLOCK=8 LENGTH=80 QUESTIONS=576 TEST=32
out=quickstart
mkdir -p "$out"
: > "$out/seconds.txt"
# Every step allocates and frees large tensors; without these settings, glibc returns their memory to the system each time.
export MALLOC_MMAP_THRESHOLD_=4294967296 MALLOC_TRIM_THRESHOLD_=17179869184
export TOKENIZERS_PARALLELISM=false

stage() { # NAME TEXT COMMAND...
  timed "$out/seconds.txt" "$@"
}

training=(--attn_implementation eager --train_sampling_strategy group_by_length --logging_steps 8 --save_strategy no --use_cpu --report_to none)
mixed=() frozen=() dtype=()
if grep -qE "avx512_bf16|amx_bf16" /proc/cpuinfo 2> /dev/null; then # instructions for bfloat16 speed up training and large batches
  mixed=(--bf16) frozen=(--dtype bfloat16)
fi
if grep -q amx_bf16 /proc/cpuinfo 2> /dev/null; then # and matrix units for it also speed up wide windows
  dtype=(--dtype bfloat16)
fi

get_model() { model=$(python scripts/small_model.py); }
stage model "fetching the small model (once; kept in the user's cache)" get_model
stage questions "writing two databases, $QUESTIONS training questions and $TEST held-out ones" \
  python scripts/sql_questions.py "$out/data" "$QUESTIONS" "$TEST"
stage target "fine-tuning the small model on their answers, which makes the target model" \
  cllm sft --model "$model" --task spider --filename "$out/data" --output_dir "$out/target" \
  --num_train_epochs 1 --per_device_train_batch_size 4 --learning_rate 2e-4 --lr_scheduler_type cosine --warmup_steps 0.05 \
  "${training[@]}" "${mixed[@]}"
rm -rf "$out/cllm" # start over: make would resume its own folder and refuse another one
stage make "speeding it up: its own responses, a consistency adapter, the fastest window, and a measurement on the held-out questions" \
  cllm make "$out/target" "spider:$out/data" "$out/cllm" --held_out "spider:$out/data" --max_new_seq_len $LENGTH --device cpu "${dtype[@]}"
if [ "$paper" ]; then
  stage collect "as in the paper: collecting the Jacobi trajectories of the target model's responses" \
    cllm collect --task spider --model "$out/target" --filename "$out/data" --output "$out/trajectories" --no-resume \
    --max_new_tokens $BLOCK --max_new_seq_len $LENGTH --batch_size 64 --device cpu "${frozen[@]}"
  stage train "training all weights on them" \
    bash cllm/train_cllm.sh "$out/target" "$out/trajectories" "$out/paper" $BLOCK --num_train_epochs 1 \
    --per_device_train_batch_size 4 --learning_rate 1.5e-4 --adam_beta2 0.95 --states_per_block 2 --lr_scheduler_type cosine \
    --warmup_steps 0.05 "${training[@]}" "${mixed[@]}"
  stage measure "measuring the result on the same questions" \
    cllm speedup --task spider --filename "$out/data" --max_new_seq_len $LENGTH --test_model "$out/paper" \
    --target_model "$out/target" --output "$out/paper.json" --device cpu "${dtype[@]}"
else
  rm -f "$out/paper.json"
fi
python scripts/quickstart_report.py "$out"
