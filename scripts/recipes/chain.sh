# Sourced by the recipes: the whole chain from a general model to a report on its CLLM.
#
#   recipe NAME TASK MODEL TARGET BLOCK LENGTH [TRAIN TEST]   set up the recipe; results go to recipes/NAME
#   chain                                                     run it with the flags in the arrays sft, collect, train, speedup, acc;
#                                                             with LOSSLESS=1, `cllm make` and the array make replace collect and train
#
# TARGET is an existing target model; "" makes one by fine-tuning MODEL on the task's answers. TRAIN and TEST are files or folders
# as `cllm collect --filename` and `cllm acc --filename` take them, "" for the task's hub dataset. Run again, a recipe skips
# finished stages and resumes an interrupted one; remove the folder to start over. The environment may set MODEL, TARGET, BLOCK,
# LENGTH, OUT (the folder), NUM_PROCESSES (GPUs) and ACCELERATE_ARGS; REDUCED=1 selects the reduced form for a CPU, if there is
# one. LOSSLESS=1 makes the target faster by a consistency adapter, which leaves its text as it is; it uses all GPUs there are.
# shellcheck disable=SC2034
source "$(dirname "${BASH_SOURCE[0]}")/../environment.sh"
export TOKENIZERS_PARALLELISM=false

recipe() {
  local name=$1
  task=$2 model=$(place "${MODEL:-$3}") target=$(place "${TARGET-$4}") block=${BLOCK:-$5} length=${LENGTH:-$6}
  train_data=() test_data=() probe_data=() learned=$task
  if [ -n "${7:-}" ]; then
    train_data=(--filename "$(place "$7")")
    learned+=:${train_data[1]}
  fi
  if [ -n "${8:-}" ]; then
    test_data=(--filename "$(place "$8")")
    probe_data=(--probe_file "${test_data[1]}")
  fi
  out=$(realpath -m "${OUT:-$(dirname "${BASH_SOURCE[0]}")/../../recipes/$name${LOSSLESS:+_lossless}${REDUCED:+_reduced}}")
  sft=() collect=() train=() make=() speedup=() acc=()
  common=(--lr_scheduler_type cosine --warmup_steps 0.05 --adam_beta2 0.95 --train_sampling_strategy group_by_length
    --save_strategy epoch --save_total_limit 1 --resume_from_checkpoint True --report_to none)
  if [ -n "${REDUCED:-}" ]; then
    common+=(--use_cpu --logging_steps 4)
    # Every step allocates and frees large tensors; without these settings, glibc returns their memory to the system each time.
    export MALLOC_MMAP_THRESHOLD_=4294967296 MALLOC_TRIM_THRESHOLD_=17179869184
  else
    common+=(--bf16 --logging_steps 20)
  fi
  use_environment requirements.txt
  mkdir -p "$out"
  touch "$out/seconds.txt"
}

place() { # print the absolute form of an existing path, and anything else (a hub name) unchanged
  if [ -e "$1" ]; then realpath "$1"; else echo "$1"; fi
}

shards() { # GPUS: shard training over this many GPUs unless the environment says otherwise; sets the flags for 7B models
  export NUM_PROCESSES=${NUM_PROCESSES-$1} ACCELERATE_ARGS=${ACCELERATE_ARGS---config_file cllm/configs/fsdp2.yaml}
  local steps=$((NUM_PROCESSES < 8 ? 8 / NUM_PROCESSES : 1)) # 32 responses each
  seven_billion=(--per_device_train_batch_size 4 --gradient_accumulation_steps $steps --learning_rate 2e-5
    --gradient_checkpointing)
}

chain() {
  if [ -z "$target" ]; then
    target=$out/target
    stage target "fine-tuning $model on the answers, which makes the target model" on_all_gpus sft --model "$model" --task "$task" \
      "${train_data[@]}" --output_dir "$target" "${common[@]}" "${sft[@]}"
    rm -rf "$target"/checkpoint-*
  fi
  if [ -n "${LOSSLESS:-}" ]; then
    stage make "making the target model faster" python -m cllm make "$target" "$learned" "$out/cllm" \
      --max_new_seq_len "$length" "${make[@]}"
    measure target "$target"
    measure cllm "$out/cllm"
  else
    stage trajectories "collecting the target model's trajectories" on_all_gpus collect --task "$task" --model "$target" \
      "${train_data[@]}" --output "$out/trajectories" --max_new_tokens "$block" --max_new_seq_len "$length" "${collect[@]}"
    stage cllm "training the CLLM" bash cllm/train_cllm.sh "$target" "$out/trajectories" "$out/cllm" "$block" \
      "${common[@]}" "${train[@]}"
    rm -rf "$out"/cllm/checkpoint-*
    speedup+=(--max_new_tokens "$block") acc+=(--max_new_tokens_for_consistency "$block")
    measure target "$target"
    measure cllm "$out/cllm" --target_model "$target"
  fi
  stage report "writing $out/report.html" python -m cllm report "$out" --output "$out/report.html"
}

measure() { # NAME MODEL FLAGS...: measure a model's speed and accuracy
  local name=$1 model=$2
  shift 2
  stage "speedup of $name" "measuring the speed of $name" python -m cllm speedup --task "$task" --test_model "$model" \
    "${test_data[@]}" --max_new_seq_len "$length" --output "$out/$name.speedup.json" "${speedup[@]}" "$@"
  stage "accuracy of $name" "measuring the accuracy of $name" python -m cllm acc --task "$task" --model_dir "$model" \
    "${test_data[@]}" --use_consistency_decoding --max_tokens "$length" --output_file_name "$out/$name.answers.jsonl" "${acc[@]}"
}

stage() { # NAME TEXT COMMAND...: run a stage unless it has already finished
  if grep -q "^$1: " "$out/seconds.txt"; then
    echo "==> $1: already done"
  else
    timed "$out/seconds.txt" "$@"
  fi
}

on_all_gpus() { # COMMAND FLAGS...: run `cllm COMMAND` in NUM_PROCESSES processes
  if [ "${NUM_PROCESSES:-1}" -gt 1 ]; then
    # shellcheck disable=SC2086
    python -m accelerate.commands.launch --num_processes "$NUM_PROCESSES" ${ACCELERATE_ARGS:-} -m cllm "$@"
  else
    python -m cllm "$@"
  fi
}
