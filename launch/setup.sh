#!/usr/bin/env bash
# Makes a virtual environment with the newest Python it finds and installs pinned versions.
#   bash launch/setup.sh VENV EXTRAS     e.g. bash launch/setup.sh .venv demo,test
# A VENV that was made before keeps the extras it has.
# PYTHON=/path/to/python picks the interpreter, PYTHON_VERSIONS="3.11" limits the search.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
[ $# -eq 2 ] || { echo "usage: bash launch/setup.sh VENV EXTRAS, such as bash launch/setup.sh .venv demo" >&2; exit 2; }
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

pins=$(cat pyproject.toml constraints.txt launch/setup.sh | cksum | tr -d ' ')
its_pins="" its_extras="" its_python=""
if [ -e "$venv/.gemma_lora" ]; then
  { read -r its_pins && read -r its_extras && read -r its_python; } <"$venv/.gemma_lora" || true
elif [ -e "$venv" ]; then
  echo "error: $venv exists and was not made by launch/setup.sh; remove it, or move it away" >&2
  exit 1
fi
missing=""
for extra in ${extras//,/ }; do
  case ",$its_extras," in *",$extra,"*) ;; *) missing+="${missing:+,}$extra" ;; esac
done

# Was the venv made from these very pins, by a Python that was asked for and still runs?
fits() {
  local version
  [ "$its_pins" = "$pins" ] && works "$venv/bin/python" || return 1
  [ -z "${PYTHON:-}" ] || [ "$PYTHON" = "$its_python" ] || return 1
  version=$("$venv/bin/python" -c 'import sys; print("%d.%d" % sys.version_info[:2])')
  case " ${PYTHON_VERSIONS:-$version} " in *" $version "*) ;; *) return 1 ;; esac
}

if fits; then
  if [ -z "$missing" ]; then exit 0; fi
  python=$its_python anew=""
else
  anew=1
  python=${PYTHON:-$(find_python)}
  works "$python" || { echo "error: PYTHON=$python is no Python from 3.11 on that can make a venv" >&2; exit 1; }
fi
extras=$its_extras${its_extras:+${missing:+,}}$missing
echo "installing gemma_lora[$extras] into $venv with $("$python" --version)"
mkdir -p "$venv"
echo incomplete > "$venv/.gemma_lora"
if [ -n "$anew" ]; then
  # Of another Python, or one that is gone, links would stay. The mark of whose it is stays, too.
  find "$venv" -mindepth 1 -maxdepth 1 ! -name .gemma_lora -exec rm -rf {} +
  "$python" -m venv "$venv"
fi
"$venv/bin/python" -m pip install --quiet --disable-pip-version-check \
  --constraint constraints.txt --editable ".[$extras]"
printf '%s\n' "$pins" "$extras" "$python" > "$venv/.gemma_lora"
