/** How far an upload or a download has come. */

/** `name` is the upload or the path of the model's file; what is sent may not be stored yet. */
export interface TransferProgress {
  readonly name: string;
  readonly completedBytes: number;
  readonly totalBytes: number;
}

/** Is told how far a transfer is. */
export type ProgressCallback = (progress: TransferProgress) => void;
