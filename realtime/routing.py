from django.urls import re_path

from realtime.consumers import DropConsumer, NotFoundConsumer

websocket_urlpatterns = [
    re_path(r"^ws/drops/?$", DropConsumer.as_asgi()),
    re_path(r"^ws/drops/(?P<drop_id>[^/]+)/?$", DropConsumer.as_asgi()),
    re_path(r"", NotFoundConsumer.as_asgi()),
]
