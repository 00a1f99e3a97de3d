"""What Django's own checks don't know of; they run with every command, or with ``--deploy``."""

from importlib.metadata import version
from typing import Any

from django.conf import settings
from django.core.checks import CheckMessage, Error, Tags, Warning, register
from django.db import OperationalError, connections
from psycopg_pool import PoolTimeout


@register(Tags.security)
def check_identity_mode(app_configs: Any, **kwargs: Any) -> list[CheckMessage]:
    """Refuse proof of identity that has no secret or key, also where settings were made by hand.

    Mode ``header`` outside DEBUG is refused by the settings themselves, as they are read.
    """
    if settings.IDENTITY_MODE == "gateway" and not settings.GATEWAY_SECRETS:
        return [Error("IDENTITY_MODE is gateway, and there is no secret.", id="drops.E001")]
    if settings.IDENTITY_MODE == "jwt" and not (settings.JWT_KEY or settings.JWT_JWKS_FILE):
        return [Error("IDENTITY_MODE is jwt, and there is no key.", id="drops.E002")]
    return []


@register(Tags.security)
def check_cors(app_configs: Any, **kwargs: Any) -> list[CheckMessage]:
    if settings.CORS_ALLOW_ALL_ORIGINS and getattr(settings, "CORS_ALLOW_CREDENTIALS", False):
        message = "Any page could act with a visitor's cookies: CORS_ORIGINS=* with credentials."
        return [Error(message, id="drops.E003")]
    return []


@register(Tags.compatibility)
def check_redis_client(app_configs: Any, **kwargs: Any) -> list[CheckMessage]:
    if int(version("redis").split(".")[0]) >= 8:
        message = "redis 8 cuts the channel layer's idle reads after 5 s."
        hint = "Install the version in requirements.txt."
        return [Error(message, hint=hint, id="drops.E004")]
    return []


@register(Tags.compatibility)
def check_connections_are_pooled(app_configs: Any, **kwargs: Any) -> list[CheckMessage]:
    if settings.DATABASES["default"].get("CONN_MAX_AGE", 0) != 0:
        message = "CONN_MAX_AGE leaks connections under ASGI, where each request has a thread."
        return [Error(message, hint="Leave it 0; the pool keeps them.", id="drops.E005")]
    return []


@register(Tags.security, deploy=True)
def check_drop_creators(app_configs: Any, **kwargs: Any) -> list[CheckMessage]:
    if settings.DROP_CREATORS == "staff":
        return []
    message = "Any identified user may create drops."
    return [Warning(message, hint="Set DROP_CREATORS=staff.", id="drops.W001")]


@register(Tags.security, deploy=True)
def check_public_ids(app_configs: Any, **kwargs: Any) -> list[CheckMessage]:
    if settings.IDENTITY_MODE != "header" or settings.PUBLIC_USER_IDS == "opaque":
        return []
    message = "The feed shows everybody the ids that identify users in X-User-Id."
    return [Warning(message, hint="Set PUBLIC_USER_IDS=opaque.", id="drops.W002")]


@register(Tags.database)
def check_connection_limit(app_configs: Any, **kwargs: Any) -> list[CheckMessage]:
    """Compare what all processes together may open with what the database allows.

    Run by ``migrate``, and by ``check --database default``.
    """
    if "default" not in (kwargs.get("databases") or ()) or settings.DATABASE_POOLER != "none":
        return []
    pool = settings.DATABASES["default"]["OPTIONS"].get("pool", {}).get("max_size", 1)
    # Each web process has its pool; the expiry loop has a connection of its own.
    wanted = settings.WEB_PROCESSES * pool + 1
    try:
        with connections["default"].cursor() as cursor:
            cursor.execute(
                "SELECT current_setting('max_connections')::int"
                " - current_setting('superuser_reserved_connections')::int"
            )
            allowed = cursor.fetchone()[0]
    except (OperationalError, PoolTimeout):
        return []
    if wanted <= allowed:
        return []
    message = (
        f"{settings.WEB_PROCESSES} processes with DATABASE_POOL_SIZE={pool} may want {wanted} "
        f"connections; the database allows {allowed}."
    )
    hint = "Lower DATABASE_POOL_SIZE, or raise max_connections."
    return [Warning(message, hint=hint, id="drops.W003")]


@register(Tags.database)
def check_timeouts(app_configs: Any, **kwargs: Any) -> list[CheckMessage]:
    """Look for the timeouts that a pooler does not pass on: without them one lock stops a drop."""
    if "default" not in (kwargs.get("databases") or ()):
        return []
    names = ["lock_timeout", "statement_timeout", "idle_in_transaction_session_timeout"]
    try:
        with connections["default"].cursor() as cursor:
            cursor.execute(
                "SELECT name FROM unnest(%s::text[]) AS name WHERE current_setting(name) = '0'",
                [names],
            )
            missing = [name for (name,) in cursor.fetchall()]
    except (OperationalError, PoolTimeout):
        return []
    if not missing:
        return []
    hint = "Set them for the role, with ALTER ROLE ... SET, as in docs/scaling.md."
    return [Warning(f"Not set: {', '.join(missing)}.", hint=hint, id="drops.W004")]
