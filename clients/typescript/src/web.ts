/** A client for browsers: gRPC-Web, over `fetch`, to one origin that passes calls on to the services. */

import { createGrpcWebTransport } from "@connectrpc/connect-web";
import { Client, type ClientOptions } from "./client.js";

export * from "./index.js";

/** Where the services are, and who calls. */
export interface WebOptions extends Omit<ClientOptions, "canSend" | "transports"> {
  /** The origin, and if need be path, that passes calls on, e.g. `https://luthier.example.org`. */
  readonly baseUrl: string;
  /** Sent as a bearer token; leave it out where a cookie says who calls. */
  readonly apiKey?: string;
  /** In place of the global `fetch`, e.g. one that sends cookies to another origin. */
  readonly fetch?: typeof globalThis.fetch;
}

/**
 * Return a client that speaks gRPC-Web.
 *
 * gRPC-Web has no client streams, so `datasets.upload` throws Unimplemented; all else is as over gRPC.
 */
export function connect(options: WebOptions): Client {
  const { baseUrl, apiKey, fetch, headers, ...rest } = options;
  const transport = createGrpcWebTransport({ baseUrl, ...(fetch && { fetch }) });
  return new Client({
    ...rest,
    canSend: false,
    transports: { data: transport, training: transport, evaluation: transport },
    headers: { ...headers, ...(apiKey && { authorization: `Bearer ${apiKey}` }) },
  });
}
