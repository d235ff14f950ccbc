/** Jobs of each kind, how they end, and their checkpoints, with the services and workers of services.test.ts. */

import assert from "node:assert/strict";
import { createHash } from "node:crypto";
import { mkdtemp, readdir, readFile, rm } from "node:fs/promises";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { after, before, test } from "node:test";
import { BasePrecision } from "#dist/gen/luthier/v1/base_precision_pb.js";
import { Split } from "#dist/gen/luthier/v1/dataset_pb.js";
import { TemplateSource } from "#dist/gen/luthier/v1/evaluation_pb.js";
import { FineTuningJob_State, PreferenceConfig_Loss } from "#dist/gen/luthier/v1/fine_tuning_job_pb.js";
import { LengthPolicy, RenderingKind } from "#dist/gen/luthier/v1/rendering_pb.js";
import {
  Aborted,
  AlreadyExists,
  type Client,
  connect,
  download,
  FailedPrecondition,
  InvalidArgument,
  JobFailed,
  NotFound,
  Reason,
  RenderingFailed,
} from "#dist/node.js";
import { all, thrown } from "../test/scripted.js";
import { chats, job, LIMIT, labelled, pairs, question, rendered, version } from "./preparing.js";

const CHECKPOINTS = "projects/default/fineTuningJobs/tsj-first/checkpoints";
const client: Client = connect();
let folder = "";
let things = "";
let rendering = "";

before(async () => {
  folder = await mkdtemp(join(tmpdir(), "luthier-jobs-"));
  things = await version(client, "tsj-things", [[Split.TRAIN, chats(48)]]);
  rendering = await rendered(client, things);
});
after(async () => {
  client.close();
  await rm(folder, { recursive: true });
});

test("a job does what its plan says, and each of its checkpoints is kept", async () => {
  const wanted = job(rendering, 20, { checkpointIntervalSteps: 10n, tunedModelId: "tsj-tuned" });
  const plan = await client.jobs.plan(wanted);
  assert.equal(Number(plan.numSteps), 20);
  assert.ok(plan.memory, "the base model's sizes are known");
  await client.jobs.create(wanted, { jobId: "tsj-first" });
  const done = await client.jobs.wait("tsj-first", LIMIT);
  assert.equal(done.progress?.completed, plan.numSteps);
  const points = await all(client.jobs.metrics("tsj-first", { pageSize: 7 }));
  assert.deepEqual(
    points.map((point) => Number(point.step)),
    Array.from({ length: 20 }, (_, place) => place + 1),
  );
  assert.ok((points.at(-1)?.values.train_loss ?? 9) < (points[0]?.values.train_loss ?? 0) * 0.9);
  const checkpoints = await all(client.jobs.checkpoints("tsj-first", { pageSize: 1 }));
  assert.deepEqual(
    checkpoints.map((one) => one.name),
    [`${CHECKPOINTS}/step-10`, `${CHECKPOINTS}/step-20`],
  );
  assert.equal((await client.jobs.getCheckpoint("tsj-first/step-10")).digest, checkpoints[0]?.digest);
  const missing = await thrown(NotFound, client.jobs.getCheckpoint("tsj-first/step-11"));
  assert.equal(missing.reason, Reason.RESOURCE_NOT_FOUND);
});

test("a checkpoint is downloaded with its digests, and nothing is written over", async () => {
  const directory = join(folder, "step-10");
  await download(client, "tsj-first/step-10", directory);
  const files = await all(client.models.files("tsj-first/step-10", { pageSize: 1 }));
  assert.deepEqual((await readdir(directory)).sort(), files.map((file) => file.path).sort());
  assert.ok(files.some((file) => file.path === "adapter_model.safetensors"));
  for (const file of files) {
    const bytes = await readFile(join(directory, file.path));
    assert.equal(createHash("sha256").update(bytes).digest("hex"), file.sha256);
  }
  await download(client, "tsj-first/step-10", directory);
  await thrown(AlreadyExists, download(client, "tsj-first/step-20", directory));
});

test("a checkpoint is asked, and is what another job begins from", async () => {
  const pieces = await all(client.generate("tsj-first/step-10", "Once", { maxNewTokens: 4 }));
  assert.ok((pieces.at(-1)?.numGeneratedTokens ?? 0) > 0);
  const { baseModel: _, ...wanted } = job(rendering, 2);
  await client.jobs.create({ ...wanted, startFrom: "tsj-first/step-10" }, { jobId: "tsj-again" });
  const done = await client.jobs.wait("tsj-again", LIMIT);
  const made = await client.models.get(done.tunedModel);
  assert.equal(made.startFrom, `${CHECKPOINTS}/step-10`);
  assert.equal(made.baseModel, "projects/default/models/tiny");
});

test("a job that is cancelled stops, and can be deleted and brought back", async () => {
  const { name, uid } = await client.jobs.create(job(rendering, 5000), { jobId: "tsj-long" });
  for await (const event of client.jobs.watch(name)) {
    if (event.payload.case === "metrics" && event.step >= 2n) {
      break;
    }
  }
  const running = await thrown(FailedPrecondition, client.jobs.delete(name));
  assert.equal(running.reason, Reason.WRONG_STATE);
  const stale = await thrown(Aborted, client.jobs.cancel(name, { etag: "stale" }));
  assert.deepEqual([stale.reason, stale.metadata.name], [Reason.ETAG_MISMATCH, name]);
  await client.jobs.cancel(name);
  const failed = await thrown(JobFailed, client.jobs.wait(name, LIMIT));
  assert.deepEqual([failed.state, failed.reason], ["CANCELLED", Reason.CANCELLED_BY_USER]);
  assert.equal(failed.resource.tunedModel, "");
  assert.equal((await client.jobs.cancel(name)).etag, failed.resource.etag);
  assert.equal((await thrown(FailedPrecondition, client.jobs.pause(name))).reason, Reason.WRONG_STATE);
  assert.equal((await thrown(FailedPrecondition, client.jobs.resume(name))).reason, Reason.WRONG_STATE);
  await client.jobs.delete(name);
  assert.equal((await thrown(NotFound, client.jobs.get(name))).reason, Reason.RESOURCE_NOT_FOUND);
  const deleted = await all(client.jobs.list({ showDeleted: true, pageSize: 2 }));
  assert.ok(deleted.find((one) => one.uid === uid)?.deleteTime);
  assert.equal((await client.jobs.undelete("tsj-long")).state, FineTuningJob_State.CANCELLED);
});

test("a job beside a base of 8 bits makes an adapter that is asked so", async () => {
  const wanted = job(rendering, 4, { basePrecision: BasePrecision.INT8, tunedModelId: "tsj-int8" });
  await client.jobs.create(wanted, { jobId: "tsj-int8" });
  await client.jobs.wait("tsj-int8", LIMIT);
  assert.equal((await client.models.get("tsj-int8")).basePrecision, BasePrecision.INT8);
  const pieces = await all(client.generate("tsj-int8", "Once", { maxNewTokens: 4 }));
  assert.ok((pieces.at(-1)?.numGeneratedTokens ?? 0) > 0);
});

test("pairs teach a preference, and rows of another kind are refused", async () => {
  const compared = await version(client, "tsj-pairs", [[Split.TRAIN, pairs(24)]]);
  const rows = await rendered(client, compared, RenderingKind.PREFERENCE);
  const method = { case: "preference", value: { loss: PreferenceConfig_Loss.DPO } } as const;
  await client.jobs.create(job(rows, 4, { method }), { jobId: "tsj-preference" });
  await client.jobs.wait("tsj-preference", LIMIT);
  const points = await all(client.jobs.metrics("tsj-preference"));
  assert.ok((points.at(-1)?.values.reward_margin ?? 0) > (points[0]?.values.reward_margin ?? 0));
  const mismatch = await thrown(FailedPrecondition, client.jobs.create(job(rendering, 4, { method })));
  assert.equal(mismatch.reason, Reason.RENDERING_KIND_MISMATCH);
});

test("answers that are labelled alone teach a preference as well", async () => {
  const judged = await version(client, "tsj-labelled", [[Split.TRAIN, labelled(24)]]);
  const rows = await rendered(client, judged, RenderingKind.UNPAIRED);
  const preferring = (loss: PreferenceConfig_Loss): Parameters<typeof client.jobs.create>[0] =>
    job(rows, 12, { method: { case: "preference", value: { loss } } });
  await client.jobs.create(preferring(PreferenceConfig_Loss.KTO), { jobId: "tsj-labelled" });
  await client.jobs.wait("tsj-labelled", LIMIT);
  const points = await all(client.jobs.metrics("tsj-labelled"));
  const [first = Number.NaN, last = Number.NaN] = [points[0], points.at(-1)].map(
    (point) => point?.values.reward_margin,
  );
  assert.ok(Math.abs(first) < 1e-3 && last > 0.005, `${first} and ${last}`);
  assert.ok("kl" in (points.at(-1)?.values ?? {}));
  const paired = client.jobs.create(preferring(PreferenceConfig_Loss.DPO));
  assert.equal((await thrown(FailedPrecondition, paired)).reason, Reason.RENDERING_KIND_MISMATCH);
});

test("a job mixes renderings by shares as its plan says, and keeps both", async () => {
  const general = await rendered(
    client,
    await version(client, "tsj-general", [[Split.TRAIN, chats(20, 500)]]),
  );
  const wanted = job(rendering, 20, { mixedRenderings: [{ rendering: general, share: 0.25 }] });
  const plan = await client.jobs.plan(wanted);
  assert.deepEqual(
    plan.renderings.map((one) => [one.rendering, one.share]),
    [
      [rendering, 0.75],
      [general, 0.25],
    ],
  );
  assert.ok(Math.abs((plan.renderings[1]?.reachedShare ?? 0) - 0.25) < 0.05);
  await client.jobs.create(wanted, { jobId: "tsj-mixed" });
  const needed = await thrown(FailedPrecondition, client.renderings.delete(general));
  assert.equal(needed.reason, Reason.RESOURCE_IN_USE);
  const done = await client.jobs.wait("tsj-mixed", LIMIT);
  assert.deepEqual(done.runRecord?.renderings, plan.renderings);
  const names = done.references.map((one) => one.name);
  assert.ok(names.includes(rendering) && names.includes(general), names.join());
  const points = await all(client.jobs.metrics("tsj-mixed"));
  const tokens = points.reduce((sum, point) => sum + (point.values.num_tokens ?? 0), 0);
  assert.equal(tokens, Number(plan.numTokens));
});

test("rewards teach, what was drawn is read, and rewards that are all alike are told", async () => {
  const prompts = await rendered(client, things, RenderingKind.PROMPT);
  const reinforced = (pattern: string): Parameters<typeof client.jobs.create>[0] => {
    const kind = { case: "regex", value: { input: "{{sample.output_text}}", pattern } } as const;
    const value = { grader: { name: "letters", kind }, numSamples: 6, maxNewTokens: 4 };
    const adaptation = { case: "full", value: {} } as const;
    return job(prompts, 3, { adaptation, method: { case: "reinforcement", value } });
  };
  await client.jobs.create(reinforced("^[a-z]"), { jobId: "tsj-rewarded" });
  await client.jobs.wait("tsj-rewarded", LIMIT);
  const drawn = await all(client.jobs.rollouts("tsj-rewarded", { pageSize: 20 }));
  assert.deepEqual([...new Set(drawn.map((one) => Number(one.step)))], [1, 2, 3]);
  const second = await all(client.jobs.rollouts("tsj-rewarded", { step: 2 }));
  assert.deepEqual(
    second,
    drawn.filter((one) => one.step === 2n),
  );
  for (const { outputText, outcome } of drawn) {
    assert.deepEqual(outcome, { case: "reward", value: Number(/^[a-z]/.test(outputText)) });
  }
  await client.jobs.create(reinforced("(?s).*"), { jobId: "tsj-constant" });
  const failed = await thrown(JobFailed, client.jobs.wait("tsj-constant", LIMIT));
  assert.deepEqual([failed.state, failed.reason], ["FAILED", Reason.NO_REWARD_SPREAD]);
  assert.equal(failed.metadata.num_steps, "3");
});

test("a model is asked with the template that it was taught with", async () => {
  const turn = "[{{ message['role'] }}] {{ message['content'] }}<|im_end|>";
  const asks = "{% if add_generation_prompt %}[assistant] {% endif %}";
  const chatTemplate = `{% for message in messages %}${turn}{% endfor %}${asks}`;
  const { name } = await client.renderings.create({ datasetVersion: things, model: "tiny", chatTemplate });
  await client.renderings.wait(name, LIMIT);
  await client.jobs.create(job(name, 2), { jobId: "tsj-taught" });
  const { tunedModel } = await client.jobs.wait("tsj-taught", LIMIT);
  const { taught } = await client.models.get(tunedModel);
  assert.equal(taught?.rendering, name);
  assert.ok(taught?.chatTemplate.endsWith(chatTemplate), taught?.chatTemplate);
  const [row] = await all(client.renderings.preview(name, { split: Split.TRAIN }));
  const asked = async (model: string): Promise<unknown[]> => {
    const pieces = await all(client.generate(model, question(Number(row?.line) - 1), { maxNewTokens: 2 }));
    return [pieces.at(-1)?.templateSource, pieces.at(-1)?.numPromptTokens];
  };
  const learnt = row?.tokens.findIndex((token) => token.supervised);
  assert.deepEqual(await asked(tunedModel), [TemplateSource.TAUGHT, learnt]);
  assert.equal((await asked("tiny"))[0], TemplateSource.BASE);
});

test("jobs and renderings that cannot be are refused with what is wrong", async () => {
  const rank = job(rendering, 1, { adaptation: { case: "lora", value: { rank: 0 } } });
  assert.deepEqual(
    (await thrown(InvalidArgument, client.jobs.create(rank))).violations.map((one) => [
      one.field,
      one.description,
    ]),
    [["fine_tuning_job.lora.rank", "must be in 1..512, got 0"]],
  );
  const shares = job(rendering, 1, {
    renderingShare: 0.5,
    mixedRenderings: [{ rendering: await rendered(client, things), share: 0.25 }],
  });
  const sum = await thrown(InvalidArgument, client.jobs.plan(shares));
  assert.equal(sum.reason, Reason.SHARES_DO_NOT_ADD_UP);
  const unknown = await thrown(
    NotFound,
    client.renderings.create({ datasetVersion: things, model: "missing" }),
  );
  assert.equal(unknown.reason, Reason.BASE_MODEL_MISSING);
  using other = connect({ project: "other" });
  const foreign = other.renderings.create({ datasetVersion: things, model: "tiny" });
  assert.equal((await thrown(InvalidArgument, foreign)).reason, Reason.CROSS_PROJECT_REFERENCE);
  const short = { datasetVersion: things, model: "tiny", maxTokens: 8, lengthPolicy: LengthPolicy.FAIL };
  const { name } = await client.renderings.create(short);
  const failed = await thrown(RenderingFailed, client.renderings.wait(name, LIMIT));
  assert.equal(failed.reason, Reason.SEQUENCE_TOO_LONG);
  assert.match(failed.message, /tsj-things-TRAIN\.jsonl:\d+/);
});
