"""``GET /api/drops`` and ``GET /api/drops/{id}`` on the hot path; see ``config.hot_routes``.

The viewset makes each answer; this module remembers it and folds the drop's events into
it, as a WebSocket client does, so that a read is never older than this process's own
writes. After ``MAX_AGE_SECONDS`` the viewset is asked again: for windows that opened or
closed by the mere passing of time, and for events that were lost.
"""

import asyncio
import io
import re
import time
import uuid
from collections.abc import Awaitable, Mapping, Sequence
from dataclasses import dataclass, field
from threading import Lock
from typing import Any

import orjson
from asgiref.sync import sync_to_async
from django.core.handlers.asgi import ASGIRequest
from django.db import connection

from config.asgi_types import Scope
from config.hot_routes import FallThrough, HotAnswer, HotRequest, Route, drop_id_of
from drops.etags import digest, etag_of, is_match
from drops.views import DropViewSet
from realtime.models import EventType
from realtime.publisher import News, follow
from users.identity import get_user, identify

MAX_AGE_SECONDS = 1.0
# Read again before that, in the background, so that no request has to wait for it.
RENEW_AFTER_SECONDS = 0.6
MAX_REMEMBERED = 500
# On all pages together; a long list weighs as much as many single drops.
MAX_REMEMBERED_DROPS = 5_000
MAX_REMEMBERED_USERS = 50_000
# How long a user, once found active, may read without being looked up again.
USER_SECONDS = 10.0
# Anything longer is not a question that many ask.
MAX_QUERY_LENGTH = 100
PERSONAL_HEADERS = {
    b"x-user-id",
    b"x-user-name",
    b"x-auth-signature",
    b"authorization",
    b"if-none-match",
}

PageKey = tuple[str, str, str, bytes]


class Encoded:
    """The JSON of a drop, or of a page without its drops, and the digest of what it says."""

    __slots__ = ("digest", "json")

    def __init__(self, data: dict[str, Any]) -> None:
        self.json = orjson.dumps(data)
        self.digest = digest(data)


@dataclass
class Page:
    """One remembered answer: a list, or a single drop."""

    is_known: bool = False
    drops: list[dict[str, Any]] = field(default_factory=list)
    # Of each drop, or None: one changes often, and the others need not be encoded with it.
    encoded: list[Encoded | None] = field(default_factory=list)
    # Of a list, what stands around the drops.
    frame: Encoded | None = None
    read_at: float = float("-inf")
    loading: asyncio.Task | None = None
    # Events that came while the page was being read, to be folded into what was read.
    meanwhile: list[tuple[str, Sequence[News]]] = field(default_factory=list)
    # None while it has to be encoded anew; may be read without a lock.
    answer: HotAnswer | None = None

    def replace(self, data: dict[str, Any]) -> None:
        is_list = "results" in data
        self.is_known = True
        self.drops = data["results"] if is_list else [data]
        self.encoded = [None] * len(self.drops)
        self.frame = Encoded(data | {"results": []}) if is_list else None
        self.answer = None
        for drop_id, events in self.meanwhile:
            self.fold(drop_id, events)
        self.meanwhile = []

    def fold(self, drop_id: str, events: Sequence[News]) -> None:
        """Apply a drop's events; what can't be applied, or isn't told, makes the page old."""
        for index, drop in enumerate(self.drops):
            if drop["id"] == drop_id:
                for seq, event_type, data in events:
                    if seq > drop["seq"]:
                        if seq > drop["seq"] + 1:
                            self.read_at = float("-inf")
                        drop = folded(drop, seq, event_type, data)
                self.drops[index] = drop
                self.encoded[index] = None
                self.answer = None
                if not events:
                    self.read_at = float("-inf")
        if self.frame and any(changes_membership(event_type) for _, event_type, _ in events):
            self.read_at = float("-inf")

    def encode(self) -> HotAnswer:
        if self.answer is None:
            parts = [
                known or Encoded(drop) for known, drop in zip(self.encoded, self.drops, strict=True)
            ]
            self.encoded = [*parts]
            body, digests = b",".join(part.json for part in parts), [part.digest for part in parts]
            if self.frame:
                # The results come last.
                body = self.frame.json.removesuffix(b"]}") + body + b"]}"
                digests.insert(0, self.frame.digest)
            self.answer = HotAnswer(200, body, ((b"etag", etag_of(digests).encode()),))
        return self.answer


class DropReads:
    """What one process remembers of the drops it is asked for."""

    def __init__(self) -> None:
        self._pages: dict[PageKey, Page] = {}
        # Events arrive in the threads that caused them.
        self._lock = Lock()
        self._users: dict[uuid.UUID, float] = {}
        follow(self.fold)

    def routes(self) -> list[Route]:
        return [
            Route(
                "/api/drops",
                "GET",
                re.compile(r"/api/drops/?"),
                self.list,
                "GET, POST, HEAD, OPTIONS",
            ),
            Route(
                "/api/drops/{id}",
                "GET",
                re.compile(r"/api/drops/([^/]+)/?"),
                self.retrieve,
                "GET, PATCH, HEAD, OPTIONS",
            ),
        ]

    def list(self, request: HotRequest) -> Awaitable[HotAnswer]:
        if b"draft" in request.query or b"%" in request.query:
            # The only list that depends on who asks, perhaps in disguise.
            raise FallThrough
        return self._answer(request, {"get": "list"})

    def retrieve(self, request: HotRequest) -> Awaitable[HotAnswer]:
        drop_id = drop_id_of(request)
        return self._answer(request, {"get": "retrieve"}, pk=str(drop_id))

    def fold(self, drop_id: str, events: Sequence[News]) -> None:
        with self._lock:
            for page in self._pages.values():
                if page.loading is not None:
                    page.meanwhile.append((drop_id, events))
                page.fold(drop_id, events)

    async def _answer(
        self, request: HotRequest, actions: Mapping[str, Any], **kwargs: str
    ) -> HotAnswer:
        if len(request.query) > MAX_QUERY_LENGTH:
            raise FallThrough
        if not request.is_anonymous:
            await self._check_identity(request)
        # Pages link to their neighbours by the address that the client used.
        key = (request.scheme, request.header(b"host") or "", request.path, request.query)
        page = self._page(key)
        for _ in range(2):
            age = time.monotonic() - page.read_at
            if age > RENEW_AFTER_SECONDS and page.loading is None:
                page.loading = asyncio.create_task(self._load(key, page, request, actions, kwargs))
                page.loading.add_done_callback(note_failure)
            if age <= MAX_AGE_SECONDS or page.loading is None:
                break
            # What was being read already may be older than a change of which this client
            # knows; what is read after that can't be.
            await asyncio.shield(page.loading)
            if not page.is_known:
                # An error, of which the viewset says more; it isn't remembered.
                raise FallThrough
        answer = page.answer
        if answer is None:
            with self._lock:
                answer = page.encode()
        known = request.header(b"if-none-match")
        if known is not None and is_match(answer.headers[0][1].decode(), known):
            return HotAnswer(304, b"", answer.headers, content_type=None)
        return answer

    def _page(self, key: PageKey) -> Page:
        page = self._pages.get(key)
        if page is None:
            with self._lock:
                page = self._pages[key] = Page()
                self._forget_oldest()
        return page

    def _forget_oldest(self) -> None:
        while len(self._pages) > 1 and (
            len(self._pages) > MAX_REMEMBERED
            or sum(len(page.drops) for page in self._pages.values()) > MAX_REMEMBERED_DROPS
        ):
            del self._pages[next(iter(self._pages))]

    async def _load(
        self,
        key: PageKey,
        page: Page,
        request: HotRequest,
        actions: Mapping[str, Any],
        kwargs: dict[str, str],
    ) -> None:
        started = time.monotonic()
        data = None
        try:
            data = await sync_to_async(ask_viewset, thread_sensitive=False)(
                request.scope, actions, kwargs
            )
        finally:
            with self._lock:
                page.loading = None
                if data is None:
                    page.meanwhile = []
                    page.is_known = False
                    self._pages.pop(key, None)
                else:
                    page.read_at = started
                    page.replace(data)
                    self._forget_oldest()

    async def _check_identity(self, request: HotRequest) -> None:
        """Refuse an invalid identity even here, where none is needed."""
        identity = identify(request.asking())
        if identity is None:
            return
        request.record.user_id = identity.user_id
        now = time.monotonic()
        if self._users.get(identity.user_id, 0.0) < now:
            await sync_to_async(close_after(get_user), thread_sensitive=False)(identity)
            if len(self._users) >= MAX_REMEMBERED_USERS:
                self._users.clear()
            self._users[identity.user_id] = now + USER_SECONDS


def folded(drop: dict[str, Any], seq: int, event_type: str, data: dict[str, Any]) -> dict[str, Any]:
    """Return ``drop`` (REST shape) after an event."""
    if event_type in (EventType.DROP_CREATED, EventType.DROP_UPDATED):
        return dict(data["drop"])
    drop = drop | {"seq": seq}
    if event_type == EventType.STOCK_UPDATED:
        units = {variant["id"]: variant["availableStock"] for variant in data["variants"]}
        drop["available_stock"] = data["availableStock"]
        drop["availability"] = data["availability"]
        drop["variants"] = [
            variant | {"available_stock": units.get(variant["id"], variant["available_stock"])}
            for variant in drop["variants"]
        ]
    elif event_type == EventType.ACTIVITY_UPDATED:
        drop["activity_feed"] = {
            "latest_purchasers": [
                {
                    "user_id": entry["userId"],
                    "username": entry["username"],
                    "qty": entry["qty"],
                    "created_at": entry["createdAt"],
                }
                for entry in data["latestPurchasers"]
            ]
        }
    return drop


def changes_membership(event_type: str) -> bool:
    return event_type in (EventType.DROP_CREATED, EventType.DROP_UPDATED)


def ask_viewset(
    scope: Scope, actions: Mapping[str, Any], kwargs: dict[str, str]
) -> dict[str, Any] | None:
    """Return the data of the viewset's answer to anybody, or None for an error."""
    anonymous = [(name, value) for name, value in scope["headers"] if name not in PERSONAL_HEADERS]
    request = ASGIRequest(scope | {"headers": anonymous}, io.BytesIO())
    try:
        response = DropViewSet.as_view(dict(actions))(request, **kwargs)
        return plain(response.data) if response.status_code == 200 else None
    finally:
        connection.close()


def plain(data: Any) -> Any:
    """Return DRF's result as plain dicts and lists, free of serializers and fields."""
    return orjson.loads(orjson.dumps(data))


def note_failure(loading: asyncio.Task) -> None:
    """Look at the outcome of a reading that perhaps nobody waits for; the next will tell."""
    if not loading.cancelled():
        loading.exception()


def close_after(function: Any) -> Any:
    """Give the thread's database connection back to the pool when ``function`` is done."""

    def call(*args: Any) -> Any:
        try:
            return function(*args)
        finally:
            connection.close()

    return call
