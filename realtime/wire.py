"""Frames written straight to a connection, past the layers of the server.

A frame of a server is its length and its text, the same bytes for everybody. The servers build
them anew for each client, which takes them several times what the system call takes. So where
the server is one we know and its connection has nothing waiting, a frame's bytes, made once,
go there directly; in every other case ASGI's ``send`` does what it always did.
"""

from collections.abc import Callable
from typing import Any

from websockets.protocol import State

from config.asgi_types import Message, Send
from config.servers import daphne_protocol, quick_write

# Writes a message of ``frames.text_message`` now, or returns False and does nothing.
Writer = Callable[[Message], bool]


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


def frame_writer(send: Send) -> Writer:
    """Return the writer for the accepted socket of ``send``, the server's own."""
    if (protocol := daphne_protocol(send)) is not None:
        return _daphne_writer(protocol)
    protocol = getattr(send, "__self__", None)
    if type(protocol).__name__ == "WebSocketsSansIOProtocol":
        return _uvicorn_writer(protocol)
    return no_writer


def no_writer(message: Message) -> bool:
    return False


def _uvicorn_writer(protocol: Any) -> Writer:
    connection, is_writable = protocol.conn, protocol.writable.is_set
    write = protocol.transport.write

    def write_frame(message: Message) -> bool:
        if connection.state is not State.OPEN or protocol.disconnected or not is_writable():
            return False
        write(message["wire"])
        return True

    return write_frame


def _daphne_writer(protocol: Any) -> Writer:
    write = quick_write(protocol.transport)
    if write is None:
        return no_writer

    def write_frame(message: Message) -> bool:
        return protocol.state == protocol.STATE_OPEN and write(message["wire"])

    return write_frame
