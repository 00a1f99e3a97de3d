"""Read settings from the environment; a wrong value stops the start with one line."""

import json
import os
import re
from collections.abc import Callable
from io import StringIO
from ipaddress import IPv4Network, IPv6Network, ip_network
from pathlib import Path
from typing import Any

import environ
import jwt
from redis.connection import parse_url

from config.logs import masked

SECRET_LENGTH = 32
# How the secrets of docs/examples begin, which everybody can read.
PLACEHOLDER = "change-me"
PUBLIC_KEY_ALGORITHMS = {
    *("RS256", "RS384", "RS512", "PS256", "PS384", "PS512"),
    *("ES256", "ES384", "ES512", "EdDSA"),
}
SECRET_ALGORITHMS = {"HS256", "HS384", "HS512"}
# Up to the last @: a password that is not quoted may hold one, or a slash.
PASSWORD = re.compile(r"(//[^:/@]*:).*@", re.S)
# The lines of .env that django-environ reads, and those that say nothing.
ENTRY = re.compile(r"(?:export )?[A-Za-z_0-9]+=.*")
REMARK = re.compile(r"\s*(?:#.*)?")
ORIGIN = re.compile(r"[a-z][a-z0-9+.-]*://[^/?#@\sA-Z]+")
RATE = re.compile(r"[1-9][0-9]{0,8}/(second|minute|hour|day)")


class InvalidSetting(SystemExit):
    """A variable of the environment has a value that can't be used.

    A ``SystemExit``, so that every entry point (manage.py, daphne, uvicorn, pytest)
    ends with this one line instead of a traceback.
    """

    def __init__(self, name: str, value: object, allowed: str) -> None:
        super().__init__(f"{name}={value!r} is not usable: {allowed}.")


def load_dotenv(path: Path) -> None:
    """Read ``path`` where it exists and may be read; variables that are already set win."""
    try:
        lines = path.read_text("utf-8-sig").splitlines() if path.is_file() else []
    except OSError:
        return
    for number, line in enumerate(lines, 1):
        if not (ENTRY.fullmatch(line) or REMARK.fullmatch(line)):
            # Not shown: django-environ would print it, and leave out what it sets.
            raise SystemExit(f"{path}, line {number}, is not usable: it must be NAME=value.")
    environ.Env.read_env(StringIO("\n".join(filter(ENTRY.fullmatch, lines))))


def is_set(name: str) -> bool:
    return bool(text(name, ""))


def text(name: str, default: str) -> str:
    # Not by django-environ: it takes what begins with $ for the name of another variable.
    return os.environ.get(name, default).strip()


def required(name: str, why: str) -> str:
    value = text(name, "")
    if not value:
        raise InvalidSetting(name, value, f"it must be set {why}")
    return value


def boolean(name: str, default: bool) -> bool:
    value = text(name, str(default)).lower()
    if value in {"true", "1", "yes", "on"}:
        return True
    if value in {"false", "0", "no", "off"}:
        return False
    raise InvalidSetting(name, value, "allowed are true and false")


def integer(name: str, default: int, *, minimum: int, maximum: int) -> int:
    value = text(name, str(default))
    allowed = f"allowed are whole numbers from {minimum} to {maximum}"
    try:
        number = int(value)
    except ValueError:
        raise InvalidSetting(name, value, allowed) from None
    if not minimum <= number <= maximum:
        raise InvalidSetting(name, value, allowed)
    return number


def choice(name: str, default: str, allowed: tuple[str, ...]) -> str:
    value = text(name, default).lower()
    if value not in allowed:
        raise InvalidSetting(name, value, f"allowed are {', '.join(allowed)}")
    return value


def comma_separated(name: str, default: str = "") -> list[str]:
    return [part.strip() for part in text(name, default).split(",") if part.strip()]


def secrets(name: str, *, at_most: int) -> list[str]:
    """Return one secret, or more so that they can be exchanged; none of them is ever shown."""
    values = comma_separated(name)
    if not 1 <= len(values) <= at_most or any(len(v) < SECRET_LENGTH for v in values):
        allowed = f"1 to {at_most} secrets, comma-separated, of {SECRET_LENGTH} characters or more"
        raise InvalidSetting(name, "***" if values else "", f"it must be {allowed}")
    for value in values:
        refuse_placeholder(name, value)
    return values


def secret(name: str) -> str:
    """Return a secret, or nothing where none is set; it is never shown."""
    value = text(name, "")
    if value and len(value) < SECRET_LENGTH:
        raise InvalidSetting(name, "***", f"it must have {SECRET_LENGTH} characters or more")
    refuse_placeholder(name, value)
    return value


def secret_key(name: str) -> str:
    """Return Django's secret, for outside DEBUG."""
    value = required(name, "when DEBUG is off (50 random characters or more)")
    refuse_placeholder(name, value)
    return value


def refuse_placeholder(name: str, value: str) -> None:
    if value.lower().startswith(PLACEHOLDER):
        allowed = f"{PLACEHOLDER}... stands in the examples for a random secret of your own"
        raise InvalidSetting(name, f"{PLACEHOLDER}...", allowed)


def folder(name: str) -> str:
    """Return the folder ``name``, made where it doesn't exist; empty where none is set."""
    value = text(name, "")
    if value:
        try:
            Path(value).mkdir(parents=True, exist_ok=True)
        except OSError as exc:
            raise InvalidSetting(name, value, f"it must be a folder: {exc.strerror}") from None
        if not os.access(value, os.W_OK):
            raise InvalidSetting(name, value, "this process can't write there")
    return value


def jwt_algorithms(name: str, default: str) -> list[str]:
    """Return algorithms that all take the same kind of key.

    With both kinds allowed, whoever knows a public key could sign with it as with a secret.
    """
    values = comma_separated(name, default)
    kinds = (PUBLIC_KEY_ALGORITHMS, SECRET_ALGORITHMS)
    if not values or not any(set(values) <= kind for kind in kinds):
        allowed = " or ".join(", ".join(sorted(kind)) for kind in kinds)
        raise InvalidSetting(name, ",".join(values), f"allowed are some of {allowed}")
    return values


def jwt_key(name: str, algorithms: list[str]) -> str:
    """Return a PEM or a secret with which tokens of one of ``algorithms`` can be verified."""
    value = required(name, "when IDENTITY_MODE is jwt, unless JWT_JWKS_FILE is")
    is_secret = set(algorithms) <= SECRET_ALGORITHMS
    # A PEM in .env has its line breaks written as \n.
    value = secret(name) if is_secret else value.replace("\\n", "\n")
    if not any(is_key_for(algorithm, value) for algorithm in algorithms):
        raise InvalidSetting(name, "***", f"it must be a key for {', '.join(algorithms)}")
    return value


def is_key_for(algorithm: str, key: str) -> bool:
    try:
        jwt.get_algorithm_by_name(algorithm).prepare_key(key)
    except (jwt.PyJWTError, ValueError, TypeError):
        return False
    return True


def jwks_file(name: str, algorithms: list[str]) -> str:
    """Return the path of a file with a key for ``algorithms``; empty where none is set."""
    value = text(name, "")
    if value:
        try:
            keys = read_jwks(value).keys
        except OSError as exc:
            raise InvalidSetting(name, value, f"it can't be read: {exc.strerror}") from None
        except ValueError:
            raise InvalidSetting(name, value, "there is no usable key in this file") from None
        # A key that names no algorithm is for the usual one of its kind.
        if not any(key.algorithm_name in algorithms for key in keys):
            allowed = f"there is no key for {', '.join(algorithms)} in this file"
            raise InvalidSetting(name, value, allowed)
    return value


def read_jwks(path: str) -> jwt.PyJWKSet:
    """Return the keys in a JWKS file.

    Raises:
        OSError: it can't be read.
        ValueError: there is no usable key in it.
    """
    document = Path(path).read_text()
    try:
        return jwt.PyJWKSet.from_dict(json.loads(document))
    except (AttributeError, jwt.PyJWTError) as exc:
        # AttributeError: JSON, but no object.
        raise ValueError(f"no JWKS: {exc}") from exc


def networks(name: str) -> list[IPv4Network | IPv6Network]:
    try:
        return [ip_network(value) for value in comma_separated(name)]
    except ValueError as exc:
        raise InvalidSetting(name, text(name, ""), f"allowed are IP networks; {exc}") from None


def origins(name: str, default: str) -> list[str]:
    """Return origins as browsers write them, or only ``*``; another spelling would fit none."""
    values = comma_separated(name, default)
    if values != ["*"] and not all(ORIGIN.fullmatch(value) for value in values):
        allowed = "allowed are origins like https://shop.example.com, comma-separated, or *"
        raise InvalidSetting(name, ",".join(values), allowed)
    return values


def sentry_dsn(name: str) -> str:
    """Return where errors go; empty where none is set, and then Sentry is not imported."""
    value = text(name, "")
    if value:
        from sentry_sdk.utils import Dsn

        try:
            Dsn(value)
        except ValueError:
            raise InvalidSetting(name, "***", "it must be a DSN of Sentry") from None
    return value


def rate(name: str, default: str) -> str:
    """Return a rate like ``60/minute``, empty for ``off``."""
    value = text(name, default).lower()
    if value == "off":
        return ""
    if not RATE.fullmatch(value):
        raise InvalidSetting(name, value, "allowed are rates like 60/minute or 5/second, and off")
    return value


def url(name: str, schemes: set[str], parse: Callable[[str], Any]) -> Any:
    """Return ``parse(value)``; the scheme must be one of ``schemes``."""
    value = text(name, "")
    allowed = f"allowed are URLs that start with {' or '.join(f'{s}://' for s in sorted(schemes))}"
    if value.partition("://")[0].lower() not in schemes:
        raise InvalidSetting(name, without_password(value), allowed)
    try:
        return parse(value)
    except Exception:
        raise InvalidSetting(name, without_password(value), allowed) from None


def readable_redis_url(value: str) -> str:
    """Return ``value`` if Redis' client can read it; it would be asked for each connection.

    Raises:
        ValueError: it can't, as where a password that is not quoted makes something else of it.
    """
    parse_url(value)
    return value


def without_password(value: str) -> str:
    """Return ``value`` fit for a terminal or a log, also where its password makes it no URL."""
    return masked(PASSWORD.sub(r"\1***@", value))
