"""The ASGI application: the same for daphne and uvicorn."""

import os
import sys

from channels.routing import ProtocolTypeRouter, URLRouter
from django.core.asgi import get_asgi_application

os.environ.setdefault("DJANGO_SETTINGS_MODULE", "config.settings")
django_application = get_asgi_application()

# These import models, so they come after the set-up above.
from django.conf import settings  # noqa: E402

from config import daphne_requests, daphne_sockets, daphne_stopping  # noqa: E402
from config.asgi_types import Application  # noqa: E402
from config.body_limit import BodyLimit  # noqa: E402
from config.garbage import collect_seldom  # noqa: E402
from config.hot_routes import HotRoutes  # noqa: E402
from control.routing import control_urlpatterns  # noqa: E402
from drops.asgi import DropReads  # noqa: E402
from drops.group_commit import GroupCommit  # noqa: E402
from operations.exposition import SAMPLERS  # noqa: E402
from operations.requests import RequestLog, StatusNoted  # noqa: E402
from purchases.asgi import PurchaseEndpoint  # noqa: E402
from realtime.asgi import EventStreams  # noqa: E402
from realtime.backpressure import ImpatientSockets  # noqa: E402
from realtime.hub import get_hub  # noqa: E402
from realtime.routing import websocket_urlpatterns  # noqa: E402
from reservations.asgi import ReserveEndpoint  # noqa: E402


def http_application() -> Application:
    rest = EventStreams(StatusNoted(BodyLimit(django_application)))
    if not settings.HOT_ROUTES:
        return rest
    # Both kinds of claim share the queues: per drop one transaction at a time.
    group = GroupCommit()
    routes = [
        ReserveEndpoint(group).route(),
        PurchaseEndpoint(group).route(),
        *DropReads().routes(),
    ]
    # What these routes remember must hear of other processes' changes, sockets or not.
    return HotRoutes(routes, rest, on_first_request=lambda: get_hub().start_soon())


def observed(http: Application, others: Application) -> RequestLog:
    """Have a line, a measurement and, where that is wanted, a span of each HTTP request."""
    observers = []
    if settings.OTEL_EXPORTER_OTLP_ENDPOINT:
        from operations.telemetry import span_of_requests

        observers.append(span_of_requests())
    return RequestLog(http, others, samplers=SAMPLERS, observers=observers)


# Both servers import this module before they serve; daphne reads these classes after that.
if "daphne.server" in sys.modules:
    daphne_requests.install()
    daphne_sockets.install()
    daphne_stopping.install()
if "uvicorn" in sys.modules:
    from config import uvicorn_sockets

    uvicorn_sockets.install()

websockets = ImpatientSockets(URLRouter([*control_urlpatterns, *websocket_urlpatterns]))
application = observed(http_application(), ProtocolTypeRouter({"websocket": websockets}))

collect_seldom()

# How long a thread that comes back from the database may have to wait for the interpreter.
# A batch comes back a dozen times; at Python's 5 ms each, a busy event loop made it take
# seven times as long as an idle one.
sys.setswitchinterval(0.0005)
