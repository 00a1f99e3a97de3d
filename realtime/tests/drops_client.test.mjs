/** Unit tests of drops-client.js against a server that is played here: `node --test`. */

import assert from "node:assert/strict";
import { afterEach, beforeEach, mock, test } from "node:test";
import { setImmediate as nextTurn } from "node:timers/promises";

import { DropsClient } from "../static/realtime/drops-client.js";

const A = "00000000-0000-4000-8000-00000000000a";
const B = "00000000-0000-4000-8000-00000000000b";
const START = Date.parse("2026-11-22T18:00:00Z");

/** @type {Socket[]} */
let sockets;
let client;

class Socket {
  sent = [];
  isClosed = false;

  constructor(url, protocols) {
    Object.assign(this, { url, protocols });
    sockets.push(this);
  }

  send(text) {
    this.sent.push(JSON.parse(text));
  }

  close() {
    this.isClosed = true;
  }

  say(...frames) {
    for (const frame of frames) this.onmessage({ data: JSON.stringify(frame) });
  }

  end(code, reason = "") {
    this.onclose({ code, reason });
  }
}

const at = (ms) => new Date(START + ms).toISOString();
const pong = { type: "PONG", ts: at(0), data: {} };
const heartbeat = (seqs) => ({ type: "HEARTBEAT", ts: at(0), data: { seqs } });
const snapshot = (...drops) => ({ type: "SNAPSHOT", ts: at(0), data: { drops } });
const drop = (id, seq, available = 10) => ({
  id,
  seq,
  name: "Ember",
  available_stock: available,
  availability: "available",
  variants: [{ id: `${id}-42`, label: "EU 42", total_stock: 10, available_stock: available }],
  activity_feed: { latest_purchasers: [] },
});
const stock = (id, seq, prev, available) => ({
  type: "STOCK_UPDATED",
  dropId: id,
  seq,
  prev,
  ts: at(0),
  data: {
    dropId: id,
    availableStock: available,
    availability: available ? "available" : "fully_reserved",
    variants: [{ id: `${id}-42`, availableStock: available }],
  },
});

beforeEach(() => {
  sockets = [];
  mock.timers.enable({ apis: ["setTimeout", "setInterval", "Date"], now: START });
  mock.method(Math, "random", () => 1);
  mock.method(console, "warn", () => {});
});

afterEach(() => {
  client.close();
  mock.timers.reset();
  mock.restoreAll();
});

/** Connect, up to the socket's opening. */
async function open(options = {}) {
  client = new DropsClient({ url: "https://shop.example/ws/drops/", WebSocket: Socket, ...options });
  client.connect();
  return opened();
}

async function opened() {
  await nextTurn();
  const socket = sockets.at(-1);
  socket.onopen();
  return socket;
}

/** Connect to A, whose snapshot has `seq`. */
async function live(seq = 4, options = {}) {
  const socket = await open({ drops: [A], ...options });
  socket.say(snapshot(drop(A, seq)), pong);
  socket.sent = [];
  return socket;
}

async function pass(ms) {
  // In steps, because timers that are set in the course of it count too.
  for (; ms > 0; ms -= 500) {
    mock.timers.tick(Math.min(ms, 500));
    await nextTurn();
  }
}

function record(...types) {
  const seen = [];
  for (const type of types) client.on(type, (...details) => seen.push([type, ...details]));
  return seen;
}

test("is live once the server has answered all that was asked", async () => {
  const socket = await open({ drops: [A.toUpperCase(), B] });
  assert.equal(socket.url, `wss://shop.example/ws/drops/${A}`);
  assert.deepEqual(socket.protocols, ["drops.v1"]);
  assert.deepEqual(socket.sent, [{ action: "subscribe", dropId: B }, { action: "ping" }]);
  const seen = record("status", "drop");

  socket.say(snapshot(drop(A, 4)), snapshot(drop(B, 7)));
  assert.equal(client.status, "reconnecting");
  socket.say(pong);

  assert.deepEqual(seen.map(([type, value]) => [type, value.id ?? value]), [
    ["drop", A],
    ["drop", B],
    ["status", "live"],
  ]);
  assert.deepEqual([...client.drops.keys()], [A, B]);
});

test("folds every kind of event into the drop, each as a new object", async () => {
  const socket = await live();
  const before = client.drops.get(A);
  const purchaser = { userId: "u", username: "demo", qty: 2, createdAt: at(5) };

  socket.say(
    stock(A, 5, 4, 0),
    { type: "PURCHASE_COMPLETED", dropId: A, seq: 6, prev: 5, ts: at(1), data: { dropId: A } },
    {
      type: "ACTIVITY_UPDATED",
      dropId: A,
      seq: 7,
      prev: 6,
      ts: at(1),
      data: { dropId: A, latestPurchasers: [purchaser] },
    },
  );

  assert.deepEqual(before, drop(A, 4));
  assert.deepEqual(client.drops.get(A), {
    ...drop(A, 7, 0),
    availability: "fully_reserved",
    activity_feed: {
      latest_purchasers: [{ user_id: "u", username: "demo", qty: 2, created_at: at(5) }],
    },
  });
  const changed = { ...drop(A, 8, 3), name: "Ember II" };
  socket.say({
    type: "DROP_UPDATED", dropId: A, seq: 8, prev: 7, ts: at(2), data: { drop: changed },
  });
  assert.deepEqual(client.drops.get(A), changed);
});

test("a conflated frame joins on; old ones and duplicates are ignored", async () => {
  const socket = await live(4);
  const seen = record("STOCK_UPDATED");

  socket.say(stock(A, 9, 4, 5), stock(A, 9, 4, 5), stock(A, 7, 6, 7), stock(A, 4, 3, 9));

  assert.deepEqual(seen.map(([, frame]) => frame.seq), [9]);
  assert.equal(client.drops.get(A).available_stock, 5);
  assert.deepEqual(socket.sent, []);
});

test("after a loss it asks once for what came after, and applies each event once", async () => {
  const socket = await live(4);
  const seen = record("STOCK_UPDATED");

  socket.say(stock(A, 7, 6, 7), stock(A, 8, 7, 6));
  assert.equal(client.drops.get(A).seq, 4);
  assert.deepEqual(socket.sent, [{ action: "subscribe", dropId: A, since: 4 }]);
  socket.say(stock(A, 5, 4, 9), stock(A, 6, 5, 8), stock(A, 7, 6, 7), stock(A, 8, 7, 6));

  assert.deepEqual(seen.map(([, frame]) => frame.seq), [5, 6, 7, 8]);
  assert.equal(client.drops.get(A).available_stock, 6);
  socket.say(stock(A, 11, 10, 3));
  assert.deepEqual(socket.sent[1], { action: "subscribe", dropId: A, since: 8 });
});

test("a snapshot in the place of missed events counts as well", async () => {
  const socket = await live(4);
  socket.say(stock(A, 900, 899, 7), snapshot(drop(A, 950, 2)), stock(A, 951, 950, 1));

  assert.equal(client.drops.get(A).available_stock, 1);
  await pass(12_000);
  assert.equal(sockets.length, 1);
});

test("connects anew when missed events don't come", async () => {
  const socket = await live(4);
  socket.say(stock(A, 7, 6, 7));

  await pass(10_000);
  assert.equal(client.status, "reconnecting");
  assert.ok(socket.isClosed);
  socket.say(stock(A, 5, 4, 9));

  assert.equal(client.drops.get(A).seq, 4, "a connection that was left is not heard any more");
});

test("the time for an answer begins when the question is sent", async () => {
  const ids = Array.from({ length: 80 }, (_, n) => `${n}`.padStart(36, "0"));
  const socket = await open();
  socket.say(snapshot(...ids.map((id) => drop(id, 4))), pong);
  socket.sent = [];

  socket.say(heartbeat(Object.fromEntries(ids.map((id) => [id, 5]))));
  for (let seconds = 0; seconds < 20; seconds += 1) {
    await pass(1000);
    for (const { dropId } of socket.sent.splice(0)) socket.say(stock(dropId, 5, 4, 9));
  }

  assert.equal(sockets.length, 1);
  assert.ok(ids.every((id) => client.drops.get(id).seq === 5));
});

test("a second loss has all the time for its answer, whenever the first was answered", async () => {
  const socket = await live(4);
  socket.say(stock(A, 7, 6, 7), stock(A, 5, 4, 9), stock(A, 6, 5, 8), stock(A, 7, 6, 7));
  await pass(9500);
  socket.say(stock(A, 20, 19, 3));

  await pass(9500);
  assert.equal(client.status, "live");
  await pass(500);
  assert.equal(client.status, "reconnecting");
});

test("who watches all drops asks for one that only a heartbeat names", async () => {
  const socket = await open();
  socket.say(snapshot(drop(A, 4)), pong);
  socket.sent = [];
  socket.say(heartbeat({ [A]: 4, [B]: 3 }));
  await pass(1000);
  assert.deepEqual(socket.sent, [{ action: "subscribe", dropId: B }]);

  socket.say(snapshot(drop(B, 3)), heartbeat({ [A]: 4, [B]: 3 }));
  await pass(12_000);
  assert.deepEqual([...client.drops.keys()], [A, B]);
  assert.deepEqual(socket.sent.length, 1);
  assert.equal(client.status, "live");
});

test("a heartbeat that is ahead of the client means a loss, unless the frame was on its way", async () => {
  const socket = await live(4);
  socket.say(heartbeat({ [A]: 5, [B]: 9 }));
  await pass(500);
  socket.say(stock(A, 5, 4, 9));
  await pass(1000);
  assert.deepEqual(socket.sent, []);

  socket.say(heartbeat({ [A]: 6 }));
  await pass(1000);
  assert.deepEqual(socket.sent, [{ action: "subscribe", dropId: A, since: 5 }]);
});

for (const data of ["<html>a proxy's mistake</html>", "null", "[]", "{}", ""]) {
  test(`connects anew after what is no frame, with what it has: ${data}`, async () => {
    const socket = await live(5);

    socket.onmessage({ data });
    assert.equal(client.status, "reconnecting");
    assert.ok(socket.isClosed);
    await pass(1000);

    const next = await opened();
    assert.equal(next.url, `wss://shop.example/ws/drops/${A}?since=5`);
    assert.equal(client.drops.get(A).seq, 5);
  });
}

test("resumes where it was", async () => {
  const socket = await live(4, { drops: [A, B] });
  socket.say(snapshot(drop(B, 2)), stock(A, 5, 4, 9));
  const seen = record("status");

  socket.end(1006);
  await pass(1000);
  const next = await opened();

  assert.equal(next.url, `wss://shop.example/ws/drops/${A}?since=5`);
  assert.deepEqual(next.sent[0], { action: "subscribe", dropId: B, since: 2 });
  next.say(stock(A, 6, 5, 8), pong);
  assert.deepEqual(seen.map(([, status]) => status), ["reconnecting", "live"]);
  assert.equal(client.drops.get(A).available_stock, 8);
});

test("a new snapshot of all drops removes those that are over", async () => {
  const socket = await open();
  assert.equal(socket.url, "wss://shop.example/ws/drops");
  socket.say(snapshot(drop(A, 1), drop(B, 1)), pong);
  const seen = record("removed", "drop");

  socket.end(1012);
  await pass(1000);
  (await opened()).say(snapshot(drop(B, 0)));

  assert.deepEqual(seen.map(([type, value]) => [type, value.id ?? value]), [
    ["removed", A],
    ["drop", B],
  ]);
  assert.equal(client.drops.get(B).seq, 0, "the past may have been replaced");
});

test("of a drop it does not know it takes what carries the whole drop", async () => {
  const socket = await open();
  socket.say(snapshot(), pong);
  const seen = record("STOCK_UPDATED", "drop");

  socket.say(stock(A, 8, 7, 3));
  assert.equal(client.drops.size, 0);
  socket.say({
    type: "DROP_CREATED", dropId: B, seq: 1, prev: 0, ts: at(0), data: { drop: drop(B, 1) },
  });

  assert.deepEqual(seen.map(([type]) => type), ["STOCK_UPDATED", "drop"]);
});

test("waits longer after each failure, up to 30 s, and less again after a good connection", async () => {
  await open({ drops: [A] });
  for (const seconds of [1, 2, 4, 8, 16, 30, 30]) {
    const before = sockets.length;
    sockets.at(-1).end(1006);
    await pass(seconds * 1000 - 100);
    assert.equal(sockets.length, before);
    await pass(100);
    assert.equal(sockets.length, before + 1, `after ${seconds} s`);
  }
  (await opened()).say(snapshot(drop(A, 1)), pong);
  await pass(11_000);
  sockets.at(-1).end(1006);
  await pass(1000);
  assert.equal(sockets.length, 9);
});

test("spreads the clients over the time: full jitter", async () => {
  await open({ drops: [A] });
  Math.random.mock.mockImplementation(() => 0.25);
  sockets[0].end(1006);
  await pass(200);
  assert.equal(sockets.length, 1);
  await pass(50);
  assert.equal(sockets.length, 2);
});

test("comes back at once when a server restarts (1012), with what it has", async () => {
  await live(4);
  for (const count of [2, 3, 4]) {
    // One server after the other restarts; none of them is a failure.
    sockets.at(-1).end(1012);
    await pass(500);
    assert.equal(sockets.length, count);
    assert.equal(sockets.at(-1).url, `wss://shop.example/ws/drops/${A}?since=4`);
    (await opened()).say(pong);
  }
  // What goes on like this is in trouble, and gets more time each time.
  sockets.at(-1).end(1012);
  await pass(7900);
  assert.equal(sockets.length, 4);
  await pass(100);
  assert.equal(sockets.length, 5);
});

test("restarting servers do not get all clients in one moment", async () => {
  await live(4);
  Math.random.mock.mockImplementation(() => 0.5);
  sockets[0].end(1012);
  await pass(200);
  assert.equal(sockets.length, 1);
  await pass(50);
  assert.equal(sockets.length, 2);
});

for (const code of [1013, 4429, 4430, 4503]) {
  test(`gives a busy server 5 s more (${code})`, async () => {
    await open({ drops: [A] });
    sockets[0].end(code);
    await pass(5900);
    assert.equal(sockets.length, 1);
    await pass(100);
    assert.equal(sockets.length, 2);
  });
}

for (const code of [4400, 4401, 4403, 4404, 4409]) {
  test(`takes no for an answer (${code})`, async () => {
    const socket = await open({ drops: [A] });
    const seen = record("refused");
    socket.end(code, "no");
    await pass(60_000);
    assert.deepEqual(seen, [["refused", { code, reason: "no" }]]);
    assert.equal(client.status, "offline");
    assert.equal(sockets.length, 1);
  });
}

test("takes a new ticket for each connection; one that is refused may be replaced once", async () => {
  let number = 0;
  const socket = await live(1, { ticket: async () => `t${(number += 1)}` });
  assert.deepEqual(socket.protocols, ["drops.v1", "ticket.t1"]);

  socket.end(4401);
  await pass(1000);
  assert.deepEqual((await opened()).protocols, ["drops.v1", "ticket.t2"]);
  sockets[1].say(pong);
  sockets[1].end(4401);
  await pass(2000);
  (await opened()).end(4401);

  assert.equal(client.status, "offline");
  assert.equal(sockets.length, 3);
});

test("tries again when no ticket is to be had, also when the answer never comes", async () => {
  const tickets = [Promise.reject(new Error("503")), new Promise(() => {}), Promise.resolve(null)];
  client = new DropsClient({
    url: "ws://shop.example/ws/drops", WebSocket: Socket, ticket: () => tickets.shift(),
  });
  client.connect();
  await pass(30_000);
  assert.equal(tickets.length, 0);
  assert.deepEqual(sockets[0].protocols, ["drops.v1"]);
});

test("two and a half heartbeats of silence end a connection", async () => {
  const socket = await live(4);
  await pass(30_000);
  socket.say(heartbeat({ [A]: 4 }));
  await pass(37_000);
  assert.equal(client.status, "live");
  await pass(1500);
  assert.equal(client.status, "reconnecting");
  assert.ok(socket.isClosed);
});

test("a connection that is never answered is given up", async () => {
  await open({ drops: [A] });
  await pass(12_500);
  assert.equal(sockets.length, 2);
});

test("knows the server's clock to half a round trip", async () => {
  const socket = await open({ drops: [A] });
  mock.timers.tick(100);
  socket.say({ ...snapshot(drop(A, 1)), ts: at(5020) });
  assert.equal(client.serverNow(), START + 5020);
  mock.timers.tick(100);
  socket.say({ ...pong, ts: at(5100) });
  assert.equal(client.serverNow(), START + 5200);
});

test("asks slowly enough for the server's limit, and for all", async () => {
  const ids = Array.from({ length: 12 }, (_, n) => A.slice(0, -2) + (10 + n));
  const socket = await open({ drops: ids });
  assert.equal(socket.sent.length, 5);
  await pass(1000);
  assert.equal(socket.sent.length, 10);
  await pass(1000);
  assert.deepEqual(socket.sent.slice(10), [
    { action: "subscribe", dropId: ids[11] },
    { action: "ping" },
  ]);
});

test("has patience while it asks for many drops of which nothing was missed", async () => {
  const ids = Array.from({ length: 100 }, (_, n) => A.slice(0, -3) + (100 + n));
  const socket = await open({ drops: ids });
  socket.say(...ids.map((id) => snapshot(drop(id, 1))));
  await pass(30_000);
  socket.say(pong);
  socket.end(1006);
  await pass(1000);

  const next = await opened();
  await pass(21_000);
  assert.equal(sockets.length, 2);
  assert.deepEqual(next.sent.at(-1), { action: "ping" });
  next.say(pong);
  assert.equal(client.status, "live");
});

test("watches more and less on the way", async () => {
  const socket = await live(4);
  client.subscribe(B);
  client.subscribe(B);
  socket.say(snapshot(drop(B, 2)));
  const seen = record("removed", "STOCK_UPDATED");

  client.unsubscribe(B.toUpperCase());
  socket.say(stock(B, 3, 2, 1));

  assert.deepEqual(seen, [["removed", B]]);
  assert.deepEqual(socket.sent, [
    { action: "subscribe", dropId: B },
    { action: "unsubscribe", dropId: B },
  ]);
});

test("stays closed when who hears that the connection is lost closes it", async () => {
  const socket = await live();
  const stop = client.on("status", () => {
    stop();
    client.close();
  });

  socket.end(1006);
  await pass(60_000);

  assert.equal(sockets.length, 1);
  assert.equal(client.status, "offline");
});

test("asks for a drop that was left and wanted again while it connected", async () => {
  let socket = await live(4, { drops: [A, B] });
  socket.end(1006);
  await pass(1000);
  assert.match(sockets[1].url, /since=4$/);

  client.unsubscribe(A);
  client.subscribe(A);
  socket = await opened();

  assert.deepEqual(socket.sent, [
    { action: "subscribe", dropId: B },
    { action: "subscribe", dropId: A },
    { action: "ping" },
  ]);
  socket.say(snapshot(drop(A, 5)));
  assert.equal(client.drops.get(A).seq, 5);
});

test("leaves a drop that was not wanted any more once it had connected", async () => {
  await live(4, { drops: [A, B] });
  sockets[0].end(1006);
  await pass(1000);

  client.unsubscribe(A);
  const socket = await opened();

  assert.deepEqual(socket.sent, [
    { action: "unsubscribe", dropId: A },
    { action: "subscribe", dropId: B },
    { action: "ping" },
  ]);
});

/** Set the clock of the computer, which timers don't go by. */
function setClockBack(ms) {
  const now = Date.now;
  mock.method(Date, "now", () => now() - ms);
}

test("notices that the computer's clock was set", async () => {
  const socket = await live(4);
  await pass(1000);
  setClockBack(3_600_000);

  socket.say({ ...heartbeat({ [A]: 4 }), ts: at(1000) });
  assert.deepEqual(socket.sent, [{ action: "ping" }]);
  mock.timers.tick(500);
  socket.say({ ...pong, ts: at(1250) });

  assert.equal(client.serverNow(), START + 1500);
});

test("a clock that was set back hides no silence", async () => {
  await live(4);
  setClockBack(3_600_000);

  await pass(39_000);

  assert.equal(client.status, "reconnecting");
});

test("resumes from no frame that came before the state", async () => {
  const socket = await live(4);
  client.subscribe(B);
  socket.say(snapshot(drop(B, 2)));
  client.unsubscribe(B);
  client.subscribe(B);
  // Sent before the server heard of either; then the connection is lost.
  socket.say(stock(B, 3, 2, 1));
  socket.end(1006);
  await pass(1000);

  const next = await opened();
  assert.deepEqual(next.sent[0], { action: "subscribe", dropId: B });
});

test("connects with the first drop where it had none", async () => {
  client = new DropsClient({ url: "ws://shop.example/ws/drops", drops: [], WebSocket: Socket });
  client.connect();
  await pass(1000);
  assert.equal(sockets.length, 0);
  client.subscribe(A);
  await nextTurn();
  assert.equal(sockets[0].url, `ws://shop.example/ws/drops/${A}`);
});

test("is offline without a word when nothing is watched any more, until something is", async () => {
  const socket = await live(4);
  const seen = record("status", "removed");

  client.unsubscribe(A);
  await pass(120_000);
  assert.deepEqual(seen, [["removed", A], ["status", "offline"]]);
  assert.ok(socket.isClosed);
  assert.equal(sockets.length, 1);

  client.subscribe(B);
  const next = await opened();
  next.say(snapshot(drop(B, 1)), pong);
  assert.equal(next.url, `wss://shop.example/ws/drops/${B}`);
  assert.equal(client.status, "live");
});

test("looks again when the network is back in a worker too, which has no document", async (t) => {
  const worker = new EventTarget();
  globalThis.addEventListener = worker.addEventListener.bind(worker);
  globalThis.removeEventListener = worker.removeEventListener.bind(worker);
  t.after(() => {
    client.close();
    delete globalThis.addEventListener;
    delete globalThis.removeEventListener;
  });
  const socket = await live(4);
  socket.end(1006);

  worker.dispatchEvent(new Event("online"));
  await pass(1000);
  assert.equal(sockets.length, 2);
  client.unsubscribe(A);
  worker.dispatchEvent(new Event("online"));
  assert.equal(client.status, "offline");
  assert.ok(socket.isClosed);
});

test("passes private events on, and a listener's mistake harms nobody else", async () => {
  mock.method(console, "error", () => {});
  const socket = await live(4);
  client.on("HOLD_EXPIRING", () => {
    throw new Error("a mistake of the page");
  });
  const seen = record("HOLD_EXPIRING");
  const frame = { type: "HOLD_EXPIRING", dropId: A, ts: at(0), data: { reservationId: "r" } };

  socket.say(frame);

  assert.deepEqual(seen, [["HOLD_EXPIRING", frame]]);
  assert.equal(client.drops.get(A).seq, 4);
});

test("believes the browser that there is no network, and looks when it is back", async (t) => {
  const page = new EventTarget();
  const document = Object.assign(new EventTarget(), { visibilityState: "visible" });
  const navigator = { onLine: true };
  const set = (name, value) => {
    Object.defineProperty(globalThis, name, { value, configurable: true, writable: true });
  };
  set("addEventListener", page.addEventListener.bind(page));
  set("removeEventListener", page.removeEventListener.bind(page));
  set("document", document);
  set("navigator", navigator);
  t.after(() => {
    client.close();
    for (const name of ["addEventListener", "removeEventListener", "document", "navigator"]) {
      delete globalThis[name];
    }
  });
  const socket = await live(4);

  navigator.onLine = false;
  page.dispatchEvent(new Event("offline"));
  assert.deepEqual(socket.sent, [{ action: "ping" }]);
  await pass(4500);
  assert.equal(client.status, "offline");
  navigator.onLine = true;
  page.dispatchEvent(new Event("online"));
  assert.equal(client.status, "reconnecting");
  await pass(1000);
  (await opened()).say(pong);
  assert.equal(client.status, "live");

  document.dispatchEvent(new Event("visibilitychange"));
  sockets[1].say(pong);
  await pass(4500);
  assert.equal(client.status, "live");
});

test("whatever is lost, doubled or swapped, it ends with the newest state, each event once", async () => {
  let dice = 12345;
  const roll = (sides) => (dice = (dice * 1103515245 + 12345) % 2147483648) % sides;
  const last = 400;
  const socket = await live(0);
  const seen = record("STOCK_UPDATED");
  let answered = 0;
  const answer = () => {
    for (; answered < socket.sent.length; answered += 1) {
      const { since } = socket.sent[answered];
      for (let seq = since + 1; seq <= newest; seq += 1) socket.say(stock(A, seq, seq - 1, seq));
    }
  };
  let newest = 0;
  while (newest < last) {
    // A frame stands for one event or, conflated, for a few.
    const prev = newest;
    newest = Math.min(last, newest + 1 + roll(3));
    const frame = stock(A, newest, prev, newest);
    const fate = roll(8);
    if (fate === 0) continue;
    if (fate === 1) socket.say(frame, frame);
    else if (fate === 2) socket.say(stock(A, (newest += 1), newest - 1, newest), frame);
    else socket.say(frame);
    if (roll(3) === 0) answer();
    await pass(250);
  }
  socket.say(heartbeat({ [A]: newest }));
  await pass(1000);
  answer();

  assert.equal(client.drops.get(A).available_stock, newest);
  const seqs = seen.map(([, frame]) => frame.seq);
  assert.deepEqual(seqs, [...new Set(seqs)].sort((a, b) => a - b));
  assert.equal(sockets.length, 1);
});
