/** A client for browsers: gRPC-Web, over `fetch`, to one origin that passes calls on to the services. */

import { Code, ConnectError } from "@connectrpc/connect";
import { createGrpcWebTransport } from "@connectrpc/connect-web";
import { checkedBaseUrl, checkedKey } from "./addresses.js";
import { Client, type ClientOptions, type TransportOptions } from "./client.js";

export * from "./index.js";

/** Where the services are, and who calls. */
export interface WebOptions extends Omit<ClientOptions, "canSend" | "transports">, TransportOptions {
  /**
   * The origin, and if need be path, that passes calls on, e.g. `https://luthier.example.org`. With a key, or a header
   * `authorization`, it must be https or on loopback.
   */
  readonly baseUrl: string;
  /** Sent as a bearer token; leave it out where a cookie says who calls. */
  readonly apiKey?: string;
  /** In place of the global `fetch`, e.g. one that sends cookies to another origin. */
  readonly fetch?: typeof globalThis.fetch;
}

/**
 * Return a client that speaks gRPC-Web.
 *
 * gRPC-Web has no client streams, so `datasets.upload` throws Unimplemented; all else is as over gRPC. Throws
 * InvalidArgument where the URL is none, or the key would travel in the clear or has characters that cannot travel.
 */
export function connect(options: WebOptions): Client {
  const { baseUrl, apiKey, fetch, headers, interceptors = [], ...rest } = options;
  const sent = { ...headers, ...(apiKey && { authorization: `Bearer ${checkedKey(apiKey)}` }) };
  const carriesSecret = Object.keys(sent).some((name) => name.toLowerCase() === "authorization");
  const transport = createGrpcWebTransport({
    baseUrl: checkedBaseUrl(baseUrl, carriesSecret),
    fetch: tellingOfLosses(fetch),
    interceptors: [...interceptors],
  });
  return new Client({
    ...rest,
    canSend: false,
    transports: { data: transport, training: transport, evaluation: transport },
    headers: sent,
  });
}

/**
 * A `fetch` that calls a lost connection Unavailable.
 *
 * Each browser has other words for it, but it is a TypeError in all of them, of `fetch` and of its body.
 */
function tellingOfLosses(fetch: typeof globalThis.fetch | undefined): typeof globalThis.fetch {
  return async (...request) => {
    let response: Response;
    try {
      response = await (fetch ?? globalThis.fetch)(...request);
    } catch (error) {
      throw lossOf(error);
    }
    const { body, status, statusText, headers } = response;
    return body === null ? response : new Response(tellingBody(body), { status, statusText, headers });
  };
}

function tellingBody(body: ReadableStream<Uint8Array>): ReadableStream<Uint8Array<ArrayBuffer>> {
  const reader = body.getReader();
  return new ReadableStream(
    {
      async pull(controller) {
        try {
          const piece = await reader.read();
          if (piece.done) {
            controller.close();
          } else {
            controller.enqueue(piece.value as Uint8Array<ArrayBuffer>);
          }
        } catch (error) {
          controller.error(lossOf(error));
        }
      },
      cancel: (reason) => reader.cancel(reason),
    },
    // What nobody has asked for is not read ahead.
    { highWaterMark: 0 },
  );
}

function lossOf(error: unknown): unknown {
  return error instanceof TypeError
    ? new ConnectError(error.message, Code.Unavailable, undefined, undefined, error)
    : error;
}
