/** The line through scores of parts of the data, and what it says: as the Python client says it. */

import assert from "node:assert/strict";
import { test } from "node:test";
import { create } from "@bufbuild/protobuf";
import { type CurvePoints, counted, curvePoints, fitted, general, moreDataWords } from "#dist/curve-fit.js";
import {
  type Evaluation,
  EvaluationSchema,
  ScoreDirection,
  type ScoreEstimate,
  ScoreEstimateSchema,
  ScoreKind,
  Verdict,
} from "#dist/gen/luthier/v1/evaluation_pb.js";
import { curveOf } from "#dist/learning-curve.js";

const QUANTILE = 1.959963984540054;
const NOTHING = create(EvaluationSchema);
const HIGHER = { score: "exact_match", kind: ScoreKind.BINARY, direction: ScoreDirection.HIGHER_IS_BETTER };
const LOWER = { score: "perplexity", kind: ScoreKind.REAL, direction: ScoreDirection.LOWER_IS_BETTER };

function estimate(value: number, half: number, what: typeof HIGHER | typeof LOWER): ScoreEstimate {
  return create(ScoreEstimateSchema, { ...what, value, lower: value - half, upper: value + half });
}

function share(value: number, half = 0.05): ScoreEstimate {
  return estimate(value, half, HIGHER);
}

function loss(value: number, half: number): ScoreEstimate {
  return estimate(value, half, LOWER);
}

type Given = readonly [number, ScoreEstimate];

function points(...[first, second, ...others]: [Given, Given, ...Given[]]): CurvePoints {
  const point = ([numRecords, one]: Given) => ({ armId: `p${numRecords}`, numRecords, estimate: one });
  return [point(first), point(second), ...others.map(point)];
}

function near(found: number, wanted: number): void {
  assert.ok(Math.abs(found - wanted) < 1e-9, `${found} is not ${wanted}`);
}

test("the line is that of least squares, each score with the weight of its interval", () => {
  const straight = fitted(points([100, share(0.1, 0.1)], [200, share(0.3)], [400, share(0.5)]));
  near(straight.perDoubling, 0.2);
  near(straight.atOne, 0.1 - 0.2 * Math.log2(100));
  // Weights as 1, 4 and 4: their spread is four times the first one's.
  near(straight.upper - straight.perDoubling, 0.05);
  near(straight.perDoubling - straight.lower, 0.05);

  const pulled = fitted(points([1, share(0, 0.1)], [2, share(0.5, 0.05)], [4, share(0.5, 0.1)]));
  near(pulled.perDoubling, 0.25);
  near(pulled.atOne, 2.5 / 6 - 0.25);
});

test("scores that lie farther from a line than their intervals explain widen its interval", () => {
  const bent = fitted(points([1, share(0, 0.1)], [2, share(0.6, 0.1)], [4, share(0.6, 0.1)]));
  near(bent.perDoubling, 0.3);
  near(bent.upper - bent.perDoubling, QUANTILE * Math.sqrt(0.03));
});

test("a score without a spread does not hold the line alone", () => {
  const fit = fitted(points([8, share(0, 0.1)], [16, share(0.5, 0)], [32, share(1, 0.1)]));
  near(fit.perDoubling, 0.5);
  near(fit.upper - fit.perDoubling, 0.1 / Math.SQRT2);
});

test("the words say what the last step brought", () => {
  const cases: [CurvePoints, string][] = [
    [
      points([100, share(0.2)], [200, share(0.4)], [400, share(0.6)]),
      "More data would help, if the last step goes on: at 800 records exact_match would be 80.0 %. From 200 to " +
        "400 records: +20.0 pp [+12.9, +27.1], better. Over all parts each doubling has changed exact_match by " +
        "+20.0 pp [+16.5, +23.5]. All intervals are of the records asked: how much another run would change is not " +
        "in them.",
    ],
    [
      points([100, share(0.5)], [200, share(0.51)], [400, share(0.51)]),
      "Whether more data would help is not seen in the last step. From 200 to 400 records: +0.0 pp",
    ],
    [points([100, share(0.6)], [400, share(0.2)]), "More data made exact_match worse in the last step."],
    [
      points([100, loss(9, 0.1)], [400, loss(5, 0.1)]),
      "More data would help, if the last step goes on: at 800 records perplexity would be 3. From 100 to 400 " +
        "records: -4 [-4.141, -3.859], better.",
    ],
    [points([100, loss(5, 0.1)], [400, loss(9, 0.1)]), "More data made perplexity worse"],
    [
      points([100, loss(9, 0)], [400, loss(5, 0)]),
      "Whether more data would help is not seen in the last step. From 100 to 400 records: -4, inconclusive. Over " +
        "all parts each doubling has changed perplexity by -2. ",
    ],
    [
      points([1000, share(0.5, 0.01)], [2000, share(0.9, 0.01)]),
      "More data would help, if the last step goes on: at 4,000 records exact_match would be 100.0 %. ",
    ],
  ];
  for (const [given, begins] of cases) {
    assert.equal(moreDataWords(NOTHING, given).slice(0, begins.length), begins);
  }
});

function curve(): { evaluation: Evaluation; labels: Map<string, Record<string, string>> } {
  const counts = [300, 30, 100];
  const scores = [share(0.6), share(0.2), share(0.4)];
  const step = { candidateArmId: "p300", baselineArmId: "p100", ...HIGHER, verdict: Verdict.BETTER };
  const evaluation = create(EvaluationSchema, {
    name: "projects/p/evaluations/more",
    primaryScore: "exact_match",
    arms: [
      { armId: "zero", model: "base" },
      ...counts.map((one) => ({ armId: `p${one}`, model: `m${one}` })),
    ],
    armResults: counts.map((one, place) => ({ armId: `p${one}`, scores: scores.slice(place, place + 1) })),
    comparisons: [{ ...step, difference: 0.2, lower: 0.1, upper: 0.3 }],
  });
  const labels = new Map(counts.map((one) => [`m${one}`, { "learning-curve-records": String(one) }]));
  return { evaluation, labels };
}

test("points are the arms whose jobs say their records, in order of these", () => {
  const { evaluation, labels } = curve();
  const found = curvePoints(evaluation, labels);
  assert.ok(found);
  assert.deepEqual(
    found.map((one) => [one.armId, one.numRecords, one.estimate.value]),
    [
      ["p30", 30, 0.2],
      ["p100", 100, 0.4],
      ["p300", 300, 0.6],
    ],
  );
  assert.match(
    moreDataWords(evaluation, found),
    /From 100 to 300 records: \+20\.0 pp \[\+10\.0, \+30\.0\], better\./,
  );
  const [step] = evaluation.comparisons;
  assert.ok(step);
  step.verdict = Verdict.INCONCLUSIVE;
  assert.match(moreDataWords(evaluation, found), /^Whether more data would help is not seen/, "paired");
  labels.set("m30", { "learning-curve-records": "some" });
  labels.delete("m100");
  assert.equal(curvePoints(evaluation, labels), undefined);
});

test("an evaluation without points says so once its jobs are paid for", () => {
  const { evaluation, labels } = curve();
  evaluation.primaryScore = "bleu";
  assert.deepEqual(curveOf(evaluation, curvePoints(evaluation, labels)), {
    evaluation,
    words: "No curve: fewer than two of its models have a score bleu in projects/p/evaluations/more.",
  });
});

test("numbers are shown with four digits, and far from one with an exponent", () => {
  const shown = [0, 0.123456, 12.3456, 9999.6, 1234567, 0.00012, 0.000012, -3.9].map((one) =>
    general(one, 4),
  );
  assert.deepEqual(shown, ["0", "0.1235", "12.35", "1e+04", "1.235e+06", "0.00012", "1.2e-05", "-3.9"]);
  assert.equal(general(100 * 0.07, 6), "7");
  assert.equal(counted(1234567), "1,234,567");
});
