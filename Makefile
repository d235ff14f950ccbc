# `make` lists the commands. Everything works from a fresh clone: what is missing is set up first.
PYTHON ?= python3
BIN := .venv/bin
GEN := .venv-protos/bin
TS := clients/typescript
# The TypeScript client is built and tested where Node is.
WITH_NODE := $(if $(shell command -v npm),$(TS)/build/.done)
export PIP_DISABLE_PIP_VERSION_CHECK := 1

help: ## list the commands
	@awk -F':.*## ' '/^[a-z-]+:.*## /{printf "  make %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: .venv/done ## make .venv with both distributions, editable, and the tools

demo: setup ## run the main job for real: data, tuning, comparison, report (FAST=1: a tiny budget)
	PYTHONPATH=examples $(BIN)/python examples/earnings/demo.py $(if $(FAST),--fast)

example: setup ## run another example for real: NAME=preference (FAST=1: a tiny budget; CONTROL=1: without a signal)
	PYTHONPATH=examples:examples/earnings $(BIN)/python -m $(NAME).tune $(if $(FAST),--fast) $(if $(CONTROL),--control)

test: setup $(WITH_NODE) ## the tests: no network, no real model
	$(BIN)/python -m pytest -q -n auto --maxprocesses 4 -m "not slow and not gpu" tests

check: setup $(WITH_NODE) ## what CI runs: tests, lint, types, protos, wheels in an empty environment, FAST demo
	bash tests/check.sh check

check-all: setup $(WITH_NODE) ## everything, the slow tests included
	bash tests/check.sh check-all

bench: setup ## measure the kernels
	$(BIN)/python benchmarks/kernels.py

metrics: setup ## write docs/metrics.md, the dashboards and the rules of deploy/ from their code
	$(BIN)/python -m deploy.write

typescript: $(TS)/build/.done ## build the TypeScript client (needs Node)

release: setup ## write build/luthier-protos.binpb, from which clients/templates generate code in any language
	mkdir -p build
	$(BIN)/buf build protos --path protos/luthier/v1 -o build/luthier-protos.binpb

protos: .venv-protos/done $(if $(WITH_NODE),$(TS)/node_modules/.done) ## regenerate the code of protos/ with the pinned generators
	mkdir -p build
	$(BIN)/buf build protos -o build/protos.binpb
	find clients/python/luthier/v1 services/luthier/worker/v1 services/luthier/stored/v1 -name '*_pb2*' -delete
	cd protos && ../$(GEN)/python -m grpc_tools.protoc --descriptor_set_in=../build/protos.binpb \
	  --plugin=protoc-gen-mypy=../$(GEN)/protoc-gen-mypy --plugin=protoc-gen-mypy_grpc=../$(GEN)/protoc-gen-mypy_grpc \
	  --python_out=../clients/python --grpc_python_out=../clients/python --mypy_out=quiet:../clients/python \
	  --mypy_grpc_out=quiet:../clients/python $$(find luthier/v1 -name '*.proto' | sort)
	cd protos && ../$(GEN)/python -m grpc_tools.protoc --descriptor_set_in=../build/protos.binpb \
	  --plugin=protoc-gen-mypy=../$(GEN)/protoc-gen-mypy --plugin=protoc-gen-mypy_grpc=../$(GEN)/protoc-gen-mypy_grpc \
	  --python_out=../services --grpc_python_out=../services --mypy_out=quiet:../services \
	  --mypy_grpc_out=quiet:../services $$(find luthier/worker luthier/stored -name '*.proto' | sort)
	rm build/protos.binpb
	$(if $(WITH_NODE),cd $(TS) && npm run --loglevel=error generate,@echo "no npm here: the code of $(TS) is as it was")

landed: setup ## take the protos as they are for what must stay readable from now on
	$(BIN)/buf build protos --exclude-source-info -o tests/golden/protos.binpb.gz

.venv/done: pyproject.toml clients/python/pyproject.toml constraints-dev.txt CMakeLists.txt $(wildcard kernels/csrc/*.cpp kernels/csrc/src/* kernels/csrc/include/luthier/*)
	$(PYTHON) -m venv .venv
	$(BIN)/pip install -q -c constraints-dev.txt "scikit-build-core>=1.0" "pybind11>=3" "setuptools>=70.1" cmake ninja hatchling editables
	$(BIN)/pip install -q --no-build-isolation -c constraints-dev.txt -e clients/python -e ".[worker,ray,dev]"
	touch $@

$(TS)/node_modules/.done: $(TS)/package.json $(TS)/package-lock.json
	cd $(TS) && npm ci --loglevel=error
	touch $@

$(TS)/build/.done: $(TS)/node_modules/.done $(wildcard $(TS)/*.json $(TS)/src/*.ts $(TS)/src/gen/*/*/*.ts $(TS)/test/*.ts $(TS)/real/*.ts)
	cd $(TS) && npm run --loglevel=error build && npm run --loglevel=error build-tests
	touch $@

.venv-protos/done:
	$(PYTHON) -m venv .venv-protos
	$(GEN)/pip install -q grpcio-tools==1.80.1 mypy-protobuf==5.1.0
	touch $@

.PHONY: help setup demo example test check check-all bench metrics typescript release protos landed
