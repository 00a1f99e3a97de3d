"""What browsers, logs and careless operators are kept from."""

import asyncio
import json
import logging
import os
import re
import secrets
import subprocess
import sys
import uuid
from dataclasses import replace
from pathlib import Path

import pytest
from django.conf import settings
from django.core.asgi import get_asgi_application
from django.db import connection
from django.test import override_settings
from jwt.algorithms import RSAAlgorithm

from config import checks
from config.addresses import client_address
from config.logs import MaskSecrets, mask_values, masked
from drops.group_commit import MAX_DROPS_APART
from drops.tests.factories import DropFactory
from purchases.services import purchase
from realtime.models import Event, EventType
from reservations.services import Claim, reserve
from tests.hot import Request, Response, hot_lane, post, viewset_lane
from tests.identities import private_key, public_pem
from users.identity import public_id
from users.tests.factories import UserFactory

EXAMPLE = dict(
    line.split("=", 1)
    for line in (settings.BASE_DIR / "docs/examples/production.env").read_text().splitlines()
    if line and not line.startswith("#")
)


def with_own_secrets(example: dict[str, str]) -> dict[str, str]:
    """Do what an example asks for: put a secret where it says "change-me"."""
    return {
        name: secrets.token_hex(32) if value.startswith("change-me") else value
        for name, value in example.items()
    }


PRODUCTION = with_own_secrets(EXAMPLE)


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run Python with nothing of this process's environment but the path."""
    return subprocess.run(
        [sys.executable, *arguments],
        env={"PATH": os.environ["PATH"], "DJANGO_SETTINGS_MODULE": "config.settings"} | environment,
        cwd=settings.BASE_DIR,
        capture_output=True,
        text=True,
        timeout=60,
    )


# --- The start --------------------------------------------------------------------------


PRODUCTION_CHECK = """
import django; django.setup()
from django.core.management import call_command
from django.urls import resolve
call_command("check", deploy=True, fail_level="WARNING")
for path in ("/api/internal/expire-now", "/api/internal/", "/api/me"):
    print(path, resolve(path).func.__name__)
"""


def test_the_production_example_has_no_warnings_and_no_internal_routes():
    result = run("-c", PRODUCTION_CHECK, **PRODUCTION)

    assert (result.returncode, result.stderr) == (0, "")
    assert "no issues" in result.stdout
    assert "/api/internal/expire-now no_such_address" in result.stdout
    assert "/api/internal/ no_such_address" in result.stdout
    assert "/api/me view" in result.stdout


SECRET = "s" * 32
A_PUBLIC_KEY = "-----BEGIN PUBLIC KEY-----\nMFwwDQYJKoZIhvcNAQEB\n-----END PUBLIC KEY-----"
UNUSABLE = {
    "raw headers": ({"IDENTITY_MODE": "header"}, "IDENTITY_MODE"),
    "an unknown mode": ({"IDENTITY_MODE": "trust"}, "IDENTITY_MODE"),
    "no secret": ({"GATEWAY_SECRETS": ""}, "GATEWAY_SECRETS"),
    "a short secret": ({"GATEWAY_SECRETS": "hunter2"}, "GATEWAY_SECRETS"),
    "three secrets": ({"GATEWAY_SECRETS": ",".join([SECRET] * 3)}, "GATEWAY_SECRETS"),
    "no key": ({"IDENTITY_MODE": "jwt"}, "JWT_KEY"),
    "no key file": ({"IDENTITY_MODE": "jwt", "JWT_JWKS_FILE": "/nowhere"}, "JWT_JWKS_FILE"),
    "a key file without keys": (
        {"IDENTITY_MODE": "jwt", "JWT_JWKS_FILE": str(settings.BASE_DIR / "pyproject.toml")},
        "JWT_JWKS_FILE",
    ),
    "a key that is none": ({"IDENTITY_MODE": "jwt", "JWT_KEY": SECRET}, "JWT_KEY"),
    "a public key as a secret": (
        {"IDENTITY_MODE": "jwt", "JWT_KEY": A_PUBLIC_KEY, "JWT_ALGORITHMS": "HS256"},
        "JWT_KEY",
    ),
    "no audience": (
        {"IDENTITY_MODE": "jwt", "JWT_KEY": SECRET, "JWT_ALGORITHMS": "HS256"},
        "JWT_AUDIENCE",
    ),
    "both kinds of keys": (
        {"IDENTITY_MODE": "jwt", "JWT_KEY": SECRET, "JWT_ALGORITHMS": "RS256,HS256"},
        "JWT_ALGORITHMS",
    ),
    "a short secret for tokens": (
        {
            "IDENTITY_MODE": "jwt",
            "JWT_KEY": "hunter2",
            "JWT_ALGORITHMS": "HS256",
            "JWT_AUDIENCE": "drops",
            "JWT_ISSUER": "us",
        },
        "JWT_KEY",
    ),
    "no algorithm at all": (
        {"IDENTITY_MODE": "jwt", "JWT_KEY": SECRET, "JWT_ALGORITHMS": "none"},
        "JWT_ALGORITHMS",
    ),
    "a list of no algorithms": (
        {"IDENTITY_MODE": "jwt", "JWT_KEY": SECRET, "JWT_ALGORITHMS": ","},
        "JWT_ALGORITHMS",
    ),
    "no rate": ({"RATE_LIMIT_RESERVE": "many"}, "RATE_LIMIT_RESERVE"),
    "a rate of nothing": ({"RATE_LIMIT_CREATE": "0/minute"}, "RATE_LIMIT_CREATE"),
    "no network": ({"TRUSTED_PROXIES": "proxy.internal"}, "TRUSTED_PROXIES"),
    "creators that are nobody": ({"DROP_CREATORS": "root"}, "DROP_CREATORS"),
    "no origin but a host": ({"CORS_ORIGINS": "shop.example.com"}, "CORS_ORIGINS"),
    "an origin with a path": ({"CORS_ORIGINS": "https://shop.example.com/"}, "CORS_ORIGINS"),
    "an origin in capitals": ({"CORS_ORIGINS": "https://Shop.example.com"}, "CORS_ORIGINS"),
    "all origins and one": ({"CORS_ORIGINS": "*,https://shop.example.com"}, "CORS_ORIGINS"),
    "no address of Sentry": ({"SENTRY_DSN": "hunter2"}, "SENTRY_DSN"),
    "no level of logs": ({"LOG_LEVEL": "LOUD"}, "LOG_LEVEL"),
    # Unless they are quoted, such characters make something else of the URL.
    "a password with a slash": (
        {"DATABASE_URL": "postgres://drops:hunter2/@db/drops"},
        "DATABASE_URL",
    ),
    "a password with several": (
        {"DATABASE_URL": "mysql://drops:@hunter2/?#@db/drops"},
        "DATABASE_URL",
    ),
    "a password with a hash": ({"REDIS_URL": "redis://:hunter2#@redis:6379/0"}, "REDIS_URL"),
    "a password in the query": (
        {"REDIS_URL": "redis://redis/0?password=hunter2&socket_timeout=soon"},
        "REDIS_URL",
    ),
    "no port of Redis": ({"REDIS_URL": "redis://:hunter2@redis:port/0"}, "REDIS_URL"),
}


IMPORT_SETTINGS = """
import json, os, runpy, sys
production = dict(os.environ)
for changes in json.loads(sys.argv[1]):
    os.environ.clear()
    os.environ.update(production | changes)
    try:
        runpy.run_module("config.settings")
        print("fine")
    except SystemExit as exc:
        print(exc)
"""


def starts(*changes: dict[str, str]) -> list[str]:
    """Return the line with which each start ends, all in one process."""
    result = run("-c", IMPORT_SETTINGS, json.dumps(changes), **PRODUCTION)
    assert result.returncode == 0, result.stderr
    return result.stdout.splitlines()


def test_a_start_without_protection_is_refused_in_one_line():
    lines = starts(*[changes for changes, _ in UNUSABLE.values()])

    for (name, (_, variable)), line in zip(UNUSABLE.items(), lines, strict=True):
        assert line.startswith(f"{variable}="), (name, line)
        assert "hunter2" not in line
        assert SECRET not in line


def test_a_pool_has_a_connection_beside_those_that_batches_keep():
    kept = 1 + MAX_DROPS_APART

    lines = starts({"DATABASE_POOL_SIZE": str(kept)}, {"DATABASE_POOL_SIZE": str(kept + 1)})

    assert lines[0].startswith(f"DATABASE_POOL_SIZE='{kept}' is not usable: ")
    assert lines[1] == "fine"


def test_tokens_may_be_verified_with_a_key_of_any_kind(tmp_path):
    key = RSAAlgorithm.to_jwk(private_key().public_key())
    (tmp_path / "jwks.json").write_text(f'{{"keys": [{key}]}}')
    by_token = {"IDENTITY_MODE": "jwt", "JWT_AUDIENCE": "drops", "JWT_ISSUER": "us"}
    one_line = public_pem().replace("\n", "\\n")

    lines = starts(
        by_token | {"JWT_KEY": one_line, "JWT_ALGORITHMS": "ES256,RS256"},
        by_token | {"JWT_KEY": SECRET, "JWT_ALGORITHMS": "HS256,HS384"},
        by_token | {"JWT_JWKS_FILE": str(tmp_path / "jwks.json")},
    )

    assert lines == ["fine"] * 3


def test_a_key_file_without_a_key_for_the_algorithms_stops_the_start(tmp_path):
    """Each token would be refused, and nobody told why."""
    by_token = {"IDENTITY_MODE": "jwt", "JWT_AUDIENCE": "drops", "JWT_ISSUER": "us"}
    key = RSAAlgorithm.to_jwk(private_key().public_key(), as_dict=True)
    for name, keys in {"RS256": [key], "RS512": [key | {"alg": "RS512"}, key]}.items():
        (tmp_path / name).write_text(json.dumps({"keys": keys}))

    lines = starts(
        *[
            by_token | {"JWT_JWKS_FILE": str(tmp_path / name), "JWT_ALGORITHMS": algorithms}
            for name, algorithms in [("RS256", "ES256,RS512"), ("RS512", "ES256,RS512")]
        ]
    )

    assert lines == [
        f"JWT_JWKS_FILE='{tmp_path}/RS256' is not usable: "
        "there is no key for ES256, RS512 in this file.",
        "fine",
    ]


def test_the_secrets_of_the_example_are_refused():
    names = ["SECRET_KEY", "GATEWAY_SECRETS", "METRICS_TOKEN"]
    changes = [{name: EXAMPLE[name]} for name in names]
    second = {"GATEWAY_SECRETS": f"{SECRET},{EXAMPLE['GATEWAY_SECRETS']}"}

    lines = starts(*changes, second, {"DEBUG": "true", "SECRET_KEY": EXAMPLE["SECRET_KEY"]})

    for name, line in zip([*names, "GATEWAY_SECRETS"], lines[:-1], strict=True):
        assert line.startswith(f"{name}='change-me...' is not usable: "), line
    assert SECRET not in lines[3]
    assert lines[-1] == "fine"


def test_a_value_that_begins_with_a_dollar_is_that_value():
    """Not the name of another variable: of fifty keys that Django makes, one begins like this."""
    lines = starts({"SECRET_KEY": "$" + SECRET * 2}, {"METRICS_TOKEN": "$hunter2"})

    assert lines == [
        "fine",
        "METRICS_TOKEN='***' is not usable: it must have 32 characters or more.",
    ]


@pytest.mark.parametrize(
    "line",
    [f"METRICS_TOKEN = {SECRET}", f" METRICS_TOKEN={SECRET}", f"METRICS_TOKEN: {SECRET}", SECRET],
)
def test_a_line_of_the_file_that_is_none_stops_the_start_and_is_not_shown(tmp_path, line):
    (tmp_path / ".env").write_text(f"# Comment\n\nexport PORT='4001'\nA=\n  # Too\n \n{line}\n")
    load = "import pathlib, sys; from config import env; env.load_dotenv(pathlib.Path(sys.argv[1]))"

    result = run("-c", load, str(tmp_path / ".env"))

    assert result.returncode == 1
    assert result.stderr == f"{tmp_path}/.env, line 7, is not usable: it must be NAME=value.\n"


def test_origins_of_any_kind_may_be_named():
    ours = "https://shop.example.com,http://localhost:4001,capacitor://localhost,http://[::1]:80"

    lines = starts({"CORS_ORIGINS": ours}, {"CORS_ORIGINS": "*"}, {"CORS_ORIGINS": ""})

    assert lines == ["fine"] * 3


def test_headers_may_be_trusted_where_somebody_says_so():
    trusted = {"IDENTITY_MODE": "header", "TRUST_IDENTITY_HEADERS": "true", "GATEWAY_SECRETS": ""}

    assert starts(trusted, {}) == ["fine", "fine"]


@pytest.mark.parametrize(
    ("check", "changes", "found"),
    [
        (checks.check_identity_mode, {"IDENTITY_MODE": "gateway"}, "drops.E001"),
        (checks.check_identity_mode, {"IDENTITY_MODE": "jwt"}, "drops.E002"),
        (checks.check_cors, {"CORS_ALLOW_CREDENTIALS": True}, "drops.E003"),
        (checks.check_drop_creators, {"DROP_CREATORS": "authenticated"}, "drops.W001"),
        (checks.check_public_ids, {"PUBLIC_USER_IDS": "plain"}, "drops.W002"),
        (checks.check_redis_client, {}, None),
        (checks.check_connections_are_pooled, {}, None),
        (checks.check_cors, {}, None),
        (checks.check_drop_creators, {"DROP_CREATORS": "staff"}, None),
        (checks.check_public_ids, {"PUBLIC_USER_IDS": "opaque"}, None),
    ],
)
def test_checks(check, changes, found):
    with override_settings(**changes):
        assert [message.id for message in check(None)] == ([found] if found else [])


def test_the_check_of_the_redis_client_knows_the_broken_one(monkeypatch):
    monkeypatch.setattr(checks, "version", lambda name: "8.0.1")

    assert [message.id for message in checks.check_redis_client(None)] == ["drops.E004"]


def test_the_check_of_connections_knows_persistent_ones(monkeypatch):
    monkeypatch.setitem(settings.DATABASES["default"], "CONN_MAX_AGE", 60)

    assert [m.id for m in checks.check_connections_are_pooled(None)] == ["drops.E005"]


def test_counts_the_connections_of_all_processes(db, settings):
    def found():
        return [m.id for m in checks.check_connection_limit(None, databases=["default"])]

    assert found() == []
    settings.WEB_PROCESSES = 1000
    assert found() == ["drops.W003"]
    assert checks.check_connection_limit(None) == []
    # Its connections are those of the pooler.
    settings.DATABASE_POOLER = "pgbouncer"
    assert found() == []


def test_misses_timeouts_that_a_pooler_kept_to_itself(db):
    def found():
        return [m.msg for m in checks.check_timeouts(None, databases=["default"])]

    assert found() == []
    with connection.cursor() as cursor:
        cursor.execute("SET LOCAL lock_timeout = 0")
    assert found() == ["Not set: lock_timeout."]
    assert checks.check_timeouts(None) == []


# --- Browsers ---------------------------------------------------------------------------

PAGES = [
    "/",
    "/api/docs",
    "/api/redoc",
    "/api/asyncapi",
    "/admin/login/",
    "/admin/",
    "/admin/drops/drop/",
]
INLINE = [
    re.compile(rb"<script(?![^>]*\bsrc=)(?![^>]*application/json)", re.I),
    re.compile(rb"<[a-z][^>]*\son[a-z]+\s*=", re.I),
    re.compile(rb"javascript:", re.I),
]


@pytest.mark.parametrize("path", PAGES)
def test_pages_have_no_inline_script_and_a_policy_against_it(admin_client, path):
    DropFactory()

    response = admin_client.get(path, follow=True)

    policy = response["Content-Security-Policy"]
    assert response.status_code == 200
    # The menus of the admin make functions of attributes (docs/adr/0013); no page runs what
    # stands in it.
    assert re.search(r"script-src 'self'( 'unsafe-eval')?;", policy)
    assert ("unsafe-eval" in policy) == path.startswith("/admin/")
    assert "object-src 'none'" in policy
    assert [pattern.findall(response.content) for pattern in INLINE] == [[], [], []]
    assert response["X-Frame-Options"] == "DENY"
    assert response["X-Content-Type-Options"] == "nosniff"
    assert response["Referrer-Policy"] == "same-origin"


def test_the_script_of_the_docs_is_a_file_of_its_own(client):
    page = client.get("/api/docs").content.decode()
    address = re.search(r'<script src="(/api/docs[^"]+)"', page)[1]

    response = client.get(address)

    assert response["Content-Type"].startswith("application/javascript")
    assert "SwaggerUIBundle" in response.content.decode()


@pytest.mark.parametrize("page", ["docs", "redoc"])
def test_the_viewers_are_for_reading_alone(client, page):
    refused = client.options(f"/api/{page}")

    assert (refused.status_code, refused["Allow"]) == (405, "GET, HEAD")
    assert refused.json()["code"] == "method_not_allowed"
    assert client.head(f"/api/{page}").status_code == 200


@pytest.mark.parametrize("lane", [hot_lane, viewset_lane])
@pytest.mark.django_db(transaction=True)
def test_api_answers_allow_no_page_at_all(lane):
    with lane() as application:
        answer = asyncio.run(application.get("/api/drops"))

    assert answer.header("content-security-policy") == "default-src 'none'; frame-ancestors 'none'"


@pytest.mark.parametrize("lane", [hot_lane, viewset_lane])
@pytest.mark.django_db(transaction=True)
def test_plain_http_is_redirected_and_https_remembered(lane, settings, monkeypatch):
    settings.SECURE_SSL_REDIRECT, settings.SECURE_HSTS_SECONDS = True, 3600
    settings.SECURE_HSTS_INCLUDE_SUBDOMAINS = settings.SECURE_HSTS_PRELOAD = True
    settings.SECURE_PROXY_SSL_HEADER = ("HTTP_X_FORWARDED_PROTO", "https")

    async def ask(application):
        plain = await application.get("/api/drops")
        lie = await application.get("/api/drops", **{"X-Forwarded-Proto": "http, https"})
        secure = await application.get("/api/drops?limit=1", **{"X-Forwarded-Proto": "https"})
        return plain, lie, secure

    # Django's middleware reads its settings when it is made.
    monkeypatch.setattr("config.asgi.django_application", get_asgi_application())
    with lane() as application:
        plain, lie, secure = asyncio.run(ask(application))

    assert (plain.status, plain.header("location")) == (301, "https://testserver/api/drops")
    assert lie.status == 301
    assert secure.status == 200
    expected = "max-age=3600; includeSubDomains; preload"
    assert secure.header("strict-transport-security") == expected


LONG_REQUESTS = [
    (413, Request("POST", "/api/drops", (b"{}",), (("Content-Length", "99999"),))),
    (414, Request("GET", f"/api/drops?{'a' * 20_000}")),
    (414, Request("GET", f"/api/drops?{'&' * 1000}", headers=(("X-User-Id", "nobody"),))),
    (431, Request("GET", "/api/drops", headers=(("X-Filler", "a" * 40_000),))),
]


@pytest.mark.parametrize("lane", [hot_lane, viewset_lane])
@pytest.mark.django_db(transaction=True)
@pytest.mark.parametrize(
    ("status", "request_"), LONG_REQUESTS, ids=["413", "414", "parameters", "431"]
)
def test_refusals_in_front_of_django_have_https_remembered_too(lane, settings, status, request_):
    settings.SECURE_HSTS_SECONDS = 3600
    settings.SECURE_PROXY_SSL_HEADER = ("HTTP_X_FORWARDED_PROTO", "https")

    def ask(scheme: str) -> Response:
        forwarded = ("X-Forwarded-Proto", scheme)
        asking = application.send(replace(request_, headers=(*request_.headers, forwarded)))
        return asyncio.run(asking)

    with lane() as application:
        plain, secure = ask("http"), ask("https")

    assert (plain.status, plain.header("strict-transport-security")) == (status, None)
    assert secure.status == status
    assert secure.header("strict-transport-security").startswith("max-age=3600")


@pytest.mark.parametrize("lane", [hot_lane, viewset_lane])
@pytest.mark.django_db(transaction=True)
def test_a_length_of_thousands_of_digits_is_too_large(lane):
    user = UserFactory()
    for address in ("/api/drops", f"/api/drops/{DropFactory().pk}/reserve"):
        request = post(address, user, {}, Content_Length="9" * 5000)
        with lane() as application:
            answer = asyncio.run(application.send(request))

        assert (answer.status, answer.json()["code"]) == (413, "body_too_large")


async def send_all(application, requests: list[Request]) -> list[Response]:
    return [await application.send(request) for request in requests]


@pytest.mark.parametrize("lane", [hot_lane, viewset_lane])
@pytest.mark.django_db(transaction=True)
def test_no_cache_keeps_what_is_a_users_alone(lane):
    user, drop = UserFactory(), DropFactory()
    hold = reserve(drop.pk, Claim(user.pk))
    paths = ["me", "reservations", f"reservations/{hold.pk}", "purchases", f"purchases/{hold.pk}"]
    who = ("X-User-Id", str(user.pk))
    asked = [Request("GET", f"/api/{path}", headers=(who,)) for path in paths]
    # The same ticket again, to a repeated request.
    asked += [Request("POST", "/api/ws-ticket", headers=(who, ("Idempotency-Key", "k")))] * 2

    with lane() as application:
        private = asyncio.run(send_all(application, asked))
        public = asyncio.run(application.send(Request("GET", f"/api/drops/{drop.pk}")))

    assert [answer.status for answer in private] == [200, 200, 200, 200, 404, 201, 201]
    assert [answer.header("cache-control") for answer in private] == ["no-store"] * 7
    assert (public.status, public.header("cache-control")) == (200, None)


# --- Addresses --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("peer", "forwarded", "address"),
    [
        ("203.0.113.7", None, "203.0.113.7"),
        ("203.0.113.7", "198.51.100.1", "203.0.113.7"),
        ("10.0.0.1", "198.51.100.1", "198.51.100.1"),
        ("10.0.0.1", "1.1.1.1, 198.51.100.1", "198.51.100.1"),
        ("10.0.0.1", "198.51.100.1, 10.0.0.9", "198.51.100.1"),
        ("10.0.0.1", "198.51.100.1:5050", "198.51.100.1"),
        ("10.0.0.1", "[2001:db8::1]:443", "2001:db8::/64"),
        ("::ffff:10.0.0.1", "198.51.100.1", "198.51.100.1"),
        ("2001:db8::1:2:3:4", None, "2001:db8::/64"),
        (None, "198.51.100.1", "198.51.100.1"),
        ("", None, "unknown"),
        ("10.0.0.1", "<script>", "unknown"),
        ("10.0.0.1", "", "unknown"),
    ],
)
def test_believes_only_trusted_proxies_about_addresses(peer, forwarded, address, settings):
    from config import env

    settings.TRUSTED_PROXIES = env.networks("NO_SUCH_NAME") or [
        env.ip_network("10.0.0.0/8"),
        env.ip_network("fd00::/8"),
    ]

    assert client_address(peer, forwarded) == address


def test_believes_nobody_by_default():
    assert client_address("203.0.113.7", "198.51.100.1") == "203.0.113.7"


# --- Logs -------------------------------------------------------------------------------

TOKEN = "eyJhbGciOiJSUzI1NiJ9.eyJzdWIiOiJhbGljZSJ9.c2lnbmF0dXJl"


@pytest.mark.parametrize(
    ("text", "secret"),
    [
        (f"X-Auth-Signature: t=1795370400,v1={'0123456789abcdef' * 4}", "0123456789abcdef"),
        (f"Authorization: Bearer {TOKEN}", TOKEN[4:]),
        ("authorization: Basic YWRtaW46YWRtaW4=", "YWRtaW46YWRtaW4="),
        (f"token was {TOKEN}", TOKEN[4:]),
        ("GET /ws/drops?ticket=3f9a77c2b1&x=1", "3f9a77c2b1"),
        ("redis://:hunter2@redis:6379/0 is away", "hunter2"),
        ("postgres://drops:hunter2@db/drops", "hunter2"),
        ("{'password': 'hunter2', 'x': 1}", "hunter2"),
        ("Cookie: sessionid=abc123def; csrftoken=xyz", "abc123def"),
        ('{"secret": "hunter2"}', "hunter2"),
        ("Sec-WebSocket-Protocol: drops.v1, ticket.3f9a77c2b1-3f9a77c2b1", "3f9a77c2b1"),
        ("GATEWAY_SECRETS=first-one,hunter2", "hunter2"),
        ("GATEWAY_SECRETS=['first-one', 'hunter2']", "hunter2"),
        ("{'GATEWAY_SECRETS': ('first-one', 'hunter2')}", "hunter2"),
        ("SECRET_KEY=a&b,c;d)hunter2", "hunter2"),
        ("'JWT_KEY': 'hunter2'", "hunter2"),
    ],
)
def test_masks_what_opens_doors(text, secret):
    assert secret not in masked(text)
    assert "***" in masked(text)


@pytest.mark.parametrize(
    "text",
    ["GET /api/drops?limit=5 200", "the token is not valid", "v1=ok", "ticket.expires_at"],
)
def test_leaves_the_rest_as_it_is(text):
    assert masked(text) == text


def test_masks_what_is_inside_of_a_value():
    secret = "redis://:hunter2@redis/0"
    values = {"list": [secret, {"deep": (secret,)}], "raw": secret.encode(), "n": 7}
    named = {"settings": {"PASSWORD": "hunter2", "GATEWAY_SECRETS": ["hunter2"], "tokens": 3}}

    event = mask_values(None, "info", {"event": "x", **values, **named})

    hidden = "redis://:***@redis/0"
    assert event == {
        "event": "x",
        "list": [hidden, {"deep": [hidden]}],
        "raw": hidden.encode(),
        "n": 7,
        "settings": {"PASSWORD": "***", "GATEWAY_SECRETS": "***", "tokens": 3},
    }


def test_masks_arguments_and_tracebacks_of_a_record():
    try:
        raise ValueError("redis://:hunter2@redis:6379/0")
    except ValueError:
        record = logging.LogRecord("x", 40, "x.py", 1, "%s is away", ("a:b@c",), sys.exc_info())
    record.args = ("redis://:hunter2@redis/0",)

    assert MaskSecrets().filter(record)
    text = logging.Formatter("%(message)s").format(record)
    assert "hunter2" not in text
    assert "redis://:***@redis/0 is away" in text
    assert "ValueError" in text


def test_every_handler_masks():
    assert all("secrets" in h["filters"] for h in settings.LOGGING["handlers"].values())


@pytest.mark.parametrize("path", ["/", "/api/drops", "/admin/"])
def test_a_host_that_is_none_fills_no_logs(client, caplog, path):
    response = client.get(path, headers={"host": "elsewhere.example.com"})

    assert response.status_code == 400
    assert [record for record in caplog.records if record.levelname == "ERROR"] == []


# --- Public ids -------------------------------------------------------------------------


@pytest.mark.django_db(transaction=True)
def test_opaque_ids_hide_who_bought(client_of, settings):
    settings.PUBLIC_USER_IDS = "opaque"
    drop, user = DropFactory(), UserFactory()
    reserve(drop.pk, Claim(user.pk))
    purchase(drop.pk, user.pk)

    shown = client_of().get(f"/api/drops/{drop.pk}")

    event = Event.objects.get(drop_id=drop.pk, type=EventType.ACTIVITY_UPDATED)
    known_as = shown.json()["activity_feed"]["latest_purchasers"][0]["user_id"]
    assert event.data["latestPurchasers"][0]["userId"] == known_as == public_id(user.pk)
    assert uuid.UUID(known_as).version == 8
    assert str(user.pk) not in shown.content.decode()
    assert not list(Event.objects.filter(data__contains=str(user.pk)))
    # One's own rows say who one is.
    assert client_of(user).get("/api/purchases").json()["results"][0]["user_id"] == str(user.pk)


def test_opaque_ids_are_the_same_each_time_and_depend_on_the_key(settings):
    settings.PUBLIC_USER_IDS = "opaque"
    somebody = uuid.uuid4()
    first = public_id(somebody)

    assert public_id(somebody) == public_id(str(somebody)) == first != public_id(uuid.uuid4())
    settings.SECRET_KEY = "another key"
    assert public_id(somebody) != first


def test_everything_named_here_exists():
    text = (settings.BASE_DIR / "SECURITY.md").read_text()

    for name in re.findall(r"`([\w/]+\.py)`|\]\(([\w/.-]+)\)", text):
        assert Path(settings.BASE_DIR, *filter(None, name)).exists(), name
