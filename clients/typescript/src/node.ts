/** A client for Node: gRPC over HTTP/2, its configuration found as the Python client finds it. */

import { createConnection } from "node:net";
import { createGrpcTransport } from "@connectrpc/connect-node";
import { isLoopbackAddress, isSecureAddress } from "./addresses.js";
import { Client, type ClientOptions, type TransportOptions } from "./client.js";
import { type ConfigArguments, readConfig } from "./config.js";
import { InvalidArgument } from "./errors.js";
import type { Transports } from "./scope.js";
import { type Pings, Sessions } from "./sessions.js";

export { type Config, type ConfigArguments, readConfig } from "./config.js";
export { type DownloadOptions, download } from "./downloads.js";
export { fileSource } from "./file-source.js";
export * from "./index.js";

/** How a service that vanished without a word is found out. Its calls fail with Unavailable then, and are made again. */
export interface Keepalive {
  /** How long nothing may come before a service is asked whether it is there (default: 30; services want at least 10). */
  readonly intervalSeconds?: number;
  /** How long its answer may take, or a connection to be open (default: 20). */
  readonly timeoutSeconds?: number;
}

/** What `connect` may be told; for the rest the environment and the home of `luthierd up` say it. */
export interface NodeOptions
  extends ConfigArguments,
    Pick<ClientOptions, "headers" | "retry">,
    TransportOptions {
  readonly keepalive?: Keepalive | undefined;
}

const MAX_MESSAGE_BYTES = 64 * 1024 * 1024;
/** A watch may be quiet for 15 s. */
const INTERVAL_SECONDS = 30;
/** A peer on a busy machine may take seconds: as long as gRPC's own clients wait by default. */
const TIMEOUT_SECONDS = 20;
/** A day: Node's timers count 24. */
const MAX_SECONDS = 86_400;

/**
 * Return a client that speaks gRPC. Nothing is sent before the first call.
 *
 * Throws InvalidArgument where the configuration is wrong or an address is neither loopback nor https, Unauthenticated
 * where there is no API key.
 */
export function connect(options: NodeOptions = {}): Client {
  const config = readConfig(options);
  const pings = pingsOf(options.keepalive);
  const sessions = {
    data: sessionsTo(config.dataAddress, pings),
    training: sessionsTo(config.trainingAddress, pings),
    evaluation: sessionsTo(config.evaluationAddress, pings),
  };
  return new Client({
    transports: transports(sessions, options),
    project: config.project,
    timeoutSeconds: config.timeoutSeconds,
    retry: options.retry,
    headers: { ...options.headers, authorization: `Bearer ${config.apiKey}` },
    onClose: () => {
      for (const one of Object.values(sessions)) {
        one.close();
      }
    },
  });
}

function transports(
  sessions: Record<keyof Transports, Sessions>,
  { interceptors = [] }: TransportOptions,
): Transports {
  const over = (sessionManager: Sessions): Transports["data"] =>
    createGrpcTransport({
      baseUrl: sessionManager.authority,
      sessionManager,
      readMaxBytes: MAX_MESSAGE_BYTES,
      interceptors: [...interceptors],
    });
  return {
    data: over(sessions.data),
    training: over(sessions.training),
    evaluation: over(sessions.evaluation),
  };
}

function pingsOf({ intervalSeconds, timeoutSeconds }: Keepalive = {}): Pings {
  return {
    intervalMs: 1000 * positive("keepalive.intervalSeconds", intervalSeconds ?? INTERVAL_SECONDS),
    timeoutMs: 1000 * positive("keepalive.timeoutSeconds", timeoutSeconds ?? TIMEOUT_SECONDS),
  };
}

function positive(field: string, seconds: number): number {
  if (!(seconds > 0 && seconds <= MAX_SECONDS)) {
    throw InvalidArgument.ofField(
      field,
      `must be a number of seconds above 0, at most ${MAX_SECONDS}, got ${seconds}`,
    );
  }
  return seconds;
}

function sessionsTo(address: string, pings: Pings): Sessions {
  if (isSecureAddress(address)) {
    return new Sessions(address, pings);
  }
  if (address.startsWith("unix:")) {
    const path = address.slice("unix:".length);
    return new Sessions("http://localhost", pings, { createConnection: () => createConnection(path) });
  }
  if (!isLoopbackAddress(address)) {
    throw new InvalidArgument(
      `address must be host:port on loopback, unix:/path or https://host:port, got '${address}':` +
        " the API key would travel in the clear, or where nobody meant it to",
      { metadata: { address } },
    );
  }
  return new Sessions(`http://${address}`, pings);
}
