/**
 * Files and templates that are wrong, with the services and workers of services.test.ts: what each is answered with
 * stands in tests/e2e/bad_input.json, which the Python client is held to as well.
 */

import assert from "node:assert/strict";
import { readFileSync } from "node:fs";
import { join } from "node:path";
import { after, test } from "node:test";
import { fromJson, type JsonValue } from "@bufbuild/protobuf";
import { Split } from "#dist/gen/luthier/v1/dataset_pb.js";
import { RenderingFinding_Kind, RenderingSchema } from "#dist/gen/luthier/v1/rendering_pb.js";
import {
  bytesSource,
  type Client,
  connect,
  FailedPrecondition,
  LuthierError,
  Reason,
  VersionFailed,
} from "#dist/node.js";
import { all, thrown } from "../test/scripted.js";
import { job, LIMIT, rendered, version } from "./preparing.js";

/** A file, and how its version fails; a line that is text stands in the file as it is. */
interface BadFile {
  readonly file: string;
  readonly lines: readonly JsonValue[];
  readonly reason: string;
  readonly said: string;
  readonly records: readonly { line: number; path: string; reason: string; said: string }[];
}

/** Settings of a rendering of two answers, in the JSON of protobuf. */
interface BadRendering {
  readonly id: string;
  readonly settings: JsonValue;
  readonly reason: string;
  readonly said: string;
}

const ROOT = join(import.meta.dirname, "..", "..", "..", "..");
const BAD: { readonly files: readonly BadFile[]; readonly renderings: readonly BadRendering[] } = JSON.parse(
  readFileSync(join(ROOT, "tests", "e2e", "bad_input.json"), "utf8"),
);
const USER = { role: "user", content: "q" };
const ANSWER = { role: "assistant", content: "a" };
const client: Client = connect();
after(() => client.close());

function record(...messages: readonly object[]): string {
  return `${JSON.stringify({ messages })}\n`;
}

async function checkFile({ file, lines, reason, said, records }: BadFile): Promise<void> {
  const text = lines.map((line) => `${typeof line === "string" ? line : JSON.stringify(line)}\n`).join("");
  const upload = await client.datasets.upload(bytesSource(file, Buffer.from(text)));
  const { name } = await client.datasets.createVersion("tsb-files", [upload]);
  const failed = await thrown(VersionFailed, client.datasets.versions.wait(name, LIMIT));
  assert.match(failed.message, new RegExp(said));
  assert.deepEqual(
    [failed.state, failed.failure.code, failed.reason, failed.resource.digest],
    ["FAILED", "INVALID_ARGUMENT", reason, ""],
    file,
  );
  const told = await all(client.datasets.versions.errors(name, { pageSize: 3 }));
  assert.deepEqual(
    told.map((one) => [one.filename, Number(one.line), one.path, one.reason]),
    records.map((one) => [file, one.line, one.path, one.reason]),
  );
  for (const [place, one] of records.entries()) {
    assert.match(told[place]?.message ?? "", new RegExp(one.said));
  }
}

test("a bad file fails its version: which file and line, and what would be right", async () => {
  assert.ok(BAD.files.length > 0);
  await client.datasets.create("tsb-files");
  await Promise.all(BAD.files.map(checkFile));
});

test("a bad rendering fails, by file and line or for its template", async () => {
  assert.ok(BAD.renderings.length > 0);
  await client.datasets.create("tsb-long");
  const upload = await client.datasets.upload(
    bytesSource("long.jsonl", Buffer.from(record(USER, ANSWER, USER, ANSWER))),
  );
  const { name } = await client.datasets.createVersion("tsb-long", [upload]);
  await client.datasets.versions.wait(name, LIMIT);
  for (const { id, settings, reason, said } of BAD.renderings) {
    const wanted = fromJson(RenderingSchema, settings);
    wanted.datasetVersion = name;
    wanted.model = "tiny";
    const render = async (): Promise<void> => {
      await client.renderings.wait((await client.renderings.create(wanted)).name, LIMIT);
    };
    const failed = await thrown(LuthierError, render());
    assert.equal(failed.reason, reason, id);
    assert.match(failed.message, new RegExp(said));
  }
});

test("records that teach nothing are named before a job starts", async () => {
  const muted = await version(client, "tsb-muted", [[Split.TRAIN, record(USER, { ...ANSWER, weight: 0 })]]);
  const ready = await client.renderings.get(await rendered(client, muted));
  assert.deepEqual(
    ready.unsupervisedRecords.map((one) => [one.filename, one.line]),
    [["tsb-muted-TRAIN.jsonl", 1n]],
  );
  const refused = await thrown(FailedPrecondition, client.jobs.create(job(ready.name, 5)));
  assert.equal(refused.reason, Reason.NO_SUPERVISED_TOKENS);
  assert.match(refused.message, /tsb-muted-TRAIN\.jsonl line 1/);
});

test("what a template leaves out of records is told by file and line", async () => {
  const called = { id: "1", type: "function", function: { name: "weather", arguments: '{"city": "Bonn"}' } };
  const calling = { role: "assistant", content: null, tool_calls: [called] };
  const lines = [
    record(USER, ANSWER),
    record(USER, calling, { role: "tool", content: "12", tool_call_id: "1" }, ANSWER),
  ];
  const left = await version(client, "tsb-left-out", [[Split.TRAIN, lines.join("")]]);
  const ready = await client.renderings.get(await rendered(client, left));
  const found = ready.findings.find((one) => one.kind === RenderingFinding_Kind.TURN_NOT_WRITTEN);
  assert.deepEqual(
    found?.records.map((one) => [one.filename, one.line]),
    [["tsb-left-out-TRAIN.jsonl", 2n]],
  );
  assert.match(found?.records[0]?.message ?? "", /weather/);
});
