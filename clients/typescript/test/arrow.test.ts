/** Tables over breaks. */

import assert from "node:assert/strict";
import { test } from "node:test";
import { Int64, type RecordBatch, Table, tableToIPC, vectorFromArray } from "apache-arrow";
import { readRecords, readRendering } from "#dist/arrow.js";
import { ReadRenderingRequest_View } from "#dist/gen/luthier/v1/data_service_pb.js";
import { Split } from "#dist/gen/luthier/v1/dataset_pb.js";
import { DataLoss } from "#dist/index.js";
import { all, type ScriptedServices, stage, stopping, thrown, UID } from "./scripted.js";

/** What the train split leaves of ten rows. */
const ROWS = [0, 2, 3, 7, 8, 9];

function chunk(rows: readonly number[], firstRow = rows[0] ?? 0): object {
  const row = vectorFromArray(rows.map(BigInt), new Int64());
  return { ipc: tableToIPC(new Table({ row }), "stream"), firstRow: BigInt(firstRow), numRows: rows.length };
}

function rowsOf(batches: readonly RecordBatch[]): number[] {
  return batches.flatMap((batch) => [...(batch.getChild("row") ?? [])].map(Number));
}

/** Rows in pieces of two whose stream breaks off twice after the first piece. */
function breakingRows(services: ScriptedServices, method: string): number[] {
  const starts: number[] = [];
  services.answers[method] = async function* (request: { startRow: bigint; uid: string }) {
    assert.equal(request.uid, UID, "every request says whose rows it goes on with");
    starts.push(Number(request.startRow));
    const left = ROWS.filter((row) => row >= Number(request.startRow));
    for (let first = 0; first < left.length; first += 2) {
      if (first === 2 && starts.length < 3) {
        throw stopping();
      }
      yield chunk(left.slice(first, first + 2));
    }
  };
  return starts;
}

test("each row is read once over breaks, where rows of other splits are left out", async () => {
  await using at = await stage();
  const starts = breakingRows(at.services, "readRecords");
  const batches = await all(readRecords(at.client, "d/v", { split: Split.TRAIN }));
  assert.deepEqual(rowsOf(batches), ROWS);
  assert.deepEqual(starts, [0, 3, 8]);
});

test("a rendering is read from a row on", async () => {
  await using at = await stage();
  const starts = breakingRows(at.services, "readRendering");
  assert.deepEqual(rowsOf(await all(readRendering(at.client, "r", { startRow: 2 }))), ROWS.slice(1));
  assert.deepEqual(starts, [2, 4, 9]);
});

test("an empty batch is passed on, and what comes after a break begins where it was", async () => {
  await using at = await stage();
  const starts: number[] = [];
  at.services.answers.readRendering = async function* (request: {
    startRow: bigint;
    view: ReadRenderingRequest_View;
  }) {
    assert.equal(request.view, ReadRenderingRequest_View.LENGTHS);
    starts.push(Number(request.startRow));
    if (starts.length === 1) {
      yield chunk([0, 1]);
      yield chunk([], 2);
      throw stopping();
    }
    yield chunk([2, 5]);
  };
  const batches = await all(readRendering(at.client, "r", { lengthsOnly: true }));
  assert.deepEqual(rowsOf(batches), [0, 1, 2, 5]);
  assert.deepEqual(starts, [0, 2]);
});

test("rows that come twice are told of", async () => {
  await using at = await stage();
  at.services.answers.readRecords = () => [chunk([0, 1]), chunk([1, 2])];
  const error = await thrown(DataLoss, all(readRecords(at.client, "d/v")));
  assert.match(error.message, /expected rows from 2 on, got rows from 1 on/);
});

test("rows are taken up that another process saw", async () => {
  await using at = await stage();
  const asked: [bigint, string][] = [];
  at.services.answers.readRendering = (request) => {
    asked.push([request.startRow, request.uid]);
    return [];
  };
  assert.deepEqual(await all(readRendering(at.client, "r", { startRow: 4n, uid: "of before" })), []);
  assert.deepEqual(asked, [[4n, "of before"]]);
  assert.equal(at.services.count("getRendering"), 0);
});
