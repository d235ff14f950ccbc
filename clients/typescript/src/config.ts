/** What a client in Node needs to know, and where it finds it: arguments, the environment, a profile, defaults. */

import { readFileSync } from "node:fs";
import { join } from "node:path";
import { checkedKey } from "./addresses.js";
import { DEFAULT_PROJECT, DEFAULT_TIMEOUT_SECONDS } from "./client.js";
import { InvalidArgument, Reason, Unauthenticated } from "./errors.js";
import {
  CONFIG_VARIABLE,
  type Environment,
  expanded,
  PROFILE_VARIABLE,
  type Profile,
  profileNamed,
  readProfiles,
} from "./profiles.js";

/** What the caller says itself; for what is left out, the environment, a profile and then the default decides. */
export interface ConfigArguments {
  /** A profile of the user's file; one that is named here comes before the environment. */
  readonly profile?: string | undefined;
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

const PREFIX = "LUTHIER_CLIENT_";
const KEY_FILE = "api-key";
const CLIENT_VARIABLES: readonly string[] = [
  "LUTHIER_CLIENT_API_KEY",
  CONFIG_VARIABLE,
  PROFILE_VARIABLE,
  "LUTHIER_CLIENT_PROJECT",
  "LUTHIER_CLIENT_TIMEOUT_SECONDS",
];

/**
 * Return the configuration: arguments before `environ` before the user's profile before defaults, as the Python client finds it.
 *
 * The profile is the one that LUTHIER_CLIENT_PROFILE names, or else the file's `default_profile`. One that the arguments name comes before
 * `environ`: whoever says which installation means it whole.
 *
 * Throws InvalidArgument where a `LUTHIER_CLIENT_*` name is unknown, a value does not fit (the key is not repeated) or the file of profiles is wrong,
 * NotFound where there is no profile of the name, Unauthenticated where no API key was given and none lies in the home (CREDENTIALS_MISSING).
 */
export function readConfig(given: ConfigArguments = {}, environ: Environment = process.env): Config {
  refuseUnknown(environ);
  const profiles = readProfiles(environ);
  const isProfileFirst = given.profile !== undefined;
  const name = given.profile ?? (environ[PROFILE_VARIABLE] || profiles.default);
  const profile: Profile = name || isProfileFirst ? profileNamed(profiles, name) : {};
  // The first that says something; nothing is said by an empty text.
  const first = <T>(said: T, ofProfile: T, ofEnviron: T): T =>
    said || (isProfileFirst ? ofProfile || ofEnviron : ofEnviron || ofProfile);
  const home = first(given.home, profile.home, environ.LUTHIER_HOME) || "~/.local/share/luthier";
  return {
    apiKey: checkedKey(key(given, environ, profile, home)),
    project: first(given.project, profile.project, environ.LUTHIER_CLIENT_PROJECT) || DEFAULT_PROJECT,
    dataAddress:
      first(given.dataAddress, profile.dataAddress, environ.LUTHIER_DATA_ADDRESS) || "127.0.0.1:7601",
    trainingAddress:
      first(given.trainingAddress, profile.trainingAddress, environ.LUTHIER_TRAINING_ADDRESS) ||
      "127.0.0.1:7602",
    evaluationAddress:
      first(given.evaluationAddress, profile.evaluationAddress, environ.LUTHIER_EVALUATION_ADDRESS) ||
      "127.0.0.1:7603",
    timeoutSeconds: timeout(given.timeoutSeconds, profile, environ, isProfileFirst),
  };
}

function refuseUnknown(environ: Environment): void {
  const unknown = Object.keys(environ)
    .filter((name) => name.startsWith(PREFIX) && !CLIENT_VARIABLES.includes(name))
    .sort()[0];
  if (unknown !== undefined) {
    throw new InvalidArgument(
      `environment variable ${unknown} is not known; the client reads ${CLIENT_VARIABLES.join(", ")}`,
      { metadata: { variable: unknown } },
    );
  }
}

function key(given: ConfigArguments, environ: Environment, profile: Profile, home: string): string {
  if (given.apiKey) {
    return given.apiKey;
  }
  const ofEnviron = environ.LUTHIER_CLIENT_API_KEY;
  if (given.home && !ofEnviron) {
    return keyAt(join(expanded(given.home), KEY_FILE));
  }
  const own = profile.apiKeyFile || profile.home;
  if (ofEnviron && !(own && given.profile !== undefined)) {
    return ofEnviron;
  }
  return keyAt(profile.apiKeyFile ? expanded(profile.apiKeyFile) : join(expanded(home), KEY_FILE));
}

function keyAt(path: string): string {
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

function timeout(
  said: number | undefined,
  profile: Profile,
  environ: Environment,
  isProfileFirst: boolean,
): number {
  const ofEnviron = environ.LUTHIER_CLIENT_TIMEOUT_SECONDS || undefined;
  const ofProfile = profile.timeoutSeconds;
  const value = said ?? (isProfileFirst ? (ofProfile ?? ofEnviron) : (ofEnviron ?? ofProfile));
  if (value === undefined) {
    return DEFAULT_TIMEOUT_SECONDS;
  }
  const seconds = Number(value);
  if (!(seconds > 0 && seconds < Number.POSITIVE_INFINITY)) {
    const field = "timeout_seconds";
    throw new InvalidArgument(`${field} must be a number of seconds above 0, got '${value}'`);
  }
  return seconds;
}
