/** A real gRPC server over HTTP/2 whose answers are written by each test. */

import { createServer, type Http2Server, type ServerHttp2Session } from "node:http2";
import type { AddressInfo } from "node:net";
import type { DescService } from "@bufbuild/protobuf";
import { Code, ConnectError, type ConnectRouter, type HandlerContext } from "@connectrpc/connect";
import { connectNodeAdapter } from "@connectrpc/connect-node";
import type { Client, ClientOptions } from "#dist/client.js";
import { BadRequestSchema, ErrorInfoSchema, RetryInfoSchema } from "#dist/gen/google/rpc/error_details_pb.js";
import { DataService } from "#dist/gen/luthier/v1/data_service_pb.js";
import { EvaluationService } from "#dist/gen/luthier/v1/evaluation_service_pb.js";
import { ModelService } from "#dist/gen/luthier/v1/model_service_pb.js";
import { TrainingService } from "#dist/gen/luthier/v1/training_service_pb.js";
import { connect } from "#dist/node.js";

export const API_KEY = "test-key";
export const UID = "0b9c1d7e-1111-4222-8333-444455556666";
export const SERVICES: readonly DescService[] = [
  DataService,
  ModelService,
  TrainingService,
  EvaluationService,
];

// biome-ignore lint/suspicious/noExplicitAny: an answer takes and gives the messages of its own method.
export type Answer = (request: any, context: HandlerContext) => any;

/** How a service refuses. */
export interface Refusal {
  readonly reason?: string;
  readonly metadata?: Record<string, string>;
  readonly violations?: readonly { field: string; description: string }[];
  readonly retryAfterSeconds?: number;
  readonly headers?: Record<string, string>;
}

/** The error that ends a call as a Luthier service does. */
export function refusal(code: Code, message: string, told: Refusal = {}): ConnectError {
  const { reason, metadata = {}, violations, retryAfterSeconds, headers } = told;
  const error = new ConnectError(message, code, headers);
  if (reason !== undefined) {
    error.details.push({ desc: ErrorInfoSchema, value: { reason, domain: "luthier", metadata } });
  }
  if (violations !== undefined) {
    const fieldViolations = violations.map((one) => ({ ...one, reason: "INVALID_FIELD" }));
    error.details.push({ desc: BadRequestSchema, value: { fieldViolations } });
  }
  if (retryAfterSeconds !== undefined) {
    const seconds = Math.floor(retryAfterSeconds);
    const nanos = Math.round((retryAfterSeconds - seconds) * 1e9);
    error.details.push({ desc: RetryInfoSchema, value: { retryDelay: { seconds: BigInt(seconds), nanos } } });
  }
  return error;
}

/** The service is going away. */
export function stopping(): ConnectError {
  return refusal(Code.Unavailable, "stopping", { reason: "SHUTTING_DOWN" });
}

/** All four services on one port. Methods answer with what the test put into `answers`. */
export class ScriptedServices {
  readonly answers: Record<string, Answer> = {};
  /** What came in, by method. */
  readonly calls: Record<string, number> = {};
  /** What was sent along with the last call of each method. */
  readonly headers: Record<string, Headers> = {};
  address = "";
  private server: Http2Server | undefined;
  private readonly sessions = new Set<ServerHttp2Session>();

  constructor() {
    for (const name of [
      "getDatasetVersion",
      "getRendering",
      "getModel",
      "getFineTuningJob",
      "getEvaluation",
    ]) {
      this.answers[name] = (request) => ({ name: request.name, uid: UID });
    }
  }

  /** Serve; after `stop` on the same port as before. */
  async start(): Promise<void> {
    const server = createServer(connectNodeAdapter({ routes: (router) => this.routes(router) }));
    server.on("session", (session) => {
      this.sessions.add(session);
      session.on("close", () => this.sessions.delete(session));
    });
    const port = this.address === "" ? 0 : Number(this.address.split(":")[1]);
    await new Promise<void>((resolve) => server.listen(port, "127.0.0.1", resolve));
    this.address = `127.0.0.1:${(server.address() as AddressInfo).port}`;
    this.server = server;
  }

  /** End at once: running calls are broken off. */
  async stop(): Promise<void> {
    this.breakConnections();
    await new Promise((resolve) => this.server?.close(resolve));
  }

  /** Drop all connections without a word, as a machine does that loses its network. */
  breakConnections(): void {
    for (const session of this.sessions) {
      session.destroy();
    }
  }

  /** Register what answers, for any adapter of connect-es. */
  routes(router: ConnectRouter): void {
    for (const service of SERVICES) {
      const methods = service.methods.map((method) => {
        const streams = method.methodKind === "server_streaming";
        return [method.localName, this.handler(method.localName, streams)];
      });
      router.service(service, Object.fromEntries(methods));
    }
  }

  count(method: string): number {
    return this.calls[method] ?? 0;
  }

  private handler(name: string, streams: boolean): Answer {
    const answer: Answer = (request, context) => {
      this.calls[name] = this.count(name) + 1;
      this.headers[name] = context.requestHeader;
      const found = this.answers[name];
      if (found === undefined) {
        throw new ConnectError(`the test does not answer ${name}`, Code.Unimplemented);
      }
      return found(request, context);
    };
    return streams
      ? async function* (request, context) {
          yield* answer(request, context);
        }
      : answer;
  }
}

/** Services that are running, and a client of them that is quick to try again. */
export interface Stage extends AsyncDisposable {
  readonly services: ScriptedServices;
  readonly client: Client;
}

/** Start services and a client; both end with the block that has them. */
export async function stage(options: Partial<ClientOptions> = {}): Promise<Stage> {
  const services = new ScriptedServices();
  await services.start();
  const client = clientOf(services, options);
  return {
    services,
    client,
    async [Symbol.asyncDispose]() {
      client.close();
      await services.stop();
    },
  };
}

/** A client of scripted services. */
export function clientOf(services: ScriptedServices, options: Partial<ClientOptions> = {}): Client {
  return connect({
    apiKey: API_KEY,
    dataAddress: services.address,
    trainingAddress: services.address,
    evaluationAddress: services.address,
    timeoutSeconds: options.timeoutSeconds ?? 5,
    retry: { initialSeconds: 0.01, maxSeconds: 0.05, deadlineSeconds: 5, ...options.retry },
    ...(options.project && { project: options.project }),
  });
}

/** All items of a stream. */
export async function all<T>(stream: AsyncIterable<T>): Promise<T[]> {
  const items: T[] = [];
  for await (const item of stream) {
    items.push(item);
  }
  return items;
}

/** What a promise, or a stream that is read to its end, is rejected with. */
export async function thrown<E extends Error>(
  kind: abstract new (...parts: never[]) => E,
  doing: Promise<unknown> | AsyncIterable<unknown>,
): Promise<E> {
  try {
    await (doing instanceof Promise ? doing : all(doing));
  } catch (error) {
    if (error instanceof kind) {
      return error;
    }
    throw error;
  }
  throw new Error(`expected ${kind.name}, and nothing was thrown`);
}

/** A promise that is kept by hand. */
export class Signal {
  readonly promise: Promise<void>;
  set: () => void = () => undefined;

  constructor() {
    this.promise = new Promise((resolve) => {
      this.set = resolve;
    });
  }
}
