"""What we know of the insides of daphne and uvicorn, to go past what is slow in them.

Each look inside is guarded: where a server is another one, or something about a connection
is out of the ordinary, nothing is done and ASGI's ``send`` does what it always did.
"""

from collections.abc import Callable
from functools import lru_cache, partial
from http import HTTPStatus
from typing import Any

from twisted.internet.tcp import Connection

from config.asgi_types import Send

# Sends bytes now, or what is left of them soon; returns False, and does nothing, where other
# bytes wait to be sent before.
Write = Callable[[bytes], bool]


def daphne_protocol(send: Send) -> Any:
    """Return daphne's side of the connection, or None under another server.

    Source: ``daphne.server.Server.create_application``.
    """
    if not isinstance(send, partial):
        return None
    protocol: Any = send.args[0]
    kind: Any = type(protocol)
    return protocol if _is_daphnes(kind) else None


@lru_cache(8)
def _is_daphnes(kind: type) -> bool:
    # Ours are made from daphne's (see config.daphne_requests).
    return any(base.__module__.startswith("daphne.") for base in kind.__mro__)


def quick_write(transport: Any) -> Write | None:
    """Return what writes to a plain TCP connection of Twisted's, past the event loop."""
    # Under TLS the bytes have to be encrypted first.
    if not isinstance(transport, Connection) or transport.TLS:
        return None
    send = transport.socket.send

    def write(data: bytes) -> bool:
        # Twisted's ``write`` would have the event loop watch the connection, and forget it
        # again. What waits already must stay in front.
        if transport.dataBuffer or transport._tempDataBuffer or not transport.connected:
            return False
        try:
            sent = send(data)
        except BlockingIOError:
            return False
        except OSError:
            # The client is gone, of which the event loop tells Twisted.
            return True
        if sent < len(data):
            transport.write(data[sent:])
        return True

    return write


def send_at_once(send: Send, status: int, head: bytes, body: bytes) -> bool:
    """Send a whole answer with one system call, or return False and do nothing.

    ASGI hands over head and body apart, which the servers also send apart, after they have
    looked at each header. That costs more than all that a hot endpoint does itself.

    Args:
        head: the lines of the headers, each ended, with the body's length among them.
    """
    if (protocol := daphne_protocol(send)) is not None:
        return _send_by_daphne(protocol, status, head, body)
    cycle = getattr(send, "__self__", None)
    if type(cycle).__module__ == "uvicorn.protocols.http.httptools_impl":
        return _send_by_uvicorn(cycle, status, head, body)
    return False


def _send_by_daphne(request: Any, status: int, head: bytes, body: bytes) -> bool:
    server = request.server
    connection = server.connections.get(request)
    if (
        connection is None
        or "disconnected" in connection
        or request.finished
        or request._response_started
        or request.queued
        or request.clientproto != b"HTTP/1.1"
        # Set where the connection is to be closed after this answer.
        or request.responseHeaders.hasHeader(b"connection")
        or server.action_logger is not None
    ):
        return False
    write = quick_write(request.channel.transport)
    if write is None:
        return False
    if server.server_name:
        head += b"server: %b\r\n" % server.server_name.encode()
    if not write(b"%b%b\r\n%b" % (status_line(status), head, body)):
        return False
    request._response_started, request.startedWriting = True, 1
    request.code, request.sentLength = status, len(body)
    request.finish()
    return True


def _send_by_uvicorn(cycle: Any, status: int, head: bytes, body: bytes) -> bool:
    if (
        cycle.response_started
        or cycle.disconnected
        or cycle.waiting_for_100_continue
        or cycle.flow.write_paused
        # The connection is to be closed after this answer.
        or not cycle.keep_alive
        or cycle.access_log
    ):
        return False
    for name, value in cycle.default_headers:
        head += b"%b: %b\r\n" % (name, value)
    cycle.transport.write(b"%b%b\r\n%b" % (status_line(status), head, body))
    cycle.response_started = cycle.response_complete = True
    cycle.message_event.set()
    cycle.on_response()
    return True


def wrote_too_late(send: Send) -> bool:
    """Say whether an error of ``send`` is only that the client of uvicorn's went away before.

    uvicorn hears of that in the event loop's next turn, and until then uvloop raises.
    """
    cycle: Any = getattr(send, "__self__", None)
    transport = getattr(cycle, "transport", None)
    if transport is None or not transport.is_closing():
        return False
    cycle.disconnected = True
    return True


@lru_cache(64)
def status_line(status: int) -> bytes:
    return f"HTTP/1.1 {status} {HTTPStatus(status).phrase}\r\n".encode()
