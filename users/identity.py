"""Who is asking? One answer for viewsets, hot routes and sockets.

How a request shows it depends on ``settings.IDENTITY_MODE``; see docs/identity.md.
"""

import hashlib
import hmac
import re
import time
import uuid
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

from django.conf import settings
from django.utils.crypto import salted_hmac

from config.quick_settings import quick_settings
from users import tokens
from users.exceptions import InvalidIdentity, UnknownUser
from users.models import User
from users.tokens import USUAL_UUID

NAME_LENGTH = range(3, 51)
NOT_PRINTABLE = re.compile(
    r"[\x00-\x1f\x7f-\x9f\u061c\u180e\u200b-\u200f\u2028-\u202e\u2060-\u2069"
    # Hyphens that are not shown, joiners, letters and patterns that are blank, marks of notes.
    r"\u00ad\u034f\u115f\u1160\u17b4\u17b5\u2800\u3164\uffa0\ufff9-\ufffb"
    # Halves of characters, which JSON can hold and the database can't; tags.
    r"\ud800-\udfff\ufeff\U000e0000-\U000e007f]"
)

SIGNATURE = re.compile(r"t=([0-9]{1,12}(?:\.[0-9]{1,6})?),v1=([0-9a-f]{64})")
SIGNATURE_SECONDS = 60
# Around a header's value, and no more than these: where UTF-8 is still read as Latin-1, what
# str.strip() takes for blanks is half of an à or an Å.
BLANKS = " \t"
# The signed parts are joined by dots, and a name may look like the end of another request's
# address with another user behind it, an address like the beginning of another request's name.
# No address of ours has a UUID after a dot, and nobody's name is one with a dot behind it.
ADDRESS_READS_TWO_WAYS = re.compile(rb"\." + USUAL_UUID.pattern.encode())
NAME_READS_TWO_WAYS = re.compile(rf"(?:^|\.){USUAL_UUID.pattern}\.")
CHANGES_NOTHING = frozenset({"GET", "HEAD", "OPTIONS"})


@dataclass(frozen=True, slots=True)
class Identity:
    """Who a request says it is from: well-formed and verified, but not yet looked up."""

    user_id: uuid.UUID
    name: str | None
    # Set where the request may be carried out only once.
    signature: bytes | None = field(default=None, compare=False)
    # The Unix time from which on it is no longer vouched for; None where that has no end.
    expires_at: float | None = field(default=None, compare=False)


@dataclass(frozen=True, slots=True)
class Asking:
    """As much of a request as its identity depends on.

    ``target`` is the path with the query as the client wrote it. ``header`` takes names in
    lower case and joins repeated headers by commas, which none of the readers accept.
    """

    method: str
    target: bytes
    header: Callable[[str], str | None]
    body: Callable[[], bytes]
    opens_socket: bool = False


def identify(asking: Asking) -> Identity | None:
    """Return who is asking, or None for nobody in particular.

    Raises:
        InvalidIdentity: what the request says about it can't be read, or is not proven.
    """
    return READERS[quick_settings.IDENTITY_MODE](asking)


def identify_socket(scope: dict[str, Any]) -> Identity | None:
    """Return who opens a WebSocket; see ``identify``. A signature opens one."""
    header = joined_headers(scope).get
    return identify(Asking("GET", raw_target(scope), header, bytes, opens_socket=True))


def joined_headers(scope: dict[str, Any]) -> dict[str, str]:
    """Return the headers by name in lower case; repeated ones are joined by commas."""
    headers: dict[str, str] = {}
    for name, value in scope["headers"]:
        key, text = name.decode("latin-1"), value.decode("latin-1")
        headers[key] = f"{headers[key]},{text}" if key in headers else text
    return headers


def raw_target(scope: dict[str, Any]) -> bytes:
    """Return path and query as they stood on the request line."""
    path = scope.get("raw_path") or scope["path"].encode()
    query = scope["query_string"]
    return b"%b?%b" % (path, query) if query else path


def read_headers(asking: Asking) -> Identity | None:
    return read_identity(asking.header("x-user-id"), asking.header("x-user-name"))


def read_signed_headers(asking: Asking) -> Identity | None:
    """Return the identity that a gateway has signed, together with the whole request."""
    user_id, name = asking.header("x-user-id"), asking.header("x-user-name")
    given = asking.header("x-auth-signature")
    if user_id is None and given is None:
        return None
    parts = SIGNATURE.fullmatch(given.strip(BLANKS)) if given else None
    if user_id is None or parts is None:
        raise InvalidIdentity(
            "X-User-Id needs an X-Auth-Signature like t=1795370400.25,v1=<64 hex digits>."
        )
    if abs(time.time() - float(parts[1])) > SIGNATURE_SECONDS:
        raise InvalidIdentity("The signature's time is more than 60 seconds away from now.")
    signed_name = (name or "").strip(BLANKS)
    signed = signed_text(parts[1], asking, user_id.strip(BLANKS), signed_name)
    if reads_two_ways(asking.target, signed_name) or not is_signed(signed, parts[2]):
        raise InvalidIdentity("The signature does not belong to this request.")
    identity = read_identity(user_id, name)
    may_repeat = asking.method in CHANGES_NOTHING and not asking.opens_socket
    if identity is None or may_repeat:
        return identity
    return Identity(identity.user_id, identity.name, bytes.fromhex(parts[2]))


def signed_text(at: str, asking: Asking, user_id: str, name: str) -> bytes:
    return b".".join(
        (
            at.encode(),
            asking.method.encode(),
            asking.target,
            # Servers hand over as Latin-1 what the client sent.
            user_id.encode("latin-1", "replace"),
            name.encode("latin-1", "replace"),
            hashlib.sha256(asking.body()).hexdigest().encode(),
        )
    )


def reads_two_ways(target: bytes, name: str) -> bool:
    return bool(ADDRESS_READS_TWO_WAYS.search(target) or NAME_READS_TWO_WAYS.search(name))


def is_signed(text: bytes, signature: str) -> bool:
    """Say whether one of the secrets signed ``text``; two at once let them be exchanged."""
    return any(
        hmac.compare_digest(hmac.digest(secret.encode(), text, "sha256").hex(), signature)
        for secret in settings.GATEWAY_SECRETS
    )


def read_bearer_token(asking: Asking) -> Identity | None:
    given = asking.header("authorization")
    if given is None:
        return None
    scheme, _, token = given.strip().partition(" ")
    if scheme.lower() != "bearer":
        raise InvalidIdentity("Authorization must be a bearer token.")
    user_id, name, expires_at = tokens.verify(token.strip())
    return Identity(user_id, clean_name(name), expires_at=expires_at)


READERS: dict[str, Callable[[Asking], Identity | None]] = {
    "header": read_headers,
    "gateway": read_signed_headers,
    "jwt": read_bearer_token,
}


def read_identity(user_id: str | None, name: str | None) -> Identity | None:
    """Return the identity that the two header values carry, or None without ``X-User-Id``.

    Raises:
        InvalidIdentity: the id is not one UUID in the usual form. Repeated headers
            arrive joined by a comma, so they end here too.
    """
    if user_id is None:
        return None
    text = user_id.strip(BLANKS)
    if not USUAL_UUID.fullmatch(text):
        raise InvalidIdentity
    parsed = uuid.UUID(text)
    if not parsed.int:
        raise InvalidIdentity
    return Identity(parsed, usable_name(name))


def usable_name(header: str | None) -> str | None:
    """Return the name in a header; see ``clean_name``."""
    return clean_name(decode(header)) if header else None


def clean_name(name: str | None) -> str | None:
    """Return ``name`` trimmed, without invisible characters, at most 50 long; None if under 3."""
    cleaned = NOT_PRINTABLE.sub("", name or "").strip()[: NAME_LENGTH.stop - 1].strip()
    return cleaned if len(cleaned) in NAME_LENGTH else None


def decode(header: str) -> str:
    """Read as UTF-8 what servers hand over as Latin-1; keep it where it is no UTF-8."""
    try:
        return header.encode("latin-1").decode()
    except UnicodeError:
        return header


def public_id(user_id: uuid.UUID | str) -> str:
    """Return how everybody may know a user: by the id, or by a hash that doesn't give it away.

    The hash is a UUID too (version 8), so that clients need not care, and the same for ever
    as long as SECRET_KEY is.
    """
    if settings.PUBLIC_USER_IDS == "plain":
        return str(user_id)
    digest = salted_hmac("users.public_id", str(user_id), algorithm="sha256").digest()
    value = int.from_bytes(digest[:16]) & ~(0xF << 76) | 8 << 76
    return str(uuid.UUID(int=value & ~(0b11 << 62) | 0b10 << 62))


def get_user(identity: Identity) -> User:
    """Return the active user behind ``identity``; a new one is made unless settings say no.

    Any number of first requests of one UUID may run at once: one row comes of it.

    Raises:
        UnknownUser: there is no such user, or staff switched it off.
    """
    user = User.objects.filter(pk=identity.user_id).first()
    if user is None and settings.CREATE_UNKNOWN_USERS:
        create_users([identity])
        user = User.objects.filter(pk=identity.user_id).first()
    if user is None or not user.is_active:
        raise UnknownUser
    return user


def refuse_unknown(identity: Identity) -> None:
    """Check that ``identity`` may be somebody, without making a user: to look is no reason to.

    Raises:
        UnknownUser: staff switched the user off, or nobody new becomes one.
    """
    is_active = User.objects.filter(pk=identity.user_id).values_list("is_active", flat=True).first()
    if is_active is False or (is_active is None and not settings.CREATE_UNKNOWN_USERS):
        raise UnknownUser


def create_users(identities: Iterable[Identity]) -> None:
    """Make users of those ``identities`` that are none yet; a taken name gets a suffix."""
    missing = {identity.user_id: identity for identity in identities}
    for name_of in NAME_ATTEMPTS:
        for pk in User.objects.filter(pk__in=missing).values_list("pk", flat=True):
            del missing[pk]
        if not missing:
            return
        # Skips a taken name and a twin request's row alike, without failing the transaction.
        User.objects.bulk_create(
            [
                User(pk=pk, username=name_of(identity), password="")
                for pk, identity in missing.items()
            ],
            ignore_conflicts=True,
        )


def wanted_name(identity: Identity) -> str:
    return identity.name or f"user_{public_hex(identity)[:12]}"


def public_hex(identity: Identity) -> str:
    """Return digits for a made-up name: everybody sees it, so they give away no hidden id."""
    return uuid.UUID(public_id(identity.user_id)).hex


# The second is free as a rule. The third is the id, or the hash of it: free unless somebody has
# taken it on purpose, who can't foresee the last.
NAME_ATTEMPTS: tuple[Callable[[Identity], str], ...] = (
    wanted_name,
    lambda identity: f"{wanted_name(identity)}_{public_hex(identity)[-6:]}",
    public_hex,
    lambda identity: uuid.uuid4().hex,
)
