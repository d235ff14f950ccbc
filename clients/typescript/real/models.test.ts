/** Models that are made from others and taken away, with the services and workers of services.test.ts. */

import assert from "node:assert/strict";
import { mkdtemp, open, readFile, rm } from "node:fs/promises";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { after, before, test } from "node:test";
import { Split } from "#dist/gen/luthier/v1/dataset_pb.js";
import { ExportFormat, Model_Kind, Model_State } from "#dist/gen/luthier/v1/model_pb.js";
import {
  AlreadyExists,
  type Client,
  connect,
  download,
  FailedPrecondition,
  InvalidArgument,
  ModelFailed,
  NotFound,
  Reason,
} from "#dist/node.js";
import { all, thrown } from "../test/scripted.js";
import { chats, job, LIMIT, rendered, version } from "./preparing.js";

const TUNED = "projects/default/models/tsm-tuned";
const client: Client = connect();
let folder = "";
let rendering = "";

before(async () => {
  folder = await mkdtemp(join(tmpdir(), "luthier-models-"));
  rendering = await rendered(client, await version(client, "tsm-things", [[Split.TRAIN, chats(48)]]));
  await client.jobs.create(job(rendering, 20, { tunedModelId: "tsm-tuned" }), { jobId: "tsm-job" });
  await client.jobs.wait("tsm-job", LIMIT);
});
after(async () => {
  client.close();
  await rm(folder, { recursive: true });
});

async function likelihood(model: string): Promise<number> {
  const texts = [{ context: "colour of thing 1?<|im_end|>\n<|im_start|>assistant\n", continuation: "green" }];
  const { scores } = await client.evaluations.scoreTexts(model, texts);
  return scores[0]?.logProbability ?? Number.NaN;
}

test("an adapter is merged into a model that says the same", async () => {
  const begun = await client.models.merge("tsm-tuned", { modelId: "tsm-merged", displayName: "Merged" });
  const seen: string[] = [];
  for await (const event of client.models.watch(begun.name)) {
    seen.push(...(event.payload.case === "stateChange" ? [event.payload.value.state] : []));
  }
  assert.equal(seen.at(-1), "READY");
  const merged = await client.models.wait("tsm-merged", LIMIT);
  assert.deepEqual([merged.kind, merged.displayName], [Model_Kind.WEIGHTS, "Merged"]);
  assert.equal(merged.startFrom, TUNED);
  assert.equal(merged.tokenizerDigest, (await client.models.get("tiny")).tokenizerDigest);
  const [one, other] = [await likelihood("tsm-tuned"), await likelihood("tsm-merged")];
  assert.ok(Math.abs(one - other) < 0.05 * Math.abs(one), `${one} and ${other}`);
});

test("a model is exported for other programs, and downloaded", async () => {
  const begun = await client.models.export("tsm-tuned", "gguf-q8_0", {
    modelId: "tsm-gguf",
    labels: { for: "llama.cpp" },
  });
  const made = await client.models.wait(begun.name, LIMIT);
  assert.deepEqual([made.kind, made.exportFormat], [Model_Kind.EXPORT, ExportFormat.GGUF_Q8_0]);
  assert.deepEqual(made.labels, { for: "llama.cpp" });
  assert.ok(made.check, "it was compared with what it was made from");
  const directory = join(folder, "gguf");
  await download(client, "tsm-gguf", directory);
  const [file] = (await all(client.models.files("tsm-gguf"))).filter((one) => one.path.endsWith(".gguf"));
  const path = join(directory, file?.path ?? "");
  const stored = await open(path);
  const { buffer } = await stored.read(Buffer.alloc(4), 0, 4, 0);
  await stored.close();
  assert.equal(buffer.toString(), "GGUF");
  const tail: Uint8Array[] = [];
  const startOffset = Number(file?.sizeBytes) - 100;
  for await (const piece of client.models.readFile("tsm-gguf", file?.path ?? "", { startOffset })) {
    tail.push(piece);
  }
  assert.deepEqual(Buffer.concat(tail), (await readFile(path)).subarray(startOffset));
});

test("what cannot be made or asked is refused with what was found", async () => {
  const merged = await thrown(InvalidArgument, client.models.merge("tsm-merged"));
  assert.deepEqual(
    merged.violations.map((one) => one.field),
    ["name"],
  );
  assert.match(merged.message, /must be an adapter of a model of words, got .*of kind WEIGHTS/);
  const exported = await thrown(InvalidArgument, client.generate("tsm-gguf", "Once", { maxNewTokens: 1 }));
  assert.match(exported.message, /must be a model of words, got .*a file for other programs/);
  const taken = await thrown(AlreadyExists, client.models.merge("tsm-tuned", { modelId: "tsm-merged" }));
  assert.equal(taken.reason, Reason.RESOURCE_EXISTS);
  const missing = await thrown(NotFound, client.models.export("nobody", "gguf-f16"));
  assert.equal(missing.reason, Reason.RESOURCE_NOT_FOUND);
  const none = await thrown(NotFound, client.models.readFile("tsm-tuned", "nothing.bin"));
  assert.equal(none.reason, Reason.RESOURCE_NOT_FOUND);
});

test("a model that its job still trains, or others stand on, is kept as it is", async () => {
  const long = await client.jobs.create(job(rendering, 5000, { tunedModelId: "tsm-later" }));
  const early = await thrown(FailedPrecondition, client.models.merge("tsm-later"));
  assert.deepEqual([early.reason, early.metadata.job], [Reason.WRONG_STATE, long.name]);
  await client.jobs.cancel(long.name);
  const needed = await thrown(FailedPrecondition, client.models.delete("tiny"));
  assert.equal(needed.reason, Reason.RESOURCE_IN_USE);
  await client.models.delete("tsm-gguf");
  assert.equal((await client.models.undelete("tsm-gguf")).state, Model_State.READY);
});

test("a base model outside of the worker's roots is not taken in, and says so", async () => {
  const relative = await thrown(InvalidArgument, client.models.registerBase({ source: directory("tiny") }));
  assert.deepEqual(
    relative.violations.map((one) => one.field),
    ["model.directory"],
  );
  const outside = await client.models.registerBase({ source: directory(folder) }, { modelId: "tsm-outside" });
  const failed = await thrown(ModelFailed, client.models.wait(outside.name, LIMIT));
  assert.deepEqual([failed.state, failed.reason], ["FAILED", Reason.PATH_NOT_ALLOWED]);
  assert.equal(failed.resource.uid, outside.uid);
});

function directory(value: string): { case: "directory"; value: string } {
  return { case: "directory", value };
}
