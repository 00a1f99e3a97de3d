from channels.security.websocket import AllowedHostsOriginValidator
from channels.sessions import SessionMiddlewareStack
from django.urls import re_path

from control.consumers import ControlConsumer

# Known by a cookie, so a page of another site must not be able to open it.
staff_only = AllowedHostsOriginValidator(SessionMiddlewareStack(ControlConsumer.as_asgi()))

control_urlpatterns = [re_path(r"^ws/control/?$", staff_only)]
