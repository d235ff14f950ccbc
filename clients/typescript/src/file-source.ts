/** Files of this machine as something to upload. */

import { createHash } from "node:crypto";
import { createReadStream } from "node:fs";
import { type FileHandle, open } from "node:fs/promises";
import { basename } from "node:path";
import type { UploadSource } from "./uploads.js";

/** A file to upload. It is read twice: for its sha256, then to be sent. */
export function fileSource(path: string): UploadSource {
  let opened: Promise<FileHandle> | undefined;
  let isClosed = false;
  return {
    filename: basename(path),
    async measure() {
      isClosed = false;
      const digest = createHash("sha256");
      let sizeBytes = 0;
      for await (const piece of createReadStream(path) as AsyncIterable<Uint8Array>) {
        digest.update(piece);
        sizeBytes += piece.length;
      }
      return { sizeBytes, sha256: digest.digest("hex") };
    },
    async read(offset, length) {
      // A call that broke off may still ask for its next piece.
      if (isClosed) {
        return new Uint8Array();
      }
      opened ??= open(path);
      const handle = await opened;
      const into = new Uint8Array(length);
      const { bytesRead } = await handle.read(into, 0, length, offset);
      return into.subarray(0, bytesRead);
    },
    async close() {
      isClosed = true;
      const handle = await opened;
      opened = undefined;
      await handle?.close();
    },
  };
}
