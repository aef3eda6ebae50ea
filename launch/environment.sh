# shellcheck shell=bash
# Sourced by the scripts beside it: goes to the repository's root and offers `prepare EXTRAS`,
# which leaves an environment with the package and those extras and sets `python` to its interpreter.
#
#   PYTHON   the interpreter to build the environment with (default: the first fit one found)
#   VENV     the environment's folder (default: .venv)

cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit

# Large pages for large arrays: XLA takes fresh memory at every step on a CPU, and clearing it page by
# page is a fifth of the time of a small model. Other C libraries than glibc pass over it.
export GLIBC_TUNABLES=${GLIBC_TUNABLES:-glibc.malloc.hugetlb=1}

is_fit() { # can this interpreter run the package and build an environment?
  "$1" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' 2>/dev/null
}

find_python() {
  local candidate
  if [[ -n ${PYTHON:-} ]]; then
    is_fit "$PYTHON" && { echo "$PYTHON"; return; }
    echo "PYTHON=$PYTHON is not a Python 3.11 or newer with venv and ensurepip" >&2
    return 1
  fi
  for candidate in python3.12 python3.11 python3.13 python3; do # the two tested versions first
    is_fit "$candidate" && { echo "$candidate"; return; }
  done
  echo "no Python 3.11 or newer with venv and ensurepip among python3.12 python3.11 python3.13" \
    "python3 (on Debian: apt install python3-venv); set PYTHON=/path/to/python" >&2
  return 1
}

prepare() { # $1: extras, comma-separated, may be empty
  local extras=$1 venv=${VENV:-.venv} base state stamp
  python=$venv/bin/python
  if [[ ! -e $venv ]]; then
    base=$(find_python)
    echo "making $venv with $base"
    "$base" -m venv "$venv"
  elif ! is_fit "$python"; then
    echo "$venv holds no working Python 3.11 or newer (moved, or its Python is gone):" \
      "remove it, or name another folder with VENV=" >&2
    return 1
  elif [[ -n ${PYTHON:-} && $(version "$PYTHON") != $(version "$python") ]]; then
    echo "$venv has $(version "$python"), PYTHON=$PYTHON is $(version "$PYTHON"):" \
      "remove $venv, or name another folder with VENV=" >&2
    return 1
  fi
  # What the installation depends on; one stamp for each set of extras, written when it succeeded.
  state="$(cksum <setup.py) $(version "$python") $PWD"
  stamp=$venv/installed-${extras:-base}
  # Another checkout may have been installed here since.
  if [[ -f $venv/installed-last && $(<"$venv/installed-last") != "$PWD" ]]; then
    rm -f "$venv"/installed-*
  fi
  if [[ ! -f $stamp || $(<"$stamp") != "$state" ]]; then
    echo "installing jax_instructblip${extras:+[$extras]} into $venv (minutes the first time)"
    "$python" -m pip install --quiet --disable-pip-version-check --editable ".${extras:+[$extras]}"
    echo "$state" >"$stamp"
    echo "$PWD" >"$venv/installed-last"
  fi
}

version() { "$1" -c 'import platform; print("Python", platform.python_version())'; }
