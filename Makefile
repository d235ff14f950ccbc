# `make` lists the commands. Everything below works from a fresh clone: what is missing is set up first.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
GEN := .venv-protos/bin

help: ## list the commands
	@awk -F':.*## ' '/^[a-z-]+:.*## /{printf "  make %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

protos: .venv-protos/done ## regenerate the code of protos/ with the pinned generator
	$(BIN)/buf build protos -o build/protos.binpb
	find clients/python/luthier/v1 services/luthier/worker/v1 -name '*_pb2*' -delete
	cd protos && ../$(GEN)/python -m grpc_tools.protoc --descriptor_set_in=../build/protos.binpb \
	  --plugin=protoc-gen-mypy=../$(GEN)/protoc-gen-mypy --plugin=protoc-gen-mypy_grpc=../$(GEN)/protoc-gen-mypy_grpc \
	  --python_out=../clients/python --grpc_python_out=../clients/python --mypy_out=quiet:../clients/python \
	  --mypy_grpc_out=quiet:../clients/python $$(find luthier/v1 -name '*.proto' | sort)
	cd protos && ../$(GEN)/python -m grpc_tools.protoc --descriptor_set_in=../build/protos.binpb \
	  --plugin=protoc-gen-mypy=../$(GEN)/protoc-gen-mypy --plugin=protoc-gen-mypy_grpc=../$(GEN)/protoc-gen-mypy_grpc \
	  --python_out=../services --grpc_python_out=../services --mypy_out=quiet:../services \
	  --mypy_grpc_out=quiet:../services $$(find luthier/worker -name '*.proto' | sort)
	rm build/protos.binpb

.venv-protos/done:
	$(PYTHON) -m venv .venv-protos
	$(GEN)/pip install -q grpcio-tools==1.80.1 mypy-protobuf==5.1.0
	touch $@

.PHONY: help protos
