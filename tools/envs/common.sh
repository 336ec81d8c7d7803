# Shared by the recipes beside it; sourced, never run. Each makes one environment, for an engine that
# cannot live beside another. A recipe may run again: what is installed already stays.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
PYTHON=${PYTHON:-python3}
ENVIRONMENT=${1:?usage: $0 DIRECTORY}

pip() { "$ENVIRONMENT/bin/python" -m pip --disable-pip-version-check --quiet "$@"; }

make_environment() {
    [ -x "$ENVIRONMENT/bin/python" ] || "$PYTHON" -m venv "$ENVIRONMENT"
}

has_gpu() { command -v nvidia-smi >/dev/null; }

# install_torch VERSION: the CPU build where there is no GPU, and an index or folder of wheels has one.
install_torch() {
    if has_gpu; then
        pip install "torch==$1"
    else
        pip install "torch==$1+cpu" 2>/dev/null || pip install "torch==$1"
    fi
}

# The project itself, with what the command line and the tests need, and nothing of any engine.
install_project() {
    pip install --editable .
    pip install "pytest>=8.3" "pytest-asyncio>=1.0" "pytest-timeout>=2.3" "hypothesis>=6.100"
}
