/** Where a client finds its configuration, and short names. */

import assert from "node:assert/strict";
import { mkdirSync, mkdtempSync, rmSync, writeFileSync } from "node:fs";
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

const PROFILES = `
default_profile = "laptop"

[profiles.laptop]
home = "${home}"
timeout_seconds = 5

[profiles.team]
project = "support"
data_address = "https://luthier.example.com:7601"
api_key_file = "${join(home, "team.key")}"
`;

/** An environment whose file of profiles says `text`. */
function withProfiles(text: string): { XDG_CONFIG_HOME: string } {
  const folder = mkdtempSync(join(home, "config-"));
  mkdirSync(join(folder, "luthier"));
  writeFileSync(join(folder, "luthier", "config.toml"), text);
  return { XDG_CONFIG_HOME: folder };
}

writeFileSync(join(home, "team.key"), "team-key\n");

test("the default profile is taken by itself", () => {
  const config = readConfig({}, withProfiles(PROFILES));
  assert.deepEqual([config.apiKey, config.timeoutSeconds, config.project], ["test-key", 5, "default"]);
});

test("a profile is named by argument or environment", () => {
  const environ = withProfiles(PROFILES);
  for (const config of [
    readConfig({ profile: "team" }, environ),
    readConfig({}, { ...environ, LUTHIER_CLIENT_PROFILE: "team" }),
    readConfig(
      {},
      {
        LUTHIER_CLIENT_CONFIG: join(environ.XDG_CONFIG_HOME, "luthier", "config.toml"),
        LUTHIER_CLIENT_PROFILE: "team",
      },
    ),
  ]) {
    assert.deepEqual([config.apiKey, config.project], ["team-key", "support"]);
    assert.equal(config.dataAddress, "https://luthier.example.com:7601");
    assert.equal(config.trainingAddress, "127.0.0.1:7602");
  }
});

test("the environment comes before a profile that nobody named beside it, and after one that an argument names", () => {
  const environ = {
    ...withProfiles(PROFILES),
    LUTHIER_CLIENT_PROFILE: "laptop",
    LUTHIER_CLIENT_PROJECT: "other",
    LUTHIER_DATA_ADDRESS: "127.0.0.1:1",
    LUTHIER_TRAINING_ADDRESS: "127.0.0.1:2",
    LUTHIER_CLIENT_API_KEY: "of-environ",
    LUTHIER_CLIENT_TIMEOUT_SECONDS: "9",
  };
  const quiet = readConfig({}, environ);
  assert.deepEqual(
    [quiet.apiKey, quiet.project, quiet.dataAddress, quiet.timeoutSeconds],
    ["of-environ", "other", "127.0.0.1:1", 9],
  );
  const named = readConfig({ profile: "team" }, environ);
  assert.deepEqual(
    [named.apiKey, named.project, named.dataAddress, named.trainingAddress],
    ["team-key", "support", "https://luthier.example.com:7601", "127.0.0.1:2"],
  );
  assert.equal(readConfig({ profile: "laptop" }, environ).timeoutSeconds, 5);
  assert.equal(readConfig({ profile: "team", apiKey: "said" }, environ).apiKey, "said");
});

test("a profile that there is not is named with those there are", () => {
  assert.throws(() => readConfig({ profile: "tean" }, withProfiles(PROFILES)), {
    name: "NotFound",
    message: /no profile 'tean' in .*config\.toml; there are: laptop, team/,
  });
});

for (const [text, message] of [
  ["[profiles.a]\nprojekt = 'x'", /profiles\.a: projekt is not known: known are project, home/],
  ["[profiles.a]\napi_key = 'x'", /api_key does not belong here; name a file that holds the key/],
  ["[profiles.a]\nproject = 3", /profiles\.a\.project must be a text, got '3'/],
  ["[profiles.a]\ntimeout_seconds = '3'", /timeout_seconds must be a number, got '3'/],
  ["default_profile = 'b'\n[profiles.a]", /default_profile must be one of a, got 'b'/],
  ["profiles = 3", /profiles must be tables/],
  ["profile = 'a'", /profile is not known: known are default_profile, profiles/],
  ["= =", /must be a readable file of TOML/],
] as const) {
  test(`a file of profiles that says ${JSON.stringify(text)} is refused`, () => {
    const environ = { ...withProfiles(text), LUTHIER_CLIENT_API_KEY: "k" };
    assert.throws(() => readConfig({}, environ), { name: "InvalidArgument", message });
  });
}

test("a file of profiles that is named must be there", () => {
  const path = join(home, "none.toml");
  assert.throws(() => readConfig({}, { LUTHIER_CLIENT_CONFIG: path, LUTHIER_CLIENT_API_KEY: "k" }), {
    name: "InvalidArgument",
    message: /LUTHIER_CLIENT_CONFIG must name a file, there is no .*none\.toml/,
  });
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
