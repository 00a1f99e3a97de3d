/** One drop: choose, reserve, buy or let go, while everything moves. */

import { ask } from "./api.js";
import { identity } from "./identity.js";
import { me } from "./me.js";
import {
  announce, boughtLine, client, countdown, element, fill, flash, keyOf, onTick, openShop, put,
  showState, stateOf, statusOf, units, whoAreYou, words,
} from "./shop.js";

const LAST_SECONDS = 10;
const FEED_LENGTH = 8;
const MOST_TICKS = 60;
const MOST_AT_ONCE = 10;
// When to ask who may let go: all pages see "all held" in the same moment.
const FIRST_ASK_MS = 3_000;
const NEXT_ASK_MS = 20_000;
// Nothing more is to be waited for; the same in views.py.
const OVER = ["sold_out", "ended", "cancelled"];

const page = element("drop");
const id = page.dataset.drop;
const title = document.title;
const form = element("choose");
/** The newest state known. @type {import("../realtime/drops-client.js").Drop} */
let drop = JSON.parse(element("drop-data").textContent);
/** How the visitor's last hold of this page ended: a key of words.situations, or null. */
let outcome = null;
let bought = null;
let cooldownUntil = 0;
/** `GET /drops/{id}/holds`: by variant, {held, next_release_at}. */
let holds = {};
let askHoldsAt = 0;
let shown = "";
let isBusy = false;

openShop([id]);
client.on("drop", takeDrop);
client.on("RESERVATION_EXPIRED", ({ ts }) => noteExpired(ts));
client.on("PURCHASE_COMPLETED", ({ data }) => {
  noteBought({ username: data.username, qty: data.qty, created_at: data.purchasedAt }, true);
});
me.addEventListener("change", () => render(client.serverNow()));
me.addEventListener("ended", ({ detail: { hold, how } }) => {
  if (hold.dropId === id) outcome = how;
});
identity.addEventListener("change", () => {
  [outcome, bought, cooldownUntil] = [null, null, 0];
});
form.addEventListener("submit", (event) => {
  event.preventDefault();
  reserve();
});
form.addEventListener("change", () => {
  if (outcome !== "bought") outcome = null;
  showProblem(null);
  render(client.serverNow());
});
element("buy").addEventListener("click", () => act(buy));
element("release").addEventListener("click", () => act(release));
onTick(render);
for (const row of element("feed").querySelectorAll("[data-key]")) {
  row.dataset.at = String(Date.parse(row.querySelector("time").dateTime));
}
takeFeed(drop);
render(client.serverNow());

// --- What the visitor does --------------------------------------------------------------

function reserve() {
  const variant = chosen();
  if (element("reserve").getAttribute("aria-disabled") === "true") return;
  if (!variant) {
    form.elements.variant[0]?.focus();
    return showProblem({ code: "variant_required" });
  }
  if (!identity.user) return whoAreYou(reserve);
  act(async () => {
    await me.reserve(id, variant.id, Number(element("quantity").value));
    outcome = null;
  });
}

async function buy() {
  bought = { hold: me.holds.get(id), purchase: await me.buy(id) };
  outcome = "bought";
}

async function release() {
  outcome = (await me.release(me.holds.get(id))) ? "released" : null;
}

/** Do one thing at a time, and lead on to what came of it. */
async function act(action) {
  if (isBusy) return;
  isBusy = true;
  showProblem(null);
  render(client.serverNow());
  try {
    await action();
    isBusy = false;
    render(client.serverNow());
    element("headline").focus();
  } catch (problem) {
    isBusy = false;
    takeProblem(problem);
  }
}

function takeProblem(problem) {
  if (!problem.code) throw problem;
  if (problem.code === "cooldown") {
    cooldownUntil = client.serverNow() + problem.retryAfterSeconds * 1000;
  } else {
    showProblem(problem);
  }
  const isUnknown = ["identity_required", "unknown_user", "invalid_identity"];
  if (isUnknown.includes(problem.code)) whoAreYou(identity.isFree ? reserve : null);
  // Something here was not as thought: see what the server says.
  else if (problem.code !== "unreachable") me.load();
  render(client.serverNow());
}

function showProblem(problem) {
  const target = element("problem");
  target.hidden = !problem;
  if (!problem) return put(target, "");
  const until = problem.members?.next_release_at ?? problem.members?.starts_at;
  const left = problem.members?.available_stock;
  // The code says why there are not more; that there are some says what to do.
  const code = left > 0 ? "too_many" : problem.code;
  put(
    target,
    fill(words.problems[code] ?? problem.message, {
      left,
      seconds: problem.retryAfterSeconds,
      time: until ? countdown(Date.parse(until) - client.serverNow()) : "a moment",
    }),
  );
}

function chosen() {
  const value = new FormData(form).get("variant");
  return drop.variants.find((variant) => variant.id === value);
}

// --- What holds -------------------------------------------------------------------------

/** Return the key of what holds for this visitor now, in words.situations or words.states. */
function situationAt(now) {
  const state = stateOf(drop, now);
  const hold = me.holds.get(id);
  if (hold && ["ended", "cancelled"].includes(state)) return state;
  if (hold) {
    if (statusOf(drop, now) !== "live") return "holding_paused";
    return hold.expiresAt - now > LAST_SECONDS * 1000 ? "holding" : "holding_last_seconds";
  }
  if (outcome === "bought") return outcome;
  const mayCome = state === "available" || state === "fully_reserved";
  if (outcome && mayCome) return outcome;
  if (mayCome && unitsLeft() <= 0) return "limit_reached";
  if (mayCome && cooldownUntil > now) return "cooldown";
  return state;
}

/** Units that the visitor may still reserve. */
function unitsLeft() {
  return drop.max_per_user === null ? Infinity : drop.max_per_user - me.bought(id);
}

/** The first moment in which a held unit may come back, of a variant or of all; or null. */
function nextRelease(now, variant) {
  const of = variant ? [holds[variant.id]] : Object.values(holds);
  const times = of.filter(Boolean).map((held) => Date.parse(held.next_release_at));
  const first = Math.min(...times);
  return Number.isFinite(first) && first > now ? first : null;
}

/** Ask for the holds while the page has to say when one may end; nothing else tells. */
function askHolds(now, variant) {
  const isMissing = stateOf(drop, now) === "fully_reserved" || variant?.available_stock === 0;
  if (!isMissing) {
    askHoldsAt = 0;
    holds = {};
    return;
  }
  if (!askHoldsAt) askHoldsAt = now + Math.random() * FIRST_ASK_MS;
  if (now < askHoldsAt || nextRelease(now) || document.hidden) return;
  askHoldsAt = now + NEXT_ASK_MS * (0.5 + Math.random());
  ask("GET", page.dataset.holdsUrl).then((answer) => (holds = answer.variants), () => {});
}

// --- What is shown ----------------------------------------------------------------------

function takeDrop(next, frame) {
  const before = drop;
  drop = next;
  takeFeed(next);
  if (frame.type === "DROP_UPDATED" && before.status !== next.status) {
    const text = next.status === "live" ? "The sale is on" : words.states[next.status].line;
    addToFeed(`${next.status}|${frame.ts}`, frame.ts, [text], true);
  }
  if (before.available_stock !== next.available_stock) {
    flash(element("left"), next.available_stock > before.available_stock ? "up" : "down");
  }
  showDrop();
  render(client.serverNow());
}

function showDrop() {
  put(element("name"), drop.name);
  put(element("amount"), drop.price);
  put(element("currency"), drop.currency);
  put(element("about"), drop.description);
  element("about").hidden = !drop.description;
  const image = element("image");
  const source = drop.image_url || image.dataset.default;
  if (image.getAttribute("src") !== source) image.src = source;
  put(element("total"), String(drop.total_stock));
}

/** Bring the page in line with what is known; may be called at any time. */
function render(now) {
  const hold = me.holds.get(id);
  // Nobody has to tell: the deadline is known, and the true time with the drop's first state.
  // Ends here again, with the outcome.
  const isDue = hold && hold.expiresAt <= now && client.drops.has(id);
  if (isDue && !isBusy) return me.expire(hold);
  const variant = chosen();
  askHolds(now, variant);
  showState(page, element("label"), drop, now);
  showStock();
  showSizes(now);
  showQuantity();
  showButton(now, variant);
  showHold(hold, now);
  showWords(situationAt(now), now);
}

function showStock() {
  put(element("left"), String(drop.available_stock));
  element("meter").max = drop.total_stock;
  element("meter").value = drop.available_stock;
  const rack = element("rack");
  const count = Math.min(drop.total_stock, MOST_TICKS);
  const lit = Math.ceil((drop.available_stock / drop.total_stock) * count);
  rack.hidden = count === 0;
  while (rack.children.length > count) rack.lastElementChild.remove();
  while (rack.children.length < count) rack.append(document.createElement("i"));
  [...rack.children].forEach((tick, index) => tick.classList.toggle("is-on", index < lit));
}

function showSizes(now) {
  const isLive = statusOf(drop, now) === "live";
  for (const variant of drop.variants) {
    const choice = page.querySelector(`[data-variant="${variant.id}"]`);
    if (!choice) continue;
    const count = variant.available_stock;
    choice.classList.toggle("is-gone", count === 0);
    choice.classList.toggle("is-last", isLive && count > 0 && count <= 2);
    put(choice.querySelector("[data-left]"), count ? `${count} left` : "none free");
  }
}

function showQuantity() {
  const most = Math.min(unitsLeft(), MOST_AT_ONCE);
  const select = element("quantity");
  element("quantity-row").hidden = most < 2;
  while (select.options.length < most) select.add(new Option(select.options.length + 1));
  while (select.options.length > Math.max(1, most)) select.remove(select.options.length - 1);
}

function showButton(now, variant) {
  const button = element("reserve");
  button.disabled = false;
  const state = stateOf(drop, now);
  const [text, isReady] = buttonText(state, now, variant);
  // Not `disabled`: it would lose the focus of who is waiting on it.
  button.setAttribute("aria-disabled", String(!isReady || isBusy));
  put(button, text);
}

function buttonText(state, now, variant) {
  const label = variant && drop.variants.length > 1 ? ` ${variant.label}` : "";
  const counted = (text, until) => fill(text, { time: countdown(until - now) });
  if (isBusy) return ["One moment…", false];
  if (state === "scheduled") return [counted("Starts in {time}", Date.parse(drop.starts_at)), false];
  if (state !== "available") return [words.states[state].label, false];
  if (cooldownUntil > now) return [counted("Wait {time}", cooldownUntil), false];
  if (variant && !variant.available_stock) {
    const until = nextRelease(now, variant);
    if (until) return [`${variant.label} may come back in ${countdown(until - now)}`, false];
    return [`None free in ${variant.label}`, false];
  }
  if (!variant) return ["Choose a size", true];
  return [`Reserve${label}`, true];
}

function showHold(hold, now) {
  const isOver = ["ended", "cancelled"].includes(stateOf(drop, now));
  hide(element("hold"), !hold || isOver);
  if (!hold || isOver) {
    document.title = title;
    return;
  }
  const left = hold.expiresAt - now;
  const progress = element("hold-progress");
  progress.max = hold.expiresAt - hold.createdAt;
  progress.value = Math.max(0, left);
  put(element("hold-what"), `${what(hold)} for ${amount(hold)}`);
  put(element("buy"), isBusy ? "One moment…" : `Buy for ${amount(hold)}`);
  const isReady = statusOf(drop, now) === "live" && !isBusy;
  element("buy").setAttribute("aria-disabled", String(!isReady));
  element("release").setAttribute("aria-disabled", String(isBusy));
  document.title = `${countdown(left)} · ${drop.name}`;
}

/** Lead who was on a button of what goes on to what came of it. */
function hide(target, isHidden) {
  if (isHidden && target.contains(document.activeElement)) element("headline").focus();
  target.hidden = isHidden;
}

function what({ variantId, quantity }) {
  const label = drop.variants.find((variant) => variant.id === variantId)?.label ?? "";
  return `${quantity} × ${label}`;
}

/** The price of a hold, in the currency's own decimals; a later change of the drop's is not its. */
function amount({ quantity, unitPrice, currency }) {
  const decimals = unitPrice.split(".")[1]?.length ?? 0;
  return `${(Number(unitPrice) * quantity).toFixed(decimals)} ${currency}`;
}

function showWords(situation, now) {
  const text = words.situations[situation] ?? words.states[situation];
  const hold = me.holds.get(id);
  const until = {
    scheduled: Date.parse(drop.starts_at),
    fully_reserved: nextRelease(now),
    cooldown: cooldownUntil,
  }[situation];
  const end = hold?.expiresAt ?? until;
  const values = {
    time: end ? countdown(end - now) : "",
    limit: drop.max_per_user === 1 ? "One" : drop.max_per_user,
    used: units(me.bought(id)),
    ...(bought && {
      what: what(bought.purchase.variant_id ? toHold(bought.purchase) : bought.hold),
      amount: `${bought.purchase.amount} ${bought.purchase.currency}`,
      order: bought.purchase.id.slice(0, 8),
    }),
  };
  const headline = end && text.headline_counting ? text.headline_counting : text.headline;
  put(element("headline"), fill(headline, values));
  put(element("detail"), fill(text.detail, values));
  page.querySelector(".deal").dataset.situation = situation;
  const isOver = OVER.includes(situation) || OVER.includes(stateOf(drop, now)) || unitsLeft() <= 0;
  hide(form, Boolean(hold) || isOver);
  element("elsewhere").hidden = Boolean(hold) || !isOver;
  const own = me.bought(id);
  const isSaid = ["bought", "limit_reached"].includes(situation);
  element("after").hidden = !own || isSaid;
  put(element("after"), `You have bought ${units(own)} of this drop.`);
  if (situation !== shown) {
    if (shown) announce(`${fill(headline, values)}. ${fill(text.detail, values)}`);
    shown = situation;
  }
}

function toHold({ variant_id, quantity }) {
  return { variantId: variant_id, quantity };
}

// --- The feed ---------------------------------------------------------------------------

/** Show the purchases that the drop itself tells of, and forget those it no longer does. */
function takeFeed({ activity_feed: { latest_purchasers } }) {
  const isNews = client.status === "live";
  [...latest_purchasers].reverse().forEach((purchase) => noteBought(purchase, isNews));
  const told = new Set(latest_purchasers.map(keyOf));
  const oldest = latest_purchasers.length < 3 ? 0 : Date.parse(latest_purchasers.at(-1).created_at);
  for (const row of element("feed").querySelectorAll("[data-bought]")) {
    // Newer than what is told, and not among it: refunded.
    if (!told.has(row.dataset.key) && Number(row.dataset.at) > oldest) row.remove();
  }
}

function noteBought(purchase, isNews) {
  const row = addToFeed(keyOf(purchase), purchase.created_at, [boughtLine(purchase)], isNews);
  if (row) row.dataset.bought = "";
}

/** Count holds that run out one after the other as one piece of news. */
function noteExpired(ts) {
  const newest = element("feed").firstElementChild;
  if (newest?.dataset.expired) {
    const count = Number(newest.dataset.expired) + 1;
    newest.dataset.expired = String(count);
    put(newest.firstElementChild, `${count} holds ran out and are back in the stock`);
    newest.querySelector("time").dateTime = ts;
    return;
  }
  const text = document.createElement("span");
  text.textContent = "A hold ran out and is back in the stock";
  const row = addToFeed(`expired|${ts}`, ts, [text], true);
  if (row) row.dataset.expired = "1";
}

/** Add a row in its place by time; null if it is there already, or too old to show. */
function addToFeed(key, ts, content, isNews) {
  const feed = element("feed");
  const rows = [...feed.children];
  if (rows.some((row) => row.dataset.key === key)) return null;
  const at = Date.parse(ts);
  const next = rows.find((row) => Number(row.dataset.at || 0) <= at);
  if (!next && rows.length >= FEED_LENGTH) return null;
  const row = document.createElement("li");
  row.dataset.key = key;
  row.dataset.at = String(at);
  row.classList.toggle("is-new", isNews);
  row.append(...content);
  if (!row.querySelector("time")) {
    const time = document.createElement("time");
    time.dateTime = ts;
    time.dataset.ago = "";
    row.append(", ", time);
  }
  feed.insertBefore(row, next ?? null);
  feed.querySelector(".none")?.remove();
  while (feed.children.length > FEED_LENGTH) feed.lastElementChild.remove();
  return row;
}
