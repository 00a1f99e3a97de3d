"""Read what stands in an address: path ids, query parameters, pages."""

import re
import uuid
from typing import Any

from rest_framework import serializers
from rest_framework.exceptions import NotFound, ValidationError
from rest_framework.pagination import LimitOffsetPagination
from rest_framework.request import Request

DIGITS = re.compile(r"-?[0-9]+")


class DigitsField(serializers.IntegerField):
    """A number in the digits 0 to 9: Python reads those of every script, and more."""

    def to_internal_value(self, data: Any) -> int:
        if not DIGITS.fullmatch(data):
            self.fail("invalid")
        return super().to_internal_value(data)


class Page(LimitOffsetPagination):
    """``?limit=&offset=``; a value out of bounds is an error instead of being bent."""

    default_limit = 20
    max_limit = 100
    max_offset = 1_000_000

    def get_limit(self, request: Request) -> int:
        return self._read(request, "limit", self.default_limit, 1, self.max_limit)

    def get_offset(self, request: Request) -> int:
        return self._read(request, "offset", 0, 0, self.max_offset)

    def _read(self, request: Request, name: str, default: int, lowest: int, highest: int) -> int:
        field = DigitsField(min_value=lowest, max_value=highest)
        return read_query(request, name, field, default)


def read_query(request: Request, name: str, field: serializers.Field, default: Any = None) -> Any:
    """Return the query parameter ``name`` as ``field`` reads it.

    Raises:
        ValidationError: the value is not one that ``field`` takes.
    """
    if name not in request.query_params:
        return default
    try:
        return field.run_validation(request.query_params[name])
    except ValidationError as exc:
        raise ValidationError({name: exc.detail}) from exc


def path_id(value: str) -> uuid.UUID:
    """Return a path's id; what is no UUID in the usual form can't name anything.

    Raises:
        NotFound: ``value`` is no such UUID.
    """
    try:
        parsed = uuid.UUID(value)
    except ValueError:
        raise NotFound from None
    # uuid.UUID also takes braces and any number of hyphens: endless addresses for one thing.
    if str(parsed) != value.lower():
        raise NotFound
    return parsed
