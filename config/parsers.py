from typing import Any

from django.conf import settings
from rest_framework.exceptions import ParseError
from rest_framework.parsers import JSONParser

TOO_DEEP = "JSON parse error - nested too deeply"


class ObjectParser(JSONParser):
    """JSON in UTF-8, whatever charset is declared: some of Python's are no text encodings."""

    def parse(self, stream: Any, media_type: str | None = None, parser_context: Any = None) -> Any:
        context = {**(parser_context or {}), "encoding": "utf-8"}
        try:
            body = super().parse(stream, media_type, context)
        except RecursionError:
            raise ParseError(TOO_DEEP) from None
        if not is_shallow(body, settings.MAX_JSON_DEPTH):
            raise ParseError(TOO_DEEP)
        return body


def is_shallow(value: Any, depth: int) -> bool:
    """Say whether nothing in ``value`` is nested deeper than ``depth``."""
    if isinstance(value, dict):
        value = value.values()
    elif not isinstance(value, list):
        return True
    return depth > 0 and all(is_shallow(inner, depth - 1) for inner in value)
