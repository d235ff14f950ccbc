/** Where a key may travel, this machine or over TLS, and which characters can. */

import { InvalidArgument } from "./errors.js";

const OCTET = "(?:25[0-5]|2[0-4]\\d|1\\d\\d|[1-9]?\\d)";
const LOOPBACK = `(?:localhost|\\[::1\\]|127(?:\\.${OCTET}){3})`;
const LOOPBACK_HOST = new RegExp(`^${LOOPBACK}$`, "i");
const LOOPBACK_ADDRESS = new RegExp(`^${LOOPBACK}:\\d{1,5}$`, "i");
/** A host and perhaps a port: no user, path, query or fragment, in which another host could hide. */
const SECURE_ADDRESS = /^https:\/\/(?:\[[0-9a-f:.]+\]|[a-z0-9._-]+)(?::\d{1,5})?\/?$/i;

/** Whether an address is `host:port` of this machine, by name or number. */
export function isLoopbackAddress(address: string): boolean {
  return LOOPBACK_ADDRESS.test(address) && URL.canParse(`http://${address}`);
}

/** Whether an address is `https://host:port`. */
export function isSecureAddress(address: string): boolean {
  return SECURE_ADDRESS.test(address) && URL.canParse(address);
}

/**
 * Return the URL that calls begin with.
 *
 * Throws InvalidArgument where it is none, or where it `carriesSecret` and neither goes over TLS nor stays on this machine.
 * A URL without a host is of the page, if there is one.
 */
export function checkedBaseUrl(baseUrl: string, carriesSecret: boolean): string {
  const page: string | undefined = globalThis.location?.href;
  const url = URL.canParse(baseUrl, page) ? new URL(baseUrl, page) : undefined;
  const isPlain = url?.protocol === "http:";
  // What is wrong is not repeated: it may have a password in it.
  if (url === undefined || !(isPlain || url.protocol === "https:")) {
    throw new InvalidArgument("baseUrl must be an http or https URL, and is none");
  }
  if (url.username || url.password || url.search || url.hash) {
    throw new InvalidArgument(
      "baseUrl must be an origin and if need be a path, and has a user, query or fragment",
    );
  }
  if (carriesSecret && isPlain && !LOOPBACK_HOST.test(url.hostname)) {
    throw new InvalidArgument(
      `baseUrl must be https, or http on loopback, got '${baseUrl}': the API key would travel in the clear`,
      { metadata: { address: baseUrl } },
    );
  }
  return baseUrl;
}

/**
 * Return an API key, as it was given.
 *
 * Throws InvalidArgument, which does not repeat it, where it has characters that no header carries, such as the end of a
 * line.
 */
export function checkedKey(key: string): string {
  if (!/^[\x21-\x7e]*$/.test(key)) {
    throw new InvalidArgument(
      "the API key must consist of visible ASCII characters, and has others, or spaces",
    );
  }
  return key;
}
