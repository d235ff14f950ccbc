/** Connections to services that stop answering: calls fail and are made again, and the process lives. */

import assert from "node:assert/strict";
import { type ChildProcess, spawn } from "node:child_process";
import { once } from "node:events";
import { constants, createServer, type Http2Server, type ServerHttp2Session } from "node:http2";
import { type AddressInfo, createServer as createTcpServer, connect as openTcp, type Socket } from "node:net";
import { after, before, beforeEach, test } from "node:test";
import { connectNodeAdapter } from "@connectrpc/connect-node";
import type { Event } from "#dist/gen/luthier/v1/event_pb.js";
import {
  Cancelled,
  type Client,
  connect,
  DeadlineExceeded,
  InvalidArgument,
  LuthierError,
  Reason,
  Unavailable,
} from "#dist/node.js";
import { API_KEY, ScriptedServices, Signal, thrown } from "./scripted.js";

// Events come when they are asked for by SIGUSR2.
const PROGRAM = `
import { ScriptedServices } from ${JSON.stringify(import.meta.resolve("./scripted.js"))};
process.on("SIGUSR2", () => undefined).setMaxListeners(0);
const services = new ScriptedServices();
services.answers.getDataset = (request) => ({ name: request.name });
services.answers.watchFineTuningJob = async function* (request) {
  for (let sequence = request.startSequence || 1n; ; sequence += 1n) {
    yield { sequence, payload: { case: "log", value: { text: "so far" } } };
    await new Promise((resolve) => process.once("SIGUSR2", resolve));
  }
};
await services.start();
console.log(services.address);`;
const QUICK = { intervalSeconds: 0.1, timeoutSeconds: 0.3 };

/** What would end a program. */
const uncaught: unknown[] = [];
process.on("uncaughtException", (error) => uncaught.push(error));

let server: ChildProcess;
let address = "";

before(async () => {
  server = spawn(process.execPath, ["--input-type=module", "--eval", PROGRAM], {
    stdio: ["ignore", "pipe", "inherit"],
  });
  const [said] = await once(server.stdout as NodeJS.ReadableStream, "data");
  address = String(said).trim();
});
beforeEach(() => server.kill("SIGCONT"));
after(() => server.kill("SIGKILL"));

function clientOf(options: Parameters<typeof connect>[0] = {}): Client {
  return connect({
    apiKey: API_KEY,
    dataAddress: address,
    trainingAddress: address,
    retry: { deadlineSeconds: 0 },
    keepalive: QUICK,
    ...options,
  });
}

/** The number of the next event. */
async function next(events: AsyncGenerator<Event, void, undefined>): Promise<bigint | undefined> {
  const { done, value } = await events.next();
  return done === true ? undefined : value.sequence;
}

const pause = (ms: number): Promise<void> => new Promise((resolve) => setTimeout(resolve, ms));

test("a service that stops answers no ping: calls fail as what may be tried again, and the process lives", async () => {
  using client = clientOf({ timeoutSeconds: 2 });
  const events = client.jobs.watch("j");
  assert.equal(await next(events), 1n);
  server.kill("SIGSTOP");
  // While the connection goes, and its error is on its way, others find it: all of them at its very end.
  const others: Promise<unknown>[] = [];
  const watched = events.next().catch((error: unknown) => {
    others.push(client.jobs.get("j").catch((other: unknown) => other));
    setImmediate(() => others.push(client.jobs.get("j").catch((other: unknown) => other)));
    return error;
  });
  const error = await watched;
  assert.ok(error instanceof Unavailable, String(error));
  assert.equal(error.reason, Reason.SERVICE_UNAVAILABLE);
  assert.match(error.message, /no answer to a ping within 0.3 s/);
  await pause(20);
  assert.equal(others.length, 2);
  for (const other of await Promise.all(others)) {
    assert.ok(other instanceof LuthierError, String(other));
  }
  server.kill("SIGCONT");
  assert.equal((await client.datasets.get("a")).name, "projects/default/datasets/a");
});

test("a watch goes on once its service answers again, with each event once", async () => {
  using client = clientOf({ retry: { initialSeconds: 0.01, deadlineSeconds: 20 } });
  const events = client.jobs.watch("j");
  assert.equal(await next(events), 1n);
  server.kill("SIGSTOP");
  const waiting = next(events);
  await pause(1500);
  server.kill("SIGCONT");
  assert.equal(await waiting, 2n);
});

test("a connection that was idle is looked at as soon as it is used", async () => {
  using client = clientOf({ timeoutSeconds: 20 });
  await client.datasets.get("a");
  await pause(200);
  server.kill("SIGSTOP");
  const began = performance.now();
  await thrown(Unavailable, client.datasets.get("a"));
  const took = performance.now() - began;
  assert.ok(took > 250 && took < 5000, `${took} ms`);
});

/** A way to the server: its connections may fall silent for good, and those that are made afterwards reach it. */
async function silenced(): Promise<{ address: string; fallSilent(): void } & Disposable> {
  const sockets: Socket[] = [];
  const way = createTcpServer((near) => {
    const far = openTcp(Number(address.split(":")[1]), "127.0.0.1");
    for (const socket of [near, far]) {
      socket.on("error", () => undefined);
    }
    near.pipe(far).pipe(near);
    sockets.push(near, far);
  });
  await new Promise<void>((resolve) => way.listen(0, "127.0.0.1", resolve));
  return {
    address: `127.0.0.1:${(way.address() as AddressInfo).port}`,
    fallSilent() {
      for (const socket of sockets) {
        socket.unpipe();
        socket.resume();
      }
    },
    [Symbol.dispose]() {
      way.close();
      for (const socket of sockets) {
        socket.destroy();
      }
    },
  };
}

test("a connection that is gone is found out by calls that end sooner than a ping", async () => {
  using way = await silenced();
  const keepalive = { intervalSeconds: 0.05, timeoutSeconds: 1 };
  using client = clientOf({ dataAddress: way.address, timeoutSeconds: 0.6, keepalive });
  await client.datasets.get("a");
  way.fallSilent();
  await pause(100);
  await thrown(DeadlineExceeded, client.datasets.get("a"));
  // Its stream is closed by then: none is left on the connection.
  await pause(50);
  // The second one ends by its own time or with the connection, whichever is first.
  await thrown(LuthierError, client.datasets.get("a"));
  await pause(50);
  assert.equal((await client.datasets.get("a")).name, "projects/default/datasets/a");
});

test("a connection that is gone is found out when nobody waits any more", async () => {
  using way = await silenced();
  const keepalive = { intervalSeconds: 0.05, timeoutSeconds: 1 };
  using client = clientOf({ dataAddress: way.address, timeoutSeconds: 0.6, keepalive });
  await client.datasets.get("a");
  way.fallSilent();
  await pause(100);
  await thrown(DeadlineExceeded, client.datasets.get("a"));
  // On a busy machine a new connection may take longer than a call; over the one that is gone none ever ends well.
  let found: string | undefined;
  for (let tries = 0; found === undefined && tries < 10; tries += 1) {
    await pause(1000);
    found = await client.datasets.get("a").then(
      ({ name }) => name,
      () => undefined,
    );
  }
  assert.equal(found, "projects/default/datasets/a");
});

test("a connection that never opens is given up", async () => {
  const sockets: Socket[] = [];
  const mute = createTcpServer((socket) => sockets.push(socket));
  await new Promise<void>((resolve) => mute.listen(0, "127.0.0.1", resolve));
  const dataAddress = `https://127.0.0.1:${(mute.address() as AddressInfo).port}`;
  using client = clientOf({ dataAddress, timeoutSeconds: 20 });
  // However it ends: an open socket would keep this process.
  using _ending = {
    [Symbol.dispose]() {
      mute.close();
      for (const socket of sockets) {
        socket.destroy();
      }
    },
  };
  const began = performance.now();
  const calls = [1, 2].map(() => thrown(Unavailable, client.datasets.get("a")));
  for (const error of await Promise.all(calls)) {
    assert.match(error.message, /no connection was open within 0.3 s/);
  }
  assert.ok(performance.now() - began < 10_000);
  assert.equal(sockets.length, 1);
});

test("a process that was busy itself does not take a service for gone", async () => {
  using client = clientOf({ keepalive: { intervalSeconds: 0.01, timeoutSeconds: 0.5 } });
  const events = client.jobs.watch("j");
  assert.equal(await next(events), 1n);
  const waiting = next(events);
  server.kill("SIGSTOP");
  await pause(100);
  server.kill("SIGCONT");
  for (const until = performance.now() + 1000; performance.now() < until; ) {
    // The ping that was under way is answered meanwhile, and nobody reads the answer.
  }
  await pause(50);
  server.kill("SIGUSR2");
  assert.equal(await waiting, 2n);
});

test("each call to a service that is not there has its own end", async () => {
  using client = clientOf({ dataAddress: "127.0.0.1:1" });
  const calls = ["a", "b", "c"].map((name) => thrown(Unavailable, client.datasets.get(name)));
  for (const error of await Promise.all(calls)) {
    assert.match(error.message, /ECONNREFUSED/);
  }
});

/** Services whose sessions a test has in its hand. */
async function seenSessions(): Promise<{
  services: ScriptedServices;
  sessions: ServerHttp2Session[];
  address: string;
  http: Http2Server;
}> {
  const services = new ScriptedServices();
  services.answers.getDataset = (request) => ({ name: request.name });
  const sessions: ServerHttp2Session[] = [];
  const http = createServer(connectNodeAdapter({ routes: (router) => services.routes(router) }));
  http.on("session", (session) => sessions.push(session));
  await new Promise<void>((resolve) => http.listen(0, "127.0.0.1", resolve));
  return { services, sessions, address: `127.0.0.1:${(http.address() as AddressInfo).port}`, http };
}

test("a service that is not there yet is called again until it is", async () => {
  const services = new ScriptedServices();
  services.answers.getDataset = (request) => ({ name: request.name });
  await services.start();
  await services.stop();
  using client = clientOf({
    dataAddress: services.address,
    retry: { initialSeconds: 0.01, deadlineSeconds: 20 },
  });
  let isAnswered = false;
  const calls = Promise.all(["a", "b", "c"].map((name) => client.datasets.get(name))).finally(() => {
    isAnswered = true;
  });
  await pause(200);
  assert.ok(!isAnswered);
  await services.start();
  try {
    assert.deepEqual(
      (await calls).map(({ name }) => name),
      ["a", "b", "c"].map((name) => `projects/default/datasets/${name}`),
    );
  } finally {
    client.close();
    await services.stop();
  }
});

test("a service that goes away for good ends what it has begun, and new calls have another connection", async () => {
  const at = await seenSessions();
  const answered = new Signal();
  at.services.answers.getModel = async (request) => {
    await answered.promise;
    return { name: request.name };
  };
  using client = clientOf({ dataAddress: at.address, trainingAddress: at.address });
  const first = client.models.get("m");
  await client.datasets.get("a");
  for (let left = 100; at.services.count("getModel") === 0 && left > 0; left -= 1) {
    await pause(10);
  }
  for (const session of at.sessions) {
    session.close();
  }
  await pause(20);
  assert.equal((await client.datasets.get("b")).name, "projects/default/datasets/b");
  answered.set();
  assert.equal((await first).name, "projects/default/models/m");
  assert.equal(at.sessions.length, 3);
  client.close();
  await new Promise((resolve) => at.http.close(resolve));
});

test("who closes a client cancels what goes on, also over a connection that takes no more", async () => {
  const at = await seenSessions();
  at.services.answers.getModel = (_request, context) =>
    new Promise((resolve) => context.signal.addEventListener("abort", () => resolve({})));
  using client = clientOf({ dataAddress: at.address, trainingAddress: at.address });
  const waiting = thrown(Cancelled, client.models.get("m"));
  for (let left = 100; at.services.count("getModel") === 0 && left > 0; left -= 1) {
    await pause(10);
  }
  at.sessions[0]?.close();
  await pause(20);
  const another = thrown(Cancelled, client.models.get("m"));
  for (let left = 100; at.services.count("getModel") === 1 && left > 0; left -= 1) {
    await pause(10);
  }
  assert.equal(at.sessions.length, 2);
  const codes = at.sessions.map(async (session) => (await once(session, "goaway"))[0]);
  client.close();
  assert.deepEqual(await Promise.all(codes), [constants.NGHTTP2_CANCEL, constants.NGHTTP2_CANCEL]);
  await Promise.all([waiting, another]);
  await new Promise((resolve) => at.http.close(resolve));
});

/** How long after one another so many pings come at least: a busy machine makes it more, never less. */
async function leastGap(session: ServerHttp2Session, numGaps: number): Promise<number> {
  let least = Number.POSITIVE_INFINITY;
  let before = 0;
  for (let left = numGaps; left >= 0; left -= 1) {
    await once(session, "ping");
    const now = performance.now();
    least = left === numGaps ? least : Math.min(least, now - before);
    before = now;
  }
  return least;
}

for (const { said, isHalved } of [
  { said: "too_many_pings", isHalved: true },
  { said: "too many streams", isHalved: false },
]) {
  test(`who is told "${said}" sends ${isHalved ? "half" : "just"} as many pings`, async () => {
    const at = await seenSessions();
    const ended: Promise<void>[] = [];
    at.services.answers.watchFineTuningJob = async function* (_request, context) {
      ended.push(new Promise((resolve) => context.signal.addEventListener("abort", () => resolve())));
      yield { sequence: 1n };
      await ended.at(-1);
    };
    using client = clientOf({
      trainingAddress: at.address,
      keepalive: { intervalSeconds: 0.2, timeoutSeconds: 5 },
      retry: { initialSeconds: 0.01, deadlineSeconds: 5 },
    });
    const events = client.jobs.watch("j");
    await next(events);
    void next(events).catch(() => undefined);
    const [former] = at.sessions;
    assert.ok(former);
    const least = await leastGap(former, 4);
    assert.ok(least > 190 && least < 390, `${least} ms`);
    former.goaway(constants.NGHTTP2_ENHANCE_YOUR_CALM, 0, Buffer.from(said));
    for (let left = 100; at.sessions.length < 2 && left > 0; left -= 1) {
      await pause(10);
    }
    const [, afterwards] = at.sessions;
    assert.ok(afterwards);
    const after = await leastGap(afterwards, 4);
    assert.ok(isHalved ? after > 390 : after < 390, `${least} ms, then ${after} ms`);
    client.close();
    await new Promise((resolve) => at.http.close(resolve));
  });
}

test("the times of pings are numbers of seconds", () => {
  for (const field of ["intervalSeconds", "timeoutSeconds"]) {
    for (const seconds of [0, -1, Number.NaN, Number.POSITIVE_INFINITY]) {
      assert.throws(
        () => clientOf({ keepalive: { [field]: seconds } }),
        (error) => error instanceof InvalidArgument && error.violations[0]?.field === `keepalive.${field}`,
      );
    }
  }
});

test("no error of a connection came where nobody listened", async () => {
  await pause(500);
  assert.deepEqual(uncaught, []);
});
