"""Which pages of browsers may ask; what names no page is none of a browser's."""

from collections.abc import Callable
from urllib.parse import urlsplit

from django.conf import settings

from config.hot_routes import host_is_allowed
from config.quick_settings import quick_settings


def origin_is_allowed(origin: str | None, host: str) -> bool:
    """Say whether a page of ``origin`` may connect to ``host``.

    Repeated headers arrive joined by a comma, and are no origin.
    """
    return origin is None or settings.CORS_ALLOW_ALL_ORIGINS or is_known(origin, host)


def is_known(origin: str, host: str) -> bool:
    if origin == "null":
        return False
    try:
        site = urlsplit(origin).netloc.lower()
    except ValueError:
        return False
    is_own = site == host.lower() and host_is_allowed(host)
    return is_own or origin in settings.CORS_ALLOWED_ORIGINS


def may_be_forged(header: Callable[[str], str | None]) -> bool:
    """Say whether a request may be a foreign page's, sent with its visitor's cookie of sign-in.

    For such a cookie a proxy adds the headers that are trusted. Other modes ask for a proof,
    which a foreign page doesn't have; in development there is no sign-in.
    """
    if quick_settings.IDENTITY_MODE != "header" or quick_settings.DEBUG:
        return False
    origin = header("origin")
    if origin is None:
        return header("sec-fetch-site") == "cross-site"
    # CORS_ORIGINS=* lets all pages read what is public, and no more than that.
    return not is_known(origin, header("host") or "")
