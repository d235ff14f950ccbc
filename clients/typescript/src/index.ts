/** The client of the Luthier services, without a transport: see `luthier-client/node` and `luthier-client/web`. */

export { Client, type ClientOptions, type TransportOptions } from "./client.js";
export type { ChangeOptions, DeletedOptions, VersionSource } from "./datasets.js";
export * from "./errors.js";
export type { GenerateOptions, Prompt } from "./evaluations.js";
export type { WaitOptions, WatchOptions } from "./events.js";
export * from "./failures.js";
export type { ListDeletableOptions, ListOptions } from "./flows.js";
export type { MakeOptions, ReadFileOptions } from "./models.js";
export * as names from "./names.js";
export type { PreviewOptions } from "./renderings.js";
export { DEFAULT_RETRY, type RetryPolicy } from "./retry.js";
export type { CallOptions, Transports } from "./scope.js";
export type { ProgressCallback, TransferProgress } from "./transfers.js";
export { bytesSource, type UploadOptions, type UploadSource } from "./uploads.js";
export { errorOf } from "./wire-errors.js";
