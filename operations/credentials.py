"""What synthetic shoppers send to be somebody, in the identity mode of the installation."""

import hashlib
import hmac
import time
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path

import jwt
from django.conf import settings

from users import tokens
from users.exceptions import InvalidIdentity

# Returns the headers of a request without a body: method, path, user.
Credentials = Callable[[str, str, uuid.UUID], Mapping[str, str]]

TOKEN_SECONDS = 3600


class NoCredentials(Exception):
    """This installation can't be asked in the name of synthetic users; says why."""


def make_credentials() -> Credentials:
    """Return how to ask in a user's name, with the keys in this installation's settings.

    Raises:
        NoCredentials: only the identity provider can sign tokens.
    """
    if settings.IDENTITY_MODE == "header":
        return plain_header
    if settings.IDENTITY_MODE == "gateway":
        return signed_headers
    if not settings.JWT_KEY or not settings.JWT_ALGORITHMS[0].startswith("HS"):
        raise NoCredentials(
            "IDENTITY_MODE is jwt and this installation has public keys only: it can check "
            "tokens, not make them. Have the identity provider make tokens of test accounts "
            "and give them with --tokens FILE, one in a line."
        )
    return bearer_token


def plain_header(method: str, path: str, user: uuid.UUID) -> Mapping[str, str]:
    return {"X-User-Id": str(user)}


def signed_headers(method: str, path: str, user: uuid.UUID) -> Mapping[str, str]:
    """Sign as the gateway does; see docs/identity.md."""
    at = f"{time.time():.6f}"
    parts = (at, method, path, str(user), "", hashlib.sha256(b"").hexdigest())
    secret = settings.GATEWAY_SECRETS[0].encode()
    signature = hmac.digest(secret, ".".join(parts).encode(), "sha256").hex()
    return {"X-User-Id": str(user), "X-Auth-Signature": f"t={at},v1={signature}"}


def bearer_token(method: str, path: str, user: uuid.UUID) -> Mapping[str, str]:
    claims = {
        "sub": str(user),
        "aud": settings.JWT_AUDIENCE,
        "iss": settings.JWT_ISSUER,
        "exp": int(time.time()) + TOKEN_SECONDS,
    }
    token = jwt.encode(claims, settings.JWT_KEY, settings.JWT_ALGORITHMS[0])
    return {"Authorization": f"Bearer {token}"}


def read_tokens(file: Path) -> tuple[list[uuid.UUID], Credentials]:
    """Return the users of the tokens in ``file``, one token in a line, and how to use them.

    Raises:
        NoCredentials: this installation takes no tokens, or not one of these.
    """
    if settings.IDENTITY_MODE != "jwt":
        raise NoCredentials("--tokens is for IDENTITY_MODE=jwt.")
    by_user: dict[uuid.UUID, str] = {}
    for number, line in enumerate(file.read_text().split(), 1):
        try:
            user, *_ = tokens.verify(line)
        except InvalidIdentity as exc:
            raise NoCredentials(f"{file}, token {number}: {exc.detail}") from None
        by_user[user] = line

    def given_token(method: str, path: str, user: uuid.UUID) -> Mapping[str, str]:
        return {"Authorization": f"Bearer {by_user[user]}"}

    return list(by_user), given_token
