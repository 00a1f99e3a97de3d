from django.conf import settings
from rest_framework.permissions import SAFE_METHODS, BasePermission
from rest_framework.request import Request
from rest_framework.views import APIView

from drops.models import Drop


class MayCreate(BasePermission):
    """Allow staff to make drops, and everybody else where ``DROP_CREATORS`` says so."""

    def has_permission(self, request: Request, view: APIView) -> bool:
        if getattr(view, "action", None) != "create" or settings.DROP_CREATORS == "authenticated":
            return True
        return request.user.is_staff


class IsCreatorOrStaff(BasePermission):
    """Allow whoever made the drop, and staff, to change it."""

    def has_object_permission(self, request: Request, view: APIView, drop: Drop) -> bool:
        if request.method in SAFE_METHODS:
            return True
        return request.user.is_staff or drop.created_by_id == request.user.pk
