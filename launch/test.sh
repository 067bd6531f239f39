#!/usr/bin/env bash
# Installs what the tests need and runs them, two files at a time; arguments go to pytest.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
bash launch/setup.sh .venv-test test
.venv-test/bin/python -m pytest -n 2 --dist loadfile "$@"
