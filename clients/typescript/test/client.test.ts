/** The client as a whole: every RPC, short names in messages, sockets, one error for what was lost in the web. */

import assert from "node:assert/strict";
import { execFile, execFileSync } from "node:child_process";
import { mkdtempSync, readFileSync, rmSync } from "node:fs";
import { createServer } from "node:http";
import { createSecureServer, createServer as createServer2 } from "node:http2";
import type { AddressInfo } from "node:net";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { test } from "node:test";
import { promisify } from "node:util";
import type { MessageInitShape } from "@bufbuild/protobuf";
import { Code, type Interceptor } from "@connectrpc/connect";
import { connectNodeAdapter } from "@connectrpc/connect-node";
import type { FineTuningJobSchema } from "#dist/gen/luthier/v1/fine_tuning_job_pb.js";
import { Reason as PublicReason, Unavailable, Unimplemented } from "#dist/index.js";
import { bytesSource, type Client, connect, InvalidArgument, NotFound, Reason } from "#dist/node.js";
import { connect as connectWeb } from "#dist/web.js";
import { API_KEY, all, refusal, ScriptedServices, SERVICES, stage, stopping, thrown } from "./scripted.js";

/** What each method of each resource is called with, where its first argument is not a name. */
const ARGUMENTS: Readonly<Record<string, readonly unknown[]>> = {
  "datasets.upload": [bytesSource("a", new Uint8Array(1))],
  "datasets.createVersion": ["d", []],
  "datasets.list": [],
  "datasets.listUploads": [],
  "versions.list": ["d"],
  "renderings.create": [{ datasetVersion: "d/v", model: "m" }],
  "renderings.list": [],
  "models.registerBase": [{ directory: "/m" }],
  "models.export": ["m", "gguf-f16"],
  "models.list": [],
  "models.readFile": ["m", "config.json"],
  "jobs.plan": [{ baseModel: "m", rendering: "r" }],
  "jobs.create": [{ baseModel: "m", rendering: "r" }],
  "jobs.list": [],
  "jobs.getCheckpoint": ["j/c"],
  "evaluations.create": [{ datasetVersion: "d/v", arms: [{ model: "m" }] }],
  "evaluations.list": [],
  "evaluations.grade": [{ name: "g" }, [{ outputText: "a" }]],
  "evaluations.scoreTexts": ["m", [{ continuation: "a" }]],
  "aliases.create": [{}],
  "aliases.list": [],
  "aliases.move": ["a", "m"],
};

/** All methods of the client, by `resource.method`. */
function methods(client: Client): [string, () => Promise<unknown> | AsyncIterable<unknown>][] {
  const { datasets, renderings, models, jobs, evaluations, aliases } = client;
  const resources = { datasets, versions: datasets.versions, renderings, models, jobs, evaluations, aliases };
  return Object.entries(resources).flatMap(([name, resource]) =>
    Object.getOwnPropertyNames(Object.getPrototypeOf(resource))
      .filter((method) => !["constructor", "name", "weights", "source", "resolved"].includes(method))
      .map((method): [string, () => Promise<unknown> | AsyncIterable<unknown>] => {
        const full = `${name}.${method}`;
        const given = ARGUMENTS[full] ?? [name === "versions" ? "d/v" : "x"];
        const found = resource[method as keyof typeof resource] as (...all: unknown[]) => Promise<unknown>;
        return [full, () => found.apply(resource, [...given])];
      }),
  );
}

test("the client knows every RPC", async () => {
  await using at = await stage();
  const { answers } = at.services;
  const known = { ...answers };
  at.services.answers.startUpload = () => ({ name: "projects/default/uploads/u", state: 1 });
  for (const [name, run] of methods(at.client)) {
    for (const method of Object.keys(known)) {
      // Whose events are asked for is known before they are; a `get` alone meets a service without the method.
      answers[method] = name.endsWith(".get") ? missing : (known[method] ?? missing);
    }
    await thrown(Unimplemented, run());
  }
  await thrown(Unimplemented, at.client.generate("m", "Once"));
  const all = SERVICES.flatMap((service) => service.methods.map((method) => method.localName));
  const arrow = ["readRecords", "readRendering"];
  assert.deepEqual(Object.keys(at.services.calls).concat(arrow).sort(), all.sort());
});

function missing(): never {
  throw refusal(Code.Unimplemented, "not here");
}

test("methods resolve short names in messages, and leave the caller's alone", async () => {
  await using at = await stage();
  // biome-ignore lint/suspicious/noExplicitAny: what was sent, looked at field by field.
  const seen: any[] = [];
  at.services.answers.createFineTuningJob = (request) => {
    seen.push(request);
    return {};
  };
  const given: MessageInitShape<typeof FineTuningJobSchema> = {
    baseModel: "m",
    rendering: "projects/other/renderings/r",
    mixedRenderings: [{ rendering: "s" }],
    method: {
      case: "reinforcement",
      value: {
        grader: {
          kind: {
            case: "multi",
            value: {
              graders: {
                a: { kind: { case: "rewardModel", value: { model: "w" } } },
                b: { kind: { case: "rewardModel", value: { model: "j/c" } } },
              },
            },
          },
        },
      },
    },
  };
  const before = structuredClone(given);
  await at.client.jobs.create(given, { jobId: "j" });
  const job = seen[0].fineTuningJob;
  assert.equal(job.baseModel, "projects/default/models/m");
  assert.equal(job.rendering, "projects/other/renderings/r");
  assert.equal(job.mixedRenderings[0].rendering, "projects/default/renderings/s");
  const { graders } = job.method.value.grader.kind.value;
  assert.equal(graders.a.kind.value.model, "projects/default/models/w");
  assert.equal(graders.b.kind.value.model, "projects/default/fineTuningJobs/j/checkpoints/c");
  assert.equal(seen[0].fineTuningJobId, "j");
  assert.deepEqual(given, before);
});

test("a service is reached by a socket of the file system", async () => {
  const folder = mkdtempSync(join(tmpdir(), "luthier-socket-"));
  const services = new ScriptedServices();
  const server = createServer2(connectNodeAdapter({ routes: (router) => services.routes(router) }));
  const path = join(folder, "data.sock");
  await new Promise<void>((resolve) => server.listen(path, resolve));
  services.answers.getDataset = (request) => ({ name: request.name });
  const client = connect({ apiKey: API_KEY, dataAddress: `unix:${path}` });
  try {
    assert.equal((await client.datasets.get("a")).name, "projects/default/datasets/a");
  } finally {
    client.close();
    await new Promise((resolve) => server.close(resolve));
    rmSync(folder, { recursive: true });
  }
});

test("over TLS a service is reached whose certificate is known, and no other", async () => {
  const folder = mkdtempSync(join(tmpdir(), "luthier-tls-"));
  const [key, cert] = [join(folder, "key.pem"), join(folder, "cert.pem")];
  const about = ["-subj", "/CN=luthier", "-addext", "subjectAltName=IP:127.0.0.1"];
  const made = [
    "-newkey",
    "ec",
    "-pkeyopt",
    "ec_paramgen_curve:P-256",
    "-nodes",
    "-keyout",
    key,
    "-out",
    cert,
  ];
  execFileSync("openssl", ["req", "-x509", ...made, ...about], { stdio: "ignore" });
  const services = new ScriptedServices();
  services.answers.getDataset = (request) => ({ name: request.name });
  const handler = connectNodeAdapter({ routes: (router) => services.routes(router) });
  const server = createSecureServer({ key: readFileSync(key), cert: readFileSync(cert) }, handler);
  await new Promise<void>((resolve) => server.listen(0, "127.0.0.1", resolve));
  const dataAddress = `https://127.0.0.1:${(server.address() as AddressInfo).port}`;
  try {
    using stranger = connect({ apiKey: API_KEY, dataAddress, retry: { deadlineSeconds: 0 } });
    assert.match((await thrown(Unavailable, stranger.datasets.get("a"))).message, /self-signed/);
    const program = `
      import { connect } from ${JSON.stringify(import.meta.resolve("#dist/node.js"))};
      const client = connect({ apiKey: "k", dataAddress: ${JSON.stringify(dataAddress)} });
      console.log((await client.datasets.get("a")).name);
      client.close();`;
    const words = ["--input-type=module", "--eval", program];
    const env = { ...process.env, NODE_EXTRA_CA_CERTS: cert };
    const said = await promisify(execFile)(process.execPath, words, { env });
    assert.equal(said.stdout.trim(), "projects/default/datasets/a");
  } finally {
    await new Promise((resolve) => server.close(resolve));
    rmSync(folder, { recursive: true });
  }
});

test("what a program puts around calls is around each attempt of each kind of call", async () => {
  await using at = await stage();
  const { answers, headers, address } = at.services;
  let number = 0;
  const traced: Interceptor = (next) => (request) => {
    number += 1;
    request.header.set("traceparent", `00-trace-${number}`);
    return next(request);
  };
  const addresses = { dataAddress: address, trainingAddress: address, evaluationAddress: address };
  const retry = { initialSeconds: 0.01, deadlineSeconds: 5 };
  using client = connect({ apiKey: API_KEY, ...addresses, retry, interceptors: [traced] });
  answers.getDataset = () => {
    if (at.services.count("getDataset") < 3) {
      throw stopping();
    }
    return {};
  };
  await client.datasets.get("a");
  assert.deepEqual([number, headers.getDataset?.get("traceparent")], [3, "00-trace-3"]);
  answers.watchFineTuningJob = async function* () {
    yield { sequence: 1n, payload: { case: "progress", value: {} } };
  };
  assert.equal((await all(client.jobs.watch("j"))).length, 1);
  assert.equal(headers.watchFineTuningJob?.get("traceparent"), "00-trace-5");
  answers.startUpload = () => ({ name: "projects/default/uploads/u", state: 1 });
  answers.writeUpload = () => {
    throw refusal(Code.InvalidArgument, "no");
  };
  await thrown(InvalidArgument, client.datasets.upload(bytesSource("a", new Uint8Array(3))));
  assert.equal(headers.writeUpload?.get("traceparent"), `00-trace-${number}`);
});

test("reasons are those of the API", () => {
  assert.equal(Reason.RESOURCE_NOT_FOUND, "RESOURCE_NOT_FOUND");
  assert.ok(!("UNSPECIFIED" in Reason));
  assert.equal(Reason, PublicReason);
});

/** Services behind gRPC-Web over HTTP/1.1, as a browser reaches them. */
async function webStage(): Promise<{
  services: ScriptedServices;
  baseUrl: string;
  end: () => Promise<void>;
}> {
  const services = new ScriptedServices();
  const server = createServer(
    connectNodeAdapter({ routes: (router) => services.routes(router), grpc: false, connect: false }),
  );
  await new Promise<void>((resolve) => server.listen(0, "127.0.0.1", resolve));
  return {
    services,
    baseUrl: `http://127.0.0.1:${(server.address() as AddressInfo).port}`,
    async end() {
      server.closeAllConnections();
      await new Promise((resolve) => server.close(resolve));
    },
  };
}

test("over gRPC-Web calls, errors and watches are as over gRPC", async () => {
  const at = await webStage();
  using client = connectWeb({
    baseUrl: at.baseUrl,
    apiKey: API_KEY,
    retry: { initialSeconds: 0.01, maxSeconds: 0.05 },
    interceptors: [
      (next) => (request) => {
        request.header.set("traceparent", "00-trace");
        return next(request);
      },
    ],
  });
  at.services.answers.getDataset = (request) => ({ name: request.name });
  assert.equal((await client.datasets.get("a")).name, "projects/default/datasets/a");
  assert.equal(at.services.headers.getDataset?.get("authorization"), `Bearer ${API_KEY}`);
  assert.equal(at.services.headers.getDataset?.get("traceparent"), "00-trace");
  at.services.answers.getDataset = () => {
    throw refusal(Code.NotFound, "no dataset a", { reason: "RESOURCE_NOT_FOUND", metadata: { name: "a" } });
  };
  const error = await thrown(NotFound, client.datasets.get("a"));
  assert.deepEqual(
    [error.message, error.reason, error.metadata.name],
    ["no dataset a", "RESOURCE_NOT_FOUND", "a"],
  );
  const starts: bigint[] = [];
  at.services.answers.watchFineTuningJob = async function* (request: { startSequence: bigint }) {
    starts.push(request.startSequence);
    yield { sequence: request.startSequence, payload: { case: "progress", value: {} } };
    if (starts.length < 3) {
      throw stopping();
    }
  };
  const events = await all(client.jobs.watch("j"));
  assert.deepEqual(
    events.map((event) => event.sequence),
    [1n, 2n, 3n],
  );
  await thrown(Unimplemented, client.datasets.upload(bytesSource("a", new Uint8Array(3))));
  assert.equal(at.services.count("startUpload"), 0);
  await at.end();
  using hasty = connectWeb({ baseUrl: at.baseUrl, retry: { deadlineSeconds: 0 } });
  await thrown(Unavailable, hasty.datasets.get("a"));
});
