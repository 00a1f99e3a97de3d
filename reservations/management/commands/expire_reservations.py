import logging
import time
from typing import Any

from django.conf import settings
from django.core.management.base import CommandError, CommandParser
from django.db import close_old_connections

from config.commands import DatabaseCommand
from config.garbage import collect_seldom
from config.problems import care_for_connections, may_pass
from config.stopping import StopRequest
from drops.services import announce_windows
from operations import metrics
from operations.exposition import serve_metrics
from operations.health import EXPIRY
from operations.heartbeats import Pulse
from reservations.services import (
    MAX_EXPIRED_PER_TRANSACTION,
    expire_all_due,
    expire_drops,
    expire_due,
    seconds_until_next_deadline,
)

logger = logging.getLogger(__name__)


# Holds that end one after the other in a rush go back together instead of one by one:
# each sweep locks the drop that buyers want.
SHORTEST_PAUSE_SECONDS = 0.05
# How long drops that are known to have more are swept before others that are due are looked for.
LONGEST_BACKLOG_SECONDS = 0.25
PAUSE_WITHOUT_DATABASE_SECONDS = 0.5
# A window may be set at any time to open in a moment, and clients shall know within a second.
WINDOW_PAUSE_SECONDS = 0.5


class Command(DatabaseCommand):
    # By the monotonic clock, when windows were last looked at.
    announced_at = 0.0
    # Whether the last step could do its work; only then this process says that it lives.
    is_working = False

    help = (
        "Return overdue units to stock, and announce windows that open and close, until "
        "stopped. Any number of copies may run."
    )

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.pulse = Pulse(EXPIRY)

    def add_arguments(self, parser: CommandParser) -> None:
        parser.add_argument("--once", action="store_true", help="expire what is due now, and end")
        parser.add_argument(
            "--batch",
            type=int,
            default=MAX_EXPIRED_PER_TRANSACTION,
            metavar="N",
            help="holds per transaction and drop (default: %(default)s)",
        )

    def handle(self, *, once: bool, batch: int, **options: Any) -> None:
        if batch < 1:
            raise CommandError("--batch must be 1 or more.")
        if once:
            announce_windows()
            count = sum(len(holds.reservation_ids) for holds in expire_all_due(batch))
            self.stdout.write(f"{count} reservations expired.")
            return
        if settings.EXPIRY_METRICS_PORT:
            serve_metrics(settings.EXPIRY_METRICS_PORT)
        collect_seldom()
        with StopRequest() as stop:
            logger.info("expiring reservations; stop with Ctrl-C")
            while not stop.is_set:
                self.wait(self.step(batch), stop)
        logger.info("stopped")

    def wait(self, seconds: float, stop: StopRequest) -> None:
        """Wait for the next step, and meanwhile announce windows that open and close."""
        due_at = time.monotonic() + seconds
        while not stop.is_set:
            self.announce_now_and_then()
            left = due_at - time.monotonic()
            if left <= 0 or stop.wait(min(left, WINDOW_PAUSE_SECONDS)):
                return

    def announce_now_and_then(self) -> None:
        if time.monotonic() - self.announced_at >= WINDOW_PAUSE_SECONDS:
            self.announce()

    def announce(self) -> None:
        self.announced_at = time.monotonic()
        try:
            if self.is_working:
                self.pulse.beat()
            metrics.flush()
            if told := announce_windows():
                logger.info("%d windows opened or closed", told)
        except Exception as exc:
            if not may_pass(exc):
                raise
            logger.warning("the database can't be reached, trying again: %s", exc)
            care_for_connections(exc)
            close_old_connections()

    def step(self, batch: int) -> float:
        """Expire one batch per drop; return how many seconds nothing more is due."""
        # Gives the connection back to the pool, which replaces it where it died.
        close_old_connections()
        self.is_working = False
        try:
            # Holds of hundreds of drops take seconds, and windows can't wait for them.
            swept = expire_due(batch, self.announce_now_and_then)
            self.is_working = True
            look_again_at = time.monotonic() + LONGEST_BACKLOG_SECONDS
            while backlog := [h.drop_id for h in swept if len(h.reservation_ids) >= batch]:
                if time.monotonic() >= look_again_at:
                    return 0
                swept = expire_drops(backlog, batch, self.announce_now_and_then)
            next_deadline = seconds_until_next_deadline()
        except Exception as exc:
            if not may_pass(exc):
                raise
            logger.warning("the database can't be reached, trying again: %s", exc)
            care_for_connections(exc)
            return PAUSE_WITHOUT_DATABASE_SECONDS
        for holds in swept:
            logger.info("drop %s: %d holds expired", holds.drop_id, len(holds.reservation_ids))
        # Who holds something a moment from now must not find the loop asleep when that is due.
        longest = min(settings.EXPIRY_POLL_MS / 1000, settings.RESERVATION_TTL_SECONDS)
        if next_deadline is None:
            return longest
        return max(SHORTEST_PAUSE_SECONDS, min(next_deadline, longest))
