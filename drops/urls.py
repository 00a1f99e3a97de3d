from config.routers import OptionalSlashRouter
from drops.views import DropViewSet

router = OptionalSlashRouter()
router.register("drops", DropViewSet)
urlpatterns = router.urls
