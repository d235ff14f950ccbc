/** Renderings: the exact tokens and loss masks that a job trains on. */

import type { MessageInitShape } from "@bufbuild/protobuf";
import type { ChangeOptions, DeletedOptions } from "./datasets.js";
import { type WaitOptions, type WatchOptions, wait, watch } from "./events.js";
import { RenderingFailed } from "./failures.js";
import { call, type ListDeletableOptions, type ListOptions, owned, pages } from "./flows.js";
import { DataService } from "./gen/luthier/v1/data_service_pb.js";
import { type RecordError, Split } from "./gen/luthier/v1/dataset_pb.js";
import type { Event } from "./gen/luthier/v1/event_pb.js";
import { type RenderedRow, type Rendering, RenderingSchema } from "./gen/luthier/v1/rendering_pb.js";
import * as names from "./names.js";
import type { CallOptions, Scope } from "./scope.js";

/** Which rows to look at. */
export interface PreviewOptions extends CallOptions {
  readonly split?: Split;
  /** Those alone that teach nothing. */
  readonly unsupervisedOnly?: boolean;
  readonly pageSize?: number;
}

const KIND = {
  watching: DataService.method.watchRendering,
  reading: DataService.method.getRendering,
  failed: RenderingFailed,
} as const;

/** Renderings. */
export class Renderings {
  constructor(private readonly scope: Scope) {}

  /**
   * Start rendering a version with a model's tokenizer. Follow it with `wait`.
   *
   * `rendering` names `datasetVersion` and `model` (short names will do) and what else shall differ from the defaults.
   */
  async create(
    rendering: MessageInitShape<typeof RenderingSchema>,
    { renderingId = "", ...options }: CallOptions & { readonly renderingId?: string } = {},
  ): Promise<Rendering> {
    const { project } = this.scope;
    const resolved = owned(RenderingSchema, rendering);
    resolved.datasetVersion = names.version(project, resolved.datasetVersion);
    resolved.model = names.child(project, "models", resolved.model);
    const request = { parent: names.project(project), rendering: resolved, renderingId };
    return call(this.scope.of(options), DataService.method.createRendering, request);
  }

  /** Read one rendering. */
  async get(name: string, options: CallOptions = {}): Promise<Rendering> {
    return call(this.scope.of(options), DataService.method.getRendering, { name: this.name(name) });
  }

  /** Go through the renderings of the project, newest first. */
  list({ signal, ...asked }: ListDeletableOptions = {}): AsyncGenerator<Rendering, void, undefined> {
    const request = { parent: names.project(this.scope.project), ...asked };
    return pages(
      this.scope.of({ signal }),
      DataService.method.listRenderings,
      request,
      (page) => page.renderings,
    );
  }

  /** Ask a rendering that is being made to stop. */
  async cancel(name: string, { etag = "", ...options }: ChangeOptions = {}): Promise<Rendering> {
    const request = { name: this.name(name), etag };
    return call(this.scope.of(options), DataService.method.cancelRendering, request);
  }

  /** Delete a rendering that has ended. Its name may be used again. */
  async delete(name: string, { etag = "", ...options }: ChangeOptions = {}): Promise<Rendering> {
    const request = { name: this.name(name), etag };
    return call(this.scope.of(options), DataService.method.deleteRendering, request);
  }

  /** Bring back a rendering that was deleted, until it is purged; `uid`: which of several that had the name. */
  async undelete(name: string, { uid = "", etag = "", ...options }: DeletedOptions = {}): Promise<Rendering> {
    const request = { name: this.name(name), uid, etag };
    return call(this.scope.of(options), DataService.method.undeleteRendering, request);
  }

  /** Purge a rendering that was deleted, at once and for good; `uid` as in `undelete`. */
  async purge(name: string, { uid = "", etag = "", ...options }: DeletedOptions = {}): Promise<Rendering> {
    const request = { name: this.name(name), uid, etag };
    return call(this.scope.of(options), DataService.method.purgeRendering, request);
  }

  /** Follow a rendering's events, each once and in order, until it is READY, FAILED or CANCELLED. */
  watch(name: string, options: WatchOptions = {}): AsyncGenerator<Event, void, undefined> {
    return watch(this.scope.of(options), KIND, this.name(name), options);
  }

  /** Return the rendering once it is READY. Throws `RenderingFailed`, or DeadlineExceeded when time runs out. */
  async wait(name: string, options: WaitOptions = {}): Promise<Rendering> {
    return wait(this.scope.of(options), KIND, this.name(name), options);
  }

  /** Go through the first 1,000 records that could not be rendered, by file and line. */
  errors(
    name: string,
    { signal, pageSize = 0 }: ListOptions = {},
  ): AsyncGenerator<RecordError, void, undefined> {
    const request = { parent: this.name(name), pageSize };
    return pages(
      this.scope.of({ signal }),
      DataService.method.listRenderingErrors,
      request,
      (page) => page.errors,
    );
  }

  /** Go through rows token by token: the stored rows that a job reads. */
  preview(name: string, options: PreviewOptions = {}): AsyncGenerator<RenderedRow, void, undefined> {
    const { split = Split.UNSPECIFIED, unsupervisedOnly = false, pageSize = 0 } = options;
    const request = { name: this.name(name), split, unsupervisedOnly, pageSize };
    return pages(this.scope.of(options), DataService.method.previewRendering, request, (page) => page.rows);
  }

  private name(name: string): string {
    return names.child(this.scope.project, "renderings", name);
  }
}
