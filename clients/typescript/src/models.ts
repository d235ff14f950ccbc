/** Models: base models and the adapters tuned on them. */

import type { MessageInitShape } from "@bufbuild/protobuf";
import type { ChangeOptions, DeletedOptions } from "./datasets.js";
import { DataLoss } from "./errors.js";
import { type WaitOptions, type WatchOptions, wait, watch } from "./events.js";
import { ModelFailed } from "./failures.js";
import { call, type ListDeletableOptions, type ListOptions, pages, ResumedStream } from "./flows.js";
import type { Event } from "./gen/luthier/v1/event_pb.js";
import { ExportFormat, type Model, type ModelFile, type ModelSchema } from "./gen/luthier/v1/model_pb.js";
import { ModelService } from "./gen/luthier/v1/model_service_pb.js";
import * as names from "./names.js";
import type { CallOptions, Scope } from "./scope.js";

/** What a model that is made from another is called. */
export interface MakeOptions extends CallOptions {
  readonly modelId?: string;
  readonly displayName?: string;
  readonly labels?: Readonly<Record<string, string>>;
}

/** Which bytes of a file to read. */
export interface ReadFileOptions extends CallOptions {
  /** The first byte that is wanted. */
  readonly startOffset?: number;
  /** The uid of the model that an earlier part was read from (default: of the one that has the name now). */
  readonly uid?: string;
}

const FORMATS = {
  "gguf-f16": ExportFormat.GGUF_F16,
  "gguf-q8_0": ExportFormat.GGUF_Q8_0,
} as const;

const KIND = {
  watching: ModelService.method.watchModel,
  reading: ModelService.method.getModel,
  failed: ModelFailed,
} as const;

/** Models. */
export class Models {
  constructor(private readonly scope: Scope) {}

  /**
   * Take in a base model from the source that `model` names. Follow it with `wait`.
   *
   * Paths are those of the training worker's machine and lie below its allowed roots.
   */
  registerBase(
    model: MessageInitShape<typeof ModelSchema>,
    { modelId = "", ...options }: CallOptions & { readonly modelId?: string } = {},
  ): Promise<Model> {
    const request = { parent: names.project(this.scope.project), model, modelId };
    return call(this.scope.of(options), ModelService.method.registerBaseModel, request);
  }

  /** Make a model with all its weights from an adapter, or from a checkpoint of one. Follow it with `wait`. */
  async merge(name: string, { signal, ...made }: MakeOptions = {}): Promise<Model> {
    return call(this.scope.of({ signal }), ModelService.method.mergeModel, {
      name: this.weights(name),
      ...made,
    });
  }

  /** Write a model, an adapter or a checkpoint as a file for other programs. Follow it with `wait`. */
  async export(
    name: string,
    format: keyof typeof FORMATS,
    { signal, ...made }: MakeOptions = {},
  ): Promise<Model> {
    const request = { name: this.weights(name), format: FORMATS[format], ...made };
    return call(this.scope.of({ signal }), ModelService.method.exportModel, request);
  }

  /** Read one model. */
  async get(name: string, options: CallOptions = {}): Promise<Model> {
    return call(this.scope.of(options), ModelService.method.getModel, { name: this.weights(name) });
  }

  /** Go through the models of the project, newest first. */
  list({ signal, ...asked }: ListDeletableOptions = {}): AsyncGenerator<Model, void, undefined> {
    const request = { parent: names.project(this.scope.project), ...asked };
    return pages(this.scope.of({ signal }), ModelService.method.listModels, request, (page) => page.models);
  }

  /** Ask a model that is being registered, merged or exported to stop. One that has ended is returned unchanged. */
  async cancel(name: string, { etag = "", ...options }: ChangeOptions = {}): Promise<Model> {
    return call(this.scope.of(options), ModelService.method.cancelModel, { name: this.name(name), etag });
  }

  /** Delete a model that nothing stands on. Its name may be used again. */
  async delete(name: string, { etag = "", ...options }: ChangeOptions = {}): Promise<Model> {
    return call(this.scope.of(options), ModelService.method.deleteModel, { name: this.name(name), etag });
  }

  /** Bring back a model that was deleted, until it is purged; `uid`: which of several that had the name. */
  async undelete(name: string, { uid = "", etag = "", ...options }: DeletedOptions = {}): Promise<Model> {
    const request = { name: this.name(name), uid, etag };
    return call(this.scope.of(options), ModelService.method.undeleteModel, request);
  }

  /** Purge a model that was deleted, at once and for good; `uid` as in `undelete`. */
  async purge(name: string, { uid = "", etag = "", ...options }: DeletedOptions = {}): Promise<Model> {
    const request = { name: this.name(name), uid, etag };
    return call(this.scope.of(options), ModelService.method.purgeModel, request);
  }

  /** Follow a model's events, each once and in order, until it is READY, FAILED or CANCELLED. */
  watch(name: string, options: WatchOptions = {}): AsyncGenerator<Event, void, undefined> {
    return watch(this.scope.of(options), KIND, this.name(name), options);
  }

  /** Return the model once it is READY. Throws `ModelFailed`, or DeadlineExceeded when time runs out. */
  async wait(name: string, options: WaitOptions = {}): Promise<Model> {
    return wait(this.scope.of(options), KIND, this.name(name), options);
  }

  /** Go through the files of a READY model, by path. */
  files(
    name: string,
    { signal, pageSize = 0 }: ListOptions = {},
  ): AsyncGenerator<ModelFile, void, undefined> {
    const request = { parent: this.weights(name), pageSize };
    return pages(
      this.scope.of({ signal }),
      ModelService.method.listModelFiles,
      request,
      (page) => page.files,
    );
  }

  /**
   * Read a file of a READY model piece by piece, each byte once over any number of breaks.
   *
   * Whether the bytes are those of the file's sha256 is for the caller to see: `download` of luthier-client/node does.
   */
  async *readFile(
    name: string,
    path: string,
    options: ReadFileOptions = {},
  ): AsyncGenerator<Uint8Array, void, undefined> {
    const scope = this.scope.of(options);
    const full = this.weights(name);
    const uid = options.uid || (await call(scope, ModelService.method.getModel, { name: full })).uid;
    let offset = BigInt(options.startOffset ?? 0);
    const requestAt = (): { name: string; path: string; uid: string; startOffset: bigint } => {
      return { name: full, path, uid, startOffset: offset };
    };
    const stream = new ResumedStream(scope, ModelService.method.downloadModelFile, requestAt);
    try {
      for (let piece = await stream.receive(); piece !== undefined; piece = await stream.receive()) {
        if (piece.offset !== offset) {
          throw new DataLoss(`${path} of ${full}: expected byte ${offset} next, got ${piece.offset}`);
        }
        offset += BigInt(piece.data.length);
        yield piece.data;
      }
    } finally {
      stream.close();
    }
  }

  private name(name: string): string {
    return names.child(this.scope.project, "models", name);
  }

  private weights(name: string): string {
    return names.weights(this.scope.project, name);
  }
}
