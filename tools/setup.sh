#!/usr/bin/env bash
# Make .venv and install the project with everything its development needs. Called by `make setup`.
set -euo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python3}

"$PYTHON" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
    echo "error: Python 3.11 or newer is needed; set PYTHON=/path/to/python3" >&2
    exit 2
}
[ -x .venv/bin/python ] || "$PYTHON" -m venv .venv
pip() { .venv/bin/python -m pip --disable-pip-version-check --quiet "$@"; }

torch=$(sed -n 's/^torch==\([0-9.]*\).*/\1/p' constraints.txt)
if ! .venv/bin/python -c "import torch, sys; sys.exit(torch.__version__.split('+')[0] != '$torch')" 2>/dev/null; then
    echo "installing torch $torch"
    if command -v nvidia-smi >/dev/null; then
        pip install "torch==$torch"
    else
        # The CPU build, where a configured index or folder of wheels has one; else what there is.
        pip install "torch==$torch+cpu" 2>/dev/null || pip install "torch==$torch"
    fi
fi
echo "installing the project and its tools"
pip install --constraint constraints.txt --editable '.[transformers,quantization,openvino,gateway,dev]'
