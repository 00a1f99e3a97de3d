import asyncio

import pytest

from operations import http_client
from operations.http_client import Connection, Lost, Server

ANSWER = b"HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\n"


def ask(*answers, times=1):
    """Ask a server ``times`` on one connection; return the answers' bodies.

    It gives one of ``answers`` per request, in pieces, and hangs up after None.
    """
    given = iter(answers)

    async def serve(reader, writer):
        while True:
            try:
                await reader.readuntil(b"\r\n\r\n")
            except asyncio.IncompleteReadError:
                break
            pieces = next(given)
            if pieces is None:
                break
            for piece in pieces:
                writer.write(piece)
                await writer.drain()
                await asyncio.sleep(0.01)  # so that each piece arrives alone
        writer.close()

    async def scene():
        server = await asyncio.start_server(serve, "127.0.0.1", 0)
        connection = Connection(Server("127.0.0.1", server.sockets[0].getsockname()[1], False))
        bodies = [(await connection.ask("POST", "/", {})).body for _ in range(times)]
        connection.close()
        server.close()
        return bodies

    return asyncio.run(scene())


def test_an_answer_may_come_in_pieces():
    pieces = (ANSWER[:20], ANSWER[20:] + b"0123", b"456789")

    assert ask(pieces, pieces, times=2) == [b"0123456789"] * 2


def test_a_connection_that_was_closed_while_idle_is_no_lost_answer():
    assert ask((ANSWER + b"0123456789",), None, (ANSWER + b"9876543210",), times=2) == [
        b"0123456789",
        b"9876543210",
    ]


@pytest.mark.parametrize("answers", [[None], [(ANSWER + b"0123", b""), None]])
def test_an_answer_that_does_not_come_is_lost(answers, monkeypatch):
    monkeypatch.setattr(http_client, "ANSWER_SECONDS", 0.3)

    with pytest.raises(Lost):
        ask(*answers)


def test_an_answer_without_a_length_is_lost():
    with pytest.raises(Lost, match="without Content-Length"):
        ask((b"HTTP/1.1 200 OK\r\n\r\n",))
