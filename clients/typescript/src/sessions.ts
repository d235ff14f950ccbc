/** One HTTP/2 connection to a service: made anew when it is gone, and pinged while calls wait for it. */

import {
  type ClientHttp2Session,
  type ClientHttp2Stream,
  type ClientSessionOptions,
  type ClientSessionRequestOptions,
  connect,
  constants,
  type OutgoingHttpHeaders,
} from "node:http2";
import { Code, ConnectError } from "@connectrpc/connect";

/** When a service that says nothing is asked whether it is there. */
export interface Pings {
  /** How long nothing may come over a connection that calls wait for. */
  readonly intervalMs: number;
  /** How long the answer to a ping, or a connection to be open, may take before it is given up, and its calls fail. */
  readonly timeoutMs: number;
}

/** What gRPC's services say in a GOAWAY for pings; one for anything else is no reason to send fewer. */
const TOO_MANY_PINGS = "too_many_pings";
const MAX_INTERVAL_MS = 86_400_000;
const CLOSED = "the client was closed";

/**
 * What the gRPC transport of connect-node has its streams from, in place of its own `Http2SessionManager`.
 *
 * That one, in 2.1, takes its listeners from a connection that a call finds destroyed, so that the error of a ping comes when
 * nobody listens and ends the process; it pings connections that are destroyed, to the same end (connect-es#1795); and two
 * calls that come while it looks whether a connection is there may have one wait for ever.
 */
export class Sessions {
  /** The origin that calls go to. */
  readonly authority: string;
  private connection: Connection | undefined;
  /** Also those that take no more streams, and have some that go on. */
  private readonly connections = new Map<object, Connection>();
  private intervalMs: number;
  private isClosed = false;

  constructor(
    url: string,
    private readonly pings: Pings,
    private readonly options: ClientSessionOptions = {},
  ) {
    this.authority = new URL(url).origin;
    this.intervalMs = pings.intervalMs;
  }

  /** Begin a stream, over a connection that is made first where there is none. Throws what became of the connection. */
  async request(
    method: string,
    path: string,
    headers: OutgoingHttpHeaders,
    options: ClientSessionRequestOptions,
  ): Promise<ClientHttp2Stream> {
    for (;;) {
      const connection = this.usable();
      await connection.opened;
      // It may have gone while its opening was told to others.
      if (connection.isUsable) {
        return connection.request({ ...headers, ":method": method, ":path": path }, options);
      }
    }
  }

  /** Tell that something has come over a stream, so that its service is there. */
  notifyResponseByteRead(stream: ClientHttp2Stream): void {
    if (stream.session !== undefined) {
      this.connections.get(stream.session)?.heard();
    }
  }

  /** Close all connections, and let there be no other. Streams end. */
  close(): void {
    this.isClosed = true;
    for (const { session } of this.connections.values()) {
      // Without an error Node says NO_ERROR, whatever the code.
      session.destroy(new ConnectError(CLOSED, Code.Canceled), constants.NGHTTP2_CANCEL);
    }
  }

  private usable(): Connection {
    if (this.isClosed) {
      throw new ConnectError(CLOSED, Code.Canceled);
    }
    if (!this.connection?.isUsable) {
      const pings = { ...this.pings, intervalMs: this.intervalMs };
      const session = connect(this.authority, this.options);
      this.connection = new Connection(session, pings, (code, said) => {
        if (code === constants.NGHTTP2_ENHANCE_YOUR_CALM && said === TOO_MANY_PINGS) {
          // So do gRPC's clients (A8) where a service, or a proxy before it, calls pings too many.
          this.intervalMs = Math.min(pings.intervalMs * 2, MAX_INTERVAL_MS);
        }
      });
      this.connections.set(session, this.connection);
      session.once("close", () => this.connections.delete(session));
    }
    return this.connection;
  }
}

/** A connection and the streams on it. What has no streams keeps no process from ending. */
class Connection {
  /** Kept once streams may begin; rejected with what came in its place. */
  readonly opened: Promise<void>;
  private numStreams = 0;
  private heardAt = performance.now();
  /** Runs while calls wait and nothing comes. */
  private quietTimer: NodeJS.Timeout | undefined;
  /** Runs from a ping to its answer, whoever waits: calls that end sooner would else never find the connection gone. */
  private answerTimer: NodeJS.Timeout | undefined;

  constructor(
    readonly session: ClientHttp2Session,
    private readonly pings: Pings,
    onGoaway: (code: number, said: string) => void,
  ) {
    // Pings begin with an open connection: a peer that never answers the first packet, or TLS, is held to this.
    const opening = setTimeout(() => setImmediate(() => this.giveUpOpening()), pings.timeoutMs);
    opening.unref();
    this.opened = new Promise((resolve, reject) => {
      session.once("connect", () => {
        clearTimeout(opening);
        session.unref();
        this.heard();
        resolve();
      });
      // For as long as the session lives: an error that nobody hears ends the process. Calls have theirs from their streams.
      session.on("error", reject);
      session.once("close", () => {
        clearTimeout(opening);
        reject(new ConnectError("the connection was closed before it was open", Code.Unavailable));
      });
    });
    this.opened.catch(() => undefined);
    session.on("goaway", (code, _lastStreamId, data?: Uint8Array) => {
      onGoaway(code, data === undefined ? "" : Buffer.from(data).toString());
      this.endIfLeft();
    });
  }

  /** Whether streams may begin, now or when it is open. */
  get isUsable(): boolean {
    return !this.session.closed && !this.session.destroyed;
  }

  request(headers: OutgoingHttpHeaders, options: ClientSessionRequestOptions): ClientHttp2Stream {
    const stream = this.session.request(headers, options);
    this.numStreams += 1;
    if (this.numStreams === 1) {
      this.session.ref();
      this.listen();
    }
    stream.once("response", () => this.heard());
    stream.once("close", () => {
      this.numStreams -= 1;
      if (this.numStreams === 0) {
        clearTimeout(this.quietTimer);
        this.session.unref();
        this.endIfLeft();
      }
    });
    return stream;
  }

  heard(): void {
    this.heardAt = performance.now();
  }

  /** Ping once nothing has come for the interval: at once, where a connection was idle for longer. */
  private listen(): void {
    clearTimeout(this.quietTimer);
    if (this.numStreams === 0 || this.answerTimer !== undefined) {
      return;
    }
    const leftMs = this.heardAt + this.pings.intervalMs - performance.now();
    this.quietTimer = setTimeout(() => (this.isQuiet() ? this.ping() : this.listen()), Math.max(0, leftMs));
    this.quietTimer.unref();
  }

  private isQuiet(): boolean {
    return performance.now() - this.heardAt >= this.pings.intervalMs;
  }

  private ping(): void {
    if (this.session.destroyed) {
      return;
    }
    const sentAt = performance.now();
    // What came while this process was busy is read before it is called missing.
    this.answerTimer = setTimeout(() => setImmediate(() => this.giveUp(sentAt)), this.pings.timeoutMs);
    this.answerTimer.unref();
    this.session.ping((error) => {
      if (error === null) {
        this.heard();
        this.goOn();
      }
    });
  }

  private goOn(): void {
    clearTimeout(this.answerTimer);
    this.answerTimer = undefined;
    this.listen();
  }

  private giveUp(sentAt: number): void {
    if (this.heardAt >= sentAt) {
      this.goOn();
      return;
    }
    this.end("no answer to a ping");
  }

  private giveUpOpening(): void {
    if (this.session.connecting) {
      this.end("no connection was open");
    }
  }

  private end(missing: string): void {
    const error = new ConnectError(`${missing} within ${this.pings.timeoutMs / 1000} s`, Code.Unavailable);
    this.session.destroy(error, constants.NGHTTP2_CANCEL);
  }

  /** A connection that takes no more streams, and has none, is of no use. */
  private endIfLeft(): void {
    if (this.session.closed && this.numStreams === 0) {
      this.session.destroy();
    }
  }
}
