/**
 * The dashboard: what the server said when the page was made, and every frame since.
 *
 * The state of each drop is folded from the public event stream, `/ws/drops`. What that
 * stream doesn't tell (overdue holds, sockets) comes in the pulse of `/ws/control`, which the
 * server sends by itself. Nothing is polled. A new snapshot means that frames may have been
 * missed: then the figures are read once more.
 */

import { DropsClient } from "../realtime/drops-client.js";
import { Chart } from "./charts.js";

const CHART_SECONDS = 120;
const SHORTEST_SECONDS = 20;
const RATE_SECONDS = 10;
const MOST_PURCHASES = 12;
// A list of hundreds would help nobody; the figures above it are of all.
const MOST_ROWS = 40;
const PULSE_RETRY_MS = 3_000;
// It comes every two seconds; without it nothing is known any more.
const PULSE_SILENCE_MS = 7_000;
const ON_SALE = new Set(["live", "paused"]);
const STATUS_WORDS = {
  scheduled: "Scheduled",
  live: "Live",
  paused: "Paused",
  ended: "Ended",
  cancelled: "Cancelled",
};

const room = document.getElementById("control-room");
const element = (id) => document.getElementById(id);
const admin = (path) => new URL(path, new URL(room.dataset.figuresUrl, location.href)).pathname;

/** Drops by id: {id, name, status, seq, total, available, sold}; `sold` null: not known yet. */
const drops = new Map();
/** Units purchased, by second (Unix time). */
const purchased = new Map();
/** [second, units available of all drops on sale], the newest last. */
let stock = [];
let purchases = [];

const client = new DropsClient();
const now = () => client.serverNow() / 1000;

const rateChart = new Chart(element("chart-rate"), {
  kind: "bars",
  label: "Purchases per second in the last two minutes",
  tick: ago,
});
const stockChart = new Chart(element("chart-stock"), {
  kind: "steps",
  label: "Units available in the last two minutes",
  tick: ago,
});

function ago(second) {
  const seconds = Math.round(now() - second);
  return seconds <= 0 ? "now" : `${seconds} s ago`;
}

// --- State ------------------------------------------------------------------------------

/** Take the server's figures; what the stream has told since is newer and stays. */
function takeFigures(figures) {
  const listed = new Set(figures.drops.map((drop) => drop.id));
  for (const id of drops.keys()) if (!listed.has(id)) drops.delete(id);
  for (const drop of figures.drops) {
    const known = drops.get(drop.id);
    const isNewer = known && known.seq > drop.seq;
    drops.set(drop.id, isNewer ? { ...drop, ...known, sold: known.sold ?? drop.sold } : drop);
  }
  for (const [second, units] of Object.entries(figures.rate)) purchased.set(Number(second), units);
  purchases = figures.purchases;
  showOverdue(figures.oldestOverdueSeconds);
  noteStock();
  drawSoon();
}

function noteStock() {
  const units = [...drops.values()].filter((drop) => ON_SALE.has(drop.status));
  const available = units.reduce((sum, drop) => sum + drop.available, 0);
  if (stock.length && stock.at(-1)[1] === available) return;
  stock.push([now(), available]);
}

/** Keep what was sold since the frame before as sold in the frame's second. */
function setSold(drop, sold, ts) {
  const units = sold - (drop.sold ?? sold);
  drop.sold = sold;
  if (units <= 0) return;
  const second = Math.floor(Date.parse(ts) / 1000);
  purchased.set(second, (purchased.get(second) ?? 0) + units);
}

/** Fold a drop as the stream tells it; `drop` is in the shape of the REST API. */
function takeDrop(drop, frame) {
  let known = drops.get(drop.id);
  if (known && drop.seq < known.seq) return;
  if (!known) {
    // A snapshot doesn't tell what was sold; the figures that are read after it do. Of a drop
    // that was over before, no snapshot comes.
    known = { id: drop.id, sold: frame.type === "DROP_CREATED" ? 0 : null };
    drops.set(drop.id, known);
    if (frame.type === "DROP_UPDATED") readFigures();
  }
  Object.assign(known, {
    name: drop.name,
    status: drop.status,
    seq: drop.seq,
    total: drop.total_stock,
    available: drop.available_stock,
  });
  if (frame.data.soldStock !== undefined) setSold(known, frame.data.soldStock, frame.ts);
  noteStock();
  drawSoon();
}

client.on("drop", takeDrop);
client.on("removed", (id) => {
  drops.delete(id);
  drawSoon();
});
client.on("PURCHASE_COMPLETED", ({ dropId, data }) => {
  purchases.unshift({ dropId, username: data.username, qty: data.qty, at: data.purchasedAt });
  purchases.length = Math.min(purchases.length, MOST_PURCHASES);
  drawSoon();
});
for (const type of ["DROP_CREATED", "DROP_UPDATED", "STOCK_UPDATED", "ACTIVITY_UPDATED"]) {
  client.on(type, noteLag);
}

client.on("SNAPSHOT", readFigures);

async function readFigures() {
  const answer = await fetch(room.dataset.figuresUrl, { headers: { Accept: "application/json" } });
  if (answer.ok) takeFigures(await answer.json());
}

// --- The pulse --------------------------------------------------------------------------

function followPulse() {
  const address = `${location.protocol.replace("http", "ws")}//${location.host}/ws/control`;
  const socket = new WebSocket(address);
  let silence = setTimeout(hearNothing, PULSE_SILENCE_MS);
  socket.onmessage = ({ data }) => {
    clearTimeout(silence);
    silence = setTimeout(hearNothing, PULSE_SILENCE_MS);
    const { data: pulse } = JSON.parse(data);
    showOverdue(pulse.oldestOverdueSeconds);
    element("tile-sockets").textContent = pulse.sockets?.toLocaleString("en") ?? "–";
  };
  socket.onclose = () => {
    clearTimeout(silence);
    forgetPulse();
    setTimeout(followPulse, PULSE_RETRY_MS);
  };

  function hearNothing() {
    forgetPulse();
    // Its end may never be told where the network is gone, so it is left at once.
    socket.onmessage = socket.onclose = null;
    socket.close();
    followPulse();
  }
}

function forgetPulse() {
  for (const tile of ["tile-sockets", "tile-overdue"]) element(tile).textContent = "–";
  element("tile-overdue").classList.remove("is-alarming");
  element("note-overdue").textContent = "not known right now";
}

function showOverdue(seconds) {
  element("tile-overdue").textContent = seconds > 0 ? `${seconds.toFixed(1)} s` : "none";
  // The loop wakes when a hold is due: a few seconds mean that it doesn't run.
  const isLate = seconds > 5;
  element("tile-overdue").classList.toggle("is-alarming", isLate);
  element("note-overdue").textContent = isLate ? "does the expiry loop run?" : "holds end on time";
}

function noteLag(frame) {
  const seconds = Math.max(0, now() - Date.parse(frame.ts) / 1000);
  element("tile-lag").textContent =
    seconds < 1 ? `${Math.round(seconds * 1000)} ms` : `${seconds.toFixed(1)} s`;
  element("tile-lag").classList.toggle("is-alarming", seconds > 2);
}

// --- Drawing ----------------------------------------------------------------------------

let isDrawingSoon = false;

/** Draw once per frame of the screen, however many events came. */
function drawSoon() {
  if (isDrawingSoon) return;
  isDrawingSoon = true;
  requestAnimationFrame(() => {
    isDrawingSoon = false;
    draw();
  });
}

function draw() {
  const all = [...drops.values()].filter((drop) => drop.sold !== null);
  const onSale = all.filter((drop) => ON_SALE.has(drop.status));
  const sum = (name) => onSale.reduce((units, drop) => units + drop[name], 0);
  const [total, sold, available] = ["total", "sold", "available"].map(sum);
  element("tile-live").textContent = all.filter((drop) => drop.status === "live").length;
  const paused = all.filter((drop) => drop.status === "paused").length;
  element("note-live").textContent = paused ? `drops, ${paused} more paused` : "drops";
  element("tile-sold").textContent = sold.toLocaleString("en");
  element("note-sold").textContent = `of ${total.toLocaleString("en")} units, ${share(sold, total)}`;
  element("tile-held").textContent = (total - sold - available).toLocaleString("en");
  drawDrops(all);
  drawPurchases();
  drawMoving();
}

function share(part, whole) {
  return whole ? `${Math.round((part / whole) * 100)}\u00a0%` : "0\u00a0%";
}

function width(part, whole) {
  return `${whole ? Math.max(0, (part / whole) * 100) : 0}%`;
}

/** What moves with the time alone. */
function drawMoving() {
  const to = now();
  const from = to - CHART_SECONDS;
  for (const second of purchased.keys()) if (second < from - 1) purchased.delete(second);
  while (stock.length > 1 && stock[1][0] < from) stock.shift();
  const seconds = [...purchased].sort(([a], [b]) => a - b);
  const units = seconds.filter(([second]) => second > to - RATE_SECONDS).reduce((n, [, u]) => n + u, 0);
  element("tile-rate").textContent = (units / RATE_SECONDS).toFixed(1);
  rateChart.show({ points: seconds, from, to });
  const [first, ...others] = stock;
  if (!first) return;
  // What was before this page is not known: the chart grows to its two minutes.
  const begin = Math.max(from, Math.min(first[0], to - SHORTEST_SECONDS));
  stockChart.show({ points: [[Math.max(first[0], begin), first[1]], ...others], from: begin, to });
}

function drawDrops(all) {
  const ranked = all
    .filter((drop) => rank(drop) !== undefined)
    .sort((a, b) => rank(a) - rank(b) || b.sold / b.total - a.sold / a.total);
  const shown = ranked.slice(0, MOST_ROWS);
  const list = element("drops");
  const rows = new Map([...list.children].map((row) => [row.dataset.id, row]));
  shown.forEach((drop, place) => {
    const row = rows.get(drop.id) ?? makeRow(drop.id);
    rows.delete(drop.id);
    fillRow(row, drop);
    if (list.children[place] !== row) list.insertBefore(row, list.children[place] ?? null);
  });
  for (const row of rows.values()) row.remove();
  element("no-drops").hidden = shown.length > 0;
  element("more-drops").hidden = ranked.length === shown.length;
  element("more-count").textContent = (ranked.length - shown.length).toLocaleString("en");
}

/** What is being sold comes first, then what waits, then what is sold out. */
function rank(drop) {
  const isSoldOut = drop.sold === drop.total && drop.total > 0;
  return { live: isSoldOut ? 3 : 0, paused: 1, scheduled: 2 }[drop.status];
}

function makeRow(id) {
  const row = element("drop-row").content.firstElementChild.cloneNode(true);
  row.dataset.id = id;
  row.querySelector("[data-name]").href = admin(`../drops/drop/${id}/change/`);
  return row;
}

function fillRow(row, drop) {
  const held = drop.total - drop.sold - drop.available;
  const put = (name, text) => (row.querySelector(`[${name}]`).textContent = text);
  put("data-name", drop.name);
  put("data-status", STATUS_WORDS[drop.status]);
  row.querySelector("[data-status]").dataset.status = drop.status;
  put("data-sold-text", drop.sold.toLocaleString("en"));
  put("data-held-text", held.toLocaleString("en"));
  put("data-available-text", drop.available.toLocaleString("en"));
  put("data-through", `${share(drop.sold, drop.total)} sold through`);
  const bar = row.querySelector("[data-bar]");
  bar.setAttribute("aria-label", `${drop.sold} sold, ${held} held, of ${drop.total}`);
  row.querySelector("[data-sold]").style.width = width(drop.sold, drop.total);
  row.querySelector("[data-held]").style.width = width(held, drop.total);
  const action = row.querySelector("[data-action]");
  if (action) {
    const [name, title] = drop.status === "paused" ? ["resume", "Resume"] : ["pause", "Pause"];
    action.textContent = title;
    action.href = admin(`../drops/drop/${drop.id}/do/${name}/`);
    action.setAttribute("aria-label", `${title} ${drop.name}`);
  }
}

function drawPurchases() {
  const rows = purchases.map(({ dropId, username, qty, at }) => {
    const row = document.createElement("li");
    const who = document.createElement("b");
    const what = document.createElement("span");
    const when = document.createElement("time");
    who.textContent = username;
    what.textContent = `${qty} × ${drops.get(dropId)?.name ?? "a drop"}`;
    when.textContent = new Date(at).toLocaleTimeString("en-GB", { timeZone: "UTC" });
    when.dateTime = at;
    row.append(who, what, when);
    return row;
  });
  element("purchases").replaceChildren(...rows);
  element("no-purchases").hidden = rows.length > 0;
}

client.on("status", (status) => {
  const badge = element("connection");
  badge.dataset.state = status;
  badge.textContent = { live: "Live", reconnecting: "Reconnecting", offline: "Offline" }[status];
});

takeFigures(JSON.parse(element("figures").textContent));
client.connect();
followPulse();
setInterval(drawMoving, 1_000);
