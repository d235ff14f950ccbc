/**
 * The client against real services and workers, which the environment says (LUTHIER_HOME, LUTHIER_*_ADDRESS) and which
 * have a base model `tiny`. Where it says "cut", connections break while calls are under way.
 */

import assert from "node:assert/strict";
import { mkdtemp, readFile, rm, writeFile } from "node:fs/promises";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { after, before, test } from "node:test";
import { readRecords, readRendering } from "#dist/arrow.js";
import { Split } from "#dist/gen/luthier/v1/dataset_pb.js";
import { FinishReason } from "#dist/gen/luthier/v1/evaluation_pb.js";
import { FineTuningJob_State } from "#dist/gen/luthier/v1/fine_tuning_job_pb.js";
import { Upload_State } from "#dist/gen/luthier/v1/upload_pb.js";
import {
  bytesSource,
  type Client,
  connect,
  DeadlineExceeded,
  download,
  FailedPrecondition,
  fileSource,
  InvalidArgument,
  NotFound,
  Reason,
  readConfig,
  type TransferProgress,
  Unauthenticated,
  VersionFailed,
} from "#dist/node.js";
import { all, thrown } from "../test/scripted.js";
import { CuttingProxy } from "./cutting-proxy.js";
import { chats, LIMIT } from "./preparing.js";

const MEBIBYTE = 1024 * 1024;
const client: Client = connect();
const config = readConfig();
let folder = "";

before(async () => {
  folder = await mkdtemp(join(tmpdir(), "luthier-real-"));
});
after(async () => {
  client.close();
  await rm(folder, { recursive: true });
});

test("a key in the home opens the services, another does not", async () => {
  const names = (await all(client.models.list())).map((model) => model.name);
  assert.ok(names.includes("projects/default/models/tiny"), names.join());
  using stranger = connect({ apiKey: "of-somebody-else" });
  const error = await thrown(Unauthenticated, stranger.models.get("tiny"));
  assert.equal(error.reason, Reason.CREDENTIALS_INVALID);
});

test("services say why, what and where", async () => {
  const missing = await thrown(NotFound, client.models.get("nobody"));
  assert.equal(missing.reason, Reason.RESOURCE_NOT_FOUND);
  assert.match(missing.metadata.request_id ?? "", /\S/);
  const wrong = await thrown(InvalidArgument, client.datasets.create("Not An Id"));
  assert.equal(wrong.violations[0]?.field, "dataset_id");
  const job = { baseModel: "tiny", rendering: "none" };
  assert.equal((await thrown(NotFound, client.jobs.create(job))).reason, Reason.RESOURCE_NOT_FOUND);
});

test("a mutation whose answer is cut off is carried out once", async () => {
  // The answer names the dataset: by then the service has made it.
  await using proxy = await CuttingProxy.to(config.dataAddress, ({ way, data }, number) =>
    number === 0 && way === "down" && data.includes("ts-once") ? "cut" : "pass",
  );
  using shaky = connect({ dataAddress: proxy.address });
  const made = await shaky.datasets.create("ts-once", { displayName: "once" });
  assert.equal(proxy.numCut, 1);
  assert.equal(made.displayName, "once");
  assert.equal((await client.datasets.get("ts-once")).uid, made.uid);
});

test("an upload over cut connections goes on at what the service has stored", async () => {
  await using proxy = await CuttingProxy.to(config.dataAddress, ({ up }, number) =>
    number < 2 && up > 2.5 * MEBIBYTE ? "hold" : "pass",
  );
  using shaky = connect({ dataAddress: proxy.address });
  const lines = chats(60_000);
  const path = join(folder, "large.jsonl");
  await writeFile(path, lines);
  const seen: TransferProgress[] = [];
  const uploading = shaky.datasets.upload(fileSource(path), {
    onProgress: (progress) => seen.push(progress),
  });
  for (let stored = 0n, round = 0; round < 2; round += 1) {
    stored = await storedBeyond(stored, () => seen[0]?.name);
    proxy.cutAll();
  }
  const upload = await uploading;
  const total = Buffer.byteLength(lines);
  assert.equal(upload.state, Upload_State.COMPLETE);
  assert.equal(Number(upload.persistedSizeBytes), total);
  const bytes = seen.map((progress) => progress.completedBytes);
  assert.equal(bytes.at(-1), total);
  const restarts = bytes.filter((one, place) => place > 0 && one <= (bytes[place - 1] ?? 0));
  // Where no more had been sent than was stored, going on is no step back.
  assert.ok(restarts.length <= 2, `it stepped back at ${restarts.join()}`);
  assert.ok(proxy.numCut >= 2, `${proxy.numCut} connections were cut`);
  assert.ok(
    restarts.every((one) => one > 0),
    `it began anew at ${restarts.join()}`,
  );
});

/** Wait until the service has stored more of an upload, and return how much. */
async function storedBeyond(stored: bigint, name: () => string | undefined): Promise<bigint> {
  for (let left = 1500; left > 0; left -= 1) {
    const named = name();
    const found = named === undefined ? 0n : (await client.datasets.getUpload(named)).persistedSizeBytes;
    if (found > stored) {
      return found;
    }
    await new Promise((resolve) => setTimeout(resolve, 20));
  }
  throw new Error(`${name()}: nothing beyond byte ${stored} is stored`);
}

test("bad records fail a version, by file and line", async () => {
  await client.datasets.create("ts-bad");
  const upload = await client.datasets.upload(bytesSource("bad.jsonl", Buffer.from('{"messages": 3}\n')));
  const version = await client.datasets.createVersion("ts-bad", [upload]);
  const failed = await thrown(VersionFailed, client.datasets.versions.wait(version.name, LIMIT));
  assert.equal(failed.reason, Reason.INVALID_RECORDS);
  const [bad] = await all(client.datasets.versions.errors(version.name));
  assert.deepEqual([bad?.filename, bad?.line], ["bad.jsonl", 1n]);
});

test("a job is tuned and watched over cut connections, no event lost or doubled", async () => {
  await client.datasets.create("ts-things");
  const upload = await client.datasets.upload(bytesSource("things.jsonl", Buffer.from(chats(48))));
  const version = await client.datasets.createVersion("ts-things", [
    { upload: upload.name, split: Split.TRAIN },
  ]);
  await client.datasets.versions.wait(version.name, LIMIT);
  const rendering = await client.renderings.create(
    { datasetVersion: version.name, model: "tiny" },
    { renderingId: "ts-rendering" },
  );
  await client.renderings.wait(rendering.name, LIMIT);

  await using proxy = await CuttingProxy.to(config.trainingAddress, () => "pass");
  using shaky = connect({ trainingAddress: proxy.address, retry: { initialSeconds: 0.01 } });
  const job = await shaky.jobs.create(
    {
      baseModel: "tiny",
      rendering: rendering.name,
      adaptation: { case: "lora", value: { rank: 8 } },
      hyperparameters: {
        maxSteps: 6n,
        numEpochs: 100,
        batchSize: { case: "batchRows", value: 8 },
        learningRate: 5e-3,
      },
    },
    { jobId: "ts-job" },
  );
  assert.equal((await client.jobs.pause(job.name)).name, job.name);
  const { PAUSED, PAUSING } = FineTuningJob_State;
  let { state } = await client.jobs.get(job.name);
  for (; state === PAUSING; { state } = await client.jobs.get(job.name)) {
    await new Promise((resolve) => setTimeout(resolve, 50));
  }
  assert.equal(state, PAUSED);
  assert.equal((await client.jobs.resume(job.name)).state, FineTuningJob_State.QUEUED);
  const early = await thrown(DeadlineExceeded, client.jobs.wait(job.name, { timeoutSeconds: 0.01 }));
  assert.match(early.message, /is still/);
  const seen: bigint[] = [];
  for await (const event of shaky.jobs.watch(job.name)) {
    seen.push(event.sequence);
    if (seen.length % 3 === 0) {
      proxy.cutAll();
    }
  }
  assert.ok(proxy.numCut > 3, `${proxy.numCut} cuts`);
  const logged = (await all(client.jobs.events(job.name))).map((event) => event.sequence);
  assert.deepEqual(seen, logged);
  assert.deepEqual(
    seen,
    seen.map((_, place) => BigInt(place + 1)),
  );
  const done = await client.jobs.wait(job.name, LIMIT);
  assert.match(done.tunedModel, /models\//);
  const steps = (await all(client.jobs.metrics(job.name, { pageSize: 2 }))).map((point) => point.step);
  assert.deepEqual(steps.slice(0, 6), [1n, 2n, 3n, 4n, 5n, 6n]);
  const again = await thrown(FailedPrecondition, client.datasets.delete("ts-things"));
  assert.equal(again.reason, Reason.RESOURCE_IN_USE);
});

test("rows are read as Arrow tables, each once over cut connections", async () => {
  const rendering = await client.renderings.get("ts-rendering");
  const rows = async (reader: Client): Promise<bigint[]> => {
    const read = await all(readRendering(reader, rendering.name));
    return read.flatMap((batch) => [...(batch.getChild("row") ?? [])].map((row) => BigInt(row)));
  };
  const whole = await rows(client);
  assert.equal(whole.length, 48);
  // Each connection is cut once some of its answer has come.
  await using proxy = await CuttingProxy.to(config.dataAddress, ({ down }, number) =>
    number < 2 && down > 2000 ? "cut" : "pass",
  );
  using shaky = connect({ dataAddress: proxy.address, retry: { initialSeconds: 0.01 } });
  assert.deepEqual(await rows(shaky), whole);
  assert.ok(proxy.numCut > 0);
  const [batch] = await all(readRecords(client, rendering.datasetVersion, { startRow: 47n }));
  assert.equal(batch?.numRows, 1);
});

test("a tuned model answers, and leaving the loop stops it", async () => {
  const asked = client.generate("ts-job", [{ role: "user", content: "colour of thing 1?" }], {
    maxNewTokens: 4,
  });
  const pieces = await all(asked);
  assert.notEqual(pieces.at(-1)?.finishReason, FinishReason.UNSPECIFIED);
  for await (const piece of client.generate("tiny", "Once", { maxNewTokens: 200 })) {
    assert.equal(typeof piece.text, "string");
    break;
  }
});

test("the same seed says the same, and another does not", async () => {
  const say = async (seed: number): Promise<string> => {
    const asked = client.generate("tiny", "Once", { maxNewTokens: 24, temperature: 1, seed });
    return (await all(asked)).map((piece) => piece.text).join("");
  };
  const first = await say(1);
  assert.equal(await say(1), first);
  assert.notEqual(await say(2), first);
});

test("a model is downloaded over cut connections, its files whole", async () => {
  await using proxy = await CuttingProxy.to(config.trainingAddress, ({ down }, number) =>
    number < 2 && down > 60_000 ? "cut" : "pass",
  );
  using shaky = connect({ trainingAddress: proxy.address, retry: { initialSeconds: 0.01 } });
  const directory = join(folder, "tiny");
  await download(shaky, "tiny", directory);
  assert.equal(proxy.numCut, 2);
  assert.match(await readFile(join(directory, "config.json"), "utf8"), /"model_type": "llama"/);
});
