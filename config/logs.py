"""How a record becomes a line, and what opens doors stays out of it."""

import logging
import re
import sys
from typing import Any

import orjson
import structlog
from structlog.stdlib import ProcessorFormatter
from structlog.typing import EventDict, Processor

MASK = r"\1***"
SECRETS = [
    # Signatures, tokens, tickets, cookies and passwords, as headers, in addresses or in reprs.
    re.compile(r"(\bv1=)[0-9a-f]{16,}", re.I),
    re.compile(r"(\b(?:bearer|basic)\s+)[\w.~+/=-]{6,}", re.I),
    re.compile(r"(\beyJ)[\w-]+\.[\w-]+\.[\w-]*"),
    re.compile(r"(\b(?:sessionid|csrftoken)=)[^;\s\"',)]+", re.I),
    # A ticket as a socket's subprotocol.
    re.compile(r"(\bticket\.)[\w-]{16,}", re.I),
    # These may have nearly any character in them, and secrets stand in lists.
    re.compile(r"((?:secret|jwt)_?key[\"']?\s*[=:]\s*[\"']?)[^\s\"']+", re.I),
    re.compile(
        r"(secrets[\"']?\s*[=:]\s*)(?:\[[^]]*\]?|\([^)]*\)?|\"[^\"]*\"?|'[^']*'?|[^\s\"'&;)}]+)",
        re.I,
    ),
    re.compile(
        r"((?:ticket|secret|password|passwd|token|signature|api_?key)s?[\"']?\s*[=:]\s*[\"']?)"
        r"[^\s\"'&,;)}]+",
        re.I,
    ),
    # The password in a URL.
    re.compile(r"(\b[a-z][a-z0-9+.-]*://[^\s:/@]*:)[^\s/@]+(?=@)", re.I),
]
# Whose value is secret, whatever it looks like.
SECRET_NAME = re.compile(
    r"(?:ticket|secret|password|passwd|token|signature|(?:api|secret|jwt)_?key)s?$", re.I
)


def masked(text: str) -> str:
    for secret in SECRETS:
        text = secret.sub(MASK, text)
    return text


def masked_value(value: Any) -> Any:
    """Mask secrets in all the text that ``value`` holds, however deep, and under their names."""
    if isinstance(value, str):
        return masked(value)
    if isinstance(value, bytes):
        return masked(value.decode("latin-1")).encode("latin-1")
    if isinstance(value, dict):
        return {
            key: "***" if names_a_secret(key, inner) else masked_value(inner)
            for key, inner in value.items()
        }
    if isinstance(value, list | tuple):
        return [masked_value(inner) for inner in value]
    return value


def names_a_secret(key: Any, value: Any) -> bool:
    is_name = isinstance(key, str) and SECRET_NAME.search(key)
    return bool(is_name) and isinstance(value, str | bytes | list | tuple)


class MaskSecrets(logging.Filter):
    """Mask secrets in a record's message, and in its traceback."""

    def filter(self, record: logging.LogRecord) -> bool:
        message = record.getMessage()
        clean = masked(message)
        if clean != message:
            record.msg, record.args = clean, None
        if record.exc_info and not record.exc_text:
            # The formatter uses what is there already.
            record.exc_text = masked(logging.Formatter().formatException(record.exc_info))
        return True


class OnlyFailures(logging.Filter):
    """Leave out that a request was answered with an error, which its own line says."""

    def filter(self, record: logging.LogRecord) -> bool:
        return bool(record.exc_info)


def mask_values(logger: Any, name: str, event: EventDict) -> EventDict:
    """Mask secrets in all that is text, before it is quoted and escaped."""
    return {key: masked_value(value) for key, value in event.items()}


def to_json(event: EventDict, **kwargs: Any) -> str:
    return orjson.dumps(event, default=str, option=orjson.OPT_NON_STR_KEYS).decode()


def line_formatter(*, is_json: bool) -> ProcessorFormatter:
    """Return what makes one line of each record: of this project, of Django and of servers.

    Named in ``settings.LOGGING``; sets structlog up to use the same way.
    """
    common: list[Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.stdlib.add_logger_name,
        structlog.stdlib.add_log_level,
        structlog.processors.TimeStamper(fmt="iso" if is_json else "%H:%M:%S", utc=True),
    ]
    structlog.configure(
        processors=[*common, ProcessorFormatter.wrap_for_formatter],
        logger_factory=structlog.stdlib.LoggerFactory(),
        wrapper_class=structlog.stdlib.BoundLogger,
        cache_logger_on_first_use=True,
    )
    if is_json:
        # Python's own warnings would be lines of another kind.
        logging.captureWarnings(True)
    renderer: Processor = (
        structlog.processors.JSONRenderer(serializer=to_json)
        if is_json
        else structlog.dev.ConsoleRenderer(colors=sys.stderr.isatty(), pad_event_to=0)
    )
    return ProcessorFormatter(
        foreign_pre_chain=common,
        processors=[
            ProcessorFormatter.remove_processors_meta,
            structlog.processors.format_exc_info,
            mask_values,
            renderer,
        ],
    )
