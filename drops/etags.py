from hashlib import blake2b
from typing import Any

import orjson
from django.utils.http import parse_etags


def weak_etag(data: Any) -> str:
    """Return the ETag of an answer: weak, because encodings of the same data may differ."""
    # Sorted: what an event says has its members in another order than what a row says.
    encoded = orjson.dumps(data, option=orjson.OPT_SORT_KEYS)
    return f'W/"{blake2b(encoded, digest_size=12).hexdigest()}"'


def is_match(etag: str, if_none_match: str | None) -> bool:
    """Say whether the client has this very state already (RFC 9110, section 13.1.2)."""
    if not if_none_match:
        return False
    known = parse_etags(if_none_match)
    return known == ["*"] or etag.removeprefix("W/") in {e.removeprefix("W/") for e in known}
