/** The client for browsers in one: Chromium calls over gRPC-Web, at real services' sockets, what a test answers. */

import assert from "node:assert/strict";
import { existsSync } from "node:fs";
import { createServer, type Server } from "node:http";
import type { AddressInfo, Socket } from "node:net";
import { after, before, test } from "node:test";
import { fileURLToPath } from "node:url";
import { Code } from "@connectrpc/connect";
import { connectNodeAdapter } from "@connectrpc/connect-node";
import { build } from "esbuild";
import { type Browser, chromium, type Page } from "playwright-core";
import type * as Web from "#dist/web.js";
import { API_KEY, refusal, ScriptedServices, stopping } from "./scripted.js";

const CHROMIUM = "/usr/bin/chromium";

/** The page's origin: scripted services over HTTP/1.1, and the client as a bundler makes it of the package. */
class Origin {
  readonly services = new ScriptedServices();
  url = "";
  private server: Server | undefined;
  private readonly sockets = new Set<Socket>();

  async start(): Promise<void> {
    const entry = fileURLToPath(import.meta.resolve("#dist/web.js"));
    // Whatever only Node has would stop it.
    const made = await build({
      entryPoints: [entry],
      bundle: true,
      format: "esm",
      platform: "browser",
      write: false,
    });
    const script = made.outputFiles[0]?.text ?? "";
    const fallback: NonNullable<Parameters<typeof connectNodeAdapter>[0]["fallback"]> = (
      request,
      response,
    ) => {
      const isScript = request.url === "/web.js";
      response.setHeader("content-type", isScript ? "text/javascript" : "text/html");
      response.end(isScript ? script : "<!doctype html><title>Luthier</title>");
    };
    const routes = connectNodeAdapter({ routes: (router) => this.services.routes(router), fallback });
    const server = createServer(routes);
    server.on("connection", (socket) => {
      this.sockets.add(socket);
      socket.on("close", () => this.sockets.delete(socket));
    });
    await new Promise<void>((resolve) => server.listen(0, "127.0.0.1", resolve));
    this.url = `http://127.0.0.1:${(server.address() as AddressInfo).port}`;
    this.server = server;
  }

  breakConnections(): void {
    for (const socket of this.sockets) {
      socket.destroy();
    }
  }

  async stop(): Promise<void> {
    this.breakConnections();
    await new Promise((resolve) => this.server?.close(resolve));
  }
}

/** What the page has: the module, and a client of its own origin. */
interface Window {
  luthier: typeof Web;
  client: ReturnType<typeof Web.connect>;
}

const origin = new Origin();
let browser: Browser;
let page: Page;

before(async () => {
  assert.ok(
    existsSync(CHROMIUM),
    "chromium is missing: bash tests/debian.sh installs what the tests need of Debian",
  );
  await origin.start();
  browser = await chromium.launch({ executablePath: CHROMIUM });
  page = await browser.newPage();
  await page.goto(origin.url);
  await page.evaluate(async (apiKey) => {
    const url = "/web.js";
    const luthier = (await import(url)) as typeof Web;
    const retry = { initialSeconds: 0.01, maxSeconds: 0.05, deadlineSeconds: 5 };
    const client = luthier.connect({ baseUrl: location.origin, apiKey, retry });
    Object.assign(globalThis, { luthier, client });
  }, API_KEY);
});

after(async () => {
  await browser?.close();
  await origin.stop();
});

test("a call from a page carries its key, and is answered", async () => {
  origin.services.answers.getDataset = (request) => ({ name: request.name, displayName: "größer" });
  const found = await page.evaluate(async () => {
    const { client } = globalThis as unknown as Window;
    const { name, displayName } = await client.datasets.get("a");
    return { name, displayName };
  });
  assert.deepEqual(found, { name: "projects/default/datasets/a", displayName: "größer" });
  assert.equal(origin.services.headers.getDataset?.get("authorization"), `Bearer ${API_KEY}`);
});

test("a page knows errors by class and reason, and tries again what may pass", async () => {
  const { services } = origin;
  services.answers.getModel = () => {
    throw refusal(Code.NotFound, "it does not exist", { reason: "RESOURCE_NOT_FOUND" });
  };
  services.answers.getRendering = (request) => {
    if (services.count("getRendering") < 3) {
      throw stopping();
    }
    return { name: request.name };
  };
  const found = await page.evaluate(async () => {
    const { client, luthier } = globalThis as unknown as Window;
    const error: unknown = await client.models.get("m").catch((caught: unknown) => caught);
    const { name } = await client.renderings.get("r");
    return error instanceof luthier.NotFound ? { reason: error.reason, message: error.message, name } : {};
  });
  const name = "projects/default/renderings/r";
  assert.deepEqual(found, { reason: "RESOURCE_NOT_FOUND", message: "it does not exist", name });
  assert.equal(services.count("getRendering"), 3);
});

test("a page watches a job over a lost connection and a service that stops", async () => {
  const starts: number[] = [];
  origin.services.answers.watchFineTuningJob = async function* (request: { startSequence: bigint }) {
    starts.push(Number(request.startSequence));
    for (let sequence = Number(request.startSequence); sequence < 7; sequence += 1) {
      yield { sequence: BigInt(sequence), payload: { case: "progress", value: { completed: 1n } } };
      yield { sequence: BigInt(sequence), payload: { case: "heartbeat", value: {} } };
      if (sequence === 2 && starts.length === 1) {
        // What was sent has to reach the page first.
        await new Promise((resolve) => setTimeout(resolve, 200));
        origin.breakConnections();
        await new Promise(() => undefined);
      }
      if (sequence === 4 && starts.length === 2) {
        throw stopping();
      }
    }
  };
  const seen = await page.evaluate(async () => {
    const { client } = globalThis as unknown as Window;
    const numbers: number[] = [];
    for await (const event of client.jobs.watch("j")) {
      numbers.push(Number(event.sequence));
    }
    return numbers;
  });
  assert.deepEqual(seen, [1, 2, 3, 4, 5, 6]);
  assert.deepEqual(starts, [1, 3, 5]);
});

test("what gRPC-Web cannot do is refused in words", async () => {
  const found = await page.evaluate(async () => {
    const { client, luthier } = globalThis as unknown as Window;
    const file = new File(["{}"], "a.jsonl");
    const error: unknown = await client.datasets.upload(file as never).catch((caught: unknown) => caught);
    return error instanceof luthier.LuthierError ? error.name : String(error);
  });
  assert.equal(found, "Unimplemented");
});
