# The only door: people, CI and the README call these targets.
SHELL := /bin/bash
.DEFAULT_GOAL := help
PYTHON ?= python3
BIN := .venv/bin
WHAT ?= engine
ARGS ?=
NAME ?= openvino

help:  ## Show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: .venv/.ready  ## Make .venv with everything the other targets need

.venv/.ready: pyproject.toml constraints.txt tools/setup.sh
	@PYTHON=$(PYTHON) tools/setup.sh
	@touch $@

demo: setup  ## Stream one answer of a real model through a controller and a worker, then stop
	@$(BIN)/python tools/demo.py

serve: setup  ## The same, and keep it running until Ctrl-C
	@$(BIN)/fastchat-grpc serve $(ARGS)

test: setup  ## Run the whole test suite
	@$(BIN)/pytest $(ARGS)

test-unit: setup  ## Run only the tests that need no sockets and no model
	@$(BIN)/pytest tests/unit $(ARGS)

test-backend: setup  ## Run the conformance suite on one backend: make test-backend NAME=openvino
	@tools/test_backend.sh $(NAME) $(ARGS)

fuzz: setup  ## Send a backend any request that the domain allows: make fuzz NAME=openvino ARGS=10000
	@$(BIN)/python -m tests.conformance.tiny_model build/tiny-model
	@FASTCHAT_GRPC_TEST_MODEL=$$PWD/build/tiny-model FASTCHAT_GRPC_TEST_GGUF=$$PWD/build/tiny-model/tiny.gguf \
	    FUZZ_VOCABULARY=4096 FUZZ_RUNNING=$$PWD/build/fuzz-running.txt FUZZ_EXAMPLES=$(or $(ARGS),10000) tools/test_backend.sh $(NAME) -k test_fuzz

fuzz-gateway: setup  ## Feed the gateway's module random answers under AddressSanitizer: make fuzz-gateway ARGS=10000000
	@$(BIN)/python tools/fuzz_gateway.py $(ARGS)

test-clients: setup  ## Run the tests with LiteLLM and vLLM's benchmark client, in environments of their own
	@for name in clients vllm; do \
	    [ -f .venvs/$$name/.ready ] || { tools/envs/$$name.sh .venvs/$$name && touch .venvs/$$name/.ready; } || exit; \
	done
	@$(BIN)/pytest tests/e2e/test_openai_other_clients.py $(ARGS)

lint: setup  ## Check style, types, imports and contracts
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy
	@$(BIN)/python tools/proto.py lint
	@$(BIN)/python tools/proto.py check
	@$(BIN)/python tools/proto.py breaking
	@$(BIN)/pytest -q tests/unit/test_imports.py

proto: setup  ## Regenerate stubs and the descriptor set from proto/
	@$(BIN)/python tools/proto.py generate

bench: setup  ## Run a benchmark: make bench WHAT=engine ARGS="--streams 8"
	@$(BIN)/python -m tools.bench $(WHAT) $(ARGS)

chaos: setup  ## Kill, freeze and drain a fleet under load, count what is lost: make chaos ARGS="--seed 1 --seconds 60"
	@$(BIN)/python -m tests.chaos $(ARGS)

soak: setup  ## Send 100,000 short requests and watch the memory: make soak ARGS="--requests 10000"
	@$(BIN)/python -m tests.chaos.soak $(ARGS)

clean:  ## Remove the virtual environments and what was built
	rm -rf .venv .venvs build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis bench-results

.PHONY: help setup demo serve test test-unit test-backend fuzz fuzz-gateway test-clients lint proto bench chaos soak clean
