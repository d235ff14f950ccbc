/** A client for Node: gRPC over HTTP/2, its configuration found as the Python client finds it. */

import { createConnection } from "node:net";
import { createGrpcTransport, Http2SessionManager } from "@connectrpc/connect-node";
import { isLoopbackAddress, isSecureAddress } from "./addresses.js";
import { Client, type ClientOptions } from "./client.js";
import { type ConfigArguments, readConfig } from "./config.js";
import { InvalidArgument } from "./errors.js";
import type { Transports } from "./scope.js";

export { type Config, type ConfigArguments, readConfig } from "./config.js";
export { type DownloadOptions, download } from "./downloads.js";
export { fileSource } from "./file-source.js";
export * from "./index.js";

/** What `connect` may be told; for the rest the environment and the home of `luthierd up` say it. */
export interface NodeOptions extends ConfigArguments, Pick<ClientOptions, "headers" | "retry"> {}

const MAX_MESSAGE_BYTES = 64 * 1024 * 1024;
/**
 * A watch may be quiet for 15 s; a peer that vanished without a word is found out after 50 s. A peer on a busy machine
 * may take seconds to answer a ping: as long as gRPC's own clients wait for one by default.
 */
const PINGS = { pingIntervalMs: 30_000, pingTimeoutMs: 20_000 };

/**
 * Return a client that speaks gRPC. Nothing is sent before the first call.
 *
 * Throws InvalidArgument where the configuration is wrong or an address is neither loopback nor https, Unauthenticated
 * where there is no API key.
 */
export function connect(options: NodeOptions = {}): Client {
  const config = readConfig(options);
  const sessions = {
    data: session(config.dataAddress),
    training: session(config.trainingAddress),
    evaluation: session(config.evaluationAddress),
  };
  return new Client({
    transports: transports(sessions),
    project: config.project,
    timeoutSeconds: config.timeoutSeconds,
    retry: options.retry,
    headers: { ...options.headers, authorization: `Bearer ${config.apiKey}` },
    onClose: () => {
      for (const one of Object.values(sessions)) {
        one.abort();
      }
    },
  });
}

function transports(sessions: Record<keyof Transports, Http2SessionManager>): Transports {
  const over = (sessionManager: Http2SessionManager): Transports["data"] =>
    createGrpcTransport({
      baseUrl: sessionManager.authority,
      sessionManager,
      readMaxBytes: MAX_MESSAGE_BYTES,
    });
  return {
    data: over(sessions.data),
    training: over(sessions.training),
    evaluation: over(sessions.evaluation),
  };
}

function session(address: string): Http2SessionManager {
  if (isSecureAddress(address)) {
    return new Http2SessionManager(address, PINGS);
  }
  if (address.startsWith("unix:")) {
    const path = address.slice("unix:".length);
    return new Http2SessionManager("http://localhost", PINGS, {
      createConnection: () => createConnection(path),
    });
  }
  if (!isLoopbackAddress(address)) {
    throw new InvalidArgument(
      `address must be host:port on loopback, unix:/path or https://host:port, got '${address}':` +
        " the API key would travel in the clear, or where nobody meant it to",
      { metadata: { address } },
    );
  }
  return new Http2SessionManager(`http://${address}`, PINGS);
}
