import argparse
from typing import Any

from django.core.management.base import CommandError, CommandParser

from config.commands import DatabaseCommand
from config.stopping import StopRequest
from realtime.services import prune_events

DEFAULT_HOURS = 24
EVENTS_PER_BATCH = 5000
# A century; PostgreSQL's clock does not go back for ever.
MOST_HOURS = 876_600


class Command(DatabaseCommand):
    help = (
        "Delete events of the log that are older than a day. A client that was away for longer "
        "gets the state instead. Safe beside a running sale; run it from cron."
    )

    def add_arguments(self, parser: CommandParser) -> None:
        parser.add_argument(
            "--hours",
            type=hours,
            default=DEFAULT_HOURS,
            metavar="N",
            help="how much of the log stays; 1 or more (default: %(default)s)",
        )
        parser.add_argument(
            "--batch",
            type=int,
            default=EVENTS_PER_BATCH,
            metavar="N",
            help="events per transaction (default: %(default)s)",
        )

    def handle(self, *, hours: float, batch: int, verbosity: int, **options: Any) -> None:
        if not 1 <= hours <= MOST_HOURS:
            raise CommandError(f"--hours must be 1 to {MOST_HOURS}: clients resume from the log.")
        if batch < 1:
            raise CommandError("--batch must be 1 or more.")
        pruned = 0
        with StopRequest() as stop:
            while not stop.is_set and (more := prune_events(hours, batch)):
                pruned += more
                if verbosity > 1:
                    self.stdout.write(f"{pruned} events deleted ...")
        self.stdout.write(f"{pruned} events deleted.")


def hours(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no number of hours") from None
