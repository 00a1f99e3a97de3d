"""Carry out a signed request once, whichever process it and its repetitions reach.

Redis knows the signatures of the last two minutes. While it is away each process knows
its own, and sales go on; docs/adr/0010 says what that leaves open.
"""

import asyncio
import logging
import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from django.conf import settings

from config.redis import ask_redis, client
from users.exceptions import InvalidIdentity
from users.identity import SIGNATURE_SECONDS, Identity

logger = logging.getLogger(__name__)

# A signature may be as far ahead of our clock as behind it.
LIFETIME_SECONDS = 2 * SIGNATURE_SECONDS + 1
# For the time without Redis; the oldest go first.
MAX_OWN = 100_000

USE_ALL = """
local is_new = {}
for i, key in ipairs(KEYS) do
    is_new[i] = redis.call('SET', key, '', 'NX', 'EX', ARGV[1]) and 1 or 0
end
return is_new
"""


class UsedSignatures:
    """Signatures that arrive while Redis is being asked go out together with the next question.

    One round trip per request would cost a busy process a quarter of its time.
    """

    def __init__(self) -> None:
        self._own: dict[bytes, float] = {}
        self._waiting: list[tuple[bytes, Future[bool]]] = []
        self._lock = threading.Lock()
        self._is_asking = False
        self._executor = ThreadPoolExecutor(1, thread_name_prefix="used-signatures")

    def use(self, signature: bytes) -> "Future[bool]":
        """Return whether this is the first use of ``signature``."""
        is_first: Future[bool] = Future()
        with self._lock:
            if not self._is_own_first(signature):
                is_first.set_result(False)
                return is_first
            self._waiting.append((signature, is_first))
            if not self._is_asking:
                self._is_asking = True
                self._executor.submit(self._ask)
        return is_first

    def _is_own_first(self, signature: bytes) -> bool:
        now = time.monotonic()
        if self._own.get(signature, float("-inf")) > now:
            return False
        self._own.pop(signature, None)
        self._own[signature] = now + LIFETIME_SECONDS
        while len(self._own) > MAX_OWN or next(iter(self._own.values())) <= now:
            del self._own[next(iter(self._own))]
        return True

    def _ask(self) -> None:
        while True:
            with self._lock:
                batch, self._waiting = self._waiting, []
                if not batch:
                    self._is_asking = False
                    return
            signatures = [signature for signature, _ in batch]
            unknown = [True] * len(signatures)
            try:
                answers = ask_redis(lambda: use_all(signatures), lambda: unknown)  # noqa: B023 - called at once
            except Exception:
                # Those who wait must be answered, and those who come next be asked for.
                logger.exception("Redis can't be asked for used signatures")
                answers = unknown
            for (_, is_first), answer in zip(batch, answers, strict=True):
                # Its request may have been given up meanwhile.
                if is_first.set_running_or_notify_cancel():
                    is_first.set_result(answer)


def use_all(signatures: list[bytes]) -> list[bool]:
    prefix = f"{settings.CHANNEL_PREFIX}:signature:"
    keys = [f"{prefix}{signature.hex()}" for signature in signatures]
    answers: Any = client().eval(USE_ALL, len(keys), *keys, LIFETIME_SECONDS)
    return [answer == 1 for answer in answers]


_used = UsedSignatures()


def refuse_replay(identity: Identity) -> None:
    """Let the request of ``identity`` pass once.

    Raises:
        InvalidIdentity: it passed before, here or in another process.
    """
    if identity.signature is not None and not _used.use(identity.signature).result():
        raise InvalidIdentity(REPLAYED)


async def refuse_replay_soon(identity: Identity) -> None:
    """Do the same in an event loop."""
    if identity.signature is not None and not await asyncio.wrap_future(
        _used.use(identity.signature)
    ):
        raise InvalidIdentity(REPLAYED)


REPLAYED = "This signed request was carried out already; sign a new one with a new time."
