/** Who is told by webhooks that something has ended. */

import { createServer, type IncomingHttpHeaders, type Server } from "node:http";
import type { AddressInfo } from "node:net";

/** One POST that came. */
export interface Told {
  readonly path: string;
  readonly headers: IncomingHttpHeaders;
  readonly body: string;
}

/** Notes what comes and answers 204, or on `/gone` 410: nothing more is wanted there. */
export class Receiver {
  readonly told: Told[] = [];
  origin = "";
  private readonly server: Server;

  private constructor() {
    this.server = createServer((request, response) => {
      const pieces: Buffer[] = [];
      request.on("data", (piece: Buffer) => pieces.push(piece));
      request.on("end", () => {
        const { url = "", headers } = request;
        this.told.push({ path: url, headers, body: Buffer.concat(pieces).toString() });
        response.writeHead(url === "/gone" ? 410 : 204).end();
      });
    });
  }

  /** Listen on a free port of this machine. */
  static async start(): Promise<Receiver> {
    const receiver = new Receiver();
    await new Promise<void>((resolve) => receiver.server.listen(0, "127.0.0.1", resolve));
    receiver.origin = `http://127.0.0.1:${(receiver.server.address() as AddressInfo).port}`;
    return receiver;
  }

  async close(): Promise<void> {
    this.server.closeAllConnections();
    await new Promise((resolve) => this.server.close(resolve));
  }
}
