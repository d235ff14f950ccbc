/** Calls: retries, request ids, deadlines, errors, paging. */

import assert from "node:assert/strict";
import { createServer } from "node:http2";
import type { AddressInfo } from "node:net";
import { test } from "node:test";
import { Code } from "@connectrpc/connect";
import {
  DataLoss,
  DeadlineExceeded,
  InvalidArgument,
  LuthierError,
  NotFound,
  Reason,
  ResourceExhausted,
  Unauthenticated,
  Unavailable,
} from "#dist/index.js";
import { connect } from "#dist/node.js";
import { API_KEY, all, clientOf, refusal, ScriptedServices, stage, stopping, thrown } from "./scripted.js";

const UUID4 = /^[0-9a-f]{8}-[0-9a-f]{4}-4[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}$/;

test("a call fills a request id that its retries keep", async () => {
  await using at = await stage();
  const seen: string[] = [];
  at.services.answers.createDataset = (request) => {
    seen.push(request.requestId);
    if (seen.length < 3) {
      throw stopping();
    }
    return { name: `${request.parent}/datasets/${request.datasetId}` };
  };
  assert.equal((await at.client.datasets.create("a")).name, "projects/default/datasets/a");
  await at.client.datasets.create("b");
  assert.equal(seen.length, 4);
  assert.equal(new Set(seen.slice(0, 3)).size, 1);
  assert.notEqual(seen[0], seen[3]);
  assert.match(seen[0] ?? "", UUID4);
});

test("a request whose answer is lost with its connection is sent again with its id", async () => {
  await using at = await stage();
  const seen: string[] = [];
  at.services.answers.createDataset = async (request) => {
    seen.push(request.requestId);
    if (seen.length === 1) {
      at.services.breakConnections();
    }
    return { name: "a" };
  };
  assert.equal((await at.client.datasets.create("a")).name, "a");
  assert.equal(seen.length, 2);
  assert.equal(seen[0], seen[1]);
});

test("versions are created from uploads or sources, and what the caller gave stays as it is", async () => {
  await using at = await stage();
  const seen: { sources: { upload: string }[]; labels: Record<string, string> }[] = [];
  at.services.answers.createDatasetVersion = (request) => {
    seen.push(request.datasetVersion);
    return request.datasetVersion;
  };
  at.services.answers.getUpload = () => ({ name: "projects/default/uploads/v" });
  const source = { upload: "u" };
  await at.client.datasets.createVersion("a", [source], { labels: { team: "a" } });
  await at.client.datasets.createVersion("a", [await at.client.datasets.getUpload("v")]);
  assert.deepEqual(
    seen.map((one) => [one.sources.map((each) => each.upload), one.labels]),
    [
      [["projects/default/uploads/u"], { team: "a" }],
      [["projects/default/uploads/v"], {}],
    ],
  );
  assert.equal(source.upload, "u");
});

const FINAL: readonly [Code, string, typeof LuthierError][] = [
  [Code.NotFound, "RESOURCE_NOT_FOUND", NotFound],
  [Code.ResourceExhausted, "OVERLOADED", ResourceExhausted],
  [Code.Unauthenticated, "CREDENTIALS_INVALID", Unauthenticated],
  [Code.Unknown, "", LuthierError],
];
for (const [code, reason, kind] of FINAL) {
  test(`a call does not repeat ${Code[code]}, which will not succeed`, async () => {
    await using at = await stage();
    at.services.answers.getDataset = () => {
      throw refusal(code, "no", { reason });
    };
    const error = await thrown(LuthierError, at.client.datasets.get("a"));
    assert.equal(error.constructor, kind);
    assert.equal(error.message, "no");
    assert.equal(at.services.count("getDataset"), 1);
  });
}

test("a call waits as long as an exhausted service says", async () => {
  await using at = await stage();
  const times: number[] = [];
  at.services.answers.getDataset = (request) => {
    times.push(performance.now());
    if (times.length === 1) {
      throw refusal(Code.ResourceExhausted, "full", { reason: "OVERLOADED", retryAfterSeconds: 0.3 });
    }
    return { name: request.name };
  };
  await at.client.datasets.get("a");
  assert.ok((times[1] ?? 0) - (times[0] ?? 0) >= 290);
});

test("a call tells of a full disk at once", async () => {
  await using at = await stage();
  at.services.answers.getDataset = () => {
    throw refusal(Code.ResourceExhausted, "the disk is full", { reason: "DISK_FULL", retryAfterSeconds: 30 });
  };
  const error = await thrown(ResourceExhausted, at.client.datasets.get("a"));
  assert.equal(error.retryAfterSeconds, 30);
  assert.equal(error.reason, Reason.DISK_FULL);
  assert.equal(at.services.count("getDataset"), 1);
});

test("a call gives up when the retry deadline is over", async () => {
  const services = new ScriptedServices();
  await services.start();
  await services.stop();
  using client = clientOf(services, {
    retry: { initialSeconds: 0.05, maxSeconds: 0.1, deadlineSeconds: 0.5 },
  });
  const began = performance.now();
  const error = await thrown(Unavailable, client.datasets.get("a"));
  assert.match(error.message, /cannot be reached/);
  const seconds = (performance.now() - began) / 1000;
  assert.ok(seconds > 0.3 && seconds < 2, `${seconds}`);
});

test("a call outlives a restart of the service", async () => {
  await using at = await stage();
  at.services.answers.getDataset = (request) => ({ name: request.name });
  await at.client.datasets.get("a");
  await at.services.stop();
  const again = at.client.datasets.get("b");
  await at.services.start();
  assert.equal((await again).name, "projects/default/datasets/b");
});

test("a call has a deadline", async () => {
  await using at = await stage({ timeoutSeconds: 0.5 });
  at.services.answers.getDataset = (_, context) =>
    new Promise((resolve) => {
      const timer = setTimeout(() => resolve({}), 20_000);
      context.signal.addEventListener("abort", () => clearTimeout(timer));
    });
  await thrown(DeadlineExceeded, at.client.datasets.get("a"));
  assert.equal(at.services.count("getDataset"), 1);
});

test("a client throws the error that the service raised", async () => {
  await using at = await stage();
  const message = "dataset_id: must match [a-z][a-z0-9-]{0,62}, got 'A'";
  at.services.answers.createDataset = () => {
    throw refusal(Code.InvalidArgument, message, {
      reason: "INVALID_FIELD",
      metadata: { value: "A" },
      violations: [{ field: "dataset_id", description: message }],
      retryAfterSeconds: 1.5,
      headers: { "x-request-id": "r-1" },
    });
  };
  const error = await thrown(InvalidArgument, at.client.datasets.create("A"));
  assert.equal(error.message, message);
  assert.equal(error.code, "INVALID_ARGUMENT");
  assert.equal(error.reason, "INVALID_FIELD");
  assert.deepEqual({ ...error.metadata }, { value: "A", request_id: "r-1" });
  assert.deepEqual(error.violations, [
    { field: "dataset_id", description: message, reason: "INVALID_FIELD" },
  ]);
  assert.equal(error.retryAfterSeconds, 1.5);
});

test("an error without details has the reason of its class", async () => {
  await using at = await stage();
  at.services.answers.getDataset = () => {
    throw refusal(Code.FailedPrecondition, "it is not done");
  };
  const error = await thrown(LuthierError, at.client.datasets.get("a"));
  assert.deepEqual([error.name, error.reason], ["FailedPrecondition", Reason.WRONG_STATE]);
});

test("a status whose details were mangled on the way is lost data, and is not asked for again", async () => {
  let calls = 0;
  const server = createServer((_, response) => {
    calls += 1;
    response.writeHead(200, {
      "content-type": "application/grpc+proto",
      "grpc-status": "14",
      "grpc-message": "away",
      "grpc-status-details-bin": "CA4SBGF3YXka/w",
    });
    response.end();
  });
  await new Promise<void>((resolve) => server.listen(0, "127.0.0.1", resolve));
  const dataAddress = `127.0.0.1:${(server.address() as AddressInfo).port}`;
  try {
    using client = connect({ apiKey: API_KEY, dataAddress });
    const error = await thrown(DataLoss, client.datasets.get("a"));
    assert.deepEqual([error.reason, calls], [Reason.DATA_CORRUPTED, 1]);
  } finally {
    server.close();
  }
});

test("what a service aborts is no broken connection", async () => {
  await using at = await stage();
  at.services.answers.deleteDataset = () => {
    throw refusal(Code.Aborted, "somebody was quicker", { reason: "ETAG_MISMATCH" });
  };
  const error = await thrown(LuthierError, at.client.datasets.delete("a", { etag: "1" }));
  assert.deepEqual([error.name, error.reason], ["Aborted", Reason.ETAG_MISMATCH]);
  assert.equal(at.services.count("deleteDataset"), 1);
});

test("what is deleted is listed, brought back and purged by its name, and a uid says which of several", async () => {
  await using at = await stage();
  const asked: string[] = [];
  at.services.answers.listModels = (request) => {
    asked.push(`list ${request.showDeleted}`);
    return { models: [] };
  };
  at.services.answers.undeleteModel = (request) => {
    asked.push(`undelete ${request.name} ${request.uid}`);
    assert.match(request.requestId, UUID4);
    return { name: request.name };
  };
  at.services.answers.purgeModel = (request) => {
    asked.push(`purge ${request.name} ${request.uid} ${request.etag}`);
    return { name: request.name };
  };
  await all(at.client.models.list());
  await all(at.client.models.list({ showDeleted: true }));
  assert.equal((await at.client.models.undelete("m")).name, "projects/default/models/m");
  await at.client.models.purge("m", { uid: "u7", etag: "3" });
  assert.deepEqual(asked, [
    "list false",
    "list true",
    "undelete projects/default/models/m ",
    "purge projects/default/models/m u7 3",
  ]);
});

test("a call sends the API key", async () => {
  await using at = await stage();
  at.services.answers.getDataset = (request) => ({ name: request.name });
  await at.client.datasets.get("a");
  assert.equal(at.services.headers.getDataset?.get("authorization"), `Bearer ${API_KEY}`);
});

function answerTwoPages(services: ScriptedServices): void {
  services.answers.listDatasets = (request) => {
    if (request.pageToken === "") {
      assert.equal(request.filter, 'labels.team = "a"');
      return { datasets: [{ name: "a" }, { name: "b" }], nextPageToken: "2" };
    }
    return { datasets: [{ name: "c" }] };
  };
}

test("a list goes through all pages", async () => {
  await using at = await stage();
  answerTwoPages(at.services);
  const listed = await all(at.client.datasets.list({ filter: 'labels.team = "a"' }));
  assert.deepEqual(
    listed.map((dataset) => dataset.name),
    ["a", "b", "c"],
  );
});

test("a list asks for a page only when it is needed", async () => {
  await using at = await stage();
  answerTwoPages(at.services);
  for await (const dataset of at.client.datasets.list({ filter: 'labels.team = "a"' })) {
    assert.equal(dataset.name, "a");
    break;
  }
  assert.equal(at.services.count("listDatasets"), 1);
});
