/**
 * What values answers, with the services and workers of services.test.ts: a reward model that a job makes of pairs, and
 * a reward service in TypeScript; each grades by itself, in an evaluation and in a job that learns from it.
 */

import assert from "node:assert/strict";
import { createServer, type Http2Server } from "node:http2";
import type { AddressInfo } from "node:net";
import { after, before, test } from "node:test";
import { Code, ConnectError, type ServiceImpl } from "@connectrpc/connect";
import { connectNodeAdapter } from "@connectrpc/connect-node";
import { Split } from "#dist/gen/luthier/v1/dataset_pb.js";
import { EvaluationMetric, FinishReason } from "#dist/gen/luthier/v1/evaluation_pb.js";
import { Model_Kind } from "#dist/gen/luthier/v1/model_pb.js";
import { RenderingKind } from "#dist/gen/luthier/v1/rendering_pb.js";
import { RewardService } from "#dist/gen/luthier/v1/reward_service_pb.js";
import {
  type Client,
  connect,
  errorOf,
  FailedPrecondition,
  InvalidArgument,
  JobFailed,
  Reason,
} from "#dist/node.js";
import { all, thrown } from "../test/scripted.js";
import { chats, job, LIMIT, pairs, question, rendered, version } from "./preparing.js";

type JobInit = Parameters<Client["jobs"]["create"]>[0];
type GraderInit = Parameters<Client["evaluations"]["grade"]>[0];

const JUDGE = "projects/default/models/tsv-judge";
const VALUED = { name: "valued", kind: { case: "rewardModel", value: { model: "tsv-judge" } } } as const;
const client: Client = connect();
let things = "";
let prompts = "";
let server: Http2Server;
let address = "";

before(async () => {
  server = serving(({ samples }) => ({
    scores: samples.map(({ outputText }) => ({ outcome: scored(outputText) })),
  }));
  address = await listening(server);
  things = await version(client, "tsv-things", [
    [Split.TEST, chats(6, 100)],
    [Split.TRAIN, chats(24)],
  ]);
  prompts = await rendered(client, things, RenderingKind.PROMPT);
});
after(() => {
  client.close();
  server.close();
});

/** A reward service; whoever asked it may stay connected. */
function serving(score: ServiceImpl<typeof RewardService>["score"]): Http2Server {
  const handler = connectNodeAdapter({ routes: (router) => router.service(RewardService, { score }) });
  return createServer(handler).on("session", (session) => session.unref());
}

/** What the reward service finds of an answer. */
function scored(text: string): { case: "error"; value: string } | { case: "score"; value: number } {
  return text === ""
    ? { case: "error", value: "there is no answer" }
    : { case: "score", value: Math.min(1, [...text].length / 10) };
}

async function listening(one: Http2Server): Promise<string> {
  await new Promise<void>((resolve) => one.listen(0, "127.0.0.1", resolve));
  return `127.0.0.1:${(one.address() as AddressInfo).port}`;
}

/** A job that learns from what a grader says of its answers. */
function reinforced(grader: GraderInit): JobInit {
  const value = { grader, numSamples: 4, maxNewTokens: 4 };
  const adaptation = { case: "full", value: {} } as const;
  return job(prompts, 2, { adaptation, method: { case: "reinforcement", value } });
}

test("pairs make a reward model, which values answers and is not asked", async () => {
  const compared = await version(client, "tsv-pairs", [[Split.TRAIN, pairs(24)]]);
  const rows = await rendered(client, compared, RenderingKind.PREFERENCE);
  const method = { case: "rewardModel", value: {} } as const;
  const wanted = job(rows, 8, { method, checkpointIntervalSteps: 4n });
  await client.jobs.create(wanted, { jobId: "tsv-judge" });
  const done = await client.jobs.wait("tsv-judge", LIMIT);
  assert.equal(done.tunedModel, JUDGE);
  const points = await all(client.jobs.metrics("tsv-judge"));
  assert.ok((points.at(-1)?.values.reward_margin ?? 0) > (points[0]?.values.reward_margin ?? 0));
  assert.equal((await client.models.get(JUDGE)).kind, Model_Kind.REWARD);
  const asked = await thrown(InvalidArgument, client.generate("tsv-judge", "Once", { maxNewTokens: 1 }));
  assert.match(asked.message, /must be a model of words, got '.*tsv-judge', a reward model/);

  const samples = ["blue", "grass"].flatMap((outputText) =>
    [1, 2, 30].map((number) => ({ itemJson: JSON.stringify({ messages: question(number) }), outputText })),
  );
  const unasked = { itemJson: '{"answer": 4}', outputText: "4" };
  const grades = await all(client.evaluations.grade(VALUED, [...samples, unasked]));
  const values = grades.map(({ outcome }) => (outcome.case === "score" ? outcome.value : Number.NaN));
  for (const place of [0, 1, 2]) {
    const [good = Number.NaN, bad = Number.NaN] = [values[place], values[place + 3]];
    assert.ok(good > bad, `${good} and ${bad}`);
  }
  const last = grades.at(-1)?.outcome;
  assert.equal(last?.case === "error" && errorOf(last.value).reason, Reason.GRADER_INPUT_INVALID);
});

test("an evaluation has a reward model's values, the same as they are by themselves", async () => {
  const { name } = await client.evaluations.create({
    datasetVersion: things,
    arms: [{ armId: "base", model: "tiny" }],
    metrics: [EvaluationMetric.REWARD_MODEL],
    rewardModel: "tsv-judge",
    graders: [VALUED],
    maxNewTokens: 6,
  });
  const done = await client.evaluations.wait(name, LIMIT);
  assert.ok(done.references.some((one) => one.name === JUDGE));
  const rows = await all(client.evaluations.predictions(name));
  const answers = rows.flatMap((row) => row.answers);
  const samples = rows.flatMap((row) =>
    row.answers.map((answer) => ({
      itemJson: JSON.stringify({ messages: row.prompt.map(({ role, content }) => ({ role, content })) }),
      outputText: answer.text,
      isTruncated: answer.finishReason !== FinishReason.STOP,
    })),
  );
  const grades = await all(client.evaluations.grade(VALUED, samples));
  assert.deepEqual(
    answers.map((answer) => answer.grades.valued?.outcome),
    grades.map((grade) => grade.outcome),
  );
  assert.deepEqual(
    answers.map((answer) => ({ case: "score", value: answer.scores.reward })),
    grades.map((grade) => grade.outcome),
  );
  const evaluation = {
    datasetVersion: things,
    arms: [{ armId: "base", model: "tiny" }],
    rewardModel: "tiny",
  };
  const metrics = [EvaluationMetric.REWARD_MODEL];
  const other = await thrown(InvalidArgument, client.evaluations.create({ ...evaluation, metrics }));
  assert.deepEqual(
    other.violations.map((one) => [one.field, one.reason]),
    [["evaluation.reward_model", Reason.REWARD_MODEL_EXPECTED]],
  );
});

test("a job learns from a reward model, which it keeps, and as much from its checkpoint", async () => {
  const valuedBy = (model: string): JobInit =>
    reinforced({ kind: { case: "rewardModel", value: { model } } });
  const { warnings } = await client.jobs.plan(valuedBy("tsv-judge"));
  assert.deepEqual(
    warnings.filter((one) => /reward model/.test(one)),
    [],
  );
  await client.jobs.create(valuedBy("tsv-judge"), { jobId: "tsv-valued" });
  const needed = await thrown(FailedPrecondition, client.models.delete("tsv-judge"));
  assert.equal(needed.reason, Reason.RESOURCE_IN_USE);
  await client.jobs.wait("tsv-valued", LIMIT);
  await client.jobs.create(valuedBy("tsv-judge/step-8"), { jobId: "tsv-by-checkpoint" });
  await client.jobs.wait("tsv-by-checkpoint", LIMIT);
  const drawn = await all(client.jobs.rollouts("tsv-valued"));
  assert.deepEqual(await all(client.jobs.rollouts("tsv-by-checkpoint")), drawn);
  assert.ok(drawn.every((one) => one.outcome.case === "reward"));
  assert.ok(new Set(drawn.map((one) => one.outcome.value)).size > 8);
  const other = await thrown(InvalidArgument, client.jobs.create(valuedBy("tiny")));
  assert.deepEqual(
    other.violations.map((one) => [one.field, one.reason]),
    [["fine_tuning_job.reinforcement.grader.reward_model.model", Reason.REWARD_MODEL_EXPECTED]],
  );
});

test("a reward service in TypeScript grades samples, and a job learns from it", async () => {
  const grader = { name: "ours", kind: { case: "remote", value: { address } } } as const;
  const samples = ["blue", "", "red"].map((outputText) => ({ outputText }));
  const [blue, none, red] = await all(client.evaluations.grade(grader, samples));
  assert.deepEqual([blue?.outcome.value, red?.outcome.value], [0.4, 0.3]);
  const error = none?.outcome.case === "error" ? errorOf(none.outcome.value) : undefined;
  assert.equal(error?.reason, Reason.REWARD_FAILED);
  assert.match(error?.message ?? "", /there is no answer/);

  await client.jobs.create(reinforced(grader), { jobId: "tsv-served" });
  await client.jobs.wait("tsv-served", LIMIT);
  for (const { outputText, outcome } of await all(client.jobs.rollouts("tsv-served"))) {
    const right = scored(outputText);
    assert.equal(outcome.case, right.case === "score" ? "reward" : "error");
    assert.ok(outcome.case !== "reward" || outcome.value === right.value, `${outputText}: ${outcome.value}`);
  }
});

test("a reward service that refuses fails the job, which says where it was asked and what it said", async () => {
  const shut = serving(() => {
    throw new ConnectError("closed for today", Code.FailedPrecondition);
  });
  const value = { address: await listening(shut) };
  const grader = { name: "shut", kind: { case: "remote", value } } as const;
  await client.jobs.create(reinforced(grader), { jobId: "tsv-shut" });
  const failed = await thrown(JobFailed, client.jobs.wait("tsv-shut", LIMIT));
  shut.close();
  assert.deepEqual([failed.state, failed.reason], ["FAILED", Reason.REWARD_FAILED]);
  const said = `grader shut: reward service ${value.address}: it refused the batch with FAILED_PRECONDITION`;
  assert.ok(failed.message.includes(`${said}: closed for today`), failed.message);
});
