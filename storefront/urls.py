from django.urls import path
from django.views.generic import RedirectView

from storefront.views import drop_page, holds, home

urlpatterns = [
    path("", home, name="home"),
    path("drops/<str:drop_id>", drop_page, name="drop"),
    path("drops/<str:drop_id>/", RedirectView.as_view(pattern_name="drop", permanent=True)),
    path("drops/<str:drop_id>/holds", holds, name="drop-holds"),
]
