"""What clients send to say who they are, in each identity mode: rightly, and wrongly."""

import hashlib
import hmac
import json
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

import jwt
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import rsa
from django.test import override_settings

from config.openapi import rendered_schema
from users import tokens

SECRETS = ["first-secret-of-the-gateway-0123456789", "second-secret-of-the-gateway-987654321"]
AUDIENCE, ISSUER = "drops", "https://id.example.com/"

Headers = dict[str, str]


@lru_cache
def private_key(number: int = 0) -> rsa.RSAPrivateKey:
    return rsa.generate_private_key(public_exponent=65537, key_size=2048)


@lru_cache
def public_pem() -> str:
    public = private_key().public_key()
    form = serialization.PublicFormat.SubjectPublicKeyInfo
    return public.public_bytes(serialization.Encoding.PEM, form).decode()


def mode_settings(mode: str) -> dict[str, Any]:
    """Return the settings of an identity mode."""
    return {
        "header": {"IDENTITY_MODE": "header"},
        "gateway": {"IDENTITY_MODE": "gateway", "GATEWAY_SECRETS": SECRETS},
        "jwt": {
            "IDENTITY_MODE": "jwt",
            "JWT_ALGORITHMS": ["RS256"],
            "JWT_KEY": public_pem(),
            "JWT_JWKS_FILE": "",
            "JWT_AUDIENCE": AUDIENCE,
            "JWT_ISSUER": ISSUER,
        },
    }[mode]


@contextmanager
def identity_mode(mode: str, **changes: Any) -> Iterator[None]:
    forget_the_mode()
    with override_settings(**mode_settings(mode) | changes):
        yield
    forget_the_mode()


def forget_the_mode() -> None:
    """Forget what a process remembers for good: its mode doesn't change while it runs."""
    tokens.forget_verified()
    rendered_schema.cache_clear()


def signed(
    method: str,
    target: str,
    user: Any,
    body: bytes = b"",
    *,
    name: str | None = None,
    secret: str = SECRETS[0],
    at: float | str | None = None,
) -> Headers:
    """Return the headers of a gateway; written here once more, apart from the example's."""
    user_id = str(getattr(user, "pk", user))
    at = at if isinstance(at, str) else f"{time.time() if at is None else at:.6f}"
    digest = hashlib.sha256(body).hexdigest()
    text = ".".join([at, method, target, user_id, name or "", digest])
    signature = hmac.new(secret.encode(), text.encode(), "sha256").hexdigest()
    named = {} if name is None else {"X-User-Name": name}
    return {"X-User-Id": user_id, "X-Auth-Signature": f"t={at},v1={signature}"} | named


def token(user: Any, *, key: Any = None, algorithm: str = "RS256", **changes: Any) -> str:
    """Return a bearer token; a claim that is changed to None is left out."""
    claims = {
        "sub": str(getattr(user, "pk", user)),
        "aud": AUDIENCE,
        "iss": ISSUER,
        "exp": int(time.time()) + 300,
    } | changes
    claims = {name: value for name, value in claims.items() if value is not None}
    return jwt.encode(claims, key or private_key(), algorithm)


def bearer(user: Any, **changes: Any) -> Headers:
    return {"Authorization": f"Bearer {token(user, **changes)}"}


def swapped_algorithm(user: Any) -> Headers:
    """Sign with the public key as if it were a secret; PyJWT itself refuses to do that."""
    head, claims = token(user).split(".")[:2]
    head = encoded({"alg": "HS256", "typ": "JWT"})
    signature = hmac.digest(public_pem().encode(), f"{head}.{claims}".encode(), "sha256")
    return {"Authorization": f"Bearer {head}.{claims}.{base64url(signature)}"}


def without_algorithm(user: Any) -> Headers:
    head, claims = encoded({"alg": "none", "typ": "JWT"}), token(user).split(".")[1]
    return {"Authorization": f"Bearer {head}.{claims}."}


def encoded(value: Any) -> str:
    return base64url(json.dumps(value).encode())


def base64url(raw: bytes) -> str:
    return jwt.utils.base64url_encode(raw).decode()


def somebody() -> str:
    return str(uuid.uuid4())
