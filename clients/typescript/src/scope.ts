/** What calls are made with, and the calls themselves: one attempt each, in `flows.ts` over and over. */

import {
  create,
  type DescMessage,
  type DescMethodClientStreaming,
  type DescMethodServerStreaming,
  type DescMethodUnary,
  type MessageInitShape,
  type MessageShape,
} from "@bufbuild/protobuf";
import type { StreamResponse, Transport } from "@connectrpc/connect";
import { DataLoss } from "./errors.js";
import { DataService } from "./gen/luthier/v1/data_service_pb.js";
import { EvaluationService } from "./gen/luthier/v1/evaluation_service_pb.js";
import { Backoff, monotonicSeconds, type RetryPolicy } from "./retry.js";
import { cancelledBy, fromCallError } from "./wire-errors.js";

/** A transport of connect-es to each service: gRPC, gRPC-Web, or one of a test. */
export interface Transports {
  readonly data: Transport;
  /** The training service, and with it models. */
  readonly training: Transport;
  readonly evaluation: Transport;
}

/** What every method takes last. */
export interface CallOptions {
  /** Ends the call with `Cancelled`; the service is told. */
  readonly signal?: AbortSignal | undefined;
}

/** What a scope is made of. */
export interface ScopeParts {
  readonly transports: Transports;
  readonly project: string;
  /** Bounds one attempt of a unary call. */
  readonly timeoutSeconds: number;
  readonly retry: RetryPolicy;
  /** Whether the transports can stream to a service, which gRPC-Web cannot. */
  readonly canSend: boolean;
  /** Sent with every call. */
  readonly headers: Readonly<Record<string, string>>;
  readonly signal: AbortSignal;
}

/** A server stream that is open. */
export interface OpenStream<M> {
  /** Wait for the next message; undefined after the last one. */
  receive(): Promise<M | undefined>;
  /** End the call; the server is told. */
  cancel(): void;
}

/** What the calls of a client share, or of one method: then with the signal that its caller gave. */
export class Scope {
  constructor(private readonly parts: ScopeParts) {}

  get project(): string {
    return this.parts.project;
  }

  get timeoutSeconds(): number {
    return this.parts.timeoutSeconds;
  }

  get canSend(): boolean {
    return this.parts.canSend;
  }

  get signal(): AbortSignal {
    return this.parts.signal;
  }

  /** The same, ended by the caller's signal too. */
  of(options: CallOptions): Scope {
    const { signal } = options;
    return signal ? new Scope({ ...this.parts, signal: AbortSignal.any([this.signal, signal]) }) : this;
  }

  /** A fresh count of failures. */
  backoff(): Backoff {
    return new Backoff(this.parts.retry);
  }

  /** Monotonic seconds. */
  now(): number {
    return monotonicSeconds();
  }

  /** Wait. Throws Cancelled as soon as the signal is aborted. */
  async sleep(seconds: number): Promise<void> {
    const { signal } = this;
    if (signal.aborted) {
      throw cancelledBy(signal);
    }
    await new Promise<void>((resolve, reject) => {
      const onAbort = (): void => {
        clearTimeout(timer);
        reject(cancelledBy(signal));
      };
      const timer = setTimeout(() => {
        signal.removeEventListener("abort", onAbort);
        resolve();
      }, seconds * 1000);
      signal.addEventListener("abort", onAbort, { once: true });
    });
  }

  /** Make a unary call, once. */
  async invoke<I extends DescMessage, O extends DescMessage>(
    method: DescMethodUnary<I, O>,
    request: MessageShape<I>,
  ): Promise<MessageShape<O>> {
    const { signal, headers } = this.parts;
    try {
      const init = request as MessageInitShape<I>;
      const transport = this.transport(method);
      return (await transport.unary(method, signal, milliseconds(this.timeoutSeconds), headers, init))
        .message;
    } catch (error) {
      throw fromCallError(error, signal);
    }
  }

  /** Make a client-streaming call, once. Throws what `messages` throws, if it does. */
  async send<I extends DescMessage, O extends DescMessage>(
    method: DescMethodClientStreaming<I, O>,
    messages: AsyncIterable<MessageInitShape<I>>,
    timeoutSeconds: number,
  ): Promise<MessageShape<O>> {
    const { signal, headers } = this.parts;
    const guarded = new Guarded(messages);
    try {
      const timeoutMs = milliseconds(timeoutSeconds);
      const response = await this.transport(method).stream(method, signal, timeoutMs, headers, guarded);
      return await only(response);
    } catch (error) {
      throw guarded.failure ?? fromCallError(error, signal);
    }
  }

  /** Begin a server-streaming call. Without `timeoutSeconds` it has no deadline. */
  open<I extends DescMessage, O extends DescMessage>(
    method: DescMethodServerStreaming<I, O>,
    request: MessageShape<I>,
    timeoutSeconds?: number,
  ): OpenStream<MessageShape<O>> {
    const ending = new AbortController();
    const signal = AbortSignal.any([this.signal, ending.signal]);
    const timeoutMs = timeoutSeconds === undefined ? undefined : milliseconds(timeoutSeconds);
    const { headers } = this.parts;
    const input = once(create(method.input, request as MessageInitShape<I>) as MessageInitShape<I>);
    let messages: AsyncIterator<MessageShape<O>> | undefined;
    return {
      receive: async () => {
        try {
          if (messages === undefined) {
            const response = await this.transport(method).stream(method, signal, timeoutMs, headers, input);
            messages = response.message[Symbol.asyncIterator]();
          }
          const next = await messages.next();
          return next.done === true ? undefined : next.value;
        } catch (error) {
          throw fromCallError(error, signal);
        }
      },
      cancel: () => ending.abort(),
    };
  }

  private transport(method: { readonly parent: { readonly typeName: string } }): Transport {
    const { transports } = this.parts;
    switch (method.parent.typeName) {
      case DataService.typeName:
        return transports.data;
      case EvaluationService.typeName:
        return transports.evaluation;
      default:
        return transports.training;
    }
  }
}

/** Remembers what the messages threw: the transport would tell of a broken call alone. */
class Guarded<T> implements AsyncIterable<T> {
  failure: unknown;

  constructor(private readonly messages: AsyncIterable<T>) {}

  [Symbol.asyncIterator](): AsyncIterator<T> {
    const iterator = this.messages[Symbol.asyncIterator]();
    return {
      next: async () => {
        try {
          return await iterator.next();
        } catch (error) {
          this.failure ??= error;
          throw error;
        }
      },
      return: async (value) => (await iterator.return?.(value)) ?? { done: true, value },
      // What the transport throws in is no failure of the messages.
      throw: async (error) => {
        await iterator.return?.();
        throw error;
      },
    };
  }
}

/** A deadline as it travels: whole milliseconds of at most eight digits. */
function milliseconds(seconds: number): number {
  return Math.min(99_999_999, Math.ceil(seconds * 1000));
}

async function* once<T>(message: T): AsyncGenerator<T> {
  yield message;
}

async function only<I extends DescMessage, O extends DescMessage>(
  response: StreamResponse<I, O>,
): Promise<MessageShape<O>> {
  let found: MessageShape<O> | undefined;
  for await (const message of response.message) {
    found ??= message;
  }
  if (found === undefined) {
    throw new DataLoss(`${response.method.name} ended without an answer`);
  }
  return found;
}
