/**
 * What every page of the shop has: the live client and its badge, the visitor, the clock, the
 * bar of holds, and the words.
 */

import { DropsClient } from "../realtime/drops-client.js";
import { ask, Problem } from "./api.js";
import { identity } from "./identity.js";
import { me } from "./me.js";

const TICK_MS = 250;
const BACK_SECONDS = 8;
// So few left that the page says so; the same in views.py.
const FEW = 5;

export const words = JSON.parse(document.getElementById("words").textContent);
export const element = (id) => document.getElementById(id);

/** @type {DropsClient} */
export let client;
const everyTick = new Set();

/** Connect the page. @param {string[]} [drops] ids; without, all current ones */
export function openShop(drops) {
  client = new DropsClient({ drops, ticket });
  me.listen(client);
  watchConnection();
  watchIdentity();
  me.addEventListener("change", showHeld);
  onTick(showAges);
  onTick(showHeld);
  setInterval(() => everyTick.forEach((listener) => listener(client.serverNow())), TICK_MS);
  identity.load();
  me.load();
  client.connect();
}

/** Call `listener` with the server's time in ms, four times a second. */
export function onTick(listener) {
  everyTick.add(listener);
}

async function ticket() {
  if (!identity.user) return null;
  try {
    return (await ask("POST", "/api/ws-ticket")).ticket;
  } catch (problem) {
    // Who isn't known watches as nobody; without a network there is nothing to watch.
    if (problem instanceof Problem && problem.code !== "unreachable") return null;
    throw problem;
  }
}

// --- Words ------------------------------------------------------------------------------

/** Fill the names in braces. @param {string} text */
export function fill(text, values) {
  return text.replace(/\{(\w+)\}/g, (whole, name) => values[name] ?? whole);
}

/** Set an element's text, and leave it alone where nothing changes: it may be being read. */
export function put(target, text) {
  if (target.textContent !== text) target.textContent = text;
}

/** Have it read aloud, once what is being said now is over. */
export function announce(text) {
  element("announcer").textContent = text;
}

/** 0:47, 12:05, 3:04:09, 2 d 4 h. @param {number} ms */
export function countdown(ms) {
  const seconds = Math.max(0, Math.ceil(ms / 1000));
  const two = (number) => String(number).padStart(2, "0");
  const hours = Math.floor(seconds / 3600);
  if (hours >= 48) return `${Math.floor(hours / 24)} d ${hours % 24} h`;
  const minutes = Math.floor(seconds / 60) % 60;
  if (hours) return `${hours}:${two(minutes)}:${two(seconds % 60)}`;
  return `${minutes}:${two(seconds % 60)}`;
}

export function units(count) {
  return count === 1 ? "one" : String(count);
}

/** The status that holds now: the opening and closing need no event. */
export function statusOf(drop, now) {
  const has = (time) => time && Date.parse(time) <= now;
  if (["scheduled", "live", "paused"].includes(drop.status) && has(drop.ends_at)) return "ended";
  if (drop.status === "scheduled" && has(drop.starts_at)) return "live";
  return drop.status;
}

/** The state that is shown: what is left of a live drop, else its status. */
export function stateOf(drop, now) {
  const status = statusOf(drop, now);
  return status === "live" ? drop.availability : status;
}

/** Put the state on an element and its label. */
export function showState(target, label, drop, now) {
  const state = stateOf(drop, now);
  const isLast = state === "available" && drop.available_stock <= FEW;
  target.dataset.state = state;
  target.toggleAttribute("data-last", isLast);
  const text = isLast ? words.states.available.label_last : words.states[state].label;
  const isSoon = state === "scheduled" && drop.starts_at;
  const left = isSoon ? countdown(Date.parse(drop.starts_at) - now) : "";
  put(label, isSoon ? left : fill(text, { n: drop.available_stock }));
  return state;
}

/** `<b>mara</b> bought one, <time>3 s ago</time>`; names are other people's text. */
export function boughtLine({ username, qty, created_at }) {
  const name = document.createElement("b");
  name.textContent = username;
  const time = document.createElement("time");
  time.dateTime = created_at;
  time.dataset.ago = "";
  time.textContent = ago(client.serverNow() - Date.parse(created_at));
  const line = document.createDocumentFragment();
  line.append(name, ` bought ${units(qty)}, `, time);
  return line;
}

export function keyOf({ username, created_at }) {
  return `${username}|${created_at}`;
}

function ago(ms) {
  const seconds = Math.floor(ms / 1000);
  if (seconds < 2) return "just now";
  if (seconds < 60) return `${seconds} s ago`;
  if (seconds < 3600) return `${Math.floor(seconds / 60)} min ago`;
  if (seconds < 86_400) return `${Math.floor(seconds / 3600)} h ago`;
  return `${Math.floor(seconds / 86_400)} d ago`;
}

function showAges(now) {
  for (const time of document.querySelectorAll("time[data-ago]")) {
    put(time, ago(now - Date.parse(time.dateTime)));
  }
}

/** Let the eye find what changed. @param {"up" | "down"} direction */
export function flash(target, direction) {
  target.classList.remove("went-up", "went-down");
  // Read the layout: else the same animation would not start again.
  void target.offsetWidth;
  target.classList.add(`went-${direction}`);
}

// --- Connection -------------------------------------------------------------------------

function watchConnection() {
  const [badge, notice] = [element("badge"), element("notice")];
  const say = words.connection;
  let hasBeenLive = false;
  // The page itself connects anew when the visitor becomes somebody else.
  let isOwnDoing = false;
  identity.addEventListener("change", () => {
    isOwnDoing = true;
    client.close();
    client.connect();
  });
  /** The newest event of each drop when the connection was lost; null while it is there. */
  let seqsThen = null;
  let backTimer;
  const show = (status) => {
    badge.dataset.status = hasBeenLive || status === "offline" ? status : "connecting";
    put(badge, say[badge.dataset.status]);
    badge.hidden = false;
  };
  show("reconnecting");
  client.on("status", (status) => {
    if (status === "live") {
      const missed = seqsThen && countMissed(seqsThen);
      hasBeenLive = true;
      seqsThen = null;
      isOwnDoing = false;
      if (missed !== null) {
        const count = missed === 1 ? "one change" : `${missed} changes`;
        tell(missed ? fill(say.back_with_news, { count }) : say.back, "back");
        backTimer = setTimeout(() => (notice.hidden = true), BACK_SECONDS * 1000);
        identity.load();
        me.load();
      }
    } else if (hasBeenLive && !isOwnDoing) {
      seqsThen ??= new Map([...client.drops].map(([id, drop]) => [id, drop.seq]));
      const at = new Date().toLocaleTimeString([], { timeStyle: "medium" });
      if (notice.hidden || notice.dataset.kind === "back") {
        tell(fill(navigator.onLine === false ? say.no_network : say.lost, { at }), "lost");
      }
    }
    show(status);
  });
  client.on("refused", () => tell(say.refused, "lost"));

  function tell(text, kind) {
    clearTimeout(backTimer);
    put(notice, text);
    notice.dataset.kind = kind;
    notice.hidden = false;
  }
}

function countMissed(seqsThen) {
  const missed = [...client.drops].map(([id, drop]) => drop.seq - (seqsThen.get(id) ?? drop.seq));
  return missed.reduce((sum, count) => sum + Math.max(0, count), 0);
}

// --- The visitor ------------------------------------------------------------------------

let afterNaming = null;

function watchIdentity() {
  const button = element("me");
  const dialog = element("who");
  const show = () => {
    const isKnown = Boolean(identity.user);
    put(element("me-name"), identity.user?.username ?? (identity.isFree ? "Pick a name" : "Sign in"));
    button.firstElementChild.hidden = !isKnown;
    button.hidden = !isKnown && !identity.isFree && !identity.signInUrl;
    button.classList.toggle("is-known", isKnown);
  };
  show();
  button.addEventListener("click", () => whoAreYou());
  element("who-cancel").addEventListener("click", () => dialog.close());
  dialog.addEventListener("close", () => (afterNaming = null));
  let isPicking = false;
  element("who-form").addEventListener("submit", async (event) => {
    event.preventDefault();
    // Each name that is picked makes somebody else.
    if (isPicking) return;
    isPicking = true;
    const problem = element("who-problem");
    try {
      const then = afterNaming;
      await identity.pick(element("who-name").value);
      dialog.close();
      then?.();
    } catch (error) {
      problem.textContent = words.problems[error.message] ?? words.problems.unreachable;
      problem.hidden = false;
      element("who-name").focus();
    } finally {
      isPicking = false;
    }
  });
  identity.addEventListener("change", () => {
    show();
    me.load();
  });
}

/** Ask for a name, or send to the sign-in; call `then` once the visitor is somebody. */
export async function whoAreYou(then = null) {
  if (!identity.isFree) {
    // The answer to the page's own question may have been lost.
    if (!identity.user) await identity.load();
    if (identity.user) return then?.();
    if (!identity.signInUrl) return;
    const address = new URL(identity.signInUrl, location.href);
    address.searchParams.set("next", location.pathname);
    location.assign(address);
    return;
  }
  afterNaming = then;
  const now = element("who-now");
  now.hidden = !identity.user;
  now.querySelector("b").textContent = identity.user?.username ?? "";
  element("who-problem").hidden = true;
  element("who-name").value = "";
  element("who").showModal();
}

// --- Holds ------------------------------------------------------------------------------

/** Remind of holds of other drops than the page's own, wherever the visitor is. */
function showHeld() {
  const bar = element("held");
  const here = element("drop")?.dataset.drop;
  const now = client.serverNow();
  const holds = [...me.holds.values()].filter((hold) => hold.expiresAt > now);
  const elsewhere = holds.filter((hold) => hold.dropId !== here);
  bar.hidden = elsewhere.length === 0;
  document.body.classList.toggle("has-held", !bar.hidden);
  for (const link of bar.querySelectorAll("a")) {
    if (!elsewhere.some((hold) => hold.id === link.dataset.hold)) link.remove();
  }
  for (const hold of elsewhere) {
    const link = bar.querySelector(`[data-hold="${hold.id}"]`) ?? addHeldLink(bar, hold);
    put(link.lastElementChild, countdown(hold.expiresAt - now));
  }
}

function addHeldLink(bar, hold) {
  const link = document.createElement("a");
  link.dataset.hold = hold.id;
  link.href = `/drops/${hold.dropId}`;
  const text = document.createElement("span");
  text.textContent = `You hold ${units(hold.quantity)} of ${hold.dropName ?? "a drop"}`;
  link.append(text, document.createElement("b"));
  bar.append(link);
  return link;
}
