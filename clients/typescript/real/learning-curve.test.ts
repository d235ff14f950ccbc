/**
 * A learning curve, with the services and workers of services.test.ts. What came of it is written into CURVE_FILE, which
 * tests/e2e/test_learning_curve.py compares with what the Python client makes of the same.
 */

import assert from "node:assert/strict";
import { writeFileSync } from "node:fs";
import { after, before, test } from "node:test";
import { Split } from "#dist/gen/luthier/v1/dataset_pb.js";
import { EvaluationMetric } from "#dist/gen/luthier/v1/evaluation_pb.js";
import { learningCurve } from "#dist/learning-curve.js";
import { AlreadyExists, type Client, connect, InvalidArgument } from "#dist/node.js";
import { all, thrown } from "../test/scripted.js";
import { chats, job, LIMIT, rendered, version } from "./preparing.js";

const SHARES = [1, 0.25, 0.5];
const RECORDS = 46;
const WANTED = {
  arms: [{ armId: "zero", model: "tiny" }],
  metrics: [EvaluationMetric.EXACT_MATCH],
  maxNewTokens: 8,
  primaryScore: "exact_match",
};
const client: Client = connect();
let rendering = "";

before(async () => {
  const asked = await version(client, "tsl-things", [
    [Split.TEST, chats(12, 100)],
    [Split.VALIDATION, chats(6, 200)],
    [Split.TRAIN, chats(RECORDS)],
  ]);
  rendering = await rendered(client, asked);
});
after(() => client.close());

async function ids(of: string, split: Split): Promise<string[]> {
  return (await all(client.datasets.versions.records(of, { split }))).map((one) => one.recordId);
}

test("one call tunes on parts of the data, evaluates all of them, and says whether more would help", async () => {
  const told: string[] = [];
  const found = await learningCurve(client, job(rendering, 12), WANTED, {
    curveId: "tsl-more",
    shares: SHARES,
    tell: (line) => told.push(line),
  });
  // A quarter is 11.5 records, and rounded to the even one.
  assert.deepEqual(
    found.points?.map((one) => [one.armId, one.numRecords]),
    [
      ["p25", 12],
      ["p50", 23],
      ["p100", RECORDS],
    ],
  );
  assert.deepEqual(
    found.evaluation.arms.map((one) => one.armId),
    ["zero", "p25", "p50", "p100"],
  );
  assert.equal(found.evaluation.candidateArmId, "p100");
  assert.ok(found.fit && found.fit.lower <= found.fit.perDoubling);
  assert.match(found.words, /Over all parts each doubling has changed exact_match by [+-]\d/);
  assert.deepEqual(
    told.filter((line) => line.startsWith("tuning on")),
    [12, 23, RECORDS].map((count, place) => `tuning on ${count} records: tsl-more-p${[25, 50, 100][place]}`),
  );
  const [quarter, half, whole] = [
    await ids("tsl-more/p25", Split.TRAIN),
    await ids("tsl-more/p50", Split.TRAIN),
    await ids((await client.renderings.get(rendering)).datasetVersion, Split.TRAIN),
  ];
  assert.ok(quarter.every((one) => half.includes(one)) && half.every((one) => whole.includes(one)));
  assert.deepEqual([quarter.length, half.length, whole.length], [12, 23, RECORDS]);
  assert.equal((await ids("tsl-more/p25", Split.VALIDATION)).length, 6);
  assert.equal((await client.jobs.get("tsl-more-p50")).labels["learning-curve-records"], "23");

  const jobs = (await all(client.jobs.list())).map((one) => one.name);
  const again = await learningCurve(client, job(rendering, 12), WANTED, {
    curveId: "tsl-more",
    shares: SHARES,
  });
  assert.deepEqual(again, found, "the same call finds all of it");
  assert.deepEqual(
    (await all(client.jobs.list())).map((one) => one.name),
    jobs,
  );
  const said = { rendering, words: found.words, fit: found.fit };
  writeFileSync(process.env.CURVE_FILE ?? "", JSON.stringify(said));
});

test("what is no part of the curve, or of other records, is not taken for it", async () => {
  const other = job(rendering, 12);
  const seeded = { ...other, hyperparameters: { ...other.hyperparameters, seed: 5n } };
  const mine = { curveId: "tsl-more", shares: SHARES };
  const records = await thrown(AlreadyExists, learningCurve(client, seeded, WANTED, mine));
  assert.match(
    records.message,
    /tsl-more\/versions\/p25 exists and is not 12 records of .* as seed 5 chooses them; choose another curveId/,
  );
  await client.jobs.wait((await client.jobs.create(other, { jobId: "tsl-taken-p50" })).name, LIMIT);
  const theirs = { curveId: "tsl-taken", shares: [0.5, 1] };
  const taken = await thrown(AlreadyExists, learningCurve(client, other, WANTED, theirs));
  assert.match(taken.message, /tsl-taken-p50 exists and is no part of the learning curve tsl-taken/);
  const small = learningCurve(client, other, WANTED, { curveId: "tsl-no", shares: [0.001, 1] });
  assert.equal(
    (await thrown(InvalidArgument, small)).message,
    "shares: must be parts of different sizes of 46 train records, got 0.001, 1",
  );
});
