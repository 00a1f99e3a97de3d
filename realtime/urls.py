from django.urls import re_path

from realtime.views import EventsView, TicketView

urlpatterns = [
    re_path(r"^drops/(?P<drop_id>[^/]+)/events/?$", EventsView.as_view()),
    re_path(r"^ws-ticket/?$", TicketView.as_view()),
]
