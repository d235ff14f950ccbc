/** A task that no worker takes, with a Training service that has none and says so soon (tests/e2e/test_no_worker.py). */

import assert from "node:assert/strict";
import { after, test } from "node:test";
import { LogLine_Severity } from "#dist/gen/luthier/v1/event_pb.js";
import { Model_State } from "#dist/gen/luthier/v1/model_pb.js";
import { type Client, connect, errorOf, ModelFailed, Reason, Unavailable } from "#dist/node.js";
import { thrown } from "../test/scripted.js";
import { LIMIT } from "./preparing.js";

const client: Client = connect();
after(() => client.close());

test("a task that no worker takes says why, in itself and in its log, and which worker to start", async () => {
  const source = { case: "directory", value: "/models/any" } as const;
  const { name } = await client.models.registerBase({ source }, { modelId: "tsx-model" });
  let told = "";
  for await (const { payload } of client.models.watch(name)) {
    if (payload.case === "log" && payload.value.severity === LogLine_Severity.WARNING) {
      told = payload.value.text;
      break;
    }
  }
  const model = await client.models.get(name);
  assert.equal(model.state, Model_State.QUEUED);
  const why = model.waiting && errorOf(model.waiting);
  assert.ok(why instanceof Unavailable, String(why));
  assert.equal(why.reason, Reason.NO_FITTING_WORKER);
  assert.deepEqual(why.metadata, { requirement: "kind", kind: "REGISTER_MODEL" });
  assert.match(why.message, /^no training worker is there to do it; start one: luthierd worker training$/);
  assert.equal(told, why.message);

  await client.models.cancel(name);
  const cancelled = await thrown(ModelFailed, client.models.wait(name, LIMIT));
  assert.equal(cancelled.state, "CANCELLED");
  assert.equal(cancelled.resource.waiting, undefined);
});
