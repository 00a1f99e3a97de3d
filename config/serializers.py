"""Strict input: what is not exactly right is an error, never bent until it fits."""

import re
from datetime import UTC, datetime
from typing import Any

from rest_framework import serializers
from rest_framework.exceptions import ValidationError

MARKUP = re.compile(r"<[a-zA-Z/!?]")
# C0 and C1 controls but for tab and line breaks; marks that turn the reading direction.
INVISIBLE = re.compile(
    r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069]"
)
EARLIEST, LATEST = datetime(2000, 1, 1, tzinfo=UTC), datetime(2100, 1, 1, tzinfo=UTC)
NUMBER = re.compile(r"-?[0-9]+(\.[0-9]+)?([eE][+-]?[0-9]+)?")
LARGEST_INTEGER = 2**31 - 1


class StrictSerializer(serializers.Serializer):
    """A body in which a field nobody knows is an error, so that a typo can't pass unseen."""

    def to_internal_value(self, data: Any) -> dict[str, Any]:
        if isinstance(data, dict) and (unknown := data.keys() - self.fields.keys()):
            raise ValidationError(
                {
                    str(name): [serializers.ErrorDetail("There is no such field.", "unknown_field")]
                    for name in sorted(unknown, key=str)
                }
            )
        return super().to_internal_value(data)


class StrictCharField(serializers.CharField):
    """Plain text from a JSON string: no number, no markup, no invisible characters."""

    default_error_messages = {
        "markup": "Must be plain text, without markup.",
        "invisible": "Must not contain control characters or marks that turn the text around.",
    }

    def to_internal_value(self, data: Any) -> str:
        if not isinstance(data, str):
            self.fail("invalid")
        value = super().to_internal_value(data)
        if MARKUP.search(value):
            self.fail("markup")
        if INVISIBLE.search(value):
            self.fail("invisible")
        return value


class StrictIntegerField(serializers.IntegerField):
    """A whole number from a JSON number: neither ``"5"`` nor ``5.0`` nor ``true``."""

    def to_internal_value(self, data: Any) -> int:
        if type(data) is not int:
            self.fail("invalid")
        return super().to_internal_value(data)


class StrictDecimalField(serializers.DecimalField):
    """An amount from a JSON number, or a string written like one."""

    def to_internal_value(self, data: Any) -> Any:
        # Decimal also takes underscores and the digits of every script.
        if isinstance(data, bool) or (isinstance(data, str) and not NUMBER.fullmatch(data)):
            self.fail("invalid")
        return super().to_internal_value(data) + 0  # turns -0 into 0


class InstantField(serializers.DateTimeField):
    """A moment with its offset from UTC, in this century."""

    default_error_messages = {
        "naive": "Must carry an offset from UTC, like 2026-11-22T18:00:00Z.",
        "absurd": "Must lie between the years 2000 and 2100.",
    }

    def to_internal_value(self, value: Any) -> datetime:
        # Python's parsers overlook a NUL at the end and read the digits of every script.
        is_text = isinstance(value, str) and value.isascii() and value.isprintable()
        # The admin's forms have read the time already.
        if not is_text and not isinstance(value, datetime):
            self.fail("invalid", format="2026-11-22T18:00:00Z")
        return super().to_internal_value(value)

    def enforce_timezone(self, value: datetime) -> datetime:
        if value.tzinfo is None:
            self.fail("naive")
        try:
            instant = value.astimezone(UTC)
        except OverflowError:
            self.fail("absurd")
        if not EARLIEST <= instant < LATEST:
            self.fail("absurd")
        return instant
