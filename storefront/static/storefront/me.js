/**
 * What the visitor holds and has bought, kept right by REST and by the private frames.
 *
 * Fires `change`; `ended` with what became of a hold that somebody else ended: the clock or
 * the shop.
 */

import { ask, forget } from "./api.js";
import { identity } from "./identity.js";

// Other windows of this browser: what is done in one shows in all.
const windows = new BroadcastChannel("sneaker-drops.me");

/**
 * @typedef {{
 *   id: string, dropId: string, variantId: string, quantity: number, unitPrice: string,
 *   currency: string, expiresAt: number, createdAt: number, dropName?: string,
 * }} Hold  times in ms since 1970, by the server's clock
 */

class Me extends EventTarget {
  /** At most one of each drop. @type {Map<string, Hold>} */
  holds = new Map();
  /** Paid ones, the newest first, as in `GET /api/purchases`. */
  purchases = [];
  #reading = 0;

  constructor() {
    super();
    windows.addEventListener("message", () => this.load());
  }

  /** Follow the private frames of `client`. */
  listen(client) {
    client.on("HOLDS", ({ data }) => {
      const known = new Set([...this.holds.values()].map((hold) => hold.id));
      const isSame = data.holds.every((hold) => known.delete(hold.reservationId));
      if (!isSame || known.size) this.load();
    });
    client.on("HOLD_EXPIRED", ({ data }) => this.#end(data.reservationId, "expired"));
    client.on("HOLD_RELEASED", ({ data }) => {
      this.#end(data.reservationId, data.status === "VOIDED" ? "voided" : "released");
    });
    client.on("PURCHASE_CONFIRMED", ({ data }) => {
      if (!this.purchases.some((purchase) => purchase.id === data.purchaseId)) this.load();
    });
  }

  /** Read everything anew; of several readings the newest counts. */
  async load() {
    const reading = (this.#reading += 1);
    if (!identity.user) {
      this.holds.clear();
      this.purchases = [];
      return this.#changed();
    }
    try {
      const [active, bought] = await Promise.all([
        ask("GET", "/api/reservations?status=ACTIVE&limit=100"),
        ask("GET", "/api/purchases?limit=100"),
      ]);
      if (reading !== this.#reading) return;
      for (const row of active.results) {
        if (this.holds.get(row.drop_id)?.id !== row.id) forget(row.drop_id);
      }
      for (const row of bought.results) {
        if (!this.purchases.some((known) => known.id === row.id)) forget(row.drop_id);
      }
      this.holds = new Map(active.results.map((row) => [row.drop_id, toHold(row)]));
      this.purchases = bought.results.filter((purchase) => purchase.status === "paid");
      this.#changed();
    } catch (problem) {
      console.warn("shop: can't read what you hold", problem);
    }
  }

  async reserve(dropId, variant, quantity) {
    const hold = toHold(await ask("POST", `/api/drops/${dropId}/reserve`, { variant, quantity }));
    this.#reading += 1;
    this.holds.set(dropId, hold);
    this.#changed();
    windows.postMessage("changed");
    return hold;
  }

  async buy(dropId) {
    const purchase = await ask("POST", `/api/drops/${dropId}/purchase`);
    this.#reading += 1;
    this.holds.delete(dropId);
    this.purchases = [purchase, ...this.purchases.filter((known) => known.id !== purchase.id)];
    this.#changed();
    windows.postMessage("changed");
    return purchase;
  }

  /** Let go of `hold`; false: it was bought before that, in another window. */
  async release(hold) {
    try {
      await ask("DELETE", `/api/reservations/${hold.id}`);
    } catch (problem) {
      if (problem.code !== "reservation_not_active") throw problem;
      // Released by a first attempt whose answer was lost, or bought: the purchases tell.
      await this.load();
    }
    this.#reading += 1;
    this.holds.delete(hold.dropId);
    this.#changed();
    windows.postMessage("changed");
    return !this.purchases.some((purchase) => purchase.reservation_id === hold.id);
  }

  /** The hold's time is up; the server says the same within a moment. */
  expire(hold) {
    this.#end(hold.id, "expired");
  }

  /** Units of the drop that the visitor has bought. */
  bought(dropId) {
    const own = this.purchases.filter((purchase) => purchase.drop_id === dropId);
    return own.reduce((sum, purchase) => sum + purchase.quantity, 0);
  }

  #end(id, how) {
    const hold = [...this.holds.values()].find((known) => known.id === id);
    if (!hold) return;
    forget(hold.dropId);
    this.holds.delete(hold.dropId);
    this.#reading += 1;
    this.dispatchEvent(new CustomEvent("ended", { detail: { hold, how } }));
    this.#changed();
  }

  #changed() {
    this.dispatchEvent(new Event("change"));
  }
}

export const me = new Me();

function toHold(row) {
  return {
    id: row.id,
    dropId: row.drop_id,
    variantId: row.variant_id,
    quantity: row.quantity,
    unitPrice: row.unit_price,
    currency: row.currency,
    expiresAt: Date.parse(row.expires_at),
    createdAt: Date.parse(row.created_at),
    dropName: row.drop?.name,
  };
}
