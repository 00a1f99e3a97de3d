from collections.abc import Iterator
from typing import Any

from django.conf import settings
from django.core.management.base import CommandError, CommandParser
from django.db import transaction
from django.db.models import Model
from rich.progress import Progress

from config.commands import DatabaseCommand
from config.database import read_clock
from config.seeding import DemoData, Present, find_present, give_roles, truncate_tables

ROWS_PER_STATEMENT = 250


class Command(DatabaseCommand):
    help = (
        "Fill the database with demo data: drops in every state, with their reservations, "
        "purchases and events. Whatever was there before is removed."
    )

    def add_arguments(self, parser: CommandParser) -> None:
        parser.add_argument(
            "--no-reset", dest="reset", action="store_false", help="keep what is there, and add"
        )
        parser.add_argument(
            "--seed",
            type=int,
            default=42,
            metavar="N",
            help="the same number makes the same data, ids included; default: %(default)s",
        )
        parser.add_argument(
            "--force", action="store_true", help="even without DEBUG; then nobody can sign in"
        )

    def handle(self, *, reset: bool, seed: int, force: bool, **options: Any) -> None:
        if not settings.DEBUG and not force:
            raise CommandError("seed fills development databases; DEBUG is off. See --force.")
        data = DemoData(
            seed,
            read_clock(),
            Present() if reset else find_present(seed),
            admin_login=settings.DEBUG,
        )
        with transaction.atomic():
            if reset:
                self.stdout.write("Emptying the tables")
                truncate_tables()
            for model, rows in self.batches(data.rows):
                model._default_manager.bulk_create(rows)
            give_roles()
        total = sum(map(len, data.rows.values()))
        self.stdout.write(self.style.SUCCESS(f"Stored {total} rows with seed {seed}:"))
        for model, stored in data.rows.items():
            self.stdout.write(f"  {model.__name__:16} {len(stored):5}")

    def batches(
        self, rows: dict[type[Model], list[Any]]
    ) -> Iterator[tuple[type[Model], list[Any]]]:
        """Yield the rows in portions, showing a bar per table on a terminal, else a line."""
        is_terminal = self.stdout.isatty()
        with Progress(disable=not is_terminal) as progress:
            for model, objects in rows.items():
                name = str(model._meta.verbose_name_plural)
                if not is_terminal:
                    self.stdout.write(f"Storing {name}")
                task = progress.add_task(f"Storing {name}", total=len(objects))
                for start in range(0, len(objects), ROWS_PER_STATEMENT):
                    portion = objects[start : start + ROWS_PER_STATEMENT]
                    yield model, portion
                    progress.advance(task, len(portion))
