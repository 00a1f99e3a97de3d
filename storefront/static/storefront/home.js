/** The list of drops: every card moves with the event stream. */

import {
  boughtLine, client, countdown, element, fill, flash, keyOf, onTick, openShop, put, showState,
  stateOf, words,
} from "./shop.js";

const TICKER_LENGTH = 6;
const lists = { live: element("live"), upcoming: element("upcoming") };
const ticker = element("ticker");
const cards = new Map(
  [...document.querySelectorAll(".card")].map((card) => [card.dataset.drop, card]),
);

openShop();
client.on("drop", (drop, frame) => {
  const card = cards.get(drop.id) ?? addCard(drop);
  if (!card) return;
  showCard(card, drop);
  for (const bought of [...drop.activity_feed.latest_purchasers].reverse()) {
    noteBought(drop, bought, frame.type !== "SNAPSHOT");
  }
});
client.on("removed", removeCard);
client.on("SNAPSHOT", () => {
  // What the page came with may have been over before the connection began.
  for (const id of cards.keys()) if (!client.drops.has(id)) removeCard(id);
});
onTick(() => {
  client.drops.forEach((drop) => cards.has(drop.id) && showNow(cards.get(drop.id), drop));
  fillPlaces();
});

function part(card, name) {
  return card.querySelector(`[data-${name}]`);
}

function sectionOf(drop) {
  return stateOf(drop, client.serverNow()) === "scheduled" ? "upcoming" : "live";
}

/** A card for a drop that the page didn't come with, if there is room; what is over makes some. */
function addCard(drop) {
  if (isOver(stateOf(drop, client.serverNow()))) return null;
  const list = lists[sectionOf(drop)];
  if (!hasRoom(list)) {
    const over = [...list.children].findLast((card) => isOver(card.dataset.state));
    if (!over) return null;
    removeCard(over.dataset.drop);
  }
  const card = element("card").content.firstElementChild.cloneNode(true);
  card.dataset.drop = drop.id;
  part(card, "name").href = `/drops/${drop.id}`;
  card.querySelector(".sizes").append(...drop.variants.map(sizeTag));
  card.classList.add("is-new");
  cards.set(drop.id, card);
  list.prepend(card);
  showEmptiness();
  return card;
}

function isOver(state) {
  return state === "ended" || state === "cancelled";
}

function hasRoom(list) {
  return list.children.length < Number(list.dataset.most);
}

/** Give places that have become free to drops that had none: the next to start, the newest. */
function fillPlaces() {
  if (client.drops.size <= cards.size || !Object.values(lists).some(hasRoom)) return;
  const timeOf = (drop) => Date.parse(drop.starts_at ?? drop.created_at);
  const waiting = [...client.drops.values()].filter((drop) => !cards.has(drop.id));
  for (const [section, list] of Object.entries(lists)) {
    const order = section === "upcoming" ? 1 : -1;
    waiting
      .filter((drop) => sectionOf(drop) === section)
      .sort((a, b) => order * (timeOf(a) - timeOf(b)))
      .forEach((drop) => {
        const card = hasRoom(list) && addCard(drop);
        if (card) {
          list.append(card);
          showCard(card, drop);
        }
      });
  }
}

function removeCard(id) {
  cards.get(id)?.remove();
  cards.delete(id);
  showEmptiness();
}

function sizeTag({ id, label }) {
  const tag = document.createElement("li");
  tag.dataset.variant = id;
  tag.textContent = label;
  return tag;
}

function showCard(card, drop) {
  const left = part(card, "left");
  const before = Number(left.textContent);
  if (left.textContent && before !== drop.available_stock) {
    flash(left, drop.available_stock > before ? "up" : "down");
  }
  put(part(card, "name"), drop.name);
  put(part(card, "amount"), drop.price);
  put(part(card, "currency"), drop.currency);
  put(left, String(drop.available_stock));
  put(part(card, "total"), String(drop.total_stock));
  const meter = card.querySelector("meter");
  meter.max = drop.total_stock;
  meter.value = drop.available_stock;
  const image = card.querySelector("img");
  const source = drop.image_url || image.dataset.default;
  if (image.getAttribute("src") !== source) image.src = source;
  for (const variant of drop.variants) {
    const tag = card.querySelector(`[data-variant="${variant.id}"]`);
    tag?.classList.toggle("is-gone", variant.available_stock === 0);
  }
  showNow(card, drop);
}

/** What changes with the time alone, too. */
function showNow(card, drop) {
  const now = client.serverNow();
  const state = showState(card, part(card, "label"), drop, now);
  const list = lists[sectionOf(drop)];
  if (card.parentElement !== list) {
    list.prepend(card);
    showEmptiness();
  }
  const line = part(card, "now");
  const [latest] = drop.activity_feed.latest_purchasers;
  const isBought = state === "available" && latest;
  const key = isBought ? keyOf(latest) : state;
  if (line.dataset.key !== key) {
    line.dataset.key = key;
    line.replaceChildren(isBought ? boughtLine(latest) : words.states[state].line);
  }
  if (state === "scheduled") {
    const time = countdown(Date.parse(drop.starts_at) - now);
    put(line, fill(words.states.scheduled.headline_counting, { time }));
  }
}

function showEmptiness() {
  for (const [name, list] of Object.entries(lists)) {
    document.querySelector(`[data-none="${name}"]`).hidden = list.children.length > 0;
  }
}

/** The newest purchases of all drops, the newest first. */
function noteBought(drop, bought, isNews) {
  const key = keyOf(bought);
  const rows = [...ticker.children];
  if (rows.some((row) => row.dataset.key === key)) return;
  const timeOf = (row) => row.querySelector("time")?.dateTime ?? "";
  const next = rows.find((row) => Date.parse(timeOf(row) || 0) <= Date.parse(bought.created_at));
  if (!next && rows.length >= TICKER_LENGTH) return;
  const row = document.createElement("li");
  row.dataset.key = key;
  const link = document.createElement("a");
  link.href = `/drops/${drop.id}`;
  link.textContent = drop.name;
  row.append(boughtLine(bought), " ", link);
  row.classList.toggle("is-new", isNews);
  ticker.insertBefore(row, next ?? null);
  ticker.querySelector(".none")?.remove();
  while (ticker.children.length > TICKER_LENGTH) ticker.lastElementChild.remove();
}
