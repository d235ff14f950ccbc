#!/usr/bin/env bash
# Start `luthierd up` from an environment on free ports, wait until it is ready and its workers are known, make a call,
# stop it.
# Usage: up_smoke.sh BIN_FOLDER HOME [ARGUMENTS OF up]
set -euo pipefail
bin=$1
export LUTHIER_HOME=$2
shift 2
mkdir -p "$LUTHIER_HOME"
read -r a b c d e f < <("$bin/python" - <<'PY'
import socket
sockets = [socket.socket() for _ in range(6)]
for one in sockets:
    one.bind(("127.0.0.1", 0))
print(*(one.getsockname()[1] for one in sockets))
PY
)
export LUTHIER_DATA_ADDRESS=127.0.0.1:$a LUTHIER_TRAINING_ADDRESS=127.0.0.1:$b LUTHIER_EVALUATION_ADDRESS=127.0.0.1:$c
export LUTHIER_DATA_METRICS_ADDRESS=127.0.0.1:$d LUTHIER_TRAINING_METRICS_ADDRESS=127.0.0.1:$e
export LUTHIER_EVALUATION_METRICS_ADDRESS=127.0.0.1:$f
metric() {
  "$bin/python" -c "import urllib.request, re; text = urllib.request.urlopen('http://127.0.0.1:$1/metrics').read().decode(); print(re.search(r'^luthier_workers (.*)', text, re.M).group(1))"
}
"$bin/luthierd" up "$@" 2> "$LUTHIER_HOME/up.txt" &
pid=$!
for _ in $(seq 300); do
  grep -q '^ready in' "$LUTHIER_HOME/up.txt" && break
  kill -0 $pid 2> /dev/null || break
  sleep 0.1
done
cat "$LUTHIER_HOME/up.txt"
grep -q '^ready in' "$LUTHIER_HOME/up.txt"
"$bin/luthier" --json datasets list
if [ "${1:-}" != --no-workers ]; then
  for port in "$d" "$e" "$f"; do
    for _ in $(seq 300); do
      [ "$(metric "$port")" = 1.0 ] && break
      sleep 0.2
    done
    echo "workers known on :$port: $(metric "$port")"
    [ "$(metric "$port")" = 1.0 ]
  done
fi
kill -TERM $pid
wait $pid
