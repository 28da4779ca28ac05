#!/usr/bin/env bash
# Runs the tests on a fresh machine: installs what is missing into .venv first.
#
#   bash tests/run.sh [--full] [--offline WHEELHOUSE] [PYTEST ARGUMENTS]
#
#   --full                 also the tests marked `full` (longer than the everyday run)
#   --offline WHEELHOUSE   install from a folder of wheels (bash launch/quickstart.sh --make-wheelhouse makes it)
set -euo pipefail
ROOT=$(cd "$(dirname "$0")/.." && pwd)
cd "$ROOT"

OFFLINE="" SELECTION=(-m "not full")
while [ $# -gt 0 ]; do
  case "$1" in
    --full) SELECTION=() ;;
    --offline) OFFLINE=$(cd "${2:?--offline needs a folder}" && pwd); shift ;;
    -h | --help) sed -n '2,7s/^# \{0,1\}//p' "$0"; exit 0 ;;
    *) break ;;
  esac
  shift
done

. "$ROOT/launch/install.sh"
maha_install "[dev,hf]"
export PATH="$VENV/bin:$PATH" PYTHONDONTWRITEBYTECODE=1 TOKENIZERS_PARALLELISM=false
ruff check .
ruff format --check .
exec python -m pytest "${SELECTION[@]}" "$@"
