/**
 * Evaluations, aliases, graders and webhooks, with the services and workers of services.test.ts: a tuned model is put
 * beside its base, and what was found lets it take over a role.
 */

import assert from "node:assert/strict";
import { after, before, test } from "node:test";
import { Split } from "#dist/gen/luthier/v1/dataset_pb.js";
import {
  Correctness,
  Evaluation_State,
  EvaluationMetric,
  FinishReason,
  Verdict,
} from "#dist/gen/luthier/v1/evaluation_pb.js";
import type { GenerateTextResponse } from "#dist/gen/luthier/v1/evaluation_service_pb.js";
import { StringCheckGrader_Operation } from "#dist/gen/luthier/v1/grader_pb.js";
import { EvaluationVerdict_Outcome } from "#dist/gen/luthier/v1/verdict_pb.js";
import { type WebhookDelivery, WebhookDelivery_State } from "#dist/gen/luthier/v1/webhook_pb.js";
import {
  Aborted,
  AlreadyExists,
  type Client,
  connect,
  EvaluationFailed,
  errorOf,
  FailedPrecondition,
  InvalidArgument,
  NotFound,
  Reason,
  readConfig,
} from "#dist/node.js";
import { all, thrown } from "../test/scripted.js";
import { CuttingProxy } from "./cutting-proxy.js";
import { chats, colour, job, LIMIT, rendered, version } from "./preparing.js";
import { Receiver } from "./receiver.js";

const TUNED = "projects/default/models/tse-tuned";
const RECORDS = 12;
const OUTPUT = "{{sample.output_text}}";
const client: Client = connect();
const config = readConfig();
let receiver: Receiver;
let asked = "";
let rendering = "";

before(async () => {
  receiver = await Receiver.start();
  asked = await version(client, "tse-things", [
    [Split.TEST, chats(RECORDS, 100)],
    [Split.TRAIN, chats(48)],
  ]);
  const webhooks = ["ok", "gone"].map((path) => ({ url: `${receiver.origin}/${path}` }));
  rendering = await rendered(client, asked);
  const wanted = job(rendering, 40, { tunedModelId: "tse-tuned", webhooks });
  await client.jobs.create(wanted, { jobId: "tse-job" });
  assert.deepEqual(await all(client.jobs.deliveries("tse-job")), []);
  await client.jobs.wait("tse-job", LIMIT);
});
after(async () => {
  client.close();
  await receiver.close();
});

/** Deliveries, once none of them is to be tried again. */
async function settled(deliveries: () => AsyncIterable<WebhookDelivery>): Promise<WebhookDelivery[]> {
  for (let left = 300; left > 0; left -= 1) {
    const found = await all(deliveries());
    if (found.length > 0 && found.every((one) => one.state !== WebhookDelivery_State.PENDING)) {
      return found;
    }
    await new Promise((resolve) => setTimeout(resolve, 100));
  }
  throw new Error("deliveries do not end");
}

test("webhooks are told of a job's end, and its deliveries say what became of that", async () => {
  const found = await settled(() => client.jobs.deliveries("tse-job", { pageSize: 1 }));
  assert.deepEqual(
    found.map((one) => [one.url, one.state, one.numAttempts, one.lastStatusCode, one.eventType]),
    [
      [`${receiver.origin}/ok`, WebhookDelivery_State.DELIVERED, 1, 204, "fine_tuning_job.succeeded"],
      [`${receiver.origin}/gone`, WebhookDelivery_State.GIVEN_UP, 1, 410, "fine_tuning_job.succeeded"],
    ],
  );
  const told = receiver.told.find((one) => one.path === "/ok");
  assert.equal(told?.headers["webhook-id"], found[0]?.deliveryId);
  assert.equal(JSON.parse(told?.body ?? "").data.name, "projects/default/fineTuningJobs/tse-job");
  const webhooks = [{ url: "https://elsewhere.example/" }];
  const elsewhere = await thrown(InvalidArgument, client.jobs.create(job(rendering, 1, { webhooks })));
  assert.deepEqual(
    elsewhere.violations.map((one) => [one.field, one.reason]),
    [["fine_tuning_job.webhooks[0].url", Reason.ADDRESS_NOT_ALLOWED]],
  );
});

test("an evaluation is watched over cut connections, its rows are read, and its verdict stands", async () => {
  await using proxy = await CuttingProxy.to(config.evaluationAddress, () => "pass");
  using shaky = connect({ evaluationAddress: proxy.address, retry: { initialSeconds: 0.01 } });
  const created = await shaky.evaluations.create(
    {
      datasetVersion: `tse-things/${asked.split("/").at(-1)}`,
      arms: [
        { armId: "base", model: "tiny" },
        { armId: "shots", model: "tiny", numShots: 2 },
        { armId: "tuned", model: "tse-tuned" },
      ],
      metrics: [EvaluationMetric.PERPLEXITY, EvaluationMetric.EXACT_MATCH],
      graders: [
        { name: "short", kind: { case: "regex", value: { input: OUTPUT, pattern: "^[a-z]{1,8}$" } } },
      ],
      primaryScore: "perplexity",
      maxNewTokens: 12,
      webhooks: [{ url: `${receiver.origin}/ok` }],
    },
    { evaluationId: "tse-evaluation" },
  );
  assert.equal(created.datasetVersion, asked);
  const seen: bigint[] = [];
  const states: string[] = [];
  for await (const event of shaky.evaluations.watch(created.name)) {
    seen.push(event.sequence);
    states.push(...(event.payload.case === "stateChange" ? [event.payload.value.state] : []));
    proxy.cutAll();
  }
  assert.ok(proxy.numCut > 1, `${proxy.numCut} cuts`);
  assert.deepEqual(
    seen,
    seen.map((_, place) => BigInt(place + 1)),
  );
  assert.equal(states.at(-1), "SUCCEEDED");
  const rest = client.evaluations.watch("tse-evaluation", { startSequence: 3, uid: created.uid });
  assert.deepEqual(
    (await all(rest)).map((event) => event.sequence),
    seen.slice(2),
  );

  const done = await client.evaluations.wait("tse-evaluation", LIMIT);
  assert.equal(Number(done.numRecords), RECORDS);
  assert.equal(done.verdict?.outcome, EvaluationVerdict_Outcome.FINE_TUNE_WINS);
  assert.equal(done.verdict?.candidateArmId, "tuned");
  assert.match(done.verdict?.sentence ?? "", /perplexity/);
  const decided = done.comparisons.find((one) => one.primary && one.baselineArmId === "base");
  assert.deepEqual([decided?.candidateArmId, decided?.verdict], ["tuned", Verdict.BETTER]);
  assert.deepEqual(
    done.graderResults.map((one) => [one.name, Number(one.numGraded), Number(one.numErrors)]),
    [["short", 3 * RECORDS, 0]],
  );
  const found = await settled(() => client.evaluations.deliveries("tse-evaluation"));
  assert.deepEqual(
    found.map((one) => [one.eventType, one.state]),
    [["evaluation.succeeded", WebhookDelivery_State.DELIVERED]],
  );
});

test("predictions have each record's answers, with scores and grades", async () => {
  const rows = await all(client.evaluations.predictions("tse-evaluation", { pageSize: 5 }));
  assert.deepEqual(
    rows.map((one) => Number(one.row)),
    Array.from({ length: RECORDS }, (_, place) => place),
  );
  for (const row of rows) {
    assert.deepEqual(
      row.answers.map((one) => one.armId),
      ["base", "shots", "tuned"],
    );
    const number = Number(/thing (\d+)/.exec(row.prompt.at(-1)?.content ?? "")?.[1]);
    assert.equal(row.reference, colour(number));
    for (const answer of row.answers) {
      const isRight = answer.text.trim() === row.reference;
      assert.equal(answer.scores.exact_match, Number(isRight));
      assert.equal(answer.correctness, isRight ? Correctness.RIGHT : Correctness.WRONG);
      assert.deepEqual(answer.grades.short?.outcome, {
        case: "score",
        value: Number(/^[a-z]{1,8}$/.test(answer.text)),
      });
    }
  }
});

test("evaluations that cannot be are refused with the field that is wrong, and why", async () => {
  const arms = [{ armId: "base", model: "tiny" }];
  const primary = { datasetVersion: asked, arms, primaryScore: "field_match.record" };
  const unmeasured = await thrown(InvalidArgument, client.evaluations.create(primary));
  assert.deepEqual(
    unmeasured.violations.map((one) => [one.field, one.reason]),
    [["evaluation.primary_score", Reason.METRIC_NOT_MEASURED]],
  );
  const missing = await thrown(
    NotFound,
    client.evaluations.create({ datasetVersion: "tse-things/nothing", arms }),
  );
  assert.equal(missing.reason, Reason.RESOURCE_NOT_FOUND);
  const again = client.evaluations.create(
    { datasetVersion: asked, arms },
    { evaluationId: "tse-evaluation" },
  );
  assert.equal((await thrown(AlreadyExists, again)).reason, Reason.RESOURCE_EXISTS);
  const stranger = client.evaluations.watch("tse-evaluation", {
    uid: "00000000-0000-4000-8000-000000000000",
  });
  assert.equal((await thrown(NotFound, stranger)).reason, Reason.RESOURCE_REPLACED);
});

test("an evaluation that fails says why, and one that is cancelled that it was", async () => {
  const arms = Array.from({ length: 8 }, (_, place) => ({ armId: `arm-${place}`, model: "tiny" }));
  const unsuited = await client.evaluations.create({
    datasetVersion: asked,
    arms: arms.slice(0, 1),
    metrics: [EvaluationMetric.MULTIPLE_CHOICE],
    choices: ["purple", "pink"],
  });
  const failed = await thrown(EvaluationFailed, client.evaluations.wait(unsuited.name, LIMIT));
  assert.deepEqual([failed.state, failed.reason], ["FAILED", Reason.INVALID_RECORDS]);
  assert.match(failed.message, /tse-things-TEST\.jsonl/);
  assert.equal(failed.resource.uid, unsuited.uid);

  const long = await client.evaluations.create({ datasetVersion: asked, arms, maxNewTokens: 400 });
  for await (const event of client.evaluations.watch(long.name)) {
    if (event.payload.case === "stateChange" && event.payload.value.state === "RUNNING") {
      break;
    }
  }
  const stale = client.evaluations.cancel(long.name, { etag: "stale" });
  const { reason, metadata } = await thrown(Aborted, stale);
  assert.deepEqual([reason, metadata.name], [Reason.ETAG_MISMATCH, long.name]);
  await client.evaluations.cancel(long.name);
  const cancelled = await thrown(EvaluationFailed, client.evaluations.wait(long.name, LIMIT));
  assert.deepEqual([cancelled.state, cancelled.reason], ["CANCELLED", Reason.CANCELLED_BY_USER]);
  assert.equal((await client.evaluations.cancel(long.name)).etag, cancelled.resource.etag);

  await client.evaluations.delete(long.name);
  const uids = async (showDeleted: boolean): Promise<string[]> =>
    (await all(client.evaluations.list({ showDeleted, pageSize: 2 }))).map((one) => one.uid);
  assert.deepEqual(
    [(await uids(false)).includes(long.uid), (await uids(true)).includes(long.uid)],
    [false, true],
  );
  assert.equal((await client.evaluations.undelete(long.name, { uid: long.uid })).uid, long.uid);
  await client.evaluations.delete(long.name);
  await client.evaluations.purge(long.name);
  assert.equal((await thrown(NotFound, client.evaluations.get(long.name))).reason, Reason.RESOURCE_NOT_FOUND);
});

test("a model answers while an evaluation asks it, and neither harms the other", async () => {
  const ask = (): AsyncIterable<GenerateTextResponse> =>
    client.generate("tiny", [{ role: "user", content: "colour of thing 100?" }], { maxNewTokens: 24 });
  const alone = await all(ask());
  const arms = Array.from({ length: 4 }, (_, place) => ({ armId: `arm-${place}`, model: "tiny" }));
  const { name } = await client.evaluations.create({ datasetVersion: asked, arms, maxNewTokens: 300 });
  let beside: GenerateTextResponse[] = [];
  for await (const { payload } of client.evaluations.watch(name)) {
    if (payload.case === "progress" && payload.value.completed > 0) {
      beside = await all(ask());
      break;
    }
  }
  assert.equal((await client.evaluations.get(name)).state, Evaluation_State.RUNNING, "it answered meanwhile");
  const text = (pieces: readonly GenerateTextResponse[]): string => pieces.map((one) => one.text).join("");
  assert.equal(text(beside), text(alone));
  assert.notEqual(beside.at(-1)?.finishReason, FinishReason.UNSPECIFIED);
  const { numRecords, armResults } = await client.evaluations.wait(name, LIMIT);
  assert.equal(Number(numRecords), RECORDS);
  assert.deepEqual(
    armResults.map((one) => one.armId),
    arms.map((one) => one.armId),
  );
});

test("an alias moves through gates that are open, and remembers", async () => {
  const done = await client.evaluations.get("tse-evaluation");
  const scores = done.armResults.find((one) => one.armId === "tuned")?.scores;
  const perplexity = scores?.find((one) => one.score === "perplexity")?.value ?? Number.NaN;
  const most = (value: number): object => ({
    gated: { case: "score", value: { score: "perplexity", threshold: { case: "most", value } } },
  });
  const wins = {
    gated: { case: "verdict", value: { outcomes: [EvaluationVerdict_Outcome.FINE_TUNE_WINS] } },
  } as const;
  await client.aliases.create({ gates: [most(perplexity / 2), wins] }, { modelAliasId: "tse-strict" });
  const move = client.aliases.move("tse-strict", "tse-tuned", { evaluation: "tse-evaluation" });
  const blocked = await thrown(FailedPrecondition, move);
  assert.equal(blocked.reason, Reason.ALIAS_BLOCKED);
  const { request_id, ...metadata } = blocked.metadata;
  assert.match(request_id ?? "", /\S/);
  assert.deepEqual(metadata, {
    model_alias: "projects/default/modelAliases/tse-strict",
    model: TUNED,
    evaluation: done.name,
  });
  assert.match(blocked.message, /1 of 2 gates are shut/);
  const unnamed = await thrown(InvalidArgument, client.aliases.move("tse-strict", "tse-tuned"));
  assert.equal(unnamed.violations[0]?.field, "evaluation");
  assert.equal((await client.aliases.get("tse-strict")).current, undefined);

  await client.aliases.create({ gates: [most(perplexity * 2), wins] }, { modelAliasId: "tse-production" });
  const moved = await client.aliases.move("tse-production", "tse-tuned", { evaluation: "tse-evaluation" });
  assert.deepEqual(
    moved.current?.gates.map((one) => one.open),
    [true, true],
  );
  await client.aliases.create({}, { modelAliasId: "tse-free" });
  const first = await client.aliases.move("@tse-free", "tiny");
  await client.aliases.move("tse-free", "tse-tuned");
  const late = await thrown(Aborted, client.aliases.move("tse-free", "tiny", { etag: first.etag }));
  assert.equal(late.reason, Reason.ETAG_MISMATCH);
  assert.deepEqual(
    (await all(client.aliases.moves("tse-free", { pageSize: 1 }))).map((one) => [
      Number(one.number),
      one.model,
    ]),
    [
      [1, "projects/default/models/tiny"],
      [2, TUNED],
    ],
  );
});

test("an alias is asked as its model is, keeps it, and goes", async () => {
  const answer = async (model: string): Promise<string> => {
    const turns = [{ role: "user", content: "colour of thing 100?" }];
    const pieces = await all(client.generate(model, turns, { maxNewTokens: 8 }));
    return pieces.map((piece) => piece.text).join("");
  };
  assert.equal(await answer("@tse-production"), await answer("tse-tuned"));
  const needed = await thrown(FailedPrecondition, client.models.delete("tse-tuned"));
  assert.equal(needed.reason, Reason.RESOURCE_IN_USE);
  assert.match(needed.metadata.holder ?? "", /modelAliases\/tse-/);
  const names = (await all(client.aliases.list({ pageSize: 2 }))).map((one) => one.name);
  for (const id of ["tse-strict", "tse-production", "tse-free"]) {
    assert.ok(names.includes(`projects/default/modelAliases/${id}`), names.join());
    await client.aliases.delete(id);
  }
  assert.equal((await thrown(NotFound, client.aliases.get("tse-free"))).reason, Reason.RESOURCE_NOT_FOUND);
});

test("graders are tried on samples, and what cannot be graded is an error of its own", async () => {
  const graders = {
    same: {
      kind: {
        case: "stringCheck",
        value: { input: OUTPUT, reference: "{{item.colour}}", operation: StringCheckGrader_Operation.EQ },
      },
    },
    short: { kind: { case: "regex", value: { input: OUTPUT, pattern: "^.{1,5}$" } } },
  } as const;
  const grader = {
    name: "both",
    kind: { case: "multi", value: { graders, calculateOutput: "0.75 * same + 0.25 * short" } },
  } as const;
  const samples = Array.from({ length: 300 }, (_, number) => ({
    itemJson: number === 299 ? "{}" : JSON.stringify({ colour: colour(number) }),
    outputText: number % 2 === 0 ? colour(number) : "something else",
  }));
  const grades = await all(client.evaluations.grade(grader, samples));
  assert.deepEqual(
    grades.slice(0, 299).map((one) => one.outcome),
    samples.slice(0, 299).map((_, number) => ({ case: "score", value: number % 2 === 0 ? 1 : 0 })),
  );
  assert.deepEqual(grades[0]?.partScores, { same: 1, short: 1 });
  const last = grades[299]?.outcome;
  const error = last?.case === "error" ? errorOf(last.value) : undefined;
  assert.ok(error instanceof InvalidArgument, String(error));
  assert.equal(error.reason, Reason.TEMPLATE_FIELD_MISSING);

  const broken = { name: "g", kind: { case: "regex", value: { input: OUTPUT, pattern: "(" } } } as const;
  const refused = await thrown(InvalidArgument, client.evaluations.grade(broken, samples));
  assert.equal(refused.violations[0]?.field, "grader.regex.pattern");
  const far = { kind: { case: "remote", value: { address: "rewards.example.com:443" } } } as const;
  const elsewhere = await thrown(InvalidArgument, client.evaluations.grade(far, samples));
  assert.equal(elsewhere.violations[0]?.reason, Reason.ADDRESS_NOT_ALLOWED);
});

test("texts are scored by a base, a tuned model and a checkpoint", async () => {
  const context = "<|im_start|>user\ncolour of thing 1?<|im_end|>\n<|im_start|>assistant\n";
  const texts = ["green", "grass"].map((continuation) => ({ context, continuation }));
  const checkpoint = (await all(client.jobs.checkpoints("tse-job"))).at(-1);
  const found = new Map<string, number[]>();
  for (const model of ["tiny", "tse-tuned", checkpoint?.name ?? ""]) {
    const { scores } = await client.evaluations.scoreTexts(model, texts);
    assert.ok(scores.every((one) => one.numTokens > 0 && one.logProbability < 0));
    found.set(
      model,
      scores.map((one) => one.logProbability),
    );
  }
  const [green = Number.NaN, grass = Number.NaN] = found.get("tse-tuned") ?? [];
  assert.ok(green > grass, `${green} and ${grass}`);
  assert.ok(green > (found.get("tiny")?.[0] ?? Number.NaN) + 1);
  assert.deepEqual(found.get(checkpoint?.name ?? ""), found.get("tse-tuned"));
  const many = Array.from({ length: 65 }, () => ({ continuation: "a" }));
  const refused = await thrown(InvalidArgument, client.evaluations.scoreTexts("tiny", many));
  assert.equal(refused.violations[0]?.field, "texts");
  const missing = await thrown(NotFound, client.evaluations.scoreTexts("nobody", texts));
  assert.equal(missing.reason, Reason.RESOURCE_NOT_FOUND);
});
