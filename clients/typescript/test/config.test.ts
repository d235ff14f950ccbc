/** Where a client finds its configuration, and short names. */

import assert from "node:assert/strict";
import { mkdtempSync, rmSync, writeFileSync } from "node:fs";
import { homedir, tmpdir } from "node:os";
import { join } from "node:path";
import { after, test } from "node:test";
import { connect, InvalidArgument, names, readConfig, Unauthenticated } from "#dist/node.js";

const home = mkdtempSync(join(tmpdir(), "luthier-home-"));
writeFileSync(join(home, "api-key"), "test-key\n");
after(() => rmSync(home, { recursive: true }));

test("arguments come before the environment and that before defaults", () => {
  const environ = {
    LUTHIER_HOME: home,
    LUTHIER_DATA_ADDRESS: "127.0.0.1:1",
    LUTHIER_TRAINING_ADDRESS: "127.0.0.1:2",
    LUTHIER_CLIENT_TIMEOUT_SECONDS: "7.5",
  };
  assert.deepEqual(readConfig({ trainingAddress: "127.0.0.1:9" }, environ), {
    apiKey: "test-key",
    project: "default",
    dataAddress: "127.0.0.1:1",
    trainingAddress: "127.0.0.1:9",
    evaluationAddress: "127.0.0.1:7603",
    timeoutSeconds: 7.5,
  });
  assert.equal(readConfig({ timeoutSeconds: 2 }, environ).timeoutSeconds, 2);
});

test("the key is found in argument, environment or home", () => {
  const environ = { LUTHIER_HOME: home, LUTHIER_CLIENT_API_KEY: "of-environ" };
  assert.equal(readConfig({ apiKey: "said" }, environ).apiKey, "said");
  assert.equal(readConfig({}, environ).apiKey, "of-environ");
  assert.equal(readConfig({}, { LUTHIER_HOME: home }).apiKey, "test-key");
  assert.equal(readConfig({ home }, { LUTHIER_HOME: "/nonexistent" }).apiKey, "test-key");
});

test("without a key it is said where it was looked for", () => {
  for (const [asked, path] of [
    [join(home, "none"), join(home, "none", "api-key")],
    [join(home, "api-key"), join(home, "api-key", "api-key")],
    ["~/nonexistent-luthier", join(homedir(), "nonexistent-luthier", "api-key")],
  ]) {
    assert.throws(
      () => readConfig({ home: asked }, {}),
      (error: unknown) => {
        assert.ok(error instanceof Unauthenticated);
        assert.equal(error.reason, "CREDENTIALS_MISSING");
        assert.equal(error.metadata.path, path);
        return true;
      },
    );
  }
});

test("unknown names of its section are refused", () => {
  assert.throws(() => readConfig({}, { LUTHIER_CLIENT_APIKEY: "k" }), {
    name: "InvalidArgument",
    message: /LUTHIER_CLIENT_APIKEY is not known/,
  });
});

for (const text of ["soon", "0", "-1", "NaN", "Infinity"]) {
  test(`a timeout of '${text}' is refused`, () => {
    const environ = { LUTHIER_CLIENT_API_KEY: "k", LUTHIER_CLIENT_TIMEOUT_SECONDS: text };
    assert.throws(() => readConfig({}, environ), { name: "InvalidArgument", message: /timeout_seconds/ });
  });
}

test("the key is not sent in the clear", () => {
  const far = { apiKey: "k", dataAddress: "example.org:7601" };
  assert.throws(() => connect(far), { name: "InvalidArgument", message: /example\.org:7601/ });
  connect({ apiKey: "k", dataAddress: "https://127.0.0.1:1" }).close();
});

const MISLEADING = [
  "127.0.0.1:1@evil.example:80",
  "127.evil.example:80",
  "localhost:1@evil.example",
  "localhost.evil.example:80",
  "localhost:80/path",
  "localhost:80?query",
  "127.0.0.256:80",
  "127.1:80",
  "127.0.0.1",
  "127.0.0.1:",
  "127.0.0.1:70000",
  "[::1]evil.example:80",
  "[::2]:80",
  "http://127.0.0.1:80",
  "https://good.example@evil.example",
  "https://good.example/@evil.example",
  "https://good.example?x",
  "https://",
];
for (const dataAddress of MISLEADING) {
  test(`the key is not sent to ${dataAddress}`, () => {
    assert.throws(() => connect({ apiKey: "k", dataAddress }), {
      name: "InvalidArgument",
      message: /must be host:port on loopback/,
    });
  });
}

test("the key is sent to this machine and over TLS", () => {
  const near = [
    "127.0.0.1:1",
    "127.255.0.9:65535",
    "localhost:80",
    "LOCALHOST:1",
    "[::1]:7601",
    "unix:/run/x",
  ];
  for (const dataAddress of [...near, "https://example.org", "https://[2001:db8::1]:443", "https://a-b.c/"]) {
    connect({ apiKey: "k", dataAddress }).close();
  }
});

test("a key that no header carries is refused, and not repeated", () => {
  const folder = mkdtempSync(join(tmpdir(), "luthier-lines-"));
  writeFileSync(join(folder, "api-key"), "sek\nret\n");
  const given = [
    () => readConfig({ apiKey: "sek\nret" }, {}),
    () => readConfig({}, { LUTHIER_CLIENT_API_KEY: "sek\tret" }),
    () => readConfig({ home: folder }, {}),
    () => connect({ apiKey: "sekrét" }),
  ];
  try {
    for (const reading of given) {
      assert.throws(reading, (error: unknown) => {
        assert.ok(error instanceof InvalidArgument);
        assert.match(error.message, /the API key must consist of visible ASCII characters/);
        assert.ok(!error.message.includes("sek"));
        return true;
      });
    }
  } finally {
    rmSync(folder, { recursive: true });
  }
});

test("names are completed below the project", () => {
  const full = "projects/p/datasets/d/versions/v1";
  assert.equal(names.child("p", "datasets", "d"), "projects/p/datasets/d");
  assert.equal(names.version("p", "d/v1"), full);
  assert.equal(names.version("p", "d/versions/v1"), full);
  assert.equal(names.version("q", full), full);
  assert.equal(names.checkpoint("p", "j/c"), "projects/p/fineTuningJobs/j/checkpoints/c");
  assert.equal(names.weights("p", "m"), "projects/p/models/m");
  assert.equal(names.askable("p", "@a"), "projects/p/modelAliases/a");
  assert.equal(names.short(full), "d/v1");
  assert.equal(names.version("p", names.short(full)), full);
});

for (const name of ["", "d", "d/", "/v", "a/b/c", "d/checkpoints/c"]) {
  test(`'${name}' is no version`, () => {
    assert.throws(
      () => names.version("p", name),
      (error: unknown) => {
        assert.ok(error instanceof InvalidArgument);
        assert.match(error.message, /must be <dataset>\/<version>/);
        assert.equal(error.violations[0]?.field, "name");
        return true;
      },
    );
  });
}

test("a name with two parts is no dataset", () => {
  assert.throws(() => names.child("p", "datasets", "a/b"), { message: /must be <dataset>/ });
});
