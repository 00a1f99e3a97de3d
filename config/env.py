"""Read settings from the environment; a wrong value stops the start with one line."""

from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import environ

_env = environ.Env()


class InvalidSetting(SystemExit):
    """A variable of the environment has a value that can't be used.

    A ``SystemExit``, so that every entry point (manage.py, daphne, uvicorn, pytest)
    ends with this one line instead of a traceback.
    """

    def __init__(self, name: str, value: object, allowed: str) -> None:
        super().__init__(f"{name}={value!r} is not usable: {allowed}.")


def load_dotenv(path: Path) -> None:
    """Read ``path`` where it exists; variables that are already set win."""
    if path.is_file():
        environ.Env.read_env(str(path))


def is_set(name: str) -> bool:
    return bool(text(name, ""))


def text(name: str, default: str) -> str:
    return _env.str(name, default=default).strip()


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


def comma_separated(name: str, default: str = "") -> list[str]:
    return [part.strip() for part in text(name, default).split(",") if part.strip()]


def url(name: str, schemes: set[str], parse: Callable[[str], Any]) -> Any:
    """Return ``parse(value)``; the scheme must be one of ``schemes``."""
    value = text(name, "")
    allowed = f"allowed are URLs that start with {' or '.join(f'{s}://' for s in sorted(schemes))}"
    if urlsplit(value).scheme not in schemes:
        raise InvalidSetting(name, without_password(value), allowed)
    try:
        return parse(value)
    except Exception:
        raise InvalidSetting(name, without_password(value), allowed) from None


def without_password(value: str) -> str:
    """Return the URL ``value`` fit for a terminal or a log."""
    parts = urlsplit(value)
    return value.replace(f":{parts.password}@", ":***@") if parts.password else value
