/** What `wait` throws when a resource ends otherwise than well. */

import { LuthierError } from "./errors.js";
import type { DatasetVersion } from "./gen/luthier/v1/dataset_pb.js";
import type { Evaluation } from "./gen/luthier/v1/evaluation_pb.js";
import type { FineTuningJob } from "./gen/luthier/v1/fine_tuning_job_pb.js";
import type { Model } from "./gen/luthier/v1/model_pb.js";
import type { Rendering } from "./gen/luthier/v1/rendering_pb.js";

/** A resource whose events can be watched. */
export type Watched = DatasetVersion | Evaluation | FineTuningJob | Model | Rendering;

/**
 * A resource reached FAILED or CANCELLED. `reason` and `metadata` are those of its failure.
 *
 * `resource` is the message as last read, `state` its state without prefix, `failure` the stored cause.
 */
export class ResourceFailed<R extends Watched = Watched> extends LuthierError {
  constructor(
    readonly resource: R,
    readonly state: string,
    readonly failure: LuthierError,
  ) {
    const { reason, metadata, message } = failure;
    super(`${resource.name} is ${state}: ${message}`, { reason, metadata, cause: failure });
  }
}

/** A dataset version could not be built, or was cancelled. */
export class VersionFailed extends ResourceFailed<DatasetVersion> {}

/** A rendering could not be made, or was cancelled. */
export class RenderingFailed extends ResourceFailed<Rendering> {}

/** A model could not be registered, merged or exported. */
export class ModelFailed extends ResourceFailed<Model> {}

/** A fine-tuning job failed or was cancelled. */
export class JobFailed extends ResourceFailed<FineTuningJob> {}

/** An evaluation failed or was cancelled. */
export class EvaluationFailed extends ResourceFailed<Evaluation> {}
