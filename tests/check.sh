#!/usr/bin/env bash
# The stages of `make check` and `make check-all`. Stops at the first that fails; prints the seconds of each.
set -euo pipefail
cd "$(dirname "$0")/.."
level=${1:?usage: tests/check.sh check|check-all}
bin=$PWD/.venv/bin
summary=()

stage() {
  local name=$1 began=$SECONDS
  shift
  echo "== $name"
  "$@"
  summary+=("$(printf '%5d s  %s' $((SECONDS - began)) "$name")")
}

lint() {
  "$bin/ruff" check --quiet .
  "$bin/ruff" format --check --quiet .
  "$bin/clang-format" --dry-run --Werror $(git ls-files 'kernels/csrc/*.cpp' 'kernels/csrc/*.hpp')
}

protos() {
  "$bin/buf" lint protos
  "$bin/buf" breaking protos --against tests/golden/protos.binpb.gz
  "$bin/buf" format protos --path protos/luthier --diff --exit-code
}

tests() {
  if [ "$level" = check-all ]; then
    "$bin/python" -m pytest -q -n auto --maxprocesses 4 tests -m "not gpu"
  else
    make --no-print-directory test
  fi
}

triton_static() {
  if [ "$level" = check-all ]; then
    "$bin/python" benchmarks/triton_static.py
  else
    "$bin/python" benchmarks/triton_static.py --targets sm_90,gfx942 | tail -1
  fi
}

typescript() {
  if ! command -v npm >/dev/null; then
    echo "no npm here: the TypeScript client is not checked"
    return
  fi
  bash tests/typescript.sh
}

stage "lint" lint
stage "types" "$bin/mypy"
stage "protos" protos
stage "kernels, sanitised" bash kernels/csrc/tests/sanitised.sh
stage "tests" tests
stage "Triton, compiled ahead of time" triton_static
stage "wheels in an empty environment" bash tests/wheels.sh
stage "TypeScript client" typescript
stage "clients of other projects" bash tests/clients.sh
if [ "$level" = check-all ]; then
  stage "demo" make --no-print-directory demo
  stage "example preference" make --no-print-directory example NAME=preference
  stage "example preference, control" make --no-print-directory example NAME=preference CONTROL=1
  stage "example reasoning" make --no-print-directory example NAME=reasoning
  stage "example reasoning, control" make --no-print-directory example NAME=reasoning CONTROL=1
  stage "example full_vs_lora FAST=1" make --no-print-directory example NAME=full_vs_lora FAST=1
  stage "example forgetting FAST=1" make --no-print-directory example NAME=forgetting FAST=1
  stage "example forgetting, control" make --no-print-directory example NAME=forgetting CONTROL=1
else
  stage "demo FAST=1" make --no-print-directory demo FAST=1
fi
printf '\n%s\n' "seconds per stage:" "${summary[@]}"
