"""Have daphne stop as uvicorn does: nothing new, answers to all that is in flight, then the end.

By itself it cancels whatever runs as soon as it is told to stop, so a claim may be committed and
its customer never hear of it. Twisted goes on for as long as a trigger "before shutdown" asks it
to; daphne has one, ``Server.kill_all_applications``, and ours stands in its place.
"""

import asyncio
import logging
import time
from collections.abc import Iterator
from typing import Any

import daphne.server
from daphne.http_protocol import WebRequest
from daphne.ws_protocol import WebSocketProtocol
from django.conf import settings
from twisted.internet import reactor as _reactor
from twisted.internet import tcp
from twisted.internet.defer import Deferred

# Twisted types its own as a module.
reactor: Any = _reactor

logger = logging.getLogger(__name__)

SERVICE_RESTART = 1012
LOOK_AGAIN_SECONDS = 0.05


def finish_applications(server: daphne.server.Server) -> Deferred:
    """Return what fires when ``server`` has answered everybody, or has run out of time."""
    finished = Deferred.fromFuture(asyncio.ensure_future(drain(server)))
    return finished.addErrback(lambda failure: logger.error("could not stop in order: %s", failure))


async def drain(server: daphne.server.Server) -> None:
    give_up_at = time.monotonic() + settings.SHUTDOWN_SECONDS
    for listener in [one for one in reactor.getReaders() if isinstance(one, tcp.Port)]:
        listener.stopListening()
    while True:
        # Again and again: what was arriving meanwhile is on its way out a moment later.
        send_away(server)
        if not is_busy(server) or time.monotonic() > give_up_at:
            break
        await asyncio.sleep(LOOK_AGAIN_SECONDS)
    left = list(applications(server))
    for application in left:
        application.cancel()
    await asyncio.gather(*left, return_exceptions=True)


def send_away(server: daphne.server.Server) -> None:
    """Close the sockets and the connections without a request; the others after their answer."""
    for connection in connections():
        protocol = connection.protocol
        if isinstance(protocol, WebSocketProtocol):
            if protocol.state == protocol.STATE_OPEN:
                protocol.serverClose(SERVICE_RESTART)
        elif not protocol._channel.requests:
            connection.loseConnection()
    for request in server.connections:
        # Twisted takes the channel away from a request that is done.
        channel = isinstance(request, WebRequest) and getattr(request, "channel", None)
        if channel:
            channel.persistent = False
            if not request._response_started:
                request.responseHeaders.setRawHeaders(b"connection", [b"close"])


def is_busy(server: daphne.server.Server) -> bool:
    """Say whether somebody waits for an answer, or for the last bytes of one."""
    return any(applications(server)) or any(connections())


def connections() -> set[Any]:
    """Return the clients' connections, but for those of which nothing is read at the moment."""
    return {
        one for one in (*reactor.getReaders(), *reactor.getWriters()) if isinstance(one, tcp.Server)
    }


def applications(server: daphne.server.Server) -> Iterator[asyncio.Future]:
    for details in server.connections.values():
        application = details.get("application_instance")
        if application is not None and not application.done():
            yield application


def install() -> None:
    """Let every server that daphne makes from now on stop like this, however it is started."""
    daphne.server.Server.kill_all_applications = finish_applications
