# The front door. Only Python >= 3.11 (with venv), make and a package registry are assumed.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.setup-stamp
PEERS := .venv-peers
PEERS_STAMP := $(PEERS)/.setup-stamp
ARGS ?=

.DEFAULT_GOAL := help
.PHONY: help setup demo test check up bench bench-peers lock clean

help: ## this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/'

setup: $(STAMP) ## .venv from the hashed lock, and this checkout in it

$(STAMP): requirements/dev.txt pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --require-hashes --no-deps --only-binary :all: -r requirements/dev.txt
	$(BIN)/python -m pip install --quiet --no-deps --no-build-isolation --no-index --editable .
	@touch $@

demo: setup ## the main job from end to end, on three regions and a real model
	$(BIN)/mlcdn demo $(ARGS)

test: setup ## every test; starts its own Kafka, S3 and Valkey
	$(BIN)/python -m pytest $(ARGS)

check: setup ## format, lint, spelling, types, layers
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/codespell
	$(BIN)/mypy
	$(BIN)/lint-imports

up: setup ## the whole network in the foreground; Ctrl-C stops it
	$(BIN)/mlcdn up $(ARGS)

bench: setup ## every benchmark, the quick ones first; make bench-NAME for one: purge, release, swap, edge, audit ...
	$(BIN)/python -m bench $(ARGS)

BENCHES := purge onnx_nodes restart release rollback rollout slow_neighbour workers swap storm release_ten fetch memory audit edge
.PHONY: $(BENCHES:%=bench-%)
$(BENCHES:%=bench-%): bench-%: setup # one of them: make bench-purge
	$(BIN)/python -m bench $* $(ARGS)

bench-peers: setup $(PEERS_STAMP) ## the edge beside other servers, which get a venv of their own
	$(BIN)/python -m bench edge --peers nginx,mosec,triton,mlserver,litserve,bentoml $(ARGS)

$(PEERS_STAMP): requirements/peers.txt
	$(PYTHON) -m venv $(PEERS)
	$(PEERS)/bin/python -m pip install --quiet --require-hashes --no-deps --only-binary :all: -r requirements/peers.txt
	@touch $@

UV_COMPILE := $(BIN)/uv pip compile --quiet --universal --generate-hashes --no-header --no-annotate --no-emit-index-url --python-version 3.11 pyproject.toml

lock: ## requirements/*.txt anew from pyproject.toml (needs uv: pip install uv in .venv)
	$(UV_COMPILE) --extra demo --extra mlflow --group test --group check -o requirements/dev.txt
	$(UV_COMPILE) -c requirements/dev.txt -o requirements/client.txt
	$(UV_COMPILE) -c requirements/dev.txt --extra edge -o requirements/edge.txt
	$(UV_COMPILE) -c requirements/dev.txt --extra origin --extra streams --extra router --extra cli -o requirements/control.txt
	$(UV_COMPILE) --extra peers -o requirements/peers.txt

clean: ## forget the environment and the local network
	rm -rf $(VENV) $(PEERS) .mlcdn build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
