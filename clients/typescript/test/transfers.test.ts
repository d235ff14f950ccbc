/** Uploads and downloads that are broken off. */

import assert from "node:assert/strict";
import { createHash } from "node:crypto";
import { writeFileSync } from "node:fs";
import { mkdir, mkdtemp, readdir, readFile, rm, truncate, writeFile } from "node:fs/promises";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { after, before, test } from "node:test";
import { crc32 as zlibCrc32 } from "node:zlib";
import { Code } from "@connectrpc/connect";
import { crc32 } from "#dist/crc32.js";
import type { WriteUploadRequest } from "#dist/gen/luthier/v1/data_service_pb.js";
import { Upload_State } from "#dist/gen/luthier/v1/upload_pb.js";
import {
  AlreadyExists,
  bytesSource,
  DataLoss,
  download,
  FailedPrecondition,
  fileSource,
  InvalidArgument,
  Reason,
  type TransferProgress,
} from "#dist/node.js";
import { refusal, type ScriptedServices, stage, stopping, thrown, UID } from "./scripted.js";

const MEBIBYTE = 1024 * 1024;
const CONTENT = Buffer.concat([Buffer.alloc(3 * MEBIBYTE, "abcdefghijklmnopqrs"), Buffer.from("the end")]);
const SHA256 = createHash("sha256").update(CONTENT).digest("hex");
const NAME = "projects/default/uploads/u";

let folder = "";
let source = "";
before(async () => {
  folder = await mkdtemp(join(tmpdir(), "luthier-transfers-"));
  source = join(folder, "examples.jsonl");
  await writeFile(source, CONTENT);
});
after(() => rm(folder, { recursive: true }));

/** The upload half of a data service, which can break off after a number of stored chunks. */
class UploadStore {
  stored = Buffer.alloc(0);
  upload = { name: NAME, filename: "", sizeBytes: 0n, sha256: "", state: Upload_State.UNSPECIFIED };
  readonly starts: number[] = [];

  constructor(
    services: ScriptedServices,
    private readonly breakAfter: number[] = [],
    private readonly breakOff: () => void = () => {
      throw stopping();
    },
  ) {
    services.answers.startUpload = (request) => {
      const { filename, sizeBytes, sha256 } = request.upload;
      this.upload = { name: NAME, filename, sizeBytes, sha256, state: Upload_State.RECEIVING };
      return this.now();
    };
    services.answers.getUpload = () => this.now();
    services.answers.writeUpload = (requests) => this.write(requests);
  }

  now(): object {
    return { ...this.upload, persistedSizeBytes: BigInt(this.stored.length) };
  }

  async write(requests: AsyncIterable<WriteUploadRequest>): Promise<object> {
    const limit = this.breakAfter.shift();
    let number = 0;
    for await (const request of requests) {
      if (number === 0) {
        assert.equal(request.name, NAME);
        this.starts.push(Number(request.offset));
      }
      assert.ok(request.data.length <= MEBIBYTE);
      assert.equal(request.crc32, zlibCrc32(request.data));
      assert.equal(Number(request.offset), this.stored.length);
      if (number === limit) {
        this.breakOff();
      }
      this.stored = Buffer.concat([this.stored, request.data]);
      if (request.finish) {
        assert.equal(createHash("sha256").update(this.stored).digest("hex"), this.upload.sha256);
        this.upload.state = Upload_State.COMPLETE;
      }
      number += 1;
    }
    return this.now();
  }
}

test("crc32 is zlib's", () => {
  for (const bytes of [Buffer.alloc(0), Buffer.from("123456789"), CONTENT.subarray(0, 70_001)]) {
    assert.equal(crc32(bytes), zlibCrc32(bytes));
  }
});

test("an upload resumes at the persisted size", async () => {
  await using at = await stage();
  const store = new UploadStore(at.services, [2, 0, 1]);
  const seen: TransferProgress[] = [];
  const done = await at.client.datasets.upload(fileSource(source), { onProgress: (one) => seen.push(one) });
  assert.equal(done.state, Upload_State.COMPLETE);
  assert.equal(done.filename, "examples.jsonl");
  assert.equal(Number(done.sizeBytes), CONTENT.length);
  assert.ok(store.stored.equals(CONTENT));
  assert.deepEqual(store.starts, [0, 2 * MEBIBYTE, 2 * MEBIBYTE, 3 * MEBIBYTE]);
  assert.deepEqual(seen[0], { name: NAME, completedBytes: 0, totalBytes: CONTENT.length });
  assert.equal(seen.at(-1)?.completedBytes, CONTENT.length);
});

test("an upload learns why a write failed, however the failure meets it", async () => {
  await using at = await stage();
  for (let round = 0; round < 20; round += 1) {
    const store = new UploadStore(at.services, [2, 0]);
    await at.client.datasets.upload(bytesSource("x", CONTENT));
    assert.ok(store.stored.equals(CONTENT));
  }
});

test("an upload outlives connections that break", async () => {
  await using at = await stage();
  const store = new UploadStore(at.services, [1, 1], () => {
    at.services.breakConnections();
    throw stopping();
  });
  await at.client.datasets.upload(fileSource(source));
  assert.ok(store.stored.equals(CONTENT));
  assert.deepEqual(store.starts, [0, MEBIBYTE, 2 * MEBIBYTE]);
});

test("an upload whose last answer is lost is complete", async () => {
  await using at = await stage();
  const store = new UploadStore(at.services);
  at.services.answers.writeUpload = async (requests) => {
    await store.write(requests);
    throw stopping();
  };
  const done = await at.client.datasets.upload(fileSource(source));
  assert.equal(done.state, Upload_State.COMPLETE);
  assert.equal(at.services.count("writeUpload"), 1);
});

test("an upload is taken up by name", async () => {
  await using at = await stage();
  const store = new UploadStore(at.services);
  const sizeBytes = BigInt(CONTENT.length);
  store.upload = { name: NAME, state: Upload_State.RECEIVING, sizeBytes, sha256: SHA256, filename: "x" };
  store.stored = CONTENT.subarray(0, 1000);
  const done = await at.client.datasets.upload(fileSource(source), { resume: "u" });
  assert.equal(done.state, Upload_State.COMPLETE);
  assert.deepEqual(store.starts, [1000]);
  assert.ok(store.stored.equals(CONTENT));
  assert.equal(at.services.count("startUpload"), 0);
});

test("an upload refuses to go on with other bytes", async () => {
  await using at = await stage();
  const store = new UploadStore(at.services);
  const sizeBytes = BigInt(CONTENT.length);
  store.upload = {
    name: NAME,
    state: Upload_State.RECEIVING,
    sizeBytes,
    sha256: "0".repeat(64),
    filename: "x",
  };
  const error = await thrown(InvalidArgument, at.client.datasets.upload(fileSource(source), { resume: "u" }));
  assert.equal(error.violations[0]?.field, "resume");
  assert.equal(at.services.count("writeUpload"), 0);
});

test("an upload reports that it was cancelled", async () => {
  await using at = await stage();
  const store = new UploadStore(at.services);
  at.services.answers.writeUpload = () => {
    store.upload.state = Upload_State.CANCELLED;
    throw refusal(Code.FailedPrecondition, "cancelled", { reason: "WRONG_STATE" });
  };
  const error = await thrown(FailedPrecondition, at.client.datasets.upload(fileSource(source)));
  assert.match(error.message, /was cancelled/);
});

test("an upload sends an empty file", async () => {
  await using at = await stage();
  new UploadStore(at.services);
  const done = await at.client.datasets.upload(bytesSource("empty.jsonl", new Uint8Array()));
  assert.equal(done.state, Upload_State.COMPLETE);
});

test("an upload reports a file that shrinks", async () => {
  await using at = await stage();
  new UploadStore(at.services);
  const shrinking = join(folder, "shrinking.jsonl");
  await writeFile(shrinking, CONTENT);
  const file = fileSource(shrinking);
  const cut = {
    ...file,
    async read(offset: number, length: number) {
      await truncate(shrinking, 100);
      return file.read(offset, length);
    },
  };
  const error = await thrown(DataLoss, at.client.datasets.upload(cut));
  assert.match(error.message, /was cut to 100 bytes/);
});

test("an upload of a missing file fails before any call", async () => {
  await using at = await stage();
  const missing = at.client.datasets.upload(fileSource(join(folder, "none.jsonl")));
  await assert.rejects(missing, { code: "ENOENT" });
  assert.deepEqual(at.services.calls, {});
});

const FILES: Record<string, Buffer> = {
  "config.json": Buffer.from('{"model_type": "llama"}'),
  "weights/model.safetensors": CONTENT,
  "empty.txt": Buffer.alloc(0),
};

/** The download half of a model service, which breaks off each stream after `breakAfter` pieces. */
class ModelStore {
  readonly files: Record<string, Buffer> = { ...FILES };
  listed = Object.entries(FILES).map(([path, data]) => ({
    path,
    sizeBytes: BigInt(data.length),
    sha256: createHash("sha256").update(data).digest("hex"),
  }));
  readonly offsets: [string, number][] = [];

  constructor(services: ScriptedServices, breakAfter?: number) {
    services.answers.listModelFiles = () => ({ files: this.listed });
    const { files, offsets } = this;
    services.answers.downloadModelFile = async function* (request: {
      path: string;
      uid: string;
      startOffset: bigint;
    }) {
      assert.equal(request.uid, UID, "every request says whose file it goes on with");
      const begin = Number(request.startOffset);
      offsets.push([request.path, begin]);
      const data = files[request.path] ?? Buffer.alloc(0);
      for (let offset = begin, number = 0; offset < data.length; offset += MEBIBYTE, number += 1) {
        if (number === breakAfter) {
          throw stopping();
        }
        yield { offset: BigInt(offset), data: data.subarray(offset, offset + MEBIBYTE) };
      }
    };
  }
}

async function assertWhole(directory: string): Promise<void> {
  for (const [path, data] of Object.entries(FILES)) {
    assert.ok((await readFile(join(directory, path))).equals(data), path);
  }
  assert.deepEqual((await readdir(directory)).sort(), ["config.json", "empty.txt", "weights"]);
}

test("a download brings all files over breaks", async () => {
  await using at = await stage();
  const store = new ModelStore(at.services, 2);
  const seen: TransferProgress[] = [];
  await download(at.client, "m", join(folder, "whole"), { onProgress: (one) => seen.push(one) });
  await assertWhole(join(folder, "whole"));
  const weights = "weights/model.safetensors";
  assert.deepEqual(
    store.offsets.filter(([path]) => path === weights),
    [
      [weights, 0],
      [weights, 2 * MEBIBYTE],
    ],
  );
  assert.equal(seen.at(-1)?.completedBytes, CONTENT.length);
});

test("a download goes on where another process stopped, and begins anew after damaged bytes", async () => {
  for (const [left, name] of [
    [CONTENT.subarray(0, MEBIBYTE), "taken-up"] as const,
    [Buffer.from("no"), "damaged"] as const,
  ]) {
    await using at = await stage();
    const store = new ModelStore(at.services);
    const staging = join(folder, `${name}.partial`, "weights");
    await mkdir(staging, { recursive: true });
    await writeFile(join(staging, `model.safetensors.${SHA256.slice(0, 12)}.part`), left);
    await download(at.client, "m", join(folder, name));
    await assertWhole(join(folder, name));
    const starts = store.offsets.filter(([path]) => path.startsWith("weights")).map(([, offset]) => offset);
    assert.deepEqual(starts, name === "damaged" ? [2, 0] : [MEBIBYTE]);
  }
});

test("a download's folder may be named with a slash at its end", async () => {
  await using at = await stage();
  new ModelStore(at.services);
  await mkdir(join(folder, "slashed"));
  await download(at.client, "m", `${join(folder, "slashed")}/`);
  await assertWhole(join(folder, "slashed"));
  assert.ok(!(await readdir(folder)).includes("slashed.partial"));
});

test("a download does not replace what came into its folder meanwhile", async () => {
  await using at = await stage();
  new ModelStore(at.services);
  const directory = join(folder, "taken");
  await mkdir(directory);
  const onProgress = (): void => writeFileSync(join(directory, "mine"), "mine");
  const failed = download(at.client, "m", directory, { onProgress });
  await assert.rejects(failed, { code: "ENOTEMPTY", syscall: "rmdir" });
  assert.deepEqual(await readdir(directory), ["mine"]);
});

test("a download leaves no folder when a checksum does not fit", async () => {
  await using at = await stage();
  const store = new ModelStore(at.services);
  store.files["config.json"] = Buffer.from('{"model_type": "other"}');
  const error = await thrown(DataLoss, download(at.client, "m", join(folder, "unfit")));
  assert.equal(error.reason, Reason.CHECKSUM_MISMATCH);
  assert.ok(!(await readdir(folder)).includes("unfit"));
});

test("a download keeps a folder that is the model and refuses another", async () => {
  await using at = await stage();
  const store = new ModelStore(at.services);
  const directory = join(folder, "kept");
  await download(at.client, "m", directory);
  const before = store.offsets.length;
  await download(at.client, "m", directory);
  assert.equal(store.offsets.length, before);
  await writeFile(join(directory, "config.json"), "mine");
  await thrown(AlreadyExists, download(at.client, "m", directory));
});

for (const path of ["../outside", "/etc/passwd", "a/../../b", "a\\b", ""]) {
  test(`a download refuses the path '${path}'`, async () => {
    await using at = await stage();
    const store = new ModelStore(at.services);
    store.listed = [{ path, sizeBytes: 1n, sha256: "0".repeat(64) }];
    const error = await thrown(DataLoss, download(at.client, "m", join(folder, "never")));
    assert.equal(error.reason, Reason.PATH_NOT_ALLOWED);
  });
}
