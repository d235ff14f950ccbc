/** Tables in Arrow. Needs the package `apache-arrow`, which a program that reads tables installs beside this one. */

import type { DescMethodServerStreaming, DescMethodUnary, Message } from "@bufbuild/protobuf";
import type { GenMessage } from "@bufbuild/protobuf/codegenv2";
import { type RecordBatch, tableFromIPC } from "apache-arrow";
import type { Client } from "./client.js";
import { DataLoss } from "./errors.js";
import { call, ResumedStream } from "./flows.js";
import type { ArrowChunkSchema } from "./gen/luthier/v1/arrow_pb.js";
import { DataService, ReadRenderingRequest_View } from "./gen/luthier/v1/data_service_pb.js";
import { Split } from "./gen/luthier/v1/dataset_pb.js";
import * as names from "./names.js";
import type { CallOptions, Scope } from "./scope.js";

/** Which rows to read. */
export interface ReadOptions extends CallOptions {
  readonly split?: Split;
  /** The first row that is wanted. */
  readonly startRow?: bigint | number;
  /** The uid of the resource whose row that is, where another process saw it. */
  readonly uid?: string;
}

/**
 * Stream the records of a READY version as Arrow record batches, each row once over any number of breaks.
 *
 * Columns: row, record_id, split, filename, line, record (canonical JSON).
 */
export function readRecords(
  client: Client,
  version: string,
  options: ReadOptions = {},
): AsyncGenerator<RecordBatch, void, undefined> {
  const { scope } = client;
  const reading = {
    streaming: DataService.method.readRecords,
    getting: DataService.method.getDatasetVersion,
    name: names.version(scope.project, version),
    more: {},
  };
  return readBatches(scope.of(options), reading, options);
}

/**
 * Stream the rows of a READY rendering as Arrow record batches, each row once over any number of breaks.
 *
 * Columns: row, record_id, split, filename, line, input_ids, loss_mask; of lengths: row, split, num_tokens, num_supervised.
 */
export function readRendering(
  client: Client,
  rendering: string,
  options: ReadOptions & { readonly lengthsOnly?: boolean } = {},
): AsyncGenerator<RecordBatch, void, undefined> {
  const { scope } = client;
  const reading = {
    streaming: DataService.method.readRendering,
    getting: DataService.method.getRendering,
    name: names.child(scope.project, "renderings", rendering),
    more: { view: options.lengthsOnly ? ReadRenderingRequest_View.LENGTHS : ReadRenderingRequest_View.FULL },
  };
  return readBatches(scope.of(options), reading, options);
}

type RowsRequest = Message & { name: string; split: Split; startRow: bigint; uid: string };

interface Reading {
  readonly streaming: DescMethodServerStreaming<GenMessage<RowsRequest>, typeof ArrowChunkSchema>;
  readonly getting: DescMethodUnary<
    GenMessage<Message & { name: string }>,
    GenMessage<Message & { uid: string }>
  >;
  readonly name: string;
  readonly more: object;
}

async function* readBatches(
  scope: Scope,
  reading: Reading,
  options: ReadOptions,
): AsyncGenerator<RecordBatch, void, undefined> {
  const { name, more } = reading;
  const { split = Split.UNSPECIFIED } = options;
  const uid = options.uid || (await call(scope, reading.getting, { name })).uid;
  let startRow = BigInt(options.startRow ?? 0);
  const stream = new ResumedStream(scope, reading.streaming, () => {
    return { name, uid, split, startRow, ...more };
  });
  try {
    for (let chunk = await stream.receive(); chunk !== undefined; chunk = await stream.receive()) {
      if (chunk.firstRow < startRow) {
        throw new DataLoss(`expected rows from ${startRow} on, got rows from ${chunk.firstRow} on`);
      }
      for (const batch of tableFromIPC(chunk.ipc).batches) {
        yield batch;
        // Rows of other splits are left out, so the next row is not the first plus the count.
        const last: unknown = batch.getChild("row")?.get(batch.numRows - 1);
        if (batch.numRows > 0) {
          startRow = BigInt(last as number | bigint) + 1n;
        }
      }
    }
  } finally {
    stream.close();
  }
}
