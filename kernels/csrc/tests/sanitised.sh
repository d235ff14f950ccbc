#!/usr/bin/env bash
# Build the kernels and their C++ tests with the address and undefined-behaviour sanitizers, and run them on every
# instruction set that this machine has.
set -euo pipefail
cd "$(dirname "$0")/../../.."
cmake=$PWD/.venv/bin/cmake
[ -x "$cmake" ] || cmake=cmake
"$cmake" -S . -B build/sanitised -DLUTHIER_SANITIZE=ON -DLUTHIER_BUILD_TESTS=ON -DCMAKE_BUILD_TYPE=RelWithDebInfo > build-sanitised.log 2>&1 ||
  { cat build-sanitised.log; exit 1; }
"$cmake" --build build/sanitised --target test_kernels -j 2 >> build-sanitised.log 2>&1 || { cat build-sanitised.log; exit 1; }
rm build-sanitised.log
ASAN_OPTIONS=detect_leaks=1 build/sanitised/test_kernels
