/** What a learning curve cannot be made of, and parts of records as files. */

import assert from "node:assert/strict";
import { test } from "node:test";
import { DatasetFormat } from "#dist/gen/luthier/v1/dataset_pb.js";
import { InvalidArgument } from "#dist/index.js";
import { learningCurve } from "#dist/learning-curve.js";
import { FormatFiles, placeOf, written } from "#dist/record-parts.js";
import { stage, thrown } from "./scripted.js";

test("shares and mixtures that make no curve are refused before anything is asked", async () => {
  await using at = await stage();
  for (const [shares, got] of [
    [[1], "1"],
    [[0.5, 0.5], "0.5, 0.5"],
    [[0.5, 1.5], "0.5, 1.5"],
    [[0, 1], "0, 1"],
    [[0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9], "0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9"],
  ] as const) {
    const making = learningCurve(at.client, { rendering: "r" }, {}, { curveId: "c", shares });
    const { message } = await thrown(InvalidArgument, making);
    assert.equal(message, `shares: must be 2 to 8 different shares above 0 and at most 1, got ${got}`);
  }
  const mixed = { rendering: "r", mixedRenderings: [{ rendering: "s", share: 0.5 }] };
  const refused = await thrown(InvalidArgument, learningCurve(at.client, mixed, {}, { curveId: "c" }));
  assert.match(refused.message, /^job\.mixed_renderings: must be empty/);
  assert.deepEqual(at.services.calls, {});
});

test("each record is written in the format that reads as that very record", () => {
  const chat =
    '{"messages":[{"content":"{\\"label\\":[","role":"user"}],"tools":[{"chosen":1e3,"10":1,"2":1}]}';
  assert.deepEqual(written(chat), { format: DatasetFormat.OPENAI_CHAT, line: chat });
  const labelled = '{"label":false,"messages":[]}';
  assert.deepEqual(written(labelled), { format: DatasetFormat.SHAREGPT_UNPAIRED, line: labelled });
  const plain = '{"completion":"label","prompt":"messages"}';
  assert.deepEqual(written(plain), { format: DatasetFormat.PROMPT_COMPLETION, line: plain });
  const judged = '{"completion":"c","label":true,"prompt":"p"}';
  assert.deepEqual(written(judged), { format: DatasetFormat.UNPAIRED, line: judged });
  const pair = '{"chosen":"a","prompt":"p","rejected":"b"}';
  assert.deepEqual(written(pair), { format: DatasetFormat.PREFERENCE, line: pair });
  // Numbers beyond 2^53 and keys in their own order, which JSON.parse would not keep.
  const tools = '"tools":[{"n":9007199254740993,"b":1.0,"10":1,"2":1}]';
  assert.deepEqual(
    written(`{"chosen":[{"messages":"\\"messages\\":"}],"messages":[],"rejected":[],${tools}}`),
    {
      format: DatasetFormat.PREFERENCE,
      line: `{"chosen":[{"messages":"\\"messages\\":"}],"prompt":[],"rejected":[],${tools}}`,
    },
  );
});

test("records are files by format, each in the order in which they came", () => {
  const files = new FormatFiles();
  assert.deepEqual(files.files(), []);
  for (const record of [
    '{"completion":"ä","prompt":"1"}',
    '{"messages":[]}',
    '{"completion":"b","prompt":"2"}',
  ]) {
    files.add(record);
  }
  assert.deepEqual(
    files.files().map((one) => [one.formatName, new TextDecoder().decode(one.bytes)]),
    [
      ["openai_chat", '{"messages":[]}\n'],
      ["prompt_completion", '{"completion":"ä","prompt":"1"}\n{"completion":"b","prompt":"2"}\n'],
    ],
  );
});

test("a record's place is the sha256 of seed and record", async () => {
  // printf 5/ab | sha256sum
  assert.equal(await placeOf(5n, "ab"), "e97fceebdc9c8197f63d30ce36cfcfecc07e347199c529aad14cb64a36d97353");
});
