"""What ASGI leaves to the servers: when ``send`` waits, and how to give up on a client.

A ``send`` that never waits fills the server's memory with what a client doesn't read.
"""

import asyncio
import types
from collections.abc import Awaitable, Callable, Coroutine, Generator
from functools import partial
from typing import Any, cast

from config.asgi_types import Application, Message, Receive, Scope, Send
from config.servers import daphne_protocol

# How long a client may take to answer a close frame.
CLOSE_ANSWER_SECONDS = 1.0


class Gate:
    """Closed while Twisted's connection has enough to send; an ``IPushProducer``."""

    def __init__(self, protocol: Any) -> None:
        self.is_open = asyncio.Event()
        self.is_open.set()
        self._protocol = protocol

    def pauseProducing(self) -> None:
        self.is_open.clear()

    def resumeProducing(self) -> None:
        self.is_open.set()
        read_on(self._protocol)

    def stopProducing(self) -> None:
        self.is_open.set()


def waiting_send(send: Send) -> Send:
    """Return a ``send`` that waits while the client doesn't read, under daphne too.

    uvicorn's waits by itself above 64 KiB; daphne's takes whatever it gets
    (https://github.com/django/daphne/issues/170), while Twisted knows when to stop.
    """
    protocol = daphne_protocol(send)
    if protocol is None:
        return send
    gate = Gate(protocol)
    if getattr(protocol, "application_type", "http") == "websocket":
        # It took over the connection from the HTTP channel, which is still registered.
        protocol.unregisterProducer()
    protocol.registerProducer(gate, True)
    return partial(_send_through, gate.is_open, send)


def waiting_receive(receive: Receive, send: Send) -> Receive:
    """Return a ``receive`` after which daphne reads on, if too much was waiting before."""
    protocol = daphne_protocol(send)
    if protocol is None:
        return receive

    async def receive_and_read_on() -> Message:
        message = await receive()
        read_on(protocol)
        return message

    return receive_and_read_on


def read_on(protocol: Any) -> None:
    """Let a socket of ``config.daphne_sockets`` read again; no other kind stops."""
    if hasattr(protocol, "read_on"):
        protocol.read_on()


async def _send_through(is_open: asyncio.Event, send: Send, message: Message) -> None:
    if not is_open.is_set():
        await is_open.wait()
    await send(message)


def finish(send: Send) -> None:
    """Let daphne end an HTTP answer that ``waiting_send`` has sent."""
    protocol = daphne_protocol(send)
    if protocol is not None and protocol.channel is not None:
        protocol.unregisterProducer()


def abort(send: Send) -> None:
    """Cut the connection, whatever waits to be sent: nobody reads it."""
    protocol = daphne_protocol(send) or getattr(send, "__self__", None)
    transport = getattr(protocol, "transport", None)
    cut: Callable[[], None] | None = getattr(transport, "abortConnection", None) or getattr(
        transport, "abort", None
    )
    if cut is not None:
        cut()


class ImpatientSockets:
    """Have daphne read no more than is handled, and uvicorn wait less for an answer to a close.

    By itself uvicorn waits for ten seconds: then who opens sockets that are all refused, and
    answers nothing, has thousands of them at once. Daphne waits for one.
    """

    def __init__(self, application: Application) -> None:
        self.application = application

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        protocol: Any = getattr(send, "__self__", None)
        if hasattr(protocol, "close_timeout"):
            protocol.close_timeout = CLOSE_ANSWER_SECONDS
        await self.application(scope, waiting_receive(receive, send), send)


def start(step: Awaitable[None]) -> Any:
    """Run ``step`` at once, as far as it goes; return what it waits for, None at its end.

    Most calls of ``send`` end without waiting, and a task for each would cost more than
    they do. ``resume`` goes on where ``start`` stopped.
    """
    try:
        # ASGI says awaitable; those of all servers are coroutines.
        waits_for = cast(Coroutine[Any, Any, None], step).send(None)
    except StopIteration:
        return None
    # A bare yield, as of ``asyncio.sleep(0)``, is None itself.
    return waits_for if waits_for is not None else asyncio.sleep(0)


@types.coroutine
def resume(step: Any, waits_for: Any) -> Generator[Any, Any, None]:
    try:
        if asyncio.iscoroutine(waits_for):
            yield from waits_for
        else:
            yield waits_for
        yield from step
    finally:
        step.close()
