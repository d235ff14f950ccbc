/** Evaluations, graders tried on samples, and text from a model. */

import { create, type MessageInitShape, toBinary } from "@bufbuild/protobuf";
import type { ChangeOptions, DeletedOptions } from "./datasets.js";
import { DataLoss } from "./errors.js";
import { type WaitOptions, type WatchOptions, wait, watch } from "./events.js";
import { EvaluationFailed } from "./failures.js";
import {
  call,
  type ListDeletableOptions,
  type ListOptions,
  owned,
  pages,
  ResumedStream,
  waitOrThrow,
} from "./flows.js";
import { type ChatMessageSchema, ConversationSchema } from "./gen/luthier/v1/chat_pb.js";
import { type Evaluation, EvaluationSchema, type Prediction } from "./gen/luthier/v1/evaluation_pb.js";
import {
  EvaluationService,
  type GenerateTextRequest,
  GenerateTextRequestSchema,
  type GenerateTextResponse,
  ScoreTextsRequestSchema,
  type ScoreTextsResponse,
} from "./gen/luthier/v1/evaluation_service_pb.js";
import type { Event } from "./gen/luthier/v1/event_pb.js";
import {
  type Grader,
  GraderSchema,
  type Sample,
  type SampleGrade,
  SampleSchema,
} from "./gen/luthier/v1/grader_pb.js";
import { TextToScoreSchema } from "./gen/luthier/v1/text_score_pb.js";
import type { WebhookDelivery } from "./gen/luthier/v1/webhook_pb.js";
import { nameRewardModels } from "./graders.js";
import * as names from "./names.js";
import { isRetryable } from "./retry.js";
import type { CallOptions, Scope } from "./scope.js";

/** How to draw an answer. A temperature of 0 is greedy; other zeros mean the service's defaults. */
export interface GenerateOptions extends CallOptions {
  readonly maxNewTokens?: number;
  readonly temperature?: number;
  readonly topP?: number;
  readonly seed?: bigint | number;
}

/** A text that is continued as it is, or chat messages, which go through the model's chat template. */
export type Prompt = string | readonly MessageInitShape<typeof ChatMessageSchema>[];

const SAMPLES_A_CALL = 256;
const BYTES_A_CALL = 3 << 20;

const KIND = {
  watching: EvaluationService.method.watchEvaluation,
  reading: EvaluationService.method.getEvaluation,
  failed: EvaluationFailed,
} as const;

/** Evaluations. */
export class Evaluations {
  constructor(private readonly scope: Scope) {}

  /**
   * Start an evaluation. Follow it with `watch` or `wait`.
   *
   * `evaluation` names `datasetVersion` and the models of its `arms`, `judges` and `graders` (short names will do, also in
   * `rewardModel` and `drift`).
   */
  async create(
    evaluation: MessageInitShape<typeof EvaluationSchema>,
    { evaluationId = "", ...options }: CallOptions & { readonly evaluationId?: string } = {},
  ): Promise<Evaluation> {
    const request = {
      parent: names.project(this.scope.project),
      evaluation: this.resolved(evaluation),
      evaluationId,
    };
    return call(this.scope.of(options), EvaluationService.method.createEvaluation, request);
  }

  /** Read one evaluation. */
  async get(name: string, options: CallOptions = {}): Promise<Evaluation> {
    return call(this.scope.of(options), EvaluationService.method.getEvaluation, { name: this.name(name) });
  }

  /** Go through the evaluations of the project, newest first. */
  list({ signal, ...asked }: ListDeletableOptions = {}): AsyncGenerator<Evaluation, void, undefined> {
    const { listEvaluations } = EvaluationService.method;
    const request = { parent: names.project(this.scope.project), ...asked };
    return pages(this.scope.of({ signal }), listEvaluations, request, (page) => page.evaluations);
  }

  /** Ask an evaluation to stop. One that has ended is returned unchanged. */
  async cancel(name: string, { etag = "", ...options }: ChangeOptions = {}): Promise<Evaluation> {
    const request = { name: this.name(name), etag };
    return call(this.scope.of(options), EvaluationService.method.cancelEvaluation, request);
  }

  /** Delete an evaluation that has ended, with its predictions. */
  async delete(name: string, { etag = "", ...options }: ChangeOptions = {}): Promise<Evaluation> {
    const request = { name: this.name(name), etag };
    return call(this.scope.of(options), EvaluationService.method.deleteEvaluation, request);
  }

  /** Bring back an evaluation that was deleted, until it is purged; `uid`: which of several that had the name. */
  async undelete(
    name: string,
    { uid = "", etag = "", ...options }: DeletedOptions = {},
  ): Promise<Evaluation> {
    const request = { name: this.name(name), uid, etag };
    return call(this.scope.of(options), EvaluationService.method.undeleteEvaluation, request);
  }

  /** Purge an evaluation that was deleted, at once and for good; `uid` as in `undelete`. */
  async purge(name: string, { uid = "", etag = "", ...options }: DeletedOptions = {}): Promise<Evaluation> {
    const request = { name: this.name(name), uid, etag };
    return call(this.scope.of(options), EvaluationService.method.purgeEvaluation, request);
  }

  /** Follow an evaluation's events, each once and in order, until its final state. */
  watch(name: string, options: WatchOptions = {}): AsyncGenerator<Event, void, undefined> {
    return watch(this.scope.of(options), KIND, this.name(name), options);
  }

  /** Return the evaluation once it SUCCEEDED. Throws `EvaluationFailed`, or DeadlineExceeded when time runs out. */
  async wait(name: string, options: WaitOptions = {}): Promise<Evaluation> {
    return wait(this.scope.of(options), KIND, this.name(name), options);
  }

  /** Go through every arm's answers, record by record. */
  predictions(
    name: string,
    { signal, pageSize = 0 }: ListOptions = {},
  ): AsyncGenerator<Prediction, void, undefined> {
    const { listPredictions } = EvaluationService.method;
    const request = { parent: this.name(name), pageSize };
    return pages(this.scope.of({ signal }), listPredictions, request, (page) => page.predictions);
  }

  /** Go through what became of telling an evaluation's webhooks that it has ended; nothing while it has not. */
  deliveries(
    name: string,
    { signal, pageSize = 0 }: ListOptions = {},
  ): AsyncGenerator<WebhookDelivery, void, undefined> {
    const { listEvaluationDeliveries } = EvaluationService.method;
    const request = { parent: this.name(name), pageSize };
    return pages(this.scope.of({ signal }), listEvaluationDeliveries, request, (page) => page.deliveries);
  }

  /**
   * Try a grader on given answers; nothing is stored. Yields a grade for each of them, in their order.
   *
   * What cannot be graded is an `error` of its grade (see `errorOf`), which then has no score. Any number of samples: they
   * are sent in calls of some hundred, the next one when the grades of the one before are used up. Reward models may have
   * short names.
   */
  async *grade(
    grader: MessageInitShape<typeof GraderSchema>,
    samples: Iterable<MessageInitShape<typeof SampleSchema>>,
    options: CallOptions = {},
  ): AsyncGenerator<SampleGrade, void, undefined> {
    const named = owned(GraderSchema, grader);
    nameRewardModels(this.scope.project, named);
    for (const batch of batches(samples)) {
      yield* await graded(this.scope.of(options), named, batch);
    }
  }

  /**
   * Find how likely a model is to go on with given texts, at most 64 a call; no chat template stands beside them.
   *
   * In place of the model a whole request may be given, whose texts come before those given beside it.
   */
  async scoreTexts(
    model: string | MessageInitShape<typeof ScoreTextsRequestSchema>,
    texts: readonly MessageInitShape<typeof TextToScoreSchema>[] = [],
    options: CallOptions = {},
  ): Promise<ScoreTextsResponse> {
    const request = owned(ScoreTextsRequestSchema, typeof model === "string" ? { model } : model);
    request.model = names.askable(this.scope.project, request.model);
    request.texts.push(...texts.map((text) => create(TextToScoreSchema, text)));
    return call(this.scope.of(options), EvaluationService.method.scoreTexts, request);
  }

  private name(name: string): string {
    return names.child(this.scope.project, "evaluations", name);
  }

  private resolved(init: MessageInitShape<typeof EvaluationSchema>): Evaluation {
    const { project } = this.scope;
    const evaluation = owned(EvaluationSchema, init);
    evaluation.datasetVersion = names.version(project, evaluation.datasetVersion);
    evaluation.rewardModel = evaluation.rewardModel && names.weights(project, evaluation.rewardModel);
    for (const arm of evaluation.arms) {
      arm.model = names.weights(project, arm.model);
    }
    for (const { asked } of evaluation.judges) {
      if (asked.case === "model") {
        asked.value = asked.value && names.weights(project, asked.value);
      }
    }
    for (const grader of evaluation.graders) {
      nameRewardModels(project, grader);
    }
    if (evaluation.drift?.datasetVersion) {
      evaluation.drift.datasetVersion = names.version(project, evaluation.drift.datasetVersion);
    }
    return evaluation;
  }
}

/**
 * Stream an answer piece by piece; leaving the loop stops the generation.
 *
 * In place of the model a whole request may be given; what is said beside it wins. The call is made again only while
 * nothing has come.
 */
export async function* generate(
  scope: Scope,
  model: string | MessageInitShape<typeof GenerateTextRequestSchema>,
  prompt: Prompt | undefined,
  options: GenerateOptions,
): AsyncGenerator<GenerateTextResponse, void, undefined> {
  const request = generateRequest(scope, model, prompt, options);
  const backoff = scope.backoff();
  for (let hasBegun = false; ; ) {
    const stream = scope.open(EvaluationService.method.generateText, request);
    try {
      for (let piece = await stream.receive(); piece !== undefined; piece = await stream.receive()) {
        hasBegun = true;
        yield piece;
      }
      return;
    } catch (error) {
      await waitOrThrow(scope, backoff, error, (told) => !hasBegun && isRetryable(told));
    } finally {
      stream.cancel();
    }
  }
}

function generateRequest(
  scope: Scope,
  model: string | MessageInitShape<typeof GenerateTextRequestSchema>,
  prompt: Prompt | undefined,
  options: GenerateOptions,
): GenerateTextRequest {
  const request = owned(GenerateTextRequestSchema, typeof model === "string" ? { model } : model);
  request.model = names.askable(scope.project, request.model);
  request.maxNewTokens = options.maxNewTokens ?? request.maxNewTokens;
  request.temperature = options.temperature ?? request.temperature;
  request.topP = options.topP ?? request.topP;
  request.seed = options.seed === undefined ? request.seed : BigInt(options.seed);
  if (typeof prompt === "string") {
    request.input = { case: "prompt", value: prompt };
  } else if (prompt !== undefined) {
    request.input = { case: "conversation", value: create(ConversationSchema, { messages: [...prompt] }) };
  }
  return request;
}

async function graded(scope: Scope, grader: Grader, batch: readonly Sample[]): Promise<SampleGrade[]> {
  const grades: SampleGrade[] = [];
  const parent = names.project(scope.project);
  const stream = new ResumedStream(scope, EvaluationService.method.gradeSamples, () => {
    return { parent, grader, samples: batch.slice(grades.length) };
  });
  try {
    while (grades.length < batch.length) {
      const left = batch.length - grades.length;
      const response = await stream.receive();
      if (response === undefined || response.grades.length === 0 || response.grades.length > left) {
        throw new DataLoss(`the service did not grade ${left} of ${batch.length} samples`);
      }
      grades.push(...response.grades);
    }
  } finally {
    stream.close();
  }
  return grades;
}

function* batches(samples: Iterable<MessageInitShape<typeof SampleSchema>>): Generator<Sample[]> {
  let batch: Sample[] = [];
  let sizeBytes = 0;
  for (const init of samples) {
    const sample = create(SampleSchema, init);
    const oneBytes = toBinary(SampleSchema, sample).length;
    if (batch.length === SAMPLES_A_CALL || (batch.length > 0 && sizeBytes + oneBytes > BYTES_A_CALL)) {
      yield batch;
      batch = [];
      sizeBytes = 0;
    }
    batch.push(sample);
    sizeBytes += oneBytes;
  }
  if (batch.length > 0) {
    yield batch;
  }
}
