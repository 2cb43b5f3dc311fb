#!/usr/bin/env bash
# Creates .venv with the package for TPU in the checkout that contains this file. Run it on every host. The Python of the
# hosts (3.10 on Ubuntu 22.04) is too old, so uv installs a newer one.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python3 -m pip --version >/dev/null 2>&1 || { sudo apt-get update -q && sudo apt-get install -qy python3-pip; }
python3 -m pip install --quiet --user uv
export PATH="$HOME/.local/bin:$PATH"
[ -x .venv/bin/python ] || uv venv --quiet --python "${PYTHON_VERSION:-3.12}" .venv
uv pip install --quiet --python .venv/bin/python --editable '.[tpu]' gcsfs
.venv/bin/python -c 'import sys, jax; print("Python", sys.version.split()[0], "jax", jax.__version__)'
