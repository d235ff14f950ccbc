#!/usr/bin/env bash
# Build both wheels, install them in empty environments, and start the services there: once with nothing but what
# servicers need (torch must be absent), which also shows that no module was left out of a wheel.
set -euo pipefail
cd "$(dirname "$0")/.."
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

.venv/bin/pip wheel -q --no-build-isolation --no-deps -w "$work/wheels" ./clients/python .

echo "-- luthier-client alone"
python3 -m venv "$work/client"
"$work/client/bin/pip" install -q "$work"/wheels/luthier_client-*.whl
"$work/client/bin/luthier" --help > /dev/null
"$work/client/bin/python" - <<'PY'
import sys
import luthier.client
assert not {"torch", "sqlalchemy", "pyarrow", "luthier.runtime"} & set(sys.modules), "the client pulled in server packages"
PY

echo "-- luthier without the worker extra: three services SERVING, no torch"
python3 -m venv "$work/services"
"$work/services/bin/pip" install -q "$work"/wheels/*.whl
"$work/services/bin/python" -c 'import importlib.util; assert importlib.util.find_spec("torch") is None'
bash tests/up_smoke.sh "$work/services/bin" "$work/home" --no-workers

echo "-- luthier with the worker extra: services and workers"
python3 -m venv "$work/all"
wheel=$(ls "$work"/wheels/luthier-*.whl)
"$work/all/bin/pip" install -q -c constraints-dev.txt "$work"/wheels/luthier_client-*.whl "$wheel[worker]"
bash tests/up_smoke.sh "$work/all/bin" "$work/home-all"
