"""Applications that break a promise, each in one way, for the rehearsals that must notice it.

For tests of ``manage.py rehearse`` only; nothing else imports this.
"""

import json
import uuid
from typing import Any

from config.asgi import application as honest
from config.asgi_types import Receive, Scope, Send


async def confirms_without_storing(scope: Scope, receive: Receive, send: Send) -> None:
    """Confirm each purchase and forget it."""
    if scope["type"] != "http" or not scope["path"].endswith("/purchase"):
        return await honest(scope, receive, send)
    body = json.dumps({"id": str(uuid.uuid4())}).encode()
    headers = [(b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": 201, "headers": headers})
    await send({"type": "http.response.body", "body": body})


async def shows_one_unit_more(scope: Scope, receive: Receive, send: Send) -> None:
    """Tell watchers of one unit that isn't there."""

    async def lie(message: dict[str, Any]) -> None:
        if message["type"] == "websocket.send":
            frame = json.loads(message["text"])
            if "availableStock" in frame["data"]:
                frame["data"]["availableStock"] += 1
            message = message | {"text": json.dumps(frame)}
        await send(message)

    await honest(scope, receive, lie if scope["type"] == "websocket" else send)


async def fails_some(scope: Scope, receive: Receive, send: Send) -> None:
    """Answer 500 to users whose id ends in 0."""
    user = dict(scope.get("headers", ())).get(b"x-user-id", b"")
    if not user.endswith(b"0"):
        return await honest(scope, receive, send)
    headers = [(b"content-length", b"0")]
    await send({"type": "http.response.start", "status": 500, "headers": headers})
    await send({"type": "http.response.body", "body": b""})


async def knows_no_drop(scope: Scope, receive: Receive, send: Send) -> None:
    """Answer as another installation, which has other drops."""
    path = f"/api/drops/{uuid.uuid4()}"
    await honest(scope | {"path": path, "raw_path": path.encode()}, receive, send)
