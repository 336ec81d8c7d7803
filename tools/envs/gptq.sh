#!/usr/bin/env bash
# Make an environment with GPTQModel, which loads GPTQ and AWQ checkpoints, and this project: tools/envs/gptq.sh DIRECTORY
# Its kernels for GPUs are built only where there is one.
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

make_environment
TORCH=$(sed -n 's/^torch==\([0-9.]*\).*/\1/p' constraints.txt)
install_torch "$TORCH"
install_project
pip install --constraint constraints.txt --editable '.[transformers]' setuptools wheel ninja packaging
has_gpu || export BUILD_CUDA_EXT=0
pip install --no-build-isolation "torch==$TORCH" "gptqmodel==7.5.0" "optimum==2.3.0"
"$ENVIRONMENT/bin/python" -c "import gptqmodel"
