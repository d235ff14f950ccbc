/** The client, whatever its transport. */

import type { MessageInitShape } from "@bufbuild/protobuf";
import type { Interceptor } from "@connectrpc/connect";
import { Aliases } from "./aliases.js";
import { Datasets } from "./datasets.js";
import { Evaluations, type GenerateOptions, generate, type Prompt } from "./evaluations.js";
import type {
  GenerateTextRequestSchema,
  GenerateTextResponse,
} from "./gen/luthier/v1/evaluation_service_pb.js";
import { Jobs } from "./jobs.js";
import { Models } from "./models.js";
import { Renderings } from "./renderings.js";
import { DEFAULT_RETRY, type RetryPolicy } from "./retry.js";
import { Scope, type Transports } from "./scope.js";

/** Everything that a client is told. */
export interface ClientOptions {
  /** How each service is reached. */
  readonly transports: Transports;
  /** The project that short names belong to (default: `default`). */
  readonly project?: string | undefined;
  /** Bounds one attempt of a unary call (default: 30). */
  readonly timeoutSeconds?: number | undefined;
  /** What is not said of it is as in `DEFAULT_RETRY`. */
  readonly retry?: Partial<RetryPolicy> | undefined;
  /** Whether the transports can stream to a service, as uploads do (default: yes). */
  readonly canSend?: boolean | undefined;
  /** Sent with every call, e.g. `{ authorization: "Bearer ..." }`. */
  readonly headers?: Readonly<Record<string, string>> | undefined;
  /** Called once, when the client is closed and its calls have been ended. */
  readonly onClose?: (() => void) | undefined;
}

/** What `connect` adds to the transports that it makes. */
export interface TransportOptions {
  /**
   * What goes around every attempt of a call, the first of them outermost: it may set headers that differ from call to
   * call, such as the `traceparent` by which a trace goes on at the service.
   */
  readonly interceptors?: readonly Interceptor[] | undefined;
}

/** The bound of one attempt of a unary call where none is said. */
export const DEFAULT_TIMEOUT_SECONDS = 30;
/** The project where none is said. */
export const DEFAULT_PROJECT = "default";

/**
 * Talks to the three services over any transports of connect-es.
 *
 * `connect` of luthier-client/node makes one that speaks gRPC, `connect` of luthier-client/web one that speaks gRPC-Web.
 * Nothing is sent before the first call. Close it, or declare it with `using`.
 */
export class Client {
  readonly datasets: Datasets;
  readonly renderings: Renderings;
  readonly models: Models;
  readonly jobs: Jobs;
  readonly evaluations: Evaluations;
  readonly aliases: Aliases;
  /** For the other entries of this package. */
  readonly scope: Scope;
  private readonly closing = new AbortController();
  private readonly onClose: (() => void) | undefined;

  constructor(options: ClientOptions) {
    this.onClose = options.onClose;
    this.scope = new Scope({
      transports: options.transports,
      project: options.project ?? DEFAULT_PROJECT,
      timeoutSeconds: options.timeoutSeconds ?? DEFAULT_TIMEOUT_SECONDS,
      retry: { ...DEFAULT_RETRY, ...options.retry },
      canSend: options.canSend ?? true,
      headers: options.headers ?? {},
      signal: this.closing.signal,
    });
    this.datasets = new Datasets(this.scope);
    this.renderings = new Renderings(this.scope);
    this.models = new Models(this.scope);
    this.jobs = new Jobs(this.scope);
    this.evaluations = new Evaluations(this.scope);
    this.aliases = new Aliases(this.scope);
  }

  /**
   * Stream an answer piece by piece; leaving the loop stops the generation.
   *
   * A string is continued as it is; chat messages go through the model's chat template. In place of the model a whole
   * request may be given; what is said beside it wins.
   */
  generate(
    model: string | MessageInitShape<typeof GenerateTextRequestSchema>,
    prompt?: Prompt,
    options: GenerateOptions = {},
  ): AsyncGenerator<GenerateTextResponse, void, undefined> {
    return generate(this.scope.of(options), model, prompt, options);
  }

  /** End running calls, which throw `Cancelled`, and close the connections. */
  close(): void {
    if (!this.closing.signal.aborted) {
      this.closing.abort(new Error("the client was closed"));
      this.onClose?.();
    }
  }

  [Symbol.dispose](): void {
    this.close();
  }
}
