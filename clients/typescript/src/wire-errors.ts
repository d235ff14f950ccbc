/** From what the transport throws, and from what failed resources hold, to the error tree. */

import { type DescMessage, fromBinary, type MessageShape } from "@bufbuild/protobuf";
import { Code, ConnectError } from "@connectrpc/connect";
import { BY_CODE, Cancelled, LuthierError, Unavailable } from "./errors.js";
import {
  type BadRequest_FieldViolation,
  BadRequestSchema,
  ErrorInfoSchema,
  RetryInfoSchema,
} from "./gen/google/rpc/error_details_pb.js";
import type { Status } from "./gen/google/rpc/status_pb.js";

/** A detail of a status: the full name of its type, and its bytes. */
interface Detail {
  readonly type: string;
  readonly value: Uint8Array;
}

const REQUEST_ID = "x-request-id";
/** How a connection that broke off may look: none of these codes comes from a service without a status. */
const BROKEN: ReadonlySet<Code> = new Set([Code.Unavailable, Code.Aborted, Code.Canceled]);
const BROKEN_WORDS =
  /missing (trailer|status|output message)|premature|stream closed|fetch failed|session|socket/i;
const NODE_CODE = /^(E[A-Z]+|(ERR_HTTP2|ERR_TLS|ERR_SSL|UND_ERR|DEPTH|SELF_SIGNED|CERT|UNABLE_TO)_\w+)$/;

/**
 * Return the error that the service raised, or what became of a call that it did not answer.
 *
 * A status without details, as proxies send, becomes the class of its code with that class's default reason. The
 * metadata has the id of the request, where the service told it. A connection that breaks off is `Unavailable`, however
 * the transport calls it, and a call whose `signal` was aborted is `Cancelled`.
 */
export function fromCallError(thrown: unknown, signal: AbortSignal): LuthierError {
  if (thrown instanceof LuthierError) {
    return thrown;
  }
  if (signal.aborted) {
    return cancelledBy(signal);
  }
  const error = ConnectError.from(thrown);
  const isTold = error.metadata.has("grpc-status") || error.details.length > 0;
  if (!isTold && isBroken(error)) {
    return new Unavailable(`the service cannot be reached: ${error.rawMessage}`, { cause: error });
  }
  const details = error.details.flatMap((detail) => ("value" in detail && "type" in detail ? [detail] : []));
  const requestId = error.metadata.get(REQUEST_ID);
  return toError(error.code, error.rawMessage, details as Detail[], {
    metadata: requestId ? { request_id: requestId } : {},
    cause: error,
  });
}

/** The error of a call whose signal was aborted. */
export function cancelledBy(signal: AbortSignal): Cancelled {
  return new Cancelled("the call was cancelled", { cause: signal.reason });
}

/** Read what ended the work on a resource, or on a part of it: the `error` of a grade, an answer or a job, what it is `waiting` for. */
export function errorOf(status: Status): LuthierError {
  const details = status.details.map((detail) => ({
    type: detail.typeUrl.slice(detail.typeUrl.lastIndexOf("/") + 1),
    value: detail.value,
  }));
  return toError(status.code, status.message, details, { metadata: {}, cause: undefined });
}

function isBroken(error: ConnectError): boolean {
  if (BROKEN.has(error.code)) {
    return true;
  }
  const isUnclear = error.code === Code.Internal || error.code === Code.Unknown;
  return isUnclear && (BROKEN_WORDS.test(error.rawMessage) || hasNodeCode(error.cause));
}

/** Whether the cause is an error of Node's sockets, HTTP/2 sessions or certificates. */
function hasNodeCode(cause: unknown): boolean {
  if (!(cause instanceof Error)) {
    return false;
  }
  const code = "code" in cause ? String(cause.code) : "";
  return NODE_CODE.test(code) || hasNodeCode(cause.cause);
}

interface Told {
  readonly metadata: Readonly<Record<string, string>>;
  readonly cause: unknown;
}

/** Build an error. Details that are of another kind, or mangled, are as if they had not been sent. */
function toError(code: number, message: string, details: readonly Detail[], told: Told): LuthierError {
  const info = read(details, ErrorInfoSchema);
  const bad = read(details, BadRequestSchema);
  const delay = read(details, RetryInfoSchema)?.retryDelay;
  const kind = BY_CODE.get(code) ?? LuthierError;
  return new kind(message || kind.code, {
    reason: info?.reason || undefined,
    metadata: { ...told.metadata, ...info?.metadata },
    violations: bad?.fieldViolations.map(violation) ?? [],
    retryAfterSeconds: delay && Math.max(0, Number(delay.seconds) + delay.nanos / 1e9),
    cause: told.cause,
  });
}

function violation(told: BadRequest_FieldViolation): { field: string; description: string; reason: string } {
  return { field: told.field, description: told.description, reason: told.reason || "INVALID_FIELD" };
}

function read<S extends DescMessage>(details: readonly Detail[], schema: S): MessageShape<S> | undefined {
  let found: MessageShape<S> | undefined;
  for (const detail of details) {
    if (detail.type === schema.typeName) {
      found = parsed(schema, detail.value) ?? found;
    }
  }
  return found;
}

function parsed<S extends DescMessage>(schema: S, bytes: Uint8Array): MessageShape<S> | undefined {
  try {
    return fromBinary(schema, bytes);
  } catch {
    return undefined;
  }
}
