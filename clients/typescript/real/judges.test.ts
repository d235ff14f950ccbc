/**
 * Judges, with the services and workers of services.test.ts and, at JUDGE_URL, the stand-in for an endpoint that the
 * Python client's tests have too (tests/work/judge_stub.py): of the calls of `longer-half` half fail.
 */

import assert from "node:assert/strict";
import { after, before, test } from "node:test";
import { Split } from "#dist/gen/luthier/v1/dataset_pb.js";
import type { Evaluation, Prediction } from "#dist/gen/luthier/v1/evaluation_pb.js";
import type { JudgeResult } from "#dist/gen/luthier/v1/judge_pb.js";
import { EvaluationVerdict_Outcome } from "#dist/gen/luthier/v1/verdict_pb.js";
import { type Client, connect, errorOf, InvalidArgument, NotFound, Reason } from "#dist/node.js";
import { all, thrown } from "../test/scripted.js";
import { chats, job, LIMIT, rendered, version } from "./preparing.js";

/** An endpoint of the stand-in, and what of it a test has otherwise. */
interface Endpoint {
  readonly model: string;
  readonly url?: string;
  readonly key?: string;
  readonly maxCalls?: bigint;
}

const RECORDS = 12;
/** Both orders of one pair of arms for each record. */
const ASKED = 2 * RECORDS;
const URL_OF_STUB = process.env.JUDGE_URL ?? "";
const PAIRWISE = { case: "pairwise", value: {} } as const;
const NONE_TO_FIVE = { case: "rubric", value: { least: 0, most: 5 } } as const;
const ARMS = [
  { armId: "zero", model: "tiny" },
  { armId: "tuned", model: "tsg-tuned" },
];
const client: Client = connect();
let asked = "";
let done: Evaluation;
let rows: Prediction[] = [];

function judge(endpoint: Endpoint, manner: typeof PAIRWISE | typeof NONE_TO_FIVE = PAIRWISE) {
  const value = { url: URL_OF_STUB, key: "JUDGE_KEY", timeoutSeconds: 30, maxCalls: 500n, ...endpoint };
  return {
    judgeId: endpoint.model.replace("-half", ""),
    criteria: "the longer",
    maxNewTokens: 64,
    asked: { case: "endpoint", value },
    manner,
  } as const;
}

before(async () => {
  asked = await version(client, "tsg-things", [
    [Split.TEST, chats(RECORDS, 100)],
    [Split.TRAIN, chats(24)],
  ]);
  const wanted = job(await rendered(client, asked), 2, { tunedModelId: "tsg-tuned" });
  await client.jobs.create(wanted, { jobId: "tsg-job" });
  await client.jobs.wait("tsg-job", LIMIT);
  const judges = [
    judge({ model: "longer-half" }),
    judge({ model: "babble" }),
    judge({ model: "eleven" }, NONE_TO_FIVE),
    judge({ model: "length" }, NONE_TO_FIVE),
  ];
  const evaluation = { datasetVersion: asked, arms: ARMS, judges, primaryScore: "judge.longer" };
  await client.evaluations.create({ ...evaluation, maxNewTokens: 8 }, { evaluationId: "tsg-judged" });
  done = await client.evaluations.wait("tsg-judged", LIMIT);
  rows = await all(client.evaluations.predictions("tsg-judged"));
});
after(() => client.close());

/** What became of one of the judges. */
function result(judgeId: string): JudgeResult {
  const found = done.judgeResults.find((one) => one.judgeId === judgeId);
  assert.ok(found, judgeId);
  return found;
}

/** On how many records the lengths of the answers of `zero` and `tuned` are so. */
function count(is: (zero: number, tuned: number) => boolean): number {
  const lengths = rows.map(({ answers }) => answers.map(({ text }) => [...text].length));
  return lengths.filter(([zero = Number.NaN, tuned = Number.NaN]) => is(zero, tuned)).length;
}

test("a judge that fails half of the time judges all in both orders, and what it finds decides", async () => {
  const longer = result("longer");
  assert.deepEqual([Number(longer.numAsked), Number(longer.numErrors)], [ASKED, 0]);
  assert.equal(longer.pairs.length, 1);
  const [pair] = longer.pairs;
  assert.deepEqual([pair?.armId, pair?.rivalArmId], ["tuned", "zero"]);
  const wins = count((zero, tuned) => tuned > zero);
  const losses = count((zero, tuned) => tuned < zero);
  assert.deepEqual([pair?.numWins, pair?.numTies, pair?.numLosses].map(Number), [
    wins,
    RECORDS - wins - losses,
    losses,
  ]);
  const compared = done.comparisons.find((one) => one.score === "judge.longer");
  assert.equal(Number(compared?.count), RECORDS);
  assert.ok(Math.abs((compared?.difference ?? Number.NaN) - (wins - losses) / RECORDS) < 1e-9);
  assert.equal(done.verdict?.score, "judge.longer");
  assert.notEqual(done.verdict?.outcome, EvaluationVerdict_Outcome.UNSPECIFIED);
  const judgements = rows.flatMap((row) => row.judgements.filter((one) => one.judgeId === "longer"));
  assert.equal(judgements.length, ASKED);
  assert.ok(judgements.every((one) => one.outcome.case === "preference" && /^Reasons\./.test(one.text)));
});

test("an endpoint is asked again while it fails, with the key that the worker reads", async () => {
  const answer = await fetch(new URL("/seen", URL_OF_STUB));
  const seen = (await answer.json()) as { model: string; authorization: string }[];
  const repeated = Number(result("longer").numRepeatedCalls);
  assert.ok(repeated > 0, "about every second call fails");
  assert.equal(seen.filter((one) => one.model === "longer-half").length, ASKED + repeated);
  assert.deepEqual([...new Set(seen.map((one) => one.authorization))], [`Bearer ${process.env.JUDGE_KEY}`]);
});

test("what a judge says on a scale is a score, and what is no judgement is none", () => {
  for (const { text, scores } of rows.flatMap((row) => row.answers)) {
    assert.equal(scores["judge.length"], Math.min(Math.floor([...text].length / 10), 5) / 5);
    assert.equal(scores["judge.eleven"], undefined);
  }
  const eleven = result("eleven");
  assert.deepEqual([Number(eleven.numAsked), Number(eleven.numErrors)], [2 * RECORDS, 2 * RECORDS]);
  assert.deepEqual(
    eleven.errors.map((one) => [one.reason, Number(one.count)]),
    [[Reason.JUDGE_ANSWER_INVALID, 2 * RECORDS]],
  );
  assert.ok(done.armResults.every((arm) => arm.scores.every((one) => one.score !== "judge.eleven")));
  const odd = count((zero, tuned) => (zero + tuned) % 2 === 1);
  assert.equal(Number(result("babble").numErrors), 2 * odd);
  const failures = rows.flatMap((row) =>
    row.judgements.filter((one) => one.judgeId === "eleven").map((one) => one.outcome),
  );
  assert.equal(failures.length, 2 * RECORDS);
  for (const outcome of failures) {
    const error = outcome.case === "error" ? errorOf(outcome.value) : undefined;
    assert.equal(error?.reason, Reason.JUDGE_ANSWER_INVALID);
    assert.match(error?.message ?? "", /11/);
  }
});

test("judges that may not be asked are refused with the field that is wrong", async () => {
  const create = (wrong: ReturnType<typeof judge>): Promise<Evaluation> =>
    client.evaluations.create({ datasetVersion: asked, arms: ARMS, judges: [wrong] });
  const wrong = [
    ["url", Reason.ADDRESS_NOT_ALLOWED, { url: "https://judge.example.com/v1" }],
    ["key", Reason.KEY_NOT_ALLOWED, { key: "HOME" }],
    ["max_calls", Reason.INVALID_FIELD, { maxCalls: BigInt(ASKED - 1) }],
  ] as const;
  for (const [field, reason, endpoint] of wrong) {
    const refused = await thrown(InvalidArgument, create(judge({ model: "first", ...endpoint })));
    assert.deepEqual(
      refused.violations.map((one) => [one.field, one.reason]),
      [[`evaluation.judges[0].endpoint.${field}`, reason]],
    );
  }
  const nobody = { ...judge({ model: "first" }), asked: { case: "model", value: "nobody" } } as const;
  const missing = client.evaluations.create({ datasetVersion: asked, arms: ARMS, judges: [nobody] });
  assert.match((await thrown(NotFound, missing)).message, /projects\/default\/models\/nobody/);
});
