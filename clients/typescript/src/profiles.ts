/** Profiles: what a client is told of one installation of the services, by name, in a file of its user; the Python client reads the same one. */

import { readFileSync } from "node:fs";
import { homedir } from "node:os";
import { join } from "node:path";
import { parse, type TomlTable } from "smol-toml";
import { InvalidArgument, NotFound } from "./errors.js";

/** What one profile says; what is left out, it does not say. Addresses as in `Config`; files and folders may begin with ~. */
export interface Profile {
  readonly project?: string;
  readonly home?: string;
  readonly dataAddress?: string;
  readonly trainingAddress?: string;
  readonly evaluationAddress?: string;
  readonly apiKeyFile?: string;
  readonly timeoutSeconds?: number;
}

/** The profiles of a file, and the one that is taken where nobody names one; empty: none. */
export interface Profiles {
  readonly path: string;
  readonly byName: ReadonlyMap<string, Profile>;
  readonly default: string;
}

export type Environment = Readonly<Record<string, string | undefined>>;

export const CONFIG_VARIABLE = "LUTHIER_CLIENT_CONFIG";
export const PROFILE_VARIABLE = "LUTHIER_CLIENT_PROFILE";
const KEY_WORDS = ["api_key", "key"];
const FIELDS: Readonly<Record<string, keyof Profile>> = {
  project: "project",
  home: "home",
  data_address: "dataAddress",
  training_address: "trainingAddress",
  evaluation_address: "evaluationAddress",
  api_key_file: "apiKeyFile",
  timeout_seconds: "timeoutSeconds",
};

/** Return a path with the user's folder in place of a ~ that it begins with. */
export function expanded(path: string): string {
  return path === "~" || path.startsWith("~/") ? join(homedir(), path.slice(1)) : path;
}

/**
 * Return the profiles of the user's file: what LUTHIER_CLIENT_CONFIG names, or luthier/config.toml of XDG_CONFIG_HOME. None where there is no file,
 * unless it was named.
 *
 * Throws InvalidArgument where the file cannot be read, is no TOML, or says something that no profile has.
 */
export function readProfiles(environ: Environment): Profiles {
  const named = environ[CONFIG_VARIABLE];
  const path = named
    ? expanded(named)
    : join(expanded(environ.XDG_CONFIG_HOME || "~/.config"), "luthier", "config.toml");
  const document = read(path, Boolean(named));
  requireKnown(document, ["default_profile", "profiles"], path);
  const tables = document.profiles ?? {};
  if (!isTable(tables)) {
    throw new InvalidArgument(`${path}: profiles must be tables, [profiles.NAME]`);
  }
  const byName = new Map(
    Object.entries(tables).map(([name, table]) => [name, profile(table, `${path}: profiles.${name}`)]),
  );
  const chosen = document.default_profile ?? "";
  if (typeof chosen !== "string" || (chosen !== "" && !byName.has(chosen))) {
    const known = [...byName.keys()].sort().join(", ");
    throw new InvalidArgument(`${path}: default_profile must be one of ${known}, got '${chosen}'`);
  }
  return { path, byName, default: chosen };
}

/** Return a profile. Throws NotFound that names those there are. */
export function profileNamed(profiles: Profiles, name: string): Profile {
  const found = profiles.byName.get(name);
  if (found === undefined) {
    const known = [...profiles.byName.keys()].sort().join(", ") || "none";
    throw new NotFound(`no profile '${name}' in ${profiles.path}; there are: ${known}`);
  }
  return found;
}

function read(path: string, isNamed: boolean): TomlTable {
  let text: string;
  try {
    text = readFileSync(path, "utf8");
  } catch (error) {
    if (error instanceof Error && "code" in error && error.code === "ENOENT") {
      if (isNamed) {
        throw new InvalidArgument(`${CONFIG_VARIABLE} must name a file, there is no ${path}`);
      }
      return {};
    }
    throw unreadable(path, error);
  }
  try {
    return parse(text);
  } catch (error) {
    throw unreadable(path, error);
  }
}

function unreadable(path: string, error: unknown): InvalidArgument {
  const why = error instanceof Error ? error.message : String(error);
  return new InvalidArgument(`${path} must be a readable file of TOML: ${why}`, { cause: error });
}

function profile(table: unknown, where: string): Profile {
  if (!isTable(table)) {
    throw new InvalidArgument(`${where} must be a table`);
  }
  const word = KEY_WORDS.find((one) => one in table);
  if (word !== undefined) {
    throw new InvalidArgument(
      `${where}: ${word} does not belong here; name a file that holds the key: api_key_file`,
    );
  }
  requireKnown(table, Object.keys(FIELDS), where);
  const said: Record<string, unknown> = {};
  for (const [name, value] of Object.entries(table)) {
    const right = name === "timeout_seconds" ? "number" : "string";
    if (typeof value !== right || value === "") {
      const what = right === "number" ? "a number" : "a text";
      throw new InvalidArgument(`${where}.${name} must be ${what}, got '${value}'`);
    }
    said[FIELDS[name] as string] = value;
  }
  return said;
}

function requireKnown(table: TomlTable, known: readonly string[], where: string): void {
  const unknown = Object.keys(table).find((name) => !known.includes(name));
  if (unknown !== undefined) {
    throw new InvalidArgument(`${where}: ${unknown} is not known: known are ${known.join(", ")}`);
  }
}

function isTable(value: unknown): value is TomlTable {
  return typeof value === "object" && value !== null && !Array.isArray(value) && !(value instanceof Date);
}
