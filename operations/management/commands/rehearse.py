import asyncio
import contextlib
import json
import resource
import signal
import sys
import uuid
from argparse import ArgumentTypeError
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from asgiref.sync import sync_to_async
from django.conf import settings
from django.core.management.base import CommandError, CommandParser
from rich.console import Console
from rich.live import Live

from config.commands import DatabaseCommand
from config.hot_routes import host_is_allowed
from operations import rehearsal_display as display
from operations.credentials import Credentials, NoCredentials, make_credentials, read_tokens
from operations.http_client import Connection, Lost, Server
from operations.rehearsals import (
    create_rehearsal,
    discard_rehearsals,
    read_rows,
    running_rehearsals,
    wait_until_settled,
)
from operations.shoppers import Crowd, Plan
from operations.verdict import Limits, Verdict, judge
from purchases.audit import audit_stock

USAGE = 2
INTERRUPTED = 130
# How long an expiry loop may take for the last holds.
EXPIRY_GRACE_SECONDS = 5.0
REFRESHES_PER_SECOND = 5
# Of this process: files that are no shopper's connection.
OTHER_FILES = 100


def number(lowest: float, highest: float, kind: type = int) -> Callable[[str], Any]:
    """Return the reader of an option that lies between ``lowest`` and ``highest``."""

    def read(text: str) -> Any:
        try:
            value = kind(text)
        except ValueError:
            value = None
        if value is None or not lowest <= value <= highest:
            raise ArgumentTypeError(f"must be from {lowest} to {highest}")
        return value

    return read


@contextlib.contextmanager
def undisturbed() -> Iterator[None]:
    """Let neither Ctrl-C nor SIGTERM interrupt the block."""
    signals = (signal.SIGINT, signal.SIGTERM)
    before = {number: signal.signal(number, signal.SIG_IGN) for number in signals}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class Command(DatabaseCommand):
    help = (
        "Rehearse a drop on the running installation: synthetic shoppers on a drop that nobody "
        "else sees, then a verdict. Exits with 0 when ready, 1 when not, 2 when it could not be "
        "tried. Leaves nothing behind."
    )

    def add_arguments(self, parser: CommandParser) -> None:
        add = parser.add_argument
        add("--users", type=number(1, 50_000), default=1000, metavar="N", help="shoppers")
        add("--stock", type=number(1, 50_000), default=100, metavar="N", help="units")
        add("--ttl", type=number(1, 300), default=10, metavar="SECONDS", help="life of a hold")
        add(
            "--conversion",
            type=number(0, 1, float),
            default=0.6,
            metavar="PART",
            help="part of the holders who buy",
        )
        add(
            "--arrive-seconds",
            type=number(0, 600, float),
            default=1.0,
            metavar="SECONDS",
            help="within which all come",
        )
        add("--watchers", type=number(0, 20_000), default=200, metavar="N", help="WebSockets")
        add(
            "--url",
            default=f"http://127.0.0.1:{settings.PORT}",
            help="public address of this installation, proxy included; default: %(default)s",
        )
        add(
            "--p99-ms",
            type=number(1, 60_000, float),
            default=1000.0,
            metavar="MS",
            help="limit of reserve and purchase",
        )
        add(
            "--event-p99-ms",
            type=number(1, 60_000, float),
            default=1000.0,
            metavar="MS",
            help="limit from a change to a watcher",
        )
        add(
            "--tokens",
            type=Path,
            metavar="FILE",
            help="bearer tokens of test accounts, where only the identity provider makes them",
        )
        add("--seed", type=int, default=1, metavar="N", help="of who does what when")
        add("--json", action="store_true", help="for programs")
        add("--clean", action="store_true", help="only remove what a killed rehearsal left behind")

    def handle(self, **options: Any) -> None:
        if options["clean"]:
            drops = discard_rehearsals()
            self.stdout.write(f"Removed {drops} rehearsal {'drop' if drops == 1 else 'drops'}.")
            return
        self.refuse_what_cannot_work(options)
        server = self.read_url(options["url"])
        users, credentials = self.read_identities(options)
        # To the log of a program the display is noise.
        self.console = Console(stderr=True, quiet=options["json"])
        before = signal.signal(signal.SIGTERM, signal.default_int_handler)
        try:
            verdict = self.rehearse(server, users, credentials, options)
        except KeyboardInterrupt:
            self.stderr.write("Stopped; nothing is left behind.")
            sys.exit(INTERRUPTED)
        finally:
            signal.signal(signal.SIGTERM, before)
        if options["json"]:
            self.stdout.write(json.dumps(verdict.as_json(), indent=2))
        else:
            out = Console(file=self.stdout)  # type: ignore[arg-type]
            out.print(display.report(verdict, options["users"], options["stock"]))
        if not verdict.is_ready:
            sys.exit(1)

    # --- Before ---------------------------------------------------------------------------

    def refuse_what_cannot_work(self, options: dict[str, Any]) -> None:
        running = running_rehearsals().first()
        if running is not None:
            raise CommandError(
                f"The {running.name.lower()} may still be going on. If it was killed, "
                "remove it with: manage.py rehearse --clean",
                returncode=USAGE,
            )
        files = options["users"] + options["watchers"] + OTHER_FILES
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        if hard != resource.RLIM_INFINITY and files > hard:
            raise CommandError(
                f"This needs {files} open files, and {hard} are allowed (ulimit -n).",
                returncode=USAGE,
            )
        if soft != resource.RLIM_INFINITY and files > soft:
            resource.setrlimit(resource.RLIMIT_NOFILE, (files, hard))

    def read_url(self, url: str) -> Server:
        try:
            server = Server.at(url)
        except ValueError as exc:
            raise CommandError(f"--url: {exc}", returncode=USAGE) from None
        if not host_is_allowed(server.netloc):
            raise CommandError(
                f"--url: {server.host} is not in ALLOWED_HOSTS, so it is no address of this "
                "installation. Give the one that shoppers use.",
                returncode=USAGE,
            )
        return server

    def read_identities(self, options: dict[str, Any]) -> tuple[list[uuid.UUID], Credentials]:
        """Return the users that exist already, none as a rule, and how to ask in a user's name."""
        try:
            if options["tokens"] is None:
                return [], make_credentials()
            users, credentials = read_tokens(options["tokens"])
        except (NoCredentials, OSError) as exc:
            raise CommandError(str(exc), returncode=USAGE) from None
        if len(users) < options["users"]:
            raise CommandError(
                f"{options['tokens']} has tokens of {len(users)} users only.", returncode=USAGE
            )
        return users[: options["users"]], credentials

    # --- The rehearsal --------------------------------------------------------------------

    def rehearse(
        self,
        server: Server,
        users: list[uuid.UUID],
        credentials: Credentials,
        options: dict[str, Any],
    ) -> Verdict:
        try:
            # What an older one left.
            discard_rehearsals()
            drop, made = create_rehearsal(
                options["stock"], options["ttl"], 0 if users else options["users"]
            )
            plan = Plan(
                server=server,
                drop_id=drop.pk,
                users=users or made,
                credentials=credentials,
                ttl=options["ttl"],
                conversion=options["conversion"],
                arrive_seconds=options["arrive_seconds"],
                watchers=options["watchers"],
                seed=options["seed"],
            )
            crowd = Crowd(plan)
            with Live(
                display.Progress(plan, crowd.seen),
                console=self.console,
                refresh_per_second=REFRESHES_PER_SECOND,
            ):
                asyncio.run(self.run(crowd))
            return judge(
                plan,
                crowd.seen,
                read_rows(drop.pk),
                audit_stock(drop.pk),
                Limits(options["p99_ms"], options["event_p99_ms"]),
            )
        finally:
            # Who has pressed Ctrl-C may do it again, and would leave all of it behind.
            with undisturbed():
                discard_rehearsals()

    async def run(self, crowd: Crowd) -> None:
        await self.check_address(crowd.plan)

        async def settle() -> int:
            wait = crowd.plan.ttl + EXPIRY_GRACE_SECONDS
            return await sync_to_async(wait_until_settled, thread_sensitive=False)(
                crowd.plan.drop_id, wait
            )

        await crowd.watch_and_shop(settle)

    async def check_address(self, plan: Plan) -> None:
        """Refuse to send a crowd where this installation doesn't answer."""
        connection = Connection(plan.server)
        try:
            answer = await connection.ask("GET", plan.path, {})
        except Lost as exc:
            raise CommandError(
                f"{plan.server.url('http')} does not answer: {exc}", returncode=USAGE
            ) from None
        finally:
            connection.close()
        if answer.data.get("id") != str(plan.drop_id):
            raise CommandError(
                f"{plan.server.url('http')} does not know the rehearsal's drop (it answers "
                f"{answer.status}), so it is not this installation.",
                returncode=USAGE,
            )
