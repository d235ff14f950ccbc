/** Calls that are made again, lists over all pages, streams that go on where they broke off. */

import {
  clone,
  create,
  type DescMessage,
  type DescMethodServerStreaming,
  type DescMethodUnary,
  type MessageInitShape,
  type MessageShape,
} from "@bufbuild/protobuf";
import { DeadlineExceeded, LuthierError, Reason } from "./errors.js";
import { type Backoff, isRetryable } from "./retry.js";
import type { OpenStream, Scope } from "./scope.js";

/** How lists are asked for. The syntax of `filter` and `orderBy` is that of the API. */
export interface ListOptions {
  readonly filter?: string;
  readonly orderBy?: string;
  /** Items that travel in one call (0: the service decides). */
  readonly pageSize?: number;
  readonly signal?: AbortSignal | undefined;
}

/** Options of lists of what can be deleted. */
export interface ListDeletableOptions extends ListOptions {
  /** Also what is deleted and not purged; a name may then come more than once. */
  readonly showDeleted?: boolean;
}

/**
 * Make a unary call, again while `isRetryable`.
 *
 * A request that takes a request id gets one, the same for all attempts.
 */
export async function call<I extends DescMessage, O extends DescMessage>(
  scope: Scope,
  method: DescMethodUnary<I, O>,
  init: MessageInitShape<I>,
): Promise<MessageShape<O>> {
  const request = withRequestId(method.input, owned(method.input, init));
  const backoff = scope.backoff();
  for (;;) {
    try {
      return await scope.invoke(method, request);
    } catch (error) {
      await waitOrThrow(scope, backoff, error, isRetryable);
    }
  }
}

/** Go through the items of all pages. A page is asked for when the one before is used up. */
export async function* pages<I extends DescMessage, O extends DescMessage, T>(
  scope: Scope,
  method: DescMethodUnary<I, O>,
  init: MessageInitShape<I>,
  items: (page: MessageShape<O>) => Iterable<T>,
): AsyncGenerator<T, void, undefined> {
  const request = owned(method.input, init) as MessageShape<I> & { pageToken: string };
  do {
    const page = await call(scope, method, request as MessageInitShape<I>);
    yield* items(page);
    request.pageToken = (page as MessageShape<O> & { nextPageToken: string }).nextPageToken;
  } while (request.pageToken !== "");
}

/**
 * A server stream that is opened again where it broke off.
 *
 * `requestAt` builds the request for what is still wanted. Time without any message counts against the retry deadline.
 */
export class ResumedStream<I extends DescMessage, O extends DescMessage> {
  private readonly backoff: Backoff;
  private stream: OpenStream<MessageShape<O>> | undefined;

  constructor(
    private readonly scope: Scope,
    private readonly method: DescMethodServerStreaming<I, O>,
    private readonly requestAt: () => MessageInitShape<I>,
    private readonly timeoutSeconds: () => number | undefined = () => undefined,
  ) {
    this.backoff = scope.backoff();
  }

  /** The next message, or undefined when the server has sent all. */
  async receive(): Promise<MessageShape<O> | undefined> {
    for (;;) {
      try {
        this.stream ??= this.scope.open(this.method, this.request(), this.timeoutSeconds());
        const message = await this.stream.receive();
        this.backoff.progressed();
        if (message === undefined) {
          this.close();
        }
        return message;
      } catch (error) {
        this.close();
        await waitOrThrow(this.scope, this.backoff, error, (one) => this.isResumable(one));
      }
    }
  }

  /** End the call that is running, if any. The next `receive` opens another. */
  close(): void {
    this.stream?.cancel();
    this.stream = undefined;
  }

  private isResumable(error: LuthierError): boolean {
    // A call without a deadline meets that of somebody between, e.g. a proxy, who breaks it off.
    const isBrokenOff = error instanceof DeadlineExceeded && this.timeoutSeconds() === undefined;
    return isBrokenOff || isRetryable(error) || error.reason === Reason.SLOW_READER;
  }

  private request(): MessageShape<I> {
    return create(this.method.input, this.requestAt());
  }
}

/** A copy of a message, or the message that an init describes: the caller's own is never changed. */
export function owned<S extends DescMessage>(schema: S, init: MessageInitShape<S>): MessageShape<S> {
  return clone(schema, create(schema, init));
}

/** Wait until the next attempt; throw `error` when there shall be none. */
export async function waitOrThrow(
  scope: Scope,
  backoff: Backoff,
  error: unknown,
  isTransient: (error: LuthierError) => boolean,
): Promise<void> {
  if (!(error instanceof LuthierError) || !isTransient(error)) {
    throw error;
  }
  await scope.sleep(backoff.delayAfter(error));
}

function withRequestId<S extends DescMessage>(schema: S, request: MessageShape<S>): MessageShape<S> {
  const identified = request as MessageShape<S> & { requestId: string };
  if (schema.field.requestId !== undefined && identified.requestId === "") {
    identified.requestId = crypto.randomUUID();
  }
  return request;
}
