#!/usr/bin/env bash
# Build both wheels, install them in an empty environment, and start the services there: the client alone first, then
# with nothing but what servicers need (torch must be absent), which also shows that no module was left out of a wheel,
# then with the workers. One environment does for all: what a step installs asks itself for all that the last one did.
set -euo pipefail
cd "$(dirname "$0")/.."
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

.venv/bin/pip wheel -q --no-build-isolation --no-deps -w "$work/wheels" ./clients/python .

echo "-- luthier-client alone"
python3 -m venv "$work/env"
"$work/env/bin/pip" install -q "$work"/wheels/luthier_client-*.whl
"$work/env/bin/luthier" --help > /dev/null
"$work/env/bin/python" - <<'PY'
import sys
import luthier.client
assert not {"torch", "sqlalchemy", "pyarrow", "luthier.runtime"} & set(sys.modules), "the client pulled in server packages"
PY

echo "-- luthier without the worker extra: three services SERVING, no torch"
"$work/env/bin/pip" install -q "$work"/wheels/*.whl
"$work/env/bin/python" -c 'import importlib.util; assert importlib.util.find_spec("torch") is None'
bash tests/up_smoke.sh "$work/env/bin" "$work/home" --no-workers

echo "-- luthier with the worker extra: services and workers"
wheel=$(ls "$work"/wheels/luthier-*.whl)
"$work/env/bin/pip" install -q -c constraints-dev.txt "$work"/wheels/luthier_client-*.whl "$wheel[worker]"
bash tests/up_smoke.sh "$work/env/bin" "$work/home-all"
