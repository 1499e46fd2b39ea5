#!/usr/bin/env bash
# Pack what scripts/gpu/run.sh needs on a machine without network, in two parts of at most 64 MiB, and say how large they are.
#
#   bash scripts/gpu/pack.sh PARTS GSM8K [MODEL]
#
# PARTS: new folder. GSM8K: folder with train.jsonl.gz and test.jsonl.gz. MODEL: a GGUF file or a checkpoint folder; default: the
# GGUF file of SmolLM2-135M-Instruct, which scripts/small_model.py fetches. PYTHON_VERSION: of the machine with the GPU
# (default: 3.12). WHEELS: packages that this machine lacks (default: those beside torch, transformers, accelerate, peft,
# pyarrow and what they need). Versions are those of requirements.txt.
set -euo pipefail
root=$(cd "$(dirname "$0")/../.." && pwd)
most=$((63 << 20)) # of a part, for its files; what keeps them together comes on top
read -ra wheels <<< "${WHEELS-gguf datasets dill multiprocess math-verify latex2sympy2-extended antlr4-python3-runtime sqlglot}"

fail() {
  echo "error: $1" >&2
  exit 2
}

[ $# -ge 2 ] && [ $# -le 3 ] || fail "usage: bash scripts/gpu/pack.sh PARTS GSM8K [MODEL]"
[ ! -e "$1" ] || fail "PARTS must be new, got $1"
for name in train.jsonl.gz test.jsonl.gz; do
  [ -e "$2/$name" ] || fail "no $name in $2"
done
[ $# -lt 3 ] || [ -e "$3" ] || fail "no such file or folder: $3"
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
mkdir -p "$scratch/parts/1/wheels" "$scratch/parts/1/data" "$scratch/parts/2" "$scratch/model"

cp "$2/train.jsonl.gz" "$2/test.jsonl.gz" "$scratch/parts/1/data"
if [ ${#wheels[@]} -gt 0 ]; then
  grep == "$root/requirements.txt" > "$scratch/versions.txt"
  python3 -m pip download --quiet --no-deps --only-binary=:all: --python-version "${PYTHON_VERSION:-3.12}" \
    --constraint "$scratch/versions.txt" --dest "$scratch/parts/1/wheels" "${wheels[@]}"
fi
if [ $# -lt 3 ]; then
  python3 "$root/scripts/small_model.py" --gguf "$scratch/model"
elif [ -d "$3" ]; then
  cp -rL "$3/." "$scratch/model"
else
  cp -L "$3" "$scratch/model"
fi
whole=$(du -sb "$scratch" | cut -f1)
[ "$whole" -le $((2 * most)) ] || fail "all of it has $whole bytes, which is more than two parts of $((most >> 20)) MiB"
tar -c -C "$scratch/model" . > "$scratch/model.tar"
(cd "$scratch" && sha256sum < model.tar > parts/1/model.sha256)

beside=$(du -sb "$scratch/parts/1" | cut -f1) whole=$(stat -c %s "$scratch/model.tar")
first=$(((whole - beside) / 2 > 0 ? (whole - beside) / 2 : 1)) # both parts are then about as large
head -c "$first" "$scratch/model.tar" > "$scratch/parts/1/model.tar.1"
tail -c "+$((first + 1))" "$scratch/model.tar" > "$scratch/parts/2/model.tar.2"
for part in 1 2; do
  size=$(du -sb "$scratch/parts/$part" | cut -f1)
  echo "part $part: $(awk "BEGIN { printf \"%.1f\", $size / 1048576 }") MiB"
done
mkdir -p "$(dirname "$1")"
mv "$scratch/parts" "$1"
echo "On the day: docs/benchmarks/gpu.md"
