from django.urls import path

from storefront.views import home

urlpatterns = [path("", home, name="home")]
