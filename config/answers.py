"""The headers that Django's middleware adds, for answers that are made in front of it."""

from django.conf import settings

from config.middleware import content_security_policy


def security_headers(scheme: str) -> list[tuple[bytes, bytes]]:
    """Return what browsers are told with every answer under ``/api``."""
    headers = [
        (b"vary", b"origin"),
        (b"x-content-type-options", b"nosniff"),
        (b"referrer-policy", settings.SECURE_REFERRER_POLICY.encode()),
        (b"cross-origin-opener-policy", b"same-origin"),
        (b"x-frame-options", settings.X_FRAME_OPTIONS.encode()),
        (b"content-security-policy", content_security_policy("/api/").encode()),
    ]
    if settings.SECURE_HSTS_SECONDS and scheme == "https":
        value = f"max-age={settings.SECURE_HSTS_SECONDS}; includeSubDomains; preload"
        headers.append((b"strict-transport-security", value.encode()))
    return headers


def cors_headers(origin: str | None) -> list[tuple[bytes, bytes]]:
    """Return what django-cors-headers adds for a request from ``origin``."""
    if not origin:
        return []
    if settings.CORS_ALLOW_ALL_ORIGINS:
        allowed = b"*"
    elif origin in settings.CORS_ALLOWED_ORIGINS:
        allowed = origin.encode("latin-1")
    else:
        return []
    exposed = ", ".join(settings.CORS_EXPOSE_HEADERS).encode()
    return [
        (b"access-control-allow-origin", allowed),
        (b"access-control-expose-headers", exposed),
    ]
