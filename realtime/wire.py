"""Frames written straight to a connection, past the layers of the server.

A frame of a server is its length and its text, the same bytes for everybody. The servers build
them anew for each client, which takes them several times what the system call takes. So where
the server is one we know and its connection has nothing waiting, a frame's bytes, made once,
go there directly; in every other case ASGI's ``send`` does what it always did.
"""

from typing import Any, Protocol

from config.asgi_types import Send
from config.servers import daphne_protocol, quick_write


class Connection(Protocol):
    """What is written to: of asyncio's transports, as much as a frame needs.

    With thousands of sockets most of a frame's cost is memory that has left the cache, so one
    object is looked at for each, and nothing of ours is in between.
    """

    def is_closing(self) -> bool: ...
    def get_write_buffer_size(self) -> int: ...
    def write(self, data: bytes) -> None: ...


def to_wire(text: str) -> bytes:
    """Return the frame of a text: unfragmented, and unmasked as from a server.

    Source: https://www.rfc-editor.org/rfc/rfc6455#section-5.2
    """
    payload = text.encode()
    size = len(payload)
    if size < 126:
        return bytes((0x81, size)) + payload
    if size < 65_536:
        return b"\x81\x7e" + size.to_bytes(2, "big") + payload
    return b"\x81\x7f" + size.to_bytes(8, "big") + payload


def connection_of(send: Send) -> Connection | None:
    """Return the connection of an accepted socket, or None where only ``send`` can write to it.

    Args:
        send: the server's own.
    """
    if (of_daphne := daphne_protocol(send)) is not None:
        return _of_daphne(of_daphne)
    protocol: Any = getattr(send, "__self__", None)
    if type(protocol).__name__ == "WebSocketsSansIOProtocol":
        # It closes the transport together with the socket, but where the application closes:
        # then nothing is written any more.
        transport: Connection = protocol.transport
        return transport
    return None


def write_now(connection: Connection, data: bytes) -> bool:
    """Write to a connection that is open and has nothing waiting, or return False."""
    if connection.is_closing() or connection.get_write_buffer_size():
        return False
    try:
        connection.write(data)
    except RuntimeError:
        # uvloop's, of a connection that has ended without a word to anybody yet.
        return False
    return True


class DaphneConnection:
    """A ``Connection`` of Twisted's."""

    __slots__ = ("_protocol", "_transport", "_write")

    def __init__(self, protocol: Any, write: Any) -> None:
        self._protocol, self._transport, self._write = protocol, protocol.transport, write

    def is_closing(self) -> bool:
        return not self._transport.connected or self._protocol.state != self._protocol.STATE_OPEN

    def get_write_buffer_size(self) -> int:
        return len(self._transport.dataBuffer) + self._transport._tempDataLen

    def write(self, data: bytes) -> None:
        if not self._write(data):
            self._transport.write(data)


def _of_daphne(protocol: Any) -> Connection | None:
    write = quick_write(protocol.transport)
    return None if write is None else DaphneConnection(protocol, write)
