/**
 * Watch a real server with drops-client.js; print what happens, a line of JSON each.
 *
 *     node --experimental-websocket drops_client_live.mjs '{"url": …, "drops": …, "ticketFrom": …}'
 */

import { DropsClient } from "../static/realtime/drops-client.js";

const { ticketFrom, user, ...options } = JSON.parse(process.argv[2]);
const say = (what) => console.log(JSON.stringify(what));

async function ticket() {
  const answer = await fetch(ticketFrom, { method: "POST", headers: { "X-User-Id": user } });
  if (!answer.ok) throw new Error(`no ticket: ${answer.status}`);
  return (await answer.json()).ticket;
}

const client = new DropsClient({ ...options, ...(ticketFrom && { ticket }) });
client.on("status", (status) => say({ status }));
client.on("drop", (drop) => say({ drop }));
client.on("refused", (refused) => say({ refused }));
for (const type of ["HOLDS", "PURCHASE_CONFIRMED"]) client.on(type, () => say({ private: type }));
client.connect();

// It must not outlive the test that started it.
process.stdin.on("end", () => process.exit(0)).resume();
