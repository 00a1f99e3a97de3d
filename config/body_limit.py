"""Refuse large bodies before anything reads, stores or parses them."""

import orjson
from django.conf import settings

from config.answers import cors_headers, security_headers
from config.asgi_types import Application, Message, Receive, Scope, Send
from config.hot_routes import scheme_of
from config.middleware import request_id
from config.problems import (
    CONTENT_TYPE,
    AddressTooLong,
    BodyTooLarge,
    HeadersTooLarge,
    Refusal,
    problem,
)
from operations.requests import record_of


class BodyLimit:
    """Answer 413 to bodies beyond ``body_limit``, and refuse what is ``too_long``.

    A declared length is judged before a byte is read. A body without one is read up to
    the limit and handed on whole: Django would write it to disk before it knows its length.
    """

    def __init__(self, application: Application) -> None:
        self.application = application

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if error := too_long(scope):
            return await self._refuse(scope, error, send)
        limit = body_limit(scope["path"])
        headers = dict(scope["headers"])
        declared = headers.get(b"content-length")
        if declared is not None:
            # int() refuses to read more digits than some thousands.
            if not declared.isdigit() or len(declared) > 20 or int(declared) > limit:
                return await self._refuse(scope, BodyTooLarge(), send)
            return await self.application(scope, receive, send)
        if b"transfer-encoding" not in headers:
            return await self.application(scope, receive, send)
        body = await self._read(receive, limit)
        if body is None:
            return await self._refuse(scope, BodyTooLarge(), send)
        # Django and DRF take a request that names no length for one without a body.
        length = (b"content-length", str(len(body)).encode())
        whole = {**scope, "headers": [*scope["headers"], length]}
        return await self.application(whole, replay(body, receive), send)

    async def _read(self, receive: Receive, limit: int) -> bytes | None:
        """Return the whole body, or None as soon as it is too large or the client is gone."""
        body = bytearray()
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                return None
            body += message.get("body", b"")
            if len(body) > limit:
                return None
            if not message.get("more_body"):
                return bytes(body)

    async def _refuse(self, scope: Scope, error: Refusal, send: Send) -> None:
        headers = dict(scope["headers"])
        identifier = request_id(headers.get(b"x-request-id", b"").decode("latin-1"))
        forwarded = headers.get(b"x-forwarded-proto")
        scheme = scheme_of(scope, forwarded.decode("latin-1") if forwarded is not None else None)
        body = orjson.dumps(problem(error, identifier))
        record = record_of(scope)
        record.request_id, record.code = identifier, error.code
        await send(
            {
                "type": "http.response.start",
                "status": int(error.status_code),
                "headers": [
                    (b"content-type", CONTENT_TYPE.encode()),
                    (b"content-length", str(len(body)).encode()),
                    (b"x-request-id", identifier.encode()),
                    *security_headers(scheme),
                    *cors_headers(headers.get(b"origin", b"").decode("latin-1")),
                    # The rest of the body stays unread, so the connection is of no more use.
                    (b"connection", b"close"),
                ],
            }
        )
        await send({"type": "http.response.body", "body": body})


def body_limit(path: str) -> int:
    """Return how many bytes a body may have: the admin's forms are longer than all else."""
    is_form = path.startswith("/admin/")
    return settings.DATA_UPLOAD_MAX_MEMORY_SIZE if is_form else settings.MAX_BODY_BYTES


def too_long(scope: Scope) -> Refusal | None:
    """Return what is wrong with an absurd address or headers; servers differ in what they stop."""
    query = scope["query_string"]
    # Django reads no more parameters than that, and DRF takes its refusal for an error of ours.
    is_long = query.count(b"&") >= settings.DATA_UPLOAD_MAX_NUMBER_FIELDS
    if is_long or len(scope["path"]) + len(query) > settings.MAX_ADDRESS_BYTES:
        return AddressTooLong()
    size = sum(len(name) + len(value) for name, value in scope["headers"])
    return HeadersTooLarge() if size > settings.MAX_HEADER_BYTES else None


def replay(body: bytes, receive: Receive) -> Receive:
    """Return a ``receive`` that hands out ``body`` first."""
    waiting: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def receive_again() -> Message:
        return waiting.pop() if waiting else await receive()

    return receive_again
