/**
 * Would more data help? Tune on parts of the data, evaluate all of them together, and see what each doubling brings.
 *
 * Needs the package `apache-arrow`, as luthier-client/arrow does.
 */

import type { MessageInitShape } from "@bufbuild/protobuf";
import { readRecords } from "./arrow.js";
import type { Client } from "./client.js";
import {
  CURVE_LABEL,
  type CurveFit,
  type CurvePoints,
  counted,
  curvePoints,
  fitted,
  general,
  moreDataWords,
  RECORDS_LABEL,
} from "./curve-fit.js";
import type { VersionSource } from "./datasets.js";
import { AlreadyExists, InvalidArgument, NotFound } from "./errors.js";
import { owned } from "./flows.js";
import { type DatasetVersion, Split } from "./gen/luthier/v1/dataset_pb.js";
import { type Evaluation, EvaluationSchema } from "./gen/luthier/v1/evaluation_pb.js";
import { type FineTuningJob, FineTuningJobSchema } from "./gen/luthier/v1/fine_tuning_job_pb.js";
import type { Rendering } from "./gen/luthier/v1/rendering_pb.js";
import { FormatFiles, placeOf, type StoredRecord, sha256 } from "./record-parts.js";
import type { CallOptions } from "./scope.js";
import { bytesSource } from "./uploads.js";

export {
  type CurveFit,
  type CurvePoint,
  type CurvePoints,
  curvePoints,
  fitted,
  moreDataWords,
} from "./curve-fit.js";

/** The parts where none are said. */
export const SHARES: readonly number[] = [0.1, 0.3, 1];
/** Of a version of a curve: a digest of what it is made of. */
export const PART_LABEL = "learning-curve-part";
const MAX_SHARES = 8;

/** What a curve is called, and how it is made. */
export interface LearningCurveOptions extends CallOptions {
  /** Names what the curve is made of: the same call with the same id goes on where it was. */
  readonly curveId: string;
  /** Of the train records, those that each model learns from (default: `SHARES`). */
  readonly shares?: readonly number[];
  /** Called with what is being done. */
  readonly tell?: (line: string) => void;
}

/**
 * What came of it: the evaluation of all models, each model's point, and the line through them.
 *
 * Without `points` and `fit` fewer than two models have the primary score; `words` say so.
 */
export interface LearningCurve {
  readonly evaluation: Evaluation;
  readonly points?: CurvePoints;
  readonly fit?: CurveFit;
  readonly words: string;
}

/** A part of the data, and the rendering that its job learns from. */
interface Part {
  readonly partId: string;
  readonly numRecords: number;
  readonly rendering: string;
}

/**
 * Tune on parts of a rendering's records, evaluate all models on the same held-out records, and fit their scores.
 *
 * Each part is a dataset version of its own, of dataset `curveId`: the train records are put in an order by a hash of the
 * job's seed and the record, and a part is the first of them, so that a smaller one lies within a larger one; validation
 * records are the same in all. Rendering and job of a part are those given but for it: with a number of epochs a part makes
 * fewer steps. `evaluation` brings the arms besides, e.g. prompts; its version is the rendering's unless it says another,
 * its candidate the model of the largest part unless it says another.
 *
 * What exists by the ids that are made of `curveId` is taken as it is, so that the call can be made again after a break,
 * also by the Python client. Memory: the records of the part that is being made, and 100 bytes or so for each of all.
 *
 * Throws InvalidArgument for shares, or what a curve cannot be made of; AlreadyExists where `curveId` names what is none of
 * the curve's, or a version of other records; JobFailed, EvaluationFailed, RenderingFailed, VersionFailed of one of the
 * parts; Unimplemented where the transport cannot stream to a service.
 */
export async function learningCurve(
  client: Client,
  job: MessageInitShape<typeof FineTuningJobSchema>,
  evaluation: MessageInitShape<typeof EvaluationSchema>,
  options: LearningCurveOptions,
): Promise<LearningCurve> {
  return new Making(client, owned(FineTuningJobSchema, job), options).curve(
    owned(EvaluationSchema, evaluation),
  );
}

/** What came of an evaluation that has ended; without points, that there is no curve. */
export function curveOf(evaluation: Evaluation, points: CurvePoints | undefined): LearningCurve {
  if (points === undefined) {
    const { name, primaryScore } = evaluation;
    const words = `No curve: fewer than two of its models have a score ${primaryScore} in ${name}.`;
    return { evaluation, words };
  }
  return { evaluation, points, fit: fitted(points), words: moreDataWords(evaluation, points) };
}

/** A curve that is being made. */
class Making {
  private readonly curveId: string;
  private readonly shares: readonly number[];
  private readonly seed: bigint;
  private readonly calls: CallOptions;
  private readonly tell: (line: string) => void;

  constructor(
    private readonly client: Client,
    private readonly job: FineTuningJob,
    { curveId, shares = SHARES, tell = () => undefined, ...calls }: LearningCurveOptions,
  ) {
    checkShares(shares);
    if (job.mixedRenderings.length > 0) {
      throw InvalidArgument.ofField(
        "job.mixed_renderings",
        "must be empty: of a mixture less data of one rendering is more of the others, not less to learn from",
      );
    }
    this.curveId = curveId;
    this.shares = [...new Set(shares)].sort((one, other) => one - other);
    this.seed = job.hyperparameters?.seed ?? 0n;
    this.calls = calls;
    this.tell = tell;
  }

  async curve(evaluation: Evaluation): Promise<LearningCurve> {
    const whole = await this.client.renderings.get(this.job.rendering, this.calls);
    const parts = await this.parts(whole);
    const begun: FineTuningJob[] = [];
    // All are queued before the first is waited for: several workers tune at a time.
    for (const part of parts) {
      begun.push(await this.begun(part));
    }
    const ended: FineTuningJob[] = [];
    for (const { name } of begun) {
      ended.push(await this.client.jobs.wait(name, this.calls));
    }
    const wanted = this.evaluation(evaluation, whole, parts, ended);
    this.tell(`evaluating ${wanted.arms.length} arms`);
    const { evaluations } = this.client;
    const made = await madeOnce(
      () => evaluations.create(wanted, { evaluationId: this.curveId, ...this.calls }),
      () => evaluations.get(this.curveId, this.calls),
    );
    this.requireOwn(made);
    const done = await evaluations.wait(made.name, this.calls);
    return curveOf(done, curvePoints(done, new Map(ended.map((one) => [one.tunedModel, one.labels]))));
  }

  private async parts(whole: Rendering): Promise<Part[]> {
    this.tell("reading the train split");
    const places: string[] = [];
    for await (const [place] of this.train(whole)) {
      places.push(place);
    }
    places.sort();
    const counts = this.shares.map((share) => halfEven(share * places.length));
    if ((counts[0] ?? 0) < 1 || new Set(counts).size < counts.length) {
      const sizes = `must be parts of different sizes of ${counted(places.length)} train records`;
      throw InvalidArgument.ofField("shares", `${sizes}, got ${shown(this.shares)}`);
    }
    const parts: Part[] = [];
    for (const [number, share] of this.shares.entries()) {
      parts.push(await this.part(whole, share, counts[number] ?? 0, places));
    }
    return parts;
  }

  /** The train split, each record with its place among all. */
  private async *train(whole: Rendering): AsyncGenerator<readonly [string, StoredRecord]> {
    for await (const records of this.records(whole.datasetVersion, Split.TRAIN)) {
      const places = await Promise.all(records.map(({ recordId }) => placeOf(this.seed, recordId)));
      for (const [number, record] of records.entries()) {
        yield [places[number] ?? "", record];
      }
    }
  }

  private async *records(version: string, split: Split): AsyncGenerator<StoredRecord[]> {
    for await (const batch of readRecords(this.client, version, { split, ...this.calls })) {
      const ids: unknown[] = [...(batch.getChild("record_id") ?? [])];
      const texts: unknown[] = [...(batch.getChild("record") ?? [])];
      yield ids.map((id, number) => ({ recordId: String(id), record: String(texts[number]) }));
    }
  }

  /** A part of the data, rendered; all of it is what was there before. */
  private async part(
    whole: Rendering,
    share: number,
    count: number,
    places: readonly string[],
  ): Promise<Part> {
    const partId = `p${general(100 * share, 6)}`.replace(".", "-");
    if (count === places.length) {
      return { partId, numRecords: count, rendering: whole.name };
    }
    this.tell(
      `making ${counted(count)} of ${counted(places.length)} train records a version and a rendering`,
    );
    const version = await this.version(whole, partId, count, places[count - 1] ?? "");
    const { renderings } = this.client;
    const { model, chatTemplate, maskMode, maxTokens, lengthPolicy, splitTurns, templateErrorPolicy, kind } =
      whole;
    const wanted = {
      ...{ model, chatTemplate, maskMode, maxTokens, lengthPolicy, splitTurns, templateErrorPolicy, kind },
      datasetVersion: version.name,
      labels: { [CURVE_LABEL]: this.curveId },
    };
    const renderingId = `${this.curveId}-${partId}`;
    const made = await madeOnce(
      () => renderings.create(wanted, { renderingId, ...this.calls }),
      () => renderings.get(renderingId, this.calls),
    );
    if (made.datasetVersion !== version.name) {
      throw this.taken(made.name, `is of ${made.datasetVersion}`);
    }
    const { name } = await renderings.wait(made.name, this.calls);
    return { partId, numRecords: count, rendering: name };
  }

  /** The version of a part, whose records' places are up to `last`; one that is there must be of these very records. */
  private async version(
    whole: Rendering,
    partId: string,
    count: number,
    last: string,
  ): Promise<DatasetVersion> {
    const { versions } = this.client.datasets;
    const origin = await versions.get(whole.datasetVersion, this.calls);
    const digest = await sha256(`${origin.uid}/${origin.digest}/${this.seed}/${count}`);
    const labels = { [CURVE_LABEL]: this.curveId, [PART_LABEL]: digest.slice(0, 32) };
    const found = await orNone(versions.get(`${this.curveId}/${partId}`, this.calls));
    if (found !== undefined && found.labels[PART_LABEL] !== labels[PART_LABEL]) {
      const records = `${counted(count)} records of ${whole.datasetVersion}`;
      throw this.taken(found.name, `is not ${records} as seed ${this.seed} chooses them`);
    }
    const made = found ?? (await this.uploaded(whole, partId, last, labels));
    return versions.wait(made.name, this.calls);
  }

  private async uploaded(
    whole: Rendering,
    partId: string,
    last: string,
    labels: Record<string, string>,
  ): Promise<DatasetVersion> {
    const { datasets } = this.client;
    await madeOnce(
      () => datasets.create(this.curveId, { labels: { [CURVE_LABEL]: this.curveId } }, this.calls),
      () => datasets.get(this.curveId, this.calls),
    );
    const [train, held] = [new FormatFiles(), new FormatFiles()];
    for await (const [place, { record }] of this.train(whole)) {
      if (place <= last) {
        train.add(record);
      }
    }
    for await (const records of this.records(whole.datasetVersion, Split.VALIDATION)) {
      for (const { record } of records) {
        held.add(record);
      }
    }
    const sources: VersionSource[] = [];
    for (const [files, split, prefix] of [
      [train, Split.TRAIN, `train-${partId}`],
      [held, Split.VALIDATION, "validation"],
    ] as const) {
      for (const { format, formatName, bytes } of files.files()) {
        const source = bytesSource(`${prefix}-${formatName}.jsonl`, bytes);
        sources.push({ upload: (await datasets.upload(source, this.calls)).name, split, format });
      }
    }
    return datasets.createVersion(this.curveId, sources, { versionId: partId, labels }, this.calls);
  }

  /** The job that learns from a part. */
  private async begun({ partId, numRecords, rendering }: Part): Promise<FineTuningJob> {
    const jobId = `${this.curveId}-${partId}`;
    const wanted = owned(FineTuningJobSchema, this.job);
    wanted.rendering = rendering;
    wanted.tunedModelId = jobId;
    wanted.labels[CURVE_LABEL] = this.curveId;
    wanted.labels[RECORDS_LABEL] = String(numRecords);
    this.tell(`tuning on ${counted(numRecords)} records: ${jobId}`);
    const { jobs } = this.client;
    const made = await madeOnce(
      () => jobs.create(wanted, { jobId, ...this.calls }),
      () => jobs.get(jobId, this.calls),
    );
    this.requireOwn(made);
    return made;
  }

  private evaluation(
    given: Evaluation,
    whole: Rendering,
    parts: readonly Part[],
    ended: readonly FineTuningJob[],
  ): Evaluation {
    const arms = parts.map(({ partId }, number) => ({
      armId: partId,
      model: ended[number]?.tunedModel ?? "",
    }));
    const wanted = owned(EvaluationSchema, given);
    wanted.datasetVersion ||= whole.datasetVersion;
    wanted.arms.push(...owned(EvaluationSchema, { arms }).arms);
    wanted.candidateArmId ||= parts.at(-1)?.partId ?? "";
    wanted.labels[CURVE_LABEL] = this.curveId;
    return wanted;
  }

  private requireOwn({ name, labels }: FineTuningJob | Evaluation): void {
    if (labels[CURVE_LABEL] !== this.curveId) {
      throw this.taken(name, `is no part of the learning curve ${this.curveId}`);
    }
  }

  private taken(name: string, why: string): AlreadyExists {
    return new AlreadyExists(`${name} exists and ${why}; choose another curveId`, { metadata: { name } });
  }
}

function checkShares(shares: readonly number[]): void {
  const { size } = new Set(shares);
  if (size < 2 || size > MAX_SHARES || !shares.every((share) => share > 0 && share <= 1)) {
    const range = `must be 2 to ${MAX_SHARES} different shares above 0 and at most 1`;
    throw InvalidArgument.ofField("shares", `${range}, got ${shown(shares)}`);
  }
}

function shown(shares: readonly number[]): string {
  return shares.map((share) => general(share, 6)).join(", ");
}

/** The nearest integer; of two that are as near the even one, as Python rounds. */
function halfEven(value: number): number {
  const floor = Math.floor(value);
  return value - floor === 0.5 ? floor + (floor % 2) : Math.round(value);
}

/** Make a resource, or return it where an earlier call made it. */
async function madeOnce<T>(make: () => Promise<T>, get: () => Promise<T>): Promise<T> {
  try {
    return await make();
  } catch (error) {
    if (error instanceof AlreadyExists) {
      return get();
    }
    throw error;
  }
}

async function orNone<T>(finding: Promise<T>): Promise<T | undefined> {
  try {
    return await finding;
  } catch (error) {
    if (error instanceof NotFound) {
      return undefined;
    }
    throw error;
  }
}
