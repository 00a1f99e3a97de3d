from django.conf import settings
from django.urls import re_path

from config.routers import OptionalSlashRouter
from reservations.views import ExpireNowView, ReservationViewSet

router = OptionalSlashRouter()
router.register("reservations", ReservationViewSet)
urlpatterns = [
    re_path(
        r"^drops/(?P<drop_id>[^/]+)/reserve/?$", ReservationViewSet.as_view({"post": "reserve"})
    ),
    *router.urls,
]
if settings.DEBUG:
    urlpatterns.append(re_path(r"^internal/expire-now/?$", ExpireNowView.as_view()))
