/**
 * The error tree: the classes of the Python package `luthier.errors`, by the same names.
 *
 * A program switches on the class (`error instanceof NotFound`), then on `reason`; the message is for people.
 */

import { Code } from "@connectrpc/connect";
import { ErrorReason } from "./gen/luthier/v1/error_reason_pb.js";

type RegisteredReason = Exclude<keyof typeof ErrorReason, "UNSPECIFIED">;

/**
 * The registered reasons, e.g. `Reason.RESOURCE_NOT_FOUND`.
 *
 * A client may meet a reason that a newer service has added, so `LuthierError.reason` is a plain string.
 */
export const Reason = Object.freeze(
  Object.fromEntries(
    Object.keys(ErrorReason)
      .filter((name) => name !== "UNSPECIFIED" && Number.isNaN(Number(name)))
      .map((name) => [name, name]),
  ),
) as { readonly [Name in RegisteredReason]: Name };

/** What is wrong with one field of a request. `field` is its path in proto spelling, e.g. `spec.lora.rank`. */
export interface FieldViolation {
  readonly field: string;
  readonly description: string;
  readonly reason: string;
}

/** The parts of an error beside its message; those that are not given have the defaults of the class. */
export interface ErrorParts {
  readonly reason?: string | undefined;
  readonly metadata?: Readonly<Record<string, string>> | undefined;
  readonly violations?: readonly FieldViolation[] | undefined;
  readonly retryAfterSeconds?: number | undefined;
  readonly cause?: unknown;
}

/**
 * Anything that a Luthier service refuses or fails to do.
 *
 * `reason` is a registered `Reason` (or one that a newer service knows), `metadata` the dynamic parts of the message,
 * `violations` the fields that are wrong, `retryAfterSeconds` how long to wait before the same call may succeed
 * (undefined: it is not said).
 */
export class LuthierError extends Error {
  /** Name of the gRPC status code. */
  static readonly code: string = "UNKNOWN";
  /** The reason of an error whose service gave none. */
  static readonly defaultReason: string = Reason.INTERNAL;

  readonly code: string;
  readonly reason: string;
  readonly metadata: Readonly<Record<string, string>>;
  readonly violations: readonly FieldViolation[];
  readonly retryAfterSeconds: number | undefined;

  constructor(message: string, parts: ErrorParts = {}) {
    super(message, parts.cause === undefined ? undefined : { cause: parts.cause });
    const kind = new.target;
    this.name = kind.name;
    this.code = kind.code;
    this.reason = parts.reason ?? kind.defaultReason;
    this.metadata = Object.freeze({ ...parts.metadata });
    this.violations = Object.freeze([...(parts.violations ?? [])]);
    this.retryAfterSeconds = parts.retryAfterSeconds;
  }
}

/** The request is wrong whatever the state of the service: change it before calling again. */
export class InvalidArgument extends LuthierError {
  static override readonly code = "INVALID_ARGUMENT";
  static override readonly defaultReason = Reason.INVALID_FIELD;

  /** The error for one wrong field. */
  static ofField(field: string, description: string): InvalidArgument {
    const violation = { field, description, reason: Reason.INVALID_FIELD };
    return new InvalidArgument(`${field}: ${description}`, { violations: [violation] });
  }
}

/** There is no such resource. */
export class NotFound extends LuthierError {
  static override readonly code = "NOT_FOUND";
  static override readonly defaultReason = Reason.RESOURCE_NOT_FOUND;
}

/** A resource of this name exists already. */
export class AlreadyExists extends LuthierError {
  static override readonly code = "ALREADY_EXISTS";
  static override readonly defaultReason = Reason.RESOURCE_EXISTS;
}

/** The resource is not in a state that allows the call. */
export class FailedPrecondition extends LuthierError {
  static override readonly code = "FAILED_PRECONDITION";
  static override readonly defaultReason = Reason.WRONG_STATE;
}

/** Somebody else changed the resource in between: read it again, then repeat the whole change. */
export class Aborted extends LuthierError {
  static override readonly code = "ABORTED";
  static override readonly defaultReason = Reason.ETAG_MISMATCH;
}

/** A position lies beyond what exists (or exists no longer). */
export class OutOfRange extends LuthierError {
  static override readonly code = "OUT_OF_RANGE";
  static override readonly defaultReason = Reason.VALUE_OUT_OF_RANGE;
}

/** The caller is known and may not do this. */
export class PermissionDenied extends LuthierError {
  static override readonly code = "PERMISSION_DENIED";
  static override readonly defaultReason = Reason.PERMISSION_DENIED;
}

/** The caller did not say who it is, or its credentials are not valid. */
export class Unauthenticated extends LuthierError {
  static override readonly code = "UNAUTHENTICATED";
  static override readonly defaultReason = Reason.CREDENTIALS_INVALID;
}

/** A limit or quota is used up; with `retryAfterSeconds` the same call may succeed later. */
export class ResourceExhausted extends LuthierError {
  static override readonly code = "RESOURCE_EXHAUSTED";
  static override readonly defaultReason = Reason.OVERLOADED;
}

/** The service cannot be reached or is stopping. The same call may be made again. */
export class Unavailable extends LuthierError {
  static override readonly code = "UNAVAILABLE";
  static override readonly defaultReason = Reason.SERVICE_UNAVAILABLE;
}

/** The deadline passed; whether the call took effect is not known. */
export class DeadlineExceeded extends LuthierError {
  static override readonly code = "DEADLINE_EXCEEDED";
  static override readonly defaultReason = Reason.DEADLINE_EXCEEDED;
}

/** The call or the job was cancelled; `cause` is the reason of the signal, where one did it. */
export class Cancelled extends LuthierError {
  static override readonly code = "CANCELLED";
  static override readonly defaultReason = Reason.CANCELLED_BY_USER;
}

/** Stored bytes are missing or are not what was stored. */
export class DataLoss extends LuthierError {
  static override readonly code = "DATA_LOSS";
  static override readonly defaultReason = Reason.DATA_CORRUPTED;
}

/** A fault of the service. The metadata's `request_id` finds it in the service's log. */
export class Internal extends LuthierError {
  static override readonly code = "INTERNAL";
  static override readonly defaultReason = Reason.INTERNAL;
}

/** The service does not know this method. */
export class Unimplemented extends LuthierError {
  static override readonly code = "UNIMPLEMENTED";
  static override readonly defaultReason = Reason.METHOD_UNIMPLEMENTED;
}

/** The class of each gRPC status code; one that is not here (2, UNKNOWN) is a plain `LuthierError`. */
export const BY_CODE: ReadonlyMap<number, typeof LuthierError> = new Map<number, typeof LuthierError>([
  [Code.Canceled, Cancelled],
  [Code.InvalidArgument, InvalidArgument],
  [Code.DeadlineExceeded, DeadlineExceeded],
  [Code.NotFound, NotFound],
  [Code.AlreadyExists, AlreadyExists],
  [Code.PermissionDenied, PermissionDenied],
  [Code.ResourceExhausted, ResourceExhausted],
  [Code.FailedPrecondition, FailedPrecondition],
  [Code.Aborted, Aborted],
  [Code.OutOfRange, OutOfRange],
  [Code.Unimplemented, Unimplemented],
  [Code.Internal, Internal],
  [Code.Unavailable, Unavailable],
  [Code.DataLoss, DataLoss],
  [Code.Unauthenticated, Unauthenticated],
]);
