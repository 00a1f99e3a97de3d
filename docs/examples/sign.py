"""Sign requests for IDENTITY_MODE=gateway."""

import hashlib
import hmac
import time


def sign(secret, method, target, user_id, name="", body=b""):
    """Return the identity headers; ``target`` is the path with its query, as it is sent."""
    at = f"{time.time():.6f}"
    name = name.strip().encode()
    digest = hashlib.sha256(body).hexdigest()
    parts = [at.encode(), method.encode(), target.encode(), user_id.encode(), name, digest.encode()]
    signature = hmac.new(secret.encode(), b".".join(parts), "sha256").hexdigest()
    headers = {"X-User-Id": user_id, "X-Auth-Signature": f"t={at},v1={signature}"}
    # As bytes, because HTTP libraries disagree on how to send what is not ASCII.
    return headers | ({"X-User-Name": name} if name else {})
