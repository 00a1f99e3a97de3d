"""Which address a request came from, also behind proxies."""

from functools import lru_cache
from ipaddress import IPv4Address, IPv6Address, IPv6Network, ip_address
from typing import Any

from django.conf import settings

# What one household or server gets of IPv6; single addresses there cost nothing.
IPV6_PREFIX = 64


def client_address(peer: str | None, forwarded_for: str | None) -> str:
    """Return the client's IPv4 address or IPv6 network.

    ``X-Forwarded-For`` counts only as far as ``settings.TRUSTED_PROXIES`` wrote it: from its
    end up to the first address that is none of theirs. A peer on a Unix socket has no
    address; only a proxy of ours can be there.
    """
    if not settings.TRUSTED_PROXIES or forwarded_for is None:
        return subnet(peer or "")
    address = peer or ""
    hops = [hop.strip() for hop in forwarded_for.split(",")]
    while hops and is_trusted(address):
        address = hops.pop()
    return subnet(address)


def socket_address(scope: dict[str, Any]) -> str:
    """Return the client's address by an ASGI scope; see ``client_address``."""
    client = scope.get("client")
    given = [value for name, value in scope["headers"] if name == b"x-forwarded-for"]
    forwarded_for = b",".join(given).decode("latin-1") if given else None
    return client_address(client[0] if client else None, forwarded_for)


@lru_cache(10_000)
def subnet(address: str) -> str:
    parsed = parse_address(address)
    if isinstance(parsed, IPv6Address):
        if parsed.ipv4_mapped:
            return str(parsed.ipv4_mapped)
        return str(IPv6Network((int(parsed), IPV6_PREFIX), strict=False))
    # What a trusted proxy passed on unread may be no address at all.
    return str(parsed) if parsed else "unknown"


@lru_cache(1024)
def is_trusted(address: str) -> bool:
    if not address:
        return True
    parsed = parse_address(address)
    if isinstance(parsed, IPv6Address) and parsed.ipv4_mapped:
        parsed = parsed.ipv4_mapped
    return parsed is not None and any(parsed in network for network in settings.TRUSTED_PROXIES)


def parse_address(text: str) -> IPv4Address | IPv6Address | None:
    host = text
    if text.startswith("["):
        host = text[1:].partition("]")[0]
    elif text.count(":") == 1:
        host = text.partition(":")[0]
    try:
        return ip_address(host)
    except ValueError:
        return None
