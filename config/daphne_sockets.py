"""daphne's sockets, with limits, and with the standard's close codes.

By itself daphne queues whatever a client sends, however much of it is still to be handled, and
autobahn, its WebSocket library, cuts the connection of who breaks the protocol without a word.
Source of the hooks: autobahn.websocket.protocol.WebSocketProtocol.
"""

import re
from typing import Any

import daphne.server
from autobahn.websocket.types import ConnectionDeny
from daphne.ws_protocol import WebSocketFactory, WebSocketProtocol
from django.conf import settings

MESSAGE_TOO_LARGE = 1009
# Messages of one socket that wait for the application.
MOST_WAITING = 8
# Bytes of letters in UTF-8, as of Å and à. autobahn reads headers as Latin-1 and takes the second
# for the end of a line, the third for a blank to be trimmed. So each goes past it as two of others.
ESCAPES = {b"\x80": b"\x800", b"\x85": b"\x801", b"\xa0": b"\x802"}
TO_ESCAPE = re.compile(rb"[\x80\x85\xa0]")
UNESCAPES = {two.decode("latin-1"): one.decode("latin-1") for one, two in ESCAPES.items()}
ESCAPED = re.compile("\x80[012]")


def escape(value: bytes) -> bytes:
    return TO_ESCAPE.sub(lambda found: ESCAPES[found[0]], value)


def unescape(value: str) -> str:
    return ESCAPED.sub(lambda found: UNESCAPES[found[0]], value)


class LimitedSocket(WebSocketProtocol):
    """A socket that closes with a code, and reads only what can be handled and answered."""

    # A close frame, and a second for the answer; else autobahn would cut the connection.
    failByDrop = False
    # These would limit what is sent, too, which a state of many drops is beyond.
    maxMessagePayloadSize = maxFramePayloadSize = 0
    is_waiting = False

    @property
    def has_much_to_send(self) -> bool:
        # Under TLS Twisted doesn't say.
        return getattr(self.transport, "producerPaused", False)

    def onConnect(self, request: Any) -> Any:
        # daphne would raise, and autobahn tell the client what.
        if not request.headers.get("sec-websocket-protocol", "").isascii():
            raise ConnectionDeny(ConnectionDeny.BAD_REQUEST, "Bad Request")
        for name, value in request.headers.items():
            request.headers[name] = unescape(value)
        return super().onConnect(request)

    def onMessageFrameBegin(self, length: int) -> None:
        super().onMessageFrameBegin(length)
        if self.message_data_total_length > settings.SOCKET_MESSAGE_BYTES:
            reason = f"more than {settings.SOCKET_MESSAGE_BYTES} bytes"
            self._fail_connection(MESSAGE_TOO_LARGE, reason)

    def onMessageFrameData(self, payload: bytes) -> None:
        # A message may have any number of empty parts, and autobahn keeps them all.
        if payload:
            super().onMessageFrameData(payload)

    def processData(self) -> bool:
        """Read a part of what has arrived, and say whether to go on."""
        if self.failedByMe:
            # Thrown away: closed while some of it is unread, the connection would be reset,
            # and the close frame lost with it.
            self.data = b""
            return False
        if self.application_queue.qsize() >= MOST_WAITING or self.has_much_to_send:
            self.is_waiting = True
            self.transport.pauseProducing()
            return False
        return super().processData()

    def read_on(self) -> None:
        """Go on where ``processData`` stopped, if the reason is gone."""
        if self.is_waiting and self.application_queue.empty() and not self.has_much_to_send:
            self.is_waiting = False
            self.transport.resumeProducing()
            self.consumeData()

    def serverClose(self, code: int | None = None) -> None:
        # autobahn's ``sendClose`` takes only 1000 and those that are free for applications, and
        # raises for the rest: the socket would stay open.
        self.sendCloseFrame(code=1000 if code is None else code, isReply=False)


class LimitedSocketFactory(WebSocketFactory):
    protocol = LimitedSocket


def install() -> None:
    """Let every server that daphne makes from now on have these sockets, however it is started."""
    daphne.server.WebSocketFactory = LimitedSocketFactory
