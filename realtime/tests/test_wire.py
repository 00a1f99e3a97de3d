"""Frames past the server's layers: on real servers, so that an upgrade of one shows here."""

import asyncio
from types import SimpleNamespace

import pytest
from websockets.frames import Frame, Opcode
from websockets.protocol import State
from websockets.streams import StreamReader
from websockets.sync.client import connect

from realtime.frames import text_message
from realtime.wire import _uvicorn_writer, frame_writer, no_writer, to_wire
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
        # More than the buffers of the kernel take while nobody reads.
        wanted = SIZES * 6
        socket.send(" ".join(map(str, wanted)))
        assert [len(socket.recv(20).encode()) for _ in wanted] == wanted
        socket.close()
    assert "Traceback" not in application.log


def test_a_server_that_is_not_known_is_left_to_its_own_sending():
    async def send(message):
        raise AssertionError

    assert frame_writer(send) is no_writer


@pytest.mark.parametrize("trouble", ["closing", "disconnected", "not writable"])
def test_nothing_is_written_to_a_connection_that_ends_or_has_to_wait(trouble):
    written: list[bytes] = []
    writable = asyncio.Event()
    protocol = SimpleNamespace(
        conn=SimpleNamespace(state=State.CLOSING if trouble == "closing" else State.OPEN),
        disconnected=trouble == "disconnected",
        writable=writable,
        transport=SimpleNamespace(write=written.append),
    )
    if trouble != "not writable":
        writable.set()

    assert not _uvicorn_writer(protocol)(text_message("x"))
    assert written == []
