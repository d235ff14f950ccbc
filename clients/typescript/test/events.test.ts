/** Watching over breaks, and waiting for an end. */

import assert from "node:assert/strict";
import { test } from "node:test";
import { create, type MessageInitShape, toBinary } from "@bufbuild/protobuf";
import { Code, type HandlerContext } from "@connectrpc/connect";
import { ErrorInfoSchema } from "#dist/gen/google/rpc/error_details_pb.js";
import type { EventSchema } from "#dist/gen/luthier/v1/event_pb.js";
import { FineTuningJob_State } from "#dist/gen/luthier/v1/fine_tuning_job_pb.js";
import {
  Cancelled,
  DataLoss,
  DeadlineExceeded,
  JobFailed,
  NotFound,
  OutOfRange,
  Reason,
} from "#dist/index.js";
import { all, refusal, type ScriptedServices, Signal, stage, stopping, thrown } from "./scripted.js";

type EventInit = MessageInitShape<typeof EventSchema>;
const NAME = "projects/default/fineTuningJobs/j";

function event(sequence: bigint | number): EventInit {
  const number = BigInt(sequence);
  return { sequence: number, payload: { case: "progress", value: { completed: number, total: 6n } } };
}

function heartbeat(sequence: bigint | number): EventInit {
  return { sequence: BigInt(sequence), payload: { case: "heartbeat", value: {} } };
}

async function sequences(events: AsyncIterable<{ sequence: bigint }>): Promise<number[]> {
  return (await all(events)).map((one) => Number(one.sequence));
}

/** A log of six events whose stream breaks off three times, each time in another way. */
function breakingLog(services: ScriptedServices): number[] {
  const starts: number[] = [];
  services.answers.watchFineTuningJob = async function* (request: { startSequence: bigint }) {
    starts.push(Number(request.startSequence));
    for (let sequence = Number(request.startSequence); sequence < 7; sequence += 1) {
      yield event(sequence);
      yield heartbeat(sequence);
      if (sequence === 2 && starts.length === 1) {
        throw stopping();
      }
      if (sequence === 4 && starts.length === 2) {
        throw refusal(Code.ResourceExhausted, "too slow", { reason: "SLOW_READER" });
      }
      if (sequence === 5 && starts.length === 3) {
        await new Promise((resolve) => setTimeout(resolve, 50));
        services.breakConnections();
      }
    }
  };
  return starts;
}

test("a watch yields each event once over breaks", async () => {
  await using at = await stage();
  const starts = breakingLog(at.services);
  assert.deepEqual(await sequences(at.client.jobs.watch("j")), [1, 2, 3, 4, 5, 6]);
  assert.deepEqual(starts, [1, 3, 5, 6]);
});

test("a watch from the beginning begins where the log does, and one from a number that is gone says so", async () => {
  await using at = await stage();
  const starts: number[] = [];
  at.services.answers.watchFineTuningJob = async function* (request: { startSequence: bigint }) {
    starts.push(Number(request.startSequence));
    if (request.startSequence < 7n) {
      const metadata = { first_sequence: "7" };
      throw refusal(Code.OutOfRange, "it is gone; begin at 7", { reason: "SEQUENCE_EXPIRED", metadata });
    }
    for (let sequence = Number(request.startSequence); sequence < 9; sequence += 1) {
      yield event(sequence);
    }
  };
  assert.deepEqual(await sequences(at.client.jobs.watch("j")), [7, 8]);
  assert.deepEqual(starts, [1, 7]);
  const error = await thrown(OutOfRange, sequences(at.client.jobs.watch("j", { startSequence: 3 })));
  assert.equal(error.reason, Reason.SEQUENCE_EXPIRED);
  assert.deepEqual(starts, [1, 7, 3]);
});

test("a watch that has begun does not begin again later", async () => {
  await using at = await stage();
  const starts: number[] = [];
  at.services.answers.watchFineTuningJob = async function* (request: { startSequence: bigint }) {
    starts.push(Number(request.startSequence));
    if (request.startSequence === 1n) {
      yield event(1);
      throw stopping();
    }
    const metadata = { first_sequence: "7" };
    throw refusal(Code.OutOfRange, "it is gone; begin at 7", { reason: "SEQUENCE_EXPIRED", metadata });
  };
  const error = await thrown(OutOfRange, sequences(at.client.jobs.watch("j")));
  assert.equal(error.metadata.first_sequence, "7");
  assert.deepEqual(starts, [1, 2]);
});

/** A log that breaks off once; the job is then another one of the same name. */
function replacedJob(services: ScriptedServices): [number, string][] {
  let uid = "first";
  const asked: [number, string][] = [];
  services.answers.getFineTuningJob = () => ({ name: NAME, uid, state: FineTuningJob_State.RUNNING });
  services.answers.watchFineTuningJob = async function* (request: { startSequence: bigint; uid: string }) {
    asked.push([Number(request.startSequence), request.uid]);
    if (request.uid !== uid) {
      throw refusal(Code.NotFound, "it has uid second", { reason: "RESOURCE_REPLACED" });
    }
    yield event(1);
    yield event(2);
    uid = "second";
    throw stopping();
  };
  return asked;
}

test("a watch never goes on in another job of the name", async () => {
  await using at = await stage();
  const seen: number[] = [];
  const asked = replacedJob(at.services);
  const waiting = at.client.jobs.wait("j", { onEvent: (one) => seen.push(Number(one.sequence)) });
  assert.equal((await thrown(NotFound, waiting)).reason, Reason.RESOURCE_REPLACED);
  assert.deepEqual(asked, [
    [1, "first"],
    [3, "first"],
  ]);
  assert.deepEqual(seen, [1, 2], "what came before it was passed on");
});

test("waiting does not take another job of the name for its own", async () => {
  await using at = await stage();
  const uids = ["first", "second"];
  at.services.answers.getFineTuningJob = () => {
    return { name: NAME, uid: uids.shift() ?? "", state: FineTuningJob_State.SUCCEEDED };
  };
  at.services.answers.watchFineTuningJob = () => [event(1)];
  const error = await thrown(NotFound, at.client.jobs.wait("j"));
  assert.match(error.message, /has uid second, and had first when it was seen first/);
  assert.equal(error.reason, Reason.RESOURCE_REPLACED);
});

test("a watch takes up what another process saw", async () => {
  await using at = await stage();
  const asked = replacedJob(at.services);
  await thrown(NotFound, at.client.jobs.watch("j", { startSequence: 2, uid: "of before" }));
  assert.deepEqual(asked, [[2, "of before"]]);
  assert.equal(at.services.count("getFineTuningJob"), 0);
});

test("a watch begins where it is told", async () => {
  await using at = await stage();
  const starts = breakingLog(at.services);
  assert.deepEqual(await sequences(at.client.jobs.watch("j", { startSequence: 6n })), [6]);
  assert.deepEqual(starts, [6]);
});

test("a watch drops what is sent again", async () => {
  await using at = await stage();
  at.services.answers.watchFineTuningJob = () => [1, 1, 2, 1, 3].map(event);
  assert.deepEqual(await sequences(at.client.jobs.watch("j")), [1, 2, 3]);
});

test("a watch asks again for a missing event", async () => {
  await using at = await stage();
  at.services.answers.watchFineTuningJob = (request) => {
    const isMissing = at.services.count("watchFineTuningJob") === 1;
    return (isMissing ? [1, 3] : [2, 3].filter((one) => one >= Number(request.startSequence))).map(event);
  };
  assert.deepEqual(await sequences(at.client.jobs.watch("j")), [1, 2, 3]);
});

test("a watch reports an event that stays missing", async () => {
  await using at = await stage();
  at.services.answers.watchFineTuningJob = () => [event(1), event(3)];
  const error = await thrown(DataLoss, at.client.jobs.watch("j"));
  assert.match(error.message, /expected number 2, got 3/);
});

test("a watch passes other errors on", async () => {
  await using at = await stage();
  at.services.answers.watchFineTuningJob = () => {
    throw refusal(Code.NotFound, "no job j", { reason: "RESOURCE_NOT_FOUND" });
  };
  const error = await thrown(NotFound, at.client.jobs.watch("j"));
  assert.equal(error.message, "no job j");
  assert.equal(at.services.count("watchFineTuningJob"), 1);
});

/** A log of one event that then is quiet; `ended` is set when its call has ended. */
function quietLog(services: ScriptedServices): Signal {
  const ended = new Signal();
  services.answers.watchFineTuningJob = async function* (_: unknown, context: HandlerContext) {
    context.signal.addEventListener("abort", () => ended.set());
    yield event(1);
    await ended.promise;
  };
  return ended;
}

test("leaving a watch ends the call at the service", async () => {
  await using at = await stage();
  const ended = quietLog(at.services);
  for await (const one of at.client.jobs.watch("j")) {
    assert.equal(one.sequence, 1n);
    break;
  }
  await ended.promise;
});

test("a signal ends a watch that waits, and the call at the service", async () => {
  await using at = await stage();
  const ended = quietLog(at.services);
  const ending = new AbortController();
  const events = at.client.jobs.watch("j", { signal: ending.signal });
  assert.equal((await events.next()).value?.sequence, 1n);
  const waiting = thrown(Cancelled, events);
  ending.abort("enough");
  assert.equal((await waiting).cause, "enough");
  await ended.promise;
});

function ending(services: ScriptedServices, job: object, state: string): void {
  const last = { sequence: 2n, payload: { case: "stateChange", value: { state } } };
  services.answers.watchFineTuningJob = () => [event(1), last];
  services.answers.getFineTuningJob = () => ({ name: NAME, ...job });
}

test("waiting returns the resource that succeeded", async () => {
  await using at = await stage();
  ending(at.services, { state: FineTuningJob_State.SUCCEEDED }, "SUCCEEDED");
  const seen: bigint[] = [];
  const job = await at.client.jobs.wait("j", { onEvent: (one) => seen.push(one.sequence) });
  assert.equal(job.name, NAME);
  assert.deepEqual(seen, [1n, 2n]);
});

test("waiting throws the reason of a failure", async () => {
  await using at = await stage();
  const info = create(ErrorInfoSchema, { reason: "NO_SUPERVISED_TOKENS", domain: "luthier" });
  const detail = {
    typeUrl: "type.googleapis.com/google.rpc.ErrorInfo",
    value: toBinary(ErrorInfoSchema, info),
  };
  const error = { code: 9, message: "no row has a supervised token", details: [detail] };
  ending(at.services, { state: FineTuningJob_State.FAILED, error }, "FAILED");
  const failed = await thrown(JobFailed, at.client.jobs.wait("j"));
  assert.equal(failed.reason, Reason.NO_SUPERVISED_TOKENS);
  assert.equal(failed.failure.code, "FAILED_PRECONDITION");
  assert.equal(failed.state, "FAILED");
  assert.equal(failed.resource.name, NAME);
  assert.equal(failed.message, `${NAME} is FAILED: no row has a supervised token`);
});

test("waiting throws for a cancelled job", async () => {
  await using at = await stage();
  ending(at.services, { state: FineTuningJob_State.CANCELLED }, "CANCELLED");
  const failed = await thrown(JobFailed, at.client.jobs.wait("j"));
  assert.equal(failed.reason, Reason.CANCELLED_BY_USER);
});

test("waiting ends when its time is over", async () => {
  await using at = await stage();
  quietLog(at.services);
  at.services.answers.getFineTuningJob = () => ({ name: NAME, state: FineTuningJob_State.RUNNING });
  const error = await thrown(DeadlineExceeded, at.client.jobs.wait("j", { timeoutSeconds: 0.2 }));
  assert.match(error.message, /still RUNNING after 0\.2 s/);
});

test("waiting passes events on one after the other, and what their function throws", async () => {
  await using at = await stage();
  ending(at.services, { state: FineTuningJob_State.SUCCEEDED }, "SUCCEEDED");
  const order: string[] = [];
  const onEvent = async (one: { sequence: bigint }): Promise<void> => {
    order.push(`begin ${one.sequence}`);
    await new Promise((resolve) => setTimeout(resolve, 10));
    order.push(`end ${one.sequence}`);
  };
  await at.client.jobs.wait("j", { onEvent });
  assert.deepEqual(order, ["begin 1", "end 1", "begin 2", "end 2"]);
  const own = new DeadlineExceeded("the page that shows it is too slow");
  for (const throwing of [() => Promise.reject(own), failing(own)]) {
    const waiting = at.client.jobs.wait("j", { onEvent: throwing, timeoutSeconds: 5 });
    assert.equal(await thrown(DeadlineExceeded, waiting), own);
  }
});

function failing(error: Error): () => void {
  return () => {
    throw error;
  };
}

/** A log whose call somebody between ends after each event, as a proxy does, with its own deadline. */
function impatientLog(services: ScriptedServices, events: number): void {
  services.answers.getFineTuningJob = () => ({ name: NAME, state: FineTuningJob_State.SUCCEEDED });
  services.answers.watchFineTuningJob = async function* (request: { startSequence: bigint }) {
    if (Number(request.startSequence) <= events) {
      yield event(request.startSequence);
      throw refusal(Code.DeadlineExceeded, "the proxy has waited long enough");
    }
  };
}

test("the deadline of somebody between is a break", async () => {
  await using at = await stage();
  impatientLog(at.services, 2);
  assert.deepEqual(await sequences(at.client.jobs.watch("j")), [1, 2]);
  for (const more of [{}, { timeoutSeconds: 30 }]) {
    const seen: bigint[] = [];
    await at.client.jobs.wait("j", { ...more, onEvent: (one) => seen.push(one.sequence) });
    assert.deepEqual(seen, [1n, 2n]);
  }
});

test("waiting for ever ends when nothing but deadlines comes, and does not ask without a pause", async () => {
  const retry = { initialSeconds: 0.05, maxSeconds: 0.1, deadlineSeconds: 0.4 };
  await using at = await stage({ retry });
  at.services.answers.watchFineTuningJob = () => {
    throw refusal(Code.DeadlineExceeded, "too late");
  };
  assert.match((await thrown(DeadlineExceeded, at.client.jobs.wait("j"))).message, /too late/);
  assert.ok(at.services.count("watchFineTuningJob") < 20);
  at.services.calls.watchFineTuningJob = 0;
  const waiting = at.client.jobs.wait("j", { timeoutSeconds: 0.7 });
  assert.match((await thrown(DeadlineExceeded, waiting)).message, /after 0\.7 s/);
  assert.ok(at.services.count("watchFineTuningJob") <= 3);
});

test("waiting watches on when the stream ends early", async () => {
  await using at = await stage();
  const starts: bigint[] = [];
  at.services.answers.watchFineTuningJob = (request) => {
    starts.push(request.startSequence);
    return [event(request.startSequence)];
  };
  at.services.answers.getFineTuningJob = () => {
    const state = starts.length === 2 ? FineTuningJob_State.SUCCEEDED : FineTuningJob_State.RUNNING;
    return { name: NAME, state };
  };
  await at.client.jobs.wait("j");
  assert.deepEqual(starts, [1n, 2n]);
});
