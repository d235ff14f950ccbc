#!/usr/bin/env bash
# The TypeScript client: its generated code is what protos/ says, it is as its linter and its compiler want it, and its
# tests pass. What it does with real services and workers is tests/e2e/test_typescript.py.
set -euo pipefail
cd "$(dirname "$0")/.."
root=$PWD
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

make --no-print-directory typescript
cd clients/typescript
"$root/.venv/bin/buf" generate ../../protos --path ../../protos/luthier/v1 --path ../../protos/third_party/google -o "$work"
diff -r "$work/src/gen" src/gen || { echo "the generated code is not what protos/ says: make protos"; exit 1; }
npm run --loglevel=error lint
npm test --loglevel=error
