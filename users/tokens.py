"""Verify bearer tokens (JWT) of one's own identity provider."""

import hashlib
import logging
import os
import re
import threading
import time
import uuid
from typing import Any

import jwt
from django.conf import settings
from jwt import PyJWKSet, PyJWTError

from config.env import read_jwks
from users.exceptions import InvalidIdentity

logger = logging.getLogger(__name__)

# Only the usual form: what uuid.UUID also takes (braces, urn:, no hyphens) would give one
# person several spellings in logs, caches and rate limits, and one id to several subjects.
USUAL_UUID = re.compile(r"[0-9a-fA-F]{8}(-[0-9a-fA-F]{4}){3}-[0-9a-fA-F]{12}")
REQUIRED = ["exp", "aud", "iss", "sub"]
MAX_TOKEN_LENGTH = 8192
# What the clocks of the provider and of this machine may differ by.
LEEWAY_SECONDS = 5
MAX_REMEMBERED = 50_000
# How soon a key that was added to the file is known.
FILE_SECONDS = 10.0

# Who a token stands for, and until when, by its digest: a verification costs as much as the
# rest of a hot request.
_verified: dict[bytes, tuple[uuid.UUID, str | None, float]] = {}


def verify(token: str) -> tuple[uuid.UUID, str | None, float]:
    """Return the user id and the name that ``token`` vouches for, and until when (Unix time).

    Raises:
        InvalidIdentity: it is no valid token for this service at this time.
    """
    if not token.isascii() or len(token) > MAX_TOKEN_LENGTH:
        raise InvalidIdentity("The token can't be read.")
    if settings.JWT_JWKS_FILE:
        # First, because a key that was taken away takes its remembered tokens with it.
        key_file.refresh()
    # Another thread may find new keys before this token is verified: it is remembered beside
    # those of the old ones, which nobody asks for any more.
    verified = _verified
    digest = hashlib.sha256(token.encode()).digest()
    known = verified.get(digest)
    if known is None:
        claims = read_claims(token)
        known = user_id_of(claims), name_of(claims), claims["exp"] + LEEWAY_SECONDS
        if len(verified) >= MAX_REMEMBERED:
            verified.clear()
        verified[digest] = known
    if time.time() >= known[2]:
        verified.pop(digest, None)
        raise InvalidIdentity("The token is not valid: Signature has expired.")
    return known


def forget_verified() -> None:
    """Verify every token anew: the keys, or what is asked of tokens, have changed."""
    global _verified
    _verified = {}


def read_claims(token: str) -> dict[str, Any]:
    try:
        claims = jwt.decode(
            token,
            key_for(token),
            # The list is ours: a token that names another algorithm, or none, is refused.
            algorithms=settings.JWT_ALGORITHMS,
            audience=settings.JWT_AUDIENCE,
            issuer=settings.JWT_ISSUER,
            leeway=LEEWAY_SECONDS,
            options={"require": REQUIRED},
        )
        return claims | {"exp": float(claims["exp"])}
    except PyJWTError as exc:
        raise InvalidIdentity(f"The token is not valid: {exc}") from None
    except (ValueError, TypeError, LookupError, OverflowError, RecursionError):
        # Odd JSON, numbers that are no times, a key that is not in the file.
        raise InvalidIdentity("The token can't be read.") from None


def key_for(token: str) -> Any:
    """Return the key that must have signed ``token``.

    Raises:
        PyJWTError: the token names no key of the JWKS file.
    """
    if settings.JWT_KEY:
        return settings.JWT_KEY
    key_id = jwt.get_unverified_header(token).get("kid")
    keys = key_file.keys
    if key_id is None and len(keys.keys) == 1:
        return keys.keys[0]
    return keys[str(key_id)]


def user_id_of(claims: dict[str, Any]) -> uuid.UUID:
    """Return ``sub``, or where that is no UUID in the usual form, one that stands for it.

    Raises:
        InvalidIdentity: it can't stand for anybody.
    """
    subject = claims["sub"]
    if not USUAL_UUID.fullmatch(subject):
        return hashed_id(claims["iss"], subject)
    user_id = uuid.UUID(subject)
    if not user_id.int:
        raise InvalidIdentity("The token is not valid: its sub is the nil UUID.")
    return user_id


def hashed_id(issuer: str, subject: str) -> uuid.UUID:
    try:
        return uuid.uuid5(uuid.NAMESPACE_URL, f"{issuer}\n{subject}")
    except UnicodeEncodeError:
        # JSON can hold halves of characters.
        raise InvalidIdentity("The token can't be read.") from None


def name_of(claims: dict[str, Any]) -> str | None:
    names = (claims.get(claim) for claim in ("name", "preferred_username"))
    return next((name for name in names if isinstance(name, str)), None)


class KeyFile:
    """The provider's public keys, read again when the file changes."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._source: tuple[str, int, int] | None = None
        self._next_look = float("-inf")
        self.keys: PyJWKSet

    def refresh(self) -> None:
        """Look at the file, unless that was done a moment ago.

        Raises:
            OSError, ValueError: it can't be used, and never could.
        """
        path = settings.JWT_JWKS_FILE
        if self._source and self._source[0] == path and time.monotonic() < self._next_look:
            return
        with self._lock:
            self._next_look = time.monotonic() + FILE_SECONDS
            try:
                status = os.stat(path)
                source = (path, status.st_mtime_ns, status.st_ino)
                if source != self._source:
                    self.keys = read_jwks(path)
                    self._source = source
                    forget_verified()
            except (OSError, ValueError):
                if not self._source or self._source[0] != path:
                    raise
                # Half written, perhaps. The old keys go on until it can be read.
                logger.exception("JWT_JWKS_FILE can't be read")


key_file = KeyFile()
