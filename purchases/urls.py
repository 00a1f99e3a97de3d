from django.urls import re_path

from config.routers import OptionalSlashRouter
from purchases.views import PurchaseViewSet

router = OptionalSlashRouter()
router.register("purchases", PurchaseViewSet)
urlpatterns = [
    re_path(
        r"^drops/(?P<drop_id>[^/]+)/purchase/?$", PurchaseViewSet.as_view({"post": "purchase"})
    ),
    *router.urls,
]
