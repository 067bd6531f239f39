#!/usr/bin/env bash
# Makes a virtual environment with the newest Python it finds and installs pinned versions.
#   launch/setup.sh VENV EXTRAS     e.g. launch/setup.sh .venv demo,test
# PYTHON=/path/to/python picks the interpreter, PYTHON_VERSIONS="3.11" limits the search.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
[ $# -eq 2 ] || { echo "usage: launch/setup.sh VENV EXTRAS, such as launch/setup.sh .venv demo" >&2; exit 2; }
venv=$1 extras=$2
known=$(sed -n '/^\[project.optional-dep/,/^$/s/ = \[.*//p' pyproject.toml)
for extra in ${extras//,/ }; do
  grep -qxF -- "$extra" <<<"$known" || {
    echo "error: there is no extra $extra; expected some of: ${known//$'\n'/ }" >&2
    exit 2
  }
done

works() { "$1" -c 'import sys, venv, ensurepip; raise SystemExit(sys.version_info < (3, 11))' 2>/dev/null; }

find_python() {
  local version candidate
  for version in ${PYTHON_VERSIONS:-3.13 3.12 3.11}; do
    # A name on the PATH can be a shim that runs nothing, so each candidate is tried.
    for candidate in "python$version" "${PYENV_ROOT:-$HOME/.pyenv}/versions/$version".*/bin/python; do
      if command -v "$candidate" >/dev/null && works "$candidate"; then
        command -v "$candidate"
        return
      fi
    done
  done
  echo "error: none of Python ${PYTHON_VERSIONS:-3.13, 3.12, 3.11} (with venv) was found;" \
    "install one, or set PYTHON=/path/to/python" >&2
  return 1
}

# A venv is complete when it was made from these very pins, and its Python still runs.
stamp=$(cat pyproject.toml constraints.txt launch/setup.sh | cksum | tr -d ' ')-$extras-${PYTHON:-}-${PYTHON_VERSIONS:-}
if [ "$(cat "$venv/.gemma_lora" 2>/dev/null || true)" = "$stamp" ] && works "$venv/bin/python"; then
  exit 0
fi
if [ -e "$venv" ] && [ ! -e "$venv/.gemma_lora" ]; then
  echo "error: $venv exists and was not made by launch/setup.sh; remove it, or move it away" >&2
  exit 1
fi
python=${PYTHON:-$(find_python)}
echo "installing gemma_lora[$extras] into $venv with $("$python" --version)"
mkdir -p "$venv"
echo incomplete > "$venv/.gemma_lora"
"$python" -m venv --clear "$venv" # of another Python, or one that is gone, links would stay
echo incomplete > "$venv/.gemma_lora"
"$venv/bin/python" -m pip install --quiet --disable-pip-version-check \
  --constraint constraints.txt --editable ".[$extras]"
echo "$stamp" > "$venv/.gemma_lora"
