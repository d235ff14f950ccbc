#!/usr/bin/env bash
# Clients as other projects have them: the packed TypeScript client in an empty project, and Go, Java, Python and
# TypeScript generated from the release file with clients/templates and Debian's plugins. Each of the first four lists the
# models of services that are running.
set -euo pipefail
cd "$(dirname "$0")/.."
root=$PWD
work=$(mktemp -d)
log=$work/up.txt
pid=
stop() {
  if [ -n "$pid" ]; then
    kill -TERM "$pid" || true
    wait "$pid" || true
  fi
  rm -rf "$work"
}
trap stop EXIT

read -r -a ports < <(.venv/bin/python - <<'PY'
import socket
sockets = [socket.socket() for _ in range(6)]
for one in sockets:
    one.bind(("127.0.0.1", 0))
print(*(one.getsockname()[1] for one in sockets))
PY
)
export LUTHIER_HOME=$work/home
export LUTHIER_DATA_ADDRESS=127.0.0.1:${ports[0]} LUTHIER_TRAINING_ADDRESS=127.0.0.1:${ports[1]}
export LUTHIER_EVALUATION_ADDRESS=127.0.0.1:${ports[2]} LUTHIER_DATA_METRICS_ADDRESS=127.0.0.1:${ports[3]}
export LUTHIER_TRAINING_METRICS_ADDRESS=127.0.0.1:${ports[4]} LUTHIER_EVALUATION_METRICS_ADDRESS=127.0.0.1:${ports[5]}
mkdir -p "$LUTHIER_HOME/models/hello"
.venv/bin/luthierd up --no-workers 2> "$log" &
pid=$!
for _ in $(seq 300); do
  grep -q '^ready in' "$log" && break
  kill -0 $pid 2> /dev/null || break
  sleep 0.1
done
grep -q '^ready in' "$log" || { cat "$log"; exit 1; }
# No worker is there to look at it: it is listed as it was registered.
.venv/bin/python - <<'PY'
import os
from luthier.client import Client
from luthier.v1.model_pb2 import Model

with Client() as client:
    client.models.register_base(Model(directory=f"{os.environ['LUTHIER_HOME']}/models/hello"), model_id="hello")
PY

lists_hello() {
  echo "$2" | grep -q 'projects/default/models/hello' || { echo "$1 does not list the model: $2"; exit 1; }
  echo "-- $1 lists the model"
}

# Compile without writing anything; the compiler and Node's types are those of the TypeScript client.
typed() {
  local modules=$root/clients/typescript/node_modules
  "$modules/.bin/tsc" --noEmit --strict --skipLibCheck false --module nodenext --target es2022 \
    --lib es2023,dom,dom.iterable,dom.asynciterable,esnext.disposable --typeRoots "$modules/@types" --types node "$@"
}

if command -v npm > /dev/null; then
  make --no-print-directory typescript
  (cd clients/typescript && npm pack --loglevel=error --pack-destination "$work" > /dev/null)
  mkdir "$work/project"
  cd "$work/project"
  npm init --yes --loglevel=error > /dev/null
  npm pkg set --loglevel=error type=module
  npm install --loglevel=error --no-audit --no-fund --prefer-offline "$work"/luthier-client-*.tgz
  cat > list.js <<'JS'
import { connect } from "luthier-client/node";
import { FineTuningJobSchema } from "luthier-client/v1/fine_tuning_job";
import { connect as connectWeb } from "luthier-client/web";
import { Reason } from "luthier-client";

if (!Reason.RESOURCE_NOT_FOUND || !FineTuningJobSchema.typeName || !connectWeb) {
  throw new Error("an entry of the package is empty");
}
const client = connect();
for await (const model of client.models.list({ pageSize: 1 })) {
  console.log(model.name);
}
client.close();
JS
  lists_hello "TypeScript, in an empty project," "$(node list.js)"
  # What a program in TypeScript sees of the package, its dependencies' types included, of Node's types alone.
  cat > list.ts <<'TS'
import { NotFound, Reason } from "luthier-client";
import { type Client, connect } from "luthier-client/node";
import type { FineTuningJob } from "luthier-client/v1/fine_tuning_job";
import type { Model } from "luthier-client/v1/model";
import { connect as connectWeb, type WebOptions } from "luthier-client/web";

const options: WebOptions = { baseUrl: "https://luthier.example.org", apiKey: "k" };
const clients: Client[] = [connect({ project: "p" }), connectWeb(options)];
for (const client of clients) {
  for await (const model of client.models.list({ pageSize: 1 })) {
    const { name, etag }: Pick<Model, "name" | "etag"> = model;
    console.log(name, etag.length);
  }
  const job: FineTuningJob = await client.jobs.wait("j", { onEvent: async (event) => console.log(event.sequence) });
  // @ts-expect-error: a job has no such field.
  console.log(job.noSuchField);
  if (new NotFound("x").reason !== Reason.RESOURCE_NOT_FOUND) {
    client.close();
  }
}
TS
  typed list.ts
  echo "-- the package's types are whole"
  cd "$root"
fi

make --no-print-directory release
python3 -m venv "$work/env"
"$work/env/bin/pip" install -q --disable-pip-version-check grpcio-tools==1.80.1 googleapis-common-protos
generate() {
  mkdir "$work/$1"
  cp build/luthier-protos.binpb "clients/templates/buf.gen.$1.yaml" "$work/$1"
  (cd "$work/$1" && PATH=$work/env/bin:$root/clients/typescript/node_modules/.bin:$PATH \
    "$root/.venv/bin/buf" generate --template "buf.gen.$1.yaml")
}
generate go
generate java
generate python
LUTHIER_CLIENT_API_KEY=$(cat "$LUTHIER_HOME/api-key")
export LUTHIER_CLIENT_API_KEY

if command -v npm > /dev/null; then
  generate ts
  ln -s "$root/clients/typescript/node_modules" "$work/ts/node_modules"
  (cd "$work/ts" && echo '{ "type": "module" }' > package.json && typed $(find gen -name '*.ts'))
  echo "-- TypeScript, generated, compiles"
fi

lists_hello "Python, generated," \
  "$(PYTHONPATH=$work/python/gen "$work/env/bin/python" clients/hello/python/hello.py "$LUTHIER_TRAINING_ADDRESS")"

# Debian has Go's modules as sources of a GOPATH.
mkdir -p "$work/gopath/src/luthier.dev/hello"
mv "$work/go/gen" "$work/gopath/src/luthier.dev/gen"
cp clients/hello/go/main.go "$work/gopath/src/luthier.dev/hello"
GO111MODULE=off GOPATH=$work/gopath:/usr/share/gocode go build -o "$work/hello-go" luthier.dev/hello
lists_hello "Go, generated," "$("$work/hello-go" "$LUTHIER_TRAINING_ADDRESS")"

java_path=$(printf '/usr/share/java/%s.jar:' grpc-{api,context,core,netty,protobuf,protobuf-lite,stub} protobuf \
  proto-google-common-protos guava failureaccess gson perfmark-api geronimo-annotation-1.3-spec \
  netty-{buffer,codec,codec-http,codec-http2,codec-socks,common,handler,handler-proxy,resolver,transport} \
  netty-transport-native-unix-common)
find "$work/java/gen" -name '*.java' > "$work/java/sources"
javac -J-XX:+UseSerialGC -J-XX:TieredStopAtLevel=1 -nowarn -proc:none -cp "$java_path" -d "$work/java/classes" @"$work/java/sources" clients/hello/java/Hello.java
lists_hello "Java, generated," "$(java -cp "$java_path$work/java/classes" Hello 127.0.0.1 "${ports[1]}")"
