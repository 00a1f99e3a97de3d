"""Frames past the server's layers: on real servers, so that an upgrade of one shows here."""

import time

import pytest
from websockets.frames import Frame, Opcode
from websockets.streams import StreamReader
from websockets.sync.client import connect

from realtime.wire import connection_of, to_wire, write_now
from tests.servers import WebServer, running_web_servers

SIZES = [0, 1, 125, 126, 65_535, 65_536, 1_000_000]


@pytest.mark.parametrize("size", SIZES)
def test_a_frame_is_what_a_client_reads(size):
    reader = StreamReader()
    reader.feed_data(to_wire("x" * size))
    parsing = Frame.parse(reader.read_exact, mask=False)
    with pytest.raises(StopIteration) as parsed:
        next(parsing)

    frame = parsed.value.value
    assert (frame.opcode, frame.fin, frame.data) == (Opcode.TEXT, True, b"x" * size)


@pytest.mark.servers
@pytest.mark.parametrize("server", ["daphne", "uvicorn"])
def test_texts_arrive_whole_and_in_order_on_both_servers(server, django_db_setup):
    application = WebServer(server, "realtime.tests.wire_asgi:application")
    with (
        running_web_servers(application),
        connect(application.ws_url, proxy=None, compression=None, max_size=None) as socket,
    ):
        # More than the kernel takes while nobody reads; by itself daphne sends no empty texts.
        wanted = SIZES[1:] * 30
        socket.send(" ".join(map(str, wanted)))
        time.sleep(0.5)
        assert [len(socket.recv(20).encode()) for _ in wanted] == wanted
        written, left = map(int, str(socket.recv(20)).split())
        assert written > 0
        assert left > 0
        socket.close()
    assert "Traceback" not in application.log


def test_a_server_that_is_not_known_is_left_to_its_own_sending():
    async def send(message):
        raise AssertionError

    assert connection_of(send) is None


class Transport:
    """As much of asyncio's as is looked at."""

    def __init__(self, trouble: str) -> None:
        self.trouble = trouble
        self.written: list[bytes] = []

    def is_closing(self) -> bool:
        return self.trouble == "closing"

    def get_write_buffer_size(self) -> int:
        return 100 if self.trouble == "behind" else 0

    def write(self, data: bytes) -> None:
        if self.trouble == "ended":
            raise RuntimeError("unable to perform operation; the handler is closed")
        self.written.append(data)


@pytest.mark.parametrize("trouble", ["", "closing", "behind", "ended"])
def test_nothing_is_written_to_a_connection_that_ends_or_has_something_waiting(trouble):
    transport = Transport(trouble)

    assert write_now(transport, b"x") is (not trouble)
    assert transport.written == ([] if trouble else [b"x"])
