"""What no WebSocket library would send: broken frames and handshakes, and far too much."""

import asyncio
import contextlib
import json
import re
import socket
import struct
import sys
import threading
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest
from django.conf import settings
from django.db import connection
from twisted.internet.testing import StringTransport
from uvicorn import Config
from uvicorn.protocols.websockets.websockets_sansio_impl import WebSocketsSansIOProtocol
from uvicorn.server import ServerState
from websockets.frames import CloseCode, Frame, Opcode
from websockets.sync.client import connect

from config import uvicorn_sockets
from config.daphne_sockets import LimitedSocketFactory
from drops.tests.factories import DropFactory
from tests.concurrency import another_session
from tests.identities import SECRETS, signed
from tests.servers import Served, WebServer, running_web_servers

pytestmark = [pytest.mark.servers, pytest.mark.django_db(transaction=True)]

MEGABYTE = 1024 * 1024
CONTINUATION, TEXT, BINARY, CLOSE, PING, PONG = 0, 1, 2, 8, 9, 10


def frame(
    opcode: int,
    payload: bytes = b"x",
    *,
    is_last: bool = True,
    is_masked: bool = True,
    length: int | None = None,
    reserved: int = 0,
) -> bytes:
    """Return a frame, which may announce another ``length`` than its payload has.

    Source: https://www.rfc-editor.org/rfc/rfc6455#section-5.2
    """
    length = len(payload) if length is None else length
    first = is_last << 7 | reserved << 4 | opcode
    mask_bit = is_masked << 7
    if length < 126:
        head = struct.pack("!BB", first, mask_bit | length)
    elif length < 65_536:
        head = struct.pack("!BBH", first, mask_bit | 126, length)
    else:
        head = struct.pack("!BBQ", first, mask_bit | 127, length)
    # Masked with zeros, a payload stays as it is.
    return head + bytes(4 * is_masked) + payload


def handshake(*headers: bytes, path: str = "/ws/drops") -> bytes:
    lines = [
        f"GET {path} HTTP/1.1".encode(),
        *(b"Host: localhost", b"Upgrade: websocket", b"Connection: Upgrade"),
        *(b"Sec-WebSocket-Version: 13", b"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ=="),
        *(*headers, b"", b""),
    ]
    return b"\r\n".join(lines)


class RawSocket:
    """A socket that is open, of which the snapshot is read."""

    def __init__(self, line: socket.socket) -> None:
        self.line = line
        self.reader = line.makefile("rb")
        line.sendall(handshake())
        assert self.reader.readline().startswith(b"HTTP/1.1 101 ")
        while self.reader.readline() != b"\r\n":
            pass
        assert self.next()[0] == TEXT

    def next(self) -> tuple[int, bytes]:
        """Return the opcode and the payload of the next frame; a server's are not masked."""
        first, length = self.reader.read(2)
        if length == 126:
            (length,) = struct.unpack("!H", self.reader.read(2))
        elif length == 127:
            (length,) = struct.unpack("!Q", self.reader.read(8))
        return first & 0x0F, self.reader.read(length)

    def close_code(self) -> int:
        opcode, payload = self.next()
        while opcode != CLOSE:
            opcode, payload = self.next()
        return struct.unpack("!H", payload[:2])[0]

    def is_ended(self) -> bool:
        # daphne resets the connection, uvicorn ends it.
        with contextlib.suppress(ConnectionResetError):
            while self.reader.read(4096):
                pass
        return True


@contextlib.contextmanager
def raw_socket(server: WebServer) -> Iterator[RawSocket]:
    with server.connect() as line:
        yield RawSocket(line)


def pong(server: WebServer) -> str:
    """Return what another client gets for its ping."""
    with connect(f"{server.ws_url}/ws/drops", proxy=None, compression=None) as other:
        other.recv(5)
        other.send(json.dumps({"action": "ping"}))
        return json.loads(other.recv(5))["type"]


# --- Broken frames ----------------------------------------------------------------------

BROKEN: dict[str, tuple[int, bytes]] = {
    "a text that is not UTF-8": (CloseCode.INVALID_DATA, frame(TEXT, b"\xff\xfe")),
    "a text cut within a character": (CloseCode.INVALID_DATA, frame(TEXT, "é".encode()[:1])),
    "a ping in parts": (CloseCode.PROTOCOL_ERROR, frame(PING, is_last=False)),
    "a long ping": (CloseCode.PROTOCOL_ERROR, frame(PING, b"x" * 126)),
    "a reserved kind": (CloseCode.PROTOCOL_ERROR, frame(3)),
    "a reserved control frame": (CloseCode.PROTOCOL_ERROR, frame(11)),
    "reserved bits": (CloseCode.PROTOCOL_ERROR, frame(TEXT, reserved=4)),
    "no mask": (CloseCode.PROTOCOL_ERROR, frame(TEXT, is_masked=False)),
    "the rest of nothing": (CloseCode.PROTOCOL_ERROR, frame(CONTINUATION)),
    "a second beginning": (CloseCode.PROTOCOL_ERROR, frame(TEXT, is_last=False) + frame(TEXT)),
    "a close frame of one byte": (CloseCode.PROTOCOL_ERROR, frame(CLOSE, b"\x03")),
}


@pytest.mark.parametrize(("code", "data"), BROKEN.values(), ids=BROKEN.keys())
def test_broken_frames_end_with_the_code_of_the_standard(web_server, code, data):
    with raw_socket(web_server) as culprit:
        # What comes after it is of no interest any more.
        culprit.line.sendall(data + frame(TEXT, b"{}"))

        assert culprit.close_code() == code
        assert culprit.is_ended()
    assert pong(web_server) == "PONG"


@pytest.mark.parametrize(("code", "data"), BROKEN.values(), ids=BROKEN.keys())
def test_a_broken_frame_and_a_close_frame_at_once_end_the_socket(web_server, code, data):
    with raw_socket(web_server) as culprit:
        culprit.line.sendall(data + frame(CLOSE, b"\x03\xe8"))

        # uvicorn looks at the close frame first.
        assert culprit.close_code() in (code, CloseCode.NORMAL_CLOSURE)
        assert culprit.is_ended()


def test_a_broken_close_frame_ends_the_socket(web_server):
    for payload in (b"\x00\x01", b"\x03\xe8\xff\xff"):
        with raw_socket(web_server) as culprit:
            culprit.line.sendall(frame(CLOSE, payload))
            assert culprit.is_ended()


# --- Broken handshakes ------------------------------------------------------------------


@pytest.mark.parametrize(
    "header",
    [
        b"Sec-WebSocket-Protocol: \xff\xfe",
        b"Sec-WebSocket-Protocol: drops.v1, ticket.\xc3\xa9",
        b"Sec-WebSocket-Key: \xff",
        b"Sec-WebSocket-Version: \xff",
        b"\xff: 1",
    ],
)
def test_a_handshake_that_is_not_ascii_is_refused(web_server, header):
    with web_server.connect() as line:
        line.sendall(handshake(header))
        answer = line.recv(4096)

    assert answer.startswith(b"HTTP/1.1 400 ")
    assert b"codec" not in answer
    assert pong(web_server) == "PONG"


@pytest.mark.parametrize("name", [b"User-Agent", b"Cookie"])
def test_other_headers_may_hold_any_bytes(web_server, name):
    with web_server.connect() as line:
        line.sendall(handshake(name + b": \xff\xfe"))

        assert line.recv(4096).startswith(b"HTTP/1.1 101 ")


# In Latin-1 a byte of each but the last two is the end of a line to Python, or a blank; those look
# like what is done about that.
NAMES = ["Åsa", "SOFÅ", "Nicolà", "محمد", "ЀА", "À0À1"]


@pytest.mark.parametrize("kind", ["daphne", "uvicorn"])
def test_a_signed_name_may_have_any_letters(kind):
    gateway = {"IDENTITY_MODE": "gateway", "GATEWAY_SECRETS": ",".join(SECRETS)}
    with running_web_servers(WebServer(kind, **gateway)) as (server,):
        for name in NAMES:
            signs = signed("GET", "/ws/drops", uuid.uuid4(), name=name)
            with server.connect() as line:
                line.sendall(handshake(*(f"{key}: {text}".encode() for key, text in signs.items())))
                told = b""
                while b'"HOLDS"' not in told:
                    part = line.recv(4096)
                    assert part, (name, told)
                    told += part


@pytest.mark.parametrize("header", [b"Cookie: crumb=" + b"a" * 14_000], ids=["14 kB"])
def test_a_handshake_may_be_as_long_as_any_request(web_server, header):
    with web_server.connect() as line:
        line.sendall(handshake(header))

        assert line.recv(4096).startswith(b"HTTP/1.1 101 ")


@pytest.mark.parametrize(
    ("headers", "path"),
    [
        ((b"Cookie: crumb=" + b"a" * 50_000,), "/ws/drops"),
        (tuple(b"X-Odd-%d: 1" % number for number in range(600)), "/ws/drops"),
        ((), f"/ws/drops?{'a' * 50_000}"),
    ],
    ids=["a header", "many headers", "an address"],
)
def test_a_handshake_that_is_too_long_is_refused(web_server, headers, path):
    with web_server.connect() as line:
        line.settimeout(5)
        line.sendall(handshake(*headers, path=path))
        answer = line.recv(4096)

        assert re.match(rb"HTTP/1.1 4(00|14|31) |$", answer)
        # And does not wait for another.
        with contextlib.suppress(ConnectionResetError):
            while line.recv(4096):
                pass
    assert pong(web_server) == "PONG"


# --- Too much ---------------------------------------------------------------------------


@pytest.fixture(params=["daphne", "uvicorn"])
def served(request) -> Iterator[WebServer]:
    with running_web_servers(Served(request.param)) as (server,):
        yield server
    assert "Traceback" not in server.log, server.log


def memory(server: WebServer) -> int:
    status = Path(f"/proc/{server.pid}/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) * 1024


LARGE: dict[str, bytes] = {
    "one frame": frame(TEXT, b"x" * (settings.SOCKET_MESSAGE_BYTES + 1)),
    "bytes": frame(BINARY, b"x" * (settings.SOCKET_MESSAGE_BYTES + 1)),
    "several frames": frame(TEXT, b"x" * 10_000, is_last=False)
    + frame(CONTINUATION, b"x" * 10_000),
    "the beginning of a frame": frame(TEXT, b"x", length=10 * MEGABYTE),
    "a frame without end": frame(TEXT, b"x", length=2**62),
}


def test_a_message_is_refused_as_soon_as_it_is_too_large(served):
    for data in LARGE.values():
        with raw_socket(served) as culprit:
            culprit.line.sendall(data)

            assert culprit.close_code() == CloseCode.MESSAGE_TOO_BIG
            assert culprit.is_ended()


def server_stops_reading(line: socket.socket, data: bytes) -> bool:
    """Send a hundred megabytes, and say whether the server has taken none for a second."""
    line.settimeout(1)
    try:
        for _ in range(100 * MEGABYTE // len(data)):
            line.sendall(data)
    except TimeoutError:
        return True
    finally:
        line.settimeout(10)
    return False


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_messages_wait_at_their_client_while_one_is_handled(served):
    drop = DropFactory()
    assert pong(served) == "PONG"
    before = memory(served)
    message = {"action": "subscribe", "dropId": str(drop.pk)}
    ping = json.dumps({"action": "ping"}).ljust(settings.SOCKET_MESSAGE_BYTES)

    with raw_socket(served) as culprit:
        with another_session() as other:
            # Nobody can read it until this session ends.
            other.execute(f"LOCK TABLE {connection.ops.quote_name('drops_drop')}")
            culprit.line.sendall(frame(TEXT, json.dumps(message).encode()))
            assert server_stops_reading(culprit.line, frame(TEXT, ping.encode()))
            with served.connect() as line:
                line.sendall(b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n")
                assert line.recv(4096).startswith(b"HTTP/1.1 200 ")
        # Too many at once, or the database was too slow.
        assert culprit.close_code() in (4429, CloseCode.TRY_AGAIN_LATER)
    assert memory(served) < before + 20 * MEGABYTE
    assert pong(served) == "PONG"


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_pings_of_who_does_not_read_their_answers_wait_at_the_client(served):
    assert pong(served) == "PONG"
    before = memory(served)

    with raw_socket(served) as culprit:
        assert server_stops_reading(culprit.line, frame(PING, b"x" * 125) * 1000)
        assert pong(served) == "PONG"
    assert memory(served) < before + 20 * MEGABYTE


def test_pings_are_answered_also_after_a_pause(served):
    payloads = [struct.pack("!I", number).ljust(125) for number in range(60_000)]

    with raw_socket(served) as honest:
        sender = threading.Thread(
            target=honest.line.sendall, args=(b"".join(frame(PING, one) for one in payloads),)
        )
        sender.start()
        # Until the server has stopped.
        sender.join(0.5)
        answers = []
        while len(answers) < len(payloads):
            opcode, payload = honest.next()
            answers += [payload] if opcode == PONG else []
        sender.join()
    assert answers == payloads


EMPTY_PARTS = frame(TEXT, b"", is_last=False) + frame(CONTINUATION, b"", is_last=False) * 1000


def test_a_message_may_be_in_any_number_of_empty_parts(web_server):
    with raw_socket(web_server) as odd:
        odd.line.sendall(EMPTY_PARTS + frame(CONTINUATION, b'{"action": "ping"}'))

        assert json.loads(odd.next()[1])["type"] == "PONG"


def test_empty_parts_take_no_memory_under_daphne():
    socket = LimitedSocketFactory(None).buildProtocol(None)
    socket.makeConnection(StringTransport())
    socket.state, socket.application_queue = socket.STATE_OPEN, asyncio.Queue()
    # As after a handshake.
    socket.current_frame, socket.inside_message = None, False

    socket.dataReceived(EMPTY_PARTS)

    assert (socket.message_data_total_length, socket.message_data) == (0, [])


def test_empty_parts_take_no_memory_under_uvicorn():
    uvicorn_sockets.install()

    async def take() -> list[bytes]:
        socket = WebSocketsSansIOProtocol(Config(None), ServerState(), {})
        socket.handle_text(Frame(Opcode.TEXT, b"", fin=False))
        for _ in range(1000):
            socket.handle_cont(Frame(Opcode.CONT, b"", fin=False))
        return socket.frames

    assert asyncio.run(take()) == [b""]


def test_what_the_server_sends_may_be_larger_under_daphne_too():
    factory = LimitedSocketFactory(None)
    # daphne's own limits; autobahn's are for both directions.
    factory.setProtocolOptions(maxMessagePayloadSize=MEGABYTE, maxFramePayloadSize=MEGABYTE)
    socket, transport = factory.buildProtocol(None), StringTransport()
    socket.makeConnection(transport)
    socket.state, socket.client_addr = socket.STATE_OPEN, None

    socket.serverSend("x" * 2 * MEGABYTE)

    assert transport.value().endswith(b"x" * 2 * MEGABYTE)
