/** Generation and grading: what is sent, when it is tried again, how it is stopped. */

import assert from "node:assert/strict";
import { test } from "node:test";
import { create } from "@bufbuild/protobuf";
import { anyPack } from "@bufbuild/protobuf/wkt";
import type { HandlerContext } from "@connectrpc/connect";
import { ErrorInfoSchema } from "#dist/gen/google/rpc/error_details_pb.js";
import { FinishReason } from "#dist/gen/luthier/v1/evaluation_pb.js";
import type {
  CreateEvaluationRequest,
  GenerateTextRequest,
  GradeSamplesRequest,
  ScoreTextsRequest,
} from "#dist/gen/luthier/v1/evaluation_service_pb.js";
import { type Grader, type RewardModelGrader, SampleGradeSchema } from "#dist/gen/luthier/v1/grader_pb.js";
import { Cancelled, DataLoss, errorOf, InvalidArgument, Unavailable } from "#dist/index.js";
import { all, type ScriptedServices, Signal, stage, stopping, thrown } from "./scripted.js";

function keepRequests(services: ScriptedServices): GenerateTextRequest[] {
  const seen: GenerateTextRequest[] = [];
  services.answers.generateText = (request) => {
    seen.push(request);
    return [{ text: "a" }, { text: "b", finishReason: FinishReason.STOP }];
  };
  return seen;
}

test("generate sends a prompt or messages", async () => {
  await using at = await stage();
  const [seen, client] = [keepRequests(at.services), at.client];
  const pieces = await all(client.generate("m", "Once", { temperature: 0.5, seed: 3 }));
  assert.deepEqual(
    pieces.map((piece) => piece.text),
    ["a", "b"],
  );
  await all(client.generate("@production", [{ role: "user", content: "hello" }]));
  assert.equal(seen[0]?.model, "projects/default/models/m");
  assert.deepEqual(
    [seen[0]?.input, seen[0]?.temperature, seen[0]?.seed],
    [{ case: "prompt", value: "Once" }, 0.5, 3n],
  );
  assert.equal(seen[1]?.model, "projects/default/modelAliases/production");
  assert.equal(seen[1]?.input.case, "conversation");
});

test("generate takes a whole request, and what is said beside it wins", async () => {
  await using at = await stage();
  const seen = keepRequests(at.services);
  const wanted = { model: "m", input: { case: "prompt", value: "Once" }, topP: 0.5, seed: 3n } as const;
  await all(at.client.generate(wanted));
  await all(at.client.generate(wanted, "Twice", { seed: 4 }));
  assert.deepEqual(
    seen.map((one) => [one.input.value, one.topP, one.seed]),
    [
      ["Once", 0.5, 3n],
      ["Twice", 0.5, 4n],
    ],
  );
  assert.equal(wanted.model, "m");
});

test("texts to score are sent with those of a whole request before them", async () => {
  await using at = await stage();
  const seen: ScoreTextsRequest[] = [];
  at.services.answers.scoreTexts = (request) => {
    seen.push(request);
    return { scores: request.texts.map(() => ({ logProbability: -1.5 })) };
  };
  const { evaluations } = at.client;
  const told = await evaluations.scoreTexts("@production", [{ context: "Once", continuation: " upon" }]);
  assert.equal(told.scores[0]?.logProbability, -1.5);
  const wanted = { model: "m", texts: [{ continuation: "a" }] };
  await evaluations.scoreTexts(wanted, [{ continuation: "b", rolling: true }]);
  assert.deepEqual(
    seen.map((one) => [one.model, one.texts.map((text) => text.continuation)]),
    [
      ["projects/default/modelAliases/production", [" upon"]],
      ["projects/default/models/m", ["a", "b"]],
    ],
  );
  assert.equal(wanted.texts.length, 1);
});

test("generate is tried again only while nothing has come", async () => {
  await using at = await stage();
  const breaksAfter = [0, 1];
  at.services.answers.generateText = async function* () {
    for (let left = breaksAfter.shift() ?? 0; left > 0; left -= 1) {
      yield { text: "a" };
    }
    throw stopping();
  };
  const pieces = at.client.generate("m", "Once");
  assert.equal((await pieces.next()).value?.text, "a");
  await thrown(Unavailable, pieces);
  assert.equal(at.services.count("generateText"), 2);
});

function endless(services: ScriptedServices): Signal {
  const ended = new Signal();
  services.answers.generateText = async function* (_: unknown, context: HandlerContext) {
    context.signal.addEventListener("abort", () => ended.set());
    while (!context.signal.aborted) {
      yield { text: "a" };
      await new Promise((resolve) => setTimeout(resolve, 5));
    }
  };
  return ended;
}

test("leaving the loop stops the generation", async () => {
  await using at = await stage();
  const ended = endless(at.services);
  for await (const piece of at.client.generate("m", "Once")) {
    assert.equal(piece.text, "a");
    break;
  }
  await ended.promise;
});

test("closing the client ends running calls", async () => {
  await using at = await stage();
  const ended = endless(at.services);
  const pieces = at.client.generate("m", "Once");
  await pieces.next();
  at.client.close();
  await thrown(Cancelled, pieces);
  await ended.promise;
  await thrown(Cancelled, at.client.models.get("m"));
});

test("samples are graded in batches, each once over breaks", async () => {
  await using at = await stage();
  const sizes: number[] = [];
  at.services.answers.gradeSamples = async function* (request: GradeSamplesRequest) {
    sizes.push(request.samples.length);
    const grades = request.samples.slice(0, 100).map((sample) => {
      return { outcome: { case: "score", value: Number(sample.outputText) } };
    });
    yield { grades };
    if (request.samples.length > 100) {
      throw stopping();
    }
  };
  const samples = Array.from({ length: 300 }, (_, number) => ({ outputText: `${number}` }));
  const grades = await all(at.client.evaluations.grade({ name: "g" }, samples));
  assert.deepEqual(
    grades.map((grade) => grade.outcome.value),
    samples.map((_, number) => number),
  );
  assert.deepEqual(sizes, [256, 156, 56, 44]);
});

test("grades that do not come are told", async () => {
  await using at = await stage();
  at.services.answers.gradeSamples = () => [];
  const error = await thrown(DataLoss, at.client.evaluations.grade({ name: "g" }, [{ outputText: "a" }]));
  assert.match(error.message, /did not grade 1 of 1 samples/);
});

/** The model of a grader that asks a reward model. */
function judged(grader: Grader | undefined): string {
  return grader?.kind.case === "rewardModel" ? (grader.kind.value as RewardModelGrader).model : "";
}

test("an evaluation may call all that it names by short names", async () => {
  await using at = await stage();
  const seen: CreateEvaluationRequest[] = [];
  at.services.answers.createEvaluation = (request) => {
    seen.push(request);
    return {};
  };
  const values = { kind: { case: "rewardModel", value: { model: "w" } } } as const;
  const both = { kind: { case: "multi", value: { graders: { one: values } } } } as const;
  const wanted: Parameters<typeof at.client.evaluations.create>[0] = {
    datasetVersion: "d/v",
    rewardModel: "w",
    arms: [{ armId: "a", model: "m" }],
    judges: [
      { judgeId: "own", asked: { case: "model", value: "j/c" } },
      { judgeId: "theirs", asked: { case: "endpoint", value: { url: "http://127.0.0.1:1", model: "j" } } },
    ],
    graders: [values, both],
    drift: { datasetVersion: "general/1" },
  };
  const given = structuredClone(wanted);
  await at.client.evaluations.create(given);
  const sent = seen[0]?.evaluation;
  assert.equal(sent?.datasetVersion, "projects/default/datasets/d/versions/v");
  assert.equal(sent?.rewardModel, "projects/default/models/w");
  assert.equal(sent?.arms[0]?.model, "projects/default/models/m");
  assert.equal(sent?.drift?.datasetVersion, "projects/default/datasets/general/versions/1");
  assert.equal(sent?.judges[0]?.asked.value, "projects/default/fineTuningJobs/j/checkpoints/c");
  assert.equal(sent?.judges[1]?.asked.case, "endpoint");
  assert.equal(judged(sent?.graders[0]), "projects/default/models/w");
  const inner = sent?.graders[1]?.kind;
  assert.equal(
    judged(inner?.case === "multi" ? inner.value.graders.one : undefined),
    "projects/default/models/w",
  );
  assert.deepEqual(given, wanted);
  await at.client.evaluations.create({ datasetVersion: "d/v", drift: {} });
  assert.equal(seen[1]?.evaluation?.drift?.datasetVersion, "");
  assert.equal(seen[1]?.evaluation?.rewardModel, "");
});

test("a grader may call reward models by short names", async () => {
  await using at = await stage();
  const seen: GradeSamplesRequest[] = [];
  at.services.answers.gradeSamples = (request) => {
    seen.push(request);
    return [{ grades: [{ outcome: { case: "score", value: 1 } }] }];
  };
  const grader = { kind: { case: "rewardModel", value: { model: "w" } } } as const;
  await all(at.client.evaluations.grade(grader, [{ outputText: "a" }]));
  assert.equal(judged(seen[0]?.grader), "projects/default/models/w");
  assert.equal(grader.kind.value.model, "w");
});

test("an error within an answer is of the same classes as one that is thrown", () => {
  const info = { reason: "TEMPLATE_FIELD_MISSING", domain: "luthier", metadata: { field: "item.a" } };
  const value = {
    code: 3,
    message: "no field",
    details: [anyPack(ErrorInfoSchema, create(ErrorInfoSchema, info))],
  };
  const grade = create(SampleGradeSchema, { outcome: { case: "error", value } });
  assert.ok(grade.outcome.case === "error");
  const error = errorOf(grade.outcome.value);
  assert.ok(error instanceof InvalidArgument);
  assert.deepEqual([error.reason, error.message, error.metadata.field], [info.reason, "no field", "item.a"]);
});
