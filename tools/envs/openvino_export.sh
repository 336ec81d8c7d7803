#!/usr/bin/env bash
# Make an environment that exports models to OpenVINO: tools/envs/openvino_export.sh DIRECTORY
# optimum-intel asks for torchvision, which text does not need and which would bring a torch with CUDA.
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

make_environment
install_torch 2.13.0
pip install --no-deps "optimum-intel==2.2.0" "optimum==2.3.0"
pip install "torch==2.13.0" "transformers==5.5.4" "nncf==3.4.0" "openvino-tokenizers==2026.4.1.0" requests setuptools
"$ENVIRONMENT/bin/python" -c "import optimum.intel"
