#!/usr/bin/env bash
# Lint, types and every test, in virtual environments of its own. Needs Python 3.11+ and a shell.
#
#   scripts/test.sh             all of it
#   scripts/test.sh -k exits    arguments go to pytest
#
# Environments live in .venv-test, .venv-calibrate, .venv-tpu and .venv-newest and are made again
# when a requirement changes. torch, transformers and T5X are not installed: golden files stand in.
set -euo pipefail
cd "$(dirname "$0")/.."
python="${PYTHON:-python3}"
constraints=scripts/constraints.txt

environment() {  # environment DIR PIP-ARGUMENTS...
  local dir="$1"; shift
  local stamp
  stamp="$(cat pyproject.toml "$constraints" | cksum) $*"
  if [[ ! -f "$dir/stamp" || "$(cat "$dir/stamp")" != "$stamp" ]]; then
    "$python" -m venv --clear "$dir"
    # Python compiles what it imports, a small part of all that is installed.
    "$dir/bin/pip" install --quiet --disable-pip-version-check --no-compile \
      -c "$constraints" "$@"
    echo "$stamp" > "$dir/stamp"
  fi
}

newest_python() {  # the newest interpreter that can make environments
  local name
  for name in python3.14 python3.13 python3.12 /usr/bin/python3; do
    if "$name" -c 'import sys, venv, ensurepip; assert sys.version_info >= (3, 11)' 2> /dev/null; then
      echo "$name"
      return
    fi
  done
  echo python3
}

# Each is unpacked on one core, and the first is as large as the others together: two at a time.
small_environments() {
  # Calibration promises to need no JAX: its tests run where only `pip install .` was.
  environment .venv-calibrate . pytest hypothesis
  # The TPU's compiler, which needs no TPU, is made for this platform only.
  if [[ "$(uname -sm)" == "Linux x86_64" ]]; then
    environment .venv-tpu -e '.[tpu]' pytest beartype
  fi
  # The pinned JAX is T5X's. The shortest way through everything also runs with the newest one that
  # the newest interpreter takes, unpinned: what breaks there is seen before users see it.
  python="$(newest_python)" constraints=/dev/null environment .venv-newest '.[cpu]' pytest
}

echo "== environments"
log="$(mktemp)"
(set -e; small_environments) > "$log" 2>&1 &
beside=$!
trap 'kill "$beside" 2> /dev/null || true; rm -f "$log"' EXIT
environment .venv-test -e '.[cpu,seqio,report,serve,test]'
finished() {  # finished PID: waits for what runs beside, and shows what it said
  local status=0
  wait "$1" || status=$?
  cat "$log"
  return "$status"
}
finished "$beside"

without_jax() {
  .venv-calibrate/bin/python - <<'PYTHON'
import importlib.util
present = [m for m in ("jax", "flax", "tensorflow", "seqio") if importlib.util.find_spec(m)]
assert not present, f"expected an environment without {present}"
PYTHON
  .venv-calibrate/bin/python -m pytest -p no:cacheprovider tests/calibrate
}

newest() {
  .venv-newest/bin/python -c 'import sys, jax; print("Python", sys.version.split()[0], "JAX", jax.__version__)'
  .venv-newest/bin/python -W default -m pytest -p no:cacheprovider -W default tests/smoke_test.py
}

for_a_tpu() {
  if [[ -d .venv-tpu ]]; then
    .venv-tpu/bin/python -m pytest -p no:cacheprovider -rsx tests/tpu
  fi
}

# These use one core, the compiler for TPUs most of its time. They run beside the rest, and what
# they said comes last.
(
  set -e
  echo "== calm.calibrate without JAX"; without_jax
  echo "== the smoke group with the newest JAX"; newest
  echo "== compiled for a TPU"; for_a_tpu
) > "$log" 2>&1 &
beside=$!

echo "== lint and types"
.venv-test/bin/ruff format --check .
.venv-test/bin/ruff check .
.venv-test/bin/pyright --pythonpath .venv-test/bin/python

echo "== tests"
# Those of calm.calibrate run beside. Most of the time goes to compilation, on one core. The order
# of files is that of tests/conftest.py.
status=0
.venv-test/bin/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder \
  "${@:---ignore=tests/calibrate}" || status=$?
finished "$beside"
exit "$status"
