/** Datasets, the uploads they are made from, and their immutable versions. */

import type { MessageInitShape } from "@bufbuild/protobuf";
import { type WaitOptions, type WatchOptions, wait, watch } from "./events.js";
import { VersionFailed } from "./failures.js";
import { call, type ListDeletableOptions, type ListOptions, owned, pages } from "./flows.js";
import { DataService } from "./gen/luthier/v1/data_service_pb.js";
import {
  type Dataset,
  type Record as DatasetRecord,
  type DatasetSchema,
  type DatasetSource,
  DatasetSourceSchema,
  type DatasetVersion,
  DatasetVersionSchema,
  type RecordError,
  Split,
} from "./gen/luthier/v1/dataset_pb.js";
import type { Event } from "./gen/luthier/v1/event_pb.js";
import type { Upload } from "./gen/luthier/v1/upload_pb.js";
import * as names from "./names.js";
import type { CallOptions, Scope } from "./scope.js";
import { type UploadOptions, type UploadSource, upload } from "./uploads.js";

/** What a change takes beside what it changes: with `etag` it is refused if somebody else was quicker. */
export interface ChangeOptions extends CallOptions {
  readonly etag?: string;
}

/** Options of calls about what was deleted. `uid`: which of several that had the name; empty: the last one. */
export interface DeletedOptions extends ChangeOptions {
  readonly uid?: string;
}

/** What a version is built from: a complete upload, whose records are split by their hash, or a source that says more. */
export type VersionSource = Upload | MessageInitShape<typeof DatasetSourceSchema>;

const VERSION_KIND = {
  watching: DataService.method.watchDatasetVersion,
  reading: DataService.method.getDatasetVersion,
  failed: VersionFailed,
} as const;

/** Datasets and uploads. */
export class Datasets {
  /** Versions of datasets. */
  readonly versions: Versions;

  constructor(private readonly scope: Scope) {
    this.versions = new Versions(scope);
  }

  /** Create an empty dataset. Without an id the service makes one. */
  create(
    datasetId = "",
    dataset: MessageInitShape<typeof DatasetSchema> = {},
    options: CallOptions = {},
  ): Promise<Dataset> {
    const parent = names.project(this.scope.project);
    return call(this.scope.of(options), DataService.method.createDataset, { parent, datasetId, dataset });
  }

  /** Read one dataset. */
  async get(name: string, options: CallOptions = {}): Promise<Dataset> {
    return call(this.scope.of(options), DataService.method.getDataset, { name: this.name("datasets", name) });
  }

  /** Delete a dataset without versions. Its name may be used again. */
  async delete(name: string, { etag = "", ...options }: ChangeOptions = {}): Promise<Dataset> {
    const request = { name: this.name("datasets", name), etag };
    return call(this.scope.of(options), DataService.method.deleteDataset, request);
  }

  /** Bring back a dataset that was deleted, until it is purged; `uid`: which of several that had the name. */
  async undelete(name: string, { uid = "", etag = "", ...options }: DeletedOptions = {}): Promise<Dataset> {
    const request = { name: this.name("datasets", name), uid, etag };
    return call(this.scope.of(options), DataService.method.undeleteDataset, request);
  }

  /** Purge a dataset that was deleted, at once and for good; `uid` as in `undelete`. */
  async purge(name: string, { uid = "", etag = "", ...options }: DeletedOptions = {}): Promise<Dataset> {
    const request = { name: this.name("datasets", name), uid, etag };
    return call(this.scope.of(options), DataService.method.purgeDataset, request);
  }

  /** Go through the datasets of the project, newest first. */
  list({ signal, ...asked }: ListDeletableOptions = {}): AsyncGenerator<Dataset, void, undefined> {
    const request = { parent: names.project(this.scope.project), ...asked };
    return pages(
      this.scope.of({ signal }),
      DataService.method.listDatasets,
      request,
      (page) => page.datasets,
    );
  }

  /** Send a source whole, over any number of breaks; returns the complete upload. */
  upload(source: UploadSource, options: UploadOptions = {}): Promise<Upload> {
    return upload(this.scope.of(options), source, options);
  }

  /** Read one upload; its `persistedSizeBytes` is what the service has stored. */
  async getUpload(name: string, options: CallOptions = {}): Promise<Upload> {
    return call(this.scope.of(options), DataService.method.getUpload, { name: this.name("uploads", name) });
  }

  /** Go through the uploads of the project, newest first; `state = "RECEIVING"` finds those that go on. */
  listUploads({ signal, ...asked }: ListDeletableOptions = {}): AsyncGenerator<Upload, void, undefined> {
    const request = { parent: names.project(this.scope.project), ...asked };
    return pages(this.scope.of({ signal }), DataService.method.listUploads, request, (page) => page.uploads);
  }

  /** Give an upload up and remove its bytes. */
  async cancelUpload(name: string, { etag = "", ...options }: ChangeOptions = {}): Promise<Upload> {
    const request = { name: this.name("uploads", name), etag };
    return call(this.scope.of(options), DataService.method.cancelUpload, request);
  }

  /** Delete an upload that is complete or cancelled. Versions built from it stay. */
  async deleteUpload(name: string, { etag = "", ...options }: ChangeOptions = {}): Promise<Upload> {
    const request = { name: this.name("uploads", name), etag };
    return call(this.scope.of(options), DataService.method.deleteUpload, request);
  }

  /** Bring back an upload that was deleted, until it is purged; `uid`: which of several that had the name. */
  async undeleteUpload(
    name: string,
    { uid = "", etag = "", ...options }: DeletedOptions = {},
  ): Promise<Upload> {
    const request = { name: this.name("uploads", name), uid, etag };
    return call(this.scope.of(options), DataService.method.undeleteUpload, request);
  }

  /** Purge an upload that was deleted, at once and for good; `uid` as in `undelete`. */
  async purgeUpload(name: string, { uid = "", etag = "", ...options }: DeletedOptions = {}): Promise<Upload> {
    const request = { name: this.name("uploads", name), uid, etag };
    return call(this.scope.of(options), DataService.method.purgeUpload, request);
  }

  /**
   * Start building a version. Follow it with `versions.wait`.
   *
   * `settings` is the version that is wanted, where it shall differ from the defaults.
   */
  async createVersion(
    dataset: string,
    sources: readonly VersionSource[],
    settings: MessageInitShape<typeof DatasetVersionSchema> & { versionId?: string } = {},
    options: CallOptions = {},
  ): Promise<DatasetVersion> {
    const { versionId = "", ...wanted } = settings;
    const version = owned(DatasetVersionSchema, wanted as MessageInitShape<typeof DatasetVersionSchema>);
    version.sources = sources.map((source) => this.source(source));
    return call(this.scope.of(options), DataService.method.createDatasetVersion, {
      parent: this.name("datasets", dataset),
      datasetVersion: version,
      datasetVersionId: versionId,
    });
  }

  private source(given: VersionSource): DatasetSource {
    const init = isUpload(given) ? { upload: given.name } : given;
    const source = owned(DatasetSourceSchema, init);
    source.upload = this.name("uploads", source.upload);
    return source;
  }

  private name(collection: string, name: string): string {
    return names.child(this.scope.project, collection, name);
  }
}

/** Dataset versions: immutable, split and checked bodies of records. Short names are `dataset/version`. */
export class Versions {
  constructor(private readonly scope: Scope) {}

  /** Read one version. */
  async get(name: string, options: CallOptions = {}): Promise<DatasetVersion> {
    return call(this.scope.of(options), DataService.method.getDatasetVersion, { name: this.name(name) });
  }

  /** Go through the versions of a dataset, newest first. */
  list(
    dataset: string,
    { signal, ...asked }: ListDeletableOptions = {},
  ): AsyncGenerator<DatasetVersion, void, undefined> {
    const parent = names.child(this.scope.project, "datasets", dataset);
    const { listDatasetVersions } = DataService.method;
    return pages(
      this.scope.of({ signal }),
      listDatasetVersions,
      { parent, ...asked },
      (page) => page.datasetVersions,
    );
  }

  /** Ask a version that is being built to stop. */
  async cancel(name: string, { etag = "", ...options }: ChangeOptions = {}): Promise<DatasetVersion> {
    const request = { name: this.name(name), etag };
    return call(this.scope.of(options), DataService.method.cancelDatasetVersion, request);
  }

  /** Delete a version that has ended. Its name may be used again. */
  async delete(name: string, { etag = "", ...options }: ChangeOptions = {}): Promise<DatasetVersion> {
    const request = { name: this.name(name), etag };
    return call(this.scope.of(options), DataService.method.deleteDatasetVersion, request);
  }

  /** Bring back a version that was deleted, until it is purged; `uid`: which of several that had the name. */
  async undelete(
    name: string,
    { uid = "", etag = "", ...options }: DeletedOptions = {},
  ): Promise<DatasetVersion> {
    const request = { name: this.name(name), uid, etag };
    return call(this.scope.of(options), DataService.method.undeleteDatasetVersion, request);
  }

  /** Purge a version that was deleted, at once and for good; `uid` as in `undelete`. */
  async purge(
    name: string,
    { uid = "", etag = "", ...options }: DeletedOptions = {},
  ): Promise<DatasetVersion> {
    const request = { name: this.name(name), uid, etag };
    return call(this.scope.of(options), DataService.method.purgeDatasetVersion, request);
  }

  /** Follow a version's events, each once and in order, until it is READY, FAILED or CANCELLED. */
  watch(name: string, options: WatchOptions = {}): AsyncGenerator<Event, void, undefined> {
    return watch(this.scope.of(options), VERSION_KIND, this.name(name), options);
  }

  /** Return the version once it is READY. Throws `VersionFailed`, or DeadlineExceeded when time runs out. */
  async wait(name: string, options: WaitOptions = {}): Promise<DatasetVersion> {
    return wait(this.scope.of(options), VERSION_KIND, this.name(name), options);
  }

  /** Go through the first 1,000 bad records of a version, by file and line. */
  errors(
    name: string,
    { signal, pageSize = 0 }: ListOptions = {},
  ): AsyncGenerator<RecordError, void, undefined> {
    const { listDatasetVersionErrors } = DataService.method;
    const request = { parent: this.name(name), pageSize };
    return pages(this.scope.of({ signal }), listDatasetVersionErrors, request, (page) => page.errors);
  }

  /** Go through the records of a READY version in row order. */
  records(
    name: string,
    { signal, pageSize = 0, split = Split.UNSPECIFIED }: ListOptions & { readonly split?: Split } = {},
  ): AsyncGenerator<DatasetRecord, void, undefined> {
    const request = { parent: this.name(name), pageSize, split };
    return pages(this.scope.of({ signal }), DataService.method.listRecords, request, (page) => page.records);
  }

  private name(name: string): string {
    return names.version(this.scope.project, name);
  }
}

function isUpload(source: VersionSource): source is Upload {
  return source.$typeName === "luthier.v1.Upload";
}
