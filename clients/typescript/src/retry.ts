/** When a call is made again, and after how long. */

import { type LuthierError, Reason, ResourceExhausted, Unavailable } from "./errors.js";

/**
 * Exponential backoff with jitter and an end.
 *
 * The wait before retry n (from 0) is `initialSeconds * multiplier ** n`, at most `maxSeconds`, times a random factor in
 * [1 - jitter, 1 + jitter]; a service that says when to come back is waited for at least that long. No retry begins more
 * than `deadlineSeconds` after the first attempt (for streams: after the last sign of progress). 0 means no retries.
 */
export interface RetryPolicy {
  readonly initialSeconds: number;
  readonly multiplier: number;
  readonly maxSeconds: number;
  readonly jitter: number;
  readonly deadlineSeconds: number;
}

/** What is not said of a policy. */
export const DEFAULT_RETRY: RetryPolicy = Object.freeze({
  initialSeconds: 0.1,
  multiplier: 2,
  maxSeconds: 5,
  jitter: 0.25,
  deadlineSeconds: 60,
});

/**
 * Whether the same call may succeed later: the service is away, or says itself when to come back.
 *
 * Not when its disk is full: somebody has to make room, and is told so at once.
 */
export function isRetryable(error: LuthierError): boolean {
  if (error instanceof ResourceExhausted) {
    return error.retryAfterSeconds !== undefined && error.reason !== Reason.DISK_FULL;
  }
  return error instanceof Unavailable;
}

/** Counts the failures of one call and says how long to wait, or that it is over. `now`: monotonic seconds. */
export class Backoff {
  private failures = 0;
  private began: number;

  constructor(
    private readonly policy: RetryPolicy,
    private readonly now: () => number = monotonicSeconds,
  ) {
    this.began = now();
  }

  /** Start over: something was achieved. A stream that delivers is not failing. */
  progressed(): void {
    this.failures = 0;
    this.began = this.now();
  }

  /** The time left until no retry may begin. Not negative. */
  remainingSeconds(): number {
    return Math.max(0, this.began + this.policy.deadlineSeconds - this.now());
  }

  /** The seconds to wait before the next attempt. Throws `error` when there shall be none. */
  delayAfter(error: LuthierError): number {
    const { initialSeconds, multiplier, maxSeconds, jitter } = this.policy;
    const spread = 1 - jitter + Math.random() * 2 * jitter;
    const planned = Math.min(maxSeconds, initialSeconds * multiplier ** this.failures) * spread;
    const seconds = Math.max(planned, error.retryAfterSeconds ?? 0);
    if (seconds > this.remainingSeconds()) {
      throw error;
    }
    this.failures += 1;
    return seconds;
  }
}

/** Seconds of a clock that never goes back. */
export function monotonicSeconds(): number {
  return performance.now() / 1000;
}
