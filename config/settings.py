"""Django settings, all read from the environment (or ``.env``); see ``.env.example``."""

from pathlib import Path
from typing import Any
from urllib.parse import unquote

import environ

from config import env
from config.embedded import EmbeddedServers
from control.theme import UNFOLD  # noqa: F401 - read by unfold, by this name

BASE_DIR = Path(__file__).resolve().parent.parent
env.load_dotenv(BASE_DIR / ".env")

# --- Core -------------------------------------------------------------------------------

DEBUG = env.boolean("DEBUG", False)
SECRET_KEY = (
    env.text("SECRET_KEY", "insecure-key-for-development-only")
    if DEBUG
    else env.secret_key("SECRET_KEY")
)
ALLOWED_HOSTS = env.comma_separated("ALLOWED_HOSTS")
PORT = env.integer("PORT", 4000, minimum=1, maximum=65535)

INSTALLED_APPS = [
    "daphne",
    "unfold.apps.BasicAppConfig",
    "control.apps.ControlAdminConfig",
    "django.contrib.auth",
    "django.contrib.contenttypes",
    "django.contrib.sessions",
    "django.contrib.messages",
    "django.contrib.staticfiles",
    "channels",
    "corsheaders",
    "drf_spectacular",
    "drf_spectacular_sidecar",
    "rest_framework",
    "servestatic",
    "config",
    "users",
    "drops",
    "reservations",
    "purchases",
    "realtime",
    "storefront",
    "control",
    "operations",
]

MIDDLEWARE = [
    "config.middleware.RequestIdMiddleware",
    "operations.middleware.RequestContext",
    "config.middleware.ContentSecurityPolicyMiddleware",
    "operations.middleware.ProbeMiddleware",
    "django.middleware.security.SecurityMiddleware",
    "config.middleware.StaticFilesMiddleware",
    "corsheaders.middleware.CorsMiddleware",
    "django.contrib.sessions.middleware.SessionMiddleware",
    "django.middleware.common.CommonMiddleware",
    "django.middleware.csrf.CsrfViewMiddleware",
    "django.contrib.auth.middleware.AuthenticationMiddleware",
    "django.contrib.messages.middleware.MessageMiddleware",
    "django.middleware.clickjacking.XFrameOptionsMiddleware",
]

ROOT_URLCONF = "config.urls"
ASGI_APPLICATION = "config.asgi.application"
# A redirect would lose the body of a POST; the API takes both forms itself.
APPEND_SLASH = False

TEMPLATES = [
    {
        "BACKEND": "django.template.backends.django.DjangoTemplates",
        "DIRS": [],
        "APP_DIRS": True,
        "OPTIONS": {
            "context_processors": [
                "django.template.context_processors.request",
                "django.contrib.auth.context_processors.auth",
                "django.contrib.messages.context_processors.messages",
            ]
        },
    }
]

# --- Drops ------------------------------------------------------------------------------

RESERVATION_TTL_SECONDS = env.integer("RESERVATION_TTL_SECONDS", 60, minimum=1, maximum=86_400)
EXPIRY_POLL_MS = env.integer("EXPIRY_POLL_MS", 2000, minimum=10, maximum=60_000)
# What everybody is shown of who bought: the user's id, or a hash of it that only we can make.
PUBLIC_USER_IDS = env.choice("PUBLIC_USER_IDS", "plain", ("plain", "opaque"))
# Who may create drops: any identified user, or staff alone.
DROP_CREATORS = env.choice("DROP_CREATORS", "authenticated", ("authenticated", "staff"))
# Over all drops; 0: any number. Costs a lock per user and batch (docs/adr/0011).
MAX_ACTIVE_HOLDS = env.integer("MAX_ACTIVE_HOLDS", 0, minimum=0, maximum=10_000)
IDEMPOTENCY_KEY_HOURS = 24
# What ``audit_stock`` does with a drop whose numbers differ: pause it, or only tell.
PAUSE_DRIFTING_DROPS = env.boolean("PAUSE_DRIFTING_DROPS", False)
# Serve reserve, purchase and the drop reads in front of Django; off: by the viewsets alone.
HOT_ROUTES = env.boolean("HOT_ROUTES", True)

# --- Sockets ----------------------------------------------------------------------------

# Event streams over HTTP count as sockets. 0: no limit per address, as in development, where
# one machine is everybody.
SOCKETS_PER_ADDRESS = env.integer(
    "SOCKETS_PER_ADDRESS", 0 if DEBUG else 20, minimum=0, maximum=1_000_000
)
SOCKETS_PER_PROCESS = env.integer("SOCKETS_PER_PROCESS", 5000, minimum=1, maximum=1_000_000)
SOCKET_SUBSCRIPTIONS = env.integer("SOCKET_SUBSCRIPTIONS", 200, minimum=1, maximum=100_000)
SOCKET_MESSAGES_PER_SECOND = env.integer(
    "SOCKET_MESSAGES_PER_SECOND", 10, minimum=1, maximum=10_000
)
SOCKET_MESSAGE_BYTES = env.integer("SOCKET_MESSAGE_BYTES", 16_384, minimum=256, maximum=1_048_576)

# --- PostgreSQL and Redis ---------------------------------------------------------------

# Without the two URLs a development checkout brings its own servers; never outside DEBUG.
EMBEDDED: EmbeddedServers | None = None
if DEBUG and not (env.is_set("DATABASE_URL") and env.is_set("REDIS_URL")):
    EMBEDDED = EmbeddedServers(
        BASE_DIR,
        instance=env.text("EMBEDDED_INSTANCE", "dev"),
        durable=env.boolean("EMBEDDED_DURABLE", True),
    )


def database_settings() -> dict[str, Any]:
    if EMBEDDED is not None and not env.is_set("DATABASE_URL"):
        return dict(EMBEDDED.database)
    env.required("DATABASE_URL", "when DEBUG is off, like postgres://user:password@host/name")
    settings = env.url("DATABASE_URL", {"postgres", "postgresql"}, environ.Env.db_url_config)
    # libpq's spelling of a socket's folder: postgres://drops@%2Fvar%2Frun%2Fpostgresql/drops
    settings["HOST"] = unquote(settings["HOST"])
    return {key: settings[key] for key in ("NAME", "USER", "PASSWORD", "HOST", "PORT")} | {
        "OPTIONS": settings.get("OPTIONS", {})
    }


# A statement that waits for a lock, or runs, longer than this fails and is answered with 503;
# a client that dies in the middle of a transaction can't keep a drop's row for longer.
DATABASE_TIMEOUTS = (
    "-c lock_timeout=2s -c statement_timeout=15s -c idle_in_transaction_session_timeout=10s"
)

# Of a machine that is gone, or of a network that is cut, nothing is heard: without these a process
# would wait for its answer for two hours, and sell nothing. Sockets of Unix need none of them.
DATABASE_KEEPALIVES = {
    "keepalives_idle": 5,
    "keepalives_interval": 2,
    "keepalives_count": 3,
    # In milliseconds: for what was sent and never arrived.
    "tcp_user_timeout": 10_000,
}

# PgBouncer in transaction mode gives each transaction another session, so nothing may be kept in
# one: no prepared statements, no cursors between transactions, and the timeouts come from the
# role (docs/scaling.md). A session of their own is what processes expect otherwise.
DATABASE_POOLER = env.choice("DATABASE_POOLER", "none", ("none", "pgbouncer"))
HAS_SESSIONS = DATABASE_POOLER == "none"
# Web processes of this installation in all, for ``manage.py check`` to count connections.
WEB_PROCESSES = env.integer("WEB_PROCESSES", 1, minimum=1, maximum=1000)
_database = database_settings()
DATABASES = {
    "default": _database
    | {
        "ENGINE": "django.db.backends.postgresql",
        # Persistent connections leak under ASGI, where each request has a thread of its own;
        # the pool replaces them. Without health checks it hands out dead connections.
        "CONN_MAX_AGE": 0,
        "CONN_HEALTH_CHECKS": True,
        "DISABLE_SERVER_SIDE_CURSORS": not HAS_SESSIONS,
        "OPTIONS": {
            "pool": {
                "min_size": 1,
                # The threads of group commit keep four for themselves (1 + MAX_DROPS_APART).
                "max_size": env.integer("DATABASE_POOL_SIZE", 12, minimum=5, maximum=200),
                "timeout": 3,
                # Then the next request makes a new attempt at once. Otherwise the pool waits
                # twice as long after each failure: after an outage of 20 s for another 11.
                "reconnect_timeout": 2,
            },
            "connect_timeout": 3,
            **DATABASE_KEEPALIVES,
            # Lets PostgreSQL keep the plans of the busy statements, and sends arrays as they
            # are instead of writing them into the SQL text.
            "server_side_binding": True,
            "prepare_threshold": 5 if HAS_SESSIONS else None,
        }
        | ({"options": DATABASE_TIMEOUTS} if HAS_SESSIONS else {})
        | _database.get("OPTIONS", {}),
    }
}
DEFAULT_AUTO_FIELD = "django.db.models.BigAutoField"


def redis_url() -> str:
    if EMBEDDED is not None and not env.is_set("REDIS_URL"):
        return EMBEDDED.redis_url
    env.required("REDIS_URL", "when DEBUG is off, like redis://host:6379/0")
    return env.url("REDIS_URL", {"redis", "rediss", "unix"}, env.readable_redis_url)


REDIS_URL = redis_url()
# Installations that share a Redis must not hear each other.
CHANNEL_PREFIX = env.text("CHANNEL_PREFIX", "drops")
CHANNEL_LAYERS = {
    "default": {
        # The pub/sub layer: the other one drops messages above 100 per process without a word
        # and forgets its groups when Redis restarts.
        "BACKEND": "channels_redis.pubsub.RedisPubSubChannelLayer",
        "CONFIG": {
            "hosts": [
                {
                    "address": REDIS_URL,
                    "socket_connect_timeout": 2,
                    "socket_timeout": 5,
                    "health_check_interval": 15,
                }
            ],
            "prefix": CHANNEL_PREFIX,
        },
    }
}

# --- Users ------------------------------------------------------------------------------

AUTH_USER_MODEL = "users.User"
AUTH_PASSWORD_VALIDATORS = [
    {"NAME": f"django.contrib.auth.password_validation.{name}"}
    for name in ("MinimumLengthValidator", "CommonPasswordValidator", "NumericPasswordValidator")
]
# Only staff sign in, and only to the admin.
LOGIN_REDIRECT_URL = "admin:index"
# How requests show who is asking; docs/identity.md has all three.
IDENTITY_MODE = env.choice(
    "IDENTITY_MODE", "header" if DEBUG else "gateway", ("header", "gateway", "jwt")
)
if IDENTITY_MODE == "header" and not DEBUG and not env.boolean("TRUST_IDENTITY_HEADERS", False):
    raise env.InvalidSetting(
        "IDENTITY_MODE",
        "header",
        "anybody could be anybody. Use gateway or jwt, or set TRUST_IDENTITY_HEADERS=true where "
        "a proxy strips X-User-Id from what clients send and sets it itself",
    )
GATEWAY_SECRETS = env.secrets("GATEWAY_SECRETS", at_most=2) if IDENTITY_MODE == "gateway" else []
JWT_ALGORITHMS: list[str] = []
JWT_KEY = JWT_JWKS_FILE = JWT_AUDIENCE = JWT_ISSUER = ""
if IDENTITY_MODE == "jwt":
    JWT_ALGORITHMS = env.jwt_algorithms("JWT_ALGORITHMS", "RS256")
    JWT_JWKS_FILE = env.jwks_file("JWT_JWKS_FILE", JWT_ALGORITHMS)
    if not JWT_JWKS_FILE:
        JWT_KEY = env.jwt_key("JWT_KEY", JWT_ALGORITHMS)
    JWT_AUDIENCE = env.required("JWT_AUDIENCE", "when IDENTITY_MODE is jwt")
    JWT_ISSUER = env.required("JWT_ISSUER", "when IDENTITY_MODE is jwt")
# A verified identity that is new becomes a user; in development any UUID does.
CREATE_UNKNOWN_USERS = env.boolean("CREATE_UNKNOWN_USERS", True)

# Proxies in front, by address or network: only what they wrote into X-Forwarded-For counts.
TRUSTED_PROXIES = env.networks("TRUSTED_PROXIES")


def rate_limit(action: str, user: str, address: str) -> tuple[str, str]:
    """Return how often a user and an address may do ``action``; empty where there is no limit.

    In development a user may do more, and an address anything: load comes from one machine.
    """
    name = f"RATE_LIMIT_{action.upper()}"
    return (
        env.rate(name, f"{100 * int(user)}/minute" if DEBUG else f"{user}/minute"),
        env.rate(f"{name}_PER_ADDRESS", "off" if DEBUG else f"{address}/minute"),
    )


RATE_LIMITS = {
    "reserve": rate_limit("reserve", "60", "1200"),
    "purchase": rate_limit("purchase", "60", "1200"),
    "create": rate_limit("create", "30", "120"),
    "update": rate_limit("update", "60", "600"),
    "socket": rate_limit("socket", "60", "600"),
    "ticket": rate_limit("ticket", "60", "600"),
    # Attempts at the admin: by the name that they give, whether there is such a user or not.
    "sign_in": rate_limit("sign_in", "10", "60"),
    # Failures alone: who is not believed has no user.
    "identity": ("", env.rate("RATE_LIMIT_IDENTITY_PER_ADDRESS", "off" if DEBUG else "300/minute")),
}

# --- REST -------------------------------------------------------------------------------

MAX_BODY_BYTES = 16 * 1024
MAX_ADDRESS_BYTES = 16 * 1024
MAX_HEADER_BYTES = 32 * 1024
MAX_JSON_DEPTH = 8
# For a request to arrive in full, where the server is daphne.
REQUEST_SECONDS = env.integer("REQUEST_SECONDS", 30, minimum=1, maximum=600)
# What a web process that is told to stop gives the requests it has begun.
SHUTDOWN_SECONDS = env.integer("SHUTDOWN_SECONDS", 20, minimum=1, maximum=600)
REST_FRAMEWORK = {
    "DEFAULT_AUTHENTICATION_CLASSES": ["users.authentication.IdentityAuthentication"],
    "DEFAULT_PERMISSION_CLASSES": ["users.authentication.IsIdentifiedOrReadOnly"],
    "DEFAULT_PARSER_CLASSES": ["config.parsers.ObjectParser"],
    "DEFAULT_RENDERER_CLASSES": ["rest_framework.renderers.JSONRenderer"],
    "DEFAULT_SCHEMA_CLASS": "drf_spectacular.openapi.AutoSchema",
    "DEFAULT_PAGINATION_CLASS": "config.params.Page",
    "EXCEPTION_HANDLER": "config.problems.exception_handler",
    "UNAUTHENTICATED_USER": None,
    "TEST_REQUEST_DEFAULT_FORMAT": "json",
}
SPECTACULAR_SETTINGS = {
    "TITLE": "Sneaker drops",
    "VERSION": "0.1.0",
    "DESCRIPTION": (
        "Limited releases: reserve, purchase and watch the stock. Every error is a problem "
        "document (RFC 9457) with a stable `code`. The events: [WebSocket](/api/asyncapi)."
    ),
    "SERVE_INCLUDE_SCHEMA": False,
    "SWAGGER_UI_DIST": "SIDECAR",
    "SWAGGER_UI_FAVICON_HREF": "SIDECAR",
    "REDOC_DIST": "SIDECAR",
    "PREPROCESSING_HOOKS": ["config.openapi.without_last_slash"],
    "SCHEMA_PATH_PREFIX": "/api",
    "COMPONENT_SPLIT_REQUEST": True,
    "ENUM_NAME_OVERRIDES": {
        "DropStatus": "drops.models.DropStatus",
        "ReservationStatus": "reservations.models.ReservationStatus",
        "PurchaseStatus": "purchases.models.PurchaseStatus",
    },
}

_cors_origins = env.origins("CORS_ORIGINS", "*" if DEBUG else "")
CORS_ALLOW_ALL_ORIGINS = _cors_origins == ["*"]
CORS_ALLOWED_ORIGINS = [] if CORS_ALLOW_ALL_ORIGINS else _cors_origins
CORS_URLS_REGEX = r"^/api/.*$"
CORS_ALLOW_HEADERS = (
    "accept",
    "authorization",
    "content-type",
    "idempotency-key",
    "x-auth-signature",
    "x-request-id",
    "x-user-id",
    "x-user-name",
)
CORS_EXPOSE_HEADERS = (
    "idempotent-replayed",
    "ratelimit",
    "ratelimit-policy",
    "retry-after",
    "x-request-id",
)

# --- Browsers ---------------------------------------------------------------------------

# Scripts only from our own files, never from the page itself; pages that need more are named
# by the start of their path, the longest first.
CONTENT_SECURITY_POLICY = (
    "default-src 'self'; script-src 'self'; style-src 'self'; img-src 'self' https: data:; "
    "connect-src 'self'; object-src 'none'; base-uri 'none'; form-action 'self'; "
    "frame-ancestors 'none'"
)
_VIEWERS = (
    CONTENT_SECURITY_POLICY.replace("style-src 'self'", "style-src 'self' 'unsafe-inline'")
    + "; worker-src 'self' blob:"
)
CONTENT_SECURITY_POLICIES = {
    # Alpine, which draws the admin's menus, makes functions of attributes, and unfold writes
    # the theme's colours into a style element (docs/adr/0013).
    "/admin/": CONTENT_SECURITY_POLICY.replace(
        "script-src 'self'; style-src 'self'",
        "script-src 'self' 'unsafe-eval'; style-src 'self' 'unsafe-inline'",
    ),
    # Swagger UI and Redoc make styles as they go, and Redoc searches in a worker.
    "/api/docs": _VIEWERS,
    "/api/redoc": _VIEWERS,
    "/api/asyncapi": CONTENT_SECURITY_POLICY,
    "/api/": "default-src 'none'; frame-ancestors 'none'",
}
X_FRAME_OPTIONS = "DENY"
SESSION_ENGINE = "users.sessions"
SESSION_COOKIE_SECURE = CSRF_COOKIE_SECURE = not DEBUG
SESSION_COOKIE_HTTPONLY = CSRF_COOKIE_HTTPONLY = True
SESSION_COOKIE_SAMESITE = CSRF_COOKIE_SAMESITE = "Lax"
SESSION_COOKIE_AGE = 12 * 3600
# Redirect plain HTTP, and have browsers never try it again.
SECURE_SSL_REDIRECT = env.boolean("HTTPS_ONLY", False)
SECURE_REDIRECT_EXEMPT = [r"^healthz$", r"^readyz$", r"^metrics$"]
SECURE_HSTS_SECONDS = 365 * 24 * 3600 if SECURE_SSL_REDIRECT else 0
SECURE_HSTS_INCLUDE_SUBDOMAINS = SECURE_HSTS_PRELOAD = SECURE_SSL_REDIRECT
if TRUSTED_PROXIES:
    SECURE_PROXY_SSL_HEADER = ("HTTP_X_FORWARDED_PROTO", "https")
if SECURE_SSL_REDIRECT:
    CSRF_TRUSTED_ORIGINS = [f"https://{host}" for host in ALLOWED_HOSTS if host != "*"]

# --- Pages and files --------------------------------------------------------------------

# Where a visitor of the shop signs in, where that is not the shop's own matter.
SIGN_IN_URL = env.text("SIGN_IN_URL", "")

STATIC_URL = "static/"
STATIC_ROOT = BASE_DIR / "staticfiles"
FIXTURE_DIRS = [BASE_DIR / "fixtures"]
SERVESTATIC_AUTOREFRESH = DEBUG
SERVESTATIC_USE_FINDERS = DEBUG
# Browsers ask each time whether a file is still the same. Were they to keep an old script for a
# while, a page that names the hash of the new one would be without any.
SERVESTATIC_MAX_AGE = 0

LANGUAGE_CODE = "en-us"
FORMAT_MODULE_PATH = ["config.formats"]
TIME_ZONE = "UTC"
USE_TZ = True

# --- Logs -------------------------------------------------------------------------------

LOG_LEVEL = env.choice("LOG_LEVEL", "info", ("debug", "info", "warning", "error")).upper()
# A line per request: in development nobody asked for it.
REQUEST_LOG = env.boolean("REQUEST_LOG", not DEBUG)
LOGGING = {
    "version": 1,
    "disable_existing_loggers": False,
    "formatters": {"line": {"()": "config.logs.line_formatter", "is_json": not DEBUG}},
    "filters": {
        "secrets": {"()": "config.logs.MaskSecrets"},
        "failures": {"()": "config.logs.OnlyFailures"},
    },
    "handlers": {
        "stderr": {
            "class": "logging.StreamHandler",
            "formatter": "line",
            "filters": ["secrets"],
        }
    },
    "root": {"handlers": ["stderr"], "level": LOG_LEVEL},
    "loggers": {
        # Django's own handlers would write everything a second time when DEBUG is on.
        "django": {"level": "INFO", "handlers": [], "propagate": True},
        # Each refused request would be a line of its own here.
        "django.request": {"level": "ERROR", "filters": ["failures"]},
        # Whoever likes sends a Host that is none; with its traceback it would fill the logs.
        "django.security.DisallowedHost": {"level": "CRITICAL"},
        "django.channels.server": {"level": "WARNING"},
        "daphne": {"level": "WARNING"},
        # uvicorn brings handlers of its own, which write in their own way.
        "uvicorn": {"level": "WARNING", "handlers": [], "propagate": True},
        # Nowhere: as long as somebody could read them, uvicorn makes a line for each request.
        "uvicorn.access": {"level": "WARNING", "handlers": [], "propagate": False},
    },
}

# --- Metrics, errors and traces ---------------------------------------------------------

# Whoever scrapes /metrics shows it; outside DEBUG there is no such page without one.
METRICS_TOKEN = env.secret("METRICS_TOKEN")
# Where processes of one machine share what they count; prometheus-client reads the same name.
METRICS_DIR = env.folder("PROMETHEUS_MULTIPROC_DIR")
# A port on which the expiry loop shows its own metrics; 0: none.
EXPIRY_METRICS_PORT = env.integer("EXPIRY_METRICS_PORT", 0, minimum=0, maximum=65535)
SENTRY_DSN = env.sentry_dsn("SENTRY_DSN")
SENTRY_USER_IDS = env.boolean("SENTRY_USER_IDS", False)
OTEL_EXPORTER_OTLP_ENDPOINT = env.text("OTEL_EXPORTER_OTLP_ENDPOINT", "")
# Our own line per request says it all; see operations.middleware.RequestContext.
DJANGO_STRUCTLOG_IP_LOGGING_ENABLED = False
DJANGO_STRUCTLOG_USER_ID_FIELD = None
