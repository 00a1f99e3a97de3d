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
    re.compile(
        r"((?:ticket|secret|password|passwd|token|signature|api_?key)s?[\"']?\s*[=:]\s*[\"']?)"
        r"[^\s\"'&,;)}]+",
        re.I,
    ),
    # The password in a URL.
    re.compile(r"(\b[a-z][a-z0-9+.-]*://[^\s:/@]*:)[^\s/@]+(?=@)", re.I),
]


def masked(text: str) -> str:
    for secret in SECRETS:
        text = secret.sub(MASK, text)
    return text


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
    return {key: masked(value) if isinstance(value, str) else value for key, value in event.items()}


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
