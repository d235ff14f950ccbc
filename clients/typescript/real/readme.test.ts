/** The programs of the README, compiled as they stand there and run against real services (see services.test.ts). */

import assert from "node:assert/strict";
import { execFileSync } from "node:child_process";
import { mkdirSync, readFileSync, rmSync, writeFileSync } from "node:fs";
import { join } from "node:path";
import { before, test } from "node:test";
import { Split } from "#dist/gen/luthier/v1/dataset_pb.js";
import { connect } from "#dist/node.js";
import { chats, version } from "./preparing.js";

const PACKAGE = join(import.meta.dirname, "..", "..");
// Below the package, so that `luthier-client` is found by its own name.
const FOLDER = join(PACKAGE, "build", "readme");
let tuned = "";
const blocks = readFileSync(join(PACKAGE, "README.md"), "utf8").match(/(?<=```ts\n).*?(?=```)/gs) ?? [];

function run(number: number, ...words: string[]): string {
  const program = join(FOLDER, `block${number}.js`);
  return execFileSync(process.execPath, [program, ...words], { encoding: "utf8", timeout: 240_000 });
}

before(() => {
  assert.equal(blocks.length, 6);
  rmSync(FOLDER, { recursive: true, force: true });
  mkdirSync(FOLDER, { recursive: true });
  for (const [number, block] of blocks.entries()) {
    writeFileSync(join(FOLDER, `block${number}.ts`), block);
  }
  const compilerOptions = {
    strict: true,
    target: "es2022",
    module: "nodenext",
    lib: ["es2023", "dom", "esnext.disposable"],
    types: ["node"],
    skipLibCheck: true,
  };
  writeFileSync(join(FOLDER, "tsconfig.json"), JSON.stringify({ compilerOptions, include: ["*.ts"] }));
  execFileSync(join(PACKAGE, "node_modules", ".bin", "tsc"), ["-p", FOLDER], { stdio: "inherit" });
});

test("models are listed", () => {
  assert.match(run(0), /^projects\/default\/models\/tiny$/m);
});

test("a file becomes a tuned model", () => {
  const file = join(FOLDER, "chats.jsonl");
  const chat = (colour: string): string =>
    JSON.stringify({
      messages: [
        { role: "user", content: `is it ${colour}?` },
        { role: "assistant", content: colour },
      ],
    });
  writeFileSync(file, `${["red", "green", "blue", "grey", "black", "white"].map(chat).join("\n")}\n`);
  const said = run(1, "tiny", file);
  assert.match(said, /^\d+ of \d+ bytes$/m);
  assert.match(said, /^step 2 /m);
  tuned = /^tuned: (projects\/default\/models\/\S+)$/m.exec(said)?.[1] ?? "";
  assert.notEqual(tuned, "");
});

test("a tuned model is compared with its base, and takes over a role or says why not", async () => {
  using client = connect();
  const asked = await version(client, "tsr-asked", [[Split.TEST, chats(12, 100)]]);
  const said = run(2, asked, "tiny", tuned);
  assert.match(said, /^verdict: \S.*perplexity/m);
  assert.equal(said.match(/^(red|green|blue) \[/gm)?.length, 12);
  assert.match(said, /^(live: projects\/default\/models\/\S+|not yet: .*perplexity.*)$/m);
});

test("tables are read", async () => {
  using client = connect();
  for await (const version of client.datasets.versions.list("support")) {
    const rendering = { datasetVersion: version.name, model: "tiny" };
    await client.renderings.create(rendering, { renderingId: "my-rendering" });
  }
  await client.renderings.wait("my-rendering", { timeoutSeconds: 120 });
  assert.match(run(4), /^6 \[\s*'row'/m);
});

test("a learning curve says whether more data would help", async () => {
  using client = connect();
  const asked = await version(client, "tsr-held", [[Split.TEST, chats(12, 100)]]);
  const said = run(5, "tiny", "my-rendering", asked);
  assert.match(said, /^tuning on \d records: support-curve-p50$/m);
  assert.equal(said.match(/^\d records: perplexity \d/gm)?.length, 2);
  assert.match(said, /^(More data|Whether more data) .* records: .*each doubling has changed perplexity/m);
});
