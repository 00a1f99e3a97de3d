/**
 * Watch drops live: their state, every event, and an honest connection status.
 *
 *     import { DropsClient } from "/static/realtime/drops-client.js";
 *
 *     const client = new DropsClient({ drops: ["5f0c7a52-2f0e-4f66-9a3e-8d1f3a0c9b11"] });
 *     client.on("drop", (drop) => { stock.textContent = drop.available_stock; });
 *     client.on("removed", (dropId) => { … });             // no longer among the current drops
 *     client.on("PURCHASE_COMPLETED", (frame) => { ticker.textContent = frame.data.username; });
 *     client.on("status", (status) => { badge.textContent = status; });
 *     client.on("refused", ({ code, reason }) => { … });   // for good; nothing is tried again
 *     client.connect();                                    // and client.close() at the end
 *
 * Without `drops` it watches all current ones. `client.drops` maps ids to drops as in
 * `GET /api/drops/{id}`, each a new object when it changes. `client.serverNow()` is the
 * server's time in milliseconds, for countdowns. For a user's own events (`HOLD_EXPIRING`
 * and so on) give it tickets, one for each connection:
 *
 *     const ticket = async () => {
 *       const answer = await fetch("/api/ws-ticket", { method: "POST", headers });
 *       if (!answer.ok) throw new Error(`no ticket: ${answer.status}`);
 *       return (await answer.json()).ticket;
 *     };
 *
 * `status` is `live` only while the server has answered all that was asked and its heartbeat
 * is heard; `reconnecting` while trying; `offline` when closed, refused, without a drop to
 * watch, or when the browser has no network. The frames and the rules kept here are in docs/realtime.md. No dependencies;
 * runs in browsers, and in Node from 20 on (before 22 pass a constructor as `WebSocket`).
 *
 * @typedef {"live" | "reconnecting" | "offline"} Status
 * @typedef {{
 *   id: string, name: string, description: string, image_url: string, price: string,
 *   currency: string, total_stock: number, available_stock: number,
 *   availability: "available" | "fully_reserved" | "sold_out",
 *   starts_at: string | null, ends_at: string | null,
 *   status: "scheduled" | "live" | "paused" | "ended" | "cancelled",
 *   max_per_user: number | null, seq: number, created_at: string,
 *   variants: {id: string, label: string, total_stock: number, available_stock: number}[],
 *   activity_feed: {latest_purchasers:
 *     {user_id: string, username: string, qty: number, created_at: string}[]},
 * }} Drop
 * @typedef {{
 *   type: string, ts: string, data: any, dropId?: string, seq?: number, prev?: number,
 * }} Frame
 * @typedef {{
 *   url?: string, drops?: string[], ticket?: () => Promise<string | null>,
 *   heartbeatSeconds?: number, WebSocket?: typeof WebSocket,
 * }} Options `url`: the address of `/ws/drops`, if not on the page's own host.
 */

const PROTOCOL = "drops.v1";
const FIRST_RETRY_MS = 1_000;
const LONGEST_RETRY_MS = 30_000;
// What a busy server is given before the next attempt, on top of the usual.
const BUSY_MS = 5_000;
// When a server restarts the others are there at once, but not for all its clients in one moment.
const RESTART_MS = 500;
// More in a row are no restart of one server after the other, but a server in trouble.
const QUICK_RETRIES = 3;
// A connection that lasted shorter than this counts as one more failure.
const STABLE_MS = 10_000;
const ANSWER_MS = 10_000;
const PROBE_MS = 3_000;
// A heartbeat may overtake frames that the server is holding back for a moment.
const HEARTBEAT_GRACE_MS = 1_000;
const TICK_MS = 1_000;
// The server allows 10 in a second; two ticks may fall into one.
const MESSAGES_PER_TICK = 5;
const CLOCK_SAMPLE_MS = 300_000;
// A heartbeat is on its way for a moment. Further off, the computer's clock was set.
const CLOCK_JUMP_MS = 5_000;

const SERVICE_RESTART = 1012;
const BAD_TICKET = 4401;
const TOO_SLOW = 4408;
const TRY_AGAIN_LATER = 1013;
// A bad message or identity, forbidden, no such drop, too many drops: asking again won't help.
const FOR_GOOD = new Set([4400, BAD_TICKET, 4403, 4404, 4409]);

export class DropsClient {
  /** @type {Map<string, Drop>} */
  drops = new Map();
  /** @type {Status} */
  status = "offline";

  #options;
  #listeners = new Map();
  /** The drops asked for; null for all. @type {Set<string> | null} */
  #wanted;
  /** The newest event applied, by drop. @type {Map<string, number>} */
  #seqs = new Map();
  /** By drop whose missed events are asked for, the timer that gives up, once it is sent. */
  #resyncing = new Map();
  #socket = null;
  /** Changes whenever what was under way no longer counts. */
  #turn = 0;
  #attempt = 0;
  #liveSince = 0;
  #isOpen = false;
  #isFirstSnapshot = true;
  #hasBadTicket = false;
  /** When to give up the connection, unless a frame comes first. */
  #deadline = Infinity;
  #retryTimer = undefined;
  #ticker = undefined;
  #outbox = [];
  #allowance = MESSAGES_PER_TICK;
  /** Null when no answer is awaited. */
  #pingSentAt = null;
  #clock = { offset: 0, roundTrip: Infinity, at: 0 };

  /** @param {Options} options */
  constructor(options = {}) {
    this.#options = { heartbeatSeconds: 15, WebSocket: globalThis.WebSocket, ...options };
    this.#wanted = options.drops ? new Set(options.drops.map((id) => id.toLowerCase())) : null;
  }

  /**
   * Call `listener` for `drop`, `removed`, `status`, `refused`, or a frame's type.
   * @param {string} type
   * @param {(...details: any[]) => void} listener
   * @returns {() => void} stops it
   */
  on(type, listener) {
    if (!this.#listeners.has(type)) this.#listeners.set(type, new Set());
    this.#listeners.get(type).add(listener);
    return () => this.#listeners.get(type).delete(listener);
  }

  connect() {
    if (this.#ticker !== undefined) return;
    this.#watchPage("addEventListener");
    this.#ticker = setInterval(() => this.#tick(), TICK_MS);
    this.#attempt = 0;
    this.#hasBadTicket = false;
    this.#open();
  }

  close() {
    this.#watchPage("removeEventListener");
    clearInterval(this.#ticker);
    this.#ticker = undefined;
    this.#abandon();
    this.#setStatus("offline");
  }

  /** Watch one more drop; its state arrives as a `drop` event. @param {string} dropId */
  subscribe(dropId) {
    const id = dropId.toLowerCase();
    if (!this.#wanted || this.#wanted.has(id)) return;
    this.#wanted.add(id);
    if (this.#isOpen) this.#askFor(id);
    else if (this.#ticker !== undefined && this.#wanted.size === 1) this.#open();
  }

  /** @param {string} dropId */
  unsubscribe(dropId) {
    const id = dropId.toLowerCase();
    if (!this.#wanted?.delete(id)) return;
    this.#forget(id);
    if (this.#wanted.size === 0) {
      // The server says nothing more on such a connection, not even a heartbeat.
      this.#abandon();
      this.#setStatus("offline");
    } else if (this.#isOpen) this.#send({ action: "unsubscribe", dropId: id });
  }

  /** The server's clock as this client knows it, in milliseconds since 1970. */
  serverNow() {
    return Date.now() + this.#clock.offset;
  }

  // --- Connection ---------------------------------------------------------------------

  async #open() {
    this.#abandon();
    // Without a drop to watch there is nothing to connect to, until one is asked for.
    if (this.#wanted?.size === 0) return;
    const turn = this.#turn;
    this.#deadline = Date.now() + ANSWER_MS;
    this.#setStatus(isWithoutNetwork() ? "offline" : "reconnecting");
    let first;
    let socket;
    try {
      const ticket = await this.#options.ticket?.();
      if (turn !== this.#turn) return;
      [first] = this.#wanted ?? [];
      const protocols = ticket ? [PROTOCOL, `ticket.${ticket}`] : [PROTOCOL];
      socket = new this.#options.WebSocket(this.#address(first), protocols);
    } catch (error) {
      if (turn === this.#turn) this.#retry(0);
      return console.warn("drops: no connection", error);
    }
    this.#socket = socket;
    this.#isFirstSnapshot = true;
    const since = this.#seqs.get(first);
    socket.onopen = this.#now(() => this.#greet(first, since));
    socket.onmessage = this.#now(({ data }) => this.#hear(data));
    socket.onclose = this.#now(({ code, reason }) => this.#lose(code, reason));
  }

  /** Return `action`, but it does nothing any more once this connection has been left. */
  #now(action) {
    const turn = this.#turn;
    return (event) => turn === this.#turn && action(event);
  }

  #address(first) {
    const { protocol, host } = globalThis.location ?? {};
    const base = this.#options.url ?? `${protocol}//${host}/ws/drops`;
    const address = base.replace(/^http/, "ws").replace(/\/$/, "");
    if (!first) return address;
    const since = this.#seqs.get(first);
    return `${address}/${first}${since === undefined ? "" : `?since=${since}`}`;
  }

  /** Ask for what the address doesn't; the answer to the last question says: all is here. */
  #greet(first, since) {
    this.#isOpen = true;
    // The address's drop may have been left meanwhile, and even be wanted again, from its state on.
    const isLeft = first && !this.#wanted.has(first);
    if (isLeft) this.#send({ action: "unsubscribe", dropId: first });
    for (const id of this.#wanted ?? []) {
      if (id !== first || this.#seqs.get(id) !== since) this.#askFor(id);
    }
    this.#ping();
  }

  #hear(text) {
    this.#deadline = Date.now() + this.#patience();
    const frame = read(text);
    // From something on the way, which is no server of drops.
    if (!frame) return this.#lose(0, "unreadable");
    if (frame.type === "SNAPSHOT") this.#takeSnapshot(frame);
    else if (frame.type === "HEARTBEAT") this.#takeHeartbeat(frame);
    else if (frame.type === "PONG") this.#takePong(frame);
    else if (frame.seq !== undefined && !this.#apply(frame)) return;
    this.#emit(frame.type, frame);
  }

  #lose(code, reason) {
    if (this.#liveSince && Date.now() - this.#liveSince > STABLE_MS) this.#attempt = 0;
    // A ticket may have grown old on its way: one more try with a fresh one.
    const isWorthIt = code === BAD_TICKET && this.#options.ticket && !this.#hasBadTicket;
    const isRestart = code === SERVICE_RESTART && this.#attempt < QUICK_RETRIES;
    this.#hasBadTicket = code === BAD_TICKET;
    if (FOR_GOOD.has(code) && !isWorthIt) {
      this.close();
      return this.#emit("refused", { code, reason });
    }
    const isBusy = code === TRY_AGAIN_LATER || (code >= 4400 && code !== TOO_SLOW);
    this.#retry(isBusy && !isWorthIt ? BUSY_MS : 0, isRestart ? RESTART_MS : LONGEST_RETRY_MS);
  }

  /** Try again after a random part of a time that doubles ("full jitter"), plus `extra` ms. */
  #retry(extra, limit = LONGEST_RETRY_MS) {
    this.#abandon();
    const longest = Math.min(limit, FIRST_RETRY_MS * 2 ** this.#attempt++);
    this.#retryTimer = setTimeout(() => this.#open(), extra + Math.random() * longest);
    // Last, because whoever hears it may close the client.
    this.#setStatus(isWithoutNetwork() ? "offline" : "reconnecting");
  }

  /** Leave the connection, or the attempt at one, without a word. */
  #abandon() {
    this.#turn += 1;
    clearTimeout(this.#retryTimer);
    this.#deadline = Infinity;
    this.#liveSince = 0;
    this.#isOpen = false;
    this.#outbox = [];
    this.#pingSentAt = null;
    for (const id of [...this.#resyncing.keys()]) this.#settle(id);
    this.#clock.roundTrip = Infinity;
    const socket = this.#socket;
    this.#socket = null;
    socket?.close();
  }

  #tick() {
    this.#allowance = MESSAGES_PER_TICK;
    this.#flush();
    // A clock that is set back must not prolong the silence.
    const latest = Date.now() + Math.max(this.#patience(), ANSWER_MS);
    if (this.#deadline < Infinity) this.#deadline = Math.min(this.#deadline, latest);
    if (Date.now() > this.#deadline) this.#lose(0, "silence");
  }

  #patience() {
    return this.#options.heartbeatSeconds * 2500;
  }

  /** The network or the page's visibility has changed: find out now how things are. */
  #lookAgain = () => {
    if (this.#isOpen) {
      this.#ping();
      this.#deadline = Math.min(this.#deadline, Date.now() + PROBE_MS);
      return;
    }
    if (this.#wanted?.size === 0) return;
    // A worker has no document.
    const isHidden = globalThis.document?.visibilityState === "hidden";
    if (this.#socket || isWithoutNetwork() || isHidden) {
      return this.#setStatus(isWithoutNetwork() ? "offline" : "reconnecting");
    }
    this.#attempt = 0;
    this.#retry(0);
  };

  #watchPage(addOrRemove) {
    globalThis[addOrRemove]?.("online", this.#lookAgain);
    globalThis[addOrRemove]?.("offline", this.#lookAgain);
    globalThis.document?.[addOrRemove]("visibilitychange", this.#lookAgain);
  }

  #ping() {
    // One at a time: an answer doesn't say to which it belongs.
    if (this.#pingSentAt === null) this.#send({ action: "ping" });
  }

  #askFor(id) {
    const since = this.#seqs.get(id);
    this.#send({ action: "subscribe", dropId: id, ...(since !== undefined && { since }) });
  }

  #send(message) {
    this.#outbox.push(message);
    if (message.action === "ping") this.#pingSentAt = Infinity;
    this.#flush();
  }

  #flush() {
    for (; this.#isOpen && this.#outbox.length && this.#allowance > 0; this.#allowance -= 1) {
      const message = this.#outbox.shift();
      if (message.action === "ping") this.#pingSentAt = Date.now();
      // From now on: before, it may have waited for its turn.
      else if (this.#resyncing.has(message.dropId)) this.#awaitMissed(message.dropId);
      // What was not missed has no answer, so while many questions are asked nothing may come.
      if (this.status !== "live") this.#deadline = Math.max(this.#deadline, Date.now() + ANSWER_MS);
      this.#socket.send(JSON.stringify(message));
    }
  }

  // --- Frames -------------------------------------------------------------------------

  #takeSnapshot(frame) {
    const isAll = !this.#wanted && this.#isFirstSnapshot;
    this.#isFirstSnapshot = false;
    this.#learnClock(frame.ts, Date.now(), Number.MAX_VALUE);
    const ids = new Set(frame.data.drops.map((drop) => drop.id));
    for (const id of isAll ? [...this.#seqs.keys()] : []) if (!ids.has(id)) this.#forget(id);
    for (const drop of frame.data.drops) {
      if (!this.#isWatched(drop.id)) continue;
      this.#settle(drop.id);
      this.#seqs.set(drop.id, drop.seq);
      this.#setDrop(drop, frame);
    }
  }

  /** Apply an event once and in order; false: it is old, or something before it is missing. */
  #apply(frame) {
    const { dropId, seq, prev = seq - 1 } = frame;
    const known = this.#seqs.get(dropId);
    if (!this.#isWatched(dropId) || seq <= known) return false;
    // On its way when the drop was left and asked for again: without the state it joins on to nothing.
    if (this.#wanted && known === undefined) return false;
    if (prev > known) {
      this.#resync(dropId);
      return false;
    }
    this.#settle(dropId);
    this.#seqs.set(dropId, seq);
    const drop = fold(this.drops.get(dropId), frame);
    // Of a drop that was over before the socket began only the events are shown.
    if (drop) this.#setDrop(drop, frame);
    return true;
  }

  /** Ask for what was missed after the newest event known; connect anew if no answer comes. */
  #resync(id) {
    if (this.#resyncing.has(id)) return;
    this.#resyncing.set(id, undefined);
    this.#askFor(id);
  }

  #awaitMissed(id) {
    clearTimeout(this.#resyncing.get(id));
    const giveUp = this.#now(() => this.#lose(0, "missed events"));
    this.#resyncing.set(id, setTimeout(giveUp, ANSWER_MS));
  }

  /** Wait no longer for what was missed: it is here, or not wanted any more. */
  #settle(id) {
    clearTimeout(this.#resyncing.get(id));
    this.#resyncing.delete(id);
  }

  #takeHeartbeat(frame) {
    this.#compare(frame.data.seqs);
    if (Math.abs(Date.parse(frame.ts) - this.serverNow()) < CLOCK_JUMP_MS) return;
    this.#clock.roundTrip = Infinity;
    this.#ping();
  }

  #compare(seqs) {
    // Who watches all drops knows each that the server counts, or has missed its beginning.
    const isUnknown = (id) => !this.#wanted && !this.#seqs.has(id);
    const isBehind = ([id, seq]) => this.#seqs.get(id) < seq || isUnknown(id);
    const late = Object.entries(seqs).filter(isBehind);
    const resync = () => late.filter(isBehind).forEach(([id]) => this.#resync(id));
    if (late.length) setTimeout(this.#now(resync), HEARTBEAT_GRACE_MS);
  }

  #takePong(frame) {
    const now = Date.now();
    this.#learnClock(frame.ts, (this.#pingSentAt + now) / 2, now - this.#pingSentAt);
    this.#pingSentAt = null;
    if (this.status === "live") return;
    this.#liveSince = now;
    this.#hasBadTicket = false;
    this.#setStatus("live");
  }

  /** Keep the offset with the shortest round trip, and so the smallest error, for a while. */
  #learnClock(ts, localMs, roundTrip) {
    const at = Date.now();
    if (roundTrip > this.#clock.roundTrip && at - this.#clock.at < CLOCK_SAMPLE_MS) return;
    this.#clock = { offset: Date.parse(ts) - localMs, roundTrip, at };
  }

  #isWatched(id) {
    return !this.#wanted || this.#wanted.has(id);
  }

  #setDrop(drop, frame) {
    this.drops.set(drop.id, drop);
    this.#emit("drop", drop, frame);
  }

  #forget(id) {
    this.#seqs.delete(id);
    this.#settle(id);
    if (this.drops.delete(id)) this.#emit("removed", id);
  }

  #setStatus(status) {
    if (status === this.status) return;
    this.status = status;
    this.#emit("status", status);
  }

  #emit(type, ...details) {
    for (const listener of [...(this.#listeners.get(type) ?? [])]) {
      try {
        listener(...details);
      } catch (error) {
        // A page's mistake must not cost the stream an event.
        console.error(`drops: a listener of ${type} failed`, error);
      }
    }
  }
}

/** No network at all, says the browser; that it has one says little. */
function isWithoutNetwork() {
  return globalThis.navigator?.onLine === false;
}

/** Return the frame in `text`, or null where there is none. */
function read(text) {
  try {
    const frame = JSON.parse(text);
    return typeof frame?.type === "string" ? frame : null;
  } catch {
    return null;
  }
}

/**
 * Return the drop after an event; undefined if it was unknown and the event doesn't carry it.
 * @param {Drop | undefined} drop
 * @param {Frame} frame
 * @returns {Drop | undefined}
 */
export function fold(drop, { type, seq, data }) {
  if (data.drop) return data.drop;
  if (!drop) return undefined;
  if (type === "STOCK_UPDATED") {
    const available = new Map(data.variants.map((v) => [v.id, v.availableStock]));
    const variants = drop.variants.map((v) => ({ ...v, available_stock: available.get(v.id) }));
    const { availableStock: available_stock, availability } = data;
    return { ...drop, seq, available_stock, availability, variants };
  }
  if (type === "ACTIVITY_UPDATED") {
    const latest_purchasers = data.latestPurchasers.map(
      ({ userId, username, qty, createdAt }) =>
        ({ user_id: userId, username, qty, created_at: createdAt }),
    );
    return { ...drop, seq, activity_feed: { latest_purchasers } };
  }
  return { ...drop, seq };
}
