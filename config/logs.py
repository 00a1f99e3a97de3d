"""Keep what opens doors out of the logs."""

import logging
import re

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
