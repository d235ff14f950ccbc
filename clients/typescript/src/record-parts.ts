/** Parts of a dataset version's train split: nested, chosen by a hash of seed and record, in their order. */

import { DatasetFormat } from "./gen/luthier/v1/dataset_pb.js";

/** A record as a version has it: its id, and its canonical JSON. */
export interface StoredRecord {
  readonly recordId: string;
  readonly record: string;
}

/** Lines of one format, as a file has them. */
export interface FormatFile {
  readonly format: DatasetFormat;
  /** Of the format, e.g. `openai_chat`. */
  readonly formatName: string;
  readonly bytes: Uint8Array;
}

/** A record's place among all, by which parts are chosen: a hash in hexadecimal. */
export async function placeOf(seed: bigint, recordId: string): Promise<string> {
  return sha256(`${seed}/${recordId}`);
}

/** The sha256 of a text in hexadecimal. */
export async function sha256(text: string): Promise<string> {
  const digest = await crypto.subtle.digest("SHA-256", new TextEncoder().encode(text));
  return Array.from(new Uint8Array(digest), (byte) => byte.toString(16).padStart(2, "0")).join("");
}

/** Gathers records as lines of files, one for each format. Memory: all that it is given. */
export class FormatFiles {
  private readonly lines = new Map<DatasetFormat, Uint8Array[]>();

  /** Take a record, given as canonical JSON. */
  add(canonical: string): void {
    const { format, line } = written(canonical);
    const lines = this.lines.get(format) ?? [];
    lines.push(new TextEncoder().encode(`${line}\n`));
    this.lines.set(format, lines);
  }

  /** The files, by format; none where no record came. */
  files(): FormatFile[] {
    const formats = [...this.lines.keys()].sort((one, other) => one - other);
    return formats.map((format) => ({
      format,
      formatName: (DatasetFormat[format] ?? String(format)).toLowerCase(),
      bytes: joined(this.lines.get(format) ?? []),
    }));
  }
}

/** A record's canonical JSON as a line of a format that reads as that very record. */
export function written(canonical: string): { format: DatasetFormat; line: string } {
  const keys = topKeys(canonical);
  const messages = keys.get("messages");
  if (keys.has("chosen")) {
    // Written anew, large numbers and the order of keys would not stay what they are.
    const line =
      messages === undefined
        ? canonical
        : `${canonical.slice(0, messages)}"prompt"${canonical.slice(messages + '"messages"'.length)}`;
    return { format: DatasetFormat.PREFERENCE, line };
  }
  const isLabelled = keys.has("label");
  if (messages !== undefined) {
    const format = isLabelled ? DatasetFormat.SHAREGPT_UNPAIRED : DatasetFormat.OPENAI_CHAT;
    return { format, line: canonical };
  }
  return { format: isLabelled ? DatasetFormat.UNPAIRED : DatasetFormat.PROMPT_COMPLETION, line: canonical };
}

/** The keys of an object given as JSON without spaces, and where each stands. */
function topKeys(json: string): Map<string, number> {
  const found = new Map<string, number>();
  let depth = 0;
  // Strings, which may have brackets in them, and brackets.
  for (const { 0: token, index } of json.matchAll(/"[^"\\]*(?:\\.[^"\\]*)*"|[[\]{}]/g)) {
    if (token === "{" || token === "[") {
      depth += 1;
    } else if (token === "}" || token === "]") {
      depth -= 1;
    } else if (depth === 1 && json[index + token.length] === ":") {
      found.set(token.slice(1, -1), index);
    }
  }
  return found;
}

function joined(pieces: readonly Uint8Array[]): Uint8Array {
  const whole = new Uint8Array(pieces.reduce((total, piece) => total + piece.length, 0));
  let offset = 0;
  for (const piece of pieces) {
    whole.set(piece, offset);
    offset += piece.length;
  }
  return whole;
}
