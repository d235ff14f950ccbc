/**
 * Jobs in a row, with the services and workers of services.test.ts: all weights, then an adapter on them, then on from
 * a checkpoint of that; what each makes is asked, compared and taken away as any model is.
 */

import assert from "node:assert/strict";
import { mkdtemp, readdir, readFile, rm } from "node:fs/promises";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { after, before, test } from "node:test";
import { Split } from "#dist/gen/luthier/v1/dataset_pb.js";
import { EvaluationMetric } from "#dist/gen/luthier/v1/evaluation_pb.js";
import { Model_Kind } from "#dist/gen/luthier/v1/model_pb.js";
import { type Client, connect, download, FailedPrecondition, InvalidArgument, Reason } from "#dist/node.js";
import { all, thrown } from "../test/scripted.js";
import { chats, colour, job, LIMIT, rendered, version } from "./preparing.js";

const WEIGHTS = "projects/default/models/tsw-weights";
const client: Client = connect();
let folder = "";
let things = "";
let rendering = "";

before(async () => {
  folder = await mkdtemp(join(tmpdir(), "luthier-weights-"));
  const answer = (number: number): string => JSON.stringify({ colour: colour(number) });
  things = await version(client, "tsw-things", [
    [Split.TEST, chats(12, 5, answer)],
    [Split.TRAIN, chats(48, 0, answer)],
  ]);
  rendering = await rendered(client, things);
});
after(async () => {
  client.close();
  await rm(folder, { recursive: true });
});

/** Evaluate models beside one another; returns the perplexity of each. */
async function perplexities(...models: string[]): Promise<number[]> {
  const { name } = await client.evaluations.create({
    datasetVersion: things,
    arms: models.map((model, place) => ({ armId: `arm${place}`, model })),
    metrics: [EvaluationMetric.PERPLEXITY],
    maxNewTokens: 2,
  });
  const done = await client.evaluations.wait(name, LIMIT);
  return done.armResults.map(
    ({ scores }) => scores.find((one) => one.score === "perplexity")?.value ?? Number.NaN,
  );
}

test("a job trains all weights, and its model is one of its own", async () => {
  const adaptation = { case: "full", value: {} } as const;
  const settings = { adaptation, checkpointIntervalSteps: 10n, tunedModelId: "tsw-weights" };
  const wanted = job(rendering, 20, settings);
  const plan = await client.jobs.plan(wanted);
  assert.equal(plan.memory?.adaptersBytes, 0n);
  await client.jobs.create(wanted, { jobId: "tsw-full" });
  const done = await client.jobs.wait("tsw-full", LIMIT);
  assert.equal(done.tunedModel, WEIGHTS);
  const [model, base] = [await client.models.get("tsw-weights"), await client.models.get("tiny")];
  assert.deepEqual([model.kind, model.fineTuningJob], [Model_Kind.WEIGHTS, done.name]);
  assert.equal(model.tokenizerDigest, base.tokenizerDigest);
  const merged = await thrown(InvalidArgument, client.models.merge("tsw-weights"));
  assert.match(merged.message, /must be an adapter of a model of words, got .*of kind WEIGHTS/);
});

test("its weights and its checkpoint are asked as a base is", async () => {
  const [base = 0, halfway = 0, whole = 0] = await perplexities("tiny", "tsw-full/step-10", "tsw-weights");
  assert.ok(base * 0.8 > halfway && halfway > whole && whole > 1, `${base}, ${halfway}, ${whole}`);
  for (const name of ["tsw-weights", "tsw-full/step-10"]) {
    const turns = [{ role: "user", content: "colour of thing 1?" }];
    const pieces = await all(client.generate(name, turns, { maxNewTokens: 4 }));
    assert.ok((pieces.at(-1)?.numGeneratedTokens ?? 0) > 0);
  }
});

test("what is downloaded are whole models, each its own", async () => {
  const files = new Map<string, Buffer>();
  for (const name of ["tsw-weights", "tsw-full/step-10", "tiny"]) {
    const directory = join(folder, name.replace("/", "-"));
    await download(client, name, directory);
    assert.match(await readFile(join(directory, "config.json"), "utf8"), /"model_type": "llama"/);
    files.set(name, await readFile(join(directory, "model.safetensors")));
  }
  const contents = [...files.values()].map((bytes) => bytes.toString("base64"));
  assert.equal(new Set(contents).size, 3);
  assert.ok((await readdir(join(folder, "tsw-weights"))).includes("tokenizer.json"), "it is asked by itself");
});

test("an adapter is trained on the weights, and another job goes on from its checkpoint", async () => {
  const { baseModel: _, adaptation: __, ...wanted } = job(rendering, 10);
  const onTop = { ...wanted, startFrom: "tsw-weights", tunedModelId: "tsw-on-top" };
  await client.jobs.create(onTop, { jobId: "tsw-adapter" });
  assert.equal((await client.jobs.wait("tsw-adapter", LIMIT)).baseModel, WEIGHTS);
  const again = { ...wanted, startFrom: "tsw-adapter/step-10" };
  await client.jobs.create(again, { jobId: "tsw-again" });
  const last = await client.models.get((await client.jobs.wait("tsw-again", LIMIT)).tunedModel);
  assert.deepEqual(
    [last.kind, last.baseModel, last.startFrom],
    [Model_Kind.ADAPTER, WEIGHTS, "projects/default/fineTuningJobs/tsw-adapter/checkpoints/step-10"],
  );
  const asked = ["tsw-weights", "tsw-adapter/step-10", last.name];
  const [first = 0, second = 0, third = 0] = await perplexities(...asked);
  assert.ok(first > second && second > third && third > 1, `${first}, ${second}, ${third}`);
  const needed = await thrown(FailedPrecondition, client.models.delete("tsw-weights"));
  assert.equal(needed.reason, Reason.RESOURCE_IN_USE);
  assert.match(needed.message, /models\/tsw-weights is needed by/);
});
