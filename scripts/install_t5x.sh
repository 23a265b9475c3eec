#!/usr/bin/env bash
# From a fresh machine to a running T5X, beside this package:
#
#   bash scripts/install_t5x.sh FOLDER [--sources_only]
#   source FOLDER/env/bin/activate
#
# Clones T5X and what it imports from GitHub into FOLDER/src, at the commits that this package is
# tested with, and makes the environment FOLDER/env. The sources go on the path as they are: their
# own setup files ask for versions that no longer exist together (T5X's issues 1086 and 1413).
# T5X_SOURCES=FOLDER takes clones from there instead of GitHub; PYTHON is the interpreter (3.11).
# Needs git. What is there already, at its commit, stays.
set -euo pipefail

if [ $# -lt 1 ] || [[ $1 == -* ]]; then
  sed -n '2,11s/^# \{0,1\}//p' "$0" >&2
  exit 2
fi
mkdir -p "$1/src"
folder=$(cd "$1" && pwd)
here=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

clone() { # OWNER NAME COMMIT
  local from="https://github.com/$1/$2" to="$folder/src/$2"
  [ -z "${T5X_SOURCES:-}" ] || from="$T5X_SOURCES/$2"
  [ -d "$to/.git" ] || git clone --quiet --no-checkout "$from" "$to"
  git -C "$to" checkout --quiet --detach "$3"
  echo "$2 at $3"
}
clone google-research t5x cc342d4
clone google airio 69897df
clone google-research jestimator 326824a
clone google flaxformer 399ea3a # only to compare with t5x/contrib/calm
[ "${2:-}" != --sources_only ] || exit 0

"${PYTHON:-python3}" -m venv "$folder/env"
pip=("$folder/env/bin/python" -m pip install --quiet)
"${pip[@]}" --upgrade pip
"${pip[@]}" -c "$here/scripts/constraints.txt" "$here[seqio]" \
  cached_property==2.0.1 chex==0.1.92 fiddle==0.3.1 grain==0.2.18 tensorboard
site=$("$folder/env/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
printf '%s\n' "$folder"/src/{t5x,airio,jestimator,flaxformer} > "$site/t5x_sources.pth"
"$folder/env/bin/python" -W ignore -c 'import calm.t5x.models' 2> /dev/null
echo "T5X runs: source $folder/env/bin/activate"
