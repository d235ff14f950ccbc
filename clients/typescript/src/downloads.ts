/** Downloading a model so that its folder appears whole or not at all. */

import { createHash } from "node:crypto";
import { createReadStream } from "node:fs";
import { mkdir, open, readdir, rename, rm, rmdir, stat } from "node:fs/promises";
import { dirname, join, resolve } from "node:path";
import type { Client } from "./client.js";
import { AlreadyExists, DataLoss, Reason } from "./errors.js";
import type { ModelFile } from "./gen/luthier/v1/model_pb.js";
import * as names from "./names.js";
import type { ProgressCallback } from "./transfers.js";

/** How to download. */
export interface DownloadOptions {
  readonly onProgress?: ProgressCallback;
  readonly signal?: AbortSignal | undefined;
}

/**
 * Bring the files of a READY model into `directory`, which appears whole or not at all, as they are stored.
 *
 * The bytes come into `<directory>.partial` first; a download that was broken off goes on there, also in another process.
 * Each file is checked against its sha256. A directory that holds these files already is left as it is.
 *
 * Throws AlreadyExists where the directory holds something else, DataLoss where a file has other bytes than its sha256
 * says, also when fetched anew, or a path that leaves the directory.
 */
export async function download(
  client: Client,
  model: string,
  directory: string,
  options: DownloadOptions = {},
): Promise<void> {
  const { signal } = options;
  const target = resolve(directory);
  const name = names.weights(client.scope.project, model);
  const { uid } = await client.models.get(name, { signal });
  const files: ModelFile[] = [];
  for await (const file of client.models.files(name, { signal })) {
    checkPath(file.path);
    files.push(file);
  }
  if (await holdsAlready(target, files, name)) {
    return;
  }
  const staging = `${target}.partial`;
  await mkdir(staging, { recursive: true });
  for (const file of files) {
    await fetchFile({ client, name, uid, options }, file, staging);
  }
  await moveIntoPlace(staging, target, files);
}

interface Fetching {
  readonly client: Client;
  readonly name: string;
  readonly uid: string;
  readonly options: DownloadOptions;
}

async function fetchFile(fetching: Fetching, file: ModelFile, staging: string): Promise<void> {
  const final = join(staging, file.path);
  if (await isFile(final, file)) {
    return;
  }
  const part = `${final}.${file.sha256.slice(0, 12)}.part`;
  await mkdir(dirname(part), { recursive: true });
  // The bytes that an earlier process left may have been damaged: once more from the beginning.
  for (let attempt = 0; attempt < 2; attempt += 1) {
    await receive(fetching, file, part);
    if (await isFile(part, file)) {
      await rename(part, final);
      return;
    }
    await rm(part);
  }
  throw new DataLoss(
    `${file.path} of ${fetching.name} does not have the sha256 ${file.sha256} that its model states`,
    { reason: Reason.CHECKSUM_MISMATCH, metadata: { model: fetching.name, path: file.path } },
  );
}

/** Append to `part` what is missing of the file. */
async function receive(fetching: Fetching, file: ModelFile, part: string): Promise<void> {
  const { client, name, uid, options } = fetching;
  const totalBytes = Number(file.sizeBytes);
  const out = await open(part, "a");
  try {
    let completedBytes = (await out.stat()).size;
    if (completedBytes > totalBytes) {
      await out.truncate(0);
      completedBytes = 0;
    }
    if (completedBytes < totalBytes) {
      const wanted = { uid, startOffset: completedBytes, signal: options.signal };
      for await (const data of client.models.readFile(name, file.path, wanted)) {
        await out.appendFile(data);
        completedBytes += data.length;
        options.onProgress?.({ name: file.path, completedBytes, totalBytes });
      }
    }
    await out.sync();
  } finally {
    await out.close();
  }
}

/** Refuse what would be written outside the directory. */
function checkPath(path: string): void {
  const parts = path.split("/");
  if (path === "" || path.startsWith("/") || path.includes("\\") || parts.includes("..")) {
    throw new DataLoss(`the service names a file outside the model's folder: '${path}'`, {
      reason: Reason.PATH_NOT_ALLOWED,
    });
  }
}

async function isFile(path: string, file: ModelFile): Promise<boolean> {
  const found = await stat(path).catch(() => undefined);
  if (!found?.isFile() || BigInt(found.size) !== file.sizeBytes) {
    return false;
  }
  const digest = createHash("sha256");
  for await (const piece of createReadStream(path) as AsyncIterable<Uint8Array>) {
    digest.update(piece);
  }
  return digest.digest("hex") === file.sha256;
}

/** Whether the directory is the model. False also when it is empty or not there. */
async function holdsAlready(directory: string, files: readonly ModelFile[], name: string): Promise<boolean> {
  const found = await stat(directory).catch(() => undefined);
  const present = found === undefined ? [] : found.isDirectory() ? await filesBelow(directory) : ["."];
  if (present.length === 0) {
    return false;
  }
  const wanted = files.map((file) => file.path).sort();
  if (present.join("\n") === wanted.join("\n")) {
    const same = await Promise.all(files.map((file) => isFile(join(directory, file.path), file)));
    if (same.every(Boolean)) {
      return true;
    }
  }
  throw new AlreadyExists(`${directory} is there and is not ${name}; give a new or an empty directory`, {
    metadata: { path: directory },
  });
}

/** The paths of all files below a directory, sorted. */
async function filesBelow(directory: string, prefix = ""): Promise<string[]> {
  const entries = await readdir(join(directory, prefix), { withFileTypes: true });
  const found = await Promise.all(
    entries.map((entry) => {
      const path = prefix === "" ? entry.name : `${prefix}/${entry.name}`;
      return entry.isDirectory() ? filesBelow(directory, path) : [path];
    }),
  );
  return found.flat().sort();
}

async function moveIntoPlace(staging: string, directory: string, files: readonly ModelFile[]): Promise<void> {
  const wanted = new Set(files.map((file) => file.path));
  for (const path of await filesBelow(staging)) {
    if (!wanted.has(path)) {
      await rm(join(staging, path));
    }
  }
  await rmdir(directory).catch((error: NodeJS.ErrnoException) => {
    if (error.code !== "ENOENT") {
      throw error;
    }
  });
  await rename(staging, directory);
}
