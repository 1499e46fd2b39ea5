# Sourced by the other scripts.
#   use_environment REQUIREMENTS_FILE    change to the project's root, activate .venv unless an environment is active, install
#   timed FILE NAME TEXT COMMAND...      run one stage of a script and record its time
use_environment() {
  cd "$(dirname "${BASH_SOURCE[0]}")/.."
  if [ -z "${VIRTUAL_ENV:-}" ]; then
    if [ ! -x .venv/bin/python ]; then
      echo "==> creating a virtual environment in .venv"
      "$(find_python)" -m venv .venv
    fi
    # shellcheck disable=SC1091
    source .venv/bin/activate
  fi
  local stamp="$VIRTUAL_ENV/.cllm-$1" wanted
  wanted=$(cat requirements*.txt pyproject.toml | cksum; pwd)
  if [ "$(cat "$stamp" 2>/dev/null)" != "$wanted" ]; then
    echo "==> installing $1 into $VIRTUAL_ENV"
    python -m pip install --quiet --disable-pip-version-check -r "$1"
    printf '%s' "$wanted" > "$stamp"
  fi
}

timed() { # FILE NAME TEXT COMMAND...: print TEXT, run the command, and append "NAME: SECONDS" to FILE
  local file=$1 name=$2 text=$3 start
  shift 3
  start=$(date +%s)
  echo "==> $text"
  "$@"
  echo "$name: $(($(date +%s) - start))" >> "$file"
}

find_python() {
  local name
  for name in python3 python3.12 python3.11 python; do
    if command -v "$name" > /dev/null &&
       "$name" -c 'import sys, venv, ensurepip; sys.exit(not (3, 11) <= sys.version_info[:2])' 2> /dev/null; then
      echo "$name"
      return
    fi
  done
  echo "error: Python 3.11 or newer with venv is needed" >&2
  exit 2
}
