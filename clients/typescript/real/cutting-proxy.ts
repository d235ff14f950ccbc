/** A way to a service that breaks: connections are cut while calls are under way. */

import { type AddressInfo, connect, createServer, type Server, type Socket } from "node:net";

/** What goes over a connection now, and how much has gone over it so far. */
export interface Passing {
  readonly way: "up" | "down";
  readonly data: Buffer;
  readonly up: number;
  readonly down: number;
}

/** What becomes of a connection, of which `number` were there before; held ones pass nothing more on until they are cut. */
export type Decide = (passing: Passing, number: number) => "pass" | "hold" | "cut";

/** Passes bytes on between clients and one service, and cuts connections where it is told. */
export class CuttingProxy {
  address = "";
  /** Connections that were cut. */
  numCut = 0;
  private numConnections = 0;
  private readonly sockets = new Set<Socket>();
  private readonly server: Server;

  private constructor(
    private readonly target: string,
    private readonly decide: Decide,
  ) {
    this.server = createServer((socket) => this.pass(socket));
  }

  /** Start a proxy to `target` (host:port). */
  static async to(target: string, decide: Decide): Promise<CuttingProxy> {
    const proxy = new CuttingProxy(target, decide);
    await new Promise<void>((resolve) => proxy.server.listen(0, "127.0.0.1", resolve));
    proxy.address = `127.0.0.1:${(proxy.server.address() as AddressInfo).port}`;
    return proxy;
  }

  /** Cut what is connected now. */
  cutAll(): void {
    this.numCut += this.sockets.size;
    for (const socket of this.sockets) {
      socket.destroy();
    }
  }

  async [Symbol.asyncDispose](): Promise<void> {
    this.cutAll();
    await new Promise((resolve) => this.server.close(resolve));
  }

  private pass(near: Socket): void {
    const number = this.numConnections;
    this.numConnections += 1;
    const [host = "", port] = this.target.split(":");
    const far = connect(Number(port), host);
    const passed = { up: 0, down: 0 };
    this.sockets.add(near);
    const end = (): void => {
      this.sockets.delete(near);
      near.destroy();
      far.destroy();
    };
    const forward = (from: Socket, to: Socket, way: keyof typeof passed): void => {
      from.on("data", (data: Buffer) => {
        passed[way] += data.length;
        const decided = this.decide({ way, data, ...passed }, number);
        if (decided === "cut") {
          this.numCut += 1;
          end();
          return;
        }
        const isTaken = to.write(data);
        if (decided === "hold") {
          from.pause();
        } else if (!isTaken) {
          from.pause();
          to.once("drain", () => from.resume());
        }
      });
      from.on("error", end);
      from.on("close", end);
    };
    forward(near, far, "up");
    forward(far, near, "down");
  }
}
