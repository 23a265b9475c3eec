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
# Dozens of processes import the same packages: one of them compiles what it imports for all.
unset PYTHONDONTWRITEBYTECODE

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

# Programs are generated in one piece: in pieces for several threads it is a tenth more work, and
# no core is idle.
in_one_piece=(env XLA_FLAGS=--xla_cpu_parallel_codegen_split_count=1)

some_rooms() {
  # shellcheck disable=SC2086  # words
  "${in_one_piece[@]}" .venv-test/bin/python -m pytest -p no:cacheprovider $rooms
}

# All tests, unless arguments choose: those of some rooms run beside the compiler for TPUs, which
# uses one core most of its time.
rooms=""
if [[ $# -eq 0 ]]; then
  rooms="tests/checkpoints tests/t5x"
  set -- --ignore=tests/calibrate
  for room in $rooms; do set -- "$@" --ignore="$room"; done
fi

(
  set -e
  echo "== calm.calibrate without JAX"; without_jax
  echo "== the smoke group with the newest JAX"; newest
  if [[ -n "$rooms" ]]; then echo "== $rooms"; some_rooms; fi
) > "$log" 2>&1 &
beside=$!

echo "== lint and types"
.venv-test/bin/ruff format --check .
.venv-test/bin/ruff check .
.venv-test/bin/pyright --pythonpath .venv-test/bin/python

if [[ -d .venv-tpu ]]; then
  echo "== compiled for a TPU"
  .venv-tpu/bin/python -m pytest -p no:cacheprovider -rsx tests/tpu
fi

finished "$beside"
rm "$log"
trap - EXIT

echo "== tests"
# Most of the time goes to compilation, on one core. The order of files is that of
# tests/conftest.py.
exec "${in_one_piece[@]}" .venv-test/bin/python -m pytest \
  -n 2 --dist loadfile --no-loadscope-reorder "$@"
