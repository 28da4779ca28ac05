# shellcheck shell=bash
# Shared by launch/quickstart.sh and tests/run.sh: makes .venv and installs what is missing. Sourced, not run.
#
#   maha_install EXTRAS     EXTRAS such as "" or "[dev,hf]"; OFFLINE names a wheelhouse folder or is empty
#
# Sets VENV_PYTHON. Does nothing when the same files were installed with the same Python before.

VENV="$ROOT/.venv"
VENV_PYTHON="$VENV/bin/python"
TORCH_PIN=$(sed -n 's/^torch==//p' "$ROOT/launch/constraints.txt")

# The interpreter to build on: $PYTHON, or the first of python3, python3.11 ... that is 3.11 to 3.13.
maha_find_python() {
  local candidate
  for candidate in ${PYTHON:-python3 python3.11 python3.12 python3.13}; do
    if command -v "$candidate" >/dev/null && "$candidate" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' 2>/dev/null; then
      echo "$candidate"
      return
    fi
  done
  echo "maha-megatron needs Python 3.11, 3.12 or 3.13 with venv; set PYTHON=/path/to/python3.11 and run again." >&2
  return 2
}

# Prints the site-packages folder of a suitable torch in the interpreter's own environment; prints nothing without one.
maha_existing_torch() {
  "$1" - <<'PY' 2>/dev/null || true
import importlib.metadata, pathlib
distribution = importlib.metadata.distribution("torch")
version = tuple(int(part) for part in distribution.version.split("+")[0].split(".")[:2])
if (2, 10) <= version < (2, 14):
    print(pathlib.Path(distribution.locate_file("")).resolve())
PY
}

# Says what is needed and checks it before anything is downloaded.
maha_check_needs() {
  local free_mib source="a Python package index"
  [ -z "$OFFLINE" ] || source="the wheelhouse $OFFLINE"
  echo "needs: Python 3.11-3.13 with venv, bash, $source, 5 GiB of disk, 6 GiB of memory; no compiler, no GPU"
  "$1" -c 'import venv, ensurepip' 2>/dev/null ||
    { echo "$1 has no venv module: install it (Debian and Ubuntu: the package python3-venv) and run again." >&2; return 2; }
  free_mib=$(df -Pm "$ROOT" | awk 'NR==2 {print $4}')
  [ "$free_mib" -ge 5000 ] || [ -x "$VENV_PYTHON" ] ||
    { echo "only $free_mib MiB of disk are free in $ROOT, 5000 are needed: free some or clone to another disk." >&2; return 2; }
  if [ -n "$OFFLINE" ] && [ -z "$(ls "$OFFLINE"/*.whl 2>/dev/null)" ]; then
    echo "$OFFLINE holds no wheels: make it where there is a network with: bash launch/quickstart.sh --make-wheelhouse $OFFLINE" >&2
    return 2
  fi
}

maha_install() {
  local extras=$1 python stamp wanted existing constraints="$VENV/constraints.txt"
  python=$(maha_find_python) || return 2
  stamp="$VENV/installed$(echo "$extras" | tr -d '[]' | tr ',' '-').stamp"
  wanted=$(cat "$ROOT/setup.py" "$ROOT/launch/constraints.txt" "$ROOT/launch/install.sh" | cksum)
  if [ -x "$VENV_PYTHON" ] && [ "$(cat "$stamp" 2>/dev/null)" = "$wanted" ]; then
    return 0
  fi
  maha_check_needs "$python" || return 2
  existing=$(maha_existing_torch "$python")
  [ -x "$VENV_PYTHON" ] || "$python" -m venv "$VENV" || return 2
  local -a pip=("$VENV_PYTHON" -m pip install --quiet --disable-pip-version-check --no-warn-script-location)
  if [ -n "$OFFLINE" ]; then
    pip+=(--no-index --find-links "$OFFLINE")
  fi
  if [ -n "$existing" ]; then
    echo "keeping the torch found in $existing"
    echo "$existing" >"$("$VENV_PYTHON" -c 'import sysconfig; print(sysconfig.get_paths()["purelib"])')/zz_active_environment.pth"
    grep -v '^torch==' "$ROOT/launch/constraints.txt" >"$constraints"
  else
    cp "$ROOT/launch/constraints.txt" "$constraints"
    echo "installing torch $TORCH_PIN (first and alone)"
    "${pip[@]}" "torch==$TORCH_PIN" || return 2
  fi
  if "$VENV_PYTHON" -c 'import importlib.metadata as m; m.version("triton")' 2>/dev/null; then
    sed -i.pinned '/^triton==/d' "$constraints"  # a CUDA build of torch brings the triton that it needs
  fi
  echo "installing maha-megatron$extras and its pinned packages"
  "${pip[@]}" --constraint "$constraints" setuptools wheel || return 2
  "${pip[@]}" --constraint "$constraints" --no-build-isolation --editable "${ROOT}${extras}" || return 2
  if [ -n "$existing" ]; then
    # Commands that the other environment has would start its interpreter: .venv gets its own.
    local -a commands=(deepspeed tensorboard)
    case "$extras" in *dev*) commands+=(pytest ruff) ;; esac
    "${pip[@]}" --constraint "$constraints" --ignore-installed --no-deps "${commands[@]}" || return 2
  fi
  "$VENV_PYTHON" -m pip check --disable-pip-version-check || return 2
  echo "$wanted" >"$stamp"
}

# Collects every wheel that both commands install, for a machine of the same kind without a network.
maha_make_wheelhouse() {
  local wheelhouse=$1 python pip_wheel
  python=$(maha_find_python) || return 2
  mkdir -p "$wheelhouse"
  wheelhouse=$(cd "$wheelhouse" && pwd)
  "$python" -m venv "$wheelhouse/.venv"
  pip_wheel=("$wheelhouse/.venv/bin/python" -m pip wheel --disable-pip-version-check --wheel-dir "$wheelhouse"
    --find-links "$wheelhouse" --constraint "$wheelhouse/.venv/constraints.txt")
  cp "$ROOT/launch/constraints.txt" "$wheelhouse/.venv/constraints.txt"
  "${pip_wheel[@]}" "torch==$TORCH_PIN"
  if ls "$wheelhouse"/triton-*.whl >/dev/null 2>&1; then  # torch's own, as in maha_install
    sed -i.pinned '/^triton==/d' "$wheelhouse/.venv/constraints.txt"
  fi
  "${pip_wheel[@]}" setuptools wheel "${ROOT}[dev,hf]"
  rm -rf "$wheelhouse/.venv" "$wheelhouse"/maha_megatron-*.whl
  echo "wheelhouse ready: bash launch/quickstart.sh --offline $1"
}

# Prints a free port, so that two jobs on one machine do not meet on the launcher's default.
maha_free_port() {
  "$VENV_PYTHON" -c 'import socket; s = socket.socket(); s.bind(("", 0)); print(s.getsockname()[1])'
}
