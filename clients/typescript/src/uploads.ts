/** Uploading bytes so that they arrive whole, over any number of breaks. */

import type { MessageInitShape } from "@bufbuild/protobuf";
import { crc32 } from "./crc32.js";
import {
  DataLoss,
  DeadlineExceeded,
  FailedPrecondition,
  InvalidArgument,
  LuthierError,
  Reason,
  Unimplemented,
} from "./errors.js";
import { call } from "./flows.js";
import { DataService, type WriteUploadRequestSchema } from "./gen/luthier/v1/data_service_pb.js";
import { type Upload, Upload_State } from "./gen/luthier/v1/upload_pb.js";
import * as names from "./names.js";
import { isRetryable } from "./retry.js";
import type { Scope } from "./scope.js";
import type { ProgressCallback } from "./transfers.js";

/** What is uploaded: a file (`fileSource` of luthier-client/node), bytes (`bytesSource`), or what else can be read. */
export interface UploadSource {
  /** What error messages call it. */
  readonly filename: string;
  /** The number of bytes, and their sha256 in hexadecimal. */
  measure(): Promise<{ sizeBytes: number; sha256: string }>;
  /** At most `length` bytes from `offset` on; none at the end. */
  read(offset: number, length: number): Promise<Uint8Array>;
  /** Called once, when nothing more is read. */
  close?(): Promise<void>;
}

/** How to upload. */
export interface UploadOptions {
  /** What error messages call the file (default: that of the source). */
  readonly filename?: string;
  /** The name of an upload that another process began. */
  readonly resume?: string;
  readonly onProgress?: ProgressCallback;
  readonly signal?: AbortSignal | undefined;
}

const CHUNK_BYTES = 1024 * 1024;
const SLOWEST_BYTES_PER_SECOND = 64 * 1024;

/** A source of bytes that are in memory. */
export function bytesSource(filename: string, bytes: Uint8Array): UploadSource {
  return {
    filename,
    async measure() {
      const digest = new Uint8Array(await crypto.subtle.digest("SHA-256", new Uint8Array(bytes)));
      return { sizeBytes: bytes.length, sha256: hexadecimal(digest) };
    },
    async read(offset, length) {
      return bytes.subarray(offset, offset + length);
    },
  };
}

/**
 * Send a source in chunks of 1 MiB, each with its CRC-32, the whole with its sha256. Returns the complete upload.
 *
 * A break is resumed at the last byte that the service has stored. Throws InvalidArgument where `resume` names an upload
 * of other bytes, Unimplemented where the transport cannot stream to a service.
 */
export async function upload(scope: Scope, source: UploadSource, options: UploadOptions): Promise<Upload> {
  if (!scope.canSend) {
    throw new Unimplemented("an upload streams to the service, which gRPC-Web cannot: upload over gRPC");
  }
  try {
    const measured = await source.measure();
    const filename = options.filename || source.filename;
    const whole = { ...measured, filename };
    const taken = options.resume
      ? await takenUp(scope, options.resume, whole)
      : await call(scope, DataService.method.startUpload, {
          parent: names.project(scope.project),
          upload: { filename, sha256: whole.sha256, sizeBytes: BigInt(whole.sizeBytes) },
        });
    return await write(scope, { source, whole, onProgress: options.onProgress }, taken);
  } finally {
    await source.close?.();
  }
}

interface Whole {
  readonly filename: string;
  readonly sizeBytes: number;
  readonly sha256: string;
}

interface Sending {
  readonly source: UploadSource;
  readonly whole: Whole;
  readonly onProgress: ProgressCallback | undefined;
}

async function takenUp(scope: Scope, resume: string, whole: Whole): Promise<Upload> {
  const name = names.child(scope.project, "uploads", resume);
  const taken = await call(scope, DataService.method.getUpload, { name });
  const size = BigInt(whole.sizeBytes);
  const isSame =
    (taken.sizeBytes === 0n || taken.sizeBytes === size) &&
    (taken.sha256 === "" || taken.sha256 === whole.sha256) &&
    taken.persistedSizeBytes <= size;
  if (!isSame) {
    throw InvalidArgument.ofField(
      "resume",
      `must be the upload of ${whole.filename} (${size} bytes, sha256 ${whole.sha256}), got ${taken.name} of` +
        ` ${taken.filename} (${taken.sizeBytes} bytes, sha256 ${taken.sha256 || "not said"})`,
    );
  }
  return taken;
}

async function write(scope: Scope, sending: Sending, begun: Upload): Promise<Upload> {
  const { sizeBytes } = sending.whole;
  const backoff = scope.backoff();
  let taken = begun;
  let stored = taken.persistedSizeBytes;
  while (taken.state === Upload_State.RECEIVING) {
    tell(sending, taken.name, Number(stored));
    const timeout = scope.timeoutSeconds + (sizeBytes - Number(stored)) / SLOWEST_BYTES_PER_SECOND;
    try {
      taken = await scope.send(DataService.method.writeUpload, chunks(sending, taken), timeout);
    } catch (error) {
      if (!(error instanceof LuthierError) || !mayWriteAgain(error)) {
        throw error;
      }
      taken = await call(scope, DataService.method.getUpload, { name: taken.name });
      if (taken.persistedSizeBytes > stored) {
        backoff.progressed();
      }
      stored = taken.persistedSizeBytes;
      if (taken.state === Upload_State.RECEIVING) {
        await scope.sleep(backoff.delayAfter(error));
      }
    }
  }
  if (taken.state !== Upload_State.COMPLETE) {
    throw new FailedPrecondition(`${taken.name} was cancelled; start a new upload`, {
      metadata: { name: taken.name },
    });
  }
  tell(sending, taken.name, sizeBytes);
  return taken;
}

/** Whether the service may know better than we what it has: it went away, was slow, had more, or had all. */
function mayWriteAgain(error: LuthierError): boolean {
  const mayHaveMore = error instanceof DeadlineExceeded || error instanceof FailedPrecondition;
  return mayHaveMore || isRetryable(error) || error.reason === Reason.OFFSET_MISMATCH;
}

async function* chunks(
  sending: Sending,
  taken: Upload,
): AsyncGenerator<MessageInitShape<typeof WriteUploadRequestSchema>> {
  const { source, whole } = sending;
  let offset = Number(taken.persistedSizeBytes);
  let name = taken.name;
  for (let finish = false; !finish; ) {
    const data = await source.read(offset, Math.min(CHUNK_BYTES, whole.sizeBytes - offset));
    finish = offset + data.length >= whole.sizeBytes;
    if (data.length === 0 && !finish) {
      throw new DataLoss(
        `${whole.filename} was cut to ${offset} bytes while it was being sent, expected ${whole.sizeBytes}`,
      );
    }
    yield { name, offset: BigInt(offset), data, crc32: crc32(data), finish };
    name = "";
    offset += data.length;
    if (!finish) {
      tell(sending, taken.name, offset);
    }
  }
}

function tell(sending: Sending, name: string, completedBytes: number): void {
  sending.onProgress?.({ name, completedBytes, totalBytes: sending.whole.sizeBytes });
}

/** Bytes as hexadecimal digits. */
export function hexadecimal(bytes: Uint8Array): string {
  return Array.from(bytes, (byte) => byte.toString(16).padStart(2, "0")).join("");
}
