#!/usr/bin/env bash
# Check and measure this project on one GPU, and make a CLLM there, within minutes and without network; docs/benchmarks/gpu.md
# says how. What it needs was packed by scripts/gpu/pack.sh; it runs with the Python at hand.
#
#   bash scripts/gpu/run.sh PARTS OUTPUT [--minutes N] [--rehearse]
#
# PARTS: what pack.sh wrote. OUTPUT/results: a JSON file of each stage that has ended, and a log; OUTPUT/work: all else. Stages,
# in this order, with their seconds: environment 60, tests 90, speed 90, gsm8k 180, sql 90, training 60. Each is stopped when
# its time is over. Called again, it goes on with those that have not ended. --minutes (default: 9.5): the last stages are left
# out where not all fit; what is over goes to gsm8k. The first two need no model, so the first part suffices for them.
# --rehearse: tiny sizes on a CPU; the figures mean nothing. PYTHON: the Python to use (default: python3).
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
root=$(cd "$here/../.." && pwd)

fail() {
  echo "error: $1" >&2
  exit 2
}

minutes=9.5 rehearse=() places=()
while [ $# -gt 0 ]; do
  case $1 in
    --minutes) minutes=${2:-} && shift $(($# > 1)) ;;
    --rehearse) rehearse=(--rehearse) ;;
    -*) fail "unknown option $1; there are --minutes N and --rehearse" ;;
    *) places+=("$1") ;;
  esac
  shift
done
[[ $minutes =~ ^[0-9]+(\.[0-9]+)?$ ]] || fail "--minutes must be a number, got '$minutes'"
[ ${#places[@]} -eq 2 ] || fail "PARTS and OUTPUT are needed, got ${#places[@]} folders"
parts=$(realpath "${places[0]}") results=$(realpath -m "${places[1]}")/results work=$(realpath -m "${places[1]}")/work
[ -d "$parts/1/wheels" ] || fail "no folder of scripts/gpu/pack.sh: $parts"
left=$(awk "BEGIN { printf \"%d\", 60 * $minutes }") # seconds
python=${PYTHON:-python3}
patience=${rehearse:+100} # a CPU takes longer
mkdir -p "$results" "$work"
export PYTHONPATH=$root:$root/scripts:$root/tests:$work/site HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false

stage() { # NAME SECONDS SCRIPT ARGUMENTS...
  local name=$1 seconds=$2 script=$3 status=0
  shift 3
  if [ "$left" -lt "$seconds" ]; then
    echo "==> $name: left out, it takes $seconds seconds and $left are left"
    left=0 # for the stages after it as well
    return
  fi
  left=$((left - seconds))
  if [ -e "$results/$name.json" ]; then
    echo "==> $name: done before"
    return
  fi
  echo "==> $name: $seconds seconds at most"
  timeout --foreground --kill-after=5 $((seconds * ${patience:-1})) "$python" "$here/$script.py" --output "$results/$name.json" \
    "${rehearse[@]}" "$@" || status=$?
  if [ "$status" -ne 0 ]; then
    echo "==> $name: status $status"
    troubled+=" $name"
  fi
}

model() { # join and unpack the model, unless that was done; a GGUF file becomes a checkpoint
  if [ ! -e "$work/model" ]; then
    cat "$parts"/*/model.tar.* | sha256sum --check --status "$parts/1/model.sha256" || fail "the model in $parts is not whole"
    rm -rf "$work/packed" && mkdir "$work/packed"
    cat "$parts"/*/model.tar.* | tar -x -C "$work/packed"
    if compgen -G "$work/packed/*.gguf" > /dev/null; then
      "$python" "$root/scripts/small_model.py" --convert "$work"/packed/*.gguf "$work/model"
    else
      mv "$work/packed" "$work/model"
    fi
  fi
}

run() {
  local troubled="" spare=$((left > 570 ? left - 570 : 0)) data="$parts/1/data"
  if [ ! -e "$work/site" ] && compgen -G "$parts/1/wheels/*.whl" > /dev/null; then
    "$python" -m pip install --quiet --no-index --no-deps --no-compile --disable-pip-version-check --root-user-action=ignore \
      --target "$work/site.new" --upgrade "$parts"/1/wheels/*.whl
    mv "$work/site.new" "$work/site"
  fi
  stage environment 60 smoke
  [ -e "$results/environment.json" ] || fail "nothing can be run here"
  stage tests 90 checks --seconds 75
  if [ "$left" -ge 90 ]; then model; fi
  stage speed 90 speed --model "$work/model" --seconds 50
  PYTHONPATH=$PYTHONPATH:$root/scripts/benchmarks # not before: its modules have names that the tests' folders have
  stage gsm8k $((180 + spare)) recipe gsm8k --model "$work/model" --data "$data" --work "$work/gsm8k" --seconds $((180 + spare))
  stage sql 90 recipe sql --model "$work/model" --data "$data" --work "$work/sql" --seconds 90
  stage training 60 training_speed --model "$work/model" --data "$data" --work "$work/trajectories"
  "$python" "$here/table.py" "$results"
  [ -z "$troubled" ] || fail "not all went well:$troubled"
}

run 2>&1 | tee -a "$results/log.txt"
