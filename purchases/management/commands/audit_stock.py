import json
import sys
import uuid
from typing import Any

from django.conf import settings
from django.core.management.base import CommandError, CommandParser
from rich.console import Console
from rich.table import Table

from config.commands import DatabaseCommand
from operations import heartbeats
from operations.exposition import AUDIT
from purchases.audit import Audit, audit_stock, pause_drifting


class Command(DatabaseCommand):
    help = (
        "Recompute every stock from its reservations and purchases. "
        "Exits with 1, and a table, when anything differs, with 2 when it could not look; pauses "
        "the drops in question where PAUSE_DRIFTING_DROPS is set."
    )

    def add_arguments(self, parser: CommandParser) -> None:
        parser.add_argument("--drop", type=uuid.UUID, metavar="ID", help="only this drop")
        parser.add_argument("--json", action="store_true", help="for programs")

    def handle(self, *, drop: uuid.UUID | None, **options: Any) -> None:
        audit = audit_stock(drop)
        if drop is not None and not audit.drops:
            raise CommandError(f"There is no drop {drop}.", returncode=2)
        if drop is None:
            # What /metrics tells from then on.
            heartbeats.write(AUDIT, differences=len(audit.differences))
            heartbeats.prune()
        paused = pause_drifting(audit) if settings.PAUSE_DRIFTING_DROPS else []
        if options["json"]:
            self.stdout.write(
                json.dumps(
                    {
                        "drops": audit.drops,
                        "differences": [d.as_json() for d in audit.differences],
                        "paused": [str(drop.pk) for drop in paused],
                    },
                    indent=2,
                )
            )
        elif audit.differences:
            self.print_table(audit)
            for drifting in paused:
                self.stdout.write(f"Paused: {drifting.name} ({drifting.pk})")
        else:
            self.stdout.write(f"{audit.drops} drops audited: every unit is accounted for.")
        if audit.differences:
            sys.exit(1)

    def print_table(self, audit: Audit) -> None:
        table = Table(title=f"{len(audit.differences)} differences in {audit.drops} drops")
        for column in ("Rule", "Drop", "What", "Expected", "Found"):
            table.add_column(column, overflow="fold")
        for d in audit.differences:
            table.add_row(d.check, str(d.drop_id), d.subject, d.expected, d.found)
        Console(file=self.stdout).print(table)  # type: ignore[arg-type]
