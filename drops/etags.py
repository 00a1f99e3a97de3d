from collections.abc import Sequence
from hashlib import blake2b
from typing import Any

import orjson
from django.utils.http import parse_etags


def weak_etag(data: dict[str, Any]) -> str:
    """Return the ETag of a drop, or of a page of drops.

    It is weak, because encodings of the same data may differ.
    """
    if "results" not in data:
        return etag_of([digest(data)])
    return etag_of([digest(data | {"results": []}), *map(digest, data["results"])])


def digest(data: dict[str, Any]) -> bytes:
    # Sorted: what an event says has its members in another order than what a row says.
    encoded = orjson.dumps(data, option=orjson.OPT_SORT_KEYS)
    return blake2b(encoded, digest_size=12).digest()


def etag_of(digests: Sequence[bytes]) -> str:
    """Return the ETag of a whole whose parts have these digests."""
    if len(digests) > 1:
        return etag_of([blake2b(b"".join(digests), digest_size=12).digest()])
    return f'W/"{digests[0].hex()}"'


def is_match(etag: str, if_none_match: str | None) -> bool:
    """Say whether the client has this very state already (RFC 9110, section 13.1.2)."""
    if not if_none_match:
        return False
    known = parse_etags(if_none_match)
    return known == ["*"] or etag.removeprefix("W/") in {e.removeprefix("W/") for e in known}
