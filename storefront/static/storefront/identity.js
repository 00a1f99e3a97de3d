/**
 * Who the visitor is, and the headers that say so.
 *
 * `<meta name="identity" content="development">`: whoever picks a name is somebody. The id is
 * made here and kept with the name in localStorage; both go out as X-User-Id and X-User-Name.
 * `content="gateway"`: what stands in front of the shop knows, by a cookie for instance, and
 * nothing is sent; `GET /api/me` says who it is, and `<meta name="sign-in">` where to sign in.
 * A page with a sign-in of its own calls `signInWith` from a module of its own:
 *
 *     import { identity } from "/static/storefront/identity.js";
 *     identity.signInWith(async () => ({ Authorization: `Bearer ${await freshToken()}` }));
 */

const KEY = "sneaker-drops.identity";
const SHORTEST_NAME = 3;

/** @typedef {{id: string, username: string}} User */

class Identity extends EventTarget {
  /** Null: nobody yet. @type {User | null} */
  user = null;
  /** Whether the visitor may just pick a name. */
  isFree = meta("identity") === "development";
  signInUrl = meta("sign-in");
  /** @type {() => Promise<Record<string, string>>} */
  #headers = async () => (this.isFree && this.user ? devHeaders(this.user) : {});

  constructor() {
    super();
    if (!this.isFree) return;
    this.user = remembered();
    // Another window of this browser became somebody else.
    addEventListener("storage", ({ key }) => key === KEY && this.#become(remembered()));
  }

  /** What a request carries. @returns {Promise<Record<string, string>>} */
  headers() {
    return this.#headers();
  }

  /** Let `headers` say from now on who the visitor is. */
  async signInWith(headers) {
    this.isFree = false;
    this.#headers = headers;
    await this.load();
  }

  /** Find out who the visitor is, where the page itself doesn't know. */
  async load() {
    if (this.isFree) return;
    const answer = await fetch("/api/me", { headers: await this.headers() }).catch(() => null);
    const user = answer?.ok ? await answer.json().catch(() => null) : null;
    // Any other answer says nothing about it: the shop may be busy, or away.
    if (user || answer?.status === 401) this.#become(user);
  }

  /**
   * Become somebody new with this name, or one like it where it is taken.
   * @param {string} name
   * @throws {RangeError} shorter than a name may be
   */
  async pick(name) {
    const username = name.trim();
    if (username.length < SHORTEST_NAME) throw new RangeError("name_too_short");
    const user = { id: newId(), username };
    const answer = await fetch("/api/me", { headers: devHeaders(user) }).catch(() => null);
    if (answer?.ok) user.username = (await answer.json()).username;
    try {
      localStorage.setItem(KEY, JSON.stringify(user));
    } catch {
      // A browser that keeps nothing: somebody for as long as the page is open.
    }
    this.#become(user);
  }

  #become(user) {
    if (user?.id === this.user?.id) return;
    this.user = user;
    this.dispatchEvent(new Event("change"));
  }
}

export const identity = new Identity();

/** A random UUID; crypto.randomUUID is missing where a page comes without TLS. */
export function newId() {
  const bytes = crypto.getRandomValues(new Uint8Array(16));
  bytes[6] = (bytes[6] & 0x0f) | 0x40;
  bytes[8] = (bytes[8] & 0x3f) | 0x80;
  const hex = [...bytes].map((byte) => byte.toString(16).padStart(2, "0")).join("");
  return hex.replace(/^(.{8})(.{4})(.{4})(.{4})/, "$1-$2-$3-$4-");
}

/** Headers take bytes: a name goes out as UTF-8, one character for each of its bytes. */
function devHeaders({ id, username }) {
  const bytes = new TextEncoder().encode(username);
  return { "X-User-Id": id, "X-User-Name": String.fromCharCode(...bytes) };
}

function remembered() {
  try {
    return JSON.parse(localStorage.getItem(KEY));
  } catch {
    return null;
  }
}

function meta(name) {
  return document.querySelector(`meta[name="${name}"]`)?.content ?? "";
}
