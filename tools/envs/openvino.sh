#!/usr/bin/env bash
# Make an environment with OpenVINO GenAI and this project, and without torch: tools/envs/openvino.sh DIRECTORY
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

make_environment
install_project
pip install --editable '.[openvino]'
"$ENVIRONMENT/bin/python" -c "import importlib.util as u, openvino_genai; assert u.find_spec('torch') is None"
