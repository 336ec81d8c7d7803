#!/usr/bin/env bash
# Make an environment with MLX and this project: tools/envs/mlx.sh DIRECTORY
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

make_environment
if [ "$(uname -s)" = Darwin ]; then
    pip install "mlx-lm==0.32.2"
else
    pip install "mlx[cpu]==0.32.4" "mlx-lm==0.32.2"
fi
install_project
pip install "filelock>=3.13"
"$ENVIRONMENT/bin/python" -c "import mlx_lm"
