from urllib.parse import urlsplit

from channels.security.websocket import AllowedHostsOriginValidator, WebsocketDenier
from channels.sessions import SessionMiddlewareStack
from django.urls import re_path

from config.asgi_types import Receive, Scope, Send
from control.consumers import ControlConsumer

# Known by a cookie, so a page of another site must not be able to open it.
own_site_only = AllowedHostsOriginValidator(SessionMiddlewareStack(ControlConsumer.as_asgi()))


async def staff_only(scope: Scope, receive: Receive, send: Send) -> None:
    """Serve pages of this site; an origin that can't be read, the validator can't refuse."""
    is_readable = all(is_url(value) for name, value in scope["headers"] if name == b"origin")
    await (own_site_only if is_readable else WebsocketDenier())(scope, receive, send)


def is_url(text: bytes) -> bool:
    try:
        urlsplit(text.decode("latin-1"))
    except ValueError:
        return False
    return True


control_urlpatterns = [re_path(r"^ws/control/?$", staff_only)]  # type: ignore[arg-type]
