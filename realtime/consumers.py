"""The WebSocket: one consumer per socket, fed by the hub.

Frames come from the hub, not through the channel layer: a channel per socket would cost one
Redis subscription, one decoding and one thread hop for each frame (docs/adr/0006).
"""

import asyncio
import contextlib
import uuid
from collections.abc import Awaitable
from typing import Any
from urllib.parse import parse_qsl

import orjson
from channels.db import database_sync_to_async
from channels.generic.websocket import AsyncWebsocketConsumer
from django.conf import settings
from django.core.exceptions import ObjectDoesNotExist

from config.addresses import socket_address
from config.asgi_types import Receive, Scope, Send
from config.origins import may_be_forged, origin_is_allowed
from config.problems import RateLimited
from config.rate_limits import rate_limits
from realtime import backpressure, log
from realtime.conflation import Outbox
from realtime.frames import EventFrame, Message, Series, is_uuid, pong_frame, text_message
from realtime.hub import OUTAGES, Hub, get_hub
from realtime.limits import Allowance, open_connections
from realtime.log import is_seq, read_seq
from realtime.private import end_with
from realtime.tickets import SUBPROTOCOL, ticket_in, use_ticket
from realtime.wire import Connection, connection_of, write_now
from users.exceptions import InvalidIdentity, UnknownUser
from users.identity import Identity, identify_socket, joined_headers, refuse_unknown
from users.replays import refuse_replay_soon

SERVICE_RESTART = 1012
TRY_AGAIN_LATER = 1013
MESSAGE_TOO_LARGE = 1009
BAD_MESSAGE = 4400
INVALID_IDENTITY = 4401
NOT_FOUND = 4404
TOO_SLOW = 4408
TOO_MANY_SUBSCRIPTIONS = 4409
TOO_MANY_MESSAGES = 4429
TOO_MANY_SOCKETS = 4430
PROCESS_IS_FULL = 4503
TOO_MANY_NEW = "too many new sockets of this user or address"

# How long a client may leave what was sent to it unread.
SLOWEST_READ_SECONDS = 5.0
CLOSE_SECONDS = 5.0
# Events in memory per client that reads slowly; the largest have some kilobytes.
REPLAY_PAGE = 100
# Who missed more is better served with the state.
MAX_REPLAY = 10_000


class Closing(Exception):
    """This socket can't go on."""

    def __init__(self, code: int, reason: str) -> None:
        super().__init__(reason)
        self.code = code
        self.reason = reason


class Consumer(AsyncWebsocketConsumer):
    """A socket that counts, for as long as it is open."""

    channel_layer_alias = "none: the hub listens for all sockets"
    address: str | None = None
    user_id: uuid.UUID | None = None
    is_watching = False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            # Also where a server that stops cancels what it runs.
            self._forget()

    async def dispatch(self, message: dict[str, Any]) -> None:
        # Channels looks after database connections in a thread for each message; here, what
        # uses the database does so itself.
        await getattr(self, message["type"].replace(".", "_"))(message)

    async def disconnect(self, code: int) -> None:
        self._forget()

    def _forget(self) -> None:
        """Be over: this socket counts no more."""
        if self.address is not None:
            open_connections.leave(self.address, is_watching=self.is_watching)
            self.address = None

    def _enter(self) -> None:
        """Count the socket among those that are open.

        Raises:
            Closing: there are too many in this process, or of this address.
        """
        address = socket_address(self.scope)
        if open_connections.is_full:
            raise Closing(PROCESS_IS_FULL, "this process has as many sockets as it takes")
        if open_connections.is_full_for(address):
            raise Closing(TOO_MANY_SOCKETS, "too many sockets from this address")
        open_connections.enter(address, is_watching=self.is_watching)
        self.address = address

    async def _check_rate(self, action: str, reason: str) -> None:
        """Count the connection; who has no identity is counted by address alone.

        Raises:
            Closing: for ``reason``; there were too many of this user or address.
        """
        try:
            await rate_limits().check_soon(action, self.user_id, lambda: self.address or "")
        except RateLimited:
            raise Closing(TOO_MANY_SOCKETS, f"{reason}; try again later") from None


class DropConsumer(Consumer):
    """A socket that watches all drops, or one: ``/ws/drops`` and ``/ws/drops/{id}``."""

    base_send: Send
    # Where the server's own ``send`` need not be asked.
    connection: Connection | None = None
    hub: Hub
    is_watching = True
    is_watching_all = False
    is_over = False
    # A step of sending that waits for the client to read.
    blocked: asyncio.Task | None = None
    closing: asyncio.Task | None = None
    # Ends the socket together with what vouches for its user.
    expiry: asyncio.TimerHandle | None = None
    # None while the client gets everything at once, which is nearly always.
    outbox: Outbox | None = None

    async def connect(self) -> None:
        self.watched: set[str] = set()
        headers = joined_headers(self.scope)
        if not origin_is_allowed(headers.get("origin"), headers.get("host", "")):
            # Before the handshake: that page's socket shall never open.
            return await self.close()
        # Where a snapshot was newer than the hub's newest frame, by drop.
        self.ahead: dict[str, int] = {}
        rate = settings.SOCKET_MESSAGES_PER_SECOND
        # Twice as many at once: a client that comes back subscribes to all it watched.
        self.messages = Allowance(rate, 2 * rate)
        offered = self.scope["subprotocols"]
        await self.accept(SUBPROTOCOL if SUBPROTOCOL in offered else None)
        self.servers_send, self.base_send = (
            self.base_send,
            backpressure.waiting_send(self.base_send),
        )
        self.connection = connection_of(self.servers_send)
        try:
            self._enter()
            identity = await self._identify(ticket_in(offered))
            if identity is not None:
                self.user_id, self.expiry = identity.user_id, end_with(identity, self)
            await self._check_rate("socket", TOO_MANY_NEW)
            # Last: who asks for what there can't be counts with the others.
            drop_id, since = read_address(self.scope)
            self.hub = get_hub()
            await self.hub.start()
            await self._begin(drop_id, since)
            if self.user_id is not None and not self.is_over:
                self.hub.private.add(self.user_id, self)
        except (Closing, *OUTAGES) as exc:
            self._end(*why(exc))

    async def _identify(self, ticket: str | None) -> Identity | None:
        """Return whose socket this is; see ``identify``.

        Raises:
            Closing: nobody's who may have one. Who is not believed is counted.
        """
        try:
            return await identify(self.scope, ticket)
        except InvalidIdentity:
            await self._check_rate("identity", "too many failed identities of this address")
            raise Closing(INVALID_IDENTITY, "the identity or the ticket is not valid") from None
        except UnknownUser:
            await self._check_rate("socket", TOO_MANY_NEW)
            raise Closing(INVALID_IDENTITY, "unknown user") from None

    async def disconnect(self, code: int) -> None:
        await super().disconnect(code)
        if self.blocked is not None:
            self.blocked.cancel()

    def _forget(self) -> None:
        """Be over: nothing is sent from now on, and nobody knows this socket any more."""
        self.is_over = True
        self.outbox = None
        if self.expiry is not None:
            self.expiry.cancel()
        super()._forget()
        if hasattr(self, "hub"):
            self.hub.forget(self, self.watched)
            if self.user_id is not None:
                self.hub.private.remove(self.user_id, self)

    # --- What clients say ---------------------------------------------------------------

    async def receive(self, text_data: str | None = None, bytes_data: bytes | None = None) -> None:
        if self.is_over:
            return
        try:
            await self._act(text_data, bytes_data)
        except (Closing, *OUTAGES) as exc:
            self._end(*why(exc))

    async def _act(self, text: str | None, data: bytes | None) -> None:
        # A character has at most four bytes; those of most are worth no second look.
        size = len(text if text is not None else data or b"")
        limit = settings.SOCKET_MESSAGE_BYTES
        if size > limit or (text and size > limit // 4 and len(text.encode()) > limit):
            raise Closing(MESSAGE_TOO_LARGE, f"more than {limit} bytes")
        message = parse_message(text)
        if message is None:
            raise Closing(BAD_MESSAGE, "not a message this socket knows")
        if self.messages.left() < 1:
            raise Closing(TOO_MANY_MESSAGES, "too many messages in a second")
        self.messages.spend()
        if message["action"] == "ping":
            return self._send(text_message(pong_frame()))
        drop_id = message["dropId"].lower()
        if message["action"] == "unsubscribe":
            self.watched.discard(drop_id)
            self.hub.unwatch(self, drop_id)
            # Who watches all goes on to get it, after what it has.
            if not self.is_watching_all:
                self.ahead.pop(drop_id, None)
                if self.outbox is not None:
                    self.outbox.discard(drop_id)
            return None
        if drop_id not in self.watched and len(self.watched) >= settings.SOCKET_SUBSCRIPTIONS:
            raise Closing(TOO_MANY_SUBSCRIPTIONS, "too many subscriptions")
        await self._begin(drop_id, message.get("since"))

    # --- The beginning: a state, or what was missed -------------------------------------

    async def _begin(self, drop_id: str | None, since: int | None) -> None:
        """Watch from now on, then send what the watched events continue."""
        outbox = self._wait_in(self.outbox or Outbox())
        if drop_id is None:
            outbox.is_all_held = True
            self.is_watching_all = True
            self.hub.watch_all(self)
        else:
            outbox.held.add(drop_id)
            self.watched.add(drop_id)
            self.hub.watch(self, drop_id)
        try:
            if drop_id is None or since is None or not await self._replay(drop_id, since):
                await self._send_snapshot(drop_id)
        except ObjectDoesNotExist:
            raise Closing(NOT_FOUND, "no such drop") from None

    async def _send_snapshot(self, drop_id: str | None) -> None:
        snapshot = await self.hub.snapshot(drop_id)
        if self.outbox is None:
            return
        self.outbox.put(snapshot.message)
        self._continue_from(snapshot.seqs)
        if drop_id is None:
            self.outbox.is_all_held = False
        self._flush()

    def _continue_from(self, seqs: dict[str, int]) -> None:
        """Let the frames after these numbers follow; those up to there are told already."""
        if self.outbox is None:
            return
        for drop_id, seq in seqs.items():
            self.ahead.pop(drop_id, None)
            if self.outbox.continue_from(drop_id, seq):
                continue
            if drop_id in self.watched or self.hub.may_bring(drop_id, seq):
                # The hub may be sending the very frame to which the state belongs.
                self.ahead[drop_id] = seq

    async def _replay(self, drop_id: str, since: int) -> bool:
        """Send the events after ``since``, each; return False where the log can't tell them."""
        # Nothing that was sent before this socket watched is sent to it again.
        sent = self.hub.sent(drop_id)
        if sent - since > MAX_REPLAY:
            return False
        while True:
            frames = self.hub.remembered_after(drop_id, since)
            if frames is None:
                events = await database_sync_to_async(log.missed_events)(
                    drop_id, since, REPLAY_PAGE
                )
                if events is None:
                    return False
                frames = [EventFrame(drop_id, *event) for event in events]
            if frames:
                page = Series(since, frames[:REPLAY_PAGE])
                since = page.last.seq
                self._send_series(page)
            # The next page only when the client has read this one.
            await self._flushed()
            if self.outbox is None:
                return True
            if len(frames) < REPLAY_PAGE and since >= sent:
                break
            if not frames:
                # The numbers went back meanwhile: what was sent by then will never be reached.
                return False
        self._continue_from({drop_id: since})
        self._flush()
        return True

    def _send_series(self, series: Series) -> None:
        """Send frames with one write, if nothing waits before them."""
        if self.outbox is None:
            return
        is_first = self.blocked is None and not self.outbox.has_messages
        if is_first and self.connection and write_now(self.connection, series.wire):
            return
        for message in series.messages:
            self.outbox.put(message)

    # --- What the hub offers ------------------------------------------------------------

    def offer(self, frame: EventFrame, prev: int, message: Message) -> None:
        if self.is_over or not (self.is_watching_all or frame.drop_id in self.watched):
            return
        if self.ahead and frame.drop_id in self.ahead:
            if frame.seq <= self.ahead[frame.drop_id]:
                return
            prev = self.ahead.pop(frame.drop_id)
            message = frame.message_after(prev)
        if self.outbox is None:
            self._start(message)
            self._become_direct()
        else:
            self.outbox.add(frame, prev)
            self._flush()

    def offer_heartbeat(self, key: str, message: Message) -> None:
        if self.outbox is None:
            self._start(message)
        else:
            self.outbox.put_last(key, message)
            self._flush()

    def tell(self, message: Message) -> None:
        """Send what is for this socket's user only."""
        self._send(message)

    def reconnect(self) -> None:
        self._end(SERVICE_RESTART, "connect again")

    def end_identity(self) -> None:
        self._end(INVALID_IDENTITY, "the identity is no longer valid")

    # --- Sending ------------------------------------------------------------------------

    def _send(self, message: Message) -> None:
        if self.outbox is None:
            self._start(message)
        else:
            self.outbox.put(message)
            self._flush()

    def _start(self, message: Message) -> None:
        """Hand ``message`` to the server at once; if it must wait, all that follows waits too."""
        if self.is_over:
            return
        if self.connection is not None and write_now(self.connection, message["wire"]):
            return
        step = self.base_send(message)
        try:
            waits_for = backpressure.start(step)
        except Exception:
            # The client is gone, of which the server tells us separately.
            return self._forget()
        if waits_for is not None:
            self._wait_in(self.outbox or Outbox())
            self.blocked = asyncio.ensure_future(self._finish(step, waits_for))

    async def _finish(self, step: Awaitable[None], waits_for: Any) -> None:
        try:
            async with asyncio.timeout(SLOWEST_READ_SECONDS):
                await backpressure.resume(step, waits_for)
        except TimeoutError:
            return self._end(TOO_SLOW, "too slow")
        except Exception:
            return self._forget()
        self.blocked = None
        self._flush()

    def _flush(self) -> None:
        """Send what waits, for as long as the client reads."""
        while self.outbox is not None and self.blocked is None:
            message = self.outbox.pop()
            if message is not None:
                self._start(message)
            elif self.outbox.is_holding:
                return
            else:
                self.outbox = None
                self._become_direct()

    def _become_direct(self) -> None:
        """Have the hub write to the connection itself, if nothing needs to be asked here."""
        if self.connection and self.outbox is None and not (self.ahead or self.is_over):
            self.hub.write_to(self, self.connection)

    def _wait_in(self, outbox: Outbox) -> Outbox:
        self.outbox = outbox
        self.hub.write_to(self, None)
        return outbox

    async def _flushed(self) -> None:
        """Return once the client has taken what there was for it, or is gone."""
        self._flush()
        while self.blocked is not None and not self.blocked.done() and not self.is_over:
            await asyncio.wait([self.blocked])

    def _end(self, code: int, reason: str) -> None:
        if self.closing is None:
            self._forget()
            self.closing = asyncio.ensure_future(self._close(code, reason))

    async def _close(self, code: int, reason: str) -> None:
        with contextlib.suppress(Exception):
            try:
                async with asyncio.timeout(CLOSE_SECONDS):
                    await self.close(code, reason)
            except TimeoutError:
                backpressure.abort(self.servers_send)


class NotFoundConsumer(Consumer):
    """Any other address."""

    async def connect(self) -> None:
        await self.accept()
        try:
            self._enter()
            await self._check_rate("socket", TOO_MANY_NEW)
            raise Closing(NOT_FOUND, "no such socket")
        except Closing as exc:
            await self.close(exc.code, exc.reason)


def why(exc: Exception) -> tuple[int, str]:
    if isinstance(exc, Closing):
        return exc.code, exc.reason
    return TRY_AGAIN_LATER, "try again later"


def read_address(scope: dict[str, Any]) -> tuple[str | None, int | None]:
    """Return the drop of the address, and the last sequence number that the client has.

    Raises:
        Closing: there is no such address, or ``?since=`` is no sequence number of one drop.
    """
    drop_id = scope["url_route"]["kwargs"].get("drop_id")
    if drop_id is not None and not is_uuid(drop_id):
        raise Closing(NOT_FOUND, "no such drop")
    query = parse_qsl(scope["query_string"].decode("latin-1"), keep_blank_values=True)
    given = [value for name, value in query if name == "since"]
    if not given:
        return (drop_id.lower() if drop_id else None), None
    since = read_seq(given[-1])
    if drop_id is None or len(given) > 1 or since is None:
        raise Closing(BAD_MESSAGE, "since must be a sequence number of one drop")
    return drop_id.lower(), since


async def identify(scope: dict[str, Any], ticket: str | None) -> Identity | None:
    """Return whose socket this is, by its headers or else by its ticket; None is nobody's.

    Raises:
        InvalidIdentity: the headers, or the ticket, are not valid, or were used before.
        UnknownUser: there is no such user, or staff switched it off.
    """
    identity = identify_socket(scope)
    if identity is not None:
        if may_be_forged(joined_headers(scope).get):
            # With CORS_ORIGINS=* pages of all sites may watch, but not as their visitor.
            raise InvalidIdentity
        await refuse_replay_soon(identity)
        await database_sync_to_async(refuse_unknown)(identity)
        return identity
    if ticket is None:
        return None
    identity = await database_sync_to_async(use_ticket)(ticket)
    if identity is None:
        raise InvalidIdentity
    return identity


def parse_message(text: str | None) -> dict[str, Any] | None:
    """Return a client's message, or None for anything that is not one."""
    try:
        message = orjson.loads(text or "")
    except orjson.JSONDecodeError:
        return None
    if not isinstance(message, dict):
        return None
    if message.get("action") == "ping":
        return message
    is_known = message.get("action") in ("subscribe", "unsubscribe")
    if not (is_known and is_uuid(message.get("dropId"))):
        return None
    since = message.get("since")
    return message if since is None or is_seq(since) else None
