/**
 * Requests to the shop, repeated where that is safe and may help.
 *
 * Every POST carries an Idempotency-Key. It stays the same until an answer has come, also for
 * another press of the button: however often a request was lost on its way, it counts once.
 */

import { identity, newId } from "./identity.js";

const ATTEMPTS = 4;
const FIRST_PAUSE_MS = 400;
const ANSWER_MS = 10_000;
// Whoever has to wait for longer than this is told so instead.
const LONGEST_RETRY_AFTER_SECONDS = 3;
const WORTH_REPEATING = new Set([429, 502, 503, 504]);

/** Keys of requests that have no answer yet, by what they ask for. */
const unanswered = new Map();

/** The shop said no, or (code `unreachable`) nothing. */
export class Problem extends Error {
  constructor({ code, detail = "", ...members }, retryAfterSeconds = 0) {
    super(detail || code);
    this.code = code;
    this.members = members;
    this.retryAfterSeconds = retryAfterSeconds;
  }
}

/**
 * Ask the shop, and return the JSON of its answer.
 * @param {"GET" | "POST" | "DELETE"} method
 * @param {string} path
 * @param {object} [body]
 * @throws {Problem}
 */
export async function ask(method, path, body) {
  const headers = { Accept: "application/json", ...(await identity.headers()) };
  const text = body && JSON.stringify(body);
  const request = `${identity.user?.id} ${method} ${path} ${text}`;
  if (text) headers["Content-Type"] = "application/json";
  if (method === "POST") {
    if (!unanswered.has(request)) unanswered.set(request, newId());
    headers["Idempotency-Key"] = unanswered.get(request);
  }
  for (let attempt = 1; ; attempt += 1) {
    const answer = await send(path, { method, headers, body: text });
    if (answer instanceof Problem) {
      const seconds = answer.retryAfterSeconds;
      const isWorthIt = answer.isRepeatable && seconds <= LONGEST_RETRY_AFTER_SECONDS;
      if (isWorthIt && attempt < ATTEMPTS) {
        await pause(Math.max(seconds * 1000, FIRST_PAUSE_MS * 2 ** attempt * Math.random()));
        continue;
      }
      if (!answer.isRepeatable) unanswered.delete(request);
      // The sign-in is over: find out who the visitor is now, if anybody.
      if (answer.isUnknown) await identity.load();
      throw answer;
    }
    unanswered.delete(request);
    return answer;
  }
}

/**
 * Take what was asked about a drop for answered: the page has learnt otherwise what came of it.
 * With the same key the next claim or purchase would get the answer to the one before.
 * @param {string} dropId
 */
export function forget(dropId) {
  for (const request of unanswered.keys()) {
    if (request.includes(`/drops/${dropId}/`)) unanswered.delete(request);
  }
}

async function send(path, options) {
  let answer;
  let data;
  try {
    answer = await fetch(path, { ...options, signal: AbortSignal.timeout(ANSWER_MS) });
    data = await answer.json();
    if (!answer.ok && !data.code) throw new TypeError("no problem document");
  } catch {
    // No connection, or cut off in the middle; or what stands in front answers in its own way.
    if (!answer || answer.ok || WORTH_REPEATING.has(answer.status)) return unreachable();
    data = { code: answer.status === 401 ? "identity_required" : "internal_error" };
  }
  if (answer.ok) return data;
  const problem = new Problem(data, Number(answer.headers.get("Retry-After")) || 0);
  problem.isUnknown = answer.status === 401;
  problem.isRepeatable =
    WORTH_REPEATING.has(answer.status) || data.code === "idempotency_in_progress";
  return problem;
}

function unreachable() {
  return Object.assign(new Problem({ code: "unreachable" }), { isRepeatable: true });
}

function pause(ms) {
  return new Promise((resolve) => setTimeout(resolve, ms));
}
