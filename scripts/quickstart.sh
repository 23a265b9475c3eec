#!/usr/bin/env bash
# The main job in a fresh clone: decode, calibrate, decode faster with a promise, on the packed
# model. Makes its own virtual environment (.venv); needs Python 3.11+ and a shell.
#
#   scripts/quickstart.sh
#   scripts/quickstart.sh --tolerance=0.25 --error_rate=0.05
set -euo pipefail
cd "$(dirname "$0")/.."
stamp="$(cat pyproject.toml scripts/constraints.txt | cksum)"
if [[ ! -f .venv/installed || "$(cat .venv/installed)" != "$stamp" ]]; then
  echo "Installing into .venv (again only when requirements change) ..."
  "${PYTHON:-python3}" -m venv --clear .venv
  .venv/bin/pip install --quiet --disable-pip-version-check -c scripts/constraints.txt -e '.[cpu]'
  echo "$stamp" > .venv/installed
fi
exec .venv/bin/calm demo "$@"
