"""The busiest calls as plain ASGI, in front of Django's handler.

Django's ASGI handler starts threads for each request; these endpoints don't. They serve
only the plain, well-formed case. Whatever is unusual about a request (no identity, an odd
header, a body that isn't quite right) falls through to the viewsets, which are the
reference for every answer; one test suite compares the two.
"""

import re
import uuid
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import orjson
from django.core.exceptions import DisallowedHost
from django.http import HttpRequest
from rest_framework.exceptions import APIException
from structlog.contextvars import bound_contextvars

from config.addresses import socket_address
from config.answers import cors_headers, security_headers
from config.asgi_types import Application, Receive, Scope, Send
from config.middleware import request_id
from config.problems import CONTENT_TYPE, RateLimited, problem, to_api_exception
from config.problems import headers as problem_headers
from config.quick_settings import quick_settings
from config.rate_limits import rate_limits
from config.servers import send_at_once
from operations.requests import Record, record_of
from users.exceptions import InvalidIdentity
from users.identity import Asking, raw_target

# Headers that may stand only once; a repeated one is for the viewsets to judge.
READ_HEADERS = {
    b"host",
    b"x-user-id",
    b"x-user-name",
    b"x-auth-signature",
    b"authorization",
    b"x-forwarded-for",
    b"x-forwarded-proto",
    b"x-request-id",
    b"idempotency-key",
    b"content-type",
    b"accept",
    b"origin",
    b"sec-fetch-site",
    b"if-none-match",
    b"content-length",
    b"transfer-encoding",
}


# A request with none of them is from nobody in particular, whatever the mode.
IDENTITY_HEADERS = frozenset((b"x-user-id", b"x-auth-signature", b"authorization"))


class FallThrough(Exception):
    """This request is for the viewset."""


@dataclass(slots=True)
class HotRequest:
    """A request as far as the hot endpoints look at it."""

    scope: Scope
    scheme: str
    headers: dict[bytes, str]
    args: tuple[str, ...]
    request_id: str
    record: Record
    body: bytes = b""
    # Added to the answer, whatever it will be.
    answer_headers: tuple[tuple[bytes, bytes], ...] = ()

    @property
    def method(self) -> str:
        return self.scope["method"]

    @property
    def path(self) -> str:
        return self.scope["path"]

    @property
    def query(self) -> bytes:
        return self.scope["query_string"]

    @property
    def content_type(self) -> str:
        return self.headers.get(b"content-type", "").split(";")[0].strip()

    def header(self, name: bytes) -> str | None:
        return self.headers.get(name)

    @property
    def is_anonymous(self) -> bool:
        return IDENTITY_HEADERS.isdisjoint(self.headers)

    @property
    def has_body(self) -> bool:
        """Say whether to wait for one; chunked ones, of no stated length, get no ``HotRequest``.

        Source: https://www.rfc-editor.org/rfc/rfc9112#name-message-body-length
        """
        return b"content-length" in self.headers

    def asking(self) -> Asking:
        """Return what says who is asking."""
        return Asking(
            self.method,
            raw_target(self.scope),
            lambda name: self.headers.get(name.encode()),
            lambda: self.body,
        )

    def client_address(self) -> str:
        return socket_address(self.scope)


JSON = b"application/json"
PROBLEM = CONTENT_TYPE.encode()
CONTENT_TYPE_LINES = {
    None: b"",
    JSON: b"content-type: %b\r\n" % JSON,
    PROBLEM: b"content-type: %b\r\n" % PROBLEM,
}


@dataclass(slots=True)
class HotAnswer:
    status: int
    body: bytes
    headers: tuple[tuple[bytes, bytes], ...] = ()
    # None for an answer that has no body of any kind.
    content_type: bytes | None = JSON
    # The outcome, as clients know it, where it isn't simply that it went well.
    code: str = ""
    _lines: bytes | None = None

    @property
    def lines(self) -> bytes | None:
        """What says what it is, as lines, made once however many requests it answers.

        None where a header would begin another line.
        """
        if self._lines is None:
            lines = header_lines(self.headers)
            if lines is None:
                return None
            length = b"content-length: %d\r\n" % len(self.body)
            self._lines = length + CONTENT_TYPE_LINES[self.content_type] + lines
        return self._lines


Endpoint = Callable[[HotRequest], Awaitable[HotAnswer]]


@dataclass(frozen=True)
class Route:
    """``methods`` is what the viewset behind the same address allows, for the Allow header.

    ``name`` is the address as people write it.
    """

    name: str
    method: str
    pattern: re.Pattern[str]
    endpoint: Endpoint
    methods: str


@dataclass(frozen=True, slots=True)
class CommonHeaders:
    """Headers that many answers share, also as the lines that they are sent as."""

    headers: list[tuple[bytes, bytes]]
    lines: bytes


@dataclass
class HotRoutes:
    """Serve ``routes``; hand everything else, and what an endpoint passes on, to ``rest``."""

    routes: list[Route]
    rest: Application
    # Called with the first request, when there is an event loop.
    on_first_request: Callable[[], None]
    _has_started: bool = False
    _common: dict[tuple[str, str], "CommonHeaders"] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._by_method: dict[str, list[Route]] = {}
        for route in self.routes:
            self._by_method.setdefault(route.method, []).append(route)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if not self._has_started:
            self._has_started = True
            self.on_first_request()
        route, args = self._match(scope)
        if route is None:
            return await self.rest(scope, receive, send)
        try:
            request = read_request(scope, args)
        except FallThrough:
            return await self.rest(scope, receive, send)
        message = None
        try:
            if request.has_body:
                message = await receive()
                if message["type"] == "http.disconnect":
                    return None
                request.body = read_body(request, message)
            answer = await route.endpoint(request)
        except FallThrough:
            return await self.rest(scope, put_back(message, receive), send)
        except APIException as exc:
            answer = problem_answer(await counted(exc, request), request.request_id)
        except Exception as exc:
            # What is logged of it names the request.
            with bound_contextvars(request_id=request.request_id):
                error = to_api_exception(exc)
            answer = problem_answer(error, request.request_id)
        note(request, route, answer)
        if not self._send_at_once(route, request, answer, send):
            await self._send(route, request, answer, send)
        return None

    def _match(self, scope: Scope) -> tuple[Route | None, tuple[str, ...]]:
        path = scope["path"]
        if path.startswith("/api/drops"):
            for route in self._by_method.get(scope["method"], ()):
                if match := route.pattern.fullmatch(path):
                    return route, match.groups()
        return None, ()

    def _send_at_once(
        self, route: Route, request: HotRequest, answer: HotAnswer, send: Send
    ) -> bool:
        lines, added = answer.lines, header_lines(added_headers(request))
        if lines is None or added is None:
            return False
        common = self._common_headers(route.methods, request.scheme)
        identifier = request.request_id.encode()
        head = b"%bx-request-id: %b\r\n%b%b" % (lines, identifier, added, common.lines)
        return send_at_once(send, answer.status, head, answer.body)

    async def _send(self, route: Route, request: HotRequest, answer: HotAnswer, send: Send) -> None:
        headers = [
            (b"content-length", b"%d" % len(answer.body)),
            (b"x-request-id", request.request_id.encode()),
            *added_headers(request),
            *answer.headers,
            *self._common_headers(route.methods, request.scheme).headers,
        ]
        if answer.content_type:
            headers.append((b"content-type", answer.content_type))
        await send({"type": "http.response.start", "status": answer.status, "headers": headers})
        await send({"type": "http.response.body", "body": answer.body})

    def _common_headers(self, methods: str, scheme: str) -> "CommonHeaders":
        """Return what Django's middleware and DRF add to every answer of the viewset."""
        key = methods, scheme
        if key not in self._common:
            headers = [(b"allow", methods.encode()), *security_headers(scheme)]
            self._common[key] = CommonHeaders(headers, header_lines(tuple(headers)) or b"")
        return self._common[key]


def added_headers(request: HotRequest) -> tuple[tuple[bytes, bytes], ...]:
    """Return the headers that an answer has for this request's sake."""
    origin = request.headers.get(b"origin")
    return (*cors_headers(origin), *request.answer_headers) if origin else request.answer_headers


# The same few again and again; a client that sends ever new origins finds nothing here.
@lru_cache(256)
def header_lines(headers: tuple[tuple[bytes, bytes], ...]) -> bytes | None:
    """Return the lines of ``headers``, or None where one would begin another line."""
    if not headers:
        return b""
    lines = [b"%b: %b\r\n" % header for header in headers]
    joined = b"".join(lines)
    is_plain = joined.count(b"\n") == joined.count(b"\r") == len(lines)
    return joined if is_plain else None


def note(request: HotRequest, route: Route, answer: HotAnswer) -> None:
    """Complete the request's record."""
    record = request.record
    record.lane = "hot"
    record.route = route.name
    record.status = answer.status
    record.code = answer.code
    record.request_id = request.request_id


def read_request(scope: Scope, args: tuple[str, ...]) -> HotRequest:
    """Return the request, still without its body, if it is a plain one.

    Raises:
        FallThrough: it is too long, a header is repeated, or what one says needs a closer look.
    """
    if len(scope["path"]) + len(scope["query_string"]) > quick_settings.MAX_ADDRESS_BYTES:
        raise FallThrough
    found: dict[bytes, str] = {}
    size = 0
    for name, value in scope["headers"]:
        size += len(name) + len(value)
        if name in READ_HEADERS:
            if name in found:
                raise FallThrough
            found[name] = value.decode("latin-1")
    if size > quick_settings.MAX_HEADER_BYTES:
        raise FallThrough
    if not host_is_allowed(found.get(b"host", "")):
        raise FallThrough
    accept = found.get(b"accept")
    if accept is not None and not accepts_json(accept):
        raise FallThrough
    if scope["method"] == "POST" and scope["query_string"]:
        # It says nothing, except that ?format= is understood everywhere.
        raise FallThrough
    scheme = scheme_of(scope, found.get(b"x-forwarded-proto"))
    if quick_settings.SECURE_SSL_REDIRECT and scheme != "https":
        raise FallThrough
    if b"transfer-encoding" in found:
        raise FallThrough
    length = found.get(b"content-length")
    if length is not None and not (
        # Other digits, like a raised two, are none to int(), and thousands too many for it.
        length.isascii()
        and length.isdigit()
        and len(length) <= 20
        and int(length) <= quick_settings.MAX_BODY_BYTES
    ):
        raise FallThrough
    identifier = request_id(found.get(b"x-request-id"))
    # By name, the arguments would cost as much as reading the headers.
    return HotRequest(scope, scheme, found, args, identifier, record_of(scope))


def scheme_of(scope: Scope, forwarded: str | None) -> str:
    """Return what the client speaks, as Django finds it out."""
    if forwarded is not None and quick_settings.SECURE_PROXY_SSL_HEADER:
        is_secure = forwarded.split(",")[0].strip() == quick_settings.SECURE_PROXY_SSL_HEADER[1]
        return "https" if is_secure else "http"
    return scope.get("scheme", "http")


@lru_cache(1024)
def accepts_json(accept: str) -> bool:
    """Say whether plain JSON is surely what an Accept header asks for."""
    kinds = {kind.strip().lower() for kind in accept.split(",")}
    plain = {"*/*", "application/json"}
    # With a parameter, like indent=4, JSON is made another way.
    is_special = any(kind.startswith("application/json") for kind in kinds - plain)
    return not kinds.isdisjoint(plain) and not is_special


@lru_cache(1024)
def host_is_allowed(host: str) -> bool:
    """Say whether Django would answer to this Host header."""
    try:
        _RequestTo(host).get_host()
    except DisallowedHost:
        return False
    return True


class _RequestTo(HttpRequest):
    """As much of a request as ``get_host`` looks at."""

    def __init__(self, host: str) -> None:
        super().__init__()
        self.META["HTTP_HOST"] = host


def read_body(request: HotRequest, message: Mapping[str, Any]) -> bytes:
    """Return the body, if the first message has all of it and it is JSON.

    Raises:
        FallThrough: there is more of it, or it is something else.
    """
    body: bytes = message.get("body", b"")
    if message.get("more_body") or (body and request.content_type != "application/json"):
        raise FallThrough
    return body


def put_back(first: Mapping[str, Any] | None, receive: Receive) -> Receive:
    """Return a ``receive`` that hands out ``first`` again, where there is one, before the rest."""
    if first is None:
        return receive
    waiting = [first]

    async def receive_again() -> Mapping[str, Any]:
        return waiting.pop() if waiting else await receive()

    return receive_again


async def counted(error: APIException, request: HotRequest) -> APIException:
    """Return ``error``, or for one failed identity too many from its address that it was that."""
    if isinstance(error, InvalidIdentity):
        try:
            await rate_limits().check_soon("identity", None, request.client_address)
        except RateLimited as exc:
            return exc
    return error


def problem_answer(error: APIException, identifier: str) -> HotAnswer:
    """Render ``error`` as the viewsets do."""
    document = problem(error, identifier)
    return HotAnswer(
        int(error.status_code),
        orjson.dumps(document, default=str),
        tuple(
            (name.lower().encode(), value.encode())
            for name, value in problem_headers(error).items()
        ),
        PROBLEM,
        document["code"],
    )


class PreparedProblem:
    """An error that many requests are answered with, rendered once."""

    def __init__(self, error: APIException) -> None:
        # Nothing else in the document looks like it.
        mark = uuid.uuid4().hex
        self._answer = problem_answer(error, mark)
        self._before, self._after = self._answer.body.split(mark.encode())

    @property
    def code(self) -> str:
        return self._answer.code

    def answer(self, identifier: str) -> HotAnswer:
        """Return the answer to one of the requests; ``identifier`` as ``request_id`` has it."""
        answer = self._answer
        body = b"%b%b%b" % (self._before, identifier.encode(), self._after)
        return HotAnswer(answer.status, body, answer.headers, PROBLEM, answer.code)


def drop_id_of(request: HotRequest) -> uuid.UUID:
    """Return the drop that the address names.

    Raises:
        FallThrough: it is no UUID in the usual form.
    """
    drop_id = parse_uuid(request.args[0])
    if drop_id is None:
        raise FallThrough
    request.record.drop_id = drop_id
    return drop_id


@lru_cache(1024)
def parse_uuid(text: str) -> uuid.UUID | None:
    try:
        parsed = uuid.UUID(text)
    except ValueError:
        return None
    # uuid.UUID also takes hyphens anywhere, and a urn.
    return parsed if str(parsed) == text.lower() else None


def json_object(request: HotRequest) -> dict[str, Any]:
    """Return the body as a JSON object; an empty body is an empty one.

    Raises:
        FallThrough: it is something else.
    """
    if not request.body:
        return {}
    try:
        body = orjson.loads(request.body)
    except orjson.JSONDecodeError:
        raise FallThrough from None
    if not isinstance(body, dict):
        raise FallThrough
    return body
