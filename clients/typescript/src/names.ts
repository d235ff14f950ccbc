/**
 * Short names: what people type, made into resource names.
 *
 * `my-data` is `projects/{project}/datasets/my-data`, `my-data/v1` is version `v1` of it. A name that starts with
 * `projects/` is taken as it is; whether it is well formed is for the service to say.
 */

import { InvalidArgument } from "./errors.js";

/** The resource name of a project. */
export function project(name: string): string {
  return name.startsWith("projects/") ? name : `projects/${name}`;
}

/** The name of a resource right below the project, e.g. of collection `datasets`. */
export function child(projectId: string, collection: string, name: string): string {
  return resolve(projectId, [collection], name);
}

/** The name of a dataset version from `dataset/version`. */
export function version(projectId: string, name: string): string {
  return resolve(projectId, ["datasets", "versions"], name);
}

/** The name of a checkpoint from `job/checkpoint`. */
export function checkpoint(projectId: string, name: string): string {
  return resolve(projectId, ["fineTuningJobs", "checkpoints"], name);
}

/** The name of a model, or of a checkpoint from `job/checkpoint`. */
export function weights(projectId: string, name: string): string {
  return name.includes("/") ? checkpoint(projectId, name) : child(projectId, "models", name);
}

/** The name of an alias of a model; an `@` before a short name is left out. */
export function alias(projectId: string, name: string): string {
  return child(projectId, "modelAliases", name.replace(/^@/, ""));
}

/** The name of what can be asked: as `weights`, or of an alias from `@alias`. */
export function askable(projectId: string, name: string): string {
  return name.startsWith("@") ? alias(projectId, name) : weights(projectId, name);
}

/** The short form of a resource name, the one that the functions above take. */
export function short(name: string): string {
  if (!name.startsWith("projects/")) {
    return name;
  }
  const ids = name.split("/").slice(3);
  return ids.filter((_, place) => place % 2 === 0).join("/");
}

function resolve(projectId: string, collections: readonly string[], name: string): string {
  if (name.startsWith("projects/")) {
    return name;
  }
  const ids = withoutCollections(name.split("/"), collections);
  if (ids.length !== collections.length || ids.some((id) => id === "")) {
    const shape = collections.map((collection) => `<${collection.replace(/s$/, "")}>`).join("/");
    const full = collections.map((collection) => `${collection}/...`).join("/");
    throw InvalidArgument.ofField("name", `must be ${shape} or projects/.../${full}, got '${name}'`);
  }
  return [project(projectId), ...collections.flatMap((collection, place) => [collection, ids[place]])].join(
    "/",
  );
}

/** `d/versions/v` is `d/v`. */
function withoutCollections(parts: string[], collections: readonly string[]): string[] {
  const inner = collections.slice(1);
  const isSpelledOut =
    inner.length > 0 &&
    parts.length === 2 * collections.length - 1 &&
    inner.every((collection, place) => parts[2 * place + 1] === collection);
  return isSpelledOut ? parts.filter((_, place) => place % 2 === 0) : parts;
}
