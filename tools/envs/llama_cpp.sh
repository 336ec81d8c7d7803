#!/usr/bin/env bash
# Make an environment with llama.cpp's Python binding and this project: tools/envs/llama_cpp.sh DIRECTORY
# The binding is compiled here, for this machine's processor; that takes some minutes.
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

make_environment
if ! "$ENVIRONMENT/bin/python" -c "import llama_cpp" 2>/dev/null; then
    CMAKE_BUILD_PARALLEL_LEVEL=${CMAKE_BUILD_PARALLEL_LEVEL:-2} CMAKE_ARGS=${CMAKE_ARGS:-} \
        nice "$ENVIRONMENT/bin/python" -m pip --disable-pip-version-check --quiet install "llama-cpp-python==0.3.36"
fi
install_project
pip install "jinja2>=3.1" "filelock>=3.13" "httpx2>=2.10" "llguidance>=1.3"
"$ENVIRONMENT/bin/python" -c "import llama_cpp"
