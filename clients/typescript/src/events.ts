/** Watching a resource's numbered events, and waiting for its end. */

import type { DescField, DescMethodServerStreaming, DescMethodUnary, Message } from "@bufbuild/protobuf";
import type { GenMessage } from "@bufbuild/protobuf/codegenv2";
import {
  Cancelled,
  DataLoss,
  DeadlineExceeded,
  type LuthierError,
  NotFound,
  OutOfRange,
  Reason,
} from "./errors.js";
import type { ResourceFailed, Watched } from "./failures.js";
import { call, ResumedStream } from "./flows.js";
import type { Event, EventSchema } from "./gen/luthier/v1/event_pb.js";
import type { Scope } from "./scope.js";
import { errorOf } from "./wire-errors.js";

/** Where to begin a watch. */
export interface WatchOptions {
  /** The number of the first event that is wanted (0: the first there is). */
  readonly startSequence?: bigint | number;
  /** The uid of the resource whose number that is, where another process saw it (empty: of the one of now). */
  readonly uid?: string;
  readonly signal?: AbortSignal | undefined;
}

/** How to wait. */
export interface WaitOptions {
  /** Without it, for ever. */
  readonly timeoutSeconds?: number;
  /** Sees every event from the beginning of the log, one after the other: a promise is waited for. */
  readonly onEvent?: ((event: Event) => void) | ((event: Event) => Promise<void>);
  readonly signal?: AbortSignal | undefined;
}

/** A request for the log of one resource. */
type WatchRequest = Message & { name: string; startSequence: bigint; uid: string };
type ReadRequest = Message & { name: string };

/** How a kind of resource is watched and read, and what is thrown when it does not end well. */
export interface Kind<R extends Watched> {
  readonly watching: DescMethodServerStreaming<GenMessage<WatchRequest>, typeof EventSchema>;
  readonly reading: DescMethodUnary<GenMessage<ReadRequest>, GenMessage<R>>;
  readonly failed: new (resource: R, state: string, failure: LuthierError) => ResourceFailed<R>;
}

const GOOD_STATES: ReadonlySet<string> = new Set(["READY", "SUCCEEDED"]);
const BAD_STATES: ReadonlySet<string> = new Set(["FAILED", "CANCELLED"]);
const POLL_SECONDS = 0.5;

/** Follow the events of a resource until its final state, each once and in order, over any breaks. */
export async function* watch<R extends Watched>(
  scope: Scope,
  kind: Kind<R>,
  name: string,
  options: WatchOptions,
): AsyncGenerator<Event, void, undefined> {
  const uid = options.uid || (await call(scope, kind.reading, { name })).uid;
  const reader = new EventReader(scope, kind, {
    name,
    uid,
    startSequence: BigInt(options.startSequence ?? 0),
  });
  try {
    for (let event = await reader.next(); event !== undefined; event = await reader.next()) {
      yield event;
    }
  } finally {
    reader.close();
  }
}

/**
 * Return the resource once it is READY or SUCCEEDED.
 *
 * Throws the kind's `ResourceFailed` when it FAILED or was CANCELLED, DeadlineExceeded when it was in no final state in
 * time, NotFound RESOURCE_REPLACED when it was deleted meanwhile and its name is another resource's.
 */
export async function wait<R extends Watched>(
  scope: Scope,
  kind: Kind<R>,
  name: string,
  options: WaitOptions,
): Promise<R> {
  const { timeoutSeconds } = options;
  const end = timeoutSeconds === undefined ? undefined : scope.now() + timeoutSeconds;
  const { uid } = await call(scope, kind.reading, { name });
  const left = (): number | undefined => (end === undefined ? undefined : Math.max(0.001, end - scope.now()));
  const reader = new EventReader(scope, kind, { name, uid, startSequence: 0n }, left);
  try {
    for (;;) {
      const isOver = await passEventsOn(scope, reader, options, end);
      const resource = await call(scope, kind.reading, { name });
      requireSame(resource.name, uid, resource.uid);
      const state = stateOf(kind, resource);
      if (GOOD_STATES.has(state)) {
        return resource;
      }
      if (BAD_STATES.has(state)) {
        throw new kind.failed(resource, state, failureOf(resource));
      }
      if (isOver) {
        throw new DeadlineExceeded(`${resource.name} is still ${state} after ${timeoutSeconds} s`);
      }
      // The stream ended although the resource goes on, e.g. because the service is being stopped.
      await scope.sleep(POLL_SECONDS);
    }
  } finally {
    reader.close();
  }
}

/** Whose log is read, and from which number on. */
interface Log {
  readonly name: string;
  readonly uid: string;
  readonly startSequence: bigint;
}

/** Reads a log, each event once, in order, over any breaks; never on in the log of another resource of that name. */
class EventReader<R extends Watched> {
  private last: bigint;
  private beginsAnywhere: boolean;
  private missedAfter: bigint | undefined;
  private readonly stream: ResumedStream<GenMessage<WatchRequest>, typeof EventSchema>;

  constructor(scope: Scope, kind: Kind<R>, log: Log, timeoutSeconds?: () => number | undefined) {
    const { name, uid, startSequence } = log;
    this.last = startSequence > 0n ? startSequence - 1n : 0n;
    this.beginsAnywhere = startSequence <= 0n;
    const requestAt = (): { name: string; uid: string; startSequence: bigint } => {
      return { name, uid, startSequence: this.last + 1n };
    };
    this.stream = new ResumedStream(scope, kind.watching, requestAt, timeoutSeconds);
  }

  /** The next event of the log, or undefined after the last one. Heartbeats are left out. */
  async next(): Promise<Event | undefined> {
    for (;;) {
      let event: Event | undefined;
      try {
        event = await this.stream.receive();
      } catch (error) {
        this.beginLater(error);
        continue;
      }
      if (event === undefined) {
        return undefined;
      }
      const isHeartbeat = event.payload.case === "heartbeat";
      if (event.sequence > this.last + (isHeartbeat ? 0n : 1n)) {
        this.askAgain(event.sequence);
      } else if (event.sequence === this.last + 1n) {
        this.last += 1n;
        this.beginsAnywhere = false;
        return event;
      }
    }
  }

  /** End the running call. */
  close(): void {
    this.stream.close();
  }

  /** Begin where the log does, if it is wanted from its beginning, whatever that is; throw the error otherwise. */
  private beginLater(error: unknown): void {
    const told = error instanceof OutOfRange ? (error.metadata.first_sequence ?? "") : "";
    const first = /^[0-9]{1,18}$/.test(told) ? BigInt(told) : 0n;
    if (!this.beginsAnywhere || first <= this.last + 1n) {
      throw error;
    }
    this.last = first - 1n;
  }

  private askAgain(got: bigint): void {
    this.stream.close();
    if (this.missedAfter === this.last) {
      throw new DataLoss(
        `the stream skips events: expected number ${this.last + 1n}, got ${got}, also when asked again`,
      );
    }
    this.missedAfter = this.last;
  }
}

/** Read to the end of the stream. Returns whether time ran out first. */
async function passEventsOn<R extends Watched>(
  scope: Scope,
  reader: EventReader<R>,
  options: WaitOptions,
  end: number | undefined,
): Promise<boolean> {
  while (end === undefined || scope.now() < end) {
    let event: Event | undefined;
    try {
      event = await reader.next();
    } catch (error) {
      // What is gone is of a resource that has ended. Who asked for no events asks for it alone.
      if (error instanceof OutOfRange && error.metadata.first_sequence !== undefined && !options.onEvent) {
        return false;
      }
      if (!(error instanceof DeadlineExceeded) || end === undefined) {
        throw error;
      }
      // It is somebody else's deadline where time is left, e.g. a proxy's.
      await scope.sleep(Math.max(0, Math.min(POLL_SECONDS, end - scope.now())));
      continue;
    }
    if (event === undefined) {
      return false;
    }
    await options.onEvent?.(event);
  }
  return true;
}

function requireSame(name: string, seen: string, found: string): void {
  if (seen !== found) {
    throw new NotFound(
      `${name} has uid ${found}, and had ${seen} when it was seen first: it was deleted and its name used again`,
      { reason: Reason.RESOURCE_REPLACED, metadata: { name, uid: found } },
    );
  }
}

/** The state of a resource as events name it, e.g. RUNNING. */
function stateOf<R extends Watched>(kind: Kind<R>, resource: R): string {
  const fields: Readonly<Record<string, DescField | undefined>> = kind.reading.output.field;
  const states = fields.state?.enum?.value;
  return states?.[resource.state]?.name.replace(/^STATE_/, "") ?? `STATE ${resource.state}`;
}

function failureOf(resource: Watched): LuthierError {
  return resource.error === undefined ? new Cancelled("it was cancelled") : errorOf(resource.error);
}
