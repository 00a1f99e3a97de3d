from typing import Any

from django.core.management.base import CommandError, CommandParser

from config.commands import DatabaseCommand
from config.stopping import StopRequest
from operations.upkeep import PRUNERS, prune

ROWS_PER_BATCH = 5000
MOST_ROWS = 1_000_000


class Command(DatabaseCommand):
    help = (
        "Delete events older than a day, idempotency keys and socket tickets whose time is up, "
        "and ended sessions. Safe beside a running sale; run it from cron."
    )

    def add_arguments(self, parser: CommandParser) -> None:
        parser.add_argument(
            "--batch",
            type=int,
            default=ROWS_PER_BATCH,
            metavar="N",
            help="rows per transaction (default: %(default)s)",
        )
        parser.add_argument(
            "--most",
            type=int,
            default=MOST_ROWS,
            metavar="N",
            help="rows of each kind in one run; the rest waits for the next (default: %(default)s)",
        )

    def handle(self, *, batch: int, most: int, verbosity: int, **options: Any) -> None:
        for name, value in (("--batch", batch), ("--most", most)):
            if value < 1:
                raise CommandError(f"{name} must be 1 or more.")
        with StopRequest() as stop:
            for kind in PRUNERS:
                pruned = 0
                for deleted in prune(kind, batch, most):
                    pruned += deleted
                    if verbosity > 1:
                        self.stdout.write(f"{pruned} {kind} deleted ...")
                    if stop.is_set:
                        break
                self.stdout.write(f"{pruned} {kind} deleted.")
                if stop.is_set:
                    break
