/**
 * What a score gains by more data: a line through scores and the logarithm of the number of records.
 *
 * Weighted least squares of the score on the binary logarithm of records, each score with the weight of its interval: what
 * the Python client computes, in the same words.
 */

import { create, type MessageInitShape } from "@bufbuild/protobuf";
import {
  type Comparison,
  ComparisonSchema,
  type Evaluation,
  ScoreDirection,
  type ScoreEstimate,
  ScoreKind,
  Verdict,
} from "./gen/luthier/v1/evaluation_pb.js";

/** Of a job: the curve that it is a point of. Of an evaluation: the curve that it measures. */
export const CURVE_LABEL = "learning-curve";
/** Of a job: how many records it learns from. */
export const RECORDS_LABEL = "learning-curve-records";
const RUNS_WORDS =
  "All intervals are of the records asked: how much another run would change is not in them.";
const QUANTILE = 1.959963984540054;
const DIGITS = 4;
/** Numbers below ten to the power of this are written with an exponent. */
const LEAST_POWER = -4;

/** A model that learnt from part of the data: its arm, from how many records, and how it scored. */
export interface CurvePoint {
  readonly armId: string;
  readonly numRecords: number;
  readonly estimate: ScoreEstimate;
}

/**
 * What each doubling of the data has brought, with its 95 % interval, and the score at one record.
 *
 * The interval is wider where the scores lie farther from the line than their own intervals explain.
 */
export interface CurveFit {
  readonly atOne: number;
  readonly perDoubling: number;
  readonly lower: number;
  readonly upper: number;
}

/** Two points or more, by records. */
export type CurvePoints = readonly [CurvePoint, CurvePoint, ...CurvePoint[]];

/**
 * The points of an evaluation's curve, by records; `labels` are those of the jobs that made the models, by the models' names.
 *
 * Undefined where fewer than two of its arms are points of one curve.
 */
export function curvePoints(
  evaluation: Evaluation,
  labels: ReadonlyMap<string, Readonly<Record<string, string>>>,
): CurvePoints | undefined {
  const results = new Map(evaluation.armResults.map((one) => [one.armId, one.scores]));
  const found: CurvePoint[] = [];
  for (const { armId, model } of evaluation.arms) {
    const records = labels.get(model)?.[RECORDS_LABEL] ?? "";
    const estimate = results.get(armId)?.find((entry) => entry.score === evaluation.primaryScore);
    if (/^\d+$/.test(records) && estimate !== undefined) {
      found.push({ armId, numRecords: Number(records), estimate });
    }
  }
  found.sort((one, other) => one.numRecords - other.numRecords);
  const [first, second, ...others] = found;
  const isCurve = new Set(found.map((point) => point.numRecords)).size > 1;
  return first !== undefined && second !== undefined && isCurve ? [first, second, ...others] : undefined;
}

/** The line through points of different numbers of records. */
export function fitted(points: CurvePoints): CurveFit {
  const errors = points.map(({ estimate }) => (estimate.upper - estimate.lower) / (2 * QUANTILE));
  // One score without a spread would hold the line alone.
  const isWeighted = Math.min(...errors) > 0;
  const all = points.map(({ numRecords, estimate }, place) => {
    const error = errors[place] ?? 0;
    return { x: Math.log2(numRecords), y: estimate.value, error, weight: isWeighted ? error ** -2 : 1 };
  });
  const total = sum(all.map(({ weight }) => weight));
  const place = sum(all.map(({ weight, x }) => weight * x)) / total;
  const score = sum(all.map(({ weight, y }) => weight * y)) / total;
  const spread = sum(all.map(({ weight, x }) => weight * (x - place) ** 2));
  const slope = sum(all.map(({ weight, x, y }) => weight * (x - place) * (y - score))) / spread;
  const left = sum(all.map(({ weight, x, y }) => weight * (y - score - slope * (x - place)) ** 2));
  const scatter = all.length > 2 ? left / (all.length - 2) : 0;
  const own = sum(all.map(({ error, x }) => error ** 2 * (x - place) ** 2)) / spread ** 2;
  const variance = isWeighted ? Math.max(1, scatter) / spread : Math.max(own, scatter / spread);
  const half = QUANTILE * Math.sqrt(variance);
  return { atOne: score - slope * place, perDoubling: slope, lower: slope - half, upper: slope + half };
}

/**
 * Whether more data would help, in a few sentences with their numbers.
 *
 * The last step decides, by its paired comparison where the evaluation has it: what the first records have brought says
 * nothing of what others would.
 */
export function moreDataWords(evaluation: Evaluation, points: CurvePoints): string {
  const fit = fitted(points);
  const [before, last] = lastStep(points);
  const step = comparisonOf(evaluation, before, last);
  const { score } = last.estimate;
  const gained = changeWords(fit, isShare(last.estimate));
  const verdict = Verdict[step.verdict].replaceAll("_", " ").toLowerCase();
  return (
    `${stepWords(step, before, last)} From ${counted(before.numRecords)} to ${counted(last.numRecords)} records: ` +
    `${differenceWords(step)}, ${verdict}. Over all parts each doubling has changed ${score} by ${gained}. ${RUNS_WORDS}`
  );
}

/** A count as it is shown, e.g. `1,200`. */
export function counted(count: number): string {
  return count.toLocaleString("en-US");
}

/** A number as it is shown, e.g. `0.1235` of four digits and `1.5e+06` where it is far from one. */
export function general(value: number, digits: number): string {
  const [mantissa = "", exponent = "0"] = value.toExponential(digits - 1).split("e");
  const power = Number(exponent);
  if (power < LEAST_POWER || power >= digits) {
    const sign = power < 0 ? "-" : "+";
    return `${trimmed(mantissa)}e${sign}${String(Math.abs(power)).padStart(2, "0")}`;
  }
  return trimmed(value.toFixed(digits - 1 - power));
}

function trimmed(shown: string): string {
  return shown.includes(".") ? shown.replace(/\.?0+$/, "") : shown;
}

function sum(values: readonly number[]): number {
  return values.reduce((total, one) => total + one, 0);
}

function lastStep(points: CurvePoints): [CurvePoint, CurvePoint] {
  const [first, second] = points;
  return [points.at(-2) ?? first, points.at(-1) ?? second];
}

function stepWords(step: Comparison, before: CurvePoint, last: CurvePoint): string {
  const { score, value } = last.estimate;
  if (step.verdict === Verdict.WORSE) {
    return `More data made ${score} worse in the last step.`;
  }
  if (step.verdict !== Verdict.BETTER) {
    return "Whether more data would help is not seen in the last step.";
  }
  const doublings = Math.log2(last.numRecords / before.numRecords);
  const foretold = value + step.difference / doublings;
  const shown = isShare(last.estimate)
    ? `${(100 * Math.min(1, Math.max(0, foretold))).toFixed(1)} %`
    : general(foretold, DIGITS);
  const twice = counted(2 * last.numRecords);
  return `More data would help, if the last step goes on: at ${twice} records ${score} would be ${shown}.`;
}

function changeWords({ perDoubling, lower, upper }: CurveFit, share: boolean): string {
  const shown = (value: number): string => (share ? percentagePoints(value) : signed(general(value, DIGITS)));
  const unit = share ? " pp" : "";
  return lower === upper
    ? `${shown(perDoubling)}${unit}`
    : `${shown(perDoubling)}${unit} [${shown(lower)}, ${shown(upper)}]`;
}

function differenceWords({ difference, lower, upper, kind }: Comparison): string {
  const share = isShare({ kind });
  const bound = (value: number): string => (share ? percentagePoints(value) : general(value, DIGITS));
  const bounds = lower < upper ? ` [${bound(lower)}, ${bound(upper)}]` : "";
  return share
    ? `${percentagePoints(difference)} pp${bounds}`
    : `${signed(general(difference, DIGITS))}${bounds}`;
}

/** A difference of shares in percentage points. */
function percentagePoints(value: number): string {
  return signed((100 * value).toFixed(1));
}

function signed(shown: string): string {
  return shown.startsWith("-") ? shown : `+${shown}`;
}

function isShare({ kind }: Pick<ScoreEstimate, "kind">): boolean {
  return kind === ScoreKind.BINARY || kind === ScoreKind.FRACTION;
}

/** The comparison of the last point with the one before: the evaluation's, else by both intervals. */
function comparisonOf(evaluation: Evaluation, before: CurvePoint, last: CurvePoint): Comparison {
  const { score, kind, direction } = last.estimate;
  const pair = { candidateArmId: last.armId, baselineArmId: before.armId };
  const made = evaluation.comparisons.find(
    (one) =>
      one.score === score &&
      one.candidateArmId === pair.candidateArmId &&
      one.baselineArmId === pair.baselineArmId,
  );
  if (made !== undefined) {
    return made;
  }
  const difference = last.estimate.value - before.estimate.value;
  const sides = [before, last].map(({ estimate }) => (estimate.upper - estimate.lower) / 2);
  const isKnown = sides.every((side) => side > 0);
  const half = isKnown ? Math.hypot(...sides) : 0;
  const isWorse = difference > 0 === (direction === ScoreDirection.LOWER_IS_BETTER);
  const seen = isWorse ? Verdict.WORSE : Verdict.BETTER;
  const told: MessageInitShape<typeof ComparisonSchema> = {
    ...pair,
    score,
    kind,
    direction,
    difference,
    lower: difference - half,
    upper: difference + half,
    verdict: isKnown && Math.abs(difference) > half ? seen : Verdict.INCONCLUSIVE,
  };
  return create(ComparisonSchema, told);
}
