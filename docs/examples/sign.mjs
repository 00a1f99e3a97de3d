// Sign requests for IDENTITY_MODE=gateway.
import { createHash, createHmac } from "node:crypto";

// Returns the identity headers; `target` is the path with its query, as it is sent.
export function sign(secret, method, target, userId, name = "", body = "") {
  // Random below the millisecond, so that two equal requests at once differ.
  const at = (Date.now() / 1000 + Math.random() / 1000).toFixed(6);
  const digest = createHash("sha256").update(body).digest("hex");
  const signed = [at, method, target, userId, name.trim(), digest].join(".");
  const signature = createHmac("sha256", secret).update(signed).digest("hex");
  const headers = { "X-User-Id": userId, "X-Auth-Signature": `t=${at},v1=${signature}` };
  // UTF-8, one character per byte, as fetch wants it.
  if (name.trim()) headers["X-User-Name"] = Buffer.from(name.trim()).toString("latin1");
  return headers;
}
