/** What browsers do otherwise than Node: where a key may go, and what a lost connection is called. */

import assert from "node:assert/strict";
import { test } from "node:test";
import { Cancelled, InvalidArgument, LuthierError, Unavailable } from "#dist/index.js";
import { connect } from "#dist/web.js";
import { all, thrown } from "./scripted.js";

const SECRETS: readonly { apiKey?: string; headers?: Record<string, string> }[] = [
  { apiKey: "secret-key" },
  { headers: { Authorization: "Basic secret-key" } },
];
const CLEAR = [
  "http://example.org",
  "http://10.0.0.1:8080",
  "http://127.0.0.1.example.org",
  "http://localhost.example.org",
];
for (const baseUrl of CLEAR) {
  test(`a key does not travel to ${baseUrl}`, () => {
    for (const secret of SECRETS) {
      assert.throws(
        () => connect({ baseUrl, ...secret }),
        (error: unknown) => {
          assert.ok(error instanceof InvalidArgument);
          assert.match(error.message, /must be https, or http on loopback, got 'http:/);
          assert.ok(!error.message.includes("secret-key"));
          return true;
        },
      );
    }
    connect({ baseUrl }).close();
  });
}

test("a key travels over TLS and on this machine", () => {
  const safe = ["https://example.org/luthier", "http://localhost:8080", "http://[::1]:1", "http://127.9.0.1"];
  for (const baseUrl of safe) {
    connect({ baseUrl, apiKey: "k" }).close();
  }
});

for (const baseUrl of ["", "/calls", "example.org:80", "ftp://localhost", "http://"]) {
  test(`'${baseUrl}' is no URL to call where there is no page`, () => {
    assert.throws(() => connect({ baseUrl }), {
      name: "InvalidArgument",
      message: /baseUrl must be an http/,
    });
  });
}

test("a URL with a user, a query or a fragment is refused, and not repeated", () => {
  for (const baseUrl of [
    "https://me:word@example.org",
    "https://example.org?word",
    "https://example.org/#word",
  ]) {
    assert.throws(
      () => connect({ baseUrl }),
      (error: unknown) => error instanceof InvalidArgument && !error.message.includes("word"),
    );
  }
});

test("a key that no header carries is refused, and not repeated", () => {
  for (const apiKey of ["sek\nret", "sek ret", "sekrét"]) {
    assert.throws(
      () => connect({ baseUrl: "https://example.org", apiKey }),
      (error: unknown) => error instanceof InvalidArgument && !error.message.includes("sek"),
    );
  }
});

/** What Chrome, Safari, Firefox and Node say, of `fetch` and of its body. */
const WORDS = [
  "Failed to fetch",
  "Load failed",
  "NetworkError when attempting to fetch resource.",
  "network error",
  "terminated",
];
const DATASET = new Uint8Array([0, 0, 0, 0, 3, 10, 1, 97]);
const END = new Uint8Array([0x80, 0, 0, 0, 14, ...new TextEncoder().encode("grpc-status:0\n")]);

/** A response whose body has these pieces, and then is lost, if so. */
function answer(pieces: readonly Uint8Array[], lost?: Error): Response {
  const left = [...pieces];
  const body = new ReadableStream<Uint8Array>({
    pull(controller) {
      const piece = left.shift();
      if (piece !== undefined) {
        controller.enqueue(piece);
      } else if (lost !== undefined) {
        controller.error(lost);
      } else {
        controller.close();
      }
    },
  });
  return new Response(body as BodyInit, { headers: { "content-type": "application/grpc-web+proto" } });
}

for (const word of WORDS) {
  test(`'${word}' is a connection that was lost`, async () => {
    const answers = [
      () => Promise.reject(new TypeError(word)),
      async () => answer([DATASET], new TypeError(word)),
      async () => answer([DATASET, END]),
    ];
    let calls = 0;
    const fetch = (): Promise<Response> => (answers[calls++] ?? answers[0])?.() as Promise<Response>;
    using client = connect({ baseUrl: "https://example.org", fetch, retry: { initialSeconds: 0.01 } });
    assert.equal((await client.datasets.get("a")).name, "a");
    assert.equal(calls, 3);
    const isLost = (): Promise<Response> => Promise.reject(new TypeError(word));
    using hasty = connect({ baseUrl: "https://example.org", fetch: isLost, retry: { deadlineSeconds: 0 } });
    const error = await thrown(Unavailable, hasty.datasets.get("a"));
    assert.equal(error.message, `the service cannot be reached: ${word}`);
  });

  test(`a watch goes on after '${word}'`, async () => {
    // Events of number 1 and 2.
    const [first, second] = [1, 2].map((number) => new Uint8Array([0, 0, 0, 0, 2, 8, number]));
    assert.ok(first && second);
    const job = new Uint8Array([0, 0, 0, 0, 5, 10, 1, 97, 18, 0]);
    const streams = [answer([first], new TypeError(word)), answer([second, END])];
    const fetch = async (url: unknown): Promise<Response> => {
      return String(url).endsWith("/GetFineTuningJob") ? answer([job, END]) : (streams.shift() ?? answer([]));
    };
    using client = connect({ baseUrl: "https://example.org", fetch, retry: { initialSeconds: 0.01 } });
    const seen = await all(client.jobs.watch("j", { uid: "u" }));
    assert.deepEqual(
      seen.map((event) => event.sequence),
      [1n, 2n],
    );
  });
}

test("other faults of a fetch, and its end by a signal, are not called lost connections", async () => {
  let calls = 0;
  const fetch = (): Promise<Response> => {
    calls += 1;
    return Promise.reject(new RangeError("out of paper"));
  };
  using client = connect({ baseUrl: "https://example.org", fetch });
  const error = await thrown(LuthierError, client.datasets.get("a"));
  assert.deepEqual([error instanceof Unavailable, error.message, calls], [false, "out of paper", 1]);
  await thrown(Cancelled, client.datasets.get("a", { signal: AbortSignal.abort("enough") }));
});
