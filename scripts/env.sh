# Sourced by the other scripts: installs the package with the extras named in $1 into a virtual environment in .venv.
# A copy of pyproject.toml in .venv records what is installed.
cd "$(dirname "${BASH_SOURCE[0]}")/.."
extras="$1"

find_python() {
    local candidate
    for candidate in "${PYTHON:-}" python3 python3.13 python3.12 python3.11; do
        [ -n "$candidate" ] && command -v "$candidate" >/dev/null 2>&1 &&
            "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null &&
            echo "$candidate" && return
    done
    echo "error: Python 3.11 or newer was not found; install it, or set PYTHON to its path" >&2
    return 1
}

if [ ! -x .venv/bin/python ]; then
    python="$(find_python)" || exit 1
    "$python" -m venv .venv
fi
stamp=".venv/installed-${extras:-base}"
if ! cmp -s pyproject.toml "$stamp"; then
    echo "installing rmr1-jax${extras:+[$extras]} into .venv" >&2
    if [[ "$extras" == *dev* ]] && ! .venv/bin/python -c 'import torch' 2>/dev/null; then
        # First and by its exact version, so that pip takes a CPU build if one is offered.
        .venv/bin/python -m pip install --quiet "$(grep -o 'torch==[0-9.]*' pyproject.toml)"
    fi
    .venv/bin/python -m pip install --quiet --editable ".${extras:+[$extras]}"
    cp pyproject.toml "$stamp"
fi
