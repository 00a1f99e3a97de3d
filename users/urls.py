from django.urls import re_path

from users.views import MeView

urlpatterns = [re_path(r"^me/?$", MeView.as_view())]
