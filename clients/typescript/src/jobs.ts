/** Fine-tuning jobs, their events, metrics, checkpoints and rollouts. */

import type { MessageInitShape } from "@bufbuild/protobuf";
import type { ChangeOptions, DeletedOptions } from "./datasets.js";
import { type WaitOptions, type WatchOptions, wait, watch } from "./events.js";
import { JobFailed } from "./failures.js";
import { call, type ListDeletableOptions, type ListOptions, owned, pages } from "./flows.js";
import type { Event } from "./gen/luthier/v1/event_pb.js";
import {
  type Checkpoint,
  type DeviceClassSchema,
  type FineTuningJob,
  FineTuningJobSchema,
  type FineTuningPlan,
  type MetricPoint,
} from "./gen/luthier/v1/fine_tuning_job_pb.js";
import type { Rollout } from "./gen/luthier/v1/rollout_pb.js";
import { TrainingService } from "./gen/luthier/v1/training_service_pb.js";
import type { WebhookDelivery } from "./gen/luthier/v1/webhook_pb.js";
import { nameRewardModels } from "./graders.js";
import * as names from "./names.js";
import type { CallOptions, Scope } from "./scope.js";

type JobInit = MessageInitShape<typeof FineTuningJobSchema>;

const KIND = {
  watching: TrainingService.method.watchFineTuningJob,
  reading: TrainingService.method.getFineTuningJob,
  failed: JobFailed,
} as const;

/** Fine-tuning jobs. */
export class Jobs {
  constructor(private readonly scope: Scope) {}

  /** Say what a job would do, without starting it, and what it takes on a device. `job` as in `create`. */
  async plan(
    job: JobInit,
    {
      device,
      ...options
    }: CallOptions & { readonly device?: MessageInitShape<typeof DeviceClassSchema> } = {},
  ): Promise<FineTuningPlan> {
    return call(this.scope.of(options), TrainingService.method.planFineTuningJob, {
      parent: names.project(this.scope.project),
      fineTuningJob: this.resolved(job),
      ...(device && { device }),
    });
  }

  /**
   * Queue a job. Follow it with `watch` or `wait`.
   *
   * `job` names `rendering`, `baseModel` or `startFrom` (short names will do, also in `mixedRenderings` and of reward
   * models in a grader) and what else shall differ from the defaults.
   */
  async create(
    job: JobInit,
    { jobId = "", ...options }: CallOptions & { readonly jobId?: string } = {},
  ): Promise<FineTuningJob> {
    return call(this.scope.of(options), TrainingService.method.createFineTuningJob, {
      parent: names.project(this.scope.project),
      fineTuningJob: this.resolved(job),
      fineTuningJobId: jobId,
    });
  }

  /** Read one job. */
  async get(name: string, options: CallOptions = {}): Promise<FineTuningJob> {
    return call(this.scope.of(options), TrainingService.method.getFineTuningJob, { name: this.name(name) });
  }

  /** Go through the jobs of the project, newest first. */
  list({ signal, ...asked }: ListDeletableOptions = {}): AsyncGenerator<FineTuningJob, void, undefined> {
    const { listFineTuningJobs } = TrainingService.method;
    const request = { parent: names.project(this.scope.project), ...asked };
    return pages(this.scope.of({ signal }), listFineTuningJobs, request, (page) => page.fineTuningJobs);
  }

  /** Ask a job to stop; it does within one forward and backward pass. A job that has ended is returned unchanged. */
  async cancel(name: string, { etag = "", ...options }: ChangeOptions = {}): Promise<FineTuningJob> {
    const request = { name: this.name(name), etag };
    return call(this.scope.of(options), TrainingService.method.cancelFineTuningJob, request);
  }

  /**
   * Ask a job to pause: its worker ends the step, stores a checkpoint and is free. It may end before. One that is paused
   * is returned unchanged.
   *
   * Throws FailedPrecondition for one that has ended or is stopping.
   */
  async pause(name: string, { etag = "", ...options }: ChangeOptions = {}): Promise<FineTuningJob> {
    const request = { name: this.name(name), etag };
    return call(this.scope.of(options), TrainingService.method.pauseFineTuningJob, request);
  }

  /** Queue a paused job again, to go on from its last checkpoint. Throws FailedPrecondition for one that is not PAUSED. */
  async resume(name: string, { etag = "", ...options }: ChangeOptions = {}): Promise<FineTuningJob> {
    const request = { name: this.name(name), etag };
    return call(this.scope.of(options), TrainingService.method.resumeFineTuningJob, request);
  }

  /** Delete a job that has ended; its model stays. Its name may be used again. */
  async delete(name: string, { etag = "", ...options }: ChangeOptions = {}): Promise<FineTuningJob> {
    const request = { name: this.name(name), etag };
    return call(this.scope.of(options), TrainingService.method.deleteFineTuningJob, request);
  }

  /** Bring back a job that was deleted, until it is purged; `uid`: which of several that had the name. */
  async undelete(
    name: string,
    { uid = "", etag = "", ...options }: DeletedOptions = {},
  ): Promise<FineTuningJob> {
    const request = { name: this.name(name), uid, etag };
    return call(this.scope.of(options), TrainingService.method.undeleteFineTuningJob, request);
  }

  /** Purge a job that was deleted, at once and for good; `uid` as in `undelete`. */
  async purge(
    name: string,
    { uid = "", etag = "", ...options }: DeletedOptions = {},
  ): Promise<FineTuningJob> {
    const request = { name: this.name(name), uid, etag };
    return call(this.scope.of(options), TrainingService.method.purgeFineTuningJob, request);
  }

  /** Follow a job's events, each once and in order, until its final state. */
  watch(name: string, options: WatchOptions = {}): AsyncGenerator<Event, void, undefined> {
    return watch(this.scope.of(options), KIND, this.name(name), options);
  }

  /** Return the job once it SUCCEEDED. Throws `JobFailed`, or DeadlineExceeded when time runs out. */
  async wait(name: string, options: WaitOptions = {}): Promise<FineTuningJob> {
    return wait(this.scope.of(options), KIND, this.name(name), options);
  }

  /** Go through the events that a job has so far. */
  events(name: string, { signal, pageSize = 0 }: ListOptions = {}): AsyncGenerator<Event, void, undefined> {
    const { listFineTuningJobEvents } = TrainingService.method;
    const request = { parent: this.name(name), pageSize };
    return pages(this.scope.of({ signal }), listFineTuningJobEvents, request, (page) => page.events);
  }

  /** Go through a job's metrics by step. A step that was made twice shows its last attempt. */
  metrics(
    name: string,
    { signal, pageSize = 0 }: ListOptions = {},
  ): AsyncGenerator<MetricPoint, void, undefined> {
    const { readFineTuningJobMetrics } = TrainingService.method;
    const request = { name: this.name(name), pageSize };
    return pages(this.scope.of({ signal }), readFineTuningJobMetrics, request, (page) => page.points);
  }

  /** Go through a job's checkpoints, in order of steps. */
  checkpoints(
    name: string,
    { signal, pageSize = 0 }: ListOptions = {},
  ): AsyncGenerator<Checkpoint, void, undefined> {
    const { listCheckpoints } = TrainingService.method;
    const request = { parent: this.name(name), pageSize };
    return pages(this.scope.of({ signal }), listCheckpoints, request, (page) => page.checkpoints);
  }

  /** Go through what a reinforcement job drew and how it was rewarded, in order; `step`: of that one alone. */
  rollouts(
    name: string,
    { signal, pageSize = 0, step = 0 }: ListOptions & { readonly step?: bigint | number } = {},
  ): AsyncGenerator<Rollout, void, undefined> {
    const request = { parent: this.name(name), pageSize, step: BigInt(step) };
    return pages(
      this.scope.of({ signal }),
      TrainingService.method.listRollouts,
      request,
      (page) => page.rollouts,
    );
  }

  /** Go through what became of telling a job's webhooks that it has ended; nothing while it has not. */
  deliveries(
    name: string,
    { signal, pageSize = 0 }: ListOptions = {},
  ): AsyncGenerator<WebhookDelivery, void, undefined> {
    const { listFineTuningJobDeliveries } = TrainingService.method;
    const request = { parent: this.name(name), pageSize };
    return pages(this.scope.of({ signal }), listFineTuningJobDeliveries, request, (page) => page.deliveries);
  }

  /** Read one checkpoint; its short name is `job/checkpoint`. */
  async getCheckpoint(name: string, options: CallOptions = {}): Promise<Checkpoint> {
    const request = { name: names.checkpoint(this.scope.project, name) };
    return call(this.scope.of(options), TrainingService.method.getCheckpoint, request);
  }

  private name(name: string): string {
    return names.child(this.scope.project, "fineTuningJobs", name);
  }

  private resolved(init: JobInit): FineTuningJob {
    const { project } = this.scope;
    const job = owned(FineTuningJobSchema, init);
    job.baseModel = job.baseModel && names.child(project, "models", job.baseModel);
    job.startFrom = job.startFrom && names.weights(project, job.startFrom);
    job.rendering = names.child(project, "renderings", job.rendering);
    for (const mixed of job.mixedRenderings) {
      mixed.rendering = names.child(project, "renderings", mixed.rendering);
    }
    if (job.method.case === "reinforcement" && job.method.value.grader) {
      nameRewardModels(project, job.method.value.grader);
    }
    return job;
  }
}
