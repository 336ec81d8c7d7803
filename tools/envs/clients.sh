#!/usr/bin/env bash
# Make an environment with LiteLLM, a client of the OpenAI API, for tests: tools/envs/clients.sh DIRECTORY
# It wants an older version of OpenAI's own client than the tests of this project.
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

make_environment
pip install "litellm==1.106.2" mcp
"$ENVIRONMENT/bin/python" -c "import litellm"
