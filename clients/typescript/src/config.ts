/** What a client in Node needs to know, and where it finds it: arguments, then the environment, then defaults. */

import { readFileSync } from "node:fs";
import { homedir } from "node:os";
import { join } from "node:path";
import { checkedKey } from "./addresses.js";
import { DEFAULT_PROJECT, DEFAULT_TIMEOUT_SECONDS } from "./client.js";
import { InvalidArgument, Reason, Unauthenticated } from "./errors.js";

/** What the caller says itself; for what is left out, the environment and then the default decides. */
export interface ConfigArguments {
  readonly apiKey?: string | undefined;
  readonly project?: string | undefined;
  /** The home of `luthierd up`, where the key lies (default: `~/.local/share/luthier`). */
  readonly home?: string | undefined;
  readonly dataAddress?: string | undefined;
  readonly trainingAddress?: string | undefined;
  readonly evaluationAddress?: string | undefined;
  readonly timeoutSeconds?: number | undefined;
}

/** Addresses are `host:port` of a loopback host, `unix:/path`, or `https://host:port`. */
export interface Config {
  readonly apiKey: string;
  readonly project: string;
  readonly dataAddress: string;
  readonly trainingAddress: string;
  readonly evaluationAddress: string;
  readonly timeoutSeconds: number;
}

type Environment = Readonly<Record<string, string | undefined>>;

const PREFIX = "LUTHIER_CLIENT_";
const CLIENT_VARIABLES: readonly string[] = [
  "LUTHIER_CLIENT_API_KEY",
  "LUTHIER_CLIENT_PROJECT",
  "LUTHIER_CLIENT_TIMEOUT_SECONDS",
];

/**
 * Return the configuration: arguments before `environ` before defaults, as the Python client finds it.
 *
 * Throws InvalidArgument where a `LUTHIER_CLIENT_*` name is unknown or a value does not fit (the key is not repeated), Unauthenticated where no API
 * key was given and none lies in the home (CREDENTIALS_MISSING).
 */
export function readConfig(given: ConfigArguments = {}, environ: Environment = process.env): Config {
  const unknown = Object.keys(environ)
    .filter((name) => name.startsWith(PREFIX) && !CLIENT_VARIABLES.includes(name))
    .sort()[0];
  if (unknown !== undefined) {
    throw new InvalidArgument(
      `environment variable ${unknown} is not known; the client reads ${CLIENT_VARIABLES.join(", ")}`,
      { metadata: { variable: unknown } },
    );
  }
  const home = expanded(given.home || environ.LUTHIER_HOME || "~/.local/share/luthier");
  return {
    apiKey: checkedKey(given.apiKey || environ.LUTHIER_CLIENT_API_KEY || keyInHome(home)),
    project: given.project || environ.LUTHIER_CLIENT_PROJECT || DEFAULT_PROJECT,
    dataAddress: given.dataAddress || environ.LUTHIER_DATA_ADDRESS || "127.0.0.1:7601",
    trainingAddress: given.trainingAddress || environ.LUTHIER_TRAINING_ADDRESS || "127.0.0.1:7602",
    evaluationAddress: given.evaluationAddress || environ.LUTHIER_EVALUATION_ADDRESS || "127.0.0.1:7603",
    timeoutSeconds: timeout(given.timeoutSeconds, environ.LUTHIER_CLIENT_TIMEOUT_SECONDS),
  };
}

function expanded(path: string): string {
  return path === "~" || path.startsWith("~/") ? join(homedir(), path.slice(1)) : path;
}

function keyInHome(home: string): string {
  const path = join(home, "api-key");
  const key = keyIn(path);
  if (key === "") {
    throw new Unauthenticated(
      "no API key: pass apiKey, set LUTHIER_CLIENT_API_KEY, or point LUTHIER_HOME to the home of" +
        ` \`luthierd up\` (${path} does not hold one)`,
      { reason: Reason.CREDENTIALS_MISSING, metadata: { path } },
    );
  }
  return key;
}

function keyIn(path: string): string {
  try {
    return readFileSync(path, "utf8").trim();
  } catch (error) {
    const code = error instanceof Error && "code" in error ? error.code : undefined;
    if (code === "ENOENT" || code === "ENOTDIR") {
      return "";
    }
    if (code === "EACCES") {
      throw new Unauthenticated(`the API key file ${path} cannot be read by this user`, {
        reason: Reason.CREDENTIALS_MISSING,
        cause: error,
      });
    }
    throw error;
  }
}

function timeout(said: number | undefined, text: string | undefined): number {
  if (said === undefined && !text) {
    return DEFAULT_TIMEOUT_SECONDS;
  }
  const seconds = said ?? Number(text);
  if (!(seconds > 0 && seconds < Number.POSITIVE_INFINITY)) {
    const field = "timeout_seconds";
    throw new InvalidArgument(`${field} must be a number of seconds above 0, got '${said ?? text}'`);
  }
  return seconds;
}
