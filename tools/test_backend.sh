#!/usr/bin/env bash
# Run the conformance suite on one backend: tools/test_backend.sh NAME [pytest arguments].
# A backend whose engine cannot live beside the others gets an environment of its own, .venvs/NAME,
# made the first time by tools/envs/NAME.sh. Called by `make test-backend NAME=...`.
set -euo pipefail
cd "$(dirname "$0")/.."
NAME=${1:?usage: tools/test_backend.sh NAME [pytest arguments]}
shift

BIN=.venv/bin
if [ -f "tools/envs/$NAME.sh" ]; then
    if [ ! -f ".venvs/$NAME/.ready" ]; then
        echo "making .venvs/$NAME"
        "tools/envs/$NAME.sh" ".venvs/$NAME"
        touch ".venvs/$NAME/.ready"
    fi
    BIN=.venvs/$NAME/bin
fi
if [ "$NAME" = openvino ] && [ ! -f .venvs/openvino-export/.ready ]; then
    echo "making .venvs/openvino-export"
    tools/envs/openvino_export.sh .venvs/openvino-export
    touch .venvs/openvino-export/.ready
fi
[ -x "$BIN/pytest" ] || {
    echo "error: no environment for backend $NAME: run make setup, or add tools/envs/$NAME.sh" >&2
    exit 2
}
FASTCHAT_GRPC_TEST_BACKENDS=$NAME exec "$BIN/pytest" tests/conformance "$@"
