/** What is asked of services while no evaluation worker is there (tests/e2e/test_no_worker.py starts the others). */

import assert from "node:assert/strict";
import { after, before, test } from "node:test";
import { Split } from "#dist/gen/luthier/v1/dataset_pb.js";
import { Evaluation_State } from "#dist/gen/luthier/v1/evaluation_pb.js";
import { type Client, connect, EvaluationFailed, Reason, Unavailable } from "#dist/node.js";
import { thrown } from "../test/scripted.js";
import { chats, LIMIT, version } from "./preparing.js";

// Long enough to ask again once: a worker may be about to start.
const client: Client = connect({ retry: { deadlineSeconds: 1.5 } });
let asked = "";

before(async () => {
  asked = await version(client, "tsn-things", [[Split.TEST, chats(6)]]);
});
after(() => client.close());

test("whoever asks a model hears that there is no worker and how to start one, after it was tried again", async () => {
  const askings = [
    () => client.generate("tiny", "Once", { maxNewTokens: 4 }),
    () => client.evaluations.scoreTexts("tiny", [{ continuation: "a" }]),
  ];
  for (const ask of askings) {
    const began = performance.now();
    const refused = await thrown(Unavailable, ask());
    assert.deepEqual([refused.reason, refused.retryAfterSeconds], [Reason.NO_WORKER, 1]);
    assert.match(refused.message, /no evaluation worker takes orders.*`luthierd worker evaluation`/);
    assert.ok(performance.now() - began > 990, "the service says when to come back");
  }
});

test("an evaluation is queued until a worker is there, and can be cancelled before", async () => {
  const arms = [{ armId: "base", model: "tiny" }];
  const { name } = await client.evaluations.create({ datasetVersion: asked, arms, maxNewTokens: 4 });
  assert.equal((await client.evaluations.get(name)).state, Evaluation_State.QUEUED);
  await client.evaluations.cancel(name);
  const cancelled = await thrown(EvaluationFailed, client.evaluations.wait(name, LIMIT));
  assert.deepEqual([cancelled.state, cancelled.reason], ["CANCELLED", Reason.CANCELLED_BY_USER]);
});
