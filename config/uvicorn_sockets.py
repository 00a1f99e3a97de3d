"""uvicorn's sockets: what a client does wrong is no error here, and takes no memory.

By itself uvicorn prints a traceback of a text that is not UTF-8, and fails where a close frame
came right behind; it answers each ping of a client that doesn't read the answers; it keeps each
part of a message, of which there may be any number if they are empty; and it leaves a handshake
without an answer whose address or header has more than 8 kB.
"""

from django.conf import settings
from uvicorn._types import ASGIReceiveEvent
from uvicorn.protocols.websockets.websockets_sansio_impl import WebSocketsSansIOProtocol
from websockets import http11
from websockets.frames import Frame

INVALID_TEXT = 1007

deliver = WebSocketsSansIOProtocol.send_receive_event_to_app
receive = WebSocketsSansIOProtocol.receive
take = WebSocketsSansIOProtocol.data_received


def take_and_refuse(socket: WebSocketsSansIOProtocol, data: bytes) -> None:
    """Take what came; a handshake that is too long is answered by the library, and sent here."""
    take(socket, data)
    if not socket.handshake_initiated and socket.conn.handshake_exc is not None:
        socket.transport.write(b"".join(socket.conn.data_to_send()))
        socket.transport.close()


def take_part(socket: WebSocketsSansIOProtocol, part: Frame) -> None:
    if part.data:
        socket.frames.append(bytes(part.data))
    if part.fin:
        socket.send_receive_event_to_app()


def deliver_if_valid(socket: WebSocketsSansIOProtocol) -> None:
    """Hand a message to the application, or close with 1007."""
    if socket.curr_msg_data_type == "text" and not socket.close_sent:
        try:
            b"".join(socket.frames).decode()
        except UnicodeDecodeError:
            socket.frames = []
            socket.conn.fail(INVALID_TEXT, "a text that is not UTF-8")
            return socket.handle_parser_exception()
    return deliver(socket)


def pause_writing(socket: WebSocketsSansIOProtocol) -> None:
    socket.writable.clear()
    socket.transport.pause_reading()


def resume_writing(socket: WebSocketsSansIOProtocol) -> None:
    socket.writable.set()
    if not socket.read_paused:
        socket.transport.resume_reading()


async def receive_and_pause(socket: WebSocketsSansIOProtocol) -> ASGIReceiveEvent:
    message = await receive(socket)
    if not socket.writable.is_set():
        # uvicorn's own has it read on, because the message was taken.
        socket.transport.pause_reading()
    return message


def install() -> None:
    """Let every socket be like this, however uvicorn is started."""
    # A handshake may be as long as any request.
    http11.MAX_LINE_LENGTH = settings.MAX_HEADER_BYTES
    for name, method in [
        ("handle_cont", take_part),
        ("send_receive_event_to_app", deliver_if_valid),
        ("pause_writing", pause_writing),
        ("resume_writing", resume_writing),
        ("receive", receive_and_pause),
        ("data_received", take_and_refuse),
    ]:
        setattr(WebSocketsSansIOProtocol, name, method)
